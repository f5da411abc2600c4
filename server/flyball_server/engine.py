"""The live runs: inbox -> fold -> journal -> publish.

Rule of this module: persist, then publish. A fold's result becomes visible (in an answer, a query, the next
fold) only after the journal has its events. This is the only place of the server that reads the clock.

All of it runs on one event loop. A run's requests pass one at a time behind its lock; the journal commits the
appends of all runs together on its own thread. Where another process appended first, or an append's fate is
unknown, the run is folded again from the journal before anything else is done with it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flyball_server import limits, records
from flyball_server.core import run as fold
from flyball_server.core.errors import Busy, Conflict, Invalid, NotFound
from flyball_server.core.events import Attached, Created, Event, Observed, Origin, Outcome, Spec
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Settings
from flyball_server.storage.journal import GENESIS, Append, Journal, Row, RunRecord, Snapshot, chained

#: Builds what a specification means (policy, base, guard); raises Invalid.
Ruler = Callable[[Spec], Rules]


class Lost(Exception):
    """Another process appended to the run first: fold again and retry. Never leaves this module."""


class LiveRun:
    """One run in memory: its newest durable state and the place its next row goes to."""

    def __init__(self, spec: Spec, origin: Origin | None, rules: Rules, run: Run, record: RunRecord) -> None:
        self.spec = spec
        self.origin = origin
        self.rules = rules
        self.run = run
        self.record = record
        self.lock = asyncio.Lock()
        self.waiting = 0
        self.stale = False
        self.snapshot_at = run.observations
        #: The newest batches' settings, for steps that a client sends again.
        self.recent: deque[tuple[int, int, Sequence[tuple[int, Settings]]]] = deque(maxlen=64)


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
        live.waiting += 1
        try:
            await live.lock.acquire()
            try:
                if live.stale:
                    await self._engine._reload(live)
            except BaseException:
                live.lock.release()
                raise
        except BaseException:
            live.waiting -= 1
            raise
        return live

    async def __aexit__(self, *_: object) -> None:
        self._live.lock.release()
        self._live.waiting -= 1


class Engine:
    """The set of live runs over one journal."""

    def __init__(self, journal: Journal, ruler: Ruler, now_us: Callable[[], int]) -> None:
        self._journal = journal
        self._ruler = ruler
        self.now_us = now_us
        self._live: OrderedDict[str, LiveRun] = OrderedDict()
        self._loading: dict[str, asyncio.Lock] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

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
        await asyncio.to_thread(self._journal.close)

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
            "" if origin is None else origin.run,
        )  # fmt: skip
        await self._append(spec.run, 0, (row,), record, None)
        live = LiveRun(spec, origin, rules, run, record)
        self._keep(live)
        return live

    async def find(self, run_id: str) -> LiveRun:
        """The live run, folded from the journal where it is not in memory. Raises NotFound."""
        live = self._live.get(run_id)
        if live is not None:
            self._live.move_to_end(run_id)
            return live
        async with self._loading.setdefault(run_id, asyncio.Lock()):
            live = self._live.get(run_id)
            if live is None:
                try:
                    live = await asyncio.to_thread(self._load, run_id)
                finally:
                    self._loading.pop(run_id, None)
                self._keep(live)
        return live

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
        of, project, name, _, policy, labels, _, _, created, _, _, _, parent = live.record
        record = RunRecord(
            of, project, name, run.status, policy, labels, run.attempt, step, created, now, seq, head, parent
        )
        snapshot = self._snapshot(live, run)
        try:
            await self._append(run_id, live.run.seq, tuple(rows), record, snapshot)
        except Busy:
            raise
        except BaseException:
            # Conflict, or cancelled with the append under way: what the journal holds is not known here.
            live.stale = True
            raise
        live.run, live.record = run, record
        live.snapshot_at = min(live.snapshot_at, run.observations)  # a rewind takes observations back
        if snapshot is not None:
            live.snapshot_at = run.observations
        for event, outcome in zip(events, outcomes, strict=True):
            if isinstance(event, Attached):
                live.recent.clear()  # those decisions belong to the line that was left
            if isinstance(event, Observed) and run.lag is not None:
                live.recent.append((event.steps[0], event.steps[-1], outcome.changes))
        return outcomes

    async def restored(self, live: LiveRun, attempt: int, step: int) -> Run:
        """The run as it was before it observed `step`, on the line of `attempt`; as it last was on that line, where
        the line ends before the step (what the job did in between never arrived: a gap)."""
        return await asyncio.to_thread(self._fold_until, live, attempt, step)

    async def resent(self, live: LiveRun, first: int, last: int) -> list[tuple[int, Settings]]:
        """The recorded settings for steps first..last, which were folded before; [] where too long ago."""
        found = self._within(live.recent, first, last)
        if not found:
            rows = await asyncio.to_thread(self._recent_rows, live)
            found = self._within(rows, first, last)
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
        self, run_id: str, expected: int, rows: tuple[Row, ...], record: RunRecord, snapshot: Snapshot | None
    ) -> None:
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[None] = self._loop.create_future()
        try:
            self._journal.append(Append(expected, rows, record, snapshot, future))
            await future
        except Conflict as error:
            raise Lost(f"run {run_id}: another process appended first") from error

    def _deliver(self, results: Sequence[tuple[Append, Exception | None]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._resolve, results)

    @staticmethod
    def _resolve(results: Sequence[tuple[Append, Exception | None]]) -> None:
        for append, error in results:
            future: asyncio.Future[None] = append.token
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    async def _reload(self, live: LiveRun) -> None:
        newest = await asyncio.to_thread(self._load, live.spec.run)
        live.run, live.record, live.snapshot_at = newest.run, newest.record, newest.snapshot_at
        live.recent.clear()
        live.stale = False

    def _load(self, run_id: str) -> LiveRun:
        record = self._journal.record(run_id)
        first = next(self._journal.rows(run_id, until=1), None)
        if record is None or first is None:
            raise NotFound(f"run {run_id!r} is not known: `flyball runs` lists those that are")
        spec = records.spec_of(first)
        rules = self._ruler(spec)
        snapshot = self._journal.snapshot(run_id)
        if snapshot is None:
            run = fold.create(rules, records.origin_of(first))
        else:
            run = fold.load(rules, json.loads(snapshot.state))
        snapshot_at, head = run.observations, first.hash
        for row in self._journal.rows(run_id, after=run.seq):
            run, _ = fold.apply(rules, run, records.from_row(row, spec.groups)[0])
            head = row.hash
        # Read last: where another process appends at this moment, whatever we miss here shows as a lost append.
        record = self._journal.record(run_id) or record
        if record.seq < run.seq:
            record = record._replace(seq=run.seq, hash=head)
        live = LiveRun(spec, records.origin_of(first), rules, run, record)
        live.snapshot_at = snapshot_at
        return live

    def _fold_until(self, live: LiveRun, attempt: int, step: int) -> Run:
        attempts = live.run.attempts
        # Before its first step an attempt shares the line of the one it came from.
        while attempts[attempt - 1][0] > step and attempts[attempt - 1][2] > 0:
            attempt = attempts[attempt - 1][2]
        opened = attempts[attempt - 1][1]
        snapshot = self._journal.snapshot(live.spec.run)
        while snapshot is not None and not (
            snapshot.seq < opened
            or (snapshot.attempt == attempt and snapshot.step is not None and snapshot.step < step)
        ):
            snapshot = self._journal.snapshot(live.spec.run, until=snapshot.seq - 1)
        rules = live.rules
        run = fold.create(rules, live.origin) if snapshot is None else fold.load(rules, json.loads(snapshot.state))
        for row in self._journal.rows(live.spec.run, after=run.seq):
            if row.seq > opened and (run.through >= step - 1 or row.kind == "attached"):
                break
            event, _ = records.from_row(row, live.spec.groups)
            if isinstance(event, Observed) and row.seq > opened and event.steps[-1] >= step:
                earlier = _before(event, step)
                if earlier is None:
                    break
                event = earlier
            run, _ = fold.apply(rules, run, event)
        return run

    def _recent_rows(self, live: LiveRun) -> list[tuple[int, int, Sequence[tuple[int, Settings]]]]:
        after = max(0, live.run.seq - limits.RESENT_ROWS_MAX)
        out: list[tuple[int, int, Sequence[tuple[int, Settings]]]] = []
        for row in self._journal.rows(live.spec.run, after=after):
            if row.kind == "observed" and row.attempt == live.run.attempt:
                event, outcome = records.from_row(row, live.spec.groups)
                assert isinstance(event, Observed)
                out.append((event.steps[0], event.steps[-1], outcome.changes))
        return out

    @staticmethod
    def _within(
        batches: Sequence[tuple[int, int, Sequence[tuple[int, Settings]]]]
        | deque[tuple[int, int, Sequence[tuple[int, Settings]]]],
        first: int,
        last: int,
    ) -> list[tuple[int, Settings]]:
        out: list[tuple[int, Settings]] = []
        for start, end, changes in batches:
            if end >= first and start <= last:
                out.extend(changes)
        # An older batch's last change may cover `first`; a later change than `last` is not asked for.
        return [change for change in out if change[0] <= last] if out and out[0][0] <= first else []


def _before(event: Observed, step: int) -> Observed | None:
    """The part of a batch that lies before `step`; None where there is none."""
    cut = next((i for i, s in enumerate(event.steps) if s >= step), len(event.steps))
    if cut == 0:
        return None
    return Observed(event.attempt, event.steps[:cut], {n: c[:cut] for n, c in event.signals.items()})


def next_attempt(
    live: LiveRun,
    parent: int,
    from_step: int,
    session: str,
    client: str,
    lag: int | None,
    restored: Run | None,
    claimed: Mapping[str, Any] | None = None,
) -> Attached:
    """The event that opens the run's next attempt."""
    if from_step < 0:
        raise Invalid(f"from_step is {from_step}: steps are counted from 0")
    state = None if restored is None else fold.dump(restored)
    return Attached(live.run.attempt + 1, parent, from_step, session, client, lag, state, claimed)
