"""Policy `spike_guard`: another policy, with a playbook for spikes of the loss and of the gradient norm.

Rule: an observation is suspect where its loss or gradient norm is unusable, or lies more than `deviations` mean
absolute deviations above its running mean; `confirm` of them in a row are a spike. A spike takes the next rung of the
playbook: cut the learning rate; cut it and ramp it back; ask the job to go back to a checkpoint and to skip batches;
ask it to stop. A spike that goes on takes another rung after `cooldown_steps`; one that comes `memory_steps` after the
one before, or later, begins at the first rung again. Cuts are a factor on top of the inner policy, which knows nothing
of them; a cut that is not ramped back lasts.

The running mean and deviation are exponential averages of the loss, and of log(grad_norm), whose every update is
clipped to `clip` deviations, the idea behind Huber's estimate of location (Huber 1964): one wild value moves them no
further than an ordinary one could, while a level that stays is believed in the end, the sooner the nearer it is. A
threshold in running deviations is that of ZClip (Kumar et al. 2025); to go back before a spike and skip batches is the
practice described for PaLM (Chowdhery et al. 2022).

Going back takes the detector back with the rest of the state, to what it was at that checkpoint; its streak begins
anew. How often the run has gone back is counted outside of that state, so that restoring over and over ends in a stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import EPS, LARGEST_SIGNAL, bad, emit
from flyball_server.core.types import ROLLBACKS, Ask, Decision, Group, Observation, Part, Policy

#: A gradient norm of 0 counts as this.
SMALLEST_NORM = 1e-30
#: Before so many values there is no deviation worth clipping to.
FEW = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The inner policy, what counts as a spike, and how far and how often the playbook goes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    policy: Any = field(metadata=about("The inner policy: {type: NAME, parameters ...}."))
    deviations: float = field(default=6.0, metadata=about("Suspect: so many deviations above the mean.", gt=0))
    confirm: int = field(default=3, metadata=about("So many suspect observations in a row are a spike.", ge=1))
    beta: float = field(default=0.99, metadata=about("Memory of mean and deviation per value.", ge=0, lt=1))
    clip: float = field(default=2.0, metadata=about("Largest update, in deviations.", gt=0))
    min_deviation: float = field(
        default=0.01,
        metadata=about("The deviation is at least this part of the mean loss, and this much of log(grad_norm).", ge=0),
    )
    min_samples: int = field(
        default=100, metadata=about("Values before the detector judges; unusable ones count at once.", ge=1)
    )
    cut_factor: float = field(default=0.5, metadata=about("Factor on the learning rate at a cut.", gt=0, lt=1))
    min_factor: float = field(default=0.01, metadata=about("Lowest factor that cuts come to together.", gt=0, le=1))
    rewarm_steps: int = field(default=200, metadata=about("Optimizer steps of the ramp back.", ge=1))
    skip_batches: int = field(default=200, metadata=about("Batches to skip after going back.", ge=0))
    max_cuts: int = field(default=1, metadata=about("How often the first rung is taken before the next.", ge=0))
    max_rewarms: int = field(default=1, metadata=about("The same of a cut that is ramped back.", ge=0))
    max_restores: int = field(default=2, metadata=about("The same of going back.", ge=0))
    cooldown_steps: int = field(default=50, metadata=about("Optimizer steps from one rung to the next.", ge=0))
    memory_steps: int = field(
        default=1000, metadata=about("Optimizer steps without a spike after which the playbook begins anew.", ge=1)
    )

    def __post_init__(self) -> None:
        if self.policy is None:
            raise ValueError("policy: null is not allowed; give {type: NAME, parameters ...}")
        check(self)
        if self.memory_steps <= self.cooldown_steps:
            raise ValueError(
                f"memory_steps: {self.memory_steps} is not above cooldown_steps = {self.cooldown_steps}, so that every "
                "rung would be the first; give more"
            )


class Detector(NamedTuple):
    """mean, deviation: running. samples: usable values so far, as far as that matters. streak: suspect ones in a row,
    up to confirm, the first at the step since."""

    mean: float
    deviation: float
    samples: int
    streak: int
    since: int


class Spell(NamedTuple):
    """Spikes that belong together. rung: rungs taken. last: the newest spike's step. acted: the newest rung's.

    low, high: a ramp's ends; began: the step its first value was decided at, -1 where there is none. rollbacks: how
    often the run had gone back.
    """

    rung: int
    last: int
    acted: int
    low: float
    high: float
    began: int
    rollbacks: int


class State(NamedTuple):
    """inner: the inner policy's state. lr: its learning rates. out: those times factor. loss, grad: detectors."""

    inner: tuple[Any, ...]
    lr: tuple[float, ...]
    out: tuple[float, ...]
    factor: float
    loss: tuple[Any, ...]
    grad: tuple[Any, ...]
    spell: tuple[Any, ...]


