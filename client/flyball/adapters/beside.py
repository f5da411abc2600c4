"""A scheduler that was left running, named before it comes to its first change.

Rule of this module: it looks twice in the first steps, and then never again. A scheduler that cuts every thirty epochs
would otherwise be noticed when it is too late to wonder.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from flyball import limits
from flyball.adapters.writers import schedulers
from flyball.governor import Governor
from flyball.optimizer import Conflict


def look_beside(optimizer: Any, governor: Governor) -> Callable[[], None]:
    """Tell the governor of a scheduler that goes on between two looks; returns what ends the looking."""
    seen: list[tuple[weakref.ref[Any], Any]] = []
    count = 0

    def look(*_: Any) -> None:
        nonlocal count
        count += 1
        # Where there is a scheduler, it has left this mark, or torch's warning about the order of steps.
        if count == limits.BESIDE_STEPS[0] and any("initial_lr" in group for group in optimizer.param_groups):
            seen.extend((weakref.ref(one), _epoch(one)) for one in schedulers(optimizer))
        if count < limits.BESIDE_STEPS[0] or (count < limits.BESIDE_STEPS[1] and seen):
            return
        remove()
        running = [one for one, then in ((ref(), then) for ref, then in seen) if _epoch(one) != then]
        if running and not governor.status.conflicts:
            name = type(running[0]).__name__
            text = f"{name} runs beside the service: what it writes as the learning rate is replaced before each step"
            governor.note(Conflict(f"beside: {name}", text))

    remove: Callable[[], None] = optimizer.register_step_post_hook(look).remove
    return remove


def _epoch(scheduler: Any) -> Any:
    return getattr(scheduler, "last_epoch", None)
