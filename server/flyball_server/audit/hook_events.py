"""What a committed change of a run has to tell others: events out of events.

Rule of this module: pure, and cheap where there is nothing to tell, which is nearly always. A cause of conflict is told
once, and not at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flyball_server.audit import wording
from flyball_server.core import commands
from flyball_server.core.events import (
    Applied,
    Commanded,
    CommandMoved,
    DirectiveAnswered,
    Ended,
    Event,
    Judged,
    Observed,
    Outcome,
    Proposed,
)
from flyball_server.core.numbers import finite
from flyball_server.core.run import Run


class Told(NamedTuple):
    """One thing to tell. place: among those of its row. data: what stands beside the envelope."""

    event: str
    seq: int
    place: int
    text: str
    data: dict[str, Any]


def told(before: Run, events: Sequence[Event], outcomes: Sequence[Outcome]) -> Iterator[Told]:
    """What the events told, which were folded into `before`, one row each."""
    for seq, (event, outcome) in enumerate(zip(events, outcomes, strict=True), before.seq + 1):
        for place, (name, text, data) in enumerate(_of(before, seq, event, outcome)):
            yield Told(name, seq, place, text, data)


def _of(before: Run, seq: int, event: Event, outcome: Outcome) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for mark in outcome.marks:
        if "spike" in mark.code:
            data = {
                "step": mark.step, "phase": mark.phase, "decision": mark.code, "lr_before": list(mark.before),
                "lr_after": list(mark.after), "fields": finite(mark.fields),
            }  # fmt: skip
            yield "spike", f"{mark.code} at step {mark.step}", data
    if isinstance(event, Observed):
        for i, ask in enumerate(outcome.asks):
            data = {"command": f"a{seq}.{i}", "kind": ask.kind, "status": "accepted", "actor": "policy"}
            yield "command", f"the policy asks for {ask.kind}: {ask.reason}", {**data, "reason": ask.reason}
    elif isinstance(event, Applied):
        known = {words for words, *_ in before.steering.conflicts}
        for receipt in event.receipts:
            if receipt.conflict and receipt.conflict not in known:
                known.add(receipt.conflict)
                data = {"step": receipt.step, "attempt": event.attempt, "conflict": receipt.conflict}
                yield "conflict", f"{receipt.conflict}, at step {receipt.step}", data
    elif isinstance(event, Ended):
        yield "ended", f"ended, {event.outcome}", {"outcome": event.outcome, "attempt": event.attempt}
    elif not isinstance(event, Commanded | CommandMoved | DirectiveAnswered | Proposed | Judged):
        return
    elif isinstance(event, Commanded):
        verdict = outcome.verdict or {}
        status, left = str(verdict.get("status", "accepted")), wording.clamped(event.args, verdict)
        data = {"command": f"c{seq}", "kind": event.kind, "status": status, **_left(left[4:]), **_who(event)}
        yield "command", f"{wording.asked(event.kind, event.args)}, {status}{left}: {event.reason}", data
    elif isinstance(event, CommandMoved):
        data = _known(before, event.command, event.status)
        if event.status == "applied":
            data |= {"step": event.step, "ranks": event.ranks, "of_ranks": event.of_ranks}
        moved = {**event._asdict(), "clamped_to": data.get("clamped_to", "")}
        yield "command", wording.text("command_moved", moved), data
    elif isinstance(event, DirectiveAnswered):
        data = {**_known(before, event.directive, event.outcome), "note": event.note, "step": event.step}
        yield "command", wording.text("directive_answered", event._asdict()), data
    elif isinstance(event, Proposed):
        data = {"proposal": f"p{seq}", "kind": event.kind, "status": "proposed", "needed": event.needed, **_who(event)}
        yield "proposal", wording.text("proposed", event._asdict()), data
    else:
        yield "proposal", *_judged(before, event)


def _judged(before: Run, event: Judged) -> tuple[str, dict[str, Any]]:
    """A proposal that is approved by some of those it takes is still one."""
    known = next((one for one in before.steering.proposals if one.id == event.proposal), None)
    data: dict[str, Any] = {
        "proposal": event.proposal,
        "status": event.verdict,
        "actor": event.actor,
        "reason": event.reason,
    }
    if known is None or event.verdict != "approved":
        return wording.text("judged", event._asdict()), data
    n = len(known.approved) + 1
    data |= {"status": "approved" if n >= known.needed else "proposed", "approved": n, "needed": known.needed}
    return f"proposal {event.proposal} approved {n} of {known.needed} by {event.actor}: {event.reason}", data


def _who(event: Commanded | Proposed) -> dict[str, Any]:
    return {"actor": event.actor, "reason": event.reason, "args": finite(wording.slim(event.args))}


def _known(before: Run, command: str, status: str) -> dict[str, Any]:
    """What is known of a command that goes on."""
    found = next((one for one in before.steering.commands if one.id == command), None)
    if found is None:
        return {"command": command, "status": status}
    held = None if found.held is None else found.held._asdict()
    left = commands.clamped_to(found.args, held) if found.clamped else ""
    more = {"kind": found.kind, "actor": found.actor, "reason": found.reason}
    return {"command": command, "status": status, **_left(left), **more}


def _left(clamped_to: str) -> dict[str, str]:
    """What the guard left of a command, where that was not all."""
    return {"clamped_to": clamped_to} if clamped_to else {}
