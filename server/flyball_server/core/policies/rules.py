"""Policy `rules`: one simple rule for the learning rate, one for the reward, one for the momentum; each may be off.

Rule: rules that remember (loss_decay, trend, the reward's trend) move the controller's learning rate `eta`; rules
that say a level (variance, grad_norm, cyclical, the reward's scaling, variance and kelly) are factors on top of it,
so that any mix composes and no factor compounds. What leaves is eta * f_lr * f_rw within [min_lr, max_lr] for the
reference group (the first with a positive LR); the others follow by ratio or get the same number.

With all three rules off nothing is written at all. A rule whose signal was not measured does not run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.moments import EMPTY, Moments, push, variance
from flyball_server.core.momentum import driven, own
from flyball_server.core.numbers import LARGEST_SIGNAL, emit, ratios, reference_lr, spread
from flyball_server.core.types import Decision, Group, Observation, Policy

_BETA = "Weight of the past in the exponential mean of the {}; null: no smoothing."


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which rules act, and their numbers.

    The ema_ betas smooth what the rules see; a variance window holds raw losses, or smoothed rewards. Factors
    (up, down) multiply the LR once per observation. Bounds left null follow the reference group's LR.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    lr_rule: Literal["none", "loss_decay", "trend", "variance", "grad_norm", "cyclical"] = field(
        default="none", metadata=about("What moves the LR.")
    )
    momentum_rule: Literal["none", "inverse", "exp", "relative", "normalized"] = field(
        default="none", metadata=about("What moves the momentum of groups that have one.")
    )
    reward_rule: Literal["none", "scaling", "trend", "variance", "kelly"] = field(
        default="none", metadata=about("How the reward moves the LR.")
    )
    ema_loss_beta: float | None = field(default=None, metadata=about(_BETA.format("loss"), ge=0, lt=1))
    ema_reward_beta: float | None = field(default=None, metadata=about(_BETA.format("reward"), ge=0, lt=1))
    ema_grad_beta: float | None = field(default=None, metadata=about(_BETA.format("gradient norm"), ge=0, lt=1))
    loss_decay_k: float = field(default=1e-3, metadata=about("loss_decay: LR / (1 + k * loss) at each loss.", ge=0))
    lr_up: float = field(default=1.02, metadata=about("trend: factor where the loss improves.", ge=1))
    lr_down: float = field(default=0.98, metadata=about("trend: factor where it does not.", gt=0, le=1))
    trend_tol: float = field(default=0.0, metadata=about("Part of |loss| it must fall by to be improving.", ge=0))
    variance_window: int = field(default=20, metadata=about("variance: losses in the window.", ge=2, le=10_000))
    variance_alpha: float = field(default=1.0, metadata=about("variance: factor 1 / (1 + alpha * variance).", ge=0))
    grad_kappa: float = field(default=0.01, metadata=about("grad_norm: factor 1 / (1 + kappa * norm^2).", ge=0))
    cycle_length: int = field(default=500, metadata=about("cyclical: observations in the first cycle.", ge=1))
    cycle_mult: float = field(default=2.0, metadata=about("cyclical: growth at each restart.", gt=0, le=1000))
    reward_center: float = field(default=0.0, metadata=about("scaling: the reward at which the LR is not changed."))
    reward_span: float = field(default=1.0, metadata=about("scaling: so far above center the LR is doubled.", gt=0))
    reward_up: float = field(default=1.02, metadata=about("Reward's trend: factor where it rises.", ge=1))
    reward_down: float = field(default=0.98, metadata=about("Reward's trend: factor otherwise.", gt=0, le=1))
    reward_momentum: bool = field(
        default=False, metadata=about("Does the reward's trend move momentum by relative_rate, too?")
    )
    reward_window: int = field(default=20, metadata=about("Reward's variance: rewards in it.", ge=2, le=10_000))
    reward_alpha: float = field(default=1.0, metadata=about("Reward's variance: as variance_alpha.", ge=0))
    kelly_gain: float = field(
        default=0.2, metadata=about("kelly: factor 1 + gain * tanh(R / temperature).", ge=0, le=1)
    )
    kelly_temperature: float = field(default=1.0, metadata=about("kelly: the reward that counts as large.", gt=0))
    exp_a: float = field(default=1.0, metadata=about("exp: momentum 1 - exp(-a * loss).", ge=0))
    relative_rate: float = field(default=0.05, metadata=about("Part of the way to the bound at once.", ge=0, le=1))
    inverse_direction: Literal["rising", "falling"] = field(
        default="rising", metadata=about("inverse: 1 - 1 / (1 + loss), which rises with the loss, or 1 / (1 + loss)?")
    )
    min_lr: float | None = field(default=None, metadata=about("Lowest LR; null: the reference LR / 50.", gt=0))
    max_lr: float | None = field(default=None, metadata=about("Highest LR; null: 10 x the reference LR.", gt=0))
    min_momentum: float = field(default=0.5, metadata=about("Lowest momentum.", ge=0, lt=1))
    max_momentum: float = field(default=0.95, metadata=about("Highest momentum.", ge=0, lt=1))
    momentum_target: Literal["momentum", "beta1"] = field(
        default="momentum", metadata=about("'beta1' lets momentum rules drive betas[0] of the Adam family as well.")
    )
    group_mode: Literal["ratio", "same"] = field(
        default="ratio", metadata=about("Do groups keep their ratios or all get one LR?")
    )
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row halve the LR once.", ge=1))

    def __post_init__(self) -> None:
        check(self)
        if self.min_lr and self.max_lr:
            _ordered("lr", self.min_lr, self.max_lr)
        _ordered("momentum", self.min_momentum, self.max_momentum)


def _ordered(what: str, low: float, high: float) -> None:
    if low > high:
        name = f"min_{what}"
        raise ValueError(f"{name}: {low!r} is above max_{what} = {high!r}; give both, with {name} <= max_{what}")


Momenta = tuple[float | None, ...]
_new = tuple.__new__  # a third of the time of the class's own
_ALONE = (1.0,)  # the ratios of a single group


class Plan(NamedTuple):
    """What follows from the parameters and the groups, worked out once. (Plain tuple after a JSON round trip.)

    bottom: of the cycle, as a part of the reference LR. driven: per group 1 where momentum is driven, else 0.
    """

    min_lr: float
    max_lr: float
    bottom: float
    ratios: tuple[float, ...]
    driven: tuple[int, ...]


class State(NamedTuple):
    """eta: the controller's LR, before factors. out: the reference group's. lrs, momentum: per group, in force.

    loss, reward, grad: the newest smoothed ones. losses, rewards: windows of the variance rules. f_lr, f_rw: factors.
    cycle: observations in it so far, and its length. labs: largest |loss|. bad_run: unusable losses in a row.
    plan: see Plan; () where the policy is inert. (Tuples within are plain after a JSON round trip.)
    """

    eta: float
    out: float
    lrs: tuple[float, ...]
    momentum: Momenta | None
    loss: float | None
    reward: float | None
    grad: float | None
    losses: Moments
    rewards: Moments
    f_lr: float
    f_rw: float
    cycle: tuple[int, int]
    labs: float
    bad_run: int
    plan: tuple[Any, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The groups' own settings, brought within the bounds unless the policy is inert.

    Raises ValueError where the bounds leave nothing between them.
    """
    base = out = reference_lr(groups)
    lrs, cycle = tuple([group.lr for group in groups]), (0, config.cycle_length)
    momentum: Momenta | None = None
    plan: tuple[Any, ...] = ()
    if not config.lr_rule == config.momentum_rule == config.reward_rule == "none":
        plan = _plan(config, groups, base)
        out = min(max(base, plan[0]), plan[1])
        lrs = spread(out, plan[3])
        if any(plan[4]):
            momentum = _towards(config, own(groups), plan[4], None)
    return (
        State(base, out, lrs, momentum, None, None, None, EMPTY, EMPTY, 1.0, 1.0, cycle, 0.0, 0, plan),
        Decision(lrs, momentum, None, "-", "initial"),
    )


