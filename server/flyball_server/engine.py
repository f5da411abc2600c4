"""The live runs: inbox -> fold -> journal -> publish.

Rule of this module: persist, then publish. A fold's result becomes visible (in an answer, a query, the next
fold) only after the journal has its events. This is the only place of the server that reads the clock.

All of it runs on one event loop. A run's requests pass one at a time behind its lock; the journal commits the
appends of all runs together on its own thread. Where another process appended first, or an append's fate is
unknown, the run is folded again from the journal before anything else is done with it. A run whose record is damaged
(`loading` and `scrub` find out) takes no turn until it was restored; what can be read of it still is.

Longer than 400 lines because a turn, a commit and what undoes them share one state of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from flyball_server import deletion, limits, loading, proving, records
from flyball_server.core import run as fold
from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid, NotFound
from flyball_server.core.events import OF_JOBS, Attached, Created, Event, Observed, Origin, Outcome, Spec
from flyball_server.core.run import Run
from flyball_server.core.types import Settings
from flyball_server.damage import Damage
from flyball_server.herald import Herald
from flyball_server.ledger import Ledger, Lost
from flyball_server.live import LiveRun
from flyball_server.loading import Loaded, Ruler
from flyball_server.scrub import Scrub
from flyball_server.storage.journal import (
    GENESIS,
    Append,
    Deletion,
    Heard,
    Journal,
    Row,
    RunRecord,
    Snapshot,
    Work,
    chained,
    newest_news,
)
from flyball_server.storage.outbox import Delivery

T = TypeVar("T")


class Turn:
    """`async with` it: see `Engine.turn`."""

    __slots__ = ("_engine", "_live")

    def __init__(self, engine: Engine, live: LiveRun) -> None:
        self._engine = engine
        self._live = live

    async def __aenter__(self) -> LiveRun:
        live = self._live
        if live.waiting >= limits.INBOX_MAX:
            raise Busy(f"run {live.spec.run}: {limits.INBOX_MAX} requests wait already; try again", 0.5)
        damage = self._engine.damage
        damage.check(live.spec.run)
        live.waiting += 1
        try:
            await live.lock.acquire()
            try:
                damage.check(live.spec.run)
                if live.stale:
                    await self._engine._reload(live)
            except BaseException:
                live.lock.release()
                raise
        except BaseException:
            live.waiting -= 1
            raise
        return live

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        live = self._live
        try:
            # Where another process has gone on with the run, a refusal may be about what is long over.
            if isinstance(error, Conflict | Invalid | NotFound) and await self._engine._is_behind(live):
                live.stale = True
                raise Lost(f"run {live.spec.run}: refused by what another process has changed since") from error
        finally:
            live.lock.release()
            live.waiting -= 1


class Engine:
    """The set of live runs over one journal."""

    def __init__(self, journal: Journal, ruler: Ruler, now_us: Callable[[], int], herald: Herald | None = None) -> None:
        self._journal = journal
        self._herald = herald
        self._ruler = ruler
        self.now_us = now_us
        self._live: OrderedDict[str, LiveRun] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ledger = Ledger(journal, self._hand_in, now_us)
        self.damage = Damage()
        self._scrub = Scrub(journal, self.found_damage)

    @property
    def live_runs(self) -> int:
        """How many runs are folded in memory."""
        return len(self._live)

    async def start(self) -> None:
        """Open the journal; from here on appends are accepted."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._journal.start, self._deliver)

    async def close(self) -> None:
        """Commit what is under way and close the journal."""
        await self._scrub.stop()
        await asyncio.to_thread(self._journal.close)

    def in_memory(self) -> list[LiveRun]:
        """The runs that are folded here."""
        return list(self._live.values())

    async def whole(self, run_id: str) -> LiveRun:
        """The run, for whoever can make nothing of a part of it. Raises NotFound, and Damaged where it is."""
        live = await self.find(run_id)
        self.damage.check(run_id)
        return live

    async def create(self, spec: Spec, actor: str, origin: Origin | None = None) -> LiveRun:
        """Begin a run. Raises Conflict where it exists (in any process)."""
        rules = self._ruler(spec)
        run = fold.create(rules, origin)
        now = self.now_us()
        entry = records.to_entry(Created(spec, origin), fold.NOTHING)
        row = Row(1, *entry[:4], actor, now, entry.meta, entry.columns, b"")
        row = row._replace(hash=chained(GENESIS, spec.run, row))
        tag = rules.policy.tag
        record = RunRecord(
            spec.run, spec.project, spec.name, run.status, tag, spec.labels, 0, None, now, now, 1, row.hash,
            loading.parent_of(origin),
        )  # fmt: skip
        await self._append(spec.run, 0, (row,), record, None)
        live = LiveRun(spec, origin, rules, run, record)
        self._keep(live)
        return live

    async def find(self, run_id: str) -> LiveRun:
        """The live run, folded from the journal where it is not in memory. Raises NotFound.

        One whose record is damaged is as of the last row before that, good for reading, and examined again now and
        then; Damaged is raised where nothing of it can be read.
        """
        loading.check_is_run(run_id)
        live = self._live.get(run_id)
        if live is not None and not self._is_due(run_id):
            self._live.move_to_end(run_id)
            return live
        async with self._loading.setdefault(run_id, asyncio.Lock()):
            live = self._live.get(run_id)
            if live is None or self._is_due(run_id):
                try:
                    live = self._better(live, await self._examined(run_id))
                except Damaged:
                    if live is None:
                        raise
                finally:
                    self._loading.pop(run_id, None)
                self._keep(live)
        return live

    async def delete(self, record: RunRecord, live: LiveRun | None, reason: str, actor: str) -> Row:
        """Remove a run; returns its tombstone. live: None where it is so damaged that it cannot be read.

        Raises Busy, Damaged where the store's own journal is, Lost where somebody else was faster.
        """
        run_id = record.run
        loading.check_is_run(run_id)
        expected = None if live is None or self.damage.words(run_id) else live.run.seq
        observations = None if live is None else live.run.observations

        async def write(last: Row | None) -> Row:
            row, left = deletion.tombstone(record, observations, reason, actor, self.now_us(), last)
            try:
                await self._hand_in(run_id, lambda token: self._journal.delete(Deletion(expected, row, left, token)))
            finally:  # whatever is known here: what the journal has is asked for again
                if live is not None:
                    live.stale = True
                self._live.pop(run_id, None)
            return row

        row = await self.ledger.extend(write)
        self.damage.forget(run_id)
        return row

    def turn(self, live: LiveRun) -> Turn:
        """Wait for the run's turn, then hold it. Raises Busy when INBOX_MAX others wait already."""
        return Turn(self, live)

    async def commit(self, live: LiveRun, events: Sequence[Event], actor: str) -> list[Outcome]:
        """Fold the events, make them durable, then let the new state be seen. All or none.

        Call inside `turn`. Raises what the fold raises, Busy where the store cannot write, Lost where another
        process was faster (the run is folded anew at the next turn).
        """
        run, seq, head, now = live.run, live.run.seq, live.record.hash, self.now_us()
        run_id = live.spec.run
        rows, outcomes = [], []
        for event in events:
            run, outcome = fold.apply(live.rules, run, event)
            outcomes.append(outcome)
            seq += 1
            assert run.seq == seq, "only events that change the run may be committed: see fold.fresh"
            entry = records.to_entry(event, outcome, live.spec.shadows)
            kind, attempt, first, last, meta, columns = entry
            head = chained(head, run_id, Row(seq, kind, attempt, first, last, actor, now, meta, columns, b""))
            rows.append(Row(seq, kind, attempt, first, last, actor, now, meta, columns, head))
        step = run.through if run.observations else None
        of, project, name, _, _, labels, _, _, created, _, _, _, parent = live.record
        policy = fold.ruling(live.rules, run).policy.tag
        record = RunRecord(
            of, project, name, run.status, policy, labels, run.attempt, step, created, now, seq, head, parent
        )
        snapshot = self._snapshot(live, run)
        told = self._herald.outgoing(record, live.run, events, outcomes, now) if self._herald else ()
        try:
            await self._append(run_id, live.run.seq, tuple(rows), record, snapshot, told)
        except Busy:
            raise
        except BaseException as error:
            # Conflict, or cancelled with the append under way: what the journal holds is not known here.
            live.stale = True
            if isinstance(error, Damaged):
                self.found_damage(run_id, str(error))
            raise
        if not any(isinstance(event, OF_JOBS) for event in events):
            await self._beside(live, now)
        live.run, live.record = run, record
        live.snapshot_at = min(live.snapshot_at, run.observations)  # a rewind takes observations back
        if snapshot is not None:
            live.snapshot_at = run.observations
        for event, outcome in zip(events, outcomes, strict=True):
            if isinstance(event, Attached):
                live.recent.clear()  # those decisions belong to the line that was left
            if isinstance(event, Observed) and run.lag is not None:
                live.recent.append((event.steps[0], event.steps[-1], outcome.changes))
        live.tell()
        if told and self._herald:
            self._herald.added(told)
        return outcomes

    async def hear_of(self, live: LiveRun) -> None:
        """Learn when the run's job was last heard of, perhaps by another process."""
        found = (await asyncio.to_thread(self._journal.heard, [live.spec.run])).get(live.spec.run, live.heard)
        live.heard = max(live.heard, found)

    async def _beside(self, live: LiveRun, now: int) -> None:
        """Somebody else than the job added to the run: that is no news of the job."""
        if not live.heard.at:
            await self.hear_of(live)
        live.heard = Heard(newest_news(live.record, live.heard), now)
        with contextlib.suppress(Busy):
            self._journal.hear(live.spec.run, live.heard)

    async def restored(self, live: LiveRun, attempt: int, step: int) -> Run:
        """The run as it was before it observed `step`, on the line of `attempt`; as it last was on that line, where
        the line ends before the step (what the job did in between never arrived: a gap)."""
        read = loading.fold_until
        return await self._reading(
            live, lambda: read(self._journal, live.spec, live.origin, live.rules, live.run, attempt, step)
        )

    async def earlier(self, live: LiveRun) -> list[tuple[int, Settings]]:
        """With a lag, as long as the newest attempt observed nothing: what was decided before it on its line, from what
        belongs to its first step on."""
        run = live.run
        if not run.lag or run.through >= run.from_step or run.from_step == 0 or run.attempts[-1][2] == 0:
            return []
        line = (live.spec, live.origin, live.rules, run)
        return await self._reading(live, lambda: loading.decided_before(self._journal, *line))

    async def resent(self, live: LiveRun, first: int, last: int) -> list[tuple[int, Settings]]:
        """The recorded settings for steps first..last, which were folded before; [] where too long ago."""
        found = loading.within(live.recent, first, last)
        if not found:
            read = loading.recent_batches
            rows = await self._reading(live, lambda: read(self._journal, live.spec, live.run))
            found = loading.within(rows, first, last)
        return found

    def _keep(self, live: LiveRun) -> None:
        self._live[live.spec.run] = live
        if len(self._live) > limits.LIVE_RUNS_MAX:
            idle = next((r for r, x in self._live.items() if not x.waiting), None)
            if idle is not None:
                del self._live[idle]

    def _snapshot(self, live: LiveRun, run: Run) -> Snapshot | None:
        ended = run.status != "active" and run.status != live.run.status
        if not ended and run.observations - live.snapshot_at < limits.SNAPSHOT_EVERY:
            return None
        return Snapshot(run.seq, run.attempt, run.through, json.dumps(fold.dump(run), allow_nan=False))

    async def _append(
        self,
        run_id: str,
        expected: int,
        rows: tuple[Row, ...],
        record: RunRecord,
        snapshot: Snapshot | None,
        told: tuple[Delivery, ...] = (),
    ) -> None:
        append = self._journal.append
        await self._hand_in(run_id, lambda token: append(Append(expected, rows, record, snapshot, token, told)))

    async def _hand_in(self, run_id: str, hand: Callable[[asyncio.Future[None]], None]) -> None:
        """Give the journal something to write and wait until it has. Raises Lost instead of Conflict."""
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[None] = self._loop.create_future()
        try:
            hand(future)
            await future
        except Conflict as error:
            raise Lost(f"run {run_id}: another process appended first") from error

    def _deliver(self, results: Sequence[tuple[Work, Exception | None]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._resolve, results)

    @staticmethod
    def _resolve(results: Sequence[tuple[Work, Exception | None]]) -> None:
        for item, error in results:
            future: asyncio.Future[None] = item.token
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    async def _is_behind(self, live: LiveRun) -> bool:
        record = await asyncio.to_thread(self._journal.record, live.spec.run)
        return record is not None and record.seq > live.run.seq

    async def _reload(self, live: LiveRun) -> None:
        run_id = live.spec.run
        newest = await self._reading(live, lambda: loading.load(self._journal, self._ruler, run_id))
        if newest.problem:
            self.found_damage(run_id, newest.problem)
            raise Damaged(newest.problem)
        live.run, live.record, live.snapshot_at = newest.run, newest.record, newest.snapshot_at
        live.recent.clear()
        live.stale = False

    # -- damage ----------------------------------------------------------------------------------------------

    def found_damage(self, run_id: str, problem: str, took_s: float = 0.0) -> None:
        """Somebody read a run, in so much time, and found that it is not what was written."""
        assert self._loop is not None
        self.damage.note(run_id, problem, self._loop.time(), took_s)
        if self._herald:
            self._herald.damaged(run_id, problem)

    def _better(self, known: LiveRun | None, found: LiveRun) -> LiveRun:
        """Of a damaged run memory may hold more than can still be read."""
        damaged = self.damage.words(found.spec.run)
        return known if known is not None and damaged and known.run.seq >= found.run.seq else found

    def _is_due(self, run_id: str) -> bool:
        return bool(self.damage) and self._loop is not None and self.damage.is_due(run_id, self._loop.time())

    async def _reading(self, live: LiveRun, work: Callable[[], T]) -> T:
        """Read outside the event loop, and remember what is found damaged."""
        try:
            return await asyncio.to_thread(work)
        except Damaged as error:
            self.found_damage(live.spec.run, str(error))
            raise

    async def _examined(self, run_id: str) -> LiveRun:
        """The run as the journal has it. One that was found damaged is examined whole, and forgiven where it is well;
        what lies before the snapshot of any other is left to the scrub."""
        assert self._loop is not None
        known, started = self.damage.words(run_id), self._loop.time()
        if known and not self.damage.is_due(run_id, started):
            raise Damaged(known)
        try:
            found = await asyncio.to_thread(loading.load, self._journal, self._ruler, run_id)
            problem = found.problem
            if known and not problem:
                problem = await asyncio.to_thread(proving.unread_problem, self._journal, run_id, found.unread)
        except Damaged as error:
            self.found_damage(run_id, str(error), self._loop.time() - started)
            raise
        if problem:
            self.found_damage(run_id, problem, self._loop.time() - started)
        elif known:
            self.damage.forget(run_id)
        else:
            self._scrub.add(run_id, found.unread)
        return _live(found)


def _live(found: Loaded) -> LiveRun:
    live = LiveRun(found.spec, found.origin, found.rules, found.run, found.record)
    live.snapshot_at = found.snapshot_at
    return live
