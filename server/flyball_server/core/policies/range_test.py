"""Policy `range_test`: a learning rate range test in the middle of a training, which it leaves as it was.

Rule: the job is asked for a checkpoint; where it declines, no test is made and nothing changes. Then every group's
learning rate is swept from `min_lr` to `max_lr` (those of the first group that is not frozen; the ratios stay) in
`steps` levels, each held until the loss of a step under it is known: with `lag=0` that is one step. The loss is
smoothed as an exponential average without its bias, m / (1 - beta^n). The sweep ends early where the loss is unusable,
or where it lies above its lowest value by (stop_factor - 1) times the size of that. Then the learning rates of before
are back at once, and the job is asked to go back to its checkpoint. Once it has, the run goes on at the learning rate
found (`after`), or under another policy (`policy`) that begins there.

The test is that of Smith (2015), "Cyclical Learning Rates for Training Neural Networks", section 3.3, also in Smith and
Topin (2017): bounds are where the loss begins to fall and where it falls no further. In numbers, with the first tenth
of the levels left out and s the smoothed loss: upper is the learning rate of the lowest s; lower that from which on s
stays below s(first) - 0.1 (s(first) - s(lowest)); suggested, between the two, where s falls fastest per level, which is
the suggestion of fastai (`steep`) and PyTorch Lightning. To stop at 4 times the lowest loss is theirs, too. An average
is late: each s counts for the mean level of the losses in it, which is beta / (1 - beta) before its newest, less at
first.

What was found rides in the arguments of the request to go back, and so outlasts it. Under a base schedule the sweep
multiplies it, like every policy; a guard's limits hold in the test, too, so its range should lie inside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import EPS, bad, ratios, spread
from flyball_server.core.types import (
    ANSWERS,
    APPLIED,
    ROLLBACKS,
    Answered,
    Ask,
    Decision,
    Group,
    Observation,
    Part,
    Policy,
)

#: Points of the curve that are kept: where there are more, every second one goes.
POINTS = 128
#: The part of the fall that is its beginning, and the part of the levels that is left out at first.
BEGINNING, LEFT_OUT = 0.1, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The range, how it is swept, when that ends, and what comes after it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    min_lr: float = field(default=1e-7, metadata=about("Learning rate of the first level.", gt=0))
    max_lr: float = field(default=1.0, metadata=about("Learning rate of the last level.", gt=0))
    steps: int = field(default=100, metadata=about("Number of levels.", ge=3, le=10_000))
    spacing: Literal["exponential", "linear"] = field(
        default="exponential", metadata=about("The same ratio from level to level, or the same difference.")
    )
    beta: float = field(default=0.9, metadata=about("Memory of the smoothed loss, per level.", ge=0, lt=1))
    stop_factor: float = field(
        default=4.0, metadata=about("The sweep ends at a smoothed loss so many times its lowest.", gt=1)
    )
    wait_steps: int = field(
        default=1000,
        metadata=about("Observations to wait for an answer of the job, or for a loss, before the test is over.", ge=1),
    )
    after: Literal["suggested", "reference"] = field(
        default="suggested",
        metadata=about("Afterwards: the suggested learning rate, or that of before (as also where nothing is found)."),
    )
    policy: Any = field(
        default=None, metadata=about("The policy that begins there: {type: NAME, parameters ...}; null: it stays.")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.min_lr >= self.max_lr:
            raise ValueError(f"min_lr: {self.min_lr:g} is not below max_lr = {self.max_lr:g}; give less")


class State(NamedTuple):
    """mode: ready, waiting, sweep, returning or over. start: the step it asked for a checkpoint at. since: the step
    that decided the level in force. waited: observations since there was something new. level: from 0. lr: per group,
    of before. out: in force. mean: of the loss, with its bias. lowest: smoothed. curve: (level, smoothed loss). inner:
    the state of the policy afterwards, if any. groups, seed: what that is begun with. rollbacks: how often the run had
    gone back before it."""

    mode: str
    start: int
    since: int
    waited: int
    level: int
    lr: tuple[float, ...]
    out: tuple[float, ...]
    mean: float
    lowest: float
    curve: tuple[tuple[int, float], ...]
    inner: tuple[Any, ...]
    groups: tuple[tuple[Any, ...], ...]
    seed: int
    rollbacks: int


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Everything as it is. Raises ValueError where the parameters of the policy afterwards do not fit the groups."""
    lr = tuple([group.lr for group in groups])
    if config.policy is not None:
        _begin(config, groups, lr, seed)  # whatever does not fit is refused now, and not in mid-training
    return State("ready", -1, -1, 0, 0, lr, lr, 0.0, 0.0, (), (), groups, seed, 0), _at(lr, "waiting", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation; what it means depends on how far the test is."""
    if state.mode == "over":
        return _go_on(config, state, seen)
    if state.mode == "ready":
        state = state._replace(mode="waiting", start=seen.step)
        fields = {"tag": _tag(state), "steps": config.steps, "min_lr": config.min_lr, "max_lr": config.max_lr}
        ask = Ask("checkpoint", {"tag": fields["tag"]}, _SENTENCES["range_asked"].format(**fields))
        return state, _at(state.out, "waiting", "range_asked", fields, milestone=True, asks=(ask,))
    back = _answer(seen, "restore", state)
    if back is not None and back.outcome != "declined":
        return _finished(config, state, seen, "range_over", back.args)
    if state.mode == "returning":
        return _returning(config, state, seen, back)
    kept = _answer(seen, "checkpoint", state)
    if state.mode == "sweep":
        if kept is None:
            return _finished(config, state, seen, "range_interrupted", {})
        return _swept(config, state, seen)
    if kept is None:
        if state.waited + 1 >= config.wait_steps:
            return _finished(config, state, seen, "range_declined", {"why": f"no answer in {config.wait_steps} steps"})
        return state._replace(waited=state.waited + 1), _at(state.out, "waiting", "range_waiting")
    if kept.outcome == "declined":
        return _finished(config, state, seen, "range_declined", {"why": kept.note or "no reason given"})
    state = state._replace(mode="sweep", since=seen.step, waited=0, out=_level(config, state, 0))
    return state, _at(state.out, "sweep", "range_begun", {"steps": config.steps, "lr": _own(state)}, milestone=True)


def _swept(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The sweep: a loss under the level in force leads to the next level, or to the end."""
    under = seen.applied is None or seen.applied >= state.since
    if seen.loss is None or not under or seen.step <= state.since:
        if state.waited + 1 >= config.wait_steps:
            return _ended(config, state, f"no loss in {config.wait_steps} steps")
        return state._replace(waited=state.waited + 1), _at(state.out, "sweep", "range_sweep")
    if bad(seen.loss):
        return _ended(config, state, "the loss was no number any more")
    mean = config.beta * state.mean + (1.0 - config.beta) * seen.loss
    smoothed = mean / (1.0 - config.beta ** (state.level + 1))
    lowest = min(state.lowest, smoothed) if state.curve else smoothed
    every = 1
    while config.steps > POINTS * every:
        every *= 2
    curve = state.curve if state.level % every else (*state.curve, (state.level, smoothed))
    state = state._replace(mean=mean, lowest=lowest, curve=curve, waited=0)
    if smoothed - lowest > (config.stop_factor - 1.0) * max(abs(lowest), EPS):
        return _ended(config, state, f"the loss was {config.stop_factor:g} times its lowest")
    if state.level + 1 >= config.steps:
        return _ended(config, state, "the whole range")
    level = state.level + 1
    fields = {"level": level + 1, "steps": config.steps, "smoothed": smoothed, "lowest": lowest}
    state = state._replace(level=level, since=seen.step, out=_level(config, state, level))
    return state, _at(state.out, "sweep", "range_sweep", fields)


def _ended(config: Config, state: State, why: str) -> tuple[State, Decision]:
    """The sweep is over: back to the learning rates of before, and the job is asked to go back, too."""
    found = _found(config, state)
    numbers: dict[str, Any] = {"levels": state.level + 1, "ended": why, "last": _own(state), **found}
    code = "range_found" if found else "range_nothing"
    args = {"tag": _tag(state), **numbers}
    ask = Ask("restore", args, _SENTENCES[code].format(**args))
    state = state._replace(mode="returning", waited=0, out=_as_before(state, state.lr))
    return state, _at(state.out, "returning", code, args, milestone=True, asks=(ask,))


def _returning(config: Config, state: State, seen: Observation, back: Answered | None) -> tuple[State, Decision]:
    """The learning rates are back already; the job is to follow."""
    if back is not None:  # it declines
        return _finished(config, state, seen, "range_not_undone", {**back.args, "why": back.note or "no reason given"})
    if state.waited + 1 >= config.wait_steps:
        why = {"why": f"no answer in {config.wait_steps} steps"}
        return _finished(config, state, seen, "range_not_undone", why)
    return state._replace(waited=state.waited + 1), _at(state.out, "returning", "range_returning")


def _found(config: Config, state: State) -> dict[str, float]:
    """lower, upper and suggested, with the smoothed losses they rest on; {} where the loss did not fall."""
    curve = [point for point in state.curve if point[0] >= LEFT_OUT * config.steps]
    if len(curve) < 3:
        return {}
    low = min(range(len(curve)), key=lambda i: curve[i][1])
    first, lowest = curve[0][1], curve[low][1]
    if low == 0 or not first > lowest:
        return {}
    begun = first - BEGINNING * (first - lowest)
    lower = max(i for i in range(low) if curve[i][1] > begun) + 1
    slopes = {i: _slope(curve, i) for i in range(lower, low + 1)}
    steepest = min(slopes, key=slopes.__getitem__)
    places = (("lower", lower), ("upper", low), ("suggested", steepest))
    lr = {name: _lr(config, _mean_level(config, curve[i][0])) for name, i in places}
    return {**lr, "first_loss": first, "lowest_loss": lowest, "slope": slopes[steepest]}


def _mean_level(config: Config, level: int) -> float:
    """The mean of the levels in the smoothed loss of a level, weighed as they are in it."""
    n, faded = level + 1, config.beta ** (level + 1)
    return max(0.0, level - config.beta / (1.0 - config.beta) + n * faded / (1.0 - faded))


def _slope(curve: list[tuple[int, float]], i: int) -> float:
    """The change of the smoothed loss per level: a central difference, at the end a one-sided one."""
    (before, one), (after, other) = curve[i - 1], curve[min(i + 1, len(curve) - 1)]
    return (other - one) / (after - before)


def _finished(
    config: Config, state: State, seen: Observation, code: str, found: Mapping[str, Any]
) -> tuple[State, Decision]:
    """The test is over, however it ended: hold, or hand over."""
    lr, suggested = state.lr, found.get("suggested")
    groups = tuple([Group(*group) for group in state.groups])
    if code == "range_over" and config.after == "suggested" and suggested is not None:
        lr = spread(float(suggested), ratios(groups))
    fields = {**{key: value for key, value in found.items() if key != "tag"}, "tag": _tag(state)}
    fields |= {"lr": next((one for one in lr if one), 0.0), "result": _result(found)}
    inner: tuple[Any, ...] = ()
    decision = _at(_as_before(state, lr), "over", code, fields, milestone=True)
    if config.policy is not None:
        inner, (first, momentum, noise_std, phase, *_, asks) = _begin(config, groups, lr, state.seed)
        first = _as_before(state, first)
        decision = Decision(first, momentum, noise_std, f"over.{phase}", code, fields, True, asks)
    over = State(
        "over", state.start, seen.step, 0, 0, state.lr, decision.lr, 0.0, 0.0, (), inner, (), state.seed, seen.rollbacks
    )
    return over, decision


def _result(found: Mapping[str, Any]) -> str:
    if "suggested" not in found:
        return "No learning rate is suggested: the loss did not fall in it"
    return "Suggested is {suggested:.3g}, bounds {lower:.3g} to {upper:.3g}".format(**found)


def _begin(config: Config, groups: tuple[Group, ...], lr: tuple[float, ...], seed: int) -> tuple[Any, Decision]:
    part: Part = config.policy
    try:
        begun: tuple[Any, Decision] = part.policy.init(
            part.config, tuple([g._replace(lr=one) for g, one in zip(groups, lr, strict=True)]), seed
        )
        return begun
    except ValueError as error:
        raise ValueError(f"policy.{error}") from error


def _go_on(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """After the test: the other policy's step, which counts from here how often the run goes back."""
    if config.policy is None:
        return state, _at(state.out, "over", "keep")
    part: Part = config.policy
    if state.rollbacks and seen.rollbacks:
        seen = seen._replace(rollbacks=max(0, seen.rollbacks - state.rollbacks))
    inner, own = part.step(state.inner, seen)
    lr = _as_before(state, own.lr)
    return state._replace(inner=inner, out=lr), own._replace(lr=lr, phase=f"over.{own.phase}")


def _answer(seen: Observation, kind: str, state: State) -> Answered | None:
    tag = _tag(state)
    return next((one for one in reversed(seen.answers) if (one.kind, one.tag) == (kind, tag)), None)


def _tag(state: State) -> str:
    """What this test's checkpoint is called."""
    return f"range_test-{state.start}"


def _lr(config: Config, level: float) -> float:
    """The learning rate of a level, for the group that ratios are taken to."""
    part = level / (config.steps - 1)
    if config.spacing == "linear":
        return config.min_lr + (config.max_lr - config.min_lr) * part
    lr: float = config.min_lr * (config.max_lr / config.min_lr) ** part
    return lr


def _level(config: Config, state: State, level: int) -> tuple[float, ...]:
    groups = tuple([Group("", one) for one in state.lr])
    return _as_before(state, spread(_lr(config, level), ratios(groups)))


def _as_before(state: State, lr: tuple[float, ...]) -> tuple[float, ...]:
    """The very same object where nothing moves."""
    return state.out if lr == state.out else lr


def _own(state: State) -> float:
    """The learning rate in force, of the group that ratios are taken to."""
    return next((one for one in state.out if one), 0.0)


def _at(
    lr: tuple[float, ...],
    phase: str,
    code: str,
    fields: Mapping[str, Any] | None = None,
    *,
    milestone: bool = False,
    asks: tuple[Ask, ...] = (),
) -> Decision:
    return Decision(lr, None, None, phase, code, fields, milestone, asks)


_SENTENCES = {
    "initial": "A range test begins with the next observation.",
    "range_asked": "Range test: the job is asked for checkpoint {tag}, to go back to when {steps} learning rates from "
    "{min_lr:g} to {max_lr:g} have been tried.",
    "range_waiting": "Range test: waits for the job's checkpoint, with everything as it is.",
    "range_declined": "No range test: the job made no checkpoint to go back to ({why}). Nothing has changed.",
    "range_begun": "Range test: {steps} learning rates from {lr:.3g} on.",
    "range_sweep": "Range test: the next learning rate is tried as soon as the loss under this one is known.",
    "range_interrupted": "Range test given up: another attempt began in the middle of it, and its checkpoint may be "
    "gone. The learning rate of before is back.",
    "range_found": "Range test: the loss fell between learning rates {lower:.3g} and {upper:.3g}, fastest at "
    "{suggested:.3g} ({levels} tried, until {last:.3g}: {ended}). The job is asked to go back to checkpoint {tag}.",
    "range_nothing": "Range test: the loss did not fall ({levels} learning rates tried, until {last:.3g}: {ended}). "
    "The job is asked to go back to checkpoint {tag}.",
    "range_returning": "Range test: the learning rate of before is back; waits for the job to go back, too.",
    "range_over": "Range test over, and the job is back where it began. {result}. Goes on at {lr:.3g}.",
    "range_not_undone": "Range test over, but the job has not gone back ({why}): its steps stay in the training. "
    "{result}. Goes on at {lr:.3g}.",
    "keep": "The range test is over: the learning rate stays.",
}


def explain(config: Config, decision: Decision) -> str:
    """The sentence of the test, or of the policy after it."""
    part: Part | None = config.policy
    inner = decision.phase.removeprefix("over.")
    if part is None or inner == decision.phase or decision.code.startswith("range_"):
        return _SENTENCES[decision.code].format(**(decision.fields or {}))
    return part.explain(decision._replace(phase=inner))


def reads(config: Config) -> frozenset[str]:
    """What became of its requests, which settings were in force, and what the policy afterwards reads."""
    own = frozenset((ANSWERS, APPLIED))
    part: Part | None = config.policy
    return own if part is None else own | part.reads() | {ROLLBACKS}


def finish(config: Config, state: State) -> Decision | None:
    """What the policy afterwards has to say at the end."""
    part: Part | None = config.policy
    return None if part is None or state.mode != "over" else part.finish(state.inner)


POLICY = Policy("range_test", 1, Config, State, init, step, explain, reads, _SENTENCES, finish, parts=("policy",))
