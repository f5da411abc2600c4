"""The one thread that writes to the database: group commit, and tidying up behind it.

Rule of this module: commit, then deliver. Everything that waits goes into one transaction; its appends hear of it
only after the commit. An append that may not be written is sorted out before the transaction, or, where
the database itself refuses, by writing the group again one append at a time.

Tidying comes after delivering, one run at a time, and waits for a moment without appends unless a run is far
behind; then it keeps pace with what is written, so that neither the backlog nor the pause grows. Compaction
replaces a run's single rows by one segment. Snapshots thin out with age: the newest SNAPSHOTS_KEPT stay, of the
older ones the oldest in each doubling of distance from the newest row.

Longer than 400 lines because all of it shares one connection and what is known of each run's newest rows.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa

from flyball_server.core.errors import Busy, Conflict, SteeringError
from flyball_server.storage import tables
from flyball_server.storage.blocks import Stored, check_order, pack_segment, store
from flyball_server.storage.journal import GENESIS, Append, Deliver, RunRecord
from flyball_server.storage.packing import compress

#: Appends that may wait for the writer; more are refused with Busy.
APPENDS_MAX = 8192
#: Appends in one transaction.
GROUP_MAX = 1024
#: Runs whose head (newest sequence number, labels, what is not compacted) is remembered.
HEADS_MAX = 16384
#: A run is compacted when it has this many observations, or this many rows, outside segments ...
COMPACT_OBSERVATIONS = 4096
COMPACT_ROWS = 1024
#: ... and while appends are waiting only when it has this many times as much.
COMPACT_AT_ONCE = 4
#: The rows, their observations, and the bytes of their payloads, in one segment. The last row may go beyond.
SEGMENT_ROWS_MAX = COMPACT_AT_ONCE * COMPACT_ROWS
SEGMENT_OBSERVATIONS_MAX = COMPACT_AT_ONCE * COMPACT_OBSERVATIONS
SEGMENT_BYTES_MAX = 8 << 20
#: The newest snapshots of a run, and the new ones after which the older ones are thinned out.
SNAPSHOTS_KEPT = 8

_log = logging.getLogger(__name__)


class _Head:
    """What the writer knows of a run. A commit that fails makes it forget the heads it touched."""

    __slots__ = ("labels", "observations", "rows", "segment_end", "seq", "snapshots")

    def __init__(self, seq: int, segment_end: int, rows: int, observations: int, labels: Mapping[str, str] | None):
        self.seq = seq
        self.segment_end = segment_end
        self.rows = rows
        self.observations = observations
        self.labels = labels
        self.snapshots = 0

    def advance(self, append: Append) -> int:
        """The head behind the append; how many observations it brought."""
        observations = sum(_observations(row.first_step, row.last_step) for row in append.rows)
        self.seq += len(append.rows)
        self.rows += len(append.rows)
        self.observations += observations
        self.snapshots += append.snapshot is not None
        self.labels = append.record.labels
        return observations

    def backlog(self) -> float:
        """How much lies outside segments, in units of what makes a compaction worthwhile."""
        return max(
            self.rows / COMPACT_ROWS, self.observations / COMPACT_OBSERVATIONS, self.snapshots / SNAPSHOTS_KEPT / 2
        )


class _Request(NamedTuple):
    """Work for the writer's thread that somebody waits for."""

    work: Callable[[], None]
    done: Future[None]


