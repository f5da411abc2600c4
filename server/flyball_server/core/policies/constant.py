"""Policy `constant`: every group keeps the settings it was attached with.

Rule: no observation moves anything. With a base schedule this is the way to run that schedule alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.numbers import bad
from flyball_server.core.types import Decision, Group, Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """No parameters: a base schedule, if any, is declared beside the policy."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


class State(NamedTuple):
    """lr: per group, as attached."""

    lr: tuple[float, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """Take the groups' learning rates as they are."""
    lr = tuple([group.lr for group in groups])
    return State(lr), Decision(lr, None, None, "constant", "initial")


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """Keep everything. A bad loss is named in the code; there is nothing to back off from."""
    loss = seen.loss
    code = "nonfinite_hold" if loss is not None and bad(loss) else "keep"
    return state, Decision(state.lr, None, None, "constant", code)


_SENTENCES = {
    "initial": "Starting with the learning rates of the optimizer.",
    "keep": "A constant policy keeps the learning rates.",
    "nonfinite_hold": "The loss is not a usable number; a constant policy keeps the learning rates.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people."""
    return _SENTENCES[decision.code]


POLICY = Policy("constant", 1, Config, State, init, step, explain, codes=_SENTENCES)
