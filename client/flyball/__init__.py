"""Flyball's client: one line in a training script, and the service steers its learning rate.

    governor = flyball.attach(optimizer, run="resnet-7", policy="windowed", server="grpc://127.0.0.1:1789")
    ...
    optimizer.step()
    governor.step(loss)

Importing this package loads nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flyball.errors import FlyballError as FlyballError
from flyball.errors import Refused as Refused

if TYPE_CHECKING:
    from flyball.adapters.torch import Governor as Governor

__all__ = ["FlyballError", "Governor", "Refused", "attach"]


def attach(optimizer: Any, **options: Any) -> Governor:
    """Steer `optimizer` (any `torch.optim.Optimizer`). See `flyball.adapters.torch.attach` for all options."""
    try:
        from flyball.adapters import torch
    except ImportError as error:
        raise FlyballError(f"PyTorch is not installed ({error}): pip install 'flyball[torch]'") from error
    return torch.attach(optimizer, **options)


def __getattr__(name: str) -> Any:
    # Governor needs torch, which is loaded only when asked for.
    if name == "Governor":
        from flyball.adapters.torch import Governor

        return Governor
    raise AttributeError(f"module 'flyball' has no attribute {name!r}")
