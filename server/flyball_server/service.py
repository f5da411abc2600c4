"""The use cases: attach, report, side signals, queries. Both skins call these and nothing else.

Rule of this module: check who asks and what is asked for, then leave the work to the engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from flyball_server import branches, deletion, limits, proving, queries
from flyball_server.attempts import Attempts
from flyball_server.auth.access import ADMIN, DRIVE, REPORT, VIEW, Caller
from flyball_server.checks import (
    check_report,
    check_resumption,
    check_room,
    check_side_report,
    spec_from,
)
from flyball_server.commands.capping import tighten
from flyball_server.conversation import advice, attached, new_events, overdue, reason
from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid, NotFound, SteeringError
from flyball_server.core.events import Reported, Spec
from flyball_server.core.run import Run
from flyball_server.core.types import Settings
from flyball_server.engine import Engine
from flyball_server.fleet.freezing import Freezing
from flyball_server.idempotency import key_of, repeated
from flyball_server.ledger import retried
from flyball_server.live import LiveRun
from flyball_server.loading import Deleted
from flyball_server.messages import Advice, Attach, Attached, Report, SideReport, WhatIfRequest
from flyball_server.names import project_of
from flyball_server.profiles import Profile
from flyball_server.projects import NOWHERE, Projects
from flyball_server.proving import Undamaged
from flyball_server.rules import rules_of
from flyball_server.staleness import aged, status_of
from flyball_server.storage.journal import DELETED, Heard, Journal, RunFilter, RunRecord, Usage, newest_news
from flyball_server.what_if import Asked, answer

T = TypeVar("T")
NOTHING = Heard()
#: What a run may be; stale, lost: active, but without news for STALE_AFTER_S, LOST_AFTER_S.
STATUSES = ("created", "active", "stale", "lost", "finished", "failed", DELETED)


class RunView(NamedTuple):
    """A run as people see it: its projection, and its folded state where asked for. problem: what is damaged."""

    record: RunRecord
    status: str
    stale_s: float
    spec: Spec | None
    run: Run | None
    reason: str
    problem: str


class Service:
    """The service over one engine and its journal."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        profiles: Mapping[str, Profile] | None = None,
        projects: Projects = NOWHERE,
        freezing: Freezing | None = None,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._profiles: Mapping[str, Profile] = profiles or {}
        self._projects = projects
        self._freezing = freezing
        self._attempts = Attempts(engine, journal, self._profiles, projects)
        self._what_ifs = 0

    async def attach(self, request: Attach, caller: Caller) -> Attached:
        """Create the run, reconnect to it (same session), or open a new attempt (resume).

        Raises Conflict where the run exists and the caller did not say that it resumes; Invalid, NotFound, Busy.
        """
        caller.check(DRIVE, request.project or "default")
        if request.fork is not None:
            caller.check_run(DRIVE, request.fork.run)
        spec = spec_from(request, self._profiles, self._projects)
        check_resumption(request)
        if self._freezing is not None:
            await self._freezing.look_if_possible()

        async def once() -> Attached:
            try:
                live = await self._engine.find(spec.run)
            except Deleted as error:
                raise Conflict(f"{error}; a deleted run's name is not used again: choose another") from None
            except NotFound:
                live = await self._attempts.begin(request, spec, caller.actor)
            async with self._engine.turn(live):
                if live.run.session != request.session:
                    await self._attempts.open(live, request, spec, caller)
                await tighten(self._engine, live, self._projects)
                if self._freezing is not None:
                    await self._freezing.keep(live)
                return attached(live, await self._engine.earlier(live))

        return await retried(once)

    async def fork(self, request: Attach, caller: Caller) -> RunView:
        """Begin a run that leaves another one (`request.fork`) at a step; its job attaches later, with resume.

        Raises Invalid, NotFound, Conflict where the name is taken, Busy.
        """

        assert request.fork is not None
        caller.check_run(DRIVE, request.fork.run)
        caller.check(DRIVE, request.project or "default")

        async def once() -> RunView:
            live = await self._attempts.forked(request, caller.actor, beyond=False)
            return self._view(live.record, live)

        return await retried(once)

    async def lineage(self, run: str, caller: Caller) -> dict[str, Any]:
        """Where a run comes from, what left it, and its attempts: see `branches.lineage`."""
        live = await self._whole(run, caller)
        line = (live.spec, live.origin, live.run)
        return await self._read(run, lambda: branches.lineage(self._journal, *line, caller))

    async def what_if(self, request: WhatIfRequest, caller: Caller, *, points: int, limit: int) -> dict[str, Any]:
        """What another policy would have decided on the run's recorded signals: see `what_if.answer`.

        Raises NotFound, Invalid (a run with more than WHAT_IF_OBSERVATIONS_MAX observations included), and Busy where
        others are being computed.
        """
        live = await self._whole(request.run, caller)
        if live.run.observations > limits.WHAT_IF_OBSERVATIONS_MAX:
            raise Invalid(
                f"run {request.run} has {live.run.observations} observations, more than the "
                f"{limits.WHAT_IF_OBSERVATIONS_MAX} folded in one request: use `flyball-server replay` on its store"
            )
        spec, own = branches.otherwise(request, live.spec, live.origin, self._profiles)
        asked = Asked(live.spec, live.origin, live.run, rules_of(spec), own)
        if self._what_ifs >= limits.WHAT_IFS_MAX:
            raise Busy("another what-if is being computed; come again when it is done", 2.0)
        self._what_ifs += 1
        try:
            return await self._read(request.run, lambda: answer(self._journal, asked, request.attempt, points, limit))
        finally:
            self._what_ifs -= 1

    async def report(self, request: Report, caller: Caller) -> Advice:
        """Fold what the driver saw. The answer comes only when the journal has it.

        Repeating a report (or any part of one) changes nothing and is answered with the recorded decisions.
        """
        caller.check_run(DRIVE, request.run)
        check_report(request)

        async def once() -> Advice:
            live = await self._engine.find(request.run)
            async with self._engine.turn(live):
                if over := overdue(live.run, self._engine.now_us()):
                    await self._engine.commit(live, over, "service")
                if self._freezing is not None:
                    await self._freezing.keep(live)
                run = live.run
                if request.attempt != run.attempt:
                    raise Conflict(
                        f"run {request.run}: attempt {request.attempt} is not the newest one ({run.attempt}): another "
                        "process has taken the run over, and this one is not heard any more"
                    )
                if request.session != run.session:
                    raise Conflict(
                        f"run {request.run}: attempt {run.attempt} is driven by another session than "
                        f"{request.session!r:.60}: attach first, and report under the session that attached"
                    )
                events = new_events(run, request, live.spec.groups)
                resent: list[tuple[int, Settings]] = []
                if run.lag is not None and request.steps and request.steps[0] <= run.through:
                    resent = await self._engine.resent(live, request.steps[0], min(run.through, request.steps[-1]))
                changes = resent
                if events:
                    outcomes = await self._engine.commit(live, events, caller.actor)
                    changes = [*resent, *(c for outcome in outcomes for c in outcome.changes)]
                self._hear(live)
                return advice(live, changes)

        return await retried(once)

    async def add_signals(self, run: str, said: SideReport, caller: Caller) -> int:
        """Signals and notes from another process; the policy sees the signals with the next observation. Returns the
        journal's newest row. Of a source that numbers its reports each is taken once."""
        caller.check_run(REPORT, run)
        check_side_report(said)
        content = [sorted((name, repr(value)) for name, value in said.signals.items()), said.note]
        key = key_of(said.key, content, caller)

        async def once() -> int:
            live = await self._engine.find(run)
            async with self._engine.turn(live):
                # A source is its reporter's own: nobody else's numbers can overtake it.
                source = f"{said.source} of {caller.actor}" if said.source else ""
                if source and said.number <= live.run.steering.reporters.get(source, 0):
                    return live.run.seq
                if known := repeated(live.run, key, run):
                    return int(known[1:])
                check_room(live.run, said.signals, limits.DRIVER_SIGNALS)
                # Before the first step there is none to stand behind; the first one it is then.
                event = Reported(max(live.run.through, 0), *said._replace(source=source, key=key))
                await self._engine.commit(live, [event], caller.actor)
                return live.run.seq

        return await retried(once)

    def _hear(self, live: LiveRun) -> None:
        """A job that says nothing new between two steps lives all the same."""
        now, beside = self._engine.now_us(), live.heard.beside
        live.heard = Heard(now)
        if now - max(newest_news(live.record, Heard(0, beside)), live.told) >= limits.HEARD_EVERY_S * 1e6:
            live.told = now
            with contextlib.suppress(Busy):
                self._journal.hear(live.spec.run, live.heard)

    async def get_run(self, run: str, caller: Caller) -> RunView:
        """One run with its folded state."""
        live = await self._found(run, caller)
        if live.record.status == "active":
            await self._engine.hear_of(live)
        return self._view(live.record, live)

    async def list_runs(
        self, where: RunFilter, cursor: str | None, limit: int, caller: Caller
    ) -> tuple[list[RunView], str]:
        """One page of the runs that the caller reaches, newest first, and the cursor of the next page ("" at the
        end)."""
        caller.check_role(VIEW)
        where = where._replace(projects=caller.projects)
        if not 1 <= limit <= limits.PAGE_MAX:
            raise Invalid(f"limit is {limit}: give 1 to {limits.PAGE_MAX}")
        if len(where.labels or ()) > limits.LABELS_MAX:
            raise Invalid(f"label: {len(where.labels or ())} are too many; no run has more than {limits.LABELS_MAX}")
        if where.status is not None:
            if where.status not in STATUSES:
                raise Invalid(f"status is {where.status!r}: give one of {', '.join(STATUSES)}")
            where = aged(where, self._engine.now_us())
        after = queries.parse_cursor(cursor)
        records = await queries.in_thread(self._journal.records, where, after=after, limit=limit + 1)
        page = records[:limit]
        following = f"{page[-1].created_at}~{page[-1].run}" if len(records) > limit else ""
        heard = await queries.in_thread(self._journal.heard, [one.run for one in page if one.status == "active"])
        return [self._view(record, None, heard.get(record.run, Heard())) for record in page], following

    async def series(self, run: str, request: queries.SeriesRequest, caller: Caller) -> dict[str, Any]:
        """Signals and settings over the steps, at most `points` of each (min/max of equal step ranges)."""
        live = await self._found(run, caller)
        return await self._query(run, lambda journal: queries.series(journal, live.spec, live.run, request))

    async def decisions(
        self, run: str, caller: Caller, *, after: int, limit: int, newest: bool, shadow: str = ""
    ) -> dict[str, Any]:
        """The decisions that moved something, in journal order; `newest`: the last ones, `after` says nothing then.

        shadow: those of the run's shadow of this name. Raises NotFound where there is none.
        """
        live = await self._found(run, caller)
        marked = queries.marked(live.spec, live.rules, live.run, shadow)
        if newest:
            return await self._query(run, lambda journal: queries.newest_decisions(journal, marked, limit))
        return await self._query(run, lambda journal: queries.decisions(journal, marked, after, limit))

    async def episodes(self, run: str, caller: Caller) -> dict[str, Any]:
        """The log lists of a run that learns in episodes; empty ones for any other."""
        live = await self._found(run, caller)
        return await self._query(run, lambda journal: queries.episodes(journal, live.spec))

    def profiles(self, caller: Caller) -> Mapping[str, Profile]:
        """The named policies and guards that jobs may ask for."""
        caller.check_role(VIEW)
        return self._profiles

    async def _found(self, run: str, caller: Caller) -> LiveRun:
        """The run, for whoever may look at it."""
        caller.check_run(VIEW, run)
        return await self._engine.find(run)

    async def _whole(self, run: str, caller: Caller) -> LiveRun:
        """The run, for whoever can make nothing of a part of it. Raises NotFound, and Damaged where it is."""
        live = await self._found(run, caller)
        self._engine.damage.check(run)
        return live

    async def _read(self, run: str, work: Callable[[], T]) -> T:
        """Read outside the event loop. Where that fails as nothing written by us can, the rows are proved."""
        try:
            return await queries.in_thread(work)
        except SteeringError:
            raise
        except Exception:
            problem = await queries.in_thread(proving.whole_problem, self._journal, run)
            if not problem:
                raise
            self._engine.found_damage(run, problem)
            raise Damaged(problem) from None

    async def _query(self, run: str, ask: Callable[[Undamaged], dict[str, Any]]) -> dict[str, Any]:
        """Ask the journal. Of a damaged run what comes before the damage, and under `problem` what it is."""
        journal = Undamaged(self._journal)
        found = await self._read(run, lambda: ask(journal))
        if journal.problem:
            self._engine.found_damage(run, journal.problem)
        problem = self._engine.damage.words(run)
        return {**found, "problem": problem} if problem else found

    async def delete_run(self, run: str, reason: str, caller: Caller) -> dict[str, Any]:
        """Remove a run for good; returns its tombstone, which stays with the actor and the reason.

        Raises Conflict for one that is still being trained, NotFound, Invalid, Busy.
        """
        caller.check_run(ADMIN, run)
        reason = deletion.check_reason(reason)

        async def once() -> dict[str, Any]:
            live: LiveRun | None = None
            try:
                live = await self._engine.find(run)
            except Damaged:  # what cannot be read can still be deleted
                record = await queries.in_thread(self._journal.record, run)
            if live is None or self._engine.damage.words(run):
                left = live.record if live is not None else record or deletion.bare_record(run)
                return deletion.described(await self._engine.delete(left, live, reason, caller.actor))
            async with self._engine.turn(live):
                view = self._view(live.record, live)
                if view.status == "active":
                    wait_s = limits.STALE_AFTER_S - view.stale_s
                    raise Conflict(f"run {run}: it is {view.status}: let it end, or wait {wait_s:.0f} s without news")
                return deletion.described(await self._engine.delete(live.record, live, reason, caller.actor))

        return await retried(once)

    async def tombstones(self, after: int, limit: int, caller: Caller) -> dict[str, Any]:
        """The deleted runs that the caller reached, oldest first, in pages."""
        caller.check_role(VIEW)
        return await queries.in_thread(deletion.tombstones, self._journal, after, limit, caller.reaches)

    def damaged(self, caller: Caller) -> Mapping[str, str]:
        """The runs that are known to be damaged, as far as the caller reaches them, and what each has."""
        caller.check_role(VIEW)
        return {run: words for run, words in self._engine.damage.all().items() if caller.reaches(project_of(run))}

    async def usage(self, caller: Caller) -> Usage:
        """What the store takes, and may take."""
        caller.check_role(ADMIN)
        return await queries.in_thread(self._journal.usage)

    async def ready(self) -> dict[str, Any]:
        """What a readiness probe is told, which is nothing about runs: anybody may ask."""
        usage = await queries.in_thread(self._journal.usage)
        return {"status": "ready", "store": usage.state}

    def _view(self, record: RunRecord, live: LiveRun | None, heard: Heard = NOTHING) -> RunView:
        status, stale_s = status_of(record, heard if live is None else live.heard, self._engine.now_us())
        problem = self._engine.damage.words(record.run)
        if status == "damaged" and not problem:
            problem = f"run {record.run!r}: its record makes no sense"
        if problem:
            status = "damaged"
        if live is None:
            return RunView(record, status, stale_s, None, None, "", problem)
        return RunView(record, status, stale_s, live.spec, live.run, reason(live), problem)
