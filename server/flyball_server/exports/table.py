"""A run as a table: one line for each step, full resolution.

Rule of this module: the steps are those of one attempt's line, as in `queries.series`, and so are the values. The
observations pass by row after row; only what was applied and reported from elsewhere is kept, as packed columns.

A step has a line where anything of it was recorded. lr:GROUP (momentum:GROUP, noise_std:GROUP) is what was applied at
the step, which holds until the next receipt; decided_lr:GROUP what was in force behind its decision. A signal of
another process, side:NAME, stands at the step it was reported at.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain
from json import JSONEncoder
from typing import NamedTuple

from flyball_server import limits, records
from flyball_server.core.errors import Invalid
from flyball_server.core.events import Applied, Observed, Reported, Spec
from flyball_server.core.run import Run
from flyball_server.core.types import Group, Settings
from flyball_server.queries import checked_attempt, cutoffs, plain
from flyball_server.storage.journal import Journal

#: Lines that are handed on together.
LINES_TOGETHER = 256
KINDS = ("lr", "momentum", "noise_std")


_NAN = float("nan")
_text = JSONEncoder(separators=(",", ":"), allow_nan=False).encode
#: A column of settings: which kind, and of which group.
Cell = tuple[str, int]


class Receipts:
    """Settings by the step from which they were applied, in the order of steps, as flat columns."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self.steps = array("q")
        self._values = {kind: array("d") for kind in KINDS}
        self._said = {kind: bytearray() for kind in KINDS}

    def add(self, step: int, settings: Settings) -> None:
        """One receipt, in journal order."""
        if 3 * self._groups * len(self.steps) > limits.APPLIED_VALUES_MAX:
            raise Invalid(
                f"the run has more than {limits.APPLIED_VALUES_MAX} settings applied, too many for a table: "
                "export its journal instead"
            )
        # A receipt may come late; of those of one step the newest holds.
        at = bisect_right(self.steps, step) if self.steps and self.steps[-1] > step else len(self.steps)
        self.steps.insert(at, step)
        place = at * self._groups
        for kind in KINDS:
            row = getattr(settings, kind)
            values = array("d", [_NAN if v is None else v for v in row or [None] * self._groups])
            self._values[kind][place:place] = values
            self._said[kind].insert(at, row is not None)

    def kinds(self) -> list[str]:
        """What any receipt names."""
        return [kind for kind in KINDS if any(self._said[kind])]

    def at(self, step: int) -> int:
        """The index of the receipt in force at the step; -1 before the first."""
        return bisect_right(self.steps, step) - 1

    def value(self, cell: Cell, index: int) -> float | None:
        """One setting of a receipt."""
        kind, group = cell
        if index < 0 or not self._said[kind][index]:
            return None
        return self._values[kind][index * self._groups + group]


class Line(NamedTuple):
    """What is known of an attempt's line before its observations are read.

    cutoffs: see `queries.cutoffs`. seq: the newest row that counts. steps: one more than the newest step. sides: the
    signals of other processes, by step. decided: which settings were decided.
    """

    attempt: int
    cutoffs: Mapping[int, float]
    seq: int
    steps: int
    signals: tuple[str, ...]
    sides: Mapping[int, Mapping[str, float]]
    receipts: Receipts
    decided: tuple[str, ...]


def line(journal: Journal, spec: Spec, run: Run, attempt: int | None) -> Line:
    """The line of an attempt (None: the newest). Raises NotFound for an attempt that is not known."""
    attempt = checked_attempt(spec, run, attempt)
    until = cutoffs(run, attempt)
    signals: set[str] = set()
    decided = {"lr"}
    sides: dict[int, dict[str, float]] = {}
    receipts = Receipts(len(spec.groups))
    steps = 0
    for row in journal.rows(spec.run, until=run.seq):
        cutoff = until.get(row.attempt)
        if cutoff is None or row.first_step is None or row.last_step is None or row.first_step >= cutoff:
            continue
        if row.kind == "observed":
            names = {column.name for column in row.columns}
            signals.update(name for name in names if not name.startswith("=") and not name.endswith("?"))
            decided.update(kind for kind in KINDS if "=" + kind in names)
            steps = max(steps, int(min(row.last_step + 1, cutoff)))
        elif row.kind in ("applied", "reported"):
            event, _ = records.from_row(row, spec.groups)
            if isinstance(event, Reported):
                sides.setdefault(event.step, {}).update(event.signals)
            elif isinstance(event, Applied):
                for receipt in event.receipts:
                    if receipt.step < cutoff:
                        receipts.add(receipt.step, receipt.settings)
    kinds = tuple(kind for kind in KINDS if kind in decided)
    return Line(attempt, until, run.seq, steps, tuple(sorted(signals)), sides, receipts, kinds)


