"""Policy `warmup`: a linear ramp from a fraction of every group's learning rate up to all of it.

Rule: step t of the ramp gets (t + 1) / steps of the learning rate, counted in observations, whatever they hold. It is
made for the first stage of a `sequence`; alone it ends at the learning rates the optimizer was attached with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import emit
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How long the ramp is."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    steps: int = field(default=100, metadata=about("Length of the ramp in observations.", ge=1))

    def __post_init__(self) -> None:
        check(self)


class State(NamedTuple):
    """n: observations so far. lr: per group, as attached. out: per group, in force."""

    n: int
    lr: tuple[float, ...]
    out: tuple[float, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The first step of the ramp."""
    lr = tuple([group.lr for group in groups])
    out = _ramped(lr, 1, config.steps)
    return State(0, lr, out), Decision(out, None, None, "warmup" if config.steps > 1 else "done", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The next step of the ramp."""
    n, lr, out = state
    n += 1
    if n >= config.steps:
        return State(n, lr, out), Decision(out, None, None, "done", "keep")
    out = _ramped(lr, n + 1, config.steps)
    phase, code = ("done", "warmup_done") if n + 1 == config.steps else ("warmup", "warmup")
    return State(n, lr, out), Decision(out, None, None, phase, code, {"n": n, "steps": config.steps})


def _ramped(lr: tuple[float, ...], at: int, steps: int) -> tuple[float, ...]:
    return lr if at >= steps else tuple([emit(one * at / steps) if one else 0.0 for one in lr])


_SENTENCES = {
    "initial": "Starting at the first step of the warm-up.",
    "warmup": "Warm-up: observation {n} of {steps}.",
    "warmup_done": "Warm-up finished: full learning rate from here on.",
    "keep": "The warm-up is over: the learning rate stays.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people."""
    return _SENTENCES[decision.code].format(**(decision.fields or {}))


POLICY = Policy("warmup", 1, Config, State, init, step, explain, codes=_SENTENCES)
