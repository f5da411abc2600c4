"""The part of the fold that is about commands: what each event of theirs makes of a run.

Rule of this module: it changes a run's `steering` and nothing else; what follows for the settings says `run.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flyball_server.core import commands
from flyball_server.core.commands import Command, Control, Held, Proposal, Steering
from flyball_server.core.errors import Conflict
from flyball_server.core.events import (
    Applied,
    Commanded,
    CommandMoved,
    Declared,
    DirectiveAnswered,
    Judged,
    Proposed,
    Reported,
)
from flyball_server.core.types import Answered, Ask

#: Who asks, where the run's own policy does.
POLICY = "policy"


def declared(steering: Steering, event: Declared) -> Steering:
    """Controls, the newest declaration of a name counting."""
    kept = {control.name: control for control in (*steering.controls, *event.controls)}
    return steering._replace(controls=tuple(kept.values()))


def commanded(steering: Steering, event: Commanded, seq: int, held: Held | None, clamped: bool) -> Steering:
    """A command is accepted, in the place of those it supersedes; what it releases was told by events of their own."""
    command = Command(
        f"c{seq}", event.kind, seq, event.actor, event.reason, "clamped" if clamped else "accepted", event.args,
        event.until, event.expires_at, held, clamped,
    )  # fmt: skip
    over = commands.superseded(steering.commands, event.kind, event.args)
    kept = tuple([one for one in steering.commands if one.id not in over]) if over else steering.commands
    open_ = kept if event.kind == "note" else (*kept, command)
    keys = (*steering.keys, (event.key, command.id))[-commands.KEYS_KEPT :] if event.key else steering.keys
    plans = steering.plans
    if event.kind in commands.RULING:
        plans = (*plans, (seq, plan_text(event.args)))[-commands.PLANS_KEPT :]
    whole = steering.whole or (event.kind != "note" and (event.kind in commands.RULING or _is_about_momentum(held)))
    newest = steering.newest if event.kind == "note" else seq
    return steering._replace(commands=open_, keys=keys, plans=plans, whole=whole, newest=newest)


def plan_text(args: Mapping[str, Any]) -> str:
    """The rules that a command with these arguments puts in force, as JSON."""
    return json.dumps(args["plan"], sort_keys=True)


def _is_about_momentum(held: Held | None) -> bool:
    return held is not None and held.momentum is not None


def moved(steering: Steering, event: CommandMoved) -> Steering:
    """A command goes on. Raises Conflict where it is not open."""
    known = next((command for command in steering.commands if command.id == event.command), None)
    if known is None:
        raise Conflict(f"command {event.command} is over already, or was never given")
    stays = event.status == "applied" and known.kind in commands.LASTING
    steering = _settled_ask(_told(steering, known, "declined", event.status), known)
    rest = [command for command in steering.commands if command is not known or stays]
    now = tuple([command._replace(status=event.status) if command is known else command for command in rest])
    return steering._replace(commands=now)


def answered(steering: Steering, event: DirectiveAnswered) -> Steering:
    """The job did what it was asked for, or declined."""
    known = next((c for c in steering.commands if c.id == event.directive), None)
    if known is None or known.kind not in commands.DIRECTIVES:  # nothing else is the job's to end
        return steering
    steering = _told(steering, known, event.outcome, event.note)
    steering = _settled_ask(steering, known) if event.outcome == "declined" else steering
    return steering._replace(commands=tuple([c for c in steering.commands if c is not known]))


def _settled_ask(steering: Steering, known: Command) -> Steering:
    """The policy's wish to go back is over where the job declines, or somebody withdraws it."""
    return steering._replace(restoring=False) if known.kind == "restore" and _is_ask(known) else steering


def _is_ask(command: Command) -> bool:
    return command.id.startswith("a")


def _told(steering: Steering, known: Command, outcome: str, note: str) -> Steering:
    """What became of an ask, for the policy that asked. Not every policy reads it: see `unread`."""
    if not _is_ask(known):
        return steering
    tag = str(known.args.get("tag", ""))
    kept = [one for one in steering.answers if (one.kind, one.tag) != (known.kind, tag)]
    kept.append(Answered(known.kind, tag, outcome, note, known.args))
    return steering._replace(answers=tuple(kept[-commands.POLICY_ANSWERS_KEPT :]))


def unread(steering: Steering) -> Steering:
    """Without the answers that no policy reads."""
    return steering._replace(answers=()) if steering.answers else steering


def attached(steering: Steering, *, returning: bool) -> Steering:
    """A new attempt begins. Where it is not the one that the policy asked for, another process may be at work, which
    knows nothing of a checkpoint that was only kept in memory."""
    if returning or not steering.answers:
        return steering
    return steering._replace(answers=tuple([one for one in steering.answers if one.kind != "checkpoint"]))


def gone_back(steering: Steering) -> Steering:
    """The run goes back to an earlier step: what the policy asked for on the steps it leaves is done, or means nothing
    any more."""
    if steering.restoring:
        asked = next((c for c in steering.commands if c.kind == "restore" and _is_ask(c)), None)
        steering = steering if asked is None else _told(steering, asked, "returned", "")
    kept = tuple([command for command in steering.commands if not _is_ask(command)])
    return steering._replace(commands=kept, restoring=False, rollbacks=steering.rollbacks + steering.restoring)


def other_policy(steering: Steering) -> Steering:
    """Another policy is in force: what the one before it asked for, and what came of it, is not its own."""
    return gone_back(steering)._replace(rollbacks=0, answers=())


