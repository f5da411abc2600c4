"""A run, and the one way it changes: `apply(rules, run, event)`.

The rules, in prose
-------------------
1. A run is a fold: `reduce(apply, events, created)`. What is not an event cannot change a run. Audit,
   recovery, replay and rewind all follow from this one rule, so nothing else may write to a run.
2. The fold is deterministic. It reads no clock, no generator, no environment; chance comes from
   `rng.uniform(seed, stream, step)`. The same events give the same bits on the same platform. (Across
   platforms exp, cos and log may differ in the last bit; the journal keeps the decisions themselves.)
3. A step is folded once. Observations up to `through` are already in the run: folding them again changes
   nothing, so a client may repeat anything it is not sure of.
4. A batch equals its observations one by one. How many steps ride in one event never shows in a decision.
5. Every observation passes guard(policy(base)): the policy says factors, the base schedule says what they
   multiply, the guard has the last word.
6. An attempt is one unbroken line of steps. `Attached` opens attempt n + 1. Where it goes back behind the
   newest step it carries the state to go on from (`restored`), so the fold never needs to look behind itself.
7. Only the driver of the newest attempt is heard. An event of an older attempt is a conflict, never mixed in.
8. After `Ended` only a new attempt can follow.
9. Commands bend what comes out of the guard, and stay inside its bounds. They are no part of training time: an attempt
   that goes back finds them as they are, and goes on under the policy in force now.
10. A shadow is a run beside the run: the same events folded under another policy. What it decides is recorded and never
   applied, so receipts say nothing about it: its decisions count as applied at once. Commands are none of its business.

Odd cases
---------
- A gap in the steps is allowed: policies count observations; only base schedules and chance read step numbers.
- Side signals (`Reported`) wait for the next observation and fill what the driver did not measure itself.
- An observation without any signal is still a step: it moves `through` and the base schedule, no counter.
- The first change of every batch is its first step, even where nothing changed: each journal row stands alone.
- A streak of one and the same kind of decision is marked once, where it begins, unless the policy calls each one a
  milestone: settings are recorded for every step anyway, and the numbers behind each follow from folding again.
- Receipts are folded before the observations they came with, so that a policy can be told what was in force.
- With a lag a decision belongs to one step, and was told already. So a command shows in the settings with the decision
  of the next observation; without a lag it shows at once.

Longer than 400 lines because whatever can change a run stands in this one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flyball_server.core import commands, guard, steering
from flyball_server.core.base import Base
from flyball_server.core.columns import in_force, newest, observations
from flyball_server.core.commands import Held, Steering
from flyball_server.core.errors import Conflict, Invalid
from flyball_server.core.events import (
    ASIDE,
    Applied,
    Attached,
    Commanded,
    CommandMoved,
    Created,
    Declared,
    DirectiveAnswered,
    Ended,
    Event,
    Judged,
    Mark,
    Observed,
    Origin,
    Outcome,
    Proposed,
    Reported,
)
from flyball_server.core.numbers import finite
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import APPLIED, ROLLBACKS, Ask, Decision, Group, Policy, Settings


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


def create(rules: Rules, origin: Origin | None = None) -> Run:
    """The run as `Created` leaves it: no attempt yet, settings for its first step decided by the policy's `init`, or
    gone on from with the origin's state.

    Raises Invalid where the policy's parameters do not fit the groups.
    """
    try:
        state, decision = rules.policy.init(rules.config, rules.groups, rules.seed)
    except ValueError as error:  # parameters that do not fit these groups
        raise Invalid(f"policy: {error}") from error
    through = -1 if origin is None else origin.step - 1
    began = guard.begin(rules.groups, on_base=rules.base is not None)
    guard_state, settings = settle(rules, began, through, decision)
    run = Run(
        seq=1,
        attempts=(),
        attempt=0,
        status="created",
        session="",
        from_step=through + 1,
        through=through,
        lag=None,
        policy_state=state,
        decision=decision,
        guard_state=guard_state,
        settings=settings,
        decided=through,
        side={},
        last={},
        observations=0,
        receipts_through=0,
        answered=(),
        applied=None,
        applied_step=None,
        in_force=(),
        shadows=tuple([create(beside, origin and origin._replace(state=None)) for beside in rules.shadows]),
    )
    if origin is None or origin.state is None:
        return run
    # The rules it goes on under are those of its own specification, whatever they were changed from there.
    left = load(rules._replace(shadows=()), {name: v for name, v in origin.state.items() if name != "steering"})
    return run._replace(
        policy_state=left.policy_state, decision=left.decision, guard_state=left.guard_state, settings=left.settings
    )


def apply(rules: Rules, run: Run, event: Event) -> tuple[Run, Outcome]:
    """Fold one event into the run.

    Raises Conflict where the event belongs to another attempt or the run has ended, Invalid where it cannot
    be true (steps that do not rise, columns of unequal length). The run given is never altered.
    """
    rules = ruling(rules, run)
    after, outcome = _observed(rules, run, event) if isinstance(event, Observed) else _apply(rules, run, event)
    if not rules.shadows or after is run or isinstance(event, (Applied, *ASIDE)):
        return after, outcome
    beside = [_beside(r, s, event, i) for i, (r, s) in enumerate(zip(rules.shadows, run.shadows, strict=True))]
    shadows, outcomes = zip(*beside, strict=True)
    return after._replace(shadows=shadows), outcome._replace(shadows=outcomes)


def ruling(rules: Rules, run: Run, seq: int | None = None) -> Rules:
    """The rules in force: those of the run's specification, or what the newest command made of them; as of row `seq`,
    where that is given."""
    plans = run.steering.plans
    if not plans:
        return rules
    plan = plans[-1][1] if seq is None else next((text for at, text in reversed(plans) if at <= seq), "")
    if not plan:
        return rules
    return _under(rules, plan)


def _beside(rules: Rules, run: Run, event: Event, place: int) -> tuple[Run, Outcome]:
    """Fold an event into the shadow at `place`, which goes back to its own state where the run goes back."""
    if isinstance(event, Attached) and event.restored is not None:
        event = event._replace(restored=event.restored["shadows"][place])
    return apply(rules, run, event)


def _apply(rules: Rules, run: Run, event: Event) -> tuple[Run, Outcome]:
    """Fold anything but Observed."""
    assert not isinstance(event, Observed)
    seq = run.seq + 1
    if isinstance(event, Attached):
        return _attached(rules, run, event), NOTHING
    if isinstance(event, Created):
        raise Conflict("the run exists already: a journal holds Created once, as its first event")
    if isinstance(event, Reported):
        beside = steering.reported(run.steering, event.source, event.number)
        return run._replace(seq=seq, side={**run.side, **event.signals}, steering=beside), NOTHING
    if isinstance(event, Commanded):
        return _commanded(rules, run, event)
    if isinstance(event, CommandMoved):
        return _moved(rules, run, event), NOTHING
    if isinstance(event, Proposed):
        return run._replace(seq=seq, steering=steering.proposed(run.steering, event, seq)), NOTHING
    if isinstance(event, Judged):
        return run._replace(seq=seq, steering=steering.judged(run.steering, event)), NOTHING
    _check_attempt(run, event.attempt)
    if isinstance(event, Declared):
        return run._replace(seq=seq, steering=steering.declared(run.steering, event)), NOTHING
    if isinstance(event, Applied):
        last = event.receipts[-1]
        receipts = run.in_force
        if APPLIED in rules.policy.reads(rules.config):
            receipts = (*receipts, *((r.step, r.decided) for r in event.receipts))[-IN_FORCE_KEPT:]
        return run._replace(
            seq=seq,
            receipts_through=last.number,
            applied=last.settings,
            applied_step=last.step,
            in_force=receipts,
            steering=steering.applied(run.steering, event),
        ), NOTHING
    if isinstance(event, DirectiveAnswered):
        answered = (*run.answered, event.directive)[-ANSWERS_KEPT:]
        return run._replace(seq=seq, answered=answered, steering=steering.answered(run.steering, event)), NOTHING
    assert isinstance(event, Ended)
    return run._replace(seq=seq, status=event.outcome), _ended(rules, run)


def fresh(run: Run, event: Observed) -> Observed | None:
    """The part of `event` that is not folded yet; None where there is none (rule 3)."""
    steps = event.steps
    if not steps or steps[-1] <= run.through:
        return None
    if steps[0] > run.through:
        return event
    cut = next(i for i, step in enumerate(steps) if step > run.through)
    return Observed(event.attempt, steps[cut:], {name: column[cut:] for name, column in event.signals.items()})


def _check_attempt(run: Run, attempt: int) -> None:
    if attempt != run.attempt:
        raise Conflict(
            f"attempt {attempt} is not the newest one ({run.attempt}): another process has taken the run over"
        )
    if run.status != "active":
        raise Conflict(f"attempt {attempt} has ended ({run.status}): attach with resume to open a new one")


def _attached(rules: Rules, run: Run, event: Attached) -> Run:
    if event.attempt != run.attempt + 1:
        raise Conflict(f"the next attempt is {run.attempt + 1}, not {event.attempt}: read the run again")
    if event.from_step <= run.through and event.restored is None:
        raise Invalid(f"from_step {event.from_step} lies behind step {run.through} and no state was restored")
    seq, attempts = run.seq + 1, (*run.attempts, (event.from_step, run.seq + 1, event.parent))
    if event.restored is not None:
        run = _gone_back(rules, run, load(rules, event.restored))
    # A base schedule may stand elsewhere at from_step than behind the last folded step (a gap). Nothing is decided
    # here, so the rate limits do not move.
    base, momentum = _base(rules, event.from_step)
    lr = guard.held(rules.limits, run.guard_state, rules.groups, base, event.from_step - 1)
    momentum = run.settings.momentum if momentum is None else momentum
    settings = Settings(lr, momentum, run.settings.noise_std)
    if run.steering.commands or run.steering.whole:
        settings = _settled(rules, run.steering, run.guard_state, run.decision, event.from_step - 1)
    return run._replace(
        seq=seq,
        attempts=attempts,
        attempt=event.attempt,
        status="active",
        session=event.session,
        from_step=event.from_step,
        through=event.from_step - 1,
        lag=event.lag,
        settings=settings,
        decided=event.from_step - 1,
        receipts_through=0,
        answered=(),
        applied=None,
        applied_step=None,
        in_force=(),
        steering=run.steering._replace(unsettled=False),
    )


def _gone_back(rules: Rules, run: Run, restored: Run) -> Run:
    """The restored state under what was commanded since: commands are no part of training time."""
    beside = run.steering._replace(rollbacks=run.steering.rollbacks + 1)
    before = _plan(restored)
    restored = restored._replace(steering=beside)
    if _plan(restored) == before:
        return restored
    return _switched(_under(rules, before), rules, restored, restored.through)


def _plan(run: Run) -> str:
    return run.steering.plans[-1][1] if run.steering.plans else ""


def _under(rules: Rules, plan: str) -> Rules:
    """The rules under a plan ("": those of the specification). A shadow's have no `under`: it gets no commands."""
    return rules if rules.under is None else rules.under(plan)._replace(shadows=rules.shadows)


