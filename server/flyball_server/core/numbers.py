"""Which numbers may enter a policy and which may leave it, and how one LR becomes one per group.

Rule of this module: whatever comes in, a group with a positive base LR gets a finite LR above 0, and a
group with base LR 0 keeps 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from flyball_server.core.types import Group

#: Squares of larger values overflow, so a larger value is as bad as an infinite one.
LARGEST_SIGNAL = 1e100
#: The limits of what a policy may emit: normal floats whose small multiples are finite, too.
SMALLEST_LR, LARGEST_LR = 1e-300, 1e100
LARGEST_FLOAT = 1.7976931348623157e308
#: Denominators of relative measures are at least this.
EPS = 1e-12


def bad(value: float) -> bool:
    """Is the measured `value` NaN, infinite or so large that its square overflows?"""
    return not -LARGEST_SIGNAL <= value <= LARGEST_SIGNAL


def emit(lr: float) -> float:
    """`lr` (positive or 0) within what may leave a policy."""
    return LARGEST_LR if lr > LARGEST_LR else lr if lr >= SMALLEST_LR else SMALLEST_LR


def finite(value: Any) -> Any:
    """`value` (numbers, strings, None, lists and mappings of such) as JSON can carry it.

    An infinity becomes the largest float and NaN 0: the sentences of a decision format these numbers.
    """
    if isinstance(value, float):
        return value if isfinite(value) else max(min(value, LARGEST_FLOAT), -LARGEST_FLOAT) if value == value else 0.0
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def reference_lr(groups: tuple[Group, ...]) -> float:
    """The base LR that ratios are taken to: group 0's, or the first positive one, or 0 if there is none."""
    return next((group.lr for group in groups if group.lr > 0), 0.0)


def ratios(groups: tuple[Group, ...], same: bool = False) -> tuple[float, ...]:
    """Per group: base LR / reference LR, or 1 for every group where `same`; 0 where the base LR is 0."""
    reference = reference_lr(groups)
    return tuple(0.0 if group.lr <= 0 else 1.0 if same else group.lr / reference for group in groups)


def spread(lr: float, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """The controller's `lr` as one LR per group."""
    return tuple([emit(lr * ratio) if ratio else 0.0 for ratio in ratios])
