"""A batch of columns, as the policies see it.

Rule of this module: nothing here runs slower per observation than one tuple costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

from flyball_server.core.types import KNOWN_SIGNALS, Answered, Observation


def observations(
    steps: Sequence[int],
    signals: Mapping[str, Sequence[float | None]],
    side: Mapping[str, float],
    reads: frozenset[str],
    applied: Sequence[int | None] | None = None,
    rollbacks: int = 0,
    answers: tuple[Answered, ...] = (),
) -> Iterator[Observation]:
    """The batch as observations, built column-wise: one C-level zip instead of a lookup per signal and step."""
    if side:
        signals = dict(signals)
        for name, value in side.items():
            column = list(signals.get(name) or repeat(None, len(steps)))
            if column[0] is None:
                column[0] = value
            signals[name] = column
    known = [signals.get(name) or repeat(None) for name in KNOWN_SIGNALS]
    names = [name for name in signals if name in reads]
    others: Iterator[Mapping[str, float] | None] = repeat(None)
    if names:
        rows = zip(*(signals[name] for name in names), strict=True)
        others = ({name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows)
    # The NamedTuple's own constructor is a Python function; tuple's is not, and this runs once per observation.
    build: Callable[[Any], Observation] = partial(tuple.__new__, Observation)
    beside = (others, applied or repeat(None), repeat(rollbacks), repeat(answers))
    return map(build, zip(steps, *known, *beside, strict=False))


def in_force(
    receipts: tuple[tuple[int, int], ...], steps: Sequence[int]
) -> tuple[tuple[tuple[int, int], ...], list[int | None] | None]:
    """For each of the steps, which step decided what was in force then; and the receipts to keep for later steps."""
    if not receipts:
        return receipts, None
    at, column = 0, []
    for step in steps:
        while at < len(receipts) and receipts[at][0] <= step:
            at += 1
        column.append(receipts[at - 1][1] if at else None)
    return receipts[max(0, at - 1) :], column


def newest(
    last: Mapping[str, float], signals: Mapping[str, Sequence[float | None]], side: Mapping[str, float]
) -> dict[str, float]:
    """The newest measured value of every signal."""
    newest = {**last, **side} if side else dict(last)
    for name, column in signals.items():
        value = column[-1]
        if value is None:
            value = next((v for v in reversed(column) if v is not None), None)
        if value is not None:
            newest[name] = value
    return newest
