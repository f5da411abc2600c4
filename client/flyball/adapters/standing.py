"""What stood in an optimizer's groups when Flyball last looked, to tell what somebody else has written since.

Rule of this module: no device is asked. A tensor on one is known to be written by its version, not by its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Stand(NamedTuple):
    """One group: the objects it held, the version of a tensor, and the learning rate meant by it."""

    lr: Any
    version: int | None
    value: float
    momentum: Any
    betas: Any


class Change(NamedTuple):
    """What somebody else wrote: found None where it stands on a device."""

    what: str
    group: int
    wanted: float
    found: float | None


def standing(groups: Sequence[dict[str, Any]], values: Sequence[float]) -> list[Stand]:
    """What stands in the groups now; values: the learning rates that are meant."""
    return [
        Stand(group["lr"], version_of(group["lr"]), value, group.get("momentum"), group.get("betas"))
        for group, value in zip(groups, values, strict=True)
    ]


def untouched(groups: Sequence[dict[str, Any]], stands: Sequence[Stand]) -> bool:
    """Whether every group holds the very same objects. For values that are no tensors: the hot path."""
    if len(groups) != len(stands):
        return False
    for group, stand in zip(groups, stands):  # noqa: B905 - the hot path
        if (
            group["lr"] is not stand.lr
            or group.get("momentum") is not stand.momentum
            or group.get("betas") is not stand.betas
        ):
            return False
    return True


def changes(
    groups: Sequence[dict[str, Any]], stands: Sequence[Stand], momentum: Sequence[float | None] | None
) -> list[Change]:
    """What was written since, by group. momentum: whose momentum (or beta1) is steered; None: nobody's."""
    out = []
    for i, (group, stand) in enumerate(zip(groups, stands, strict=False)):
        now = group["lr"]
        if is_other(now, stand):
            found = None if on_device(now) else plain(now)
            if found is None or not _same(now, found, stand.value):
                out.append(Change("learning rate", i, stand.value, found))
        if momentum is not None and i < len(momentum) and momentum[i] is not None:
            before, after = _momentum(stand.momentum, stand.betas), _momentum(group.get("momentum"), group.get("betas"))
            if before != after:
                out.append(Change("momentum", i, before, after))
    return out


def is_other(value: Any, stand: Stand) -> bool:
    """Whether this is another object than stood there, or was written in place since."""
    return value is not stand.lr or version_of(value) != stand.version


def version_of(value: Any) -> int | None:
    """How often a tensor was written in place; None for what is no tensor, or does not count."""
    if isinstance(value, float):
        return None
    try:
        return int(value._version)
    except (AttributeError, RuntimeError):
        return None


def on_device(value: Any) -> bool:
    """Whether reading it would wait for a device."""
    device = getattr(value, "device", None)
    return device is not None and getattr(device, "type", "cpu") != "cpu"


def plain(value: Any) -> float:
    """A number or a tensor with one element as a float."""
    return float(value.item()) if hasattr(value, "item") else float(value)


def _same(now: Any, found: float, wanted: float) -> bool:
    """Whether what was found is what was meant, in the type of what holds it."""
    return found == wanted or (hasattr(now, "new_tensor") and found == float(now.new_tensor(wanted)))


def _momentum(momentum: Any, betas: Any) -> float:
    return float(momentum) if momentum else float(betas[0]) if betas else 0.0
