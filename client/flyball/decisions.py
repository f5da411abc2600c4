"""The decisions a job has been told, and which of them belongs to an optimizer step.

Rule of this module: what comes out is inside the job's own bounds, whatever the service or the schedule said.
Steps are the run's own, counted from 0. The decision of observation t belongs to step t + 1 + lag.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

from flyball import limits
from flyball.base import Base
from flyball.guard import Bounds
from flyball.wire import Attach, Settings


class Target(NamedTuple):
    """Settings for one optimizer step: from which observation they were decided, and whether they come late."""

    settings: Settings
    decided: int
    late: bool


class Decisions:
    """See the module's head. `base`: the declared base schedule, for `on_base`.

    newest: the newest settings, the same object as long as nothing changes. through: the newest step whose
    decision is known (the one before the attempt's first, before any). reference: the learning rate per group that
    factors multiply.
    """

    def __init__(self, attach: Attach, base: Base | None) -> None:
        self.newest: Target | None = None
        self.through = -1
        self.reference = tuple(group.lr for group in attach.groups)
        self._lag = attach.lag
        self._attach = attach
        self._base = base
        self._multiplier = attach.mode == "multiplier"
        self._bounds = Bounds(attach.guard, attach.groups, self._multiplier)
        self._unread = ""
        #: What `newest` was before the bounds, which may be widened.
        self._told: Settings | None = None
        #: The job's own settings, where they are out of its bounds: in force until the service says more.
        self._own = self._bounded_own()
        self._first = -1
        self._decided: list[int] = []
        self._settings: list[Settings] = []

    @property
    def absolute(self) -> tuple[tuple[float, float], ...]:
        """The lowest and the highest learning rate per group, whatever is multiplied."""
        return self._bounds.absolute

    def _bounded_own(self) -> Target | None:
        own = Settings(tuple(group.lr for group in self._attach.groups))
        bounded = self._bounds.within(own)
        return None if bounded is None or bounded is own else Target(bounded, -1, False)

    def adopt(self, guard: Any, reference: tuple[float, ...]) -> str:
        """Go by the run's record: its limits, which may be more than this process asked for, and its references.

        What cannot be read is left aside; the answer, and that of every `learn` from then on, says so.
        """
        self._unread = ""
        try:
            if len(reference) == len(self.reference) and all(isfinite(lr) and lr >= 0 for lr in reference):
                self.reference = reference
        except TypeError as error:
            self._unread = f"the run's recorded reference {reference!r:.80} was ignored: {error}"
        self._bound(guard or self._attach.guard)
        self._settings = [self._bounds.within(settings) or settings for settings in self._settings]
        return self._unread

    def limit(self, guard: Any) -> str:
        """A command changed the run's limits, which may have become wider: from now on these count, and no others.

        With a lag, what was decided before was told under the limits of then, and is applied at its step as it was.
        """
        self._unread = ""
        self._bound(guard)
        return self._unread

    def _bound(self, guard: Any) -> None:
        try:
            if not isinstance(guard, Mapping):
                raise ValueError("it is no mapping")
            groups = tuple(g._replace(lr=lr) for g, lr in zip(self._attach.groups, self.reference, strict=True))
            self._bounds = Bounds(guard, groups, self._multiplier)
        except (TypeError, ValueError, ArithmeticError) as error:
            self._unread = f"the run's recorded guard {guard!r:.80} was ignored: {error}"
        self._own = self._bounded_own()
        newest, told = self.newest, self._told
        if newest is not None and told is not None:
            bounded = self._bounds.within(told)
            if bounded is not None and bounded != newest.settings:
                self.newest = newest._replace(settings=bounded)

    def begin(self, from_step: int) -> None:
        """An attempt begins: what was decided before it counts no more, but for the settings in force."""
        self.through = self._first = from_step - 1
        self._decided, self._settings = [], []

    def reach_back(self, decided: int) -> None:
        """The service tells what was decided before the attempt, from this step on."""
        self._first = min(self._first, decided)

    def learn(self, changes: tuple[tuple[int, Settings], ...], through: int, known: int | None = None) -> str:
        """Take in what the service decided; what was wrong with it, or "".

        known: the decisions up to this step were told before. With a lag each belongs to a step, so that what is said
        of them now (an override shows at once) begins behind them; None: nothing was told before.
        """
        error = ""
        for decided, settings in changes:
            bounded = self._bounds.within(settings)
            if bounded is None:
                error = f"unusable settings from the service were ignored: {settings}"
                continue
            newest = self.newest
            if newest is None or decided >= newest.decided:
                self._told = settings
                if newest is None or newest.settings != bounded:
                    self.newest = Target(bounded, decided, False)
            if known is not None and decided <= known:
                if known >= through:
                    continue
                decided = known + 1
            if self._lag is not None and (not self._decided or decided > self._decided[-1]):
                self._decided.append(decided)
                self._settings.append(bounded)
        if len(self._decided) > 2 * limits.CHANGES_MAX:
            del self._decided[: -limits.CHANGES_MAX], self._settings[: -limits.CHANGES_MAX]
        self.through = max(self.through, through)
        return error or self._unread

    def missing(self, step: int) -> bool:
        """Whether the decision that belongs to `step` is not known yet (never, where any will do)."""
        return self._lag is not None and self._needed(step, self._lag) > self.through

    def at(self, step: int) -> Target | None:
        """The settings for `step`; the newest known, late, where its own decision is missing; None before any."""
        if self._lag is None:
            return self.newest or self._own
        need = self._needed(step, self._lag)
        found = bisect_right(self._decided, min(need, self.through)) - 1
        if found < 0:
            return self.newest or self._own
        return Target(self._settings[found], self._decided[found], need > self.through)

    def basis(self, step: int) -> float:
        """The newest step whose decision can be in force at `step`: any, where the newest decision will do."""
        return inf if self._lag is None else min(self._needed(step, self._lag), self.through)

    def on_base(self, step: int) -> Target | None:
        """The base schedule's values of `step` under the factor of the newest decision (1 before the first)."""
        if self._base is None:
            return self.newest or self._own
        newest = self.newest
        lr = []
        for i, reference in enumerate(self.reference):
            value = self._base.lr(step, reference)
            then = 0.0 if newest is None else self._base.lr(newest.decided + 1, reference)
            lr.append(value * newest.settings.lr[i] / then if newest is not None and then > 0 else value)
        settings = Settings(tuple(lr), None if newest is None else newest.settings.momentum, None)
        bounded = self._bounds.within(settings)
        return newest if bounded is None else Target(bounded, step - 1, False)

    def _needed(self, step: int, lag: int) -> int:
        """The step whose decision belongs to `step`; before the attempt's own first, the one it began with."""
        return max(step - 1 - lag, self._first)
