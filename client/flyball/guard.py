"""The client's own limits: the last check before a number reaches the optimizer.

Rule of this module: it needs no service. What it lets through is finite, not negative, and inside the bounds
given at attach, whatever the other side of the wire says. Bounds only, group by group: largest changes, warm-up,
cooldown and the ratios between groups need the run's past, which the service has.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

from flyball.wire import Group, Settings


class Bounds:
    """The bounds in a `guard` mapping: min_lr, max_lr, min_factor, max_factor, and the bounds by group.

    absolute: (lowest, highest) learning rate per group. In multiplier mode only the product with the scheduler's value
    can be held against these, so settings are held against the factor bounds alone.
    Raises ValueError for a bound that is no number; everything else about the mapping the service checks.
    """

    def __init__(self, guard: Mapping[str, Any], groups: tuple[Group, ...], multiplier: bool = False) -> None:
        own = guard.get("groups") or {}
        if not isinstance(own, Mapping) or not all(isinstance(limits, Mapping) for limits in own.values()):
            raise ValueError(f"guard: groups is {own!r:.80}: give limits by group name")
        limits = [own.get(group.name, {}) for group in groups]
        self.absolute = tuple(_within(_absolute(guard, one)) for one in limits)
        pairs = zip(limits, groups, strict=True)
        self._lr = [_range([] if multiplier else _absolute(guard, one), guard, group.lr) for one, group in pairs]

    def within(self, settings: Settings) -> Settings | None:
        """The settings inside the bounds; the same object where nothing had to be done, None where unusable."""
        if len(settings.lr) != len(self._lr) or not all(isfinite(lr) and lr >= 0 for lr in settings.lr):
            return None
        if settings.momentum is not None and not all(m is None or 0 <= m < 1 for m in settings.momentum):
            return None
        if settings.noise_std is not None and not all(0 <= n < inf for n in settings.noise_std):
            return None
        if all(low <= lr <= high for lr, (low, high) in zip(settings.lr, self._lr, strict=True)):
            return settings
        lr = tuple(min(max(lr, low), high) for lr, (low, high) in zip(settings.lr, self._lr, strict=True))
        return settings._replace(lr=lr)


_Pairs = list[tuple[float | None, float | None]]


def _range(absolute: _Pairs, guard: Mapping[str, Any], reference: float) -> tuple[float, float]:
    if reference == 0:
        return 0.0, inf  # frozen by its owner: no bound may wake it
    return _within([*absolute, (_bound(guard, "min_factor", reference), _bound(guard, "max_factor", reference))])


def _absolute(guard: Mapping[str, Any], own: Mapping[str, Any]) -> _Pairs:
    return [(_bound(given, "min_lr"), _bound(given, "max_lr")) for given in (guard, own)]


def _within(pairs: _Pairs) -> tuple[float, float]:
    lows, highs = [low for low, _ in pairs if low is not None], [high for _, high in pairs if high is not None]
    return max(lows, default=0.0), min(highs, default=inf)


def _bound(given: Mapping[str, Any], name: str, times: float = 1.0) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"guard: {name} is {value!r}: give a finite number")
    return float(value) * times
