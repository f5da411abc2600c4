"""Policy `sequence`: one policy after another, each until a given optimizer step.

Rule: a stage decides every step before its `until`; the next stage begins at the settings its predecessor would have
gone on with, so a hand-over never jumps. Phases carry the stage's number in front: `2.adaptive`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.base import about
from flyball_server.core.types import Decision, Group, Observation, Part, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A policy and where it ends."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    policy: Any = field(metadata=about("The policy: {type: NAME, parameters ...}."))
    until: int | None = field(
        default=None, metadata=about("The optimizer step at which the next stage takes over; null in the last.")
    )

    def __post_init__(self) -> None:
        if self.policy is None:
            raise ValueError("policy: null is not allowed; give {type: NAME, parameters ...}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The stages, in order; every one but the last says until which optimizer step it decides."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    stages: tuple[Stage, ...] = field(metadata=about("The stages, in order: {policy, until} each."))

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: is empty; give at least one, such as {policy: {type: windowed}}")
        for i, stage in enumerate(self.stages[:-1]):
            if stage.until is None or stage.until < 1:
                raise ValueError(
                    f"stages.{i}.until: {stage.until!r} is not allowed; give the optimizer step, 1 or more, at which "
                    f"stage {i + 1} takes over"
                )
        last = len(self.stages) - 1
        if self.stages[last].until is not None:
            raise ValueError(f"stages.{last}.until: the last stage has no end; leave it out")
        for i, (one, other) in enumerate(pairwise(self.stages[:-1])):
            assert one.until is not None
            assert other.until is not None
            if one.until >= other.until:
                raise ValueError(
                    f"stages.{i + 1}.until: {other.until} is not behind stages.{i}.until = {one.until}; "
                    "give steps that rise"
                )


class State(NamedTuple):
    """stage: from 0. inner: its policy's state. seed: the run's. groups: what a later stage is begun with (none left in
    the last one)."""

    stage: int
    inner: tuple[Any, ...]
    seed: int
    groups: tuple[tuple[Any, ...], ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The first stage's first decision. Raises ValueError where a stage's parameters do not fit the groups."""
    inner, first = _begin(config, 0, groups, seed)
    for stage in range(1, len(config.stages)):
        _begin(config, stage, groups, seed)  # whatever does not fit is refused now, and not in mid-training
    # As it was before groups said anything else: a released rule's state does not change.
    kept = tuple([group[:4] for group in groups]) if len(config.stages) > 1 else ()
    return State(0, inner, seed, kept), _numbered(0, first)


def _begin(config: Config, stage: int, groups: tuple[Group, ...], seed: int) -> tuple[Any, Decision]:
    policy, own = config.stages[stage].policy
    try:
        begun: tuple[Any, Decision] = policy.init(own, groups, seed)
        return begun
    except ValueError as error:
        raise ValueError(f"stages.{stage}.policy.{error}") from error


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The stage's own step; at its end the next stage begins where this one would have gone on."""
    stage, inner, seed, groups = state
    part: Part = config.stages[stage].policy
    inner, decision = part.step(inner, seen)
    until = config.stages[stage].until
    if until is None or seen.step + 1 < until:
        return State(stage, inner, seed, groups), _numbered(stage, decision)
    while until is not None and seen.step + 1 >= until:  # a gap in the steps may skip a stage
        stage += 1
        until = config.stages[stage].until
    try:
        inner, first = _begin(config, stage, _moved(groups, decision), seed)
    except ValueError:  # bounds that fitted the groups as attached, but not where they have got to
        inner, first = _begin(config, stage, tuple(Group(*group) for group in groups), seed)
    to: Part = config.stages[stage].policy
    fields = {"stage": stage + 1, "from": part.policy.tag, "to": to.policy.tag}
    noise = first.noise_std or (None if decision.noise_std is None else (0.0,) * len(groups))
    momentum = first.momentum or decision.momentum
    kept = groups if stage + 1 < len(config.stages) else ()
    return State(stage, inner, seed, kept), Decision(
        first.lr, momentum, noise, f"{stage + 1}.{first.phase}", "handover", fields, True, decision.asks
    )


def _numbered(stage: int, decision: Decision) -> Decision:
    lr, momentum, noise, phase, code, fields, milestone, asks = decision
    return Decision(lr, momentum, noise, f"{stage + 1}.{phase}", code, fields, milestone, asks)


def _moved(groups: tuple[tuple[Any, ...], ...], decision: Decision) -> tuple[Group, ...]:
    """The groups with the settings that `decision` gives them."""
    moved = []
    for i, (name, _, momentum, betas) in enumerate(groups):
        now = None if decision.momentum is None else decision.momentum[i]
        if now is not None and momentum is not None:
            momentum = now
        elif now is not None and betas is not None:
            betas = (now, betas[1])
        moved.append(Group(name, decision.lr[i], momentum, betas))
    return tuple(moved)


_SENTENCES = {"handover": "Stage {stage} begins: {to} takes over from {from}, at the settings it had come to."}


def explain(config: Config, decision: Decision) -> str:
    """The sentence of the stage that decided."""
    if decision.code == "handover":
        return _SENTENCES["handover"].format(**(decision.fields or {}))
    number, _, phase = decision.phase.partition(".")
    part: Part = config.stages[int(number) - 1].policy
    return part.explain(decision._replace(phase=phase))


def reads(config: Config) -> frozenset[str]:
    """What any stage reads."""
    return frozenset().union(*(stage.policy.reads() for stage in config.stages))


def finish(config: Config, state: State) -> Decision | None:
    """What the stage in force has to say at the end."""
    part: Part = config.stages[state.stage].policy
    last = part.finish(state.inner)
    return None if last is None else _numbered(state.stage, last)


POLICY = Policy(
    "sequence", 1, Config, State, init, step, explain, reads, _SENTENCES, finish, parts=("stages.*.policy",)
)
