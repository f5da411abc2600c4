"""What the conformance suite asks of an ecosystem: one training loop, written as a user of it would write one.

Rule of this module: a loop trains for real, in the ecosystem's own way, on a model whose loss is the trace's; it looks
at settings from outside, as the optimizer used them, and never asks Flyball for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flyball.status import Status


class Trained(NamedTuple):
    """lrs: what each optimizer step used, a value per group. token: `governor.state_dict()` after the last step.
    status: the governor's, before it was closed."""

    lrs: list[tuple[float, ...]]
    token: dict[str, Any]
    status: Status


class Loop(Protocol):
    """One per ecosystem: `train` in `tests/conformance/loops/NAME.py`."""

    def __call__(
        self,
        trace: Sequence[float],
        options: Mapping[str, Any],
        *,
        before: Callable[[int], None] = lambda i: None,
        meddle_at: int | None = None,
    ) -> Trained:
        """One optimizer step for each loss of the trace, which is what the step's loss is, to the bit of a float32.

        Two parameter groups "body" (learning rate 0.1) and "head" (0.01) where the ecosystem has groups by name, else
        one (0.1). options: passed to `attach` (or the callback) as they are. before: called before optimizer step i
        (counted from 0 in this process). meddle_at: before that step, something else writes half the learning rate
        into the optimizer, the way that is usual there.
        """
