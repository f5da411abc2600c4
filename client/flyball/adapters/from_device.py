"""Numbers that are fetched from a device.

Rule of this module: the training thread never waits for the device, whatever number it is.
"""

from __future__ import annotations

import torch


class Copy:
    """One tensor of numbers, copied to the host once: from a CUDA device without waiting, into pinned memory, with an
    event behind the copy. Everywhere else it is read by whoever asks for the values, which is the reporting thread.

    tensor: one dimension; nobody may write into it afterwards.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[float]:
        """The numbers; no wait once ready."""
        found: list[float] = self._host.tolist()
        return found


class FromDevice:
    """A number that was handed over on a CUDA device: a loss, or a norm that clipping returned."""

    def __init__(self, value: torch.Tensor) -> None:
        self._copy = Copy(value.reshape(1).to(torch.float64))
        self.ready = self._copy.ready

    def value(self) -> float:
        """The value; no wait once ready."""
        return self._copy.values()[0]


def whole_of(value: torch.Tensor) -> torch.Tensor:
    """A DTensor as a tensor of this rank: FSDP2's gradient norm is one, whose parts are still to be put together."""
    if not hasattr(value, "full_tensor"):
        return value
    alike = all(placement.is_replicate() for placement in value.placements)
    # Otherwise it is a collective among the job's own: all ranks report the same signals.
    whole: torch.Tensor = value.to_local() if alike else value.full_tensor()
    return whole
