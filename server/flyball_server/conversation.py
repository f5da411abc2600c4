"""A driver's conversation in values: what of a report is new to the run, and what the driver is told.

Rule of this module: it looks at a run and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flyball_server.checks import check_room, checked_receipt
from flyball_server.core import run as fold
from flyball_server.core.commands import CONFIRMED, DIRECTIVES, RULING, Command, control_values
from flyball_server.core.events import (
    Applied,
    CommandMoved,
    Declared,
    DirectiveAnswered,
    Ended,
    Event,
    Judged,
    Observed,
    Receipt,
)
from flyball_server.core.run import Run
from flyball_server.core.types import Group, Settings
from flyball_server.live import LiveRun
from flyball_server.messages import Advice, Attached, Directive, Report
from flyball_server.rules import spec_under

#: The id of what a policy asked.
_ASKED = re.compile(r"a[0-9]{1,16}\.[0-9]{1,3}")


def new_events(run: Run, request: Report, groups: Sequence[Group]) -> list[Event]:
    """The part of a report that is not in the run yet."""
    check_room(run, request.signals)
    events: list[Event] = []
    observed = fold.fresh(run, Observed(request.attempt, request.steps, request.signals))
    receipts = tuple(checked_receipt(r, groups) for r in request.receipts if r.number > run.receipts_through)
    if receipts:  # first: a policy may ask what was in force at an observation
        events.append(Applied(request.attempt, receipts))
    if observed is not None:
        events.append(observed)
    events += _answers(run, request)
    declared = tuple(control for control in request.controls if control not in run.steering.controls)
    if declared:
        events.append(Declared(request.attempt, declared))
    events += moves(run, receipts, run.through if observed is None else observed.steps[-1])
    if request.end and run.status == "active":
        events.append(Ended(request.attempt, request.end))
    return events


def _answers(run: Run, request: Report) -> list[DirectiveAnswered]:
    """The answers to what the job was asked, each once; of anything else it has no say."""
    asked = {command.id for command in run.steering.commands if command.kind in DIRECTIVES}
    new = {answer.directive: answer for answer in reversed(request.answers) if answer.directive not in run.answered}
    # A policy's own asking may be over by the time its answer comes: going back ends it.
    return [answer for one, answer in reversed(new.items()) if one in asked or _ASKED.fullmatch(one)]


def moves(run: Run, receipts: Sequence[Receipt], through: int) -> list[CommandMoved]:
    """What receipts, and the steps up to `through`, make of the commands that are not over."""
    found = []
    for command in run.steering.commands:
        confirming = next((r for r in receipts if command.seq <= r.confirms), None) if _awaits(command) else None
        if confirming is not None:
            ranks = confirming.ranks
            of_ranks = confirming.of_ranks or ranks
            found.append(CommandMoved(command.id, "applied", confirming.step, ranks, of_ranks, confirming.conflict))
        if command.until is not None and through + 1 >= command.until:
            found.append(CommandMoved(command.id, "expired", command.until))
    return found


def overdue(run: Run, now: int) -> list[Event]:
    """The ends of the commands and proposals whose time is over; now: microseconds since 1970 UTC."""
    commands, proposals = run.steering.commands, run.steering.proposals
    if not commands and not proposals:
        return []
    ended: list[Event] = [CommandMoved(c.id, "expired") for c in commands if c.expires_at and c.expires_at <= now]
    over = [p.id for p in proposals if p.expires_at and p.expires_at <= now]
    return [*ended, *(Judged(one, "expired", "service", "its time is over") for one in over)]


def _awaits(command: Command) -> bool:
    return command.kind in CONFIRMED and command.status != "applied"


def confirm(run: Run) -> int:
    """The row up to which commands await a receipt; 0 where none does, or where the settings do not show them yet."""
    waiting = [command.seq for command in run.steering.commands if _awaits(command)]
    return 0 if run.steering.unsettled or run.attempt == 0 else max(waiting, default=0)


def attached(live: LiveRun, earlier: Sequence[tuple[int, Settings]]) -> Attached:
    """The answer to an attach. earlier: see `Engine.earlier`."""
    run = live.run
    return Attached(
        run=live.spec.run,
        attempt=run.attempt,
        from_step=run.from_step,
        through=run.through,
        receipts_through=run.receipts_through,
        seq=run.seq,
        digest=live.record.hash.hex(),
        policy=live.ruling.policy.tag,
        decided=run.through,
        settings=run.settings,
        phase=run.decision.phase,
        code=run.decision.code,
        reason=reason(live),
        reference=tuple(g.lr for g in live.spec.groups),
        seed=live.spec.seed,
        guard=spec_under(live.spec, run).guard,
        earlier=earlier,
        controls=values(run),
        confirm=confirm(run),
    )


def values(run: Run) -> dict[str, float]:
    """The declared controls' values from the next step on."""
    return control_values(run.steering.controls, run.steering.commands, run.through + 1)


def advice(live: LiveRun, changes: Sequence[tuple[int, Settings]]) -> Advice:
    """The answer to a report: all changes where decisions belong to steps, else the newest settings."""
    run = live.run
    if run.lag is None or not changes:
        changes = [(run.through, run.settings)]
    waiting = run.steering.commands
    return Advice(
        attempt=run.attempt,
        through=run.through,
        receipts_through=run.receipts_through,
        seq=run.seq,
        digest=live.record.hash.hex(),
        changes=changes,
        phase=run.decision.phase,
        code=run.decision.code,
        reason=reason(live),
        directives=tuple(Directive(c.id, c.kind, c.args) for c in run.steering.commands if c.kind in DIRECTIVES),
        confirm=confirm(run),
        controls=values(run),
        # An empty one would say nothing: where all limits were taken away, that has to be said.
        guard=spec_under(live.spec, run).guard or {"max_lr": None} if _are_new(waiting) else {},
        notices=tuple(_notice(c) for c in waiting if _awaits(c) or c.kind in DIRECTIVES),
    )


def _are_new(commands: Sequence[Command]) -> bool:
    """Whether the job may not know the limits yet."""
    return any(_awaits(command) and command.kind in RULING for command in commands)


def _notice(command: Command) -> str:
    words = command.args.get("words", {})
    of = f" of {words['groups']}" if words.get("groups") else ""  # a control has no groups
    what = f" {words['setting']}{of}: {words['asked']}" if command.kind == "override" else ""
    clamped = f", clamped by the guard to {_held(command)}" if command.status == "clamped" and command.held else ""
    return f"{command.kind} {command.id} by {command.actor}{what}{clamped}: {command.reason}"


def _held(command: Command) -> str:
    """What a clamped override puts in the place of the settings."""
    held = command.held
    assert held is not None
    rows = [row for row in (held.lr, held.momentum, held.noise_std) if row is not None]
    values = [*held.controls.values()] or [value for row in rows for value in row if value is not None]
    return ", ".join(f"x {value:.6g}" if held.relative else f"{value:.6g}" for value in values)


def reason(live: LiveRun) -> str:
    """The newest decision in words; only made where the decision has something to say."""
    decision = live.run.decision
    rules = live.ruling
    return "" if decision.fields is None else rules.policy.explain(rules.config, decision)