_NEW, _CALM = tuple(Detector(0.0, 0.0, 0, 0, -1)), tuple(Spell(0, -1, -1, 1.0, 1.0, -1, 0))
#: Half the cost of calling the classes.
_new = tuple.__new__


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The inner policy's first decision. Raises ValueError where its parameters do not fit the groups."""
    policy, own = config.policy
    try:
        inner, first = policy.init(own, groups, seed)
    except ValueError as error:
        raise ValueError(f"policy.{error}") from error
    return State(inner, first.lr, first.lr, 1.0, _NEW, _NEW, _CALM), first


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The inner policy's step, and the playbook on top; between spikes its own decision as it is."""
    inner, before, out, factor, loss, grad, spell = state
    part: Part = config.policy
    inner, decision = part.step(inner, seen)
    value = seen.loss
    if value is not None:
        loss = _watched(config, loss, value, False, seen.step)
    value = seen.grad_norm
    if value is not None and not value < 0:
        value = log(value) if SMALLEST_NORM < value <= LARGEST_SIGNAL else _log(value)
        grad = _watched(config, grad, value, True, seen.step)
    lr, mark = decision.lr, ""
    rung, _, _, _, _, began, rollbacks = spell
    if loss[3] or grad[3] or rung or began >= 0 or seen.rollbacks != rollbacks:
        old, spell = factor, Spell(*spell)
        if seen.rollbacks > spell.rollbacks:  # nothing of what was seen since the checkpoint is left
            loss, grad = (*loss[:3], 0, -1), (*grad[:3], 0, -1)
        factor, spell, mark = _playbook(config, factor, Detector(*loss), Detector(*grad), spell, seen)
        if factor != old or (lr is not before and lr != before):
            out = _scaled(lr, factor, out)
    elif lr is not before and lr != before:
        out = lr if factor == 1.0 else _scaled(lr, factor, out)
    after = _new(State, (inner, lr, out, factor, loss, grad, spell))
    if not mark:
        return after, decision if out is lr else decision._replace(lr=out)
    return after, _told(config, decision, out, mark, after, seen)


def _log(norm: float) -> float:
    """Of a gradient norm that is very small, or unusable and left as it is."""
    return norm if bad(norm) else log(max(norm, SMALLEST_NORM))


def _scaled(lr: tuple[float, ...], factor: float, out: tuple[float, ...]) -> tuple[float, ...]:
    """The learning rates times factor; the same object as before where nothing moves."""
    now = lr if factor == 1.0 else tuple([emit(one * factor) if one else 0.0 for one in lr])
    return out if now == out else now


def _watched(config: Config, detector: tuple[Any, ...], value: float, is_log: bool, step: int) -> tuple[Any, ...]:
    """The detector after one more value."""
    mean, deviation, samples, streak, since = detector
    away, gain = value - mean, 1.0 - config.beta
    if samples >= config.min_samples and samples >= FEW:
        # Nearly always; what follows below would come to the same.
        most = config.clip * deviation
        if -most <= away <= most and away <= config.deviations * deviation:
            mean += gain * away
            return mean, deviation + gain * ((away if away > 0 else -away) - deviation), samples, 0, -1
    if bad(value):
        return mean, deviation, samples, min(streak + 1, config.confirm), since if streak else step
    scale = max(deviation, config.min_deviation * (1.0 if is_log else abs(mean)), EPS)
    suspect = samples >= config.min_samples and away > config.deviations * scale
    if samples >= FEW:
        most = config.clip * scale
        away = most if away > most else -most if away < -most else away
    if samples < config.min_samples or samples < FEW:
        samples += 1
        gain = max(gain, 1.0 / samples)
        if samples == 1:
            return value, 0.0, 1, 0, -1
    mean += gain * away
    deviation += gain * (abs(away) - deviation)
    if not suspect:
        return mean, deviation, samples, 0, -1
    return mean, deviation, samples, min(streak + 1, config.confirm), since if streak else step


def _playbook(
    config: Config, factor: float, loss: Detector, grad: Detector, spell: Spell, seen: Observation
) -> tuple[float, Spell, str]:
    """(factor, spell, mark) where there may be something to do: a spike, a ramp, memories, a run gone back."""
    step, mark = seen.step, ""
    if seen.rollbacks != spell.rollbacks:
        gone = seen.rollbacks - spell.rollbacks
        spell = spell._replace(rollbacks=seen.rollbacks)
        if gone > 0:  # fewer: a fork, which nobody has asked to go back yet
            before = config.max_cuts + config.max_rewarms
            rung = min(max(spell.rung, before) + gone, before + config.max_restores)
            spell, mark = spell._replace(rung=rung, last=step, acted=step), "spike_returned"
    if loss.streak >= config.confirm or grad.streak >= config.confirm:
        if step - spell.last >= config.memory_steps or spell.rung == 0:
            spell = spell._replace(rung=0, acted=-1)
        spell = spell._replace(last=step)
        name = _name(config, spell.rung)
        if name and not mark and (spell.acted < 0 or step - spell.acted >= config.cooldown_steps):
            spell, mark = spell._replace(rung=spell.rung + 1, acted=step), name
            if name in ("spike_cut", "spike_rewarm"):
                low = max(factor * config.cut_factor, min(config.min_factor, factor))
                began = step if name == "spike_rewarm" else -1
                return low, spell._replace(low=low, high=factor, began=began), mark
    elif spell.rung and step - spell.last >= config.memory_steps:
        spell = spell._replace(rung=0, acted=-1)
    if spell.began >= 0:
        done = (step - spell.began) / config.rewarm_steps
        factor = spell.high if done >= 1 else spell.low + (spell.high - spell.low) * done
        if done >= 1:
            spell = spell._replace(began=-1)
    return factor, spell, mark


