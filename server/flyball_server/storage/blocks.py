"""How rows become bytes and come back: single rows, compressed segments of many, and blocks for series.

Rule of this module: nothing is lost. What was packed comes back equal field by field, or raises `Damaged`.

A single row is written as fast as possible: its meta and its columns' layout as JSON, then the columns as
they are. A segment holds many consecutive rows column-wise: each distinct meta and each distinct shape (a
kind and the names and types of its columns) once, the rows' integers as differences, and each column of a
shape as one stream over all rows of that shape. Streams are joined as bytes, without looking at a value.
Hashes are not kept: a segment knows the hash before its first row, and its table row the one of its last,
so unpacking it repeats the chain and proves every row between the two. That the table row itself is what was written,
compressed bytes included, is proved by a digest, which stands where a single row has its actor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from flyball_server.core.errors import Damaged, Invalid
from flyball_server.storage.journal import Append, Column, Row, chained
from flyball_server.storage.packing import (
    Ints,
    compress,
    decompress,
    int64,
    pack_ints,
    shuffle,
    unpack_ints,
    unshuffle,
)

#: numpy's name of each column type, and its bytes per value.
DTYPES = {"f": "<f4", "d": "<f8", "I": "<u4", "q": "<i8"}
WIDTHS = {kind: np.dtype(name).itemsize for kind, name in DTYPES.items()}

#: Column layouts remembered in packed and in parsed form.
LAYOUTS_MAX = 4096

#: The kind of a table row that is a segment. What tells it apart is last_seq > seq, not this word.
SEGMENT = "segment"

_LENGTHS = struct.Struct("<II")
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Stored(NamedTuple):
    """A row of the journal table without its run: one row of the run, or (last_seq > seq) a segment of many."""

    seq: int
    last_seq: int
    kind: str
    attempt: int
    first_step: int | None
    last_step: int | None
    actor: str
    at: int
    payload: bytes
    hash: bytes


class Shape(NamedTuple):
    """What rows of one stream have in common: their kind, and their columns' names and types."""

    kind: str
    columns: tuple[tuple[str, str], ...]


class Batch(NamedTuple):
    """Many rows column-wise. `rows` has one array per entry of `ROW_INTS`, `sizes` and `planes` one entry per
    shape and column: the bytes each row of that shape contributed, and the stream's byte planes."""

    rows: dict[str, Ints]
    actors: list[str]
    metas: list[bytes]
    shapes: list[Shape]
    sizes: list[list[Ints]]
    planes: Sequence[Sequence[bytes | memoryview]]


#: `steps` tells which of first_step (1) and last_step (2) are there; `span` is last_step - first_step.
ROW_INTS = ("seq", "attempt", "steps", "first", "span", "at", "actor", "meta", "shape")


def check_order(append: Append) -> None:
    """Invalid unless the rows are numbered on from `expected_seq` without a gap."""
    for seq, row in enumerate(append.rows, append.expected_seq + 1):
        if row.seq != seq:
            raise Invalid(f"run {append.record.run!r}: row {row.seq} comes where row {seq} has to")


# -- single rows ---------------------------------------------------------------------------------------------


def pack_row(row: Row) -> bytes:
    """A row's meta and columns. Raises Invalid where meta is not plain JSON or a column not what its type says."""
    layout = _layout_bytes(tuple([(c.name, c.type, len(c.data)) for c in row.columns]))
    try:
        meta = _encode(row.meta).encode()
    except (TypeError, ValueError) as error:
        raise Invalid(f"meta of row {row.seq} is not plain JSON: {error}") from error
    return b"".join((_LENGTHS.pack(len(meta), len(layout)), meta, layout, *[c.data for c in row.columns]))


def store(row: Row) -> Stored:
    """A row as the journal table keeps it."""
    seq, kind, attempt, first_step, last_step, actor, at, _, _, hash_ = row
    return Stored(seq, seq, kind, attempt, first_step, last_step, actor, at, pack_row(row), hash_)


