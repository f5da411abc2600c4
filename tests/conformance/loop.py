"""What the conformance suite asks of an ecosystem: one training loop, written as a user of it would write one.

Rule of this module: a loop trains for real, in the ecosystem's own way, on a model whose loss is the trace's; it looks
at settings from outside, as the optimizer used them, and never asks Flyball for them.

A loop's module may also hold two constants. HOLDS: "float32" where the ecosystem keeps a learning rate as one (else
"float64"). CANNOT: what does not apply there, with the reason in a sentence: {"meddle": ...} where nothing else can
write into the optimizer between two steps, {"after_close": ...} where there is no optimizer left to step, {"grpc": ...}
where it has one transport only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flyball.status import Status

#: What a loop's CANNOT may name.
MAY_LACK = ("meddle", "after_close", "grpc")
#: The learning rate that a loop sets in every group after closing, for one more optimizer step without Flyball.
AFTER_CLOSE_LR = 0.0625


class Trained(NamedTuple):
    """lrs: what each optimizer step used, a value per group. token: `governor.state_dict()` after the last step.
    status: the governor's, before it was closed. after_close: what one more optimizer step used, after the governor
    was closed and AFTER_CLOSE_LR was set in every group the way that is usual there."""

    lrs: list[tuple[float, ...]]
    token: dict[str, Any]
    status: Status
    after_close: tuple[float, ...] | None = None


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
