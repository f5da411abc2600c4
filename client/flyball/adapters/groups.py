"""Parameter groups as PyTorch and its kin keep them: a list of dictionaries.

Rule of this module: no library is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyball.wire import Group


def names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every group: its own, else default (a single one) or its place. Raises ValueError for one twice."""
    if len(groups) == 1:
        return [str(groups[0].get("name") or "default")]
    found = [str(group.get("name") or f"group{i}") for i, group in enumerate(groups)]
    if len(set(found)) < len(found):
        raise ValueError(f"the parameter groups' names are {found}: give each its own")
    return found


def momentum_of(group: Mapping[str, Any], declared: Group) -> float | None:
    """The momentum (or beta1) the group has now, of the kind that was declared; None where none was."""
    if declared.momentum is not None:
        return float(group.get("momentum", 0.0))
    betas = group.get("betas")
    return float(betas[0]) if declared.betas is not None and betas else None
