"""Policy `windowed`: judge the loss one full window at a time, then move the learning rate a little or not at all.

Rule: at most one decision per `window_size` good losses, from that window's mean, spread and slope and the
previous window's mean; the checks run in the fixed order of `_judge`, safety first. One controller steers the
reference group (the first with a positive LR); the others follow by ratio (`group_mode="ratio"`) or get the
same number (`"same"`). The controller's LR stays within [lr_min, lr_max].

compat="original" repeats the published class this policy comes from: absolute bounds and initial LR, all groups
the same LR, the first window judged like any other, measures without absolute values, spikes rate-limited, no
warm-up of its own. The guard against unusable losses is the same in both modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import EPS, LARGEST_SIGNAL, ratios, reference_lr, spread
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Emergency:
    """A brake that does not wait for the window to fill: cut by `factor` where a loss jumps by `ratio`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    factor: float = field(default=0.5, metadata=about("Factor on the LR.", gt=0, lt=1))
    ratio: float = field(default=1.5, metadata=about("Jump over the mean of the three losses before.", gt=1))
    min_samples: int = field(default=4, metadata=about("Losses the window must hold, this one included.", ge=2))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Parameters; null means "derived", and those that do not depend on the groups are filled in at once.

    Window and time: window_size, warmup_steps, patience (in patience_unit), cooldown_steps; with total_steps
    they follow the length of the run. Thresholds are relative to the previous window's mean. Factors multiply
    the LR, limited by max_change_per_step and the bounds.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    compat: Literal["default", "original", "seed"] = field(
        default="default", metadata=about("'original' repeats the published class ('seed' is another spelling).")
    )
    total_steps: int | None = field(default=None, metadata=about("Length of the run, if known.", ge=1))
    initial_lr: float | None = field(
        default=None, metadata=about("First LR of the reference group; null: its own (original: 5e-5).", gt=0)
    )
    lr_min: float | None = field(
        default=None, metadata=about("Lowest LR; null: initial LR / 100 (original: 1e-7).", gt=0)
    )
    lr_max: float | None = field(
        default=None, metadata=about("Highest LR; null: 20 x initial LR (original: 1e-2).", gt=0)
    )
    window_size: int | None = field(
        default=None,
        metadata=about("Losses per decision; null: 50, or max(10, min(50, total_steps // 20)).", ge=2, le=10_000),
    )
    warmup_steps: int | None = field(
        default=None, metadata=about("Steps of linear warm-up; null: 0, or a tenth of total_steps.", ge=0)
    )
    patience: int | None = field(
        default=None,
        metadata=about("Windows without improvement before a cut; null: 20, fewer if total_steps is small.", ge=1),
    )
    patience_unit: Literal["windows", "steps"] = field(default="windows", metadata=about("What patience counts."))
    cooldown_steps: int = field(default=20, metadata=about("Losses after a change before the next one.", ge=0))
    increase_threshold: float = field(default=0.02, metadata=about("Improvement above which the LR may rise."))
    plateau_threshold: float = field(default=0.001, metadata=about("Improvement below which a window is a plateau."))
    spike_threshold: float = field(default=1.2, metadata=about("Mean / previous mean above which it is a spike.", ge=1))
    stability_threshold: float = field(default=0.3, metadata=about("Spread / mean below which the LR may rise.", ge=0))
    instability_threshold: float = field(default=0.5, metadata=about("Spread / mean above which the LR is cut.", ge=0))
    increase_factor: float = field(default=1.1, metadata=about("Factor when improving.", ge=1))
    decrease_factor: float = field(default=0.7, metadata=about("Factor on a plateau or instability.", gt=0, le=1))
    spike_factor: float = field(default=0.5, metadata=about("Factor on a spike or unusable losses.", gt=0, le=1))
    max_change_per_step: float = field(default=0.3, metadata=about("Largest relative change of one decision.", gt=0))
    rate_limit_spike: bool | None = field(
        default=None, metadata=about("Does max_change_per_step limit spikes, too? null: false (original: true).")
    )
    use_moe: bool = field(default=False, metadata=about("Use the narrower moe_ values (mixture-of-experts models)."))
    moe_lr_min: float = field(default=1e-5, metadata=about("Lower bound with use_moe.", gt=0))
    moe_lr_max: float = field(default=2e-3, metadata=about("Upper bound with use_moe.", gt=0))
    moe_increase_factor: float = field(default=1.05, metadata=about("Factor when improving, with use_moe.", ge=1))
    moe_decrease_factor: float = field(
        default=0.85, metadata=about("Factor on a plateau or instability, with use_moe.", gt=0, le=1)
    )
    group_mode: Literal["ratio", "same"] | None = field(
        default=None, metadata=about("Do groups keep their ratios or all get one LR? null: ratio (original: same).")
    )
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row cause one cut.", ge=1))
    emergency: Emergency | None = field(default=None, metadata=about("A brake within the window; null: off."))

    def __post_init__(self) -> None:
        check(self)
        for name, value in _derived(self).items():
            object.__setattr__(self, name, value)
        _bounds(self, self.lr_min or 0.0, self.lr_max or math.inf)


