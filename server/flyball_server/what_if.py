"""What another policy would have decided on the signals a run recorded, beside what really was decided.

Rule of this module: it folds the events of one line as the service did, from the run's first step, and changes nothing.

The signals are those of a training under the real decisions: a what-if says what a policy would have made of them, not
what training would have become. Receipts tell what of the real decisions was in force, so only the run's own policy is
given them; any other one's decisions count as applied at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyball_server import limits
from flyball_server.branches import line
from flyball_server.core import run as fold
from flyball_server.core.errors import Invalid, NotFound
from flyball_server.core.events import Applied, Attached, Ended, Mark, Observed, Origin, Spec
from flyball_server.core.numbers import finite
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Decision, Group, Settings
from flyball_server.queries import thin
from flyball_server.storage.journal import Journal

NAN = float("nan")
SETTINGS = ("lr", "momentum", "noise_std")


class Stream:
    """Settings by the step that decided them, one entry wherever they change: `rows` has lr, momentum and noise_std of
    every group (NaN: nothing is said)."""

    def __init__(self, groups: int) -> None:
        self._width = 3 * groups
        self._steps = array("q")
        self._rows = array("d")
        self._newest: Settings | None = None

    def add(self, step: int, settings: Settings) -> None:
        """Settings decided by `step`."""
        if settings == self._newest:
            return
        self._newest = settings
        self._steps.append(step)
        for row in settings:
            self._rows.extend([NAN] * (self._width // 3) if row is None else [NAN if v is None else v for v in row])

    @property
    def steps(self) -> NDArray[np.int64]:
        """Where they change."""
        return np.array(self._steps, np.int64)

    @property
    def rows(self) -> NDArray[np.float64]:
        """One line per change."""
        return np.array(self._rows).reshape(-1, self._width)


class WhatIf(NamedTuple):
    """Both streams, the marks of the other policy, and over which steps they go."""

    real: Stream
    other: Stream
    real_marks: int
    marks: list[Mark]
    observations: int
    first_step: int | None
    last_step: int | None


class Asked(NamedTuple):
    """A run, and the rules to fold it under (its own groups, another policy). own: it is the run's own policy."""

    spec: Spec
    origin: Origin | None
    run: Run
    rules: Rules
    own: bool


def what_if(journal: Journal, asked: Asked, attempt: int | None) -> WhatIf:
    """Fold the line of `attempt` (None: the newest) under the asked-for rules.

    Raises NotFound for an unknown attempt, Invalid where the policy does not fit the groups.
    """
    spec, origin, run, rules, own = asked
    number = run.attempt if attempt is None else attempt
    if not 1 <= number <= run.attempt:
        raise NotFound(f"run {spec.run}: attempt {number} is not known (newest: {run.attempt})")
    state = fold.create(rules, origin if own or origin is None else origin._replace(state=None))
    groups = len(spec.groups)
    real, other = Stream(groups), Stream(groups)
    marks: list[Mark] = []
    real_marks = 0
    first = None
    for event, outcome in line(journal, spec, run, number):
        if isinstance(event, Applied) and not own:
            continue
        if isinstance(event, Attached):
            # On a line one attempt goes on where the one before it stood.
            event = event._replace(attempt=state.attempt + 1, parent=state.attempt, restored=None)
        elif isinstance(event, Observed | Applied | Ended):
            event = event._replace(attempt=state.attempt)
        state, again = fold.apply(rules, state, event)
        marks += again.marks
        real_marks += len(outcome.marks)
        if isinstance(event, Observed):
            first = event.steps[0] if first is None else first
            for stream, one in ((real, outcome), (other, again)):
                for step, settings in one.changes:
                    stream.add(step, settings)
    last = None if first is None else state.through
    return WhatIf(real, other, real_marks, marks, state.observations, first, last)


def summary(found: WhatIf, groups: tuple[Group, ...]) -> dict[str, Any]:
    """Where the two streams part, and how far."""
    steps, real, other = _together(found)
    same = ((real == other) | (np.isnan(real) & np.isnan(other))).all(axis=1) if len(steps) else np.empty(0, bool)
    apart = np.flatnonzero(~same)
    held = (
        np.diff(np.append(steps, steps[-1] if found.last_step is None else found.last_step + 1))
        if len(steps)
        else steps
    )
    return {
        "observations": found.observations,
        "from_step": found.first_step,
        "to_step": found.last_step,
        "first_difference": int(steps[apart[0]]) if len(apart) else None,
        "steps_apart": int(held[apart].sum()),
        "decisions": {"real": found.real_marks, "what_if": len(found.marks)},
        "groups": {group.name: _group_summary(steps, real[:, i], other[:, i]) for i, group in enumerate(groups)},
    }