def _name(config: Config, rung: int) -> str:
    """The rung after so many of them, "" behind the last."""
    limits = (config.max_cuts, config.max_rewarms, config.max_restores, 1)
    for name, limit in zip(("spike_cut", "spike_rewarm", "spike_restore", "spike_stop"), limits, strict=True):
        if rung < limit:
            return name
        rung -= limit
    return ""


def _told(
    config: Config, decision: Decision, out: tuple[float, ...], mark: str, state: State, seen: Observation
) -> Decision:
    """The inner policy's decision with what the playbook did beside it: a milestone with its numbers."""
    spell, fields = Spell(*state.spell), {**(decision.fields or {}), "rung": state.spell[0], "factor": state.factor}
    asks = decision.asks
    if mark == "spike_returned":
        fields |= {"restore": spell.rung - config.max_cuts - config.max_rewarms, "of": config.max_restores}
    else:
        on_loss = state.loss[3] >= config.confirm
        fields |= _evidence(Detector(*(state.loss if on_loss else state.grad)), on_loss, seen)
    if mark == "spike_rewarm":
        fields |= {"high": spell.high, "rewarm_steps": config.rewarm_steps}
    elif mark == "spike_restore":
        fields["skip_batches"] = config.skip_batches
        fields["restore"] = spell.rung - config.max_cuts - config.max_rewarms
        fields["of"] = config.max_restores
        args = {"skip_batches": config.skip_batches, "before_step": fields["since"]}
        asks = (*asks, Ask("restore", args, _SENTENCES[mark].format(**fields)))
    elif mark == "spike_stop":
        asks = (*asks, Ask("stop", {}, _SENTENCES[mark].format(**fields)))
    return Decision(
        out, decision.momentum, decision.noise_std, decision.phase, f"{decision.code}+{mark}", fields, True, asks
    )


def _evidence(found: Detector, on_loss: bool, seen: Observation) -> dict[str, Any]:
    """What a spike is seen by, in numbers and in words."""
    signal, value = ("loss", seen.loss) if on_loss else ("grad_norm", seen.grad_norm)
    mean = found.mean if on_loss else exp(found.mean)
    usable = None if value is None or bad(value) else value
    words = f"{signal} {'not measured' if value is None else format(value, '.4g')}"
    if found.samples:
        words += f", running {mean:.4g}"
    return {
        "signal": signal, "value": usable, "mean": mean, "deviation": found.deviation, "since": found.since,
        "spike": words,
    }  # fmt: skip


_SENTENCES = {
    "spike_cut": "Spike since step {since} ({spike}): learning rate cut, to {factor:.4g} of the policy's.",
    "spike_rewarm": "Spike since step {since} ({spike}): learning rate cut to {factor:.4g} of the policy's, and back "
    "to {high:.4g} over {rewarm_steps} steps.",
    "spike_restore": "Spike since step {since} ({spike}): the job is asked to go back to a checkpoint from before it "
    "and to skip {skip_batches} batches (restore {restore} of {of}).",
    "spike_stop": "Spike since step {since} ({spike}), and the playbook is at its end: the job is asked to stop.",
    "spike_returned": "The run went back to before a spike (restore {restore} of {of}): another one takes the next "
    "rung.",
}


def explain(config: Config, decision: Decision) -> str:
    """The inner policy's sentence, and one for the rung where one was taken."""
    part: Part = config.policy
    code, _, mark = decision.code.rpartition("+")
    if mark not in _SENTENCES:
        return part.explain(decision)
    own = _SENTENCES[mark].format(**(decision.fields or {}))
    return f"{part.explain(decision._replace(code=code))} {own}"


def reads(config: Config) -> frozenset[str]:
    """What the inner policy reads, and how often the run went back."""
    part: Part = config.policy
    return part.reads() | {ROLLBACKS}


def finish(config: Config, state: State) -> Decision | None:
    """What the inner policy has to say at the end."""
    part: Part = config.policy
    return part.finish(state.inner)


POLICY = Policy("spike_guard", 1, Config, State, init, step, explain, reads, _SENTENCES, finish, parts=("policy",))