def unpack_row(run: str, stored: Stored) -> Row:
    """The row again; its hash is the table's, and is not checked."""
    seq, _, kind, attempt, first_step, last_step, actor, at, payload, hash_ = stored
    columns, start = [], 0
    try:
        meta_bytes, layout, data = _split(payload)
        meta = json.loads(meta_bytes)
        if meta and _encode(meta).encode() != meta_bytes:  # 1e5 and 1E5 are one number
            raise ValueError("its meta is not as it was written")
        for name, type_, size in _layout(layout):
            columns.append(Column(name, type_, data[start : start + size]))
            start += size
        if start != len(data):
            raise ValueError(f"it has {len(data)} bytes of columns where its layout has {start}")
    except (ValueError, TypeError, struct.error) as error:
        raise Damaged(f"run {run!r}, row {seq} is damaged: {error}") from error
    return Row(seq, kind, attempt, first_step, last_step, actor, at, meta, tuple(columns), hash_)


def check_types(run: str, stored: Stored) -> Stored:
    """The table row itself. Raises Damaged where a column does not even have its type: SQLite would not mind."""
    seq, last_seq, kind, attempt, first_step, last_step, actor, at, payload, hash_ = stored
    numbers = (seq, last_seq, attempt, at, first_step or 0, last_step or 0)
    if (
        any(type(number) is not int for number in numbers)
        or not (type(kind) is type(actor) is str and type(payload) is type(hash_) is bytes)
        or last_seq < seq
    ):
        raise Damaged(f"run {run!r}, row {seq} is damaged: its columns do not have their types")
    return stored


def prove(run: str, previous: bytes, rows: Iterable[Stored]) -> None:
    """Raise Damaged where single rows are not what was written behind the hash `previous`."""
    for stored in rows:
        row = unpack_row(run, stored)
        if chained(previous, run, row) != row.hash:
            raise Damaged(f"run {run!r}, row {stored.seq} is damaged: its hash is not that of its contents")
        previous = row.hash


def unpack(run: str, stored: Stored, kinds: frozenset[str] | None = None) -> Iterable[Row]:
    """The row, or the rows of the segment; `kinds`: of these kinds only."""
    if stored.last_seq > stored.seq:
        return unpack_segment(run, stored, kinds)
    return (unpack_row(run, stored),) if kinds is None or stored.kind in kinds else ()


@lru_cache(LAYOUTS_MAX)
def _layout_bytes(layout: tuple[tuple[str, str, int], ...]) -> bytes:
    for name, kind, size in layout:
        if kind not in WIDTHS:
            raise Invalid(f"column {name!r} has the type {kind!r}; allowed are {', '.join(WIDTHS)}")
        if size % WIDTHS[kind]:
            raise Invalid(f"column {name!r} has {size} bytes, which is no whole number of values of type {kind!r}")
    return _encode(layout).encode()


@lru_cache(LAYOUTS_MAX)
def _layout(data: bytes) -> tuple[tuple[str, str, int], ...]:
    layout = tuple((name, kind, size) for name, kind, size in json.loads(data))
    if _encode(layout).encode() != data:
        raise ValueError("its layout is not as it was written")
    return layout


def _split(payload: bytes) -> tuple[bytes, bytes, bytes]:
    meta, layout = _LENGTHS.unpack_from(payload)
    start, end = _LENGTHS.size + meta, _LENGTHS.size + meta + layout
    return payload[_LENGTHS.size : start], payload[start:end], payload[end:]


# -- many rows -----------------------------------------------------------------------------------------------


def gather(rows: Sequence[Stored]) -> Batch:
    """Single rows, in order, column-wise. The rows' JSON is compared, but only distinct layouts are parsed."""
    actors: dict[str, int] = {}
    metas: dict[bytes, int] = {}
    layouts: dict[tuple[str, bytes], int] = {}
    actor, meta, layout, data = [], [], [], []
    for row in rows:
        meta_bytes, layout_bytes, column_bytes = _split(row.payload)
        actor.append(actors.setdefault(row.actor, len(actors)))
        meta.append(metas.setdefault(meta_bytes, len(metas)))
        layout.append(layouts.setdefault((row.kind, layout_bytes), len(layouts)))
        data.append(column_bytes)
    shapes: dict[Shape, int] = {}
    parsed = [(kind, _layout(text)) for kind, text in layouts]
    shape_of = [shapes.setdefault(Shape(k, tuple((n, t) for n, t, _ in p)), len(shapes)) for k, p in parsed]
    layout_ints = int64(layout)
    shape = int64(shape_of)[layout_ints]
    sizes, planes = [], []
    for index, form in enumerate(shapes):
        members = np.flatnonzero(shape == index)
        which, inverse = np.unique(layout_ints[members], return_inverse=True)
        table = np.array([[size for _, _, size in parsed[w][1]] for w in which], np.int64)
        matrix = table[inverse]
        streams = _streams([data[i] for i in members], matrix, uniform=len(which) == 1)
        sizes.append([*matrix.T])
        planes.append([b"".join(shuffle(s, WIDTHS[t])) for s, (_, t) in zip(streams, form.columns, strict=True)])
    return Batch(_row_ints(rows, actor, meta, shape), [*actors], [*metas], [*shapes], sizes, planes)


