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

What a run is stands in `folded.py`, how a decision becomes settings in `settling.py`, what commands do in `obeying.py`,
and its JSON in `run_json.py`.
"""

from __future__ import annotations

from flyball_server.core import guard, steering
from flyball_server.core.columns import in_force, newest, observations
from flyball_server.core.commands import NONE, Steering, lasting
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
from flyball_server.core.folded import ANSWERS_KEPT, IN_FORCE_KEPT, NOTHING, Rules, Run, ruling
from flyball_server.core.obeying import commanded, gone_back, moved
from flyball_server.core.run_json import dump, load
from flyball_server.core.settling import base_at, bent, settle, settled
from flyball_server.core.types import ANSWERS, APPLIED, ROLLBACKS, Ask, Settings

__all__ = [
    "ANSWERS_KEPT",
    "NOTHING",
    "Rules",
    "Run",
    "apply",
    "create",
    "dump",
    "fresh",
    "load",
    "ruling",
    "settle",
]


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
    settings = left.settings
    if "steering" in origin.state:  # what was commanded there is not commanded here
        settings = settled(rules, NONE, left.guard_state, left.decision, through)
    return run._replace(
        policy_state=left.policy_state, decision=left.decision, guard_state=left.guard_state, settings=settings
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
        beside = steering.reported(run.steering, event, seq)
        return run._replace(seq=seq, side={**run.side, **event.signals}, steering=beside), NOTHING
    if isinstance(event, Commanded):
        return commanded(rules, run, event)
    if isinstance(event, CommandMoved):
        run = moved(rules, run, event)
        return run._replace(steering=_read(rules, run.steering)), NOTHING
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
        beside = steering.answered(run.steering, event)
        return run._replace(seq=seq, answered=answered, steering=_read(rules, beside)), NOTHING
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
    returning = run.steering.restoring and event.restored is not None
    if event.restored is not None:
        run = gone_back(rules, run, load(rules, event.restored))
    # A base schedule may stand elsewhere at from_step than behind the last folded step (a gap). Nothing is decided
    # here, so the rate limits do not move.
    base, momentum = base_at(rules, event.from_step)
    lr = guard.held(rules.limits, run.guard_state, rules.groups, base, event.from_step - 1)
    momentum = run.settings.momentum if momentum is None else momentum
    settings = Settings(lr, momentum, run.settings.noise_std)
    if run.steering.commands or run.steering.whole or "steering" in (event.restored or {}):
        settings = settled(rules, run.steering, run.guard_state, run.decision, event.from_step - 1)
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
        steering=steering.attached(_read(rules, run.steering), returning=returning)._replace(unsettled=False),
    )


def _read(rules: Rules, beside: Steering) -> Steering:
    """Answers to what the policy asked are kept only for one that reads them."""
    return beside if ANSWERS in rules.policy.reads(rules.config) else steering.unread(beside)


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
    # With a lag these decisions are of later steps, and it is those that a command holds for, or not any more.
    beside, ahead = run.steering, run.lag or 0
    steered = beside.unsettled or beside.whole or bool(lasting(beside.commands))
    quiet = not steered and rules.base is None and guard.is_quiet(rules.limits, run.through)
    free = not steered and rules.base is None and guard.is_free(rules.limits)
    changes: list[tuple[int, Settings]] = []
    marks: list[Mark] = []
    asks: list[Ask] = []
    receipts, applied = in_force(run.in_force, steps)
    reads = rules.policy.reads(config)
    rollbacks = beside.rollbacks if ROLLBACKS in reads else 0
    answers = beside.answers if ANSWERS in reads else ()
    for seen in observations(steps, new.signals, run.side, reads, applied, rollbacks, answers):
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
            now = bent(rules, beside, step + ahead, now)
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
