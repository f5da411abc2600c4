"""A library's optimizer as the governor needs it, and what an adapter tells about others that write into it.

Rule of this module: nothing here may synchronise a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from flyball.pending import Pending
from flyball.wire import Settings


class Conflict(NamedTuple):
    """Somebody else wrote. cause: the same for as long as it is the same writer of the same thing; text: for people,
    with what was wanted and what was found. wanted_lr: what was written before a step, where the step used others."""

    cause: str
    text: str
    wanted_lr: tuple[float, ...] | None = None


class Optimizer(Protocol):
    """One per adapter."""

    def write(
        self,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
        noise_seed: int | None,
    ) -> Conflict | None:
        """Write the settings, if any. Returns who else had written since the last step, if anybody.

        reference: the learning rate per group that factors multiply. bounds: what the product of a factor and an
        in-process scheduler's value must lie in, per group; settings themselves lie in it already. noise_seed: what
        gradient noise is drawn from; None: there is none to add. Where the optimizer cannot take noise, `read_back`
        says that none was added.
        """

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """What the step really used, and who else had written since `write`, if anybody; then undo what must not
        outlast the step (multiplier mode)."""

    def forget(self) -> None:
        """The job goes back to a checkpoint: what stands in the optimizer before the next step is nobody's conflict."""

    def number(self, value: Any) -> float | Pending:
        """A value as a float, or as one still on its way from a device. Raises where it is none."""

    def detach(self) -> None:
        """Let go of the optimizer."""


def plain_number(value: Any) -> float:
    """A Python or NumPy number as a float. Raises TypeError or ValueError where it is none."""
    if isinstance(value, bool | str | bytes | bytearray):
        raise TypeError(f"a {type(value).__name__} is no number")
    return float(value)