def _streams(data: list[bytes], sizes: Ints, *, uniform: bool) -> list[bytes]:
    """The rows' column bytes, one stream per column. sizes: a line per row, bytes per column."""
    if uniform:  # one cut through all rows
        ends = np.cumsum(sizes[0]).tolist()
        grid = np.frombuffer(b"".join(data), np.uint8).reshape(len(data), ends[-1] if ends else 0)
        return [grid[:, end - size : end].tobytes() for end, size in zip(ends, sizes[0].tolist(), strict=True)]
    cut = np.cumsum(sizes, axis=1)
    return [
        b"".join([d[end - size : end] for d, end, size in zip(data, ends, column, strict=True)])
        for ends, column in zip(cut.T.tolist(), sizes.T.tolist(), strict=True)
    ]


def _row_ints(rows: Sequence[Stored], actor: list[int], meta: list[int], shape: Ints) -> dict[str, Ints]:
    seq, _, _, attempt, first, last, _, at, _, _ = zip(*rows, strict=True)
    has_first = np.array([step is not None for step in first])
    has_last = np.array([step is not None for step in last])
    # A row without steps carries the step of the row before it, so that the differences stay small.
    filled = int64(0 if step is None else step for step in first)
    filled = filled[np.maximum.accumulate(np.where(has_first, np.arange(len(rows)), 0))]
    span = np.where(has_last, int64(0 if step is None else step for step in last) - filled, 0)
    steps = has_first.astype(np.int64) | has_last.astype(np.int64) << 1
    values = (int64(seq), int64(attempt), steps, filled, span, int64(at), int64(actor), int64(meta), shape)
    return dict(zip(ROW_INTS, values, strict=True))


# -- segments ------------------------------------------------------------------------------------------------


def pack_segment(previous: bytes, rows: Sequence[Stored]) -> Stored:
    """Consecutive single rows as one segment. previous: the hash of the row before the first one."""
    batch = gather(rows)
    body: list[bytes] = []
    head = {
        "rows": len(rows),
        "previous": previous.hex(),
        "actors": batch.actors,
        "metas": [len(meta) for meta in batch.metas],
        "shapes": batch.shapes,
        "ints": [pack_ints(batch.rows[name], body) for name in ROW_INTS],
        "sizes": [[pack_ints(column, body) for column in shape] for shape in batch.sizes],
    }
    for shape, streams in zip(batch.shapes, batch.planes, strict=True):
        for (_, kind), stream in zip(shape.columns, streams, strict=True):
            plane = len(stream) // WIDTHS[kind]
            body += [bytes(stream[i : i + plane]) for i in range(0, len(stream), plane or 1)]
    head_bytes = json.dumps(head, separators=(",", ":")).encode()
    payload = compress([len(head_bytes).to_bytes(4, "little"), head_bytes, b"".join(batch.metas), *body])
    newest = rows[-1]
    first = min((row.first_step for row in rows if row.first_step is not None), default=None)
    last = max((row.last_step for row in rows if row.last_step is not None), default=None)
    segment = Stored(rows[0].seq, newest.seq, SEGMENT, newest.attempt, first, last, "", newest.at, payload, newest.hash)
    return segment._replace(actor=_digest(segment))


