"""Blocks for series: the columns of many rows as numpy arrays, without making a row.

Rule of this module: as few blocks as the contract allows. Within one batch of rows, those of one kind come out
together until their attempt or their set of asked-for columns changes, whatever rows of other kinds lie between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flyball_server.storage.blocks import DTYPES, WIDTHS, Batch, Stored, gather, read_segment
from flyball_server.storage.journal import Block
from flyball_server.storage.packing import Ints, unshuffle


def segment_blocks(run: str, segment: Stored, columns: Iterable[str], after: int = 0) -> list[Block]:
    """The blocks of a segment's rows with seq > after."""
    return _Blocks(read_segment(run, segment)[1], columns).cut(after)


def row_blocks(rows: Sequence[Stored], columns: Iterable[str], after: int = 0) -> list[Block]:
    """The blocks of single rows."""
    return _Blocks(gather(rows), columns).cut(after) if rows else []


class _Blocks:
    """One batch being cut into blocks; keeps each column it has read."""

    def __init__(self, batch: Batch, columns: Iterable[str]) -> None:
        asked = tuple(dict.fromkeys(columns))
        self._batch = batch
        self._columns = [{name: i for i, (name, _) in enumerate(shape.columns)} for shape in batch.shapes]
        #: Per shape: the asked-for columns it has.
        self._wanted = [tuple(name for name in asked if name in has) for has in self._columns]
        self._read: dict[tuple[int, str], tuple[npt.NDArray[Any], Ints, Ints]] = {}
        steps, first = batch.rows["steps"], batch.rows["first"]
        self._first = np.where(steps & 1, first, -1)
        self._last = np.where(steps & 2, first + batch.rows["span"], -1)
        shape = batch.rows["shape"]
        #: Per row: its place among the rows of its shape.
        self._place = np.empty(len(shape), np.int64)
        for index in range(len(batch.shapes)):
            members = np.flatnonzero(shape == index)
            self._place[members] = np.arange(len(members))

    def cut(self, after: int) -> list[Block]:
        batch, out = self._batch, []
        shape, attempt = batch.rows["shape"], batch.rows["attempt"]
        start = int(np.searchsorted(batch.rows["seq"], after, "right"))
        names = {wanted: i for i, wanted in enumerate(dict.fromkeys(self._wanted))}
        group = np.array([names[wanted] for wanted in self._wanted])
        for kind in dict.fromkeys(s.kind for s in batch.shapes):
            mine = np.array([s.kind == kind and bool(w) for s, w in zip(batch.shapes, self._wanted, strict=True)])
            rows = np.flatnonzero(mine[shape])
            rows = rows[rows >= start]
            changed = (np.diff(attempt[rows]) != 0) | (np.diff(group[shape[rows]]) != 0)
            out += [self._block(kind, part) for part in _split(rows, changed)]
        return sorted(out, key=lambda block: block.seq)

    def _block(self, kind: str, rows: Ints) -> Block:
        ints = self._batch.rows
        shape = ints["shape"][rows]
        runs = _split(rows, np.diff(shape) != 0)
        arrays, counts = {}, {}
        for name in self._wanted[int(shape[0])]:
            pieces = [self._piece(name, part) for part in runs]
            arrays[name] = pieces[0][0] if len(pieces) == 1 else np.concatenate([values for values, _ in pieces])
            counts[name] = pieces[0][1] if len(pieces) == 1 else np.concatenate([count for _, count in pieces])
        return Block(
            kind, int(ints["attempt"][rows[0]]), int(ints["seq"][rows[0]]), self._meta(ints["meta"][rows]),
            self._first[rows], self._last[rows], arrays, counts,
        )  # fmt: skip

    def _piece(self, name: str, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        """A column of neighbouring rows of one shape, and how many values each of them has."""
        shape = int(self._batch.rows["shape"][rows[0]])
        if (shape, name) not in self._read:
            column = self._columns[shape][name]
            kind = self._batch.shapes[shape].columns[column][1]
            values = unshuffle(self._batch.planes[shape][column], WIDTHS[kind]).view(DTYPES[kind])
            count = self._batch.sizes[shape][column] // WIDTHS[kind]
            self._read[shape, name] = values, count, np.concatenate([[0], np.cumsum(count)])
        values, count, ends = self._read[shape, name]
        begin, end = int(self._place[rows[0]]), int(self._place[rows[-1]]) + 1
        return values[ends[begin] : ends[end]], count[begin:end]

    def _meta(self, metas: Ints) -> Mapping[str, Any]:
        first = int(metas[0])
        meta: dict[str, Any] = json.loads(self._batch.metas[first]) if (metas == first).all() else {}
        return meta


def _split(rows: Ints, changed: npt.NDArray[np.bool_]) -> list[Ints]:
    """The rows, cut wherever `changed` says that the next one differs."""
    cuts = np.flatnonzero(changed)
    if not len(cuts):
        return [rows] if len(rows) else []
    return np.split(rows, cuts + 1)
