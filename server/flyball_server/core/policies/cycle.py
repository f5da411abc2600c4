"""Policy `cycle`: low while the loss falls, medium while it stands still, a burst of high when it is stuck or rises.

Rule: per good loss, the older and the newer half of a sliding window give the relative improvement; it moves the
phase between exploit (low), explore (medium, with noise) and escape (high, for `escape_steps`), and the controller's
LR goes smoothly to the phase's target. What leaves lies within [base_lr, ceiling]; the noise is not fed back. One
controller steers the reference group (the first with a positive LR); the others follow by ratio
(`group_mode="ratio"`) or get the same number (`"same"`).

compat="original" repeats the published description: absolute LR bounds and an improvement divided by the older mean
as it is, so that for negative losses its sign is turned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import EPS, LARGEST_LR, LARGEST_SIGNAL, emit, ratios, reference_lr, spread
from flyball_server.core.rng import uniform
from flyball_server.core.types import Decision, Group, Observation, Policy

#: The stream of chance that the noise is drawn from.
NOISE_STREAM = 0x0001
#: Where a sum falls below this part of its largest size since it was made, it is made anew.
LARGEST_FALL = 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Parameters; null means "derived", and those that do not depend on the groups are filled in at once.

    base_lr and max_lr (or max_lr_factor) are the range; window_size, patience, escape_steps and refractory count
    good losses; thresholds are relative improvements from the older to the newer half of the window.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    compat: Literal["default", "original", "seed"] = field(
        default="default", metadata=about("'original' repeats the published description ('seed': the same).")
    )
    base_lr: float | None = field(
        default=None,
        metadata=about("Lowest and first LR; null: the reference group's (original: 1e-4).", gt=0, le=LARGEST_LR),
    )
    max_lr: float | None = field(
        default=None,
        metadata=about("Highest LR; null: max_lr_factor x base_lr (original: 1e-3).", gt=0, le=LARGEST_LR),
    )
    max_lr_factor: float = field(default=10.0, metadata=about("max_lr / base_lr where max_lr is null.", ge=1))
    window_size: int = field(default=150, metadata=about("Losses that the two halves hold together.", ge=4, le=10_000))
    patience: int = field(default=600, metadata=about("Losses without improvement before an escape.", ge=1))
    improvement_threshold: float = field(default=0.01, metadata=about("Improvement above which to exploit.", ge=0))
    plateau_threshold: float = field(default=0.005, metadata=about("Improvement up to which it is a plateau.", ge=0))
    smoothing: float = field(default=0.99, metadata=about("Part of the LR that one step keeps.", ge=0, lt=1))
    escape_multiplier: float = field(default=1.5, metadata=about("A burst aims at this times max_lr.", ge=1))
    explore_level: float = field(
        default=0.5, metadata=about("Medium, between base_lr (0) and max_lr (1) on a log scale.", ge=0, le=1)
    )
    explore_noise: float = field(default=0.2, metadata=about("Half-width of the noise / LR.", ge=0, le=1))
    escape_steps: int | None = field(default=None, metadata=about("Length of a burst; null: window_size.", ge=1))
    refractory: int | None = field(
        default=None, metadata=about("Losses after a burst before the next; null: window_size.", ge=0)
    )
    escape_on: Literal["patience", "increase", "both"] = field(default="both", metadata=about("What starts a burst."))
    divergence_threshold: float = field(
        default=0.5, metadata=about("A loss that rises by more than this part gets the lowest LR.", ge=0)
    )
    escape_ceiling: Literal["max_lr", "multiplied"] = field(
        default="max_lr", metadata=about("Is the hard limit max_lr, or escape_multiplier x max_lr?")
    )
    group_mode: Literal["ratio", "same"] = field(
        default="ratio", metadata=about("Do groups keep their ratios or all get one LR?")
    )
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row lead back to base_lr.", ge=1))
    seed: int | None = field(default=None, metadata=about("Seed of the noise; null: the run's seed."))

    def __post_init__(self) -> None:
        check(self)
        original = self.compat != "default"
        base = self.base_lr or (1e-4 if original else None)
        top = self.max_lr or (1e-3 if original else base and emit(self.max_lr_factor * base))
        values = {"compat": "original" if original else "default", "base_lr": base, "max_lr": top}
        values["escape_steps"] = self.escape_steps or self.window_size
        values["refractory"] = self.window_size if self.refractory is None else self.refractory
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if base and top:
            _ordered("base_lr", base, "max_lr", top)
        _ordered("plateau_threshold", self.plateau_threshold, "improvement_threshold", self.improvement_threshold)


def _ordered(low_name: str, low: float, high_name: str, high: float) -> None:
    if low > high:
        raise ValueError(f"{low_name}: {low!r} is above {high_name} = {high!r}; give both, with {low_name} the smaller")


class Plan(NamedTuple):
    """What follows from the parameters and the groups, worked out once. (Plain tuple after a JSON round trip.)"""

    base: float
    ceiling: float
    explore: float
    escape: float
    ratios: tuple[float, ...]
    seed: int


#: The sums of the older and the newer half, each as a float and the rest that this float cannot hold, and the largest
#: size of either since they were made.
Sums = tuple[float, float, float, float, float]


class State(NamedTuple):
    """lr: the controller's, before noise; out: after it. lrs: per group, in force. stuck: losses without improvement.

    left: of the burst. refr: losses until the next may start. bad_run: unusable losses in a row. before: the full
    window when its sums were made (empty while it fills), since: the losses after that, oldest first. plan: see Plan.
    """

    lr: float
    out: float
    lrs: tuple[float, ...]
    phase: str
    stuck: int
    left: int
    refr: int
    bad_run: int
    before: tuple[float, ...]
    since: tuple[float, ...]
    sums: Sums
    plan: tuple[Any, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The controller at base_lr. Raises ValueError where max_lr lies below the optimizer's learning rate."""
    base = emit(config.base_lr or reference_lr(groups))
    top = emit(config.max_lr or config.max_lr_factor * base)
    _ordered("base_lr", base, "max_lr", top)
    escape = emit(config.escape_multiplier * top)
    explore = min(base * (top / base) ** config.explore_level, top)
    ceiling = escape if config.escape_ceiling == "multiplied" else top
    parts = ratios(groups, same=config.group_mode == "same")
    plan = Plan(base, ceiling, explore, escape, parts, seed if config.seed is None else config.seed)
    lrs = spread(base, parts)
    state = State(base, base, lrs, "exploit", 0, 0, 0, 0, (), (), (0.0, 0.0, 0.0, 0.0, 0.0), plan)
    return state, Decision(lrs, None, None, "exploit", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation. A step without a loss moves nothing."""
    lr, out, lrs, phase, stuck, left, refr, _, before, since, sums, plan = state
    loss = seen.loss
    if loss is None:
        return state, Decision(lrs, None, None, phase, "no_loss")
    if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
        return _bad_loss(config, state)
    size = config.window_size
    before, since, sums = slide(before, since, sums, loss, size)
    if not before:
        return (
            State(lr, out, lrs, phase, stuck, left, refr, 0, before, since, sums, plan),
            Decision(lrs, None, None, phase, "filling_window"),
        )
    half = size // 2
    old, old_rest, recent, recent_rest, _ = sums
    old_avg, recent_avg = (old + old_rest) / half, (recent + recent_rest) / (size - half)
    improvement = _improvement(config, old_avg, recent_avg)
    code, phase, stuck, left, refr = _judge(config, phase, stuck, left, refr, improvement)

    base, ceiling, explore, escape, parts, seed = plan
    target = base if phase == "exploit" else explore if phase == "explore" else escape
    lr += (1.0 - config.smoothing) * (target - lr)  # in this form an LR at its target stays there to the last bit
    if lr > ceiling:
        lr = ceiling
    fields = {
        "improvement": improvement, "old_avg": old_avg, "recent_avg": recent_avg, "stuck": stuck, "left": left,
        "refr": refr, "target": target, "lr_before_noise": lr,
    }  # fmt: skip
    new = lr
    if phase == "explore":
        fields["u"] = u = uniform(seed, NOISE_STREAM, seen.step)
        new *= 1.0 + config.explore_noise * (2.0 * u - 1.0)
    new = base if new < base else ceiling if new > ceiling else new
    if new != out:
        lrs = _moved(lrs, new, parts)
    return (
        State(lr, new, lrs, phase, stuck, left, refr, 0, before, since, sums, plan),
        Decision(lrs, None, None, phase, code, fields),
    )


def _moved(lrs: tuple[float, ...], lr: float, parts: tuple[float, ...]) -> tuple[float, ...]:
    """The controller's `lr` per group, and the very same tuple where that alters no group."""
    new = spread(lr, parts)
    return lrs if new == lrs else new


# ---- the two halves of the window ------------------------------------------------------------------------


def slide(
    before: tuple[float, ...], since: tuple[float, ...], sums: Sums, x: float, size: int
) -> tuple[tuple[float, ...], tuple[float, ...], Sums]:
    """The window with `x` as its newest value: (before, since, sums), as `State` keeps them.

    The sums are as good as fsum of each half, at a cost that does not grow with the window: the error of every
    addition is kept (TwoSum, Knuth 1969), and they are made anew once per window length, and at once where one has
    fallen so far that even the kept errors may have been rounded.
    """
    age, newest = len(since), (x,)
    since += newest
    if not before:
        return (since, (), _sums(since)) if age + 1 == size else (before, since, sums)
    old, old_rest, recent, recent_rest, largest = sums
    leaves, middle = before[age], age + size // 2
    passes = before[middle] if middle < size else since[middle - size]

    gain = passes - leaves
    part = gain - passes
    lost = (passes - (gain - part)) - (leaves + part)
    new = old + gain
    part = new - old
    old_rest += ((old - (new - part)) + (gain - part)) + lost
    old = new

    gain = x - passes
    part = gain - x
    lost = (x - (gain - part)) - (passes + part)
    new = recent + gain
    part = new - recent
    recent_rest += ((recent - (new - part)) + (gain - part)) + lost

    if not (-largest <= old <= largest and -largest <= new <= largest):
        largest = max(abs(old), abs(new))
    floor = LARGEST_FALL * largest
    if age + 1 == size or -floor < old < floor or -floor < new < floor:
        window = (before + since)[-size:]
        return window, (), _sums(window)
    return before, since, (old, old_rest, new, recent_rest, largest)


def _sums(window: tuple[float, ...]) -> Sums:
    half = len(window) // 2
    older, newer = window[:half], window[half:]
    old, recent = fsum(older), fsum(newer)
    return old, fsum((*older, -old)), recent, fsum((*newer, -recent)), max(abs(old), abs(recent))


# ---- the judgement ---------------------------------------------------------------------------------------


def _improvement(config: Config, old: float, recent: float) -> float:
    """How much the newer mean lies below the older one, relative to it."""
    if config.compat == "default":
        size = old if old >= 0 else -old
        return (old - recent) / (size if size > EPS else EPS)
    raw = (old - recent) / old if old else 0.0
    return min(max(raw, -LARGEST_SIGNAL), LARGEST_SIGNAL)  # a tiny `old` may overflow


def _judge(
    config: Config, phase: str, stuck: int, left: int, refr: int, improvement: float
) -> tuple[str, str, int, int, int]:
    """(code, phase, stuck, left, refr): the first check that matches decides."""
    better, diverging = improvement > config.improvement_threshold, improvement < -config.divergence_threshold
    if left > 0:
        left -= 1
        refractory = config.refractory or 0
        if better:
            return "escape_success", "exploit", 0, 0, refractory
        if diverging:
            return "diverging", "exploit", 0, 0, refractory
        if left == 0:
            return "escape_over", "explore", 0, 0, refractory
        return "escape_burst", phase, stuck, left, refr
    if refr:
        refr -= 1
    if better:
        return "improving", "exploit", 0, 0, refr
    if diverging:
        return "diverging", "exploit", stuck, 0, refr
    if improvement > config.plateau_threshold:
        return "hysteresis", phase, stuck, 0, refr
    stuck += 1
    rising = improvement < -config.plateau_threshold
    if refr == 0:
        if rising and config.escape_on != "patience":
            return "loss_increasing", "escape", 0, config.escape_steps or 1, refr
        if stuck >= config.patience and config.escape_on != "increase":
            return "patience", "escape", 0, config.escape_steps or 1, refr
    return ("increasing_wait" if rising else "plateau"), "explore", stuck, 0, refr


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row leads back to base_lr and exploit."""
    lr, out, lrs, phase, stuck, left, refr, bad_run, before, since, sums, plan = state
    bad_run += 1
    if bad_run % config.bad_limit:
        return (
            State(lr, out, lrs, phase, stuck, left, refr, bad_run, before, since, sums, plan),
            Decision(lrs, None, None, phase, "nonfinite_hold", {"bad_run": bad_run}),
        )
    base, _, _, _, parts, _ = plan
    lrs = _moved(lrs, base, parts)
    fields = {"bad_run": bad_run, "old_lr": out, "new_lr": base}
    return (
        State(base, base, lrs, "exploit", 0, 0, config.refractory or 0, bad_run, before, since, sums, plan),
        Decision(lrs, None, None, "exploit", "nonfinite_backoff", fields),
    )


_MEANS = " (mean loss {old_avg:.6g} -> {recent_avg:.6g}, improvement {improvement:.4g})"
_SENTENCES = {
    "initial": "Starting with the lowest learning rate.",
    "no_loss": "No loss was measured: nothing counts.",
    "filling_window": "Collecting a window of {window_size} losses before the first judgement.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, the learning rate stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row: learning rate {old_lr:.6g} -> {new_lr:.6g}, its lowest.",
    "escape_success": "The burst worked" + _MEANS + ": back to low learning rates.",
    "diverging": "The loss rises steeply" + _MEANS + ": to the lowest learning rate.",
    "escape_over": "The burst is over without improvement" + _MEANS + ": exploring.",
    "escape_burst": "Burst of high learning rates, {left} losses left" + _MEANS + ".",
    "improving": "Improving" + _MEANS + ": low learning rates.",
    "hysteresis": "Neither improving nor a plateau" + _MEANS + ": nothing changes.",
    "loss_increasing": "The loss rises" + _MEANS + ": a burst of high learning rates begins.",
    "patience": "No improvement for at least {patience} losses" + _MEANS + ": a burst of high learning rates begins.",
    "increasing_wait": "The loss rises" + _MEANS + ", but no burst may start now: exploring.",
    "plateau": "Plateau" + _MEANS + ", {stuck} losses without improvement: exploring.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people, from the decision's code and fields."""
    parameters = {"window_size": config.window_size, "patience": config.patience}
    return _SENTENCES[decision.code].format(**parameters, **(decision.fields or {}))


POLICY = Policy("cycle", 1, Config, State, init, step, explain, codes=_SENTENCES)