def _plan(config: Config, groups: tuple[Group, ...], base: float) -> Plan:
    low, high = emit(config.min_lr or base / 50), emit(config.max_lr or 10 * base)
    if base:
        _ordered("lr", low, high)
    bottom = min(low / base, 1.0) if base else 1.0
    drives = config.momentum_rule != "none" or (config.reward_momentum and config.reward_rule == "trend")
    moved = [int(drives and value is not None) for value in driven(groups, config.momentum_target)]
    return Plan(low, high, bottom, ratios(groups, same=config.group_mode == "same"), tuple(moved))


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation: smooth it, then the LR's rule, the reward's and the momentum's, each from its own signal."""
    eta, out, lrs, momentum, loss_s, reward_s, grad_s, losses, rewards, f_lr, f_rw, cycle, labs, run, plan = state
    if not plan:
        return state, Decision(lrs, None, None, "-", "inert")
    loss, reward, grad = seen.loss, seen.reward, seen.grad_norm
    improving, var, code, (t_c, period) = None, None, "", cycle
    if loss is not None:
        if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
            return _bad_loss(config, state)
        if config.lr_rule == "variance":
            losses = push(losses, loss, config.variance_window)
            var = variance(losses)
        if loss_s is not None:
            if config.ema_loss_beta is not None:
                loss = _mean(config.ema_loss_beta, loss_s, loss)
            improving = loss_s - loss > config.trend_tol * abs(loss_s)
        loss_s, run = loss, 0
        if not -labs <= loss <= labs:
            labs = abs(loss)
    if grad is not None:
        grad = _smoothed(grad, grad_s, config.ema_grad_beta)
        grad_s = grad_s if grad is None else grad
    if reward is not None:
        reward = _smoothed(reward, reward_s, config.ema_reward_beta)

    if config.lr_rule == "cyclical":
        code, f_lr, cycle = _cyclical(config, t_c, period, plan[2])
    elif var is not None:
        code, f_lr = "variance", 1.0 / (1.0 + config.variance_alpha * var)
    elif config.lr_rule != "none":
        code, eta, f_lr = _lr_rule(config, eta, f_lr, loss, improving, grad)
    if config.reward_rule != "none":
        mark, eta, f_rw, rewards = _reward_rule(config, eta, f_rw, rewards, reward, reward_s)
        code = f"{code}+{mark}" if code else mark
        var = variance(rewards) if var is None and mark == "reward_variance" else var
        if config.reward_momentum and momentum is not None and mark in _TRENDS:
            momentum = _towards(config, momentum, plan[4], _TRENDS[mark])
    if config.momentum_rule != "none":
        mark, momentum = _momentum_rule(config, momentum, plan[4], loss, improving, labs)
        code = f"{code}+{mark}" if code else mark
    low, high = plan[0], plan[1]
    eta = low if eta < low else high if eta > high else eta
    new = eta * f_lr * f_rw
    if new != out:
        out, lrs = _out(plan, new, lrs)
    reward_s = reward_s if reward is None else reward
    numbers = {
        "loss_s": loss, "reward_s": reward, "grad_s": grad, "improving": improving, "var": var, "eta": eta,
        "f_lr": f_lr, "f_rw": f_rw, "t_c": t_c, "T": period, "labs": labs,
    }  # fmt: skip
    return (
        _new(
            State,
            (eta, out, lrs, momentum, loss_s, reward_s, grad_s, losses, rewards, f_lr, f_rw, cycle, labs, run, plan),
        ),
        Decision(lrs, momentum, None, "-", code, numbers),
    )


