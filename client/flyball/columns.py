"""The signals of single steps as the columns of a report.

Rule of this module: order is kept. A value that is still on its device holds back its step, and all that follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyball.pending import Pending

#: What a step may say under one name; None: not measured.
Value = float | Pending | None
#: loss, reward, grad_norm and all other signals of one step.
Signals = tuple[Value, Value, Value, Mapping[str, float | Pending] | None]

_NOTHING = {type(None)}
_HERE = {float, type(None)}


def columns(head: Sequence[tuple[int, Signals]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """The oldest observations as columns, up to the first that has not arrived whole."""
    if not head:
        return [], {}
    # By columns and not by rows: the training thread waits while this holds the interpreter.
    steps, rows = zip(*head, strict=True)
    *known, others = zip(*rows, strict=True)
    found: dict[str, Sequence[Any]] = dict(zip(("loss", "reward", "grad_norm"), known, strict=True))
    if any(others):
        for name in dict.fromkeys(name for row in others if row for name in row):
            found[name] = [None if row is None else row.get(name) for row in others]
    kinds = {name: set(map(type, column)) for name, column in found.items()}
    pending = {name for name, types in kinds.items() if not types <= _HERE}
    end = min((_arrived(found[name]) for name in pending), default=len(steps))
    out: dict[str, list[float | None]] = {}
    for name, column in found.items():
        if name in pending or end < len(steps):
            values = [one if type(one) in _HERE else one.value() for one in column[:end]]
            if any(one is not None for one in values):
                out[name] = values
        elif kinds[name] != _NOTHING:
            out[name] = list(column)
    return list(steps[:end]), out


def _arrived(column: Sequence[Any]) -> int:
    """How many values from the beginning are here."""
    waits = (i for i, one in enumerate(column) if type(one) not in _HERE and not one.ready())
    return next(waits, len(column))
