"""Copies of a torch optimizer's parameters, or of their gradients, as one vector per device and type.

Rule of this module: nothing is read from a device, and nothing that is handed in is written to. A vector is one piece
of memory, so that its norm is one reduction; half precision is summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

#: Elements of a scalar product taken at once, so that what is widened from half precision for it stays small.
CHUNK = 2**24
_HALF = (torch.float16, torch.bfloat16)
_ORDINARY = (torch.nn.Parameter, torch.Tensor)


class _Piece(NamedTuple):
    """The vector of one device and type, its parts shaped as the tensors, and their places in the list."""

    vector: torch.Tensor
    parts: list[torch.Tensor]
    places: list[int]


class Flat:
    """A vector over a list of tensors. Its memory is kept from step to step, for as long as their shapes are."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, ...]] = []
        self._pieces: list[_Piece] = []

    def hold(self, values: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> None:
        """Copy the values, each in the shape, type and device of its neighbour in `like`; None is zero."""
        self._make(like)
        for vector, parts, places in self._pieces:
            given = [(part, value) for part, i in zip(parts, places, strict=True) if (value := values[i]) is not None]
            if len(given) < len(parts):
                vector.zero_()
            if given:
                torch._foreach_copy_([part for part, _ in given], [value for _, value in given])

    def subtract(self, values: Sequence[torch.Tensor]) -> None:
        """Take the values away from those that are held."""
        for _, parts, places in self._pieces:
            torch._foreach_sub_(parts, [values[i] for i in places])

    def norms(self) -> list[torch.Tensor]:
        """The Euclidean norms of the pieces: together they are the vector's."""
        return [torch.linalg.vector_norm(piece.vector, dtype=_wide(piece.vector.dtype)) for piece in self._pieces]

    def dots(self, other: Flat) -> Iterator[torch.Tensor]:
        """The scalar product with another vector over tensors of these shapes, in summands."""
        for mine, its in zip(self._pieces, other._pieces, strict=True):
            to = _wide(mine.vector.dtype)
            for a, b in zip(mine.vector.split(CHUNK), its.vector.split(CHUNK), strict=True):
                yield torch.dot(a.to(to), b.to(to))

    def _make(self, like: Sequence[torch.Tensor]) -> None:
        kinds = [(one.shape, one.dtype, one.device) for one in like]
        if kinds == self._kinds:
            return
        self._kinds, self._pieces = kinds, []
        for (dtype, device), places in _alike(like).items():
            sizes = [like[i].numel() for i in places]
            vector = torch.zeros(sum(sizes), dtype=dtype, device=device)
            parts = [part.view(like[i].shape) for part, i in zip(vector.split(sizes), places, strict=True)]
            self._pieces.append(_Piece(vector, parts, places))


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The Euclidean norms of tensors, in few launches and without a copy."""
    out: list[torch.Tensor] = []
    for (dtype, _), places in _alike(tensors).items():
        out += torch._foreach_norm([tensors[i] for i in places], 2, dtype=_wide(dtype))
    return out


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """What can be added up of a parameter or gradient: this process's part of it, dense, complex numbers as pairs."""
    part: torch.Tensor = tensor
    if type(tensor) not in _ORDINARY and hasattr(tensor, "to_local"):
        part = tensor.to_local()
    if part.layout is not torch.strided:
        part = part.to_dense()
    return torch.view_as_real(part) if part.is_complex() else part


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether other processes hold other parts of it: a DTensor's shard, or what FSDP 1 or DeepSpeed ZeRO-3 keep."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if hasattr(parameter, "device_mesh"):
        return bool(parameter.device_mesh.size() > 1 and any(not one.is_replicate() for one in parameter.placements))
    kept = hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "ds_id")
    return kept and bool(torch.distributed.get_world_size() > 1)


def _alike(tensors: Sequence[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], list[int]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, one in enumerate(tensors):
        kinds.setdefault((one.dtype, one.device), []).append(i)
    return kinds


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype
