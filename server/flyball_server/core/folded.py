"""A run and its rules as the fold keeps them.

Rule of this module: data, and which rules are in force; how a run changes says `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flyball_server.core import commands, guard
from flyball_server.core.base import Base
from flyball_server.core.commands import Steering
from flyball_server.core.events import Outcome
from flyball_server.core.types import Decision, Group, Policy, Settings


class Rules(NamedTuple):
    """What a run's specification means: built from `Spec`, never stored.

    under: what it means with the policy, base, guard and profile of this JSON text in their places, which a command may
    change (see `ruling`).
    """

    policy: Policy
    config: Any
    base: Base | None
    limits: guard.Limits
    groups: tuple[Group, ...]
    seed: int
    shadows: tuple[Rules, ...] = ()
    under: Callable[[str], Rules] | None = None


class Run(NamedTuple):
    """The state of a run. Every field is a finite number, a string, None, or a tuple or mapping of such.

    seq: how many events were folded, which is the newest row's number in the journal. attempts: from_step,
    seq and parent of each Attached so far. attempt: 0 before the first Attached. through: the newest folded step
    (from_step - 1 at an attempt's start). settings: what is in force from step through + 1 on; decided: the step
    that decided it.
    in_force: (step, the step that decided what was applied from there on), for a policy that reads APPLIED.
    side: side signals that wait for the next observation. last: the newest value of every signal (NaN and
    infinities as strings). answered: the newest ANSWERS_KEPT answered directives. applied: the newest receipt's
    settings, None before the first. shadows: the runs beside it, in the rules' order. steering: its commands.
    """

    seq: int
    attempts: tuple[tuple[int, int, int], ...]
    attempt: int
    status: str
    session: str
    from_step: int
    through: int
    lag: int | None
    policy_state: Any
    decision: Decision
    guard_state: guard.GuardState
    settings: Settings
    decided: int
    side: Mapping[str, float]
    last: Mapping[str, float]
    observations: int
    receipts_through: int
    answered: tuple[str, ...]
    applied: Settings | None
    applied_step: int | None
    in_force: tuple[tuple[int, int], ...]
    shadows: tuple[Run, ...] = ()
    steering: Steering = commands.NONE


NOTHING = Outcome((), ())
#: How many receipts are remembered for observations still to come; a report holds fewer.
IN_FORCE_KEPT = 4096
#: How many answers to directives a run remembers, to know a repeated one; a report holds fewer.
ANSWERS_KEPT = 64


def ruling(rules: Rules, run: Run, seq: int | None = None) -> Rules:
    """The rules in force: those of the run's specification, or what the newest command made of them; as of row `seq`,
    where that is given."""
    plans = run.steering.plans
    if not plans:
        return rules
    plan = plans[-1][1] if seq is None else next((text for at, text in reversed(plans) if at <= seq), "")
    if not plan:
        return rules
    return under(rules, plan)


def plan_of(run: Run) -> str:
    return run.steering.plans[-1][1] if run.steering.plans else ""


def under(rules: Rules, plan: str) -> Rules:
    """The rules under a plan ("": those of the specification). A shadow's have no `under`: it gets no commands."""
    return rules if rules.under is None else rules.under(plan)._replace(shadows=rules.shadows)
