"""The use cases of commands: give one, propose, approve, look, wait, and let what is over end.

Rule of this module: whatever happens to a command is an event of its run, committed before anybody hears of it.

A command of somebody who may only propose becomes a proposal; so does anybody's where the project wants more than one
person. A proposal is checked twice: when it is made, and again, against the run as it is then, when it is approved.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flyball_server import limits, queries
from flyball_server.auth.access import OPERATE, PROPOSE, VIEW, Caller
from flyball_server.commands.capping import Caps, tighten, tightened
from flyball_server.commands.checks import Around, Checked, check_envelope, checked
from flyball_server.commands.log import CommandView, command_of, commands_of
from flyball_server.conversation import overdue
from flyball_server.core import commands
from flyball_server.core import run as fold
from flyball_server.core.commands import Proposal
from flyball_server.core.errors import Ahead, Conflict, Denied, Invalid, NotFound, Stale, SteeringError
from flyball_server.core.events import Commanded, CommandMoved, Event, Judged, Proposed
from flyball_server.core.run import Run
from flyball_server.engine import Engine
from flyball_server.exports.imports import Imports
from flyball_server.fleet.freezing import Freezing
from flyball_server.idempotency import key_of, repeated
from flyball_server.ledger import retried
from flyball_server.live import LiveRun
from flyball_server.messages import CommandRequest
from flyball_server.profiles import Profile
from flyball_server.rules import spec_under
from flyball_server.storage.journal import Journal

_log = logging.getLogger(__name__)


class Projects(Caps, Protocol):
    """What a project says about commands."""

    def capped(self, project: str, guard: Mapping[str, Any], groups: Iterable[str]) -> Mapping[str, Any]:
        """The limits as far as the project and the service let them go, for a run with these groups."""

    def approvals(self, project: str) -> int:
        """How many people a command takes."""


class Given(NamedTuple):
    """A command as it stands after the request, and whether it is the very one of an earlier request."""

    view: CommandView
    repeated: bool


class Commanding:
    """The use cases over one engine and its journal."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        profiles: Mapping[str, Profile],
        projects: Projects | None = None,
        freezing: Freezing | None = None,
        imports: Imports | None = None,
        makers: Callable[[str], Collection[str]] | None = None,
    ) -> None:
        """makers: whoever made an actor's token, directly or not."""
        self._engine = engine
        self._journal = journal
        self._profiles = profiles
        self._projects = projects
        self._freezing = freezing
        self._imports = imports
        self._makers = makers

    async def give(self, request: CommandRequest, caller: Caller) -> Given:
        """Give a run a command, or propose it. The answer comes when the journal has it.

        Raises NotFound, Denied, Invalid, Stale where somebody gave a command that the caller did not know of, Conflict
        where the run has ended or is frozen, Busy.
        """
        caller.check_run(_right(request.kind), request.run)
        request = check_envelope(request)
        await self._look()

        async def once() -> Given:
            live = await self._engine.whole(request.run)
            async with self._engine.turn(live):
                key = key_of(request.key, _content(request), caller)
                known = repeated(live.run, key, request.run)
                if known:
                    return Given(await self._view(live, known), repeated=True)
                self._check_frozen(request.kind, live)
                await self.expire(live)
                _check_expected(live.run, request)
                found = checked(request, self._around(live), self._engine.now_us())
                needed, alone = self._needed(request.kind, live, caller)
                if alone:
                    await self._tighten(request.kind, live)
                seq = live.run.seq + 1
                if alone:
                    events, at = _events(live.run, request, found, caller.actor, key)
                    await self._engine.commit(live, events, caller.actor)
                    return Given(await self._view(live, f"c{seq + at}"), repeated=False)
                _check_proposals(live.run, caller)
                asked = Proposed(
                    request.kind, dict(request.fields), caller.actor, request.reason, needed, key, found.until,
                    found.expires_at,
                )  # fmt: skip
                own = Judged(f"p{seq}", "approved", caller.actor, request.reason)
                await self._engine.commit(live, [asked, own] if caller.may(OPERATE) else [asked], caller.actor)
                return Given(await self._view(live, f"p{seq}"), repeated=False)

        return await retried(once)

    async def preview(self, request: CommandRequest, caller: Caller) -> dict[str, Any]:
        """What `give` would do now: the command is folded in memory, and nothing is written.

        {"status", "before": {group: lr}, "after": the same under the command, "ends": [ids], and what the guard left of
        it: "held", "clamped_to", "carried"}. Raises as `give` does.
        """
        caller.check_run(_right(request.kind), request.run)
        request = check_envelope(request)
        await self._look()

        async def once() -> dict[str, Any]:
            live = await self._engine.whole(request.run)
            async with self._engine.turn(live):
                self._check_frozen(request.kind, live)
                run, now = live.run, self._engine.now_us()
                for event in overdue(run, now):
                    run, _ = fold.apply(live.rules, run, event)
                _check_expected(run, request)
                found = checked(request, self._around(live, run), now)
                run = self._tightened(request.kind, live, run)
                would = _folded(live, run, _events(run, request, found, caller.actor, "")[0])
                if not self._needed(request.kind, live, caller)[1]:
                    would["status"] = "proposed"
                return would

        return await retried(once)

    async def judge(self, run: str, proposal: str, verdict: str, reason: str, caller: Caller) -> CommandView:
        """Approve or reject a proposal ("approved", "rejected"), or take back one's own ("withdrawn"). With the last
        approval that it takes it becomes a command. Raises as `give` does; Denied for one's own proposal."""
        caller.check_run(PROPOSE if verdict == "withdrawn" else OPERATE, run)
        if verdict not in ("approved", "rejected", "withdrawn"):
            raise Invalid(f"verdict is {verdict!r:.40}: give approved, rejected or withdrawn")
        reason = check_envelope(CommandRequest(run, "note", reason, {})).reason
        await self._look()

        async def once() -> CommandView:
            live = await self._engine.whole(run)
            async with self._engine.turn(live):
                await self.expire(live)
                known = next((one for one in live.run.steering.proposals if one.id == proposal), None)
                if known is None:
                    raise NotFound(f"run {run}: proposal {proposal!r:.40} is over already, or was never made")
                if verdict == "withdrawn" and caller.actor != known.actor:
                    raise Denied(f"proposal {proposal} is {known.actor}'s: only they may take it back")
                if verdict == "approved" and caller.actor == known.actor:
                    raise Denied(f"proposal {proposal} is {caller.actor}'s own: it takes somebody else to approve it")
                needed = await self._needed_now(known, live)
                if verdict == "approved" and needed > 1:
                    self._check_second(known, caller)
                more = needed if verdict == "approved" and needed > known.needed else 0
                events: list[Event] = [Judged(proposal, verdict, caller.actor, reason, more)]
                following = proposal
                if verdict == "approved":
                    self._check_frozen(known.kind, live)
                if verdict == "approved" and len(known.approved) + 1 >= needed:
                    request = CommandRequest(run, known.kind, known.reason, known.args)
                    found = checked(request, self._around(live), self._engine.now_us())
                    found = found._replace(expires_at=known.expires_at)
                    await self._tighten(known.kind, live)
                    given, at = _events(live.run, request, found, known.actor, "", proposal)
                    following = f"c{live.run.seq + 2 + at}"
                    events += given
                await self._engine.commit(live, events, caller.actor)
                return await self._view(live, following)

        return await retried(once)

    async def get(self, run: str, command: str, caller: Caller, wait_s: float = 0.0) -> CommandView:
        """One command or proposal; with `wait_s` as soon as it is applied or over, or the time is. Raises NotFound."""
        if not 0 <= wait_s <= limits.WAIT_MAX_S:
            raise Invalid(f"wait_s is {wait_s}: give 0 to {limits.WAIT_MAX_S:.0f} seconds")
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            live = await self._seen(run, caller)
            view = await self._view(live, command)
            left = until - loop.time()
            if left <= 0 or view.settled:
                return view
            await live.changed(min(left, limits.WAIT_POLL_S))

    async def list(self, run: str, caller: Caller, *, after: int, limit: int, open_only: bool) -> dict[str, Any]:
        """The commands and proposals of a run, oldest first, in pages; `next` is the value of `after` for the page
        behind this one, None at the end."""
        if not 1 <= limit <= limits.PAGE_MAX:
            raise Invalid(f"limit is {limit}: give 1 to {limits.PAGE_MAX}")
        live = await self._seen(run, caller)
        found = await queries.in_thread(commands_of, self._journal, live.spec.run, _groups(live))
        views = [view for view in found if view.seq > after and not (open_only and view.over)]
        following = views[limit - 1].seq if len(views) > limit else None
        return {"run": run, "commands": views[:limit], "next": following}

    async def expire(self, live: LiveRun) -> None:
        """End what has come to its time. Call inside a turn."""
        events = overdue(live.run, self._engine.now_us())
        if events:
            await self._engine.commit(live, events, "service")

    async def sweep(self) -> None:
        """End what has come to its time in runs that nobody asks about; for as long as the service runs."""
        while True:
            await asyncio.sleep(limits.EXPIRE_EVERY_S)
            now = self._engine.now_us()
            for live in self._engine.in_memory():
                if overdue(live.run, now):
                    try:
                        async with self._engine.turn(live):
                            await self.expire(live)
                    except Exception as error:
                        if not isinstance(error, SteeringError):
                            _log.exception("ending the commands of run %s failed", live.spec.run)

    async def _seen(self, run: str, caller: Caller) -> LiveRun:
        caller.check_run(VIEW, run)
        return await self._engine.whole(run)

    async def _look(self) -> None:
        """Learn of freezes that other processes wrote."""
        if self._freezing is not None:
            await self._freezing.look()

    def _check_frozen(self, kind: str, live: LiveRun) -> None:
        if self._freezing is not None:
            self._freezing.check(kind, live.spec.project)

    def _needed(self, kind: str, live: LiveRun, caller: Caller) -> tuple[int, bool]:
        """How many people a command takes, and whether the caller alone suffices."""
        needed = 1 if self._projects is None else self._projects.approvals(live.spec.project)
        return needed, caller.may(OPERATE) and (needed <= 1 or kind == "note")

    def _check_second(self, proposal: Proposal, caller: Caller) -> None:
        """Raise Denied where the caller is no other person than those who were heard: who makes a token may hold it."""
        for other in dict.fromkeys((proposal.actor, *proposal.approved)):
            if self._makers is not None and (
                other in self._makers(caller.actor) or caller.actor in self._makers(other)
            ):
                raise Denied(
                    f"proposal {proposal.id} takes several people, and of {caller.actor} and {other} one made the "
                    "token of the other: it takes somebody else to approve it"
                )

    async def _needed_now(self, proposal: Proposal, live: LiveRun) -> int:
        """How many must approve: as many as when it was proposed, and as the project wants by now. Who approved
        elsewhere, before the run was brought here, counts for nobody here."""
        now = 1 if self._projects is None else self._projects.approvals(live.spec.project)
        if self._imports is not None:
            now += await queries.in_thread(self._imports.approvals, live.spec.run, proposal)
        return max(proposal.needed, now)

    def _around(self, live: LiveRun, run: Run | None = None) -> Around:
        """What a command is checked against; run: instead of the live one."""
        run = tightened(live, live.run if run is None else run, self._projects)
        capped = _uncapped if self._projects is None else self._projects.capped
        return Around(spec_under(live.spec, run), run, self._profiles, capped)

    async def _tighten(self, kind: str, live: LiveRun) -> None:
        """Hold the run to the limits of today, ahead of a command."""
        if kind != "note":
            await tighten(self._engine, live, self._projects)

    def _tightened(self, kind: str, live: LiveRun, run: Run) -> Run:
        return run if kind == "note" else tightened(live, run, self._projects)

    async def _view(self, live: LiveRun, command: str) -> CommandView:
        return await queries.in_thread(command_of, self._journal, live.spec.run, command, _groups(live))