class Writer:
    """`append`, `insert` and `compact` may be called from any thread; everything else happens on the writer's own."""

    def __init__(self, engine: sa.Engine, deliver: Deliver, gone: Callable[[], str]) -> None:
        self._deliver = deliver
        self._gone = gone  # why nothing may be written now: a deleted file takes every write, and keeps none
        self._queue: queue.SimpleQueue[Append | _Request | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._heads: OrderedDict[str, _Head] = OrderedDict()
        self._connection = engine.connect()
        self._due: dict[str, None] = {}
        self._overdue: dict[str, None] = {}
        #: Observations written and not yet made up for by compacting: what a round may spend on overdue runs.
        self._owed = 0
        self._save_row = tables.Prepared(sa.insert(tables.journal), engine.dialect)
        self._save_snapshot = tables.insert_or_update(tables.snapshots, engine.dialect.name)
        self._save_run = tables.insert_or_update(tables.runs, engine.dialect.name)
        self._move_run = tables.Prepared(tables.MOVE_RUN, engine.dialect)
        self._thread = threading.Thread(target=self._work, name="flyball-journal", daemon=True)
        self._thread.start()

    def append(self, append: Append) -> None:
        if self._queue.qsize() >= APPENDS_MAX:
            raise Busy(f"{APPENDS_MAX} appends wait for the journal")
        self._put(append)

    def insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        self._ask(lambda: self._insert(record, segments))

    def compact(self, run: str) -> None:
        self._ask(lambda: self._compact_all(run))

    def _ask(self, work: Callable[[], None]) -> None:
        request = _Request(work, Future())
        self._put(request)
        request.done.result()

    def close(self) -> None:
        """Write and deliver what was accepted, then end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _put(self, item: Append | _Request) -> None:
        with self._closing:  # nothing may come behind the None that ends the thread
            if self._closed:
                raise Busy("the journal is closed")
            self._queue.put(item)

    # -- the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with self._connection:
            open_ = True
            while open_:
                appends, requests, open_ = self._take()
                if appends:
                    self._commit(appends)
                for request in requests:
                    self._answer(request)
                if open_:
                    self._tidy()

    def _take(self) -> tuple[list[Append], list[_Request], bool]:
        """What waits, at most one group. Blocks while there is nothing to do."""
        appends: list[Append] = []
        requests: list[_Request] = []
        block = not self._due and not self._overdue
        while len(appends) < GROUP_MAX:
            try:
                item = self._queue.get(block)
            except queue.Empty:
                break
            block = False
            if item is None:
                return appends, requests, False
            if isinstance(item, Append):
                appends.append(item)
            else:
                requests.append(item)
        return appends, requests, True

    def _answer(self, request: _Request) -> None:
        try:
            request.done.set_result(request.work())
        except Exception as error:
            request.done.set_exception(meaning(error))

    # -- whole runs ------------------------------------------------------------------------------------------

    def _insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        """One transaction, which reads `segments` as it goes: a long run need not fit into memory."""
        if why := self._gone():
            raise Busy(why)
        run = record.run
        try:
            with self._connection.begin():
                if self._head(run).seq:
                    raise Conflict(f"run {run!r} exists already")
                for one in segments:
                    self._save_row.execute(self._connection, [{"run": run, **one._asdict()}])
                self._save([], {run: Append(0, (), record, None, None)}, [], {run: record.labels})
        finally:
            self._heads.pop(run, None)

    # -- appends ---------------------------------------------------------------------------------------------

    def _commit(self, appends: list[Append]) -> None:
        try:
            results = self._write(appends)
        except Exception as error:
            meant = meaning(error)
            if isinstance(meant, Busy):  # it would be the same for each of them
                results = [(append, meant) for append in appends]
            else:
                results = [self._write_alone(append) for append in appends]
        try:
            self._deliver(results)
        except Exception:
            _log.exception("delivering %d appends failed", len(results))

    def _write_alone(self, append: Append) -> tuple[Append, Exception | None]:
        try:
            return self._write([append])[0]
        except Exception as error:
            return append, meaning(error)

    def _write(self, appends: Sequence[Append]) -> list[tuple[Append, Exception | None]]:
        """One transaction. Raises where the database refuses it; then nothing was written."""
        if why := self._gone():
            raise Busy(why)
        results: list[tuple[Append, Exception | None]] = []
        rows: list[dict[str, Any]] = []
        written: dict[str, Append] = {}
        snapshots: list[dict[str, Any]] = []
        labels: dict[str, Mapping[str, str]] = {}
        try:
            with self._connection.begin():
                for append in appends:
                    try:
                        head = self._admit(append)
                        new_rows, new_snapshot = _table_rows(append)
                    except Exception as error:
                        results.append((append, meaning(error)))
                        continue
                    rows += new_rows
                    snapshots += new_snapshot
                    if head.labels != append.record.labels:
                        labels[append.record.run] = append.record.labels
                    self._owed += head.advance(append)
                    written[append.record.run] = append
                    results.append((append, None))
                self._save(rows, written, snapshots, labels)
        except BaseException:
            for append in appends:
                self._heads.pop(append.record.run, None)
            with suppress(Exception):  # where rolling back failed as well, say on a bad disk
                self._connection.rollback()
            raise
        for run in written:
            self._note(run)
        return results

    def _admit(self, append: Append) -> _Head:
        run = append.record.run
        head = self._head(run)
        if head.seq != append.expected_seq:
            raise Conflict(f"run {run!r} is at {head.seq}, not at {append.expected_seq}")
        check_order(append)
        return head

    def _save(
        self,
        rows: list[dict[str, Any]],
        written: Mapping[str, Append],
        snapshots: list[dict[str, Any]],
        labels: Mapping[str, Mapping[str, str]],
    ) -> None:
        if rows:
            self._save_row.execute(self._connection, rows)
        # A run's record is written whole when it is new (then its labels are, too) or its labels change; else only
        # what moves, which leaves the indexes alone.
        new = [a.record for a in written.values() if a.record.run in labels]
        moved = [a.record._asdict() for a in written.values() if a.record.run not in labels]
        if new:
            self._connection.execute(
                self._save_run, [{**r._asdict(), "labels": json.dumps(dict(r.labels), sort_keys=True)} for r in new]
            )
        if moved:
            self._move_run.execute(self._connection, moved)
        if snapshots:
            self._connection.execute(self._save_snapshot, snapshots)
        if labels:
            table = tables.labels
            self._connection.execute(sa.delete(table).where(table.c.run.in_(list(labels))))
            pairs = [{"run": r, "key": k, "value": v} for r, pairs in labels.items() for k, v in pairs.items()]
            if pairs:
                self._connection.execute(sa.insert(table), pairs)

    def _note(self, run: str) -> None:
        """Remember that a run wants tidying."""
        backlog = self._heads[run].backlog()
        if backlog >= COMPACT_AT_ONCE:
            self._overdue[run] = None
        elif backlog >= 1:
            self._due[run] = None

    def _head(self, run: str) -> _Head:
        head = self._heads.get(run)
        if head is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.popitem(last=False)
            head = self._heads[run] = self._load_head(run)
        self._heads.move_to_end(run)
        return head

    def _load_head(self, run: str) -> _Head:
        table = tables.journal.c
        newest_first = (
            sa.select(table.seq, table.last_seq, table.first_step, table.last_step)
            .where(table.run == run)
            .order_by(table.seq.desc())
        )
        labels = self._connection.execute(sa.select(tables.runs.c.labels).where(tables.runs.c.run == run)).scalar()
        head = _Head(0, 0, 0, 0, None if labels is None else json.loads(labels))
        with self._connection.execute(newest_first) as found:
            for seq, last_seq, first_step, last_step in found:
                head.seq = head.seq or last_seq
                if last_seq > seq:
                    head.segment_end = last_seq
                    break
                head.rows += 1
                head.observations += _observations(first_step, last_step)
        return head

    # -- tidying ---------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Compact runs that are far behind, about as fast as they are written; else, in a quiet moment, one run."""
        if self._overdue:
            self._tidy_run(next(iter(self._overdue)))
            while self._overdue and self._owed > 0:
                self._tidy_run(next(iter(self._overdue)))
        elif self._due and self._queue.empty():
            self._tidy_run(next(iter(self._due)))

    def _tidy_run(self, run: str) -> None:
        self._due.pop(run, None)
        self._overdue.pop(run, None)
        try:
            if run in self._heads and self._heads[run].snapshots > SNAPSHOTS_KEPT:
                self._thin_snapshots(run)
            if self._compact(run):
                self._note(run)  # there may be enough left for another segment
        except Exception:  # it will be due again with the run's next append
            self._heads.pop(run, None)
            _log.warning("compacting run %r failed", run, exc_info=True)

    def _compact_all(self, run: str) -> None:
        try:
            while self._compact(run):
                pass
        except Exception:
            self._heads.pop(run, None)
            raise

    def _compact(self, run: str) -> bool:
        """Merge the oldest single rows into one segment; False where there are not two of them."""
        table = tables.journal
        with self._connection.begin():
            head = self._head(run)
            rows = self._singles(run, head.segment_end)
            if len(rows) < 2:
                return False
            before = sa.select(table.c.hash).where(table.c.run == run, table.c.seq < rows[0].seq)
            previous = self._connection.execute(before.order_by(table.c.seq.desc()).limit(1)).scalar()
            segment = pack_segment(previous or GENESIS, rows)
            merged = table.c.seq.between(segment.seq, segment.last_seq)
            self._connection.execute(sa.delete(table).where(table.c.run == run, merged))
            self._save_row.execute(self._connection, [{"run": run, **segment._asdict()}])
        merged_count = sum(_observations(row.first_step, row.last_step) for row in rows)
        head.segment_end = segment.last_seq
        head.rows -= len(rows)
        head.observations -= merged_count
        self._owed = max(self._owed - merged_count, 0)
        return True

    def _singles(self, run: str, segment_end: int) -> list[Stored]:
        """The oldest single rows, at most one segment of them."""
        table = tables.journal.c
        query = sa.select(*[table[name] for name in Stored._fields]).where(table.run == run, table.seq > segment_end)
        rows: list[Stored] = []
        size = observations = 0
        with self._connection.execute(query.order_by(table.seq).limit(SEGMENT_ROWS_MAX)) as found:
            for row in found:
                rows.append(Stored._make(row))
                size += len(rows[-1].payload)
                observations += _observations(rows[-1].first_step, rows[-1].last_step)
                if len(rows) > 1 and (size >= SEGMENT_BYTES_MAX or observations >= SEGMENT_OBSERVATIONS_MAX):
                    break
        return rows

    def _thin_snapshots(self, run: str) -> None:
        table = tables.snapshots
        with self._connection.begin():
            found = sa.select(table.c.seq).where(table.c.run == run).order_by(table.c.seq.desc())
            drop = superfluous(self._connection.execute(found).scalars())
            if drop:
                gone = sa.delete(table).where(table.c.run == run, table.c.seq == sa.bindparam("gone"))
                self._connection.execute(gone, [{"gone": seq} for seq in drop])
        self._heads[run].snapshots = 0


def _table_rows(append: Append) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The append's rows and its snapshot, if any, as the tables keep them."""
    run, snapshot = append.record.run, append.snapshot
    rows = [{"run": run, **store(row)._asdict()} for row in append.rows]
    if snapshot is None:
        return rows, []
    return rows, [{"run": run, **snapshot._asdict(), "state": compress([snapshot.state.encode()])}]


def superfluous(newest_first: Iterable[int]) -> list[int]:
    """The snapshots to drop: of those behind the newest SNAPSHOTS_KEPT, all but the oldest per doubling."""
    seqs = list(newest_first)
    oldest = {(seqs[0] - seq).bit_length(): seq for seq in seqs}
    return [seq for seq in seqs[SNAPSHOTS_KEPT:] if oldest[(seqs[0] - seq).bit_length()] != seq]


def meaning(error: Exception) -> Exception:
    """A database's error as one of ours, where it is one: Conflict for a taken key, Busy for a full or locked disk."""
    if isinstance(error, sa.exc.IntegrityError):
        return Conflict("another writer appended to this run first")
    if isinstance(error, sa.exc.OperationalError):
        return Busy(f"the database cannot write now: {error.orig}")
    if not isinstance(error, SteeringError):
        _log.error("an append failed", exc_info=error)
    return error


def _observations(first_step: int | None, last_step: int | None) -> int:
    return 1 if first_step is None or last_step is None else max(last_step - first_step + 1, 1)
