"""A run as an export file, piece by piece.

Rule of this module: nothing is signed that was not checked. The hash chain is repeated while the rows pass by.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from flyball_server import limits, records
from flyball_server.core.errors import Damaged
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.exports.form import MAGIC, begun, line, plain, signed_part
from flyball_server.signing import Signer
from flyball_server.storage.blocks import Stored, pack_segment, store
from flyball_server.storage.journal import GENESIS, Journal, Row, RunRecord, chained


def written(journal: Journal, record: RunRecord, version: str, at: int, signer: Signer) -> Iterator[bytes]:
    """The file of the run as `record` has it. at: now, in microseconds since 1970.

    Raises Damaged where the journal does not hold what it should; what was yielded by then is no export.
    """
    digest, total = hashlib.sha256(), 0
    for piece in _pieces(journal, record, version, at):
        digest.update(piece)
        total += len(piece)
        yield piece
    end = {
        "part": "end",
        "bytes": total,
        "rows": record.seq,
        "head": record.hash.hex(),
        "sha256": digest.hexdigest(),
        "key": signer.public.hex(),
    }
    yield line({**end, "signature": signer.sign(signed_part(end)).hex()})


def manifest(first: Row, record: RunRecord, version: str, at: int) -> dict[str, Any]:
    """What the file says about its run before the rows say it all."""
    return {
        "run": record.run,
        "specification": first.meta["spec"],
        "versions": {"flyball": version, "python": platform.python_version()},
        "policies": sorted(_policies(first.meta["spec"]["policy"])),
        "record": {**record._asdict(), "labels": dict(record.labels), "hash": record.hash.hex()},
        "exported_at": records.utc(at),
    }


def _pieces(journal: Journal, record: RunRecord, version: str, at: int) -> Iterator[bytes]:
    rows = _proved(journal, record)
    first = next(rows)
    yield MAGIC
    yield from _part({"part": "manifest"}, plain(manifest(first, record, version, at)))
    previous, waiting, observations, size = GENESIS, [store(first)], 0, 0
    for row in rows:
        if (
            len(waiting) >= limits.EXPORT_ROWS_MAX
            or observations >= limits.EXPORT_OBSERVATIONS_MAX
            or (len(waiting) > 1 and size >= limits.EXPORT_ROWS_BYTES)
        ):
            yield from _rows_part(previous, waiting)
            previous, waiting, observations, size = waiting[-1].hash, [], 0, 0
        waiting.append(store(row))
        observations += 1 if row.first_step is None or row.last_step is None else row.last_step - row.first_step + 1
        size += len(waiting[-1].payload)
    yield from _rows_part(previous, waiting)


def _proved(journal: Journal, record: RunRecord) -> Iterator[Row]:
    """The run's rows, each behind the one before."""
    previous, seq = GENESIS, 0
    for row in journal.rows(record.run, until=record.seq):
        seq += 1
        if row.seq != seq or chained(previous, record.run, row) != row.hash:
            raise Damaged(f"run {record.run!r}, row {seq} is damaged: `flyball-server verify` says more")
        previous = row.hash
        yield row
    if (seq, previous) != (record.seq, record.hash) or not seq:
        raise Damaged(f"run {record.run!r} ends with row {seq}, and should with row {record.seq}")


def _rows_part(previous: bytes, rows: list[Stored]) -> Iterator[bytes]:
    segment = pack_segment(previous, rows)
    header = {"part": "rows", "first": segment.seq, "last": segment.last_seq, "hash": segment.hash.hex()}
    return _part(header, segment.payload)


def _part(header: Mapping[str, Any], payload: bytes) -> Iterator[bytes]:
    header = {**header, "bytes": len(payload)}
    digest = begun(header)
    digest.update(payload)
    yield line({**header, "sha256": digest.hexdigest()})
    yield payload
    yield b"\n"


def _policies(spec: Any) -> set[str]:
    """The tags of a policy and of those inside it."""
    found: set[str] = set()
    if isinstance(spec, Mapping):
        kind = str(spec.get("type"))
        if kind in ALL or kind in POLICIES:
            found.add(kind if kind in ALL else POLICIES[kind].tag)
    inner = spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, list | tuple) else ()
    return found.union(*map(_policies, inner))
