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
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa

from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid, SteeringError
from flyball_server.storage import audit, outbox, tables, tidying
from flyball_server.storage.blocks import Stored, check_order, store
from flyball_server.storage.gauge import Gauge
from flyball_server.storage.heads import Head, load_head
from flyball_server.storage.journal import STORE, Append, Deletion, Deliver, Heard, Note, RunRecord, Work
from flyball_server.storage.packing import seal
from flyball_server.storage.tidying import SNAPSHOTS_KEPT, observations

#: Appends that may wait for the writer; more are refused with Busy.
APPENDS_MAX = 8192
#: Appends in one transaction.
GROUP_MAX = 1024
#: Runs whose head (newest sequence number, labels, what is not compacted) is remembered.
HEADS_MAX = 16384
#: A due run is compacted while appends are waiting only when it has this many times as much.
COMPACT_AT_ONCE = 4
#: When an append is to be tried again where the store is full.
FULL_RETRY_S = 5.0

_log = logging.getLogger(__name__)


class _Request(NamedTuple):
    """Other work for the writer's thread; most of it somebody waits for."""

    work: Callable[[], None]
    done: Future[None]


class Writer:
    """`append` and the verbs behind it may be called from any thread; the rest is the writer's own."""

    def __init__(self, engine: sa.Engine, deliver: Deliver, gone: Callable[[], str], gauge: Gauge) -> None:
        self._deliver = deliver
        self._gauge = gauge
        self._gone = gone  # why nothing may be written now: a deleted file takes every write, and keeps none
        self._queue: queue.SimpleQueue[Work | _Request | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._connection = engine.connect()
        self._driver: Any = self._connection.connection.driver_connection
        self._due: dict[str, None] = {}
        self._overdue: dict[str, None] = {}
        #: Observations written and not yet made up for by compacting: what a round may spend on overdue runs.
        self._owed = 0
        self._save_row = tables.Prepared(sa.insert(tables.journal), engine.dialect)
        self._save_noted = tables.Prepared(sa.insert(tables.audit), engine.dialect)
        self._save_snapshot = tables.insert_or_update(tables.snapshots, engine.dialect.name)
        self._save_run = tables.insert_or_update(tables.runs, engine.dialect.name)
        self._move_run = tables.Prepared(tables.MOVE_RUN, engine.dialect)
        self._thread = threading.Thread(target=self._work, name="flyball-journal", daemon=True)
        self._thread.start()

    def append(self, append: Append) -> None:
        if self._queue.qsize() >= APPENDS_MAX:
            raise Busy(f"{APPENDS_MAX} appends wait for the journal")
        self._put(append)

    def delete(self, deletion: Deletion) -> None:
        self._put(deletion)

    def note(self, note: Note) -> None:
        self._put(note)

    def hear(self, run: str, heard: Heard) -> None:
        self._put(_Request(lambda: self._hear(run, heard), Future()))

    def insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        self._ask(lambda: self._insert(record, segments))

    def compact(self, run: str) -> None:
        self._ask(lambda: self._compact_all(run))

    def shrink(self) -> None:
        self._ask(self._vacuum)

    def transact(self, work: Callable[[sa.Connection], object]) -> None:
        """Do the work in a transaction of its own, and wait until it is durable."""
        self._ask(lambda: self._transact(work))

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

    def _put(self, item: Work | _Request) -> None:
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
                for item in requests:
                    self._answer(item)
                if open_:
                    self._tidy()

    def _take(self) -> tuple[list[Append], list[Deletion | Note | _Request], bool]:
        """What waits, at most one group. Blocks while there is nothing to do."""
        appends: list[Append] = []
        requests: list[Deletion | Note | _Request] = []
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

    def _answer(self, item: Deletion | Note | _Request) -> None:
        error: Exception | None = None
        try:
            if isinstance(item, Deletion):
                self._delete(item)
            elif isinstance(item, Note):
                self._set_down(item)
            else:
                item.work()
        except Exception as found:
            with suppress(Exception):
                self._connection.rollback()
            error = meaning(found)
        if isinstance(item, _Request):
            item.done.set_result(None) if error is None else item.done.set_exception(error)
            return
        try:
            self._deliver([(item, error)])
        except Exception:
            _log.exception("delivering what the store's journal was given failed")

    def _delete(self, deletion: Deletion) -> None:
        run, expected = deletion.record.run, deletion.expected_seq
        if run == STORE:
            raise Invalid(f"{STORE!r} is no run: it cannot be deleted")
        if why := self._gone():
            raise Busy(why)
        with self._connection.begin():
            tidying.lock_store(self._connection, deletion.row.seq - 1)
            head = self._head(run)
            if head.deleted or (expected is not None and head.seq != expected):
                raise Conflict(f"{run!r} is at {head.seq}, not at {expected}")
            tidying.remove(self._connection, self._save_row, deletion)
            self._save_noted.execute(self._connection, [audit.table_row(STORE, "", deletion.row)])
        self._heads.pop(run, None)

    def _set_down(self, note: Note) -> None:
        if why := self._gone():
            raise Busy(why)
        with self._connection.begin():
            tidying.lock_store(self._connection, note.row.seq - 1)
            self._save_row.execute(self._connection, [{"run": STORE, **store(note.row)._asdict()}])
            self._save_noted.execute(self._connection, [audit.table_row(STORE, "", note.row)])

    def _hear(self, run: str, heard: Heard) -> None:
        if not self._gone() and not self._gauge.full(self._driver):
            save = tables.insert_or_update(tables.heard, self._connection.dialect.name)
            with self._connection.begin():
                self._connection.execute(save, [{"run": run, **heard._asdict()}])

    def _transact(self, work: Callable[[sa.Connection], object]) -> None:
        if why := self._gone():
            raise Busy(why)
        with self._connection.begin():
            work(self._connection)

    def _compact_all(self, run: str) -> None:
        try:
            while self._compact(run):
                pass
            joined = True
            while joined:
                with self._connection.begin():
                    joined = tidying.join(self._connection, self._save_row, run)
            with self._connection.begin():
                audit.make_again(self._connection, run)
        finally:
            self._heads.pop(run, None)

    def _vacuum(self) -> None:
        """Not part of any transaction, so past SQLAlchemy."""
        for words in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
            self._driver.execute(words).fetchall()

    # -- whole runs ------------------------------------------------------------------------------------------

    def _insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        """One transaction, which reads `segments` as it goes: a long run need not fit into memory."""
        if why := self._gone():
            raise Busy(why)
        run = record.run
        try:
            with self._connection.begin():
                head = self._head(run)
                if head.seq or head.deleted:
                    raise Conflict(f"run {run!r} exists already")
                if why := self._gauge.full(self._driver):
                    raise Busy(why)
                for one in segments:
                    self._save_row.execute(self._connection, [{"run": run, **one._asdict()}])
                self._save([], {run: Append(0, (), record, None, None)}, [], {run: record.labels})
                audit.make_again(self._connection, run)
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
        if why := self._gauge.full(self._driver):
            raise Busy(why, FULL_RETRY_S)
        results: list[tuple[Append, Exception | None]] = []
        rows: list[dict[str, Any]] = []
        written: dict[str, Append] = {}
        snapshots: list[dict[str, Any]] = []
        noted: list[dict[str, Any]] = []
        deliveries: list[dict[str, Any]] = []
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
                    noted += _noted_rows(append)
                    deliveries += map(outbox.table_row, append.deliveries)
                    if head.labels != append.record.labels:
                        labels[append.record.run] = append.record.labels
                    self._owed += head.advance(append)
                    written[append.record.run] = append
                    results.append((append, None))
                self._save(rows, written, snapshots, labels)
                if noted:
                    self._save_noted.execute(self._connection, noted)
                if deliveries:
                    self._connection.execute(outbox.adding(self._connection.dialect.name), deliveries)
        except BaseException:
            for append in appends:
                self._heads.pop(append.record.run, None)
            with suppress(Exception):  # where rolling back failed as well, say on a bad disk
                self._connection.rollback()
            raise
        for run in written:
            self._note(run)
        return results

    def _admit(self, append: Append) -> Head:
        run = append.record.run
        head = self._head(run)
        if head.deleted or head.seq != append.expected_seq:
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

    def _head(self, run: str) -> Head:
        head = self._heads.get(run)
        if head is None:
            if len(self._heads) >= HEADS_MAX:
                self._heads.popitem(last=False)
            head = self._heads[run] = load_head(self._connection, run)
        self._heads.move_to_end(run)
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
                with self._connection.begin():
                    tidying.thin_snapshots(self._connection, run)
                self._heads[run].snapshots = 0
            if self._compact(run):
                self._note(run)  # there may be enough left for another segment
        except Exception:  # it will be due again with the run's next append
            self._heads.pop(run, None)
            _log.warning("compacting run %r failed", run, exc_info=True)

    def _compact(self, run: str) -> bool:
        """Merge the oldest single rows into one segment; False where there are not two of them."""
        with self._connection.begin():
            head = self._head(run)
            rows = tidying.singles(self._connection, run, head.segment_end)
            if len(rows) < 2:
                return False
            segment = tidying.merge(self._connection, self._save_row, run, rows, head.found)
        merged_count = sum(observations(row.first_step, row.last_step) for row in rows)
        head.segment_end = segment.last_seq
        head.rows -= len(rows)
        head.observations -= merged_count
        self._owed = max(self._owed - merged_count, 0)
        return True


def _table_rows(append: Append) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The append's rows and its snapshot, if any, as the tables keep them."""
    run, snapshot = append.record.run, append.snapshot
    rows = [{"run": run, **store(row)._asdict()} for row in append.rows]
    if snapshot is None:
        return rows, []
    return rows, [{"run": run, **snapshot._asdict(), "state": seal([snapshot.state.encode()])}]


def _noted_rows(append: Append) -> list[dict[str, Any]]:
    record = append.record
    return [audit.table_row(record.run, record.project, one) for row in append.rows if (one := audit.noted(row))]


def meaning(error: Exception) -> Exception:
    """A database's error as one of ours, where it is one: Conflict for a taken key, Busy for a full or locked disk."""
    if isinstance(error, sa.exc.IntegrityError):
        return Conflict("another writer appended to this run first")
    found = error.orig if isinstance(error, sa.exc.DatabaseError) else error
    if isinstance(found, sqlite3.OperationalError):
        _log.warning("the database cannot write now: %s", found)
        if found.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return Busy(
                "the store cannot write now, its disk is full: nothing is lost, and it goes on once there is room"
            )
        return Busy("the store cannot write now: the service's log says why")
    if isinstance(found, sqlite3.DatabaseError):
        _log.error("the database is damaged: %s", found)
        return Damaged("the store's file is damaged: the service's log says how")
    if not isinstance(error, SteeringError):
        _log.error("an append failed", exc_info=error)
    return error
