"""Canaries: another policy for a share of the runs, chosen by hash, beside the rest; then for all of them, or back.

Rule of this module: who is in which arm follows from the canary's row in the store's own journal and the run's name. A
run that comes later and matches joins while the canary is open, and the token of whoever started it is valid; whoever
was switched is known by the command.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flyball_server import limits, queries, records
from flyball_server.auth.access import OPERATE, VIEW, Caller
from flyball_server.commands.checks import check_envelope
from flyball_server.commands.commanding import Commanding
from flyball_server.core.errors import Conflict, Denied, Invalid, NotFound, SteeringError
from flyball_server.engine import Engine
from flyball_server.fleet import comparing, many
from flyball_server.fleet.fleet import Fleet, as_said, whose_key
from flyball_server.fleet.freezing import Freezing
from flyball_server.fleet.restoring import commands_back
from flyball_server.fleet.selector import parsed
from flyball_server.messages import CommandRequest
from flyball_server.names import project_of
from flyball_server.storage.journal import Journal, Row, RunRecord
from flyball_server.tail import Tail

#: The kinds of rows.
STARTED, JOINED, GIVEN, CLOSED = "canary", "canary_joined", "canary_given", "canary_closed"
#: How a canary ends.
PROMOTED, BACK = "promoted", "back"
_log = logging.getLogger(__name__)


class CanaryRequest(NamedTuple):
    """Switch this share of the runs that a selector means. command: switch_policy or set_profile, without a run."""

    selector: str
    command: CommandRequest
    share: float
    key: str = ""


class Canary:
    """A canary as its rows tell it. runs: (newest row, newest step) of each run when it came in; given: command or
    proposal by run; failed: why it was not given. closed: "", PROMOTED or BACK."""

    def __init__(self, row: Row) -> None:
        meta = row.meta
        self.seq, self.at, self.actor = row.seq, row.at, row.actor
        self.selector, self.share = meta["selector"], meta["share"]
        command = dict(meta["command"])
        self.reason, kind = command.pop("reason"), command.pop("kind")
        self.command = CommandRequest("", kind, self.reason, command, key=f"canary:{self.seq}")
        projects = meta["projects"]
        self.starter = Caller(row.actor, "operator", None if projects is None else frozenset(projects))
        self.runs: dict[str, tuple[int, int]] = {run: (seq, step) for run, (seq, step) in meta["runs"].items()}
        self.given: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.closed, self.closed_by, self.closed_reason = "", "", ""

    @property
    def id(self) -> str:
        """What people call it by."""
        return f"k{self.seq}"

    def is_member(self, run: str) -> bool:
        """Whether the run is one of those to be switched: its hash says so."""
        return fraction(self.id, run) < float(self.share)

    def waiting(self) -> list[str]:
        """Members that were neither given the command nor refused it."""
        return [run for run in self.runs if self.is_member(run) and run not in self.given and run not in self.failed]


def fraction(canary: str, run: str) -> float:
    """A number in [0, 1) that depends on both names and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{canary}{run}".encode()).digest()[:7], "big") / 2**56


