"""Policy `adaptive`: nudge the learning rate at every step, up while the smoothed loss falls and down while it rises.

Rule: one set of signals (smoothed loss, smoothed reward, spread of the newest losses, steps since the last
improvement) makes one factor per step; every group multiplies its own controller LR by it, within its own bounds. The
spread and an optional cosine only scale what leaves: they never enter the controller LR, so nothing compounds. A
signal that was not measured moves nothing.

The default factors (up 1.05, down 0.7) are those of the published class and are steep: noise alone drives the LR to
its lower bound. A calmer pair, worth the name `steady`, is up_factor 1.02 with down_factor 0.96.

compat="original" repeats the published class this policy comes from: absolute bounds, no dead band (what is not an
improvement is a worsening), spread and cosine multiplied into the controller LR, every rule run at steps without a
loss or a reward, too, momentum driven even where it is 0, and one such empty step at registration. The guard against
unusable losses is the same in both modes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import cos, pi
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.moments import EMPTY, Moments, mean_and_variance, push
from flyball_server.core.momentum import driven, own
from flyball_server.core.numbers import EPS, LARGEST_SIGNAL, bad, emit
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Parameters; null means "derived from the group" (compat="original": an absolute number).

    Trend: loss_beta, min_rel_improve, up_factor, down_factor. Patience: patience, big_drop, cooldown. Spread:
    var_window and var_damp_*. Cosine: use_cosine, T0, T_mult, eta_min_scale. Reward: use_reward, reward_* and
    momentum_*. Bounds hold per group: given ones as absolute numbers for every group; null ones follow the group's
    base LR (a hundredth and ten times, but no lower than 1e-7 and no higher than 10, and the base LR itself is
    always within them, however small or large it is).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    compat: Literal["default", "original", "seed"] = field(
        default="default", metadata=about("'original' repeats the published class ('seed' is another spelling).")
    )
    loss_beta: float = field(default=0.9, metadata=about("Memory of the smoothed loss.", ge=0, lt=1))
    reward_beta: float = field(default=0.9, metadata=about("Memory of the smoothed reward.", ge=0, lt=1))
    var_window: int = field(default=20, metadata=about("Losses that the spread is taken of.", ge=1, le=10_000))
    up_factor: float = field(default=1.05, metadata=about("Factor on the LR when improving.", ge=1))
    down_factor: float = field(default=0.7, metadata=about("Factor on the LR when worsening.", gt=0, le=1))
    min_rel_improve: float = field(
        default=1e-4, metadata=about("Relative change of the smoothed loss above which it counts.", ge=0)
    )
    patience: int = field(default=20, metadata=about("Losses without improvement before a big drop.", ge=0))
    big_drop: float = field(default=0.5, metadata=about("Factor at a drop, or on unusable losses.", gt=0, le=1))
    cooldown: int = field(default=50, metadata=about("Losses after a big drop before the next one.", ge=0))
    var_damp_base: float = field(default=1.0, metadata=about("The LR is divided by base + scale * cv².", ge=1e-100))
    var_damp_scale: float = field(default=1.0, metadata=about("cv is the spread over the mean.", ge=0))
    use_cosine: bool = field(default=False, metadata=about("Scale the LR by a cosine with restarts."))
    T0: int = field(default=200, metadata=about("Steps of the cosine's first period; below 1 counts as 1."))
    T_mult: float = field(default=2.0, metadata=about("Factor from one period to the next.", ge=0, le=1e6))
    eta_min_scale: float = field(default=0.1, metadata=about("Where the cosine ends, as a factor.", ge=0, le=1))
    lr_min: float | None = field(default=None, metadata=about("Lowest LR; null: base / 100 (original: 1e-7).", gt=0))
    lr_max: float | None = field(default=None, metadata=about("Highest LR; null: 10 x base (original: 10).", gt=0))
    use_reward: bool = field(default=False, metadata=about("Follow the reward: LR and momentum."))
    reward_up: float = field(default=1.03, metadata=about("Factor on the LR when the reward rises.", ge=1))
    reward_down: float = field(default=0.9, metadata=about("Factor on the LR when it falls.", gt=0, le=1))
    momentum_up: float = field(default=0.01, metadata=about("Added to momentum when the reward rises.", ge=0))
    momentum_down: float = field(default=0.9, metadata=about("Factor on it when the reward falls.", gt=0, le=1))
    momentum_min: float | None = field(
        default=None, metadata=about("Lowest momentum; null: half its initial value (original: 0).", ge=0, lt=1)
    )
    momentum_max: float | None = field(default=None, metadata=about("Highest momentum; null: 0.999.", ge=0, lt=1))
    momentum_target: Literal["momentum", "beta1"] = field(
        default="momentum", metadata=about("'beta1' drives betas[0] of the Adam family as well.")
    )
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row cause one big drop.", ge=1))

    def __post_init__(self) -> None:
        check(self)
        original = self.compat != "default"
        derived: dict[str, Any] = {"compat": "original" if original else "default", "momentum_max": 0.999}
        if original:
            derived |= {"lr_min": 1e-7, "lr_max": 10.0, "momentum_min": 0.0}
        for name, value in derived.items():
            if name == "compat" or getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("lr", "momentum"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low is not None and high is not None:
                _ordered(name, low, high)


def _ordered(name: str, low: float, high: float) -> tuple[float, float]:
    if low > high:
        raise ValueError(
            f"{name}_min: {low!r} is above {name}_max = {high!r}; give both, with {name}_min <= {name}_max"
        )
    return low, high


class Plan(NamedTuple):
    """What follows from the parameters and the groups, worked out once. (Plain tuple after a JSON round trip.)

    bounds: of the LR. limits: of momentum, None where it is left alone. reference: the index of the first group with a
    positive LR.
    """

    bounds: tuple[tuple[float, float], ...]
    limits: tuple[tuple[float, float] | None, ...]
    reference: int


class State(NamedTuple):
    """lr: the controller's, and out: in force, both per group. momentum: in force, or None.

    loss_ema, reward_ema: the smoothed signals. window: Moments of the newest losses. ssi: steps since an improvement.
    cd: steps of cooldown left. turn, period: of the cosine. damp, cosf: what scales the LR. bad_run: unusable losses in
    a row. plan: see Plan.
    """

    lr: tuple[float, ...]
    out: tuple[float, ...]
    momentum: tuple[float | None, ...] | None
    loss_ema: float | None
    reward_ema: float | None
    window: Moments
    ssi: int
    cd: int
    turn: int
    period: int
    damp: float
    cosf: float
    bad_run: int
    plan: Plan


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Every group at its own LR within its bounds; compat="original": after one step without a loss.

    Raises ValueError where the bounds leave nothing between them.
    """
    original = config.compat == "original"
    bounds = tuple([_lr_bounds(config, group.lr) for group in groups])
    steers = driven(groups, config.momentum_target, off=original)
    if not (original or config.use_reward):
        steers = (None,) * len(groups)
    limits = tuple([None if m is None else _momentum_bounds(config, m) for m in steers])
    momentum = own(groups) if any(limits) else None
    reference = next((i for i, group in enumerate(groups) if group.lr > 0), 0)
    plan = Plan(bounds, limits, reference)
    lr, _ = _scaled(tuple([group.lr for group in groups]), 1.0, 1.0, plan)
    state = State(lr, lr, momentum, None, None, EMPTY, 0, 0, 0, max(1, config.T0), 1.0, 1.0, 0, plan)
    if not original:
        return state, Decision(lr, momentum, None, "track", "initial")
    state = state._replace(momentum=_steered(momentum, limits, 1.0, 0.0))
    state, decision = step(config, state, Observation(-1))
    return state, decision._replace(code="initial", fields=None)


