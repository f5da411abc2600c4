"""Packing: nothing is lost, damage is found, and it is small.

Goal: rows come back equal from their packed forms, blocks say what the rows say, the storage budget holds.
Method: rows made by hypothesis for equality, flipped bytes for damage, noisy float32 signals for the size.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.storage.making import SIGNALS, chain, joined, joined_blocks, meta_of, observed, row, rows_of_any_kind

from flyball_server.core.errors import Damaged, Invalid
from flyball_server.storage.blocks import ROW_INTS, Stored, pack_segment, store, unpack_row, unpack_segment
from flyball_server.storage.journal import GENESIS, Column, Row
from flyball_server.storage.packing import compress, decompress
from flyball_server.storage.series import row_blocks, segment_blocks

BYTES_PER_OBSERVATION = 17.0
ASKED = ("loss", "reward", "=lr", "é")


def packed(rows: list[Row]) -> Stored:
    return pack_segment(GENESIS, [store(one) for one in rows])


@given(rows_of_any_kind)
@settings(max_examples=150, deadline=None)
def test_rows_come_back_equal_from_both_forms(rows: list[Row]) -> None:
    rows = chain("r", rows)
    assert [unpack_row("r", store(one)) for one in rows] == rows
    assert list(unpack_segment("r", packed(rows))) == rows


@given(rows_of_any_kind, st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_blocks_say_what_the_rows_say(rows: list[Row], after: int) -> None:
    rows = chain("r", rows)
    expected = joined(rows[after:], ASKED)
    for blocks in (segment_blocks("r", packed(rows), ASKED, after), row_blocks([*map(store, rows)], ASKED, after)):
        assert joined_blocks(blocks) == expected
        assert [b.seq for b in blocks] == sorted(b.seq for b in blocks)
        taken: dict[str, int] = {}
        for block in blocks:
            assert block.seq > taken.get(block.kind, after), "blocks of one kind overlap"
            mine = [
                one
                for one in rows[block.seq - 1 :]
                if one.kind == block.kind and {c.name for c in one.columns} & set(ASKED)
            ][: len(block.first_step)]
            taken[block.kind] = mine[-1].seq
            assert block.first_step.tolist() == [-1 if one.first_step is None else one.first_step for one in mine]
            assert block.last_step.tolist() == [-1 if one.last_step is None else one.last_step for one in mine]
            assert block.meta == meta_of(mine)


def test_rows_between_and_changing_lengths_types_and_metas_do_not_split_blocks() -> None:
    rows: list[Row] = []
    for i in range(50):
        kind = "fd"[i % 2]
        loss = np.full(1 + i % 3, i, {"f": "<f4", "d": "<f8"}[kind])
        rows.append(row(columns=(Column("loss", kind, loss.tobytes()),), meta={"marks": [i]}))
        rows.append(row("applied", columns=(Column("lr", "d", bytes(8)),)))
    blocks = segment_blocks("r", packed(chain("r", rows)), ["loss", "lr"])
    assert [(b.kind, len(b.first_step)) for b in blocks] == [("observed", 50), ("applied", 50)]
    assert blocks[0].arrays["loss"].dtype == np.float64
    assert blocks[0].arrays["loss"].tolist() == [i for i in range(50) for _ in range(1 + i % 3)]
    assert blocks[0].meta == {}


def test_columns_nobody_asked_for_do_not_split_blocks() -> None:
    rows = [
        row(columns=(Column("loss", "f", bytes(4)), *([Column("other", "f", bytes(4))] if i % 2 else [])))
        for i in range(10)
    ]
    assert len(segment_blocks("r", packed(chain("r", rows)), ["loss"])) == 1
    assert len(segment_blocks("r", packed(chain("r", rows)), ["loss", "other"])) == 10


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.95])
def test_a_flipped_byte_of_a_segment_is_found_and_its_rows_named(where: float) -> None:
    segment = packed(chain("run-7", observed(64, 64)))
    payload = bytearray(segment.payload)
    payload[int(where * len(payload))] ^= 1
    for read in (unpack_segment, lambda run, s: segment_blocks(run, s, SIGNALS)):
        with pytest.raises(Damaged, match=r"run 'run-7', rows 1 to 64"):
            list(read("run-7", segment._replace(payload=bytes(payload))))


def test_a_segment_that_was_exchanged_is_found() -> None:
    segment = packed(chain("r", observed(3, 4)))
    with pytest.raises(Damaged, match=r"run 'r', rows 1 to 3.*digest"):
        list(unpack_segment("r", segment._replace(hash=bytes(32))))
    with pytest.raises(Damaged, match=r"run 'r', rows 1 to 3.*hash chain"):  # one of an early version, without digest
        list(unpack_segment("r", segment._replace(hash=bytes(32), actor="")))
    with pytest.raises(Damaged, match="hash chain"):
        list(unpack_segment("another run", segment))


@pytest.mark.parametrize(
    "bad",
    [
        row(columns=(Column("loss", "f", b"abc"),)),
        row(columns=(Column("loss", "x", b"abcd"),)),
        row(meta={"loss": float("nan")}),
        row(meta={"loss": object()}),
    ],
)
def test_a_row_that_cannot_be_kept_is_refused(bad: Row) -> None:
    with pytest.raises(Invalid):
        store(bad)


@pytest.mark.parametrize("type_", ["f", "d"])
@pytest.mark.parametrize(("count", "per_row"), [(64, 64), (4096, 1), (1024, 1)])
def test_an_observation_of_four_float32_born_signals_fits_the_budget(count: int, per_row: int, type_: str) -> None:
    segment = packed(chain("r", observed(count, per_row, type_=type_)))
    size = len(segment.payload) / (count * per_row)
    print(f"{count} rows of {per_row} observations of type {type_}: {size:.2f} bytes an observation")
    assert size <= BYTES_PER_OBSERVATION


@pytest.mark.parametrize("lie", ["rows", "shape"])
def test_a_segment_that_claims_more_than_it_holds_takes_no_memory(lie: str) -> None:
    """What a stranger wrote may have right checksums all over."""
    segment = packed(chain("r", observed(3, 4)))
    data = decompress(segment.payload)
    end = 4 + int.from_bytes(data[:4], "little")
    head = json.loads(data[4:end])
    if lie == "rows":
        head["rows"] = 1 << 48
    else:
        head["ints"][ROW_INTS.index("shape")] = [0, 1 << 48]
    changed = json.dumps(head).encode()
    payload = compress([len(changed).to_bytes(4, "little"), changed, data[end:]])
    with pytest.raises(Damaged, match="rows 1 to 3"):
        list(unpack_segment("r", segment._replace(payload=payload)))