def applied(steering: Steering, event: Applied) -> Steering:
    """Receipts: what they confirm, the controls' values, and who else wrote."""
    last = event.receipts[-1]
    confirmed = max(steering.confirmed, *(r.confirms for r in event.receipts))
    found = tuple([(r.conflict, r.step, event.attempt) for r in event.receipts if r.conflict])
    conflicts = (*steering.conflicts, *found)[-commands.CONFLICTS_KEPT :] if found else steering.conflicts
    values = dict(last.controls) or steering.applied_controls
    if (confirmed, conflicts, values) == (steering.confirmed, steering.conflicts, steering.applied_controls):
        return steering
    return steering._replace(confirmed=confirmed, conflicts=conflicts, applied_controls=values)


def reported(steering: Steering, event: Reported, seq: int) -> Steering:
    """A reporter's count, and what a repeated request is known by."""
    if event.key:
        keys = (*steering.keys, (event.key, f"r{seq}"))[-commands.KEYS_KEPT :]
        steering = steering._replace(keys=keys)
    source, number = event.source, event.number
    if not source:
        return steering
    counts = {name: count for name, count in steering.reporters.items() if name != source}
    counts = dict([*counts.items(), (source, number)][-commands.REPORTERS_KEPT :])
    return steering._replace(reporters=counts)


def asked(steering: Steering, asks: tuple[Ask, ...], seq: int, before: int) -> tuple[Steering, tuple[Ask, ...]]:
    """What the policy itself asks of the job, each kind once, without what waits for an answer already. before: how
    many it asked in this row already."""
    waiting = {command.kind for command in steering.commands}
    new = tuple([ask for kind, ask in {ask.kind: ask for ask in reversed(asks)}.items() if kind not in waiting])[::-1]
    if not new:
        return steering, ()
    found = [
        Command(f"a{seq}.{i}", ask.kind, seq, POLICY, ask.reason, "accepted", ask.args)
        for i, ask in enumerate(new, before)
    ]
    restoring = steering.restoring or any(ask.kind == "restore" for ask in new)
    return steering._replace(commands=(*steering.commands, *found), restoring=restoring), new


def proposed(steering: Steering, event: Proposed, seq: int) -> Steering:
    """Somebody proposes a command."""
    proposal = Proposal(
        f"p{seq}", event.kind, seq, event.actor, event.reason, event.args, event.needed, (), event.until,
        event.expires_at,
    )  # fmt: skip
    keys = (*steering.keys, (event.key, proposal.id))[-commands.KEYS_KEPT :] if event.key else steering.keys
    return steering._replace(proposals=(*steering.proposals, proposal), keys=keys)


def judged(steering: Steering, event: Judged) -> Steering:
    """One more approves, or the proposal is over. Raises Conflict where it is not open, and for one person twice."""
    known = next((one for one in steering.proposals if one.id == event.proposal), None)
    if known is None:
        raise Conflict(f"proposal {event.proposal} is over already, or was never made")
    if event.verdict == "approved" and event.actor in known.approved:
        raise Conflict(f"proposal {event.proposal} was approved by {event.actor} already: it takes somebody else")
    approved, needed = (*known.approved, event.actor), max(known.needed, event.needed)
    if event.verdict == "approved" and len(approved) < needed:
        waiting = known._replace(approved=approved, needed=needed)
        kept = [waiting if one is known else one for one in steering.proposals]
    else:
        kept = [one for one in steering.proposals if one is not known]
    return steering._replace(proposals=tuple(kept))


def dump(steering: Steering) -> dict[str, Any]:
    """As plain JSON values; `load` gives back an equal one."""
    data = steering._asdict()
    data["commands"] = [{**c._asdict(), "held": None if c.held is None else c.held._asdict()} for c in data["commands"]]
    data["proposals"] = [p._asdict() for p in data["proposals"]]
    data["controls"] = [list(c) for c in data["controls"]]
    # What a job reads back may be no finite number, which JSON cannot carry.
    data["applied_controls"] = {name: repr(value) for name, value in data["applied_controls"].items()}
    # Most runs have none, and are written as before there were any.
    answers = [list(one) for one in data.pop("answers")]
    return {**data, "answers": answers} if answers else data


def load(data: Mapping[str, Any] | None) -> Steering:
    """What `dump` wrote, after any trip through JSON."""
    if data is None:
        return commands.NONE
    return Steering(
        **{
            **data,
            "commands": tuple([_command(one) for one in data["commands"]]),
            "plans": tuple([(seq, plan) for seq, plan in data["plans"]]),
            "controls": tuple([Control(*one) for one in data["controls"]]),
            "proposals": tuple([Proposal(**{**one, "approved": tuple(one["approved"])}) for one in data["proposals"]]),
            "keys": tuple([(key, command) for key, command in data["keys"]]),
            "conflicts": tuple([(words, step, attempt) for words, step, attempt in data["conflicts"]]),
            "applied_controls": {name: float(value) for name, value in data["applied_controls"].items()},
            "answers": tuple([Answered(*one) for one in data.get("answers", ())]),
        }
    )


def _command(data: Mapping[str, Any]) -> Command:
    held = data["held"]
    if held is not None:
        rows = {name: None if held[name] is None else tuple(held[name]) for name in ("lr", "momentum", "noise_std")}
        held = Held(**{**held, **rows})
    return Command(**{**data, "held": held})
