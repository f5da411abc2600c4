"""A scheduler that was left with the optimizer, named before it comes to its first change.

Rule of this module: it looks twice in the first steps, and then never again. A scheduler that cuts every thirty epochs
would otherwise be noticed when it is too late to wonder. That there is one is said at the first look, and is nobody's
conflict; one that has gone on by the second is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from flyball import limits
from flyball.adapters.writers import schedulers
from flyball.optimizer import Conflict

log = logging.getLogger("flyball")

#: Optimizers whose schedulers will not be stepped: who attaches to them next has nothing to look for.
_at_rest: weakref.WeakSet[Any] = weakref.WeakSet()


def at_rest(optimizer: Any) -> None:
    """The schedulers of this optimizer are kept from writing: whoever attaches to it next need not look for any."""
    _at_rest.add(optimizer)


class Beside:
    """Call `look` once a step until it is `over`."""

    def __init__(self, optimizer: Any) -> None:
        self.over = optimizer in _at_rest
        _at_rest.discard(optimizer)
        self._optimizer = optimizer
        self._steps = 0
        self._seen: list[tuple[weakref.ref[Any], Any]] = []

    def look(self, *, steered: bool, reference: float, known: Callable[[Any], bool]) -> Conflict | None:
        """A scheduler that went on between the two looks, if there is one. steered: whether there are settings of the
        service to write; reference: what the first group's count from; known: whether one has been named already."""
        if self.over:
            return None
        self._steps += 1
        first, second = limits.BESIDE_STEPS
        # Schedulers leave a mark on the groups they work on: without one there is no need to search.
        if self._steps == first and any("initial_lr" in group for group in self._optimizer.param_groups):
            found = schedulers(self._optimizer)
            self._seen = [(weakref.ref(one), _epoch(one)) for one in found]
            if found and not any(known(one) for one in found):
                _tell(type(found[0]).__name__, steered, reference)
        if self._steps < first or (self._steps < second and self._seen):
            return None
        self.over = True
        running = [one for ref, then in self._seen if (one := ref()) is not None and _epoch(one) != then]
        self._seen = []
        if not running:
            return None
        name = type(running[0]).__name__
        return Conflict(
            f"beside: {name}", f"{name} runs beside the service: what it writes as the learning rate {_fate(steered)}"
        )


def _tell(name: str, steered: bool, reference: float) -> None:
    log.warning(
        "flyball: %s is attached to the optimizer: what it writes as the learning rate %s. The service's settings "
        'count from %.9g (first group); mode="multiplier" keeps %s in charge',
        name,
        _fate(steered),
        reference,
        name,
    )


def _fate(steered: bool) -> str:
    return "is replaced before each step" if steered else "holds until the service's settings come, and not after"


def _epoch(scheduler: Any) -> Any:
    return getattr(scheduler, "last_epoch", None)
