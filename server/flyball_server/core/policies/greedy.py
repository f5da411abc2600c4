"""Policy `greedy`: raise the learning rate while a metric keeps improving, lower it while it does not.

Rule: that of GreedyLR as transformers 5.x ships it (after arXiv 2512.14527), with its parameter names and defaults,
applied once per observation that carries the metric: more than `patience` improvements in a row divide the LR by
`factor`, more than `patience` values in a row that are no better than the best multiply it, and after `reset_start`
cuts in a row that had no room all begins anew. Differences, each for safety:
- min_lr and max_lr are by default relative to the LR at attach (a hundredth and ten times), not 1e-3 and 1.0, above
  which most LRs never get and to which they would all be raised;
- they bound the reference group (the first with a positive LR), and the others keep their ratio to it;
- `reset_start` is null, never: on a loss that rises for ever, beginning anew would raise the LR (there: 500);
- eps, the smallest change that is made, is a part of the LR: 1e-8 as an absolute amount would freeze small LRs;
- the relative threshold is a part of |best|, so that a slightly worse negative value is no improvement;
- a NaN, infinite or huge loss holds everything; every `bad_limit`-th in a row cuts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import LARGEST_LR, LARGEST_SIGNAL, emit, ratios, reference_lr, spread
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The parameters of GreedyLR, and which signal to watch (`metric`).

    metric, mode, threshold, threshold_mode, smooth and window_size say what an improvement is; patience, cooldown and
    warmup count observations of the metric; factor, min_lr, max_lr and eps say how the LR moves; bad_limit guards.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    metric: str = field(default="loss", metadata=about("The signal to watch: loss, reward, val_loss or one of yours."))
    mode: Literal["min", "max"] = field(default="min", metadata=about("Is a smaller or a larger value better?"))
    factor: float = field(default=0.95, metadata=about("A cut multiplies the LR by this, a rise divides.", gt=0, lt=1))
    patience: int = field(default=10, metadata=about("Observations of one kind in a row that move nothing.", ge=0))
    threshold: float = field(default=1e-6, metadata=about("Smallest change that counts as improvement.", ge=0))
    threshold_mode: Literal["abs", "rel"] = field(
        default="abs", metadata=about("Is the threshold an absolute amount or a part of |best|?")
    )
    cooldown: int = field(default=0, metadata=about("Observations after a cut that count nothing.", ge=0))
    warmup: int = field(default=0, metadata=about("Observations after a rise that count nothing.", ge=0))
    min_lr: float | None = field(
        default=None,
        metadata=about("Lowest LR of the reference group; null: a hundredth of its own.", gt=0, le=LARGEST_LR),
    )
    max_lr: float | None = field(
        default=None,
        metadata=about("Highest LR of the reference group; null: ten times its own.", gt=0, le=LARGEST_LR),
    )
    eps: float = field(default=1e-8, metadata=about("A change by no more than this part is not made.", ge=0, lt=1))
    smooth: bool = field(default=False, metadata=about("Judge the mean of the newest window_size values."))
    window_size: int = field(default=50, metadata=about("Values in that mean.", ge=1, le=10_000))
    reset_start: int | None = field(
        default=None, metadata=about("Cuts in a row without room before all begins anew; null: never.", ge=1)
    )
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row cause one cut.", ge=1))

    def __post_init__(self) -> None:
        check(self)
        if not self.metric:
            raise ValueError("metric: '' is empty; give the name of a signal, such as 'loss'")
        if self.min_lr and self.max_lr and self.min_lr > self.max_lr:
            raise ValueError(f"min_lr: {self.min_lr!r} is above max_lr = {self.max_lr!r}; give min_lr <= max_lr")


class State(NamedTuple):
    """lr: the controller's. lrs: per group. best: of the metric. good, bad: improvements and others in a row.

    cooling, warming: left. stuck: cuts in a row without room. bad_run: unusable losses in a row. window: the values of
    the mean. plan: (lowest, highest, first LR, ratios).
    """

    lr: float
    lrs: tuple[float, ...]
    best: float | None
    good: int
    bad: int
    cooling: int
    warming: int
    stuck: int
    bad_run: int
    window: tuple[float, ...]
    plan: tuple[Any, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Start from the groups' learning rates. Raises ValueError where the reference group's is out of bounds."""
    first = reference_lr(groups)
    lr = emit(first)
    low, high = config.min_lr or emit(lr / 100), config.max_lr or emit(lr * 10)
    if first and not low <= lr <= high:
        name, bound = ("min_lr", low) if lr < low else ("max_lr", high)
        raise ValueError(
            f"{name}: {bound!r} shuts out the optimizer's learning rate {lr!r}; leave it null or let them fit"
        )
    parts = ratios(groups)
    lrs = spread(lr, parts)
    state = State(lr, lrs, None, 0, 0, 0, 0, 0, 0, (), (low, high, lr, parts))
    return state, Decision(lrs, None, None, "track", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation: GreedyLR's `step(metrics)`, behind the guard against unusable losses."""
    lr, lrs, best, good, bad, cooling, warming, stuck, bad_run, window, plan = state
    value = loss = seen.loss
    if loss is not None:
        if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
            return _bad_loss(config, state)
        bad_run = 0
    if config.metric != "loss":
        value = seen.signal(config.metric)
    if value is None or not -LARGEST_SIGNAL <= value <= LARGEST_SIGNAL:
        return (
            State(lr, lrs, best, good, bad, cooling, warming, stuck, bad_run, window, plan),
            Decision(lrs, None, None, _phase(cooling, warming), "no_loss" if config.metric == "loss" else "no_metric"),
        )
    if config.smooth:
        window = (*window, value)[-config.window_size :]
        value = fsum(window) / len(window)

    previous, old = best, lr
    if cooling or warming:
        code = "cooldown" if cooling else "warmup"  # both counts are 0 since the move
        cooling, warming = (cooling - 1, warming) if cooling else (0, warming - 1)
    elif best is None or _improved(config, value, best):
        code, best, good, bad = ("first" if best is None else "improved"), value, good + 1, 0
    else:
        code, good, bad = "waiting", 0, bad + 1
    fields = {"metric": value, "best": previous, "good": good, "bad": bad}
    if good > config.patience:
        code, lr = _raised(config, plan, lr)
        good, warming, stuck = 0, config.warmup, 0
    elif bad > config.patience:
        code, lr = _cut(config, plan, lr)
        bad, cooling, stuck = 0, config.cooldown, stuck + _at_floor(config, plan, lr)
        if stuck == config.reset_start:
            code, lr, best, stuck, window = "reset", plan[2], None, 0, ()
    if code in _MOVES:
        lrs = _spread(lrs, lr, plan)
        fields |= {"old_lr": old, "new_lr": lr}
    return (
        State(lr, lrs, best, good, bad, cooling, warming, stuck, bad_run, window, plan),
        Decision(lrs, None, None, _phase(cooling, warming), code, fields, lr != old),
    )


def _phase(cooling: int, warming: int) -> str:
    return "cooldown" if cooling else "warmup" if warming else "track"


def _improved(config: Config, value: float, best: float) -> bool:
    """GreedyLR's `is_better`; for a negative `best` the relative margin is taken of |best|."""
    margin = config.threshold
    if config.threshold_mode == "abs":
        return value < best - margin if config.mode == "min" else value > best + margin
    towards_zero = (config.mode == "min") == (best >= 0)
    target = best * (1.0 - margin if towards_zero else 1.0 + margin)
    return value < target if config.mode == "min" else value > target


def _raised(config: Config, plan: tuple[Any, ...], lr: float) -> tuple[str, float]:
    new = min(lr / config.factor, plan[1])
    return ("increase", new) if new - lr > config.eps * lr else ("increase@bound", lr)


def _cut(config: Config, plan: tuple[Any, ...], lr: float) -> tuple[str, float]:
    new = max(lr * config.factor, plan[0])
    return ("reduce", new) if lr - new > config.eps * lr else ("reduce@bound", lr)


def _at_floor(config: Config, plan: tuple[Any, ...], lr: float) -> bool:
    """Is `lr` so near its lowest that eps forbids the rest of the way?"""
    return bool(lr - plan[0] <= config.eps * lr)


def _spread(lrs: tuple[float, ...], lr: float, plan: tuple[Any, ...]) -> tuple[float, ...]:
    """The controller's `lr` per group, and the very same tuple where that alters no group."""
    new = spread(lr, plan[3])
    return lrs if new == lrs else new


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row makes one cut, and counting begins anew."""
    lr, lrs, best, good, bad, cooling, warming, stuck, bad_run, window, plan = state
    bad_run += 1
    code, fields, old = "nonfinite_hold", dict[str, float](bad_run=bad_run), lr
    if bad_run % config.bad_limit == 0:
        code, good, bad = "nonfinite_backoff", 0, 0
        lr = _cut(config, plan, lr)[1]
        lrs = _spread(lrs, lr, plan)
        fields |= {"old_lr": old, "new_lr": lr}
    return (
        State(lr, lrs, best, good, bad, cooling, warming, stuck, bad_run, window, plan),
        Decision(lrs, None, None, _phase(cooling, warming), code, fields, lr != old),
    )


#: The codes of a decision that moves the LR or would have.
_MOVES = frozenset(("increase", "increase@bound", "reduce", "reduce@bound", "reset"))
_SENTENCES = {
    "initial": "Starting with the learning rates of the optimizer.",
    "first": "First value of {name}: {metric:.6g}.",
    "improved": "{name} improved from {best:.6g} to {metric:.6g}: {good} in a row.",
    "waiting": "{name} {metric:.6g} is no improvement on {best:.6g}: {bad} of {patience} tolerated.",
    "cooldown": "{name} {metric:.6g}: after a cut this does not count.",
    "warmup": "{name} {metric:.6g}: after a rise this does not count.",
    "increase": "{name} improved {good} times in a row: learning rate raised from {old_lr:.6g} to {new_lr:.6g}.",
    "increase@bound": "{name} improved {good} times in a row, "
    "but the learning rate {new_lr:.6g} is at its upper bound.",
    "reduce": "{name} has not improved on {best:.6g} for {bad} observations: "
    "learning rate cut from {old_lr:.6g} to {new_lr:.6g}.",
    "reduce@bound": "{name} has not improved on {best:.6g} for {bad} observations, "
    "but the learning rate {new_lr:.6g} is at its lower bound.",
    "reset": "{name} has not improved through {reset_start} cuts at the lower bound: all begins anew, "
    "learning rate {old_lr:.6g} -> {new_lr:.6g}.",
    "no_loss": "No loss was measured: nothing counts.",
    "no_metric": "{name} was not measured, or is not a usable number: nothing counts.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, the learning rate stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row: learning rate {old_lr:.6g} -> {new_lr:.6g}.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people, from the decision's code and fields; learning rates are the reference group's."""
    name = f"The mean {config.metric}" if config.smooth else config.metric
    parameters = {"name": name, "patience": config.patience, "reset_start": config.reset_start}
    return _SENTENCES[decision.code].format(**parameters, **(decision.fields or {}))


def reads(config: Config) -> frozenset[str]:
    """The one signal it watches."""
    return frozenset((config.metric,))


POLICY = Policy("greedy", 1, Config, State, init, step, explain, reads, codes=_SENTENCES)