def _lr_bounds(config: Config, base: float) -> tuple[float, float]:
    if base <= 0:
        return 0.0, 0.0
    base = emit(base)
    low = min(max(1e-7, base / 100), base) if config.lr_min is None else config.lr_min
    high = max(min(10.0, 10 * base), base) if config.lr_max is None else config.lr_max
    low, high = _ordered("lr", low, high)
    return emit(low), emit(high)


def _momentum_bounds(config: Config, initial: float) -> tuple[float, float]:
    low = 0.5 * initial if config.momentum_min is None else config.momentum_min
    return _ordered("momentum", low, config.momentum_max or 0.0)


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The rules in their order: trend, spread, reward, patience, cosine, bounds.

    Without a loss only reward and cosine act (compat="original": everything does).
    """
    lr, out, momentum, before, reward_ema, window, ssi, cd, turn, period, damp, cosf, bad_run, plan = state
    original, loss, loss_ema, rel, factor, code = config.compat == "original", seen.loss, before, None, 1.0, "no_loss"
    if loss is not None:
        if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
            return _bad_loss(config, state)
        bad_run, code = 0, "first"
        window = push(window, loss, config.var_window)
        loss_ema = _average(config.loss_beta, before, loss)
    acts = original or loss is not None
    if acts and before is not None and loss_ema is not None:
        rel, mark, ssi = (before - loss_ema) / (abs(before) + EPS), "flat", ssi + 1
        if rel > config.min_rel_improve:
            mark, factor, ssi = "up", config.up_factor, 0
        elif original or rel < -config.min_rel_improve:
            mark, factor = "down", config.down_factor
        code = mark if loss is not None else "no_loss+" + mark
    middle, variance = mean_and_variance(window)
    cv2 = variance / (middle * middle + EPS)
    if acts:
        damp = 1.0 / (config.var_damp_base + config.var_damp_scale * (variance if original else cv2))
    if config.use_reward:
        reward_ema, mark, gain, times, plus = _rewarded(config, reward_ema, seen.reward, original)
        if mark:
            code, factor, momentum = code + mark, factor * gain, _steered(momentum, plan[1], times, plus)
    if acts:
        if cd > 0:
            cd -= 1
        elif ssi >= config.patience:
            code, factor, ssi, cd = code + "+big_drop", factor * config.big_drop, 0, config.cooldown
    wave = 1.0
    if config.use_cosine:
        wave, cosf, turn, period, mark = _cosine(config, turn, period)
        code += mark
    lr, new = _annealed(config, lr, factor * damp, wave, plan) if original else _scaled(lr, factor, damp * cosf, plan)
    if new != out:
        out = new
    numbers = {
        "loss_ema": loss_ema, "prev_loss": before, "rel": rel, "variance": variance, "cv2": cv2, "damp": damp,
        "reward_ema": reward_ema, "ssi": ssi, "cd": cd, "T_cur": turn, "T_i": period, "cosf": cosf,
        "lr_ctrl": lr[plan[2]],
    }  # fmt: skip
    after = (lr, out, momentum, loss_ema, reward_ema, window, ssi, cd, turn, period, damp, cosf, bad_run, plan)
    decision = (out, momentum, None, "cooldown" if cd > 0 else "track", code, numbers, False, ())
    return _new(State, after), _new(Decision, decision)


#: Half the cost of calling a NamedTuple's class.
_new = tuple.__new__


def _average(beta: float, before: float | None, value: float) -> float:
    return value if before is None else beta * before + (1.0 - beta) * value


def _rewarded(
    config: Config, before: float | None, reward: float | None, original: bool
) -> tuple[float | None, str, float, float, float]:
    """(smoothed reward, mark, factor on the LR, factor on momentum, what is added to momentum)."""
    after = before
    if reward is not None and not bad(reward):
        after = _average(config.reward_beta, before, reward)
    elif not original:
        return before, "", 1.0, 1.0, 0.0
    if before is None or after is None:
        return after, "", 1.0, 1.0, 0.0
    if after > before:
        return after, "+reward_up", config.reward_up, 1.0, config.momentum_up
    if original or after < before:
        return after, "+reward_down", config.reward_down, config.momentum_down, 0.0
    return after, "+reward_equal", 1.0, 1.0, 0.0


def _cosine(config: Config, turn: int, period: int) -> tuple[float, float, int, int, str]:
    """(the cosine from 1 to 0, the factor from 1 to eta_min_scale, the next turn and its period, mark)."""
    wave, low = 0.5 * (1.0 + cos(pi * turn / period)), config.eta_min_scale
    cosf = low + (1.0 - low) * wave
    if turn + 1 < period:
        return wave, cosf, turn + 1, period, ""
    return wave, cosf, 0, max(1, int(period * config.T_mult)), "+cosine_restart_next"


def _scaled(
    lr: tuple[float, ...], factor: float, weight: float, plan: Plan
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Every LR times `factor`, and that times `weight`, both within the LR's bounds (0 where the base LR is 0)."""
    moved, weighed = [], []
    for i, (low, high) in enumerate(plan[0]):
        one = lr[i] * factor
        if not low <= one <= high:
            one = high if one > high else low  # 0 times infinity: low, which is 0
        moved.append(one)
        one *= weight
        if not low <= one <= high:
            one = high if one > high else low
        weighed.append(one)
    return tuple(moved), tuple(weighed)


