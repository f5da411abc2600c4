"""Gaussian noise on the gradients of a torch optimizer.

Rule of this module: nothing here may end the training job. A gradient that cannot take noise goes without.

Ranks that hold the same gradient add the same noise, so that they stay alike. Where each holds a part of it (FSDP2's
DTensors, FSDP1's flat parameters), each draws for its own part.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flyball.rng import NOISE_STREAM, u64

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
                    if grad is not None and self._one(parameter, grad, wanted, (seed + 1009 * a + b) % 2**63):
                        added[a] = wanted
        return tuple(added) if any(added) else None

    def _one(self, parameter: Any, grad: Any, std: float, seed: int) -> bool:
        """Whether this gradient could be given noise."""
        try:
            part = part_of(parameter, grad)
            if part is not None:
                seed = u64(seed, NOISE_STREAM, part) >> 1
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
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


def part_of(parameter: Any, grad: Any) -> int | None:
    """Which part of a gradient this rank holds; None: all of it. Raises TypeError where that cannot be told."""
    if hasattr(grad, "to_local"):
        if any(placement.is_partial() for placement in grad.placements):
            raise TypeError("one is a DTensor that is still to be summed over ranks")
        mesh, part = grad.device_mesh, None
        for i, placement in enumerate(grad.placements):
            if placement.is_shard():
                part = (part or 0) * mesh.size(i) + mesh.get_coordinate()[i]
        return part
    if not getattr(parameter, "_fsdp_flattened", False):
        return None
    held, whole = getattr(parameter, "_sharded_size", None), getattr(parameter, "_unpadded_unsharded_size", None)
    if held is not None and whole is not None:
        parts = -(-whole.numel() // max(held.numel(), 1))
        if parts == 1:
            return None
        if parts == torch.distributed.get_world_size():
            return int(torch.distributed.get_rank())
    raise TypeError(
        "FSDP1 does not tell which part of a parameter this rank holds: use fully_shard, or FULL_SHARD over all ranks "
        "with use_orig_params=False"
    )