def _digest(segment: Stored) -> str:
    """What proves a segment's table row. Other bytes can well be decompressed to the same rows."""
    columns = segment._replace(actor="", payload=b"", hash=b"")
    return sha256(b"\n".join((repr(tuple(columns)).encode(), segment.hash, segment.payload))).hexdigest()


def read_segment(run: str, segment: Stored) -> tuple[bytes, Batch]:
    """The hash before the segment, and its rows column-wise."""
    if segment.actor and segment.actor != _digest(segment):  # early versions wrote none
        raise Damaged(f"run {run!r}, rows {segment.seq} to {segment.last_seq} are damaged: their digest is another")
    try:
        return _decode(memoryview(decompress(segment.payload)), segment.last_seq - segment.seq + 1)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Damaged(f"run {run!r}, rows {segment.seq} to {segment.last_seq} are damaged: {error}") from error


def _decode(data: memoryview, count: int) -> tuple[bytes, Batch]:
    at = 4 + int.from_bytes(data[:4], "little")
    head: dict[str, Any] = json.loads(bytes(data[4:at]))
    if head["rows"] != count:  # what is made below has this size, whoever wrote the segment
        raise ValueError(f"it says that it holds {head['rows']} rows")
    metas = []
    for size in head["metas"]:
        metas.append(bytes(data[at : at + size]))
        at += size
    rows: dict[str, Ints] = {}
    for name, form in zip(ROW_INTS, head["ints"], strict=True):
        rows[name], used = unpack_ints(form, head["rows"], data[at:])
        at += used
    shapes = [Shape(kind, tuple((n, t) for n, t in columns)) for kind, columns in head["shapes"]]
    if not 0 <= int(rows["shape"].min()) <= int(rows["shape"].max()) < len(shapes):
        raise ValueError("a row has a shape that is not there")
    members = np.bincount(rows["shape"], minlength=len(shapes)).tolist()
    sizes: list[list[Ints]] = []
    for size, forms in zip(members, head["sizes"], strict=True):
        sizes.append([])
        for form in forms:
            values, used = unpack_ints(form, size, data[at:])
            sizes[-1].append(values)
            at += used
    planes: list[list[memoryview]] = []
    for columns in sizes:
        planes.append([])
        for column in columns:
            size = int(column.sum())
            planes[-1].append(data[at : at + size])
            at += size
    return bytes.fromhex(head["previous"]), Batch(rows, head["actors"], metas, shapes, sizes, planes)


def unpack_segment(run: str, segment: Stored, kinds: frozenset[str] | None = None) -> Iterator[Row]:
    """The segment's rows. Their hashes are computed again; behind the last row, Damaged where its hash is not the
    table's. Reading only the first rows costs little more than these. kinds: of these only; a segment that has none of
    them is not unpacked."""
    previous, batch = read_segment(run, segment)
    if kinds is not None and not any(shape.kind in kinds for shape in batch.shapes):
        return
    streams = [
        [iter(_pieces(unshuffle(p, WIDTHS[t]).tobytes(), s)) for p, s, (_, t) in zip(ps, ss, form.columns, strict=True)]
        for ps, ss, form in zip(batch.planes, batch.sizes, batch.shapes, strict=True)
    ]
    seq = 0
    for seq, attempt, steps, first, span, at, actor, meta, shape in zip(
        *[batch.rows[name].tolist() for name in ROW_INTS], strict=True
    ):
        form = batch.shapes[shape]
        columns = tuple(Column(n, t, next(s)) for (n, t), s in zip(form.columns, streams[shape], strict=True))
        first_step, last_step = first if steps & 1 else None, first + span if steps & 2 else None
        row = Row(
            seq, form.kind, attempt, first_step, last_step, batch.actors[actor], at,
            json.loads(batch.metas[meta]), columns, previous,
        )  # fmt: skip
        previous = chained(previous, run, row)
        if kinds is None or form.kind in kinds:
            yield row._replace(hash=previous)
    if previous != segment.hash or seq != segment.last_seq:
        raise Damaged(
            f"run {run!r}, rows {segment.seq} to {segment.last_seq} are damaged: their hash chain does not end "
            f"in the hash of row {segment.last_seq}"
        )


def _pieces(stream: bytes, sizes: Ints) -> list[bytes]:
    ends = np.cumsum(sizes).tolist()
    return [stream[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
