"""From a decision to the settings of the next step: base schedule, guard, commands.

Rule of this module: nothing here decides anything; the same decision gives the same settings, whoever asks.
"""

from __future__ import annotations

from flyball_server.core import commands, guard
from flyball_server.core.commands import Steering
from flyball_server.core.folded import Rules, Run
from flyball_server.core.types import Decision, Settings


def settle(rules: Rules, state: guard.GuardState, step: int, decision: Decision) -> tuple[guard.GuardState, Settings]:
    """guard(policy(base)) for the step after `step`."""
    base, momentum = base_at(rules, step + 1)
    if momentum is not None and decision.momentum is None:
        decision = decision._replace(momentum=momentum)
    return guard.settle(rules.limits, state, rules.groups, base, step, decision)


def base_at(rules: Rules, step: int) -> tuple[tuple[float, ...] | None, tuple[float | None, ...] | None]:
    """The base schedule's learning rates and momenta of `step`; None where it says nothing."""
    base = rules.base
    if base is None:
        return None, None
    momentum = base.momentum(step)
    lr = tuple([base.lr(step, g.lr) for g in rules.groups])
    if momentum is None:
        return lr, None
    # A schedule that cycles momentum drives it wherever the optimizer has one.
    return lr, tuple(momentum if g.momentum or g.betas else g.momentum for g in rules.groups)


def settled(rules: Rules, beside: Steering, guard_state: guard.GuardState, decision: Decision, step: int) -> Settings:
    """The settings of step + 1 where nothing new is decided."""
    base, momentum = base_at(rules, step + 1)
    lr = guard.held(rules.limits, guard_state, rules.groups, base, step)
    momentum = momentum if decision.momentum is None else decision.momentum
    return bent(rules, beside, step, Settings(lr, momentum, decision.noise_std))


def bent(rules: Rules, beside: Steering, step: int, settings: Settings) -> Settings:
    """The settings of step + 1 under the run's commands."""
    if beside.whole and settings.momentum is None:
        settings = settings._replace(momentum=commands.own_momentum(rules.groups))
    return commands.bent(rules.limits, rules.groups, beside.commands, step + 1, settings)


def resettled(rules: Rules, run: Run) -> Run:
    """The run with what its commands make of the settings; with a lag that is left to the next observation."""
    if run.lag is not None:
        return run._replace(steering=run.steering._replace(unsettled=True))
    settings = settled(rules, run.steering, run.guard_state, run.decision, run.through)
    return run if settings == run.settings else run._replace(settings=settings, decided=run.through)
