"""Parameter groups as PyTorch and its kin keep them: a list of dictionaries.

Rule of this module: no library is needed, and no device is asked after attach. A group is known by its name, or else by
what it holds, and never by its place in the list.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any

from flyball import limits
from flyball.adapters.standing import on_device, plain
from flyball.wire import Group

log = logging.getLogger("flyball")

#: What of a group is written or read.
_SETTINGS = ("lr", "momentum", "betas")
#: What a group holds that was added after its run began: where it began. Optimizers save it with the group.
_ADDED = "flyball_reference_lr"


def names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every group: its own; else what the names of its parameters begin with, where the optimizer was given
    named parameters and no other group's begin so; else default (a single one) or its place. Raises ValueError for one
    twice."""
    if len(groups) == 1:
        return [str(groups[0].get("name") or "default")]
    begin = [_beginning(group.get("param_names") or ()) for group in groups]
    found = [
        str(group.get("name") or (own if begin.count(own) == 1 else "") or f"group{i}")
        for i, (group, own) in enumerate(zip(groups, begin, strict=True))
    ]
    if len(set(found)) < len(found):
        raise ValueError(f"the parameter groups' names are {found}: give each its own")
    return found


def _beginning(parameters: Sequence[str]) -> str:
    """The module that all these parameters are of: "encoder.layer" of encoder.layer.weight and encoder.layer.bias."""
    out = []
    for parts in zip(*(str(name).split(".")[:-1] for name in parameters), strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out)


def declared(name: str, group: Mapping[str, Any], *, multiplier: bool) -> Group:
    """A group as the service is told of it at attach."""
    momentum, betas = group.get("momentum"), group.get("betas")
    if not momentum and betas is not None:
        momentum = None  # the group's momentum is its betas[0]
    lr = plain(group["lr"])
    # A warm-up from 0 must not freeze the group: what its scheduler counts from stands beside it.
    if multiplier or not lr:
        lr = plain(group.get("initial_lr", 0.0)) or lr
    return Group(
        name,
        lr,
        None if momentum is None else float(momentum),
        (float(betas[0]), float(betas[1])) if betas is not None and len(betas) == 2 else None,
        is_free(group),
    )


def begun(groups: Sequence[dict[str, Any]], *, goes_on: bool) -> list[dict[str, Any]]:
    """The groups that the run began with; those added later are known by what `added` left in them, in a checkpoint
    too. goes_on: whether this is a run that has begun; for one that begins now, all of them are its own."""
    known = [group for group in groups if _ADDED not in group]
    if goes_on and known:
        return known
    for group in groups:
        group.pop(_ADDED, None)
    return list(groups)


def added(group: dict[str, Any], place: int, times: float) -> Any:
    """Where a group began that was added after attach: a number, or a tensor on its device. Told when first seen.
    times: the first group's factor, which it gets."""
    if _ADDED not in group:
        lr = group["lr"]
        group[_ADDED] = lr.detach().clone() if on_device(lr) else plain(lr)
        log.warning(
            "flyball: group %s was added after attach with the learning rate %s: it gets the first group's factor, "
            "%.6g now, and the run's record does not show it",
            group.get("name") or f"group{place}",
            "that stands on its device" if on_device(lr) else f"{plain(lr):.9g}",
            times,
        )
    return group[_ADDED]


