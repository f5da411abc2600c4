"""A loss that is fetched from a CUDA device.

Rule of this module: the training thread never waits for the device.
"""

from __future__ import annotations

import torch


class FromDevice:
    """A loss copied from a CUDA device without waiting: into pinned memory, with an event behind the copy."""

    def __init__(self, value: torch.Tensor) -> None:
        self._host = torch.empty((), dtype=torch.float64, pin_memory=True)
        self._host.copy_(value.reshape(()).to(torch.float64), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return bool(self._event.query())

    def value(self) -> float:
        """The value; no wait once ready."""
        return float(self._host.item())
