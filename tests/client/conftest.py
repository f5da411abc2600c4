"""What tests of the client share: a policy that only says what a test tells it to, and torch on one thread.

Rule of this module: the policy is in the table for one test at a time, in this process only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import pytest

from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.types import Decision, Policy


@pytest.fixture(autouse=True)
def _alone(one_thread):
    """Every test here may train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What holds at optimizer step t: entry t of each list, from its beginning again where it ends."""

    factor: tuple[float, ...] = (1.0,)
    momentum: float | None = None
    noise: tuple[tuple[float, ...], ...] = ()


class State(NamedTuple):
    lr: tuple[float, ...]


def said(script, lr, step):
    """The decision for optimizer step `step`."""
    times = script.factor[step % len(script.factor)]
    momentum = None if script.momentum is None else (script.momentum,) * len(lr)
    noise = script.noise[step % len(script.noise)] if script.noise else None
    return Decision(tuple(times * base for base in lr), momentum, noise, "script", "said")


def init(script, groups, seed):
    state = State(tuple(group.lr for group in groups))
    return state, said(script, state.lr, 0)


def step(script, state, seen):
    return state, said(script, state.lr, seen.step + 1)


@pytest.fixture
def scripted(monkeypatch):
    policy = Policy("scripted", 1, Script, State, init, step, lambda *_: "As the test says.")
    monkeypatch.setitem(ALL, policy.tag, policy)
    monkeypatch.setitem(POLICIES, policy.name, policy)
    return lambda **script: {"type": "scripted", **script}