def _commanded(rules: Rules, run: Run, event: Commanded) -> tuple[Run, Outcome]:
    """A command, with what it changes and what the guard left of it."""
    seq, before = run.seq + 1, run.settings.lr
    held, clamped = _held(rules, run, event)
    clamped = clamped or bool(event.args.get("clamped"))
    old = run.steering.plans
    beside = steering.commanded(run.steering, event, seq, held, clamped)
    run = run._replace(seq=seq, steering=beside)
    carried: tuple[str, ...] = ()
    if beside.plans is not old:
        after = ruling(rules, run)
        run = _switched(rules, after, run, run.through)
        carried, rules = _carried(rules, after), after
    run = _resettled(rules, run)
    if event.kind in ("note", *commands.DIRECTIVES):
        return run, Outcome((), (), verdict={"status": "accepted"})
    # What it supersedes goes with events of its own, just behind this one.
    over = commands.superseded(beside.commands[:-1], event.kind, event.args)
    left = beside._replace(commands=tuple([one for one in beside.commands if one.id not in over]))
    now = _settled(rules, left, run.guard_state, run.decision, run.through)
    verdict: dict[str, Any] = {"status": "clamped" if clamped else "accepted", "lr": list(now.lr)}
    if held is not None:
        verdict["held"] = {n: v for n, v in finite(held._asdict()).items() if v not in (None, {}, False)}
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
    now = _settled(rules, beside, run.guard_state, run.decision, step)
    values = commands.control_values(beside.controls, beside.commands, step + 1)
    if event.kind == "hold":
        return commands.hold(now, rules.groups, values), False
    free = _settled(rules, beside._replace(commands=()), run.guard_state, run.decision, step)
    base, _ = _base(rules, step + 1)
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