def _derived(config: Config) -> dict[str, Any]:
    """The values of the parameters that were left null and do not depend on the groups."""
    original = config.compat != "default"
    if original and config.warmup_steps:
        raise ValueError(
            f"warmup_steps: {config.warmup_steps}, but compat='original' has no warm-up of its own; "
            "remove it, or declare a base schedule with warmup_steps"
        )
    total, window, warmup, patience = config.total_steps, config.window_size, config.warmup_steps, config.patience
    if window is None:
        window = 50 if total is None else max(10, min(50, total // 20))
    if warmup is None:
        warmup = 0 if total is None or original else int(0.1 * total)
    if patience is None:
        patience = 20
        if total is not None and not original:  # a short run has few windows: 20 of them would never pass
            patience = max(2, min(20, (total - warmup) // (5 * window)))
            patience *= window if config.patience_unit == "steps" else 1
    values: dict[str, Any] = {"window_size": window, "warmup_steps": warmup, "patience": patience}
    values["compat"] = "original" if original else "default"
    if config.rate_limit_spike is None:
        values["rate_limit_spike"] = original
    if config.group_mode is None:
        values["group_mode"] = "same" if original else "ratio"
    if original:
        values["initial_lr"] = config.initial_lr or 5e-5
        values |= {"lr_min": config.lr_min or 1e-7, "lr_max": config.lr_max or 1e-2}
    return values


def _bounds(config: Config, lr_min: float, lr_max: float) -> tuple[float, float]:
    """The bounds in force, narrowed by use_moe. Raises ValueError where nothing lies between them."""
    if config.use_moe:
        lr_min, lr_max = max(lr_min, config.moe_lr_min), min(lr_max, config.moe_lr_max)
    if lr_min > lr_max:
        raise ValueError(f"lr_min: {lr_min!r} is above lr_max = {lr_max!r}; give both, with lr_min <= lr_max")
    return lr_min, lr_max


class Plan(NamedTuple):
    """What follows from the parameters and the groups, worked out once. (Plain tuple after a JSON round trip.)"""

    warmup: int
    window_size: int
    patience: int
    lr_min: float
    lr_max: float
    ratios: tuple[float, ...]


class State(NamedTuple):
    """lr: the controller's. lrs: per group, in force. window: its losses so far. prev: the last window's mean.

    since: good losses since the last change. waited: plateau windows. n: observations. adjustments: changes
    made. bad_run: unusable losses in a row. plan: see Plan.
    """

    lr: float
    lrs: tuple[float, ...]
    window: tuple[float, ...]
    prev: float | None
    since: int
    waited: int
    n: int
    adjustments: int
    bad_run: int
    plan: tuple[Any, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The controller at its initial LR (clamped, except in compat="original"), or at the start of the warm-up.

    Raises ValueError where the bounds leave nothing between them.
    """
    lr = config.initial_lr or reference_lr(groups)
    lr_min, lr_max = _bounds(config, config.lr_min or lr / 100, config.lr_max or 20 * lr)
    if config.compat == "default":
        lr = min(max(lr, lr_min), lr_max)
    warmup, window, patience = config.warmup_steps or 0, config.window_size or 50, config.patience or 20
    if config.patience_unit == "steps":
        patience = -(-patience // window)
    plan = Plan(warmup, window, patience, lr_min, lr_max, ratios(groups, same=config.group_mode == "same"))
    lrs = spread(lr / warmup if warmup else lr, plan.ratios)
    phase = "warmup" if warmup else "adaptive"
    return State(lr, lrs, (), None, 0, 0, 0, 0, 0, plan), Decision(lrs, None, None, phase, "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation. A step without a loss moves nothing, except that a warm-up counts every step."""
    lr, lrs, window, prev, since, waited, n, adjustments, _, plan = state
    n += 1
    if n <= plan[0]:
        return _warm_up(state, n)
    loss = seen.loss
    if loss is None:
        return state, Decision(lrs, None, None, "adaptive", "no_loss")
    if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
        return _bad_loss(config, state)
    window = (*window, loss)
    if config.emergency is not None and _jumped(config.emergency, window):
        return _brake(config.emergency, state, window)
    if len(window) < plan[1]:
        return (
            State(lr, lrs, window, prev, since + 1, waited, n, adjustments, 0, plan),
            Decision(lrs, None, None, "adaptive", "filling_window"),
        )
    return _evaluate(config, state, window)


def _warm_up(state: State, n: int) -> tuple[State, Decision]:
    lr, _, window, prev, since, waited, _, adjustments, bad_run, plan = state
    warmup = plan[0]
    lrs = spread(lr if n == warmup else lr * (n + 1) / warmup, plan[5])
    phase, code = ("adaptive", "warmup_done") if n == warmup else ("warmup", "warmup")
    return (
        State(lr, lrs, window, prev, since, waited, n, adjustments, bad_run, plan),
        Decision(lrs, None, None, phase, code, {"n": n, "warmup_steps": warmup}),
    )


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row cuts and starts a fresh window."""
    lr, lrs, window, prev, since, waited, n, adjustments, bad_run, plan = state
    n, bad_run = n + 1, bad_run + 1
    if bad_run % config.bad_limit:
        return (
            State(lr, lrs, window, prev, since, waited, n, adjustments, bad_run, plan),
            Decision(lrs, None, None, "adaptive", "nonfinite_hold", {"bad_run": bad_run}),
        )
    new = min(lr, max(lr * config.spike_factor, plan[3]))
    lrs = lrs if new == lr else spread(new, plan[5])
    numbers = {"bad_run": bad_run, "old_lr": lr, "new_lr": new, "change_pct": _percent(lr, new)}
    return (
        State(new, lrs, (), prev, 0, waited, n, adjustments, bad_run, plan),
        Decision(lrs, None, None, "adaptive", "nonfinite_backoff", numbers, new != lr),
    )


def _jumped(emergency: Emergency, window: tuple[float, ...]) -> bool:
    """Is the newest loss more than `ratio` times the mean of the (up to) three before it?"""
    if len(window) < emergency.min_samples:
        return False
    before = window[-4:-1]
    mean = math.fsum(before) / len(before)
    return mean > 0 and window[-1] > emergency.ratio * mean


def _brake(emergency: Emergency, state: State, window: tuple[float, ...]) -> tuple[State, Decision]:
    lr, lrs, _, prev, _, waited, n, adjustments, _, plan = state
    new = min(lr, max(plan[3], lr * emergency.factor))
    before = window[-4:-1]
    numbers = {"old_lr": lr, "new_lr": new, "change_pct": _percent(lr, new), "loss": window[-1]}
    numbers["mean_before"] = math.fsum(before) / len(before)
    lrs = lrs if new == lr else spread(new, plan[5])
    return (
        State(new, lrs, (), prev, 0, waited, n + 1, adjustments + (new != lr), 0, plan),
        Decision(lrs, None, None, "adaptive", "emergency", numbers, new != lr),
    )


class Measures(NamedTuple):
    """A full window: mean, spread (std / |mean|), least-squares slope per step, and the improvement rate."""

    mean: float
    cv: float
    slope: float
    rate: float | None


def measure(window: tuple[float, ...], prev: float | None, original: bool) -> Measures:
    """Mean, population std and least-squares slope over the index, each two-pass and centred.

    Exact sums make the slope of a constant window exactly 0. original: measures without absolute values,
    0 where the published class gives up.
    """
    size = len(window)
    mean = math.fsum(window) / size
    centred = [loss - mean for loss in window]
    std = math.sqrt(math.fsum([d * d for d in centred]) / size)
    middle = (size - 1) / 2
    slope = math.fsum([(i - middle) * d for i, d in enumerate(centred)]) / (size * (size * size - 1) / 12)
    if original:
        cv = std / mean if mean > 0 else 0.0
        rate: float | None = (prev - mean) / prev if prev is not None and prev > 0 else 0.0
    else:
        cv = std / max(abs(mean), EPS)
        rate = None if prev is None else (prev - mean) / max(abs(prev), EPS)
    return Measures(mean, cv, slope, rate)


def _spiked(config: Config, mean: float, prev: float | None) -> bool:
    if prev is None:
        return False
    if config.compat == "original":  # a falling negative loss counts as a spike there
        return prev != 0 and mean > config.spike_threshold * prev
    return mean - prev > (config.spike_threshold - 1) * max(abs(prev), EPS)


def _judge(config: Config, state: State, plan: Plan, seen: Measures) -> tuple[str, float, int]:
    """(code, factor, plateau windows so far): the first check that matches decides."""
    rate, waited = seen.rate, state.waited
    up = config.moe_increase_factor if config.use_moe else config.increase_factor
    down = config.moe_decrease_factor if config.use_moe else config.decrease_factor
    if rate is None:
        return "baseline_window", 1.0, waited
    if state.since + 1 < config.cooldown_steps:
        return "cooldown", 1.0, waited
    if _spiked(config, seen.mean, state.prev):
        return "spike_decrease", config.spike_factor, 0
    if seen.cv > config.instability_threshold:
        return "unstable_decrease", down, 0
    calm = seen.cv < config.stability_threshold and seen.slope < 0
    if rate > config.increase_threshold and calm and state.lr < plan.lr_max:
        return "increase", up, 0
    if rate < config.plateau_threshold:
        if waited + 1 >= plan.patience and state.lr > plan.lr_min:
            return "plateau_decrease", down, 0
        return "plateau_wait", 1.0, waited + 1
    return "hold", 1.0, 0


def _evaluate(config: Config, state: State, window: tuple[float, ...]) -> tuple[State, Decision]:
    """The window is full: judge it, move the LR by the limited factor, and start the next window."""
    plan = Plan(*state.plan)
    seen = measure(window, state.prev, config.compat == "original")
    code, factor, waited = _judge(config, state, plan, seen)
    old = new = state.lr
    moves = code in _MOVES
    if moves:
        if code != "spike_decrease" or config.rate_limit_spike:
            factor = min(max(factor, 1 - config.max_change_per_step), 1 + config.max_change_per_step)
        new = min(max(old * factor, plan.lr_min), plan.lr_max)
    lrs, since, adjustments = state.lrs, state.since + 1, state.adjustments
    numbers: dict[str, Any] = {
        "old_lr": old, "new_lr": new, "change_pct": _percent(old, new), "loss_avg": seen.mean,
        "prev_avg": state.prev, "improvement_rate": seen.rate, "cv": seen.cv, "trend": seen.slope, "pc": waited,
    }  # fmt: skip
    if new != old:
        lrs, since, adjustments = spread(new, plan.ratios), 0, adjustments + 1
        numbers["decision_original"] = _MOVES[code]
    elif moves:
        code += "@bound"
    return (
        State(new, lrs, (), seen.mean, since, waited, state.n + 1, adjustments, 0, state.plan),
        Decision(lrs, None, None, "adaptive", code, numbers, new != old),
    )


#: The codes that move the LR, with the words the published class logs for them.
_MOVES = {"increase": "increase", "spike_decrease": "spike_decrease"}
_MOVES |= dict.fromkeys(("unstable_decrease", "plateau_decrease"), "decrease")


def _percent(old: float, new: float) -> float:
    return 100.0 * (new - old) / old if old else 0.0


_CHANGE = ": learning rate {old_lr:.6g} -> {new_lr:.6g} ({change_pct:+.3g} %)."
_SENTENCES = {
    "initial": "Starting with the initial learning rate, or the first step of the warm-up to it.",
    "warmup": "Warm-up: step {n} of {warmup_steps}.",
    "warmup_done": "Warm-up finished after {n} steps: full learning rate from here on.",
    "no_loss": "No loss was measured: nothing counts.",
    "filling_window": "Collecting a window of {window_size} losses before the next judgement.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, the learning rate stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row" + _CHANGE,
    "emergency": "Loss {loss:.6g} jumped above the three before it (mean {mean_before:.6g})" + _CHANGE,
    "baseline_window": "First full window: mean loss {loss_avg:.6g} is the baseline.",
    "cooldown": "A change was made less than {cooldown_steps} losses ago: the learning rate stays.",
    "spike_decrease": "Loss spike, avg {loss_avg:.6g} vs previous {prev_avg:.6g}" + _CHANGE,
    "unstable_decrease": "Unstable loss, cv={cv:.4g} > instability_threshold={instability_threshold:g}" + _CHANGE,
    "increase": "improvement_rate={improvement_rate:.4g} > increase_threshold={increase_threshold:g}" + _CHANGE,
    "plateau_decrease": "Plateau, improvement_rate={improvement_rate:.4g} in the last of {patience} {patience_unit}, "
    "cv={cv:.4g}" + _CHANGE,
    "plateau_wait": "No improvement (improvement_rate={improvement_rate:.4g}): {pc} such windows in a row.",
    "hold": "Improving steadily (improvement_rate={improvement_rate:.4g}): the learning rate stays.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people, from the decision's code and fields (two where a warning is due)."""
    code, _, bound = decision.code.partition("@")
    parameters = {entry.name: getattr(config, entry.name) for entry in fields(Config)}
    text = _SENTENCES[code].format(**{**parameters, **(decision.fields or {})})
    if bound:
        text = text.removesuffix(".") + ", the bound it is already at."
    if code == "baseline_window" and decision.fields and decision.fields["cv"] > 1:
        text += " Its spread exceeds its mean: relative measures mean little for a loss around zero."
    return text


POLICY = Policy("windowed", 1, Config, State, init, step, explain, codes=_SENTENCES)
