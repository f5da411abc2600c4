"""What adapters put around one optimizer step: the factor of multiplier mode, and functions behind other functions.

Rule of this module: no library is needed. What a wrapped function returns or raises is what it did before.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any


def factor(lr: float, reference: float) -> float:
    """lr / reference; 1 for a group without a reference.

    Where `lr` is the float product of `reference` and an m of at most 12 significant digits (0.5, 1.1, 2), that very
    m; otherwise the rounded quotient.
    """
    if reference <= 0:
        return 1.0
    quotient = lr / reference
    short = float(f"{quotient:.12g}")
    return short if short * reference == lr else quotient


def finally_do(optimizer: Any, put_back: Callable[[], None]) -> Callable[[], None]:
    """Have `put_back` called after every `optimizer.step`, one that raises included; returns what ends that.

    The new `step` is a bound method of the instance: torch's LR schedulers ask for `step.__func__`, and wrap it
    themselves. Below such a wrapper it stays after the end, so `put_back` must be harmless for ever.
    """
    inner = optimizer.step
    before = optimizer.__dict__.get("step")

    @functools.wraps(getattr(inner, "__func__", inner))
    def step(_: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            put_back()

    mine = optimizer.step = types.MethodType(step, optimizer)

    def end() -> None:
        if optimizer.__dict__.get("step") is mine:
            del optimizer.step
            if before is not None:
                optimizer.step = before

    return end


def behind(closure: Callable[[], Any], add: Callable[[], None]) -> Callable[[], Any]:
    """The closure, with `add` called after each call of it."""

    def both() -> Any:
        loss = closure()
        add()
        return loss

    return both