def _moved(rules: Rules, run: Run, event: CommandMoved) -> Run:
    return _resettled(rules, run._replace(seq=run.seq + 1, steering=steering.moved(run.steering, event)))


def _switched(was: Rules, rules: Rules, run: Run, step: int) -> Run:
    """The run under other rules from here on. Another policy begins where the one before it stands: at its learning
    rates, or, where the base schedule is another one, at the references that it multiplies."""
    if was.policy is rules.policy and was.config == rules.config and _spec(was.base) == _spec(rules.base):
        return run  # only the limits are others
    if _spec(was.base) == _spec(rules.base):
        lr = run.decision.lr
    elif rules.base is None:
        lr = guard.held(was.limits, run.guard_state, was.groups, _base(was, step + 1)[0], step)
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


def _settled(rules: Rules, beside: Steering, guard_state: guard.GuardState, decision: Decision, step: int) -> Settings:
    """The settings of step + 1 where nothing new is decided."""
    base, momentum = _base(rules, step + 1)
    lr = guard.held(rules.limits, guard_state, rules.groups, base, step)
    momentum = momentum if decision.momentum is None else decision.momentum
    return _bent(rules, beside, step, Settings(lr, momentum, decision.noise_std))


def _bent(rules: Rules, beside: Steering, step: int, settings: Settings) -> Settings:
    """The settings of step + 1 under the run's commands."""
    if beside.whole and settings.momentum is None:
        settings = settings._replace(momentum=commands.own_momentum(rules.groups))
    return commands.bent(rules.limits, rules.groups, beside.commands, step + 1, settings)


