"""Gaussian noise on the gradients of a torch optimizer.

Rule of this module: nothing here may end the training job. A gradient that cannot take noise goes without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

log = logging.getLogger("flyball")


class GradientNoise:
    """Gaussian noise on gradients: a function of seed, group and parameter alone, so that a replay adds the same."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._generators: dict[torch.device, torch.Generator] = {}
        self._warned = False

    def add(self, groups: Sequence[Mapping[str, Any]], std: tuple[float, ...], seed: int) -> tuple[float, ...] | None:
        """Parameter b of group a draws from seed + 1009 a + b. Returns what each group was given; None: nothing."""
        added = [0.0] * len(std)
        with torch.no_grad():
            for a, (group, wanted) in enumerate(zip(groups, std, strict=False)):
                for b, parameter in enumerate(group["params"] if wanted > 0 else ()):
                    grad = parameter.grad
                    if grad is not None and self._one(grad, wanted, (seed + 1009 * a + b) % 2**63):
                        added[a] = wanted
        return tuple(added) if any(added) else None

    def _one(self, grad: torch.Tensor, std: float, seed: int) -> bool:
        """Whether this gradient could be given noise."""
        try:
            if grad.layout is not torch.strided:
                raise TypeError("one is sparse")
            if grad.device not in self._generators:
                self._generators[grad.device] = torch.Generator(grad.device)
            generator = self._generators[grad.device].manual_seed(seed)
            noise = torch.randn(grad.shape, generator=generator, dtype=grad.dtype, device=grad.device)
            # A fused optimizer gets scaled gradients, and divides by the scale itself.
            scale = getattr(self._optimizer, "grad_scale", None)
            grad.add_(noise.mul_(std if scale is None else scale.to(grad.device, non_blocking=True) * std))
        except Exception as error:  # nothing here may end the training job
            if not self._warned:
                self._warned = True
                log.warning("flyball: noise is not added to every gradient: %s", error)
            return False
        return True