def _group_summary(steps: NDArray[np.int64], real: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, Any]:
    """Of one group: the newest learning rates, and the steps at which the ratio of the two is the most extreme."""
    if not len(steps):
        return {"real_lr": None, "what_if_lr": None, "largest": None, "smallest": None}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(real == other, 1.0, other / real)
    usable = np.where(np.isnan(ratio), 1.0, ratio)
    out: dict[str, Any] = {"real_lr": float(real[-1]), "what_if_lr": float(other[-1])}
    for name, place in (("largest", int(np.argmax(usable))), ("smallest", int(np.argmin(usable)))):
        out[name] = {"step": int(steps[place]), "ratio": finite(float(usable[place]))}
    return out


def _together(found: WhatIf) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Every step at which one of the two changes, and what both had decided by then."""
    steps = np.union1d(found.real.steps, found.other.steps)
    if not len(steps):
        return steps, found.real.rows, found.other.rows
    # Both begin with the line's first step.
    rows = [s.rows[np.searchsorted(s.steps, steps, "right") - 1] for s in (found.real, found.other)]
    return steps, rows[0], rows[1]


def beside(found: WhatIf, rules: Rules) -> Iterator[dict[str, Any]]:
    """Both streams side by side, one entry for every step at which one of them changes."""
    marks = {mark.step: mark for mark in found.marks}
    names = [group.name for group in rules.groups]
    steps, real, other = _together(found)
    for step, mine, its in zip(steps.tolist(), real.tolist(), other.tolist(), strict=True):
        mark = marks.get(step)
        yield {
            "step": step,
            "real": _settings(names, mine),
            "what_if": _settings(names, its),
            "decision": "" if mark is None else mark.code,
            "reason": "" if mark is None else _reason(rules, mark),
        }


def _settings(names: list[str], row: list[float]) -> dict[str, dict[str, float]]:
    n = len(names)
    said = {name: row[i * n : (i + 1) * n] for i, name in enumerate(SETTINGS)}
    return {
        name: {group: value for group, value in zip(names, values, strict=True) if value == value}
        for name, values in said.items()
        if any(value == value for value in values)
    }


def _reason(rules: Rules, mark: Mark) -> str:
    return rules.policy.explain(rules.config, Decision(mark.after, None, None, mark.phase, mark.code, mark.fields))


def answer(journal: Journal, asked: Asked, attempt: int | None, points: int, limit: int) -> dict[str, Any]:
    """What REST tells: the summary, both streams' learning rates thinned to `points`, the first `limit` decisions."""
    if not 2 <= points <= limits.POINTS_MAX:
        raise Invalid(f"points is {points}: give 2 to {limits.POINTS_MAX}")
    if not 0 <= limit <= limits.DECISIONS_MAX:
        raise Invalid(f"limit is {limit}: give 0 to {limits.DECISIONS_MAX}")
    found, rules = what_if(journal, asked, attempt), asked.rules
    names = [group.name for group in rules.groups]
    return {
        "run": asked.spec.run,
        "policy": rules.policy.tag,
        "summary": summary(found, rules.groups),
        "series": {
            f"lr:{name}": {
                "real": _series(found.last_step, found.real, i, points),
                "what_if": _series(found.last_step, found.other, i, points),
            }
            for i, name in enumerate(names)
        },
        "decisions": [_mark(mark, rules, names) for mark in found.marks[:limit]],
    }


def _series(last_step: int | None, stream: Stream, place: int, points: int) -> Mapping[str, list[Any]]:
    steps, values = stream.steps, stream.rows[:, place]
    if last_step is not None and steps[-1] < last_step:
        steps, values = np.append(steps, last_step), np.append(values, values[-1])
    keep = thin(steps, values, points)
    return {"step": steps[keep].tolist(), "value": values[keep].tolist()}


def _mark(mark: Mark, rules: Rules, names: list[str]) -> dict[str, Any]:
    return {
        "step": mark.step,
        "phase": mark.phase,
        "decision": mark.code,
        "guard": mark.note,
        "reason": _reason(rules, mark),
        "lr_before": dict(zip(names, mark.before, strict=True)),
        "lr_after": dict(zip(names, mark.after, strict=True)),
        "fields": finite(mark.fields),
    }