def _resettled(rules: Rules, run: Run) -> Run:
    """The run with what its commands make of the settings; with a lag that is left to the next observation."""
    if run.lag is not None:
        return run._replace(steering=run.steering._replace(unsettled=True))
    settings = _settled(rules, run.steering, run.guard_state, run.decision, run.through)
    return run if settings == run.settings else run._replace(settings=settings, decided=run.through)


def _ended(rules: Rules, run: Run) -> Outcome:
    finish = rules.policy.finish
    last = None if finish is None else finish(rules.config, run.policy_state)
    if last is None:
        return NOTHING
    lr = run.settings.lr
    return Outcome((), (Mark(run.through, last.phase, last.code, "", lr, lr, last.fields),))


def _observed(rules: Rules, run: Run, event: Observed) -> tuple[Run, Outcome]:
    _check_attempt(run, event.attempt)
    new = fresh(run, event)
    if new is None:
        return run, NOTHING
    steps = new.steps
    policy_step, config = rules.policy.step, rules.config
    state, decision, settings = run.policy_state, run.decision, run.settings
    lr, momentum, noise_std = decision.lr, decision.momentum, decision.noise_std
    guard_state, decided = run.guard_state, run.decided
    beside = run.steering
    steered = beside.unsettled or beside.whole or bool(commands.lasting(beside.commands))
    quiet = not steered and rules.base is None and guard.is_quiet(rules.limits, run.through)
    free = not steered and rules.base is None and guard.is_free(rules.limits)
    changes: list[tuple[int, Settings]] = []
    marks: list[Mark] = []
    asks: list[Ask] = []
    receipts, applied = in_force(run.in_force, steps)
    reads = rules.policy.reads(config)
    rollbacks = beside.rollbacks if ROLLBACKS in reads else 0
    for seen in observations(steps, new.signals, run.side, reads, applied, rollbacks):
        before = decision.code
        if seen.applied is not None and seen.applied >= decided:
            seen = seen._replace(applied=seen.step - 1)  # nothing decided since then has changed the settings
        state, decision = policy_step(config, state, seen)
        if decision.asks:
            beside, new_asks = steering.asked(beside, decision.asks, run.seq + 1, len(asks))
            asks += new_asks
            decision = decision._replace(asks=(), milestone=True)
        # Identity first: a policy that did not move returns the same objects, and then there is nothing to do.
        if (
            quiet
            and decision.lr is lr
            and decision.momentum is momentum
            and decision.noise_std is noise_std
            and not decision.milestone
        ):
            continue
        step, note = seen.step, guard_state.note
        if free:
            guard_state, now = guard.settle_free(guard_state, rules.groups, step, decision)
        else:
            guard_state, now = settle(rules, guard_state, step, decision)
        if steered:
            now = _bent(rules, beside, step, now)
        moved = (decision.lr, decision.momentum, decision.noise_std) != (lr, momentum, noise_std)
        if decision.milestone or (moved and decision.code != before) or guard_state.note not in ("", note):
            note = guard_state.note
            marks.append(Mark(step, decision.phase, decision.code, note, settings.lr, now.lr, decision.fields))
        lr, momentum, noise_std = decision.lr, decision.momentum, decision.noise_std
        if now != settings:
            settings, decided = now, step
            changes.append((step, now))
    if not changes or changes[0][0] != steps[0]:
        changes.insert(0, (steps[0], run.settings))
    run = Run(
        run.seq + 1,
        run.attempts,
        run.attempt,
        run.status,
        run.session,
        run.from_step,
        steps[-1],
        run.lag,
        state,
        decision,
        guard_state,
        settings,
        decided,
        {} if run.side else run.side,
        newest(run.last, new.signals, run.side),
        run.observations + len(steps),
        run.receipts_through,
        run.answered,
        run.applied,
        run.applied_step,
        receipts,
        run.shadows,
        beside._replace(unsettled=False) if beside.unsettled else beside,
    )
    return run, Outcome(tuple(changes), tuple(marks), asks=tuple(asks))


