"""Micro-batches: what several calls of `governor.step` say becomes the loss of the one optimizer step they lead to.

Rule of this module: nothing waits for a device. Values are taken in the order they came, so that the sum is the same
to the last bit however late each one arrives.
"""

from __future__ import annotations

import logging
from collections import deque
from math import nan

from flyball import limits
from flyball.pending import Pending

log = logging.getLogger("flyball")

Number = float | Pending


class Total:
    """The values of one step's micro-batches. how: "mean" weighs each by the samples or tokens behind it; "sum" adds
    them. One that is not finite makes the total so as well; those that were not measured (None) are left out."""

    def __init__(self, how: str) -> None:
        self._mean = how == "mean"
        self.begin()

    def begin(self) -> None:
        """The next step's."""
        self._sum = self._weight = 0.0
        self._any = False
        self._waiting: deque[tuple[Number, Number]] = deque()

    def add(self, value: Number | None, weight: Number) -> None:
        """One micro-batch's. What has arrived is added up at once, so that only what is on its way needs room."""
        if value is None:
            return
        self._any = True
        waiting = self._waiting
        if not waiting and type(value) is float and type(weight) is float:
            self._take(value, weight)
            return
        waiting.append((value, weight))
        self._settle()
        if len(waiting) > limits.MICRO_PENDING_MAX:
            waiting.popleft()
            self._sum = nan  # not known any more

    def close(self) -> Number | None:
        """The step's value: a number, one that is still on its way, or None where nothing was measured. What is added
        from now on belongs to the next step."""
        total: Number | None = None
        if not self.ready():
            later = Total("mean" if self._mean else "sum")
            later._sum, later._weight, later._waiting = self._sum, self._weight, self._waiting
            total = later
        elif self._any:
            total = self.value()
        self.begin()
        return total

    def ready(self) -> bool:
        """Whether everything has arrived."""
        self._settle()
        return not self._waiting

    def value(self) -> float:
        """The total, once it is ready; NaN where no sample was behind any of it."""
        if not self._mean:
            return self._sum
        return self._sum / self._weight if self._weight else nan

    def _settle(self) -> None:
        waiting = self._waiting
        while waiting:
            value, weight = waiting[0]
            if not (isinstance(value, float) or value.ready()) or not (isinstance(weight, float) or weight.ready()):
                return
            waiting.popleft()
            self._take(
                value if isinstance(value, float) else value.value(),
                weight if isinstance(weight, float) else weight.value(),
            )

    def _take(self, value: float, weight: float) -> None:
        if not self._mean:
            self._sum += value
        elif weight > 0:
            self._sum += value * weight
            self._weight += weight
        elif weight != 0:  # a micro-batch of no tokens has no loss; less than none, or NaN, is no weight
            self._sum = nan


def micro_batches(accumulate: str | tuple[str, int]) -> MicroBatches:
    """What the option `accumulate` says."""
    return MicroBatches(accumulate) if isinstance(accumulate, str) else MicroBatches(*accumulate)


class MicroBatches:
    """Losses, rewards and weights of the micro-batches of one step. how: as for `Total`. each: how many make a step;
    None: as many as there are before it."""

    def __init__(self, how: str, each: int | None = None) -> None:
        self._loss, self._reward = Total(how), Total(how)
        self._each = each
        self._adds = how == "sum" and each is None
        self._weight = 0.0
        self._count = self._before = 0

    def begin(self) -> None:
        """The next step's; what there was is dropped."""
        self._loss.begin()
        self._reward.begin()
        self._weight = 0.0
        self._count = 0

    @property
    def full(self) -> bool:
        """Whether all micro-batches of a step are there: if none was made, it was skipped."""
        return self._count == self._each

    def add(self, loss: Number | None, reward: Number | None, weight: Number | None) -> None:
        """One more. weight: how many samples or tokens are behind it; None counts as 1."""
        self._count += 1
        one = 1.0 if weight is None else weight
        self._loss.add(loss, one)
        self._reward.add(reward, one)
        self._weight += one if isinstance(one, float) else 1.0

    def close(self) -> tuple[Number | None, Number | None, float]:
        """The step's loss, reward and weight. A weight that has not arrived counts as 1 in the last."""
        whole, self._weight = self._weight, 0.0
        count, self._count = self._count, 0
        if self._adds:
            self._look(count)
        return self._loss.close(), self._reward.close(), whole

    def _look(self, count: int) -> None:
        """Where losses are added, a step that was skipped between two others shows in the next one's loss: say so."""
        before, self._before = self._before, count
        if before and count % before == 0 and count > before:
            self._adds = False
            log.warning(
                "flyball: a step closed with %d micro-batches, and the one before it with %d: if a GradScaler skipped "
                "a step between them, its losses were added as well. Attach with accumulate=('sum', %d), or call "
                "governor.skip() where a step was skipped",
                count, before, before,
            )  # fmt: skip