def _groups(live: LiveRun) -> list[str]:
    return [group.name for group in live.spec.groups]


def _right(kind: str) -> str:
    """What it takes to ask for a command at all; a note is nothing to approve."""
    return OPERATE if kind == "note" else PROPOSE


def _uncapped(project: str, guard: Mapping[str, Any], groups: Iterable[str]) -> Mapping[str, Any]:
    return guard


def _events(
    run: Run, request: CommandRequest, found: Checked, actor: str, key: str, proposal: str = ""
) -> tuple[list[Event], int]:
    """The command, behind the ends of those it releases; and its place among them."""
    beside = run.steering.commands
    command = Commanded(request.kind, found.args, actor, request.reason, key, found.until, found.expires_at, proposal)
    if request.kind != "release":
        return [command], 0
    lasting = {one.id for one in commands.lasting(beside)}
    over = commands.released(beside, found.args)
    ended = [CommandMoved(one, "released" if one in lasting else "withdrawn") for one in over]
    return [*ended, command], len(ended)


def _folded(live: LiveRun, run: Run, events: Sequence[Event]) -> dict[str, Any]:
    """What these events would make of the run: see `Commanding.preview`."""
    run = run._replace(lag=None)  # without a lag a command shows in the settings at once
    names, before = _groups(live), run.settings.lr
    told: dict[str, Any] = {"status": "accepted", "clamped_to": ""}
    ended: list[str] = []
    for event in events:
        run, outcome = fold.apply(live.rules, run, event)
        told |= outcome.verdict or {}
        if told["status"] == "clamped" and isinstance(event, Commanded):
            told["clamped_to"] = commands.clamped_to(event.args, told.get("held"), names)
        ended += [event.command] if isinstance(event, CommandMoved) else told.pop("superseded", [])
    told["before"], told["after"] = (dict(zip(names, lr, strict=True)) for lr in (before, run.settings.lr))
    told.pop("lr", None)
    return {**told, "ends": ended}


