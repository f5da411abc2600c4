"""What a command makes of a run: of its settings, or of the rules it is folded under.

Rule of this module: whatever a command asks for, the guard has the last word, and what it left is told.
"""

from __future__ import annotations

from typing import Any

from flyball_server.core import commands, guard, steering
from flyball_server.core.base import Base
from flyball_server.core.commands import Held
from flyball_server.core.errors import Invalid
from flyball_server.core.events import Commanded, CommandMoved, Mark, Outcome
from flyball_server.core.folded import Rules, Run, plan_of, ruling, under
from flyball_server.core.numbers import finite
from flyball_server.core.settling import base_at, resettled, settled


def commanded(rules: Rules, run: Run, event: Commanded) -> tuple[Run, Outcome]:
    """A command, with what it changes and what the guard left of it."""
    seq, before = run.seq + 1, run.settings.lr
    held, clamped = _held(rules, run, event)
    clamped = clamped or bool(event.args.get("clamped"))
    old, over = run.steering.plans, commands.superseded(run.steering.commands, event.kind, event.args)
    beside = steering.commanded(run.steering, event, seq, held, clamped)
    run = run._replace(seq=seq, steering=beside)
    carried: tuple[str, ...] = ()
    if beside.plans is not old:
        after = ruling(rules, run)
        run = _switched(rules, after, run, run.through)
        carried, rules = _carried(rules, after), after
        if carried:
            run = run._replace(steering=steering.other_policy(run.steering))
    run = resettled(rules, run)
    if event.kind in ("note", *commands.DIRECTIVES):
        return run, Outcome((), (), verdict={"status": "accepted"})
    now = settled(rules, run.steering, run.guard_state, run.decision, run.through)
    verdict: dict[str, Any] = {"status": "clamped" if clamped else "accepted", "lr": list(now.lr)}
    if held is not None:
        verdict["held"] = {n: v for n, v in finite(held._asdict()).items() if v not in (None, {}, False)}
    if over:
        verdict["superseded"] = over
    if carried:
        verdict["carried"] = list(carried)
    fields = {"kind": event.kind, "command": f"c{seq}", "actor": event.actor, "reason": event.reason}
    words = {"carried": ", ".join(carried) or "everything", **event.args.get("words", {})}
    words["clamped"] = ", clamped by the guard" if clamped else ""
    note = "guard_clamped" if clamped else ""
    code = f"command_{event.kind}"
    mark = Mark(run.through, run.decision.phase, code, note, before, now.lr, {**words, **fields})
    return run, Outcome((), (mark,), verdict=verdict)


def _held(rules: Rules, run: Run, event: Commanded) -> tuple[Held | None, bool]:
    """What a lasting command puts in the place of the settings, and whether the guard clamped it."""
    if event.kind not in commands.LASTING:
        return None, False
    beside, step = run.steering, run.through
    now = settled(rules, beside, run.guard_state, run.decision, step)
    values = commands.control_values(beside.controls, beside.commands, step + 1)
    if event.kind == "hold":
        return commands.hold(now, rules.groups, values), False
    free = settled(rules, beside._replace(commands=()), run.guard_state, run.decision, step)
    base, _ = base_at(rules, step + 1)
    return commands.holding(
        rules.limits,
        run.guard_state,
        rules.groups,
        base,
        beside.controls,
        args=event.args,
        free=free,
        now=now,
        values=values,
    )


def moved(rules: Rules, run: Run, event: CommandMoved) -> Run:
    return resettled(rules, run._replace(seq=run.seq + 1, steering=steering.moved(run.steering, event)))


def _switched(was: Rules, rules: Rules, run: Run, step: int) -> Run:
    """The run under other rules from here on. Another policy begins where the one before it stands: at its learning
    rates, or, where the base schedule is another one, at the references that it multiplies."""
    if was.policy is rules.policy and was.config == rules.config and _spec(was.base) == _spec(rules.base):
        return run  # only the limits are others
    if _spec(was.base) == _spec(rules.base):
        lr = run.decision.lr
    elif rules.base is None:
        lr = guard.held(was.limits, run.guard_state, was.groups, base_at(was, step + 1)[0], step)
    else:
        lr = tuple([group.lr for group in rules.groups])
    groups = tuple([g._replace(lr=one) for g, one in zip(rules.groups, lr, strict=True)])
    try:
        state, decision = rules.policy.init(rules.config, groups, rules.seed)
    except ValueError as error:
        raise Invalid(f"policy: {error}") from error
    factors = guard.factors_of(rules.groups, decision, rules.base is not None)
    guard_state = run.guard_state._replace(factors=factors)
    if (was.base is None) != (rules.base is None):
        guard_state = guard_state._replace(window_factors=factors)
    return run._replace(policy_state=state, decision=decision, guard_state=guard_state)


def _spec(base: Base | None) -> Any:
    return None if base is None else base.spec()


def _carried(was: Rules, rules: Rules) -> tuple[str, ...]:
    """What another policy took over from the one before it, in words; () where there is no other policy."""
    if was.policy is rules.policy and was.config == rules.config and _spec(was.base) == _spec(rules.base):
        return ()
    same = _spec(was.base) == _spec(rules.base)
    kept = ["learning rates"] if same or rules.base is None else ["reference learning rates"]
    if same and rules.base is not None:
        kept.append("base schedule")
    return (*kept, "guard state", "overrides", "side signals")


def gone_back(rules: Rules, run: Run, restored: Run) -> Run:
    """The restored state under what was commanded since: commands are no part of training time."""
    beside = steering.gone_back(run.steering)
    before = plan_of(restored)
    restored = restored._replace(steering=beside)
    if plan_of(restored) == before:
        return restored
    return _switched(under(rules, before), rules, restored, restored.through)
