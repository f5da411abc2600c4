"""Policy `per_group`: other policies, or another scale, for named parameter groups.

Rule: every group belongs to exactly one entry: the one that has its name, else the longest pattern that matches
it, else the default. Groups of entries with a policy of their own get a controller of their own; all others share the
default's. `scale` multiplies what the controller says.

Codes and phases say who decided what: `default: hold | router: increase`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.base import about, nearest
from flyball_server.core.momentum import own
from flyball_server.core.numbers import emit
from flyball_server.core.types import Decision, Group, Observation, Part, Policy

DEFAULT = "default"
_WILD = "*?["


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the groups of one name or pattern get."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    policy: Any = field(default=None, metadata=about("Their own policy; null: they share the default's."))
    scale: float = field(default=1.0, metadata=about("Factor on their learning rate, above 0."))

    def __post_init__(self) -> None:
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale!r} is not allowed; give a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The policy of all groups, and the exceptions by name or pattern (* and ? as in file names)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    policy: Any = field(metadata=about("The policy of every group that nothing else is said about."))
    groups: Mapping[str, Entry] = field(
        default_factory=dict, metadata=about("Exceptions by group name or pattern: {policy, scale} each.")
    )

    def __post_init__(self) -> None:
        if self.policy is None:
            raise ValueError("policy: null is not allowed; give {type: NAME, parameters ...}")
        for label in self.groups:
            # Codes and phases are told apart by these.
            if not label or label == DEFAULT or any(mark in label for mark in ("|", ": ")):
                raise ValueError(
                    f"groups: {label!r} is no good as a name here; give a group's name, or a pattern such as 'lora*'"
                )


class State(NamedTuple):
    """labels: who decides, the default first. members: whose group is which, by place in labels. scales: per group.

    inner: the policies' states. own: the momentum a group keeps if nobody drives it. out: the learning rates in force.
    """

    labels: tuple[str, ...]
    members: tuple[int, ...]
    scales: tuple[float, ...]
    inner: tuple[tuple[Any, ...], ...]
    own: tuple[float | None, ...]
    out: tuple[float, ...]


def entry_of(config: Config, name: str) -> str | None:
    """The name or pattern in `config.groups` that the group `name` belongs to, or None: the default."""
    if name in config.groups:
        return name
    fits = [label for label in config.groups if fnmatchcase(name, label)]
    return max(fits, key=lambda label: (len(label), label), default=None)


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Every controller's first decision.

    Raises ValueError for a name that no group has (a pattern may match none), and where parameters do not fit.
    """
    names = [group.name for group in groups]
    for label in config.groups:
        if label not in names and not any(c in label for c in _WILD):
            raise ValueError(f"groups.{label}: there is no such group{nearest(label, names)}")
    entries = [entry_of(config, name) for name in names]
    owners = [entry if entry and config.groups[entry].policy is not None else DEFAULT for entry in entries]
    labels = tuple(sorted(set(owners), key=lambda label: (label != DEFAULT, label)))
    members = tuple(labels.index(owner) for owner in owners)
    scales = tuple(config.groups[entry].scale if entry else 1.0 for entry in entries)
    inner, decisions = [], []
    for i, label in enumerate(labels):
        part, mine = _part(config, label), tuple(g for g, m in zip(groups, members, strict=True) if m == i)
        try:
            state, decision = part.policy.init(part.config, mine, seed)
        except ValueError as error:
            where = "policy" if label == DEFAULT else f"groups.{label}.policy"
            raise ValueError(f"{where}.{error}") from error
        inner.append(state)
        decisions.append(decision)
    state = State(labels, members, scales, tuple(inner), own(groups), ())
    first = _joined(state, decisions)
    return state._replace(out=first.lr), first


def _part(config: Config, label: str) -> Part:
    part: Part = config.policy if label == DEFAULT else config.groups[label].policy
    return part


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """Every controller's step on the same observation."""
    labels, members, scales, inner, keep, out = state
    done = [_part(config, label).step(one, seen) for label, one in zip(labels, inner, strict=True)]
    joined = _joined(state, [decision for _, decision in done])
    if joined.lr == out:
        joined = Decision(out, *joined[1:])
    return State(labels, members, scales, tuple([one for one, _ in done]), keep, joined.lr), joined


def _joined(state: State, decisions: list[Decision]) -> Decision:
    """The controllers' decisions as one, group by group."""
    labels, members, scales, _, keep, _ = state
    momentum = any(d.momentum is not None for d in decisions)
    noisy = any(d.noise_std is not None for d in decisions)
    lr, momenta, noise, at = [], [], [], [0] * len(decisions)
    for group, (member, scale) in enumerate(zip(members, scales, strict=True)):
        decision, i = decisions[member], at[member]
        at[member] = i + 1
        one = decision.lr[i]
        lr.append(one if scale == 1.0 else emit(one * scale) if one else 0.0)
        momenta.append(keep[group] if decision.momentum is None else decision.momentum[i])
        noise.append(0.0 if decision.noise_std is None else decision.noise_std[i])
    if labels == (DEFAULT,):
        phase, code, fields = decisions[0].phase, decisions[0].code, decisions[0].fields
    else:
        pairs = list(zip(labels, decisions, strict=True))
        phase = " | ".join([f"{label}: {d.phase}" for label, d in pairs])
        code = " | ".join([f"{label}: {d.code}" for label, d in pairs])
        fields = {label: dict(d.fields) for label, d in pairs if d.fields} or None
    return Decision(
        tuple(lr),
        tuple(momenta) if momentum else None,
        tuple(noise) if noisy else None,
        phase,
        code,
        fields,
        any(d.milestone for d in decisions),
        tuple([ask for d in decisions for ask in d.asks]),
    )


def explain(config: Config, decision: Decision) -> str:
    """Every controller's sentence, with its name in front where there are several."""
    if ": " not in decision.code:
        return _part(config, DEFAULT).explain(decision)
    codes, phases, fields = decision.code.split(" | "), decision.phase.split(" | "), decision.fields or {}
    sentences = []
    for labelled, phase in zip(codes, phases, strict=True):
        label, _, code = labelled.partition(": ")
        one = Decision(decision.lr, None, None, phase.partition(": ")[2], code, fields.get(label))
        sentences.append(f"{label}: {_part(config, label).explain(one)}")
    return " ".join(sentences)


def reads(config: Config) -> frozenset[str]:
    """What any of the policies reads."""
    return frozenset().union(*(_part(config, label).reads() for label in _labels(config)))


def finish(config: Config, state: State) -> Decision | None:
    """What the controllers have to say at the end."""
    last = [(label, _part(config, label).finish(one)) for label, one in zip(state.labels, state.inner, strict=True)]
    said = [(label, decision) for label, decision in last if decision is not None]
    if not said:
        return None
    if state.labels == (DEFAULT,):
        return said[0][1]
    phase = " | ".join(f"{label}: {d.phase}" for label, d in said)
    code = " | ".join(f"{label}: {d.code}" for label, d in said)
    return Decision(state.out, None, None, phase, code, {label: dict(d.fields or {}) for label, d in said})


def _labels(config: Config) -> list[str]:
    return [DEFAULT, *(label for label, entry in config.groups.items() if entry.policy is not None)]


POLICY = Policy(
    "per_group", 1, Config, State, init, step, explain, reads, finish=finish, parts=("policy", "groups.*.policy")
)
