"""What one rank gives to an exchange, as bytes.

Rule of this module: what is packed comes out again bit for bit, NaN and infinities included.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Where a rank is: in its training; through with it (close); going back to a checkpoint; out of batches before others
#: are, and at the end of such a time (torch's Join).
STEP, DONE, LOAD, JOINED, SYNC = range(5)


class Row(NamedTuple):
    """What one rank saw at one step; None: not measured. weight: how many samples or tokens its loss is a mean of."""

    step: int
    weight: float
    loss: float | None = None
    reward: float | None = None
    grad_norm: float | None = None
    local_sq: float | None = None
    mean_sq: float | None = None


class Head(NamedTuple):
    """tag: where the rank is. through: the newest step that it has told all of. step: its next one. skips: its calls of
    governor.step without an optimizer step that it has not made up for. calls: whether it calls governor.step."""

    tag: int
    through: int
    step: int
    skips: int
    calls: bool


class Slot(NamedTuple):
    """more: what is rarely there, as JSON: receipts, answers; rank 0's word."""

    head: Head
    rows: tuple[Row, ...] = ()
    more: Mapping[str, Any] = {}


_HEAD = struct.Struct("<BBqqqI")
_ROW = struct.Struct("<qdB5d")


def room(every: int) -> int:
    """Bytes that nearly every slot fits into."""
    return _HEAD.size + 2 * every * _ROW.size + 1024


def pack(slot: Slot) -> bytes:
    """A slot as bytes."""
    tag, through, step, skips, calls = slot.head
    parts = [_HEAD.pack(tag, calls, through, step, skips, len(slot.rows))]
    for row in slot.rows:
        values = row[2:]
        mask = sum(1 << i for i, value in enumerate(values) if value is not None)
        parts.append(_ROW.pack(row.step, row.weight, mask, *(0.0 if value is None else value for value in values)))
    if slot.more:
        parts.append(json.dumps(slot.more, separators=(",", ":")).encode())
    return b"".join(parts)


def head_of(data: bytes) -> Head:
    """A slot's head alone: all that most ranks need of most ranks."""
    tag, calls, through, step, skips, _ = _HEAD.unpack_from(data)
    return Head(tag, through, step, skips, bool(calls))


def unpack(data: bytes) -> Slot:
    """The slot in these bytes."""
    count = _HEAD.unpack_from(data)[5]
    end = _HEAD.size + count * _ROW.size
    rows = []
    for step, weight, mask, *values in _ROW.iter_unpack(data[_HEAD.size : end]):
        rows.append(Row(step, weight, *(value if mask >> i & 1 else None for i, value in enumerate(values))))
    return Slot(head_of(data), tuple(rows), json.loads(data[end:]) if len(data) > end else {})