def _annealed(
    config: Config, lr: tuple[float, ...], factor: float, wave: float, plan: Plan
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """compat="original": the moved LR, drawn towards a floor by the cosine, within its bounds; in force as it is."""
    factor = emit(factor)
    if config.use_cosine:
        moved = [one * factor for one in lr]
        floors = [max(low, config.eta_min_scale * one) for one, (low, _) in zip(moved, plan[0], strict=True)]
        lr = tuple([floor + (one - floor) * wave for one, floor in zip(moved, floors, strict=True)])
        factor = 1.0
    return _scaled(lr, factor, 1.0, plan)


def _steered(
    momentum: tuple[float | None, ...] | None,
    limits: tuple[tuple[float, float] | None, ...],
    times: float,
    plus: float,
) -> tuple[float | None, ...] | None:
    """Every driven momentum times `times`, plus `plus`, within its bounds; the same object where nothing moved."""
    if momentum is None:
        return None
    moved = tuple(
        [
            one if one is None or bounds is None else min(max(one * times + plus, bounds[0]), bounds[1])
            for one, bounds in zip(momentum, limits, strict=True)
        ]
    )
    return momentum if moved == momentum else moved


def _bad_loss(config: Config, state: State) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row makes one big drop."""
    lr, out, bad_run = state.lr, state.out, state.bad_run + 1
    code = "nonfinite_hold"
    if bad_run % config.bad_limit == 0:
        code = "nonfinite_backoff"
        weight = 1.0 if config.compat == "original" else state.damp * state.cosf
        lr, new = _scaled(lr, config.big_drop, weight, state.plan)
        out = out if new == out else new
    numbers = {"bad_run": bad_run, "lr_ctrl": lr[state.plan[2]]}
    phase = "cooldown" if state.cd > 0 else "track"
    return (
        state._replace(lr=lr, out=out, bad_run=bad_run),
        Decision(out, state.momentum, None, phase, code, numbers),
    )


_SENTENCES = {
    "initial": "Starting with the learning rates of the optimizer, within the bounds.",
    "first": "First loss: {loss_ema:.6g}.",
    "up": "The smoothed loss fell from {prev_loss:.6g} to {loss_ema:.6g}, by {rel:.3g} of itself "
    "(> {min_rel_improve:g}): learning rate x {up_factor:g}.",
    "down": "The smoothed loss went from {prev_loss:.6g} to {loss_ema:.6g}, which counts as worse "
    "(improvement {rel:.3g}): learning rate x {down_factor:g}.",
    "flat": "The smoothed loss hardly moved, from {prev_loss:.6g} to {loss_ema:.6g} (improvement {rel:.3g}).",
    "no_loss": "No loss was measured.",
    "reward_up": "The smoothed reward rose to {reward_ema:.6g}: learning rate x {reward_up:g}.",
    "reward_down": "The smoothed reward did not rise, {reward_ema:.6g}: learning rate x {reward_down:g}.",
    "reward_equal": "The smoothed reward stayed at {reward_ema:.6g}.",
    "big_drop": "No improvement for {patience} losses: learning rate x {big_drop:g}, not again for {cooldown} losses.",
    "cosine_restart_next": "The cosine starts anew at the next step, with a period of {T_i} steps.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, the learning rate stays.",
    "nonfinite_backoff": "{bad_run} unusable losses in a row: learning rate x {big_drop:g}, within its bounds.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people for each part of the code, from the decision's fields."""
    words = {entry.name: getattr(config, entry.name) for entry in fields(Config)} | dict(decision.fields or {})
    return " ".join([_SENTENCES[code].format(**words) for code in decision.code.split("+")])


POLICY = Policy("adaptive", 1, Config, State, init, step, explain, codes=_SENTENCES)
