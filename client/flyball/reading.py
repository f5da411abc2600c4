"""What a training script says, as numbers and names that the service takes.

Rule of this module: only the very first call may raise, as nothing has been harmed yet; later, what is no number is
recorded as not measured, counted, and logged once.
"""

from __future__ import annotations

import logging
from math import inf
from typing import Any

from flyball import limits
from flyball.controls import NAME
from flyball.optimizer import Optimizer

log = logging.getLogger("flyball")


class Reading:
    """One job's. first: whether nothing was reported yet; bad_values: how many values were none."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.first = True
        self.bad_values = 0
        self._optimizer = optimizer
        self._names: set[str] = set()
        self._warned: set[str] = set()
        self._told_unstepped = False

    def number(self, name: str, value: Any) -> Any:
        """`value` as a float, or a Pending one where it is still on its device; None where it is none."""
        if value is None:
            return None
        try:
            return self._optimizer.number(value() if callable(value) else value)
        except Exception as error:
            message = (
                f"{name} is {type(value).__name__} {value!r:.60}: give a float, or a tensor with one element ({error})"
            )
            if self.first:
                raise TypeError(message) from error
            self.bad_values += 1
            self.once(f"recorded as not measured: {message}")
            return None

    def weight(self, value: Any) -> Any:
        """`value` as a weight; None counts as 1. One that is none is counted, and left to whoever weighs with it."""
        number = 1.0 if value is None else self.number("weight", value)
        if isinstance(number, float) and not 0 <= number < inf:
            self.bad_values += 1
            self.once(f"weight is {number}: give how many samples or tokens there were, 0 or more")
        return number

    def is_name(self, name: str) -> bool:
        """Whether the service takes a signal of this name: it would refuse the whole report otherwise."""
        if name in self._names:
            return True
        if _is_good(name) and len(self._names) < limits.SIGNALS_MAX:
            self._names.add(name)
            return True
        message = f"signal {name!r:.80} is not reported: " + (
            f"a run has at most {limits.SIGNALS_MAX} signals"
            if _is_good(name)
            else f"its name must be of at most {limits.NAME_MAX} letters, digits and any of _ . / @ % + -, and begin "
            "with a letter or _"
        )
        if self.first:
            raise ValueError(message)
        self.bad_values += 1
        self.once(message)
        return False

    def unstepped(self, calls: int, steps: int) -> None:
        """So many calls came without an optimizer step, beside so many steps: where that is no GradScaler's doing any
        more, log it, once."""
        if self._told_unstepped or calls < limits.UNSTEPPED_MAX or calls < steps:
            return
        hint = "if these are micro-batches, attach with accumulate='mean' or 'sum'"
        if steps:
            self._told_unstepped = True
            self.once(
                f"{calls} of {calls + steps} calls of governor.step came without an optimizer step, and their losses "
                f"are dropped: {hint}"
            )
        elif calls >= limits.NEVER_STEPPED_MAX:
            self._told_unstepped = True
            self.once(
                f"no optimizer step seen in {calls} calls of governor.step: this optimizer's step() is not called, and "
                f"nothing is steered ({hint})"
            )

    def once(self, message: str) -> None:
        """Log a warning, the first time."""
        if message not in self._warned and len(self._warned) < limits.CAUSES_MAX:
            self._warned.add(message)
            log.warning("flyball: %s", message)


def _is_good(name: str) -> bool:
    return len(name) <= limits.NAME_MAX and NAME.fullmatch(name) is not None
