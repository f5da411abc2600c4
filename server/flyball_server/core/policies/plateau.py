"""Policy `plateau`: cut the learning rate when a metric has stopped improving.

Rule: torch.optim.lr_scheduler.ReduceLROnPlateau's, with its parameter names and defaults, applied once per
observation that carries the metric. Two differences, both only where torch goes wrong:
- the relative threshold is a part of |best|. torch multiplies `best` itself, which for a negative metric (a
  log-likelihood) counts a slightly worse value as an improvement;
- a NaN, infinite or huge loss is not a bad epoch but holds everything; every `bad_limit`-th in a row cuts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import LARGEST_SIGNAL, SMALLEST_LR
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The parameters of ReduceLROnPlateau, and which signal to watch (`metric`).

    metric, mode, threshold and threshold_mode say what an improvement is; patience and cooldown count
    observations of the metric; factor, min_lr and eps say how a cut is made; bad_limit guards.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    metric: str = field(default="loss", metadata=about("The signal to watch: loss, reward, val_loss or one of yours."))
    mode: Literal["min", "max"] = field(default="min", metadata=about("Is a smaller or a larger value better?"))
    factor: float = field(default=0.1, metadata=about("Factor on the LR at each cut.", gt=0, lt=1))
    patience: int = field(default=10, metadata=about("Observations without improvement that are tolerated.", ge=0))
    threshold: float = field(default=1e-4, metadata=about("Smallest change that counts as improvement.", ge=0))
    threshold_mode: Literal["rel", "abs"] = field(
        default="rel", metadata=about("Is the threshold a part of |best| or an absolute amount?")
    )
    cooldown: int = field(default=0, metadata=about("Observations after a cut that count nothing.", ge=0))
    min_lr: float | tuple[float, ...] = field(
        default=0.0, metadata=about("Lowest LR: one number, or a list with one per group.", each_ge=0)
    )
    eps: float = field(default=1e-8, metadata=about("A cut by no more than this is not made.", ge=0))
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row cause one cut.", ge=1))

    def __post_init__(self) -> None:
        check(self)
        if not self.metric:
            raise ValueError("metric: '' is empty; give the name of a signal, such as 'loss'")


class State(NamedTuple):
    """lr: per group. best: of the metric. waited: observations since. cooling: left. bad_run: bad losses."""

    lr: tuple[float, ...]
    best: float | None
    waited: int
    cooling: int
    bad_run: int


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Start from the groups' learning rates. Raises ValueError if min_lr is a list of another length."""
    if isinstance(config.min_lr, tuple) and len(config.min_lr) != len(groups):
        raise ValueError(
            f"min_lr: {len(config.min_lr)} values for {len(groups)} groups; give one number, or one per group"
        )
    lr = tuple([group.lr for group in groups])
    return State(lr, None, 0, 0, 0), Decision(lr, None, None, "track", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation: torch's `step(metrics)`, behind the guard against unusable losses."""
    lr, best, waited, cooling, bad_run = state
    value = loss = seen.loss
    if loss is not None:
        if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
            return _bad_loss(config, state)
        bad_run = 0
    if config.metric != "loss":
        value = seen.signal(config.metric)
    if value is None or not -LARGEST_SIGNAL <= value <= LARGEST_SIGNAL:
        phase, code = ("cooldown" if cooling else "track"), ("no_loss" if config.metric == "loss" else "no_metric")
        return State(lr, best, waited, cooling, bad_run), Decision(lr, None, None, phase, code)

    previous = best
    if best is None or _improved(config, value, best):
        code, best, waited = ("first" if best is None else "improved"), value, 0
    else:
        code, waited = "waiting", waited + 1
    if cooling:
        cooling, waited = cooling - 1, 0  # torch ignores waiting during a cooldown, its last observation included
        code = "cooldown" if code == "waiting" else code
    fields, moved = {"metric": value, "best": previous, "waited": waited}, False
    if waited > config.patience:
        code, reduced = _reduce(config, lr)
        fields |= {"old_lr": lr[0], "new_lr": reduced[0]}
        moved = reduced is not lr
        lr, waited, cooling = reduced, 0, config.cooldown
    phase = "cooldown" if cooling else "track"
    return State(lr, best, waited, cooling, bad_run), Decision(lr, None, None, phase, code, fields, moved)


def _improved(config: Config, value: float, best: float) -> bool:
    """torch's `_is_better`; for a negative `best` the relative margin is taken of |best|."""
    if config.threshold_mode == "abs":
        return value < best - config.threshold if config.mode == "min" else value > best + config.threshold
    towards_zero = (config.mode == "min") == (best >= 0)
    target = best * (1.0 - config.threshold if towards_zero else 1.0 + config.threshold)
    return value < target if config.mode == "min" else value > target


def _reduce(config: Config, lr: tuple[float, ...]) -> tuple[str, tuple[float, ...]]:
    """torch's `_reduce_lr`: the cut LRs, and the very same tuple where no group moved."""
    floors = config.min_lr if isinstance(config.min_lr, tuple) else (config.min_lr,) * len(lr)
    cut = tuple(
        [
            new if old - (new := max(old * config.factor, floor)) > config.eps and new >= SMALLEST_LR else old
            for old, floor in zip(lr, floors, strict=True)
        ]
    )
    return ("reduce@bound", lr) if cut == lr else ("reduce", cut)


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row makes one cut."""
    lr, best, waited, cooling, bad_run = state
    phase, bad_run, fields, old = ("cooldown" if cooling else "track"), bad_run + 1, None, lr
    code = "nonfinite_hold"
    if bad_run % config.bad_limit == 0:
        code = "nonfinite_backoff"
        lr = _reduce(config, lr)[1]
        fields = {"bad_run": bad_run, "old_lr": old[0], "new_lr": lr[0]}
    return State(lr, best, waited, cooling, bad_run), Decision(lr, None, None, phase, code, fields, lr is not old)


_SENTENCES = {
    "initial": "Starting with the learning rates of the optimizer.",
    "first": "First value of {name}: {metric:.6g}.",
    "improved": "{name} improved from {best:.6g} to {metric:.6g}.",
    "waiting": "{name} {metric:.6g} is no improvement on {best:.6g}: {waited} of {patience} tolerated.",
    "cooldown": "{name} {metric:.6g} is no improvement on {best:.6g}; in a cooldown this does not count.",
    "reduce": "{name} has not improved on {best:.6g} for more than {patience} observations: "
    "learning rate cut from {old_lr:.6g} to {new_lr:.6g} (group 0).",
    "reduce@bound": "{name} has not improved on {best:.6g} for more than {patience} observations, "
    "but the learning rate is at its lower bound.",
    "no_loss": "No loss was measured: nothing counts.",
    "no_metric": "{name} was not measured, or is not a usable number: nothing counts.",
    "nonfinite_hold": "The loss is not a usable number: nothing counts, the learning rate stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row: learning rate {old_lr:.6g} -> {new_lr:.6g} (group 0).",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people, from the decision's code and fields."""
    return _SENTENCES[decision.code].format(name=config.metric, patience=config.patience, **(decision.fields or {}))


def reads(config: Config) -> frozenset[str]:
    """The one signal it watches."""
    return frozenset((config.metric,))


POLICY = Policy("plateau", 1, Config, State, init, step, explain, reads, _SENTENCES)