def cells(kinds: Sequence[str], groups: Sequence[Group]) -> list[Cell]:
    """The columns of settings: a group that has no momentum has no column of it."""
    has = [group.momentum is not None or group.betas is not None for group in groups]
    return [(kind, i) for kind in kinds for i in range(len(groups)) if kind != "momentum" or has[i]]


def table(journal: Journal, spec: Spec, run: Run, attempt: int | None) -> Iterator[bytes]:
    """JSON lines: {"run", "attempt", "columns": [...]}, then one array per step, numbers as on the wire."""
    found = line(journal, spec, run, attempt)
    sides = sorted(set(chain.from_iterable(found.sides.values())))
    applied, decided = cells(found.receipts.kinds() or ["lr"], spec.groups), cells(found.decided, spec.groups)
    columns = [
        "step",
        "attempt",
        *found.signals,
        *(f"side:{name}" for name in sides),
        *(f"{kind}:{spec.groups[i].name}" for kind, i in applied),
        *(f"decided_{kind}:{spec.groups[i].name}" for kind, i in decided),
    ]
    yield (_text({"run": spec.run, "attempt": found.attempt, "columns": columns}) + "\n").encode()
    texts: list[str] = []
    in_force, in_force_at = [found.receipts.value(cell, -1) for cell in applied], -1
    for step, row_attempt, signals, now in _steps(journal, spec, run, found):
        at = found.receipts.at(step)
        if at != in_force_at:
            in_force, in_force_at = [found.receipts.value(cell, at) for cell in applied], at
        side = found.sides.get(step, {})
        values = chain(signals, map(side.get, sides), in_force, (_decided(now, cell) for cell in decided))
        texts.append(_text([step, row_attempt, *(None if v is None else plain(v) for v in values)]))
        if len(texts) >= LINES_TOGETHER:
            yield ("\n".join(texts) + "\n").encode()
            texts.clear()
    if texts:
        yield ("\n".join(texts) + "\n").encode()


#: A step, its attempt, its signals, and the settings in force behind its decision.
Step = tuple[int, int, Sequence[float | None], Settings | None]


def _steps(journal: Journal, spec: Spec, run: Run, found: Line) -> Iterator[Step]:
    """Every step of which anything was recorded, in order."""
    nothing = [None] * len(found.signals)
    others = merge(sorted(found.sides), found.receipts.steps)  # most of them are observed steps, too
    other = next(others, None)
    now: Settings | None = None
    observed: Iterator[Step] = _observed(journal, spec, found)
    for seen in observed:
        while other is not None and other <= seen[0]:
            step = other
            while other == step:
                other = next(others, None)
            if step < seen[0]:
                yield step, _attempt_of(step, run, found), nothing, now
        yield seen
        now = seen[3]
    while other is not None:
        step = other
        while other == step:
            other = next(others, None)
        yield step, _attempt_of(step, run, found), nothing, now


def _observed(journal: Journal, spec: Spec, found: Line) -> Iterator[Step]:
    now: Settings | None = None
    for row in journal.rows(spec.run, until=found.seq):
        cutoff = found.cutoffs.get(row.attempt)
        if row.kind != "observed" or cutoff is None:
            continue
        event, outcome = records.from_row(row, spec.groups)
        assert isinstance(event, Observed)
        nothing: Sequence[float | None] = [None] * len(event.steps)
        columns = [event.signals.get(name, nothing) for name in found.signals]
        changes = dict(outcome.changes)
        for i, step in enumerate(event.steps):
            if step >= cutoff:
                break
            now = changes.get(step, now)
            yield step, row.attempt, [column[i] for column in columns], now


def _attempt_of(step: int, run: Run, found: Line) -> int:
    """The attempt of the line that a step without observation belongs to; 0 before the first."""
    return max((n for n in found.cutoffs if n and run.attempts[n - 1][0] <= step), default=0)


def _decided(settings: Settings | None, cell: Cell) -> float | None:
    kind, group = cell
    row = None if settings is None else getattr(settings, kind)
    return None if row is None else row[group]
