"""Rows, appends and a collector of results for the storage tests.

Goal: every test states only what it is about. Method: one builder that numbers and chains rows as the engine does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st

from flyball_server.storage.journal import GENESIS, Append, Column, Journal, Row, RunRecord, Snapshot, chained

AT = 1_700_000_000_000_000
SIGNALS = ("loss", "grad_norm", "update_norm", "reward")
WAIT_S = 20.0


def chain(run: str, rows: Sequence[Row], *, after: Row | None = None) -> list[Row]:
    """The rows, numbered on from `after` and hashed."""
    seq, previous = (after.seq, after.hash) if after else (0, GENESIS)
    out = []
    for row in rows:
        seq += 1
        row = row._replace(seq=seq)
        previous = chained(previous, run, row)
        out.append(row._replace(hash=previous))
    return out


def row(kind: str = "observed", **fields: Any) -> Row:
    """A row without number and hash."""
    blank = Row(0, kind, 1, None, None, "driver:a", AT, {}, (), b"")
    return blank._replace(**fields)


def observed(count: int, per_row: int, *, seed: int = 0, first: int = 0, type_: str = "f") -> list[Row]:
    """Rows of four noisy float32-born signals, `at` with a jitter, not chained yet."""
    rng = np.random.default_rng(seed)
    total = count * per_row
    falling = 3 * np.exp(-np.arange(total) / 2000) + 0.2
    scale = np.stack([falling, np.ones(total), np.full(total, 1e-3), np.full(total, 0.1)])
    values = (scale * np.exp(0.2 * rng.normal(size=(4, total)))).astype("<f4")
    at = AT + np.cumsum(rng.normal(1000 * per_row, 100, count)).astype(np.int64)
    rows = []
    for i in range(count):
        part = values[:, i * per_row : (i + 1) * per_row].astype({"f": "<f4", "d": "<f8"}[type_])
        columns = tuple(Column(name, type_, v.tobytes()) for name, v in zip(SIGNALS, part, strict=True))
        start = first + i * per_row
        rows.append(
            row(first_step=start, last_step=start + per_row - 1, at=int(at[i]), columns=columns),
        )
    return rows


def record(run: str, newest: Row | None, **fields: Any) -> RunRecord:
    """The projection that belongs to the newest row."""
    seq, hash_, at = (newest.seq, newest.hash, newest.at) if newest else (0, GENESIS, AT)
    blank = RunRecord(run, "vision", f"name of {run}", "active", "plateau@1", {}, 1, None, AT, at, seq, hash_)
    return blank._replace(**fields)


def append(
    run: str, rows: Sequence[Row], *, snapshot: Snapshot | None = None, token: Any = None, **fields: Any
) -> Append:
    """The append of chained rows."""
    return Append(rows[0].seq - 1, tuple(rows), record(run, rows[-1], **fields), snapshot, token)


class Results:
    """A `deliver` that keeps what it is given; `wait` blocks until that many results are there."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[Append, Exception | None]]] = []
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile a delivery does not return, so that appends pile up behind it."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def __call__(self, results: Sequence[tuple[Append, Exception | None]]) -> None:
        with self._changed:
            self.calls.append(list(results))
            self._changed.notify_all()
        assert self._open.wait(WAIT_S)

    @property
    def all(self) -> list[tuple[Append, Exception | None]]:
        return [result for call in self.calls for result in call]

    def wait(self, count: int) -> list[Exception | None]:
        """The errors of the first `count` results."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, WAIT_S), f"{len(self.all)} of {count}"
            return [error for _, error in self.all[:count]]


@contextmanager
def started(journal: Journal) -> Iterator[tuple[Journal, Results]]:
    """The journal, open, and its results."""
    results = Results()
    journal.start(results)
    try:
        yield journal, results
    finally:
        journal.close()


def keep(journal: Journal, results: Results, *appends: Append) -> list[Exception | None]:
    """Append all and wait; the errors, one per append."""
    before = len(results.all)
    for item in appends:
        journal.append(item)
    return results.wait(before + len(appends))[before:]


# -- rows as hypothesis makes them ---------------------------------------------------------------------------

WIDTHS = {"f": 4, "d": 8, "I": 4, "q": 8}
_words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=5,
)
_int64 = st.integers(-(2**63), 2**63 - 1)
_steps = st.none() | st.integers(0, 2**40)
_names = st.lists(st.sampled_from(["loss", "reward", "=lr", "é"]), unique=True, max_size=3)


@st.composite
def _columns(draw: st.DrawFn) -> tuple[Column, ...]:
    columns = []
    for name in draw(_names):
        kind = draw(st.sampled_from(sorted(WIDTHS)))
        size = WIDTHS[kind] * draw(st.integers(0, 3))
        columns.append(Column(name, kind, draw(st.binary(min_size=size, max_size=size))))
    return tuple(columns)


rows_of_any_kind: st.SearchStrategy[list[Row]] = st.lists(
    st.builds(
        Row,
        seq=st.just(0),
        kind=st.sampled_from(["observed", "applied", "", "segment"]),
        attempt=st.integers(0, 3),
        first_step=_steps,
        last_step=_steps,
        actor=_words,
        at=_int64,
        meta=st.sampled_from([{}, {"a": 1}]) | st.dictionaries(_words, _json, max_size=3),
        columns=_columns(),
        hash=st.just(b""),
    ),
    min_size=1,
    max_size=12,
)


def joined(rows: Sequence[Row], columns: Sequence[str]) -> dict[tuple[str, int, str], tuple[list[bytes], list[int]]]:
    """What blocks have to say, made from rows: per kind, attempt and column its values (as float64 or int64 bytes)
    and how many values each row has, in order."""
    out: dict[tuple[str, int, str], tuple[list[bytes], list[int]]] = {}
    for one in rows:
        for column in one.columns:
            if column.name in columns:
                values, counts = out.setdefault((one.kind, one.attempt, column.name), ([], []))
                array = np.frombuffer(column.data, {"f": "<f4", "d": "<f8", "I": "<u4", "q": "<i8"}[column.type])
                values += [_plain(v) for v in array]
                counts.append(len(array))
    return out


def joined_blocks(blocks: Sequence[Any]) -> dict[tuple[str, int, str], tuple[list[bytes], list[int]]]:
    """The same, made from blocks."""
    out: dict[tuple[str, int, str], tuple[list[bytes], list[int]]] = {}
    for block in blocks:
        for name, array in block.arrays.items():
            values, counts = out.setdefault((block.kind, block.attempt, name), ([], []))
            values += [_plain(v) for v in array]
            counts += block.counts[name].tolist()
    return out


def _plain(value: Any) -> bytes:
    """A value as float64 bytes, all NaN alike: columns of several types are joined as the wider one."""
    wide = np.float64(value)
    return b"nan" if np.isnan(wide) else wide.tobytes()


def meta_of(rows: Sequence[Row]) -> Mapping[str, Any]:
    """The meta that a block of these rows has."""
    return rows[0].meta if all(one.meta == rows[0].meta for one in rows) else {}