def _check_proposals(run: Run, caller: Caller) -> None:
    """Nobody's proposals may keep out those of others."""
    open_ = run.steering.proposals
    own = sum(one.actor == caller.actor for one in open_)
    if own >= limits.PROPOSALS_OF_ONE_MAX or len(open_) >= limits.PROPOSALS_MAX:
        raise Conflict(
            f"{len(open_)} proposals are open, {own} of them yours: withdraw some, or wait until they are judged "
            f"(at most {limits.PROPOSALS_OF_ONE_MAX} of one, {limits.PROPOSALS_MAX} in all)"
        )


def _check_expected(run: Run, request: CommandRequest) -> None:
    expected, newest = request.expected_seq, run.steering.newest
    if expected is None:
        return
    if not 0 <= expected <= run.seq:
        raise Ahead(
            f"run {request.run}: If-Match is row {expected}, but the newest is row {run.seq}: look at the run, then "
            f"say If-Match: {run.seq}"
        )
    if newest > expected:
        command = next((one for one in run.steering.commands if one.seq == newest), None)
        who = f" by {command.actor} ({command.reason})" if command is not None else ""
        raise Stale(
            f"run {request.run}: you knew row {expected}, but a command{who} came since, in row {newest}: look at it, "
            f"then say If-Match: {run.seq}"
        )


def _content(request: CommandRequest) -> list[Any]:
    """Everything that is asked for; what the caller knew of the run is no part of it."""
    return [request.kind, request.reason, dict(request.fields), request.expires_in_s, request.expires_at]