class Canaries:
    """The use cases about canaries of one store."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        tail: Tail,
        *,
        fleet: Fleet,
        commanding: Commanding,
        freezing: Freezing,
        lapsed: Callable[[str], str],
    ) -> None:
        """lapsed: why nothing is done any more in the name of an actor; "" where it is."""
        self._engine = engine
        self._journal = journal
        self._tail = tail
        self._fleet = fleet
        self._commanding = commanding
        self._freezing = freezing
        self._lapsed = lapsed
        self._turn = asyncio.Lock()
        self._all: dict[int, Canary] = {}
        self._keys: dict[str, int] = {}
        for kind, learn in (
            (STARTED, self._started), (JOINED, self._joined), (GIVEN, self._given), (CLOSED, self._closed)
        ):  # fmt: skip
            tail.on(kind, learn)

    async def start(self, request: CanaryRequest, caller: Caller) -> dict[str, Any]:
        """Switch the share of the runs; the canary. Raises Invalid, Denied, NotFound where no run matches, Conflict
        where one is in another open canary, or frozen."""
        caller.check_role(OPERATE)
        command = check_envelope(request.command)
        said = as_said(command)
        if not 0 < request.share <= 1:
            raise Invalid(f"share is {request.share!r}: give a part of the runs, above 0 and at most 1")
        whose, selector = whose_key(caller, request.key), parsed(request.selector)
        async with self._turn:
            await self._tail.refresh()
            if whose not in self._keys:
                found = await self._fleet.select(selector, caller)
                await self._check_start(found, request, command, caller)
                meta = {
                    "selector": selector.text,
                    "command": said,
                    "share": request.share,
                    "projects": None if caller.projects is None else sorted(caller.projects),
                    "runs": _standing(found),
                    "key": whose,
                }
                row = await self._engine.ledger.append(STARTED, meta, caller.actor)
                await self._tail.refresh()
                seq = self._keys[whose] if whose else row.seq
            else:
                seq = self._keys[whose]
            canary = self._all[seq]
            await self._switch(canary)
        return await self.show(canary.id, caller)

    async def show(self, canary_id: str, caller: Caller) -> dict[str, Any]:
        """A canary: members and controls, as far as the caller reaches them, and the arms compared. Raises NotFound."""
        caller.check_role(VIEW)
        await self._tail.refresh()
        canary = self._known(canary_id, caller)
        runs = [run for run in canary.runs if caller.reaches(project_of(run))]
        # By hash: those that are left out where there are too many are left out by chance.
        runs.sort(key=lambda run: fraction(canary.id, run))
        members = [run for run in runs if canary.is_member(run)]
        controls = [run for run in runs if not canary.is_member(run)]
        switched = [run for run in members if run in canary.given]
        stands = await many.each(switched, lambda run: self._command(run, canary, caller), limits.CANARY_READS)
        arms = [await self._measured(canary, arm) for arm in (switched, controls)]
        one, other = comparing.arm(arms[0], len(members)), comparing.arm(arms[1], len(controls))
        return {
            **self._described(canary),
            "members": [_member(run, canary, stands.get(run)) for run in members],
            "controls": controls,
            "comparison": {"members": one, "controls": other, "words": comparing.words(one, other)},
        }

    async def listed(self, caller: Caller) -> list[dict[str, Any]]:
        """The canaries that concern the caller, newest first, without their runs."""
        caller.check_role(VIEW)
        await self._tail.refresh()
        return [self._described(one) for one in reversed(self._all.values()) if _reaches_any(caller, one)]

    async def promote(self, canary_id: str, reason: str, caller: Caller) -> dict[str, Any]:
        """Switch the rest, and close the canary; {"canary", "results"}. Repeating it changes nothing."""
        canary, reason = await self._ending(canary_id, PROMOTED, reason, caller)
        rest = [run for run in canary.runs if run not in canary.given]
        command = canary.command._replace(reason=reason, key=f"canary:{canary.seq}:{PROMOTED}")
        found = await many.each(rest, lambda run: self._fleet.give(command._replace(run=run), caller))
        return {"canary": canary.id, "closed": PROMOTED, "results": _results(found)}

    async def back(self, canary_id: str, reason: str, caller: Caller) -> dict[str, Any]:
        """Switch the members back to what they had, and close the canary; {"canary", "results"}. One that somebody
        switched again since is left alone. Repeating it changes nothing."""
        canary, reason = await self._ending(canary_id, BACK, reason, caller)

        async def one(run: str) -> tuple[str, str]:
            view = await self._command(run, canary, caller)
            if view["status"] == "proposed":
                judged = await self._commanding.judge(run, view["id"], "rejected", reason, caller)
                return judged.id, judged.status
            if view["id"].startswith("p"):  # it never became a command
                return view["id"], view["status"]
            last = view["id"], "as before"
            asked = commands_back(await self._engine.whole(run), view["id"], reason, f"canary:{canary.seq}:{BACK}")
            for request in asked:
                last = await self._fleet.give(request, caller)
            return last

        return {"canary": canary.id, "closed": BACK, "results": _results(await many.each(canary.given, one))}

    async def watch(self) -> None:
        """Let runs that come later join, for as long as the service runs."""
        while True:
            await asyncio.sleep(limits.CANARY_EVERY_S)
            for canary in [one for one in self._all.values() if not one.closed and not self._lapsed(one.actor)]:
                try:
                    async with self._turn:
                        await self._join(canary)
                except SteeringError as error:
                    _log.warning("canary %s: runs that came later wait: %s", canary.id, error)
                except Exception:
                    _log.exception("canary %s: looking for runs that came later failed", canary.id)

    async def _join(self, canary: Canary) -> None:
        found = await self._fleet.select(parsed(canary.selector), canary.starter)
        late = [record for record in found if record.created_at >= canary.at and record.run not in canary.runs]
        late = [record for record in late if record.attempt and not self._elsewhere(record.run)]
        if late:
            meta = {"canary": canary.seq, "runs": _standing(late)}
            await self._engine.ledger.append(JOINED, meta, canary.actor)
            await self._tail.refresh()
        await self._switch(canary)

    async def _switch(self, canary: Canary) -> None:
        """Give the command to the members that have not heard of it, but those that are frozen or busy: later."""
        waiting = [run for run in canary.waiting() if not self._is_frozen(run)]
        if canary.closed or not waiting:
            return
        command = canary.command
        found = await many.each(waiting, lambda run: self._fleet.give(command._replace(run=run), canary.starter))
        given = {run: one[0] for run, one in found.items() if not isinstance(one, SteeringError)}
        failed = {run: str(one) for run, one in found.items() if isinstance(one, SteeringError) and one.code != "busy"}
        if given or failed:
            meta = {"canary": canary.seq, "given": given, "failed": failed}
            await self._engine.ledger.append(GIVEN, meta, canary.actor)
            await self._tail.refresh()

    async def _check_start(
        self, found: Sequence[RunRecord], request: CanaryRequest, command: CommandRequest, caller: Caller
    ) -> None:
        if not found:
            raise NotFound(f"selector {request.selector!r:.100} means no run: `flyball runs` lists those there are")
        if sum(not one.closed for one in self._all.values()) >= limits.CANARIES_OPEN_MAX:
            raise Conflict(f"{limits.CANARIES_OPEN_MAX} canaries are open: promote some, or go back")
        for record in found:
            self._freezing.check(command.kind, record.project)
            if other := self._elsewhere(record.run):
                raise Conflict(
                    f"run {record.run} is in the canary {other.id}, which is open: promote it or go back first"
                )
        # A policy that means nothing is refused before anything is written.
        await self._commanding.preview(command._replace(run=found[0].run), caller)

    async def _ending(self, canary_id: str, how: str, reason: str, caller: Caller) -> tuple[Canary, str]:
        """The canary, closed in this way for everybody, and the reason as commands say it."""
        caller.check_role(OPERATE)
        reason = check_envelope(CommandRequest("", "note", reason, {})).reason
        async with self._turn:
            await self._tail.refresh()
            canary = self._known(canary_id, caller)
            projects = {project_of(run) for run in canary.runs}
            if not all(caller.reaches(project) for project in projects):  # which ones is not for the caller to know
                raise Denied(f"canary {canary.id} has runs in projects that {caller.actor} does not reach")
            for project in projects:
                self._freezing.check("switch_policy", project)
            if not canary.closed:
                meta = {"canary": canary.seq, "how": how, "reason": reason}
                await self._engine.ledger.append(CLOSED, meta, caller.actor)
                await self._tail.refresh()
            if (canary.closed, canary.closed_by, canary.closed_reason) != (how, caller.actor, reason):
                raise Conflict(
                    f"canary {canary.id} is closed: {canary.closed} by {canary.closed_by}: {canary.closed_reason}"
                )
        return canary, reason

    async def _command(self, run: str, canary: Canary, caller: Caller) -> dict[str, Any]:
        """The command that switched a member, or the proposal that has not yet."""
        view = await self._commanding.get(run, canary.given[run], caller)
        if view.command:
            view = await self._commanding.get(run, view.command, caller)
        return view._asdict()

    async def _measured(self, canary: Canary, runs: Sequence[str]) -> list[comparing.Measured]:
        async def one(run: str) -> comparing.Measured:
            live = await self._engine.whole(run)
            spec, state, (seq, step) = live.spec, live.run, canary.runs[run]
            return await queries.in_thread(comparing.measured, self._journal, spec, state, seq, step)

        found = await many.each(runs[: limits.CANARY_COMPARED_MAX], one, limits.CANARY_READS)
        return [measured for measured in found.values() if not isinstance(measured, SteeringError)]

    def _known(self, canary_id: str, caller: Caller) -> Canary:
        found = next((one for one in self._all.values() if one.id == canary_id), None)
        if found is None or not _reaches_any(caller, found):
            raise NotFound(f"canary {canary_id!r:.40} is not known: `flyball canary list` lists those that are")
        return found

    def _elsewhere(self, run: str) -> Canary | None:
        return next((one for one in self._all.values() if not one.closed and run in one.runs), None)

    def _is_frozen(self, run: str) -> bool:
        try:
            self._freezing.check("switch_policy", project_of(run))
        except Conflict:
            return True
        return False

    def _described(self, canary: Canary) -> dict[str, Any]:
        command = canary.command
        return {
            "id": canary.id,
            "status": canary.closed or "open",
            "at": records.utc(canary.at),
            "actor": canary.actor,
            "reason": canary.reason,
            "selector": canary.selector,
            "share": canary.share,
            "paused": "" if canary.closed else self._lapsed(canary.actor),
            "command": {"kind": command.kind, **command.fields},
            "closed_by": canary.closed_by,
            "closed_reason": canary.closed_reason,
        }

    # -- what the rows tell --------------------------------------------------------------------------------------

    def _started(self, row: Row) -> None:
        key = row.meta["key"]
        if key and key in self._keys:
            return  # of two at once the first counts
        self._all[row.seq] = Canary(row)
        if key:
            self._keys[key] = row.seq
        closed = [seq for seq, one in self._all.items() if one.closed]
        for seq in closed[: max(0, len(closed) - limits.CANARIES_KEPT)]:
            del self._all[seq]
            self._keys = {key: of for key, of in self._keys.items() if of != seq}

    def _joined(self, row: Row) -> None:
        canary = self._all.get(row.meta["canary"])
        if canary is not None:
            for run, (seq, step) in row.meta["runs"].items():
                canary.runs.setdefault(run, (seq, step))

    def _given(self, row: Row) -> None:
        canary = self._all.get(row.meta["canary"])
        if canary is not None:
            canary.given = {**row.meta["given"], **canary.given}
            canary.failed = {**row.meta["failed"], **canary.failed}

    def _closed(self, row: Row) -> None:
        canary = self._all.get(row.meta["canary"])
        if canary is not None and not canary.closed:
            canary.closed, canary.closed_by, canary.closed_reason = row.meta["how"], row.actor, row.meta["reason"]


def _standing(found: Sequence[RunRecord]) -> dict[str, list[int]]:
    return {one.run: [one.seq, -1 if one.step is None else one.step] for one in found}


def _reaches_any(caller: Caller, canary: Canary) -> bool:
    return caller.projects is None or any(caller.reaches(project_of(run)) for run in canary.runs)


def _member(run: str, canary: Canary, stands: Mapping[str, Any] | SteeringError | None) -> dict[str, Any]:
    if stands is None or isinstance(stands, SteeringError):
        words = str(stands) if stands is not None else canary.failed.get(run, "it waits for its turn")
        return {"run": run, "status": "not switched", "command": None, "words": words}
    return {"run": run, "status": stands["status"], "command": stands["id"], "words": ""}


def _results(found: Mapping[str, tuple[str, str] | SteeringError]) -> list[dict[str, Any]]:
    return [
        {"run": run, "status": "refused", "id": None, "error": str(one), "code": one.code}
        if isinstance(one, SteeringError)
        else {"run": run, "status": one[1], "id": one[0], "error": None, "code": None}
        for run, one in found.items()
    ]
