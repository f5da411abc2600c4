"""A scheduler that was left running, named before it comes to its first change.

Rule of this module: it looks twice in the first steps, and then never again. A scheduler that cuts every thirty epochs
would otherwise be noticed when it is too late to wonder.
"""

from __future__ import annotations

import weakref
from typing import Any

from flyball import limits
from flyball.adapters.writers import schedulers
from flyball.optimizer import Conflict


class Beside:
    """Call `look` once a step until it is `over`."""

    def __init__(self, optimizer: Any) -> None:
        self.over = False
        self._optimizer = optimizer
        self._steps = 0
        self._seen: list[tuple[weakref.ref[Any], Any]] = []

    def look(self, *, steered: bool) -> Conflict | None:
        """A scheduler that went on between the two looks, if there is one. steered: whether there are settings of the
        service to write."""
        self._steps += 1
        first, second = limits.BESIDE_STEPS
        # Schedulers leave a mark on the groups they work on: without one there is no need to search.
        if self._steps == first and any("initial_lr" in group for group in self._optimizer.param_groups):
            self._seen = [(weakref.ref(one), _epoch(one)) for one in schedulers(self._optimizer)]
        if self._steps < first or (self._steps < second and self._seen):
            return None
        self.over = True
        running = [one for ref, then in self._seen if (one := ref()) is not None and _epoch(one) != then]
        self._seen = []
        if not running:
            return None
        name = type(running[0]).__name__
        told = "is replaced before each step" if steered else "holds until the service's settings come, and not after"
        return Conflict(
            f"beside: {name}", f"{name} runs beside the service: what it writes as the learning rate {told}"
        )


def _epoch(scheduler: Any) -> Any:
    return getattr(scheduler, "last_epoch", None)
