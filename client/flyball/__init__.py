"""Flyball's client: one line in a training script, and the service steers its learning rate.

    governor = flyball.attach(optimizer, run="resnet-7", policy="windowed", server="grpc://127.0.0.1:1789")
    ...
    optimizer.step()
    governor.step(loss)

Importing this package loads nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flyball.errors import Declined as Declined
from flyball.errors import FlyballError as FlyballError
from flyball.errors import Refused as Refused
from flyball.governor import Governor as Governor

if TYPE_CHECKING:
    from flyball.adapters.torch_memory import MemoryCheckpoint as MemoryCheckpoint

__all__ = ["Declined", "FlyballError", "Governor", "MemoryCheckpoint", "Refused", "attach"]


def attach(optimizer: Any, **options: Any) -> Governor:
    """Steer `optimizer` (any `torch.optim.Optimizer`). See `flyball.options.Options` for all options."""
    try:
        from flyball.adapters import torch
    except ImportError as error:
        raise FlyballError(f"PyTorch is not installed ({error}): pip install 'flyball[torch]'") from error
    return torch.attach(optimizer, **options)


def __getattr__(name: str) -> Any:
    """What needs PyTorch is loaded when it is asked for."""
    if name != "MemoryCheckpoint":
        raise AttributeError(f"module 'flyball' has no attribute {name!r}")
    try:
        from flyball.adapters.torch_memory import MemoryCheckpoint
    except ImportError as error:
        raise FlyballError(f"PyTorch is not installed ({error}): pip install 'flyball[torch]'") from error
    return MemoryCheckpoint
