"""Which groups' momentum a policy may drive, and what the others keep.

Rule of this module: a group without momentum, or with it switched off (0), is never touched.
"""

from __future__ import annotations

from flyball_server.core.types import Group


def driven(groups: tuple[Group, ...], target: str, *, off: bool = False) -> tuple[float | None, ...]:
    """Per group the value that a policy drives, as attached; None where it must leave the group alone.

    target: "momentum" drives a momentum above 0; "beta1" drives betas[0] above 0 of the Adam family as well. off:
    drive one that is switched off, too (some published schedulers do).
    """
    values = own(groups) if target == "beta1" else tuple(group.momentum for group in groups)
    return tuple(value if value or off else None for value in values)


def own(groups: tuple[Group, ...]) -> tuple[float | None, ...]:
    """Per group what it keeps if nobody drives it: its momentum, else its beta1, else None."""
    return tuple(g.momentum if g.momentum is not None else g.betas[0] if g.betas is not None else None for g in groups)
