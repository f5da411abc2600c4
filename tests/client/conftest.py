"""What tests of the client share: a service, a policy that only says what a test tells it to, and torch on one thread.

Rule of this module: the policy is in the table for one test at a time, in this process only.
"""

from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import httpx
import pytest

import flyball
import flyball_server
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.types import Decision, Policy


@pytest.fixture(autouse=True)
def _alone(one_thread):
    """Every test here may train."""


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def read(service):
    """What the service says of a run."""
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        yield lambda path: http.get(f"/v1/runs/{path}").raise_for_status().json()


runs = count()


@pytest.fixture
def steered(service, scripted):
    """Attach in lockstep, to a policy that changes nothing; closed at the end."""
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"c{next(runs)}", "policy": scripted(), "lag": 0, "wait_s": 10.0, "server": service.http}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield attach
    for governor in opened:
        governor.close("")


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