def is_free(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer finds its own step size, by the group's shape: D-Adaptation and Prodigy keep their estimate
    in "d", schedule-free optimizers whether they train in "train_mode", or how much their average weighs."""
    return "d" in group or "train_mode" in group or {"scheduled_lr", "weight_sum"} <= group.keys()


def effective(effective: Mapping[str, float], *, alone: bool) -> dict[str, float]:
    """Effective learning rates by group as signals. alone: whether the run has this one group."""
    if alone:
        return dict.fromkeys(("effective_lr",), next(iter(effective.values()))) if effective else {}
    first = list(effective.items())[: limits.EFFECTIVE_MAX]
    return {"effective_lr/" + re.sub(r"[^A-Za-z0-9_./@%+-]", "_", name): value for name, value in first}


def effective_lr(group: Mapping[str, Any]) -> float | None:
    """The learning rate that a group found for itself; None where it cannot be read without waiting for a device."""
    found = group.get("scheduled_lr")
    if found is None:
        d, lr = group.get("d", 1.0), group["lr"]
        if on_device(d) or on_device(lr):
            return None
        return plain(d) * plain(lr)
    return None if on_device(found) else plain(found)


def momentum_of(group: Mapping[str, Any], declared: Group) -> float | None:
    """The momentum (or beta1) the group has now, of the kind that was declared; None where none was."""
    if declared.momentum is not None:
        return float(group.get("momentum", 0.0))
    betas = group.get("betas")
    return float(betas[0]) if declared.betas is not None and betas else None


class Rows:
    """The groups in the order they were declared in, and behind them those that came later, whatever the optimizer's
    own list has become. A group that is gone leaves its last settings, which nobody uses."""

    def __init__(self, declared: Sequence[Group], groups: Sequence[dict[str, Any]]) -> None:
        own = names(groups)
        self._names = own if len(own) == len(declared) else [group.name for group in declared]
        #: The list as it was when this looked last, and what it held in rows.
        self._list = list(groups)
        self._rows = list(groups)
        self._held = [_first_of(group) for group in groups]
        self._gone: set[str] = set()

    def of(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the optimizer's list as it is now."""
        if len(groups) != len(self._list) or not all(map(is_, groups, self._list)):
            self._arrange(groups)
        return self._rows

    def _arrange(self, groups: Sequence[dict[str, Any]]) -> None:
        at = self._places(groups)
        n = len(self._names)
        by = {place: group for group, place in zip(groups, at, strict=True) if place is not None}
        rows = [by.get(i) or self._absent(i) for i in range(n)]
        rows += [by[i] for i in range(n, len(self._rows)) if i in by]
        rows += [group for group, place in zip(groups, at, strict=True) if place is None]
        self._gone = {name for i, name in enumerate(self._names) if i not in by}
        self._list, self._rows = list(groups), rows
        self._held = [_first_of(row) or (self._held[i] if i < n else None) for i, row in enumerate(self._rows)]

    def _places(self, groups: Sequence[dict[str, Any]]) -> list[int | None]:
        """Which row each group of the list is: the very same one, that of its name, or that of its first parameter.
        Where all of them hold others than before (an engine put its own there), their places are all there is."""
        same = {id(row): i for i, row in enumerate(self._rows)}
        at = [same.get(id(group)) for group in groups]
        held = {id(one): i for i, ref in enumerate(self._held) if ref is not None and (one := ref()) is not None}
        for way in (self._named, partial(_holding, held)):
            for i, group in enumerate(groups):
                if at[i] is None and (place := way(group)) is not None and place not in at:
                    at[i] = place
        if not any(place is not None for place in at):
            return [i if i < len(self._names) else None for i in range(len(groups))]
        return at

    def _named(self, group: Mapping[str, Any]) -> int | None:
        name = group.get("name")
        return self._names.index(name) if name in self._names else None

    def _absent(self, i: int) -> dict[str, Any]:
        if self._names[i] not in self._gone:
            log.warning("flyball: group %s is gone from the optimizer: its settings are nobody's", self._names[i])
        return {"params": [], **{key: self._rows[i][key] for key in _SETTINGS if key in self._rows[i]}}


def _holding(held: Mapping[int, int], group: Mapping[str, Any]) -> int | None:
    parameters = group.get("params")
    return held.get(id(parameters[0])) if parameters else None


def _first_of(group: Mapping[str, Any]) -> weakref.ref[Any] | None:
    """What a group is known by where it has no name."""
    for parameter in group.get("params") or ():
        try:
            return weakref.ref(parameter)
        except TypeError:
            return None
    return None
