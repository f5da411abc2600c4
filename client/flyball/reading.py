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
        if len(name) <= limits.NAME_MAX and NAME.fullmatch(name) and len(self._names) < limits.SIGNALS_MAX:
            self._names.add(name)
            return True
        message = (
            f"signal {name!r} is not reported: a run has at most {limits.SIGNALS_MAX} signals, whose names are "
            "letters, digits and any of _ . / @ % + -"
        )
        if self.first:
            raise ValueError(message)
        self.bad_values += 1
        self.once(message)
        return False

    def once(self, message: str) -> None:
        """Log a warning, the first time."""
        if message not in self._warned and len(self._warned) < limits.CAUSES_MAX:
            self._warned.add(message)
            log.warning("flyball: %s", message)