def _mean(beta: float, before: float, value: float) -> float:
    return beta * before + (1.0 - beta) * value


def _smoothed(value: float, before: float | None, beta: float | None) -> float | None:
    """The measured `value`, smoothed; None where it is unusable, which counts as not measured."""
    if not -LARGEST_SIGNAL <= value <= LARGEST_SIGNAL:
        return None
    return value if before is None or beta is None else _mean(beta, before, value)


def _out(plan: tuple[Any, ...], lr: float, lrs: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """`lr` within the bounds, and per group: the very same `lrs` where nothing moved."""
    low, high, _, parts, _ = plan
    lr = low if lr < low else high if lr > high else lr
    new = (lr,) if parts == _ALONE else spread(lr, parts)
    return lr, lrs if new == lrs else new


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row halves the controller's LR."""
    bad_run, out = state.bad_run + 1, state.out
    state = state._replace(bad_run=bad_run)
    if bad_run % config.bad_limit:
        return state, Decision(state.lrs, state.momentum, None, "-", "nonfinite_hold", {"bad_run": bad_run})
    eta = max(state.eta * 0.5, state.plan[0])
    new, lrs = _out(state.plan, eta * state.f_lr * state.f_rw, state.lrs)
    numbers = {"bad_run": bad_run, "old_lr": out, "new_lr": new, "eta": eta}
    return (
        state._replace(eta=eta, out=new, lrs=lrs),
        Decision(lrs, state.momentum, None, "-", "nonfinite_backoff", numbers),
    )


def _cyclical(config: Config, t_c: int, period: int, bottom: float) -> tuple[str, float, tuple[int, int]]:
    """(mark, factor, next place): a cosine from 1 to `bottom`, then again (Loshchilov & Hutter 2017, SGDR, eq. 5)."""
    factor = bottom + (1.0 - bottom) * 0.5 * (1.0 + math.cos(math.pi * t_c / period))
    if t_c + 1 < period:
        return "cyclical", factor, (t_c + 1, period)
    return "cyclical_restart_next", factor, (0, max(1, int(period * config.cycle_mult)))


def _lr_rule(
    config: Config, eta: float, f_lr: float, loss: float | None, improving: bool | None, grad: float | None
) -> tuple[str, float, float]:
    """(mark, eta, f_lr) after a rule without a window, where its signal is there."""
    rule = config.lr_rule
    if rule == "grad_norm":
        if grad is None:
            return "no_grad_norm", eta, f_lr
        return rule, eta, 1.0 / (1.0 + config.grad_kappa * (grad * grad))
    if loss is None:
        return "no_loss", eta, f_lr
    if rule == "loss_decay":
        return rule, eta / (1.0 + config.loss_decay_k * max(loss, 0.0)), f_lr
    if improving is None:
        return "first", eta, f_lr
    return ("trend_up", eta * config.lr_up, f_lr) if improving else ("trend_down", eta * config.lr_down, f_lr)


def _reward_rule(
    config: Config, eta: float, f_rw: float, rewards: Moments, reward: float | None, before: float | None
) -> tuple[str, float, float, Moments]:
    """(mark, eta, f_rw, window) after the rule, where there is a reward."""
    rule = config.reward_rule
    if reward is None:
        return "no_reward", eta, f_rw, rewards
    if rule == "trend":
        if before is None:
            return "reward_first", eta, f_rw, rewards
        if reward > before:
            return "reward_up", eta * config.reward_up, f_rw, rewards
        return "reward_down", eta * config.reward_down, f_rw, rewards
    if rule == "scaling":
        f_rw = min(max(1.0 + (reward - config.reward_center) / config.reward_span, 0.0), 2.0)
    elif rule == "kelly":
        f_rw = 1.0 + config.kelly_gain * math.tanh(reward / config.kelly_temperature)
    else:
        rewards = push(rewards, reward, config.reward_window)
        f_rw = 1.0 / (1.0 + config.reward_alpha * variance(rewards))
    return f"reward_{rule}", eta, f_rw, rewards


#: Which way the reward's trend takes momentum: up to its highest value, or down to its lowest?
_TRENDS = {"reward_up": True, "reward_down": False}


def _momentum_rule(
    config: Config, momentum: Momenta | None, moved: tuple[int, ...], loss: float | None, improving: bool | None,
    labs: float,
) -> tuple[str, Momenta | None]:  # fmt: skip
    """(mark, momentum per group) after the rule, where a group has momentum and there is a loss."""
    rule, low, high = config.momentum_rule, config.min_momentum, config.max_momentum
    if momentum is None:
        return "no_momentum", None
    if loss is None:
        return "momentum_no_loss", momentum
    if rule == "relative":
        return "momentum_relative", _towards(config, momentum, moved, improving)
    if rule == "normalized":
        value = high - (high - low) * (abs(loss) / labs if labs else 0.0)
    elif rule == "exp":
        value = 1.0 - math.exp(-config.exp_a * max(loss, 0.0))
    else:
        value = 1.0 / (1.0 + max(loss, 0.0))
        value = 1.0 - value if config.inverse_direction == "rising" else value
    value = low if value < low else high if value > high else value
    one = len(moved) == 1
    new = (value,) if one else tuple([value if m else old for old, m in zip(momentum, moved)])  # noqa: B905 - hot
    return f"momentum_{rule}", momentum if new == momentum else new


def _towards(config: Config, momentum: Momenta, moved: tuple[int, ...], up: bool | None) -> Momenta:
    """Driven momenta a part of the way to their highest (`up`) or lowest value; None: no more than within bounds."""
    low, high = config.min_momentum, config.max_momentum
    goal, rate = high if up else low, 0.0 if up is None else config.relative_rate
    new = tuple(
        [
            min(max(old + rate * (goal - old), low), high) if drives and old is not None else old
            for old, drives in zip(momentum, moved, strict=True)
        ]
    )
    return momentum if new == momentum else new


_LOSS, _REWARD = "Loss {loss_s:.6g}", "Reward {reward_s:.6g}"
_FACTOR, _REWARD_FACTOR = ": factor {f_lr:.4g} on the learning rate.", ": factor {f_rw:.4g} on the learning rate."
_SENTENCES = {
    "initial": "Starting with the optimizer's own settings, within the bounds.",
    "inert": "All rules are off: nothing is written.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, everything stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row: learning rate {old_lr:.6g} -> {new_lr:.6g}.",
    "no_loss": "No loss was measured: the learning rate's rule does not run.",
    "no_grad_norm": "No gradient norm was measured: the learning rate's rule does not run.",
    "loss_decay": _LOSS + ": learning rate divided by 1 + {loss_decay_k:g} x loss.",
    "first": _LOSS + " is the first: there is no trend yet.",
    "trend_up": _LOSS + " improved: learning rate x {lr_up:g}.",
    "trend_down": _LOSS + " did not improve: learning rate x {lr_down:g}.",
    "variance": "Variance {var:.4g} of the last losses (at most {variance_window})" + _FACTOR,
    "grad_norm": "Gradient norm {grad_s:.6g}" + _FACTOR,
    "cyclical": "Observation {t_c} of a cycle of {T}" + _FACTOR,
    "cyclical_restart_next": "The last observation of a cycle of {T}; the next one starts a new cycle" + _FACTOR,
    "no_reward": "No reward was measured: the reward's rule does not run.",
    "reward_scaling": _REWARD + " against center {reward_center:g} and span {reward_span:g}" + _REWARD_FACTOR,
    "reward_first": _REWARD + " is the first: there is no trend yet.",
    "reward_up": _REWARD + " rose: learning rate x {reward_up:g}.",
    "reward_down": _REWARD + " did not rise: learning rate x {reward_down:g}.",
    "reward_variance": "Variance of the last rewards (at most {reward_window})" + _REWARD_FACTOR,
    "reward_kelly": _REWARD + _REWARD_FACTOR,
    "no_momentum": "No group has momentum that may be driven.",
    "momentum_no_loss": "No loss was measured: the momentum stays.",
    "momentum_inverse": "Momentum follows the loss {loss_s:.6g}, {inverse_direction} with it.",
    "momentum_exp": "Momentum follows the loss {loss_s:.6g}: 1 - exp(-{exp_a:g} x loss).",
    "momentum_relative": "Momentum goes {relative_rate:g} of its way to a bound: up if the loss improves, else down.",
    "momentum_normalized": "Momentum follows the loss {loss_s:.6g} as a part of the largest so far, {labs:.6g}.",
}  # fmt: skip


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people for every mark in the decision's code, from its fields."""
    numbers = {entry.name: getattr(config, entry.name) for entry in fields(Config)} | dict(decision.fields or {})
    return " ".join([_SENTENCES[mark].format(**numbers) for mark in decision.code.split("+")])


POLICY = Policy("rules", 1, Config, State, init, step, explain, codes=_SENTENCES)