def settle(rules: Rules, state: guard.GuardState, step: int, decision: Decision) -> tuple[guard.GuardState, Settings]:
    """guard(policy(base)) for the step after `step`."""
    base, momentum = _base(rules, step + 1)
    if momentum is not None and decision.momentum is None:
        decision = decision._replace(momentum=momentum)
    return guard.settle(rules.limits, state, rules.groups, base, step, decision)


def _base(rules: Rules, step: int) -> tuple[tuple[float, ...] | None, tuple[float | None, ...] | None]:
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


def dump(run: Run) -> dict[str, Any]:
    """The run as plain JSON values: what snapshots and rewinds carry. `load` gives back an equal run."""
    data = run._asdict()
    data["attempts"] = [list(attempt) for attempt in run.attempts]
    data["policy_state"] = dump_state(run.policy_state)
    data["decision"] = finite(run.decision[:7])
    data["guard_state"] = list(run.guard_state)
    data["settings"] = list(run.settings)
    data["in_force"] = [list(pair) for pair in run.in_force]
    # JSON has no NaN; the newest signals and what was read back from an optimizer may well be one.
    data["applied"] = None if run.applied is None else [_texts(row) for row in run.applied]
    data["last"] = {name: repr(value) for name, value in run.last.items()}
    data["side"] = {name: repr(value) for name, value in run.side.items()}
    if data.pop("shadows"):  # a run without any is dumped as it was before there were shadows
        data["shadows"] = [dump(shadow) for shadow in run.shadows]
    if data.pop("steering") != commands.NONE:
        data["steering"] = steering.dump(run.steering)
    return data


def load(rules: Rules, data: Mapping[str, Any]) -> Run:
    """The run that `dump` wrote, after any trip through JSON."""
    lr, momentum, noise_std, phase, code, fields, milestone, *_ = data["decision"]
    beside = steering.load(data.get("steering"))
    rules = _under(rules, beside.plans[-1][1] if beside.plans else "")
    factors, changed, window, window_factors, note = data["guard_state"]
    return Run(
        **{
            **data,
            "answered": tuple(data["answered"]),
            "in_force": tuple((step, decided) for step, decided in data["in_force"]),
            "attempts": tuple((from_step, seq, parent) for from_step, seq, parent in data["attempts"]),
            "policy_state": load_state(rules.policy, data["policy_state"]),
            "decision": Decision(tuple(lr), _tuple(momentum), _tuple(noise_std), phase, code, fields, milestone),
            "guard_state": guard.GuardState(tuple(factors), changed, window, tuple(window_factors), note),
            "settings": _settings_of(data["settings"]),
            "applied": None if data["applied"] is None else _numbers_of(data["applied"]),
            "last": {name: float(value) for name, value in data["last"].items()},
            "side": {name: float(value) for name, value in data["side"].items()},
            "shadows": tuple(load(r, d) for r, d in zip(rules.shadows, data.get("shadows", ()), strict=True)),
            "steering": beside,
        }
    )


def _settings_of(data: Sequence[Any]) -> Settings:
    lr, momentum, noise_std = data
    return Settings(tuple(lr), _tuple(momentum), _tuple(noise_std))


def _texts(row: Sequence[float | None] | None) -> list[str | None] | None:
    return None if row is None else [None if value is None else repr(value) for value in row]


def _numbers(row: Sequence[str | None] | None) -> tuple[Any, ...] | None:
    return None if row is None else tuple(None if value is None else float(value) for value in row)


def _numbers_of(data: Sequence[Any]) -> Settings:
    lr, momentum, noise_std = map(_numbers, data)
    return Settings(lr or (), momentum, noise_std)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
