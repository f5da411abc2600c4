"""The use cases: attach, report, side signals, queries. Both skins call these and nothing else.

Rule of this module: check who asks and what is asked for, then leave the work to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from flyball_server import branches, deletion, limits, proving, queries
from flyball_server.checks import (
    check_report,
    check_resumption,
    check_room,
    check_same,
    check_signal_names,
    spec_from,
)
from flyball_server.conversation import advice, attached, new_events, overdue, reason
from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid, NotFound, SteeringError
from flyball_server.core.events import Origin, Reported, Spec
from flyball_server.core.run import Run
from flyball_server.core.types import Settings
from flyball_server.engine import Engine, LiveRun, next_attempt
from flyball_server.freezing import Freezing
from flyball_server.loading import Deleted
from flyball_server.messages import Advice, Attach, Attached, Report, WhatIfRequest
from flyball_server.profiles import Profile
from flyball_server.proving import Undamaged
from flyball_server.retrying import retried
from flyball_server.rules import rules_of
from flyball_server.storage.journal import DELETED, Journal, RunFilter, RunRecord, Usage
from flyball_server.what_if import Asked, answer

T = TypeVar("T")
#: What a run may be; stale: active, but without news for STALE_AFTER_S.
STATUSES = ("created", "active", "stale", "finished", "failed", DELETED)


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
        freezing: Freezing | None = None,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._freezing = freezing
        self.profiles: Mapping[str, Profile] = profiles or {}
        self._what_ifs = 0

    async def attach(self, request: Attach, actor: str) -> Attached:
        """Create the run, reconnect to it (same session), or open a new attempt (resume).

        Raises Conflict where the run exists and the caller did not say that it resumes; Invalid, NotFound, Busy.
        """
        spec = spec_from(request, self.profiles)
        check_resumption(request)
        if self._freezing is not None:
            await self._freezing.look_if_possible()

        async def once() -> Attached:
            try:
                live = await self._engine.find(spec.run)
            except Deleted as error:
                raise Conflict(f"{error}; a deleted run's name is not used again: choose another") from None
            except NotFound:
                live = await self._begin(request, spec, actor)
            async with self._engine.turn(live):
                if live.run.session != request.session:
                    await self._open(live, request, spec, actor)
                if self._freezing is not None:
                    await self._freezing.keep(live)
                return attached(live, await self._engine.earlier(live))

        return await retried(once)

    async def fork(self, request: Attach, actor: str) -> RunView:
        """Begin a run that leaves another one (`request.fork`) at a step; its job attaches later, with resume.

        Raises Invalid, NotFound, Conflict where the name is taken, Busy.
        """

        async def once() -> RunView:
            live = await self._forked(request, actor, beyond=False)
            return self._view(live.record, live)

        return await retried(once)

    async def lineage(self, run: str) -> dict[str, Any]:
        """Where a run comes from, what left it, and its attempts: see `branches.lineage`."""
        live = await self.whole(run)
        return await self._read(run, lambda: branches.lineage(self._journal, live.spec, live.origin, live.run))

    async def what_if(self, request: WhatIfRequest, *, points: int, limit: int) -> dict[str, Any]:
        """What another policy would have decided on the run's recorded signals: see `what_if.answer`.

        Raises NotFound, Invalid (a run with more than WHAT_IF_OBSERVATIONS_MAX observations included), and Busy where
        others are being computed.
        """
        live = await self.whole(request.run)
        if live.run.observations > limits.WHAT_IF_OBSERVATIONS_MAX:
            raise Invalid(
                f"run {request.run} has {live.run.observations} observations, more than the "
                f"{limits.WHAT_IF_OBSERVATIONS_MAX} folded in one request: use `flyball-server replay` on its store"
            )
        spec, own = branches.otherwise(request, live.spec, live.origin, self.profiles)
        asked = Asked(live.spec, live.origin, live.run, rules_of(spec), own)
        if self._what_ifs >= limits.WHAT_IFS_MAX:
            raise Busy("another what-if is being computed; come again when it is done", 2.0)
        self._what_ifs += 1
        try:
            return await self._read(request.run, lambda: answer(self._journal, asked, request.attempt, points, limit))
        finally:
            self._what_ifs -= 1

    async def report(self, request: Report, actor: str) -> Advice:
        """Fold what the driver saw. The answer comes only when the journal has it.

        Repeating a report (or any part of one) changes nothing and is answered with the recorded decisions.
        """
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
                    outcomes = await self._engine.commit(live, events, actor)
                    changes = [*resent, *(c for outcome in outcomes for c in outcome.changes)]
                return advice(live, changes)

        return await retried(once)

    async def add_signals(self, run: str, signals: Mapping[str, float], actor: str) -> int:
        """Signals from another process; the policy sees them with the next observation. Returns the journal seq."""
        if not signals:
            raise Invalid("signals is empty: name at least one, such as val_loss")
        check_signal_names(signals)

        async def once() -> int:
            live = await self._engine.find(run)
            async with self._engine.turn(live):
                check_room(live.run, live.run.side.keys() | signals.keys())
                # Before the first step there is none to stand behind; the first one it is then.
                await self._engine.commit(live, [Reported(max(live.run.through, 0), dict(signals))], actor)
                return live.run.seq

        return await retried(once)

    async def get_run(self, run: str) -> RunView:
        """One run with its folded state."""
        live = await self._engine.find(run)
        return self._view(live.record, live)

    async def list_runs(self, where: RunFilter, cursor: str | None, limit: int) -> tuple[list[RunView], str]:
        """One page of runs, newest first, and the cursor of the next page ("" at the end)."""
        if not 1 <= limit <= limits.PAGE_MAX:
            raise Invalid(f"limit is {limit}: give 1 to {limits.PAGE_MAX}")
        if where.status is not None:
            if where.status not in STATUSES:
                raise Invalid(f"status is {where.status!r}: give one of {', '.join(STATUSES)}")
            where = where._replace(stale_before=self._stale_before())
        after = _parse_cursor(cursor)
        records = await queries.in_thread(self._journal.records, where, after=after, limit=limit + 1)
        page = records[:limit]
        following = f"{page[-1].created_at}~{page[-1].run}" if len(records) > limit else ""
        return [self._view(record, None) for record in page], following

    async def series(self, run: str, request: queries.SeriesRequest) -> dict[str, Any]:
        """Signals and settings over the steps, at most `points` of each (min/max of equal step ranges)."""
        live = await self._engine.find(run)
        return await self._query(run, lambda journal: queries.series(journal, live.spec, live.run, request))

    async def decisions(self, run: str, *, after: int, limit: int, newest: bool, shadow: str = "") -> dict[str, Any]:
        """The decisions that moved something, in journal order; `newest`: the last ones, `after` says nothing then.

        shadow: those of the run's shadow of this name. Raises NotFound where there is none.
        """
        live = await self._engine.find(run)
        marked = queries.marked(live.spec, live.rules, live.run, shadow)
        if newest:
            return await self._query(run, lambda journal: queries.newest_decisions(journal, marked, limit))
        return await self._query(run, lambda journal: queries.decisions(journal, marked, after, limit))

    async def episodes(self, run: str) -> dict[str, Any]:
        """The log lists of a run that learns in episodes; empty ones for any other."""
        live = await self._engine.find(run)
        return await self._query(run, lambda journal: queries.episodes(journal, live.spec))

    async def whole(self, run: str) -> LiveRun:
        """The run, for whoever can make nothing of a part of it. Raises NotFound, and Damaged where it is."""
        live = await self._engine.find(run)
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

    async def delete_run(self, run: str, reason: str, actor: str) -> dict[str, Any]:
        """Remove a run for good; returns its tombstone, which stays with the actor and the reason.

        Raises Conflict for one that is still being trained, NotFound, Invalid, Busy.
        """
        reason = deletion.check_reason(reason)

        async def once() -> dict[str, Any]:
            live: LiveRun | None = None
            try:
                live = await self._engine.find(run)
            except Damaged:  # what cannot be read can still be deleted
                record = await queries.in_thread(self._journal.record, run)
            if live is None or self._engine.damage.words(run):
                left = live.record if live is not None else record or deletion.bare_record(run)
                return deletion.described(await self._engine.delete(left, live, reason, actor))
            async with self._engine.turn(live):
                view = self._view(live.record, live)
                if view.status == "active":
                    wait_s = limits.STALE_AFTER_S - view.stale_s
                    raise Conflict(f"run {run}: it is {view.status}: let it end, or wait {wait_s:.0f} s without news")
                return deletion.described(await self._engine.delete(live.record, live, reason, actor))

        return await retried(once)

    async def tombstones(self, after: int, limit: int) -> dict[str, Any]:
        """The deleted runs, oldest first, in pages."""
        return await queries.in_thread(deletion.tombstones, self._journal, after, limit, lambda _: True)

    def damaged(self) -> Mapping[str, str]:
        """The runs that are known to be damaged, and what each has."""
        return self._engine.damage.all()

    async def usage(self) -> Usage:
        """What the store takes, and may take."""
        return await queries.in_thread(self._journal.usage)

    async def ready(self) -> dict[str, Any]:
        """What a readiness probe is told."""
        usage, damaged = await self.usage(), len(self._engine.damage)
        return {"status": "ready", "live_runs": self._engine.live_runs, "damaged_runs": damaged, "store": usage.state}

    def _stale_before(self) -> int:
        return self._engine.now_us() - int(limits.STALE_AFTER_S * 1e6)

    def _view(self, record: RunRecord, live: LiveRun | None) -> RunView:
        stale_s = max(0, self._engine.now_us() - record.updated_at) / 1e6
        status = record.status
        if status == "active" and stale_s > limits.STALE_AFTER_S:
            status = "stale"
        problem = self._engine.damage.words(record.run)
        if status == "damaged" and not problem:
            problem = f"run {record.run!r}: its record makes no sense"
        if problem:
            status = "damaged"
        if live is None:
            return RunView(record, status, stale_s, None, None, "", problem)
        return RunView(record, status, stale_s, live.spec, live.run, reason(live), problem)

    async def _begin(self, request: Attach, spec: Spec, actor: str) -> LiveRun:
        """A run that is not known: from its first step, as a fork, or from a checkpoint taken elsewhere."""
        if request.fork is not None:
            return await self._forked(request, actor, beyond=True)
        if not request.resume:
            return await self._engine.create(spec, actor)
        if request.on_unknown == "refuse":
            raise NotFound(
                f"run {spec.run!r} is not known, so it cannot be resumed: attach without resume to begin it, or with "
                "on_unknown='import' to go on here from the checkpoint of another service"
            )
        if not request.policy:
            raise Invalid(f"policy is not given, and none is recorded here for run {spec.run!r}: give it, too")
        attempt, step = request.from_attempt or 0, request.from_step or 0
        origin = Origin("token", spec.run, attempt, step, request.seq, request.digest, None)
        return await self._engine.create(spec, actor, origin)

    async def _forked(self, request: Attach, actor: str, *, beyond: bool) -> LiveRun:
        """beyond: a checkpoint may be newer than what arrived before it was left; else that is a mistake."""
        fork = request.fork
        assert fork is not None
        parent = await self._engine.find(fork.run)
        attempt, step = branches.check_fork(fork, parent.run)
        if fork.digest and not await self._holds(parent, fork.seq, fork.digest):
            raise branches.unknown_token(parent.spec.run, fork.seq, fork.digest)
        left = await self._engine.restored(parent, attempt, step)
        if not beyond and left.through + 1 < step:
            end = await queries.in_thread(branches.line_end, self._journal, parent.spec, parent.run, attempt)
            if end + 1 < step:
                raise Invalid(f"fork.step is {step}, but the line of attempt {attempt} ends with step {end}")
        seq, digest = (fork.seq, fork.digest) if fork.digest else (parent.record.seq, parent.record.hash.hex())
        origin = Origin("fork", fork.run, attempt, step, seq, digest, None)
        spec, origin = branches.forked(request, parent.spec, left, origin, self.profiles)
        if await queries.in_thread(self._journal.record, spec.run) is not None:
            raise Conflict(f"run {spec.run!r} exists already: choose another name")
        return await self._engine.create(spec, actor, origin)

    async def _open(self, live: LiveRun, request: Attach, spec: Spec, actor: str) -> None:
        """Open the next attempt, going back on the line where that is asked for."""
        run = live.run
        if run.attempt > 0 and not request.resume:
            raise Conflict(
                f"run {spec.run!r} exists already (attempt {run.attempt}, step {run.through}, {run.status}): choose "
                "another name, or attach with resume=True to open a new attempt of it"
            )
        if run.attempt == 0 and live.origin is not None and not (request.resume or request.fork):
            raise Conflict(
                f"run {spec.run!r} exists already, as a fork of {live.origin.run!r} at step {live.origin.step}: load "
                "that run's checkpoint of this step and attach with resume=True"
            )
        if request.fork is None:  # what a fork's rules are was decided when it was begun
            check_same(live.spec, spec, request)
        await self._check_session(live, request)
        restored = claimed = None
        from_step = run.through + 1 if request.from_step is None else request.from_step
        attempt = run.attempt if request.from_attempt is None else request.from_attempt
        if request.digest and live.origin is not None and request.digest == live.origin.digest:
            attempt = min(1, run.attempt)  # the very checkpoint that this run began with
        elif request.digest and not await self._holds(live, request.seq, request.digest):
            if request.on_unknown == "refuse":
                raise branches.unknown_token(live.spec.run, request.seq, request.digest)
            attempt, claimed = run.attempt, {"seq": request.seq, "digest": request.digest}
        if not min(1, run.attempt) <= attempt <= run.attempt:
            raise NotFound(f"run {spec.run}: attempt {attempt} is not known (newest: {run.attempt})")
        if run.attempt > 0 and (from_step <= run.through or attempt != run.attempt):
            restored = await self._engine.restored(live, attempt, from_step)
        event = next_attempt(live, attempt, from_step, request.session, request.client, request.lag, restored, claimed)
        await self._engine.commit(live, [event], actor)

    async def _check_session(self, live: LiveRun, request: Attach) -> None:
        """Who drove an earlier attempt does not come back by itself: that is a message which was long on its way, or a
        process that has not noticed yet."""
        for number, (_, seq, _) in list(enumerate(live.run.attempts, 1))[-limits.ATTEMPTS_CHECKED :]:
            row = await queries.in_thread(queries.row, self._journal, live.spec.run, seq)
            if row is not None and row.meta["session"] == request.session:
                raise Conflict(
                    f"run {live.spec.run}: the session {request.session!r:.60} drove attempt {number}, and another "
                    "process has taken the run over since: attach under a new session to take it back"
                )

    async def _holds(self, live: LiveRun, seq: int, digest: str) -> bool:
        """Whether the run's journal holds the row that a checkpoint token names by its hash."""
        row = await queries.in_thread(queries.row, self._journal, live.spec.run, seq)
        return row is not None and row.hash.hex() == digest


def _parse_cursor(cursor: str | None) -> tuple[int, str] | None:
    if not cursor:
        return None
    created, _, run = cursor.partition("~")
    if not (created.isascii() and created.isdecimal() and int(created) <= limits.INTEGER_MAX) or not run:
        raise Invalid(f"cursor is {cursor!r}: give the one from the page before, unchanged")
    return int(created), run
