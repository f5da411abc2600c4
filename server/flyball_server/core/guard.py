"""The limits around every policy: the last word before settings leave the service.

Rule of this module: whatever a policy says, what comes out is finite, not negative, and inside the limits.

Two kinds of limits. Rate limits (max_change, max_change_per_window, cooldown) act on the policy's *factor*
(its learning rate divided by the group's reference), so that a base schedule may move freely underneath.
Bounds act on the final value, group by group: a bound is never crossed, even where that bends the ratio
between groups. With `keep_ratios` all groups are scaled alike instead, by as little as it takes; where no common scale
would do, because groups lie further apart than their limits, the limits win, group by group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.numbers import LARGEST_FLOAT
from flyball_server.core.types import Decision, Group, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """Limits of one named group, on top of those of the run."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    scale: float = field(default=1.0, metadata={"description": "factor on this group's learning rate, > 0"})
    min_lr: float | None = field(default=None, metadata={"description": "lowest learning rate of the group"})
    max_lr: float | None = field(default=None, metadata={"description": "highest learning rate of the group"})

    def __post_init__(self) -> None:
        _positive("scale", self.scale)
        _ordered("min_lr", self.min_lr, "max_lr", self.max_lr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a run. Everything is off by default except: finite and not negative, momentum in [0, 1)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    min_lr: float | None = field(default=None, metadata={"description": "lowest learning rate of any group"})
    max_lr: float | None = field(default=None, metadata={"description": "highest learning rate of any group"})
    min_factor: float | None = field(
        default=None, metadata={"description": "lowest learning rate as a multiple of the group's reference"}
    )
    max_factor: float | None = field(
        default=None, metadata={"description": "highest learning rate as a multiple of the group's reference"}
    )
    max_change: float | None = field(
        default=None, metadata={"description": "largest ratio, up or down, by which one decision may move (> 1)"}
    )
    max_change_per_window: float | None = field(
        default=None, metadata={"description": "largest ratio, up or down, over each window of window_steps (> 1)"}
    )
    window_steps: int = field(default=1000, metadata={"description": "length of that window in optimizer steps"})
    warmup_steps: int = field(
        default=0, metadata={"description": "the first steps ramp linearly: step t gets (t + 1) / warmup_steps"}
    )
    cooldown_steps: int = field(default=0, metadata={"description": "after a change, this many steps without another"})
    keep_ratios: bool = field(
        default=False,
        metadata={"description": "where a limit would bend the ratio between groups, scale all alike"},
    )
    groups: Mapping[str, GroupLimits] = field(default_factory=dict, metadata={"description": "limits by group name"})

    def __post_init__(self) -> None:
        _ordered("min_lr", self.min_lr, "max_lr", self.max_lr)
        _ordered("min_factor", self.min_factor, "max_factor", self.max_factor)
        for name in ("max_change", "max_change_per_window"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 1):
                raise ValueError(f"{name} is {value!r}: give a ratio greater than 1, or leave it out")
        if self.window_steps < 1:
            raise ValueError(f"window_steps is {self.window_steps}: give at least 1")
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")


class GuardState(NamedTuple):
    """What the guard remembers. factors: the policy's factors in force, per group (under a base schedule its
    learning rate divided by the group's reference, else the learning rate itself, so that it leaves to the last
    bit as the policy said it); changed: the step of their last change; window: the step its window began at;
    window_factors: the factors at that moment; note: what it last did ("" for nothing)."""

    factors: tuple[float, ...]
    changed: int | None
    window: int
    window_factors: tuple[float, ...]
    note: str


def begin(groups: tuple[Group, ...], *, on_base: bool) -> GuardState:
    """The guard's state before the first decision: every group at its own reference."""
    factors = tuple(1.0 if on_base else g.lr for g in groups)
    return GuardState(factors, None, 0, factors, "")


def is_quiet(limits: Limits, settled: int) -> bool:
    """Whether an unchanged decision after the step `settled` leaves the settings as they were settled then, so that
    settling may be skipped."""
    return (
        settled + 2 >= limits.warmup_steps
        and not limits.cooldown_steps
        and limits.max_change is None
        and limits.max_change_per_window is None
    )


def settle(
    limits: Limits,
    state: GuardState,
    groups: tuple[Group, ...],
    base: tuple[float, ...] | None,
    step: int,
    decision: Decision,
) -> tuple[GuardState, Settings]:
    """Turn a decision taken after `step` into the settings of step + 1.

    base: the base schedule's learning rate of step + 1 per group, or None where the run has none.
    """
    factors, note = _factors(state, groups, decision, base is not None)
    window, window_factors = state.window, state.window_factors
    # Only where it is used: otherwise the state would depend on how often an unchanged decision is settled.
    if limits.max_change_per_window is not None and step + 1 >= window + limits.window_steps:
        window, window_factors = step + 1, state.factors
    changed = state.changed
    if factors != state.factors:
        if changed is not None and step - changed < limits.cooldown_steps:
            factors, note = state.factors, "guard_cooldown"
        else:
            # The first decision (step -1) is where a run starts, not a change of it.
            if step >= 0:
                factors, note = _slowed(limits, groups, state.factors, window_factors, factors)
                changed = step if factors != state.factors else changed
            else:
                window_factors = factors
    lr, bounded = _bounded(limits, groups, base, step, factors)
    momentum, momentum_note = _momentum(groups, decision.momentum)
    noise = decision.noise_std
    if noise is not None and not all(isfinite(n) and n >= 0 for n in noise):
        noise, note = None, "guard_nonfinite"
    note = note or bounded or momentum_note
    return GuardState(factors, changed, window, window_factors, note), Settings(lr, momentum, noise)


def is_free(limits: Limits) -> bool:
    """Whether nothing is asked of the guard but what it always asks: finite, not negative, momentum in [0, 1)."""
    return limits == _NOTHING


def settle_free(
    state: GuardState, groups: tuple[Group, ...], step: int, decision: Decision
) -> tuple[GuardState, Settings]:
    """What `settle` gives where the guard is free and there is no base schedule, for much less: some policies move at
    every observation."""
    lr = decision.lr
    if decision.noise_std is not None or step < 0 or len(lr) != len(groups):
        return settle(_NOTHING, state, groups, None, step, decision)
    for one, group in zip(lr, groups):  # noqa: B905 - the hot path
        if not 0 < one < inf or group.lr == 0:
            return settle(_NOTHING, state, groups, None, step, decision)
    momentum, note = decision.momentum, ""
    if momentum is not None:
        momentum, note = _momentum(groups, momentum)
    changed = state.changed if lr == state.factors else step
    # Half the cost of calling the classes.
    after = _new(GuardState, (lr, changed, state.window, state.window_factors, note))
    return after, _new(Settings, (lr, momentum, None))


def held(
    limits: Limits, state: GuardState, groups: tuple[Group, ...], base: tuple[float, ...] | None, step: int
) -> tuple[float, ...]:
    """The learning rates of step + 1 under the factors in force: what `settle` gives where nothing is decided."""
    return _bounded(limits, groups, base, step, state.factors)[0]


def allowed(
    limits: Limits,
    state: GuardState,
    groups: tuple[Group, ...],
    base: tuple[float, ...] | None,
    now: tuple[float, ...],
    wanted: tuple[float, ...],
) -> tuple[float, ...]:
    """The wanted learning rates, as far as the limits let one decision go from those in force: the largest change, that
    of the window, and every bound. Warm-up and cooldown are the policy's matter."""
    out = []
    for i, (group, before, lr) in enumerate(zip(groups, now, wanted, strict=True)):
        if limits.max_change is not None and before > 0:
            lr = min(max(lr, before / limits.max_change), before * limits.max_change)
        if limits.max_change_per_window is not None:
            own = limits.groups.get(group.name)
            first = state.window_factors[i] * (1.0 if base is None else base[i]) * (1.0 if own is None else own.scale)
            if first > 0:
                lr = min(max(lr, first / limits.max_change_per_window), first * limits.max_change_per_window)
        out.append(lr)
    return within(limits, groups, tuple(out))


def within(limits: Limits, groups: tuple[Group, ...], lr: tuple[float, ...]) -> tuple[float, ...]:
    """The learning rates inside every bound of their groups; a frozen group's stays 0."""
    out = []
    for group, value in zip(groups, lr, strict=True):
        low, high = _range(limits, limits.groups.get(group.name) if limits.groups else None, group.lr)
        value = value if isfinite(value) else group.lr
        value = value if low is None else max(value, low)
        value = value if high is None else min(value, high)
        out.append(value if group.lr else 0.0)
    return tuple(out)


def factors_of(groups: tuple[Group, ...], decision: Decision, on_base: bool) -> tuple[float, ...]:
    """The factors that a first decision means."""
    return _factors(begin(groups, on_base=on_base), groups, decision, on_base)[0]


def _factors(
    state: GuardState, groups: tuple[Group, ...], decision: Decision, on_base: bool
) -> tuple[tuple[float, ...], str]:
    """The decision as factors; the last good ones where a number is unusable."""
    for lr in decision.lr:
        if not 0 <= lr < inf:
            return state.factors, "guard_nonfinite"
    # A group registered with learning rate 0 is frozen by its owner and stays so.
    pairs = zip(decision.lr, groups, strict=True)
    if on_base:
        factors = tuple([lr / g.lr if g.lr > 0 else 1.0 for lr, g in pairs])
        # The quotient of two good numbers may still be too large for one.
        return (factors, "") if all(map(isfinite, factors)) else (state.factors, "guard_nonfinite")
    return tuple([lr if g.lr > 0 else 0.0 for lr, g in pairs]), ""


def _slowed(
    limits: Limits,
    groups: tuple[Group, ...],
    old: tuple[float, ...],
    window: tuple[float, ...],
    new: tuple[float, ...],
) -> tuple[tuple[float, ...], str]:
    """The new factors, held inside the largest allowed ratio to the old ones and to the window's first."""
    wanted = new
    if limits.keep_ratios:
        ranges = [_rates(limits, o, w) if g.lr > 0 else FREE for g, o, w in zip(groups, old, window, strict=True)]
        scale = _common(new, ranges)
        new = tuple([n if r is FREE else n * scale for n, r in zip(new, ranges, strict=True)])
    if limits.max_change is not None:
        r = limits.max_change
        new = tuple(min(max(n, o / r), o * r) for n, o in zip(new, old, strict=True))
    if limits.max_change_per_window is not None:
        r = limits.max_change_per_window
        new = tuple(min(max(n, o / r), o * r) for n, o in zip(new, window, strict=True))
    return new, "" if new == wanted else "guard_max_change"


def _rates(limits: Limits, old: float, first: float) -> tuple[float | None, float | None]:
    """The smallest and the largest factor that the rate limits allow after `old`, in a window that began at `first`."""
    low, high = 0.0, inf
    for ratio, before in ((limits.max_change, old), (limits.max_change_per_window, first)):
        if ratio is not None:
            low, high = max(low, before / ratio), min(high, before * ratio)
    return low, high


def _common(values: Sequence[float], ranges: Sequence[tuple[float | None, float | None]]) -> float:
    """The scale nearest to 1 that takes every value into its range; 1 where none does. 0 has no ratio to keep."""
    least, most = 0.0, inf
    for value, (low, high) in zip(values, ranges, strict=True):
        if value > 0:
            least = least if low is None else max(least, low / value)
            most = min(most, (LARGEST_FLOAT if high is None else high) / value)
    return min(max(1.0, least), most) if least <= most and least < inf else 1.0


def _bounded(
    limits: Limits, groups: tuple[Group, ...], base: tuple[float, ...] | None, step: int, factors: tuple[float, ...]
) -> tuple[tuple[float, ...], str]:
    """base x factor x scale, ramped during warm-up, inside every bound of its group."""
    ramp = (step + 2) / limits.warmup_steps if step + 2 <= limits.warmup_steps else 1.0
    note = ""
    wanted, ranges = [], []
    for i, (group, factor) in enumerate(zip(groups, factors, strict=True)):
        own = limits.groups.get(group.name) if limits.groups else None
        lr = factor if base is None else base[i] * factor
        lr *= ramp if own is None else ramp * own.scale
        if group.lr == 0:
            lr = 0.0
        elif not isfinite(lr):
            lr, note = group.lr, "guard_nonfinite"
        wanted.append(lr)
        # Frozen: no bound may wake it.
        ranges.append(_range(limits, own, group.lr) if group.lr else FREE)
    scale = _common(wanted, ranges) if limits.keep_ratios else 1.0
    out = []
    for lr, (low, high) in zip(wanted, ranges, strict=True):
        now = lr * scale
        if low is not None and (lr < low or now < low):
            now, note = max(now, low), note or ("guard_min" if lr < low else "")
        if high is not None and (lr > high or now > high):
            now, note = min(now, high), note or "guard_max"
        out.append(now)
    return tuple(out), note


def _range(limits: Limits, own: GroupLimits | None, reference: float) -> tuple[float | None, float | None]:
    """The tightest of all lower and all upper bounds that hold for one group."""
    if own is None and limits.min_factor is None and limits.max_factor is None:
        return limits.min_lr, limits.max_lr
    lows = [limits.min_lr, None if limits.min_factor is None else limits.min_factor * reference]
    highs = [limits.max_lr, None if limits.max_factor is None else limits.max_factor * reference]
    if own is not None:
        lows.append(own.min_lr)
        highs.append(own.max_lr)
    return (
        max((x for x in lows if x is not None), default=None),
        min((x for x in highs if x is not None), default=None),
    )


def _momentum(
    groups: tuple[Group, ...], momentum: tuple[float | None, ...] | None
) -> tuple[tuple[float | None, ...] | None, str]:
    """Momenta in [0, 1), and none for a group that has no momentum."""
    if momentum is None:
        return None, ""
    for group, value in zip(groups, momentum, strict=True):
        if value is not None and not (isfinite(value) and 0 <= value < 1):
            return tuple(g.momentum for g in groups), "guard_nonfinite"
        if value is not None and group.momentum is None and group.betas is None:
            return tuple(g.momentum for g in groups), "guard_no_momentum"
    return momentum, ""


def _positive(name: str, value: Any) -> None:
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}: give a finite number greater than 0")


def _ordered(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    for name, value in ((low_name, low), (high_name, high)):
        if value is not None and not (isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}: give a finite number, 0 or more")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{low_name} is {low!r}, greater than {high_name} = {high!r}: swap or correct them")


#: No bounds at all.
FREE: tuple[float | None, float | None] = (None, None)
#: The largest momentum below 1.
MOMENTUM_MAX = 1.0 - 2.0**-53
#: No limits.
_NOTHING = Limits()
_new = tuple.__new__
