"""The journal in an SQL database: today one SQLite file that one process owns.

What went wrong with the file goes to the log; who asks is told that something did, and what to do.

Rule of this module: reads never wait for the writer and never see half an append. They use connections of
their own, from any thread, and go page by page, so that a slow reader holds nothing open. A page may find
rows merged that the page before found single; both forms say the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import sqlalchemy as sa

from flyball_server import limits
from flyball_server.core.errors import Busy, Damaged, Invalid
from flyball_server.storage import checking, tables
from flyball_server.storage.audit import NOTED, SqlAudit
from flyball_server.storage.blocks import Stored, check_types, unpack
from flyball_server.storage.gauge import Gauge
from flyball_server.storage.journal import (
    Append,
    Block,
    Deletion,
    Deliver,
    Heard,
    Note,
    Row,
    RunFilter,
    RunRecord,
    Snapshot,
    Usage,
)
from flyball_server.storage.listing import conditions, record_of
from flyball_server.storage.locking import hold
from flyball_server.storage.outbox import SqlOutbox
from flyball_server.storage.packing import unseal
from flyball_server.storage.series import row_blocks, segment_blocks
from flyball_server.storage.writer import Writer

#: How long a statement waits for a lock that some other program holds on the file.
LOCK_WAIT_S = 2.0
#: Connections for reading.
READERS_MAX = 8
#: Table rows (single rows or segments) read at a time.
PAGE_ROWS = 128
#: Memory for pages, per connection: the file system keeps them as well, and SQLite's default is 2 MiB for each.
CACHE_KIB = 512
#: What the write-ahead log is cut back to after a burst.
LOG_BYTES_MAX = 64 << 20

_log = logging.getLogger(__name__)


class SqlJournal:
    """See `journal.Journal`. url: sqlite:///FILE. read_only: open it beside whoever writes it, and take nothing.
    beside: the same, but notes are taken."""

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        beside: bool = False,
        bytes_max: int | None = None,
        disk_free_min: int = limits.DISK_FREE_MIN_BYTES,
    ) -> None:
        self._url = sa.make_url(url)
        if self._url.get_backend_name() != "sqlite" or self._url.database in (None, "", ":memory:"):
            raise Invalid(f"{url!r} is no journal's address; allowed is 'sqlite:///FILE'")
        self._path = str(self._url.database)
        self._lock: IO[str] | None = None
        self._writer: Writer | None = None
        self._reading: sa.Engine | None = None
        self._engines: list[sa.Engine] = []
        self._identity = (0, 0)
        self._read_only = read_only
        self._beside = beside
        self._gauge = Gauge(self._path, bytes_max, disk_free_min)
        self.audit = SqlAudit(self._read)
        self.outbox = SqlOutbox(self._read, lambda work: self._open().transact(work))

    def start(self, deliver: Deliver) -> None:
        """Raises Invalid where the file is not a journal, and Busy where another process has it open."""
        if self._read_only or self._beside:
            self._start_reading()
            if self._beside:
                self._start_writing(self._engine(pool_size=1, max_overflow=0), deliver)
            return
        self._lock = hold(os.path.realpath(self._path))  # two names of one file are one file
        try:
            writing = self._engine(pool_size=1, max_overflow=0)
            self._prepare(writing)
            self._reading = self._engine(read_only=True, pool_size=READERS_MAX, max_overflow=0)
            self._start_writing(writing, deliver)
        except BaseException:
            self.close()
            raise

    def _start_writing(self, engine: sa.Engine, deliver: Deliver) -> None:
        found = os.stat(self._path)
        self._identity = (found.st_dev, found.st_ino)
        self._writer = Writer(engine, deliver, self._gone, self._gauge)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        for engine in self._engines:
            engine.dispose()
        self._engines.clear()
        self._reading = None
        if self._lock:
            self._lock.close()
            self._lock = None

    def append(self, append: Append) -> None:
        self._open().append(append)

    def delete(self, deletion: Deletion) -> None:
        self._open().delete(deletion)

    def hear(self, run: str, heard: Heard) -> None:
        self._open().hear(run, heard)

    def heard(self, runs: Sequence[str]) -> Mapping[str, Heard]:
        table = tables.heard.c
        with self._read() as connection:
            query = sa.select(table.run, table.at, table.beside).where(table.run.in_(runs))
            found = connection.execute(query)
            return {run: Heard(at, beside) for run, at, beside in found if type(at) is type(beside) is int}

    def note(self, note: Note) -> None:
        if self._writer is None:
            raise _not_for_writing()
        self._writer.note(note)

    def insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        self._open().insert(record, segments)

    def compact(self, run: str) -> None:
        """Waits until it is done; everything appended before is merged."""
        self._open().compact(run)

    def shrink(self) -> None:
        """Waits until it is done. Takes as much room on the disk, for a moment, as the file will have."""
        self._open().shrink()

    def usage(self) -> Usage:
        with self._read() as connection:
            return self._gauge.usage(connection.connection.driver_connection)

    def _gone(self) -> str:
        """Why nothing written now would be found again: somebody moved the file away under us. "" where it is there."""
        try:
            now = os.stat(self._path)
        except OSError as error:
            _log.error("%s is not there any more (%s)", self._path, error.strerror)
            return "the store's file is not there any more: put it back, or restart the service"
        if (now.st_dev, now.st_ino) != self._identity:
            _log.error("%s is another file than the one opened", self._path)
            return "the store's file is another one than was opened: put that back, or restart the service"
        return ""

    def _open(self) -> Writer:
        if self._writer is None or self._beside:
            raise _not_for_writing()
        return self._writer

    # -- opening ---------------------------------------------------------------------------------------------

    def _engine(self, *, read_only: bool = False, **pool: Any) -> sa.Engine:
        connect_args = {"timeout": LOCK_WAIT_S, "check_same_thread": False}
        engine = sa.create_engine(self._url, poolclass=sa.QueuePool, connect_args=connect_args, **pool)
        self._engines.append(engine)

        @sa.event.listens_for(engine, "connect")
        def _configure(connection: Any, _: Any) -> None:
            connection.text_factory = _text
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            if read_only:
                connection.execute("PRAGMA query_only = 1")
                return
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES_MAX}")

        return engine

    def _start_reading(self) -> None:
        """Raises Invalid where there is no journal of this version."""
        from flyball_server.storage.migrations import is_current

        if not os.path.exists(self._path):
            raise Invalid(f"{self._path} does not exist: name the file that the service was started with")
        self._reading = self._engine(read_only=True, pool_size=READERS_MAX, max_overflow=0)
        try:
            with self._read() as connection:
                known = is_current(connection)
                if known:
                    self._check_schema(connection)
        except Damaged as error:
            self.close()
            raise Invalid(str(error)) from error
        except BaseException:
            self.close()
            raise
        if not known:
            self.close()
            raise Invalid(
                f"{self._path} was written by another version of Flyball: start this one's service on it once"
            )

    def _prepare(self, engine: sa.Engine) -> None:
        """Check that the file is ours, or empty, and bring its schema up to date."""
        from flyball_server.storage.migrations import migrate  # Alembic takes 0.2 s to import

        try:
            with engine.connect() as connection:
                found = set(sa.inspect(connection).get_table_names())
                connection.rollback()
                if found and not found >= {"alembic_version", "journal", "runs"}:
                    raise Invalid(f"{self._path} is another program's database (it has the tables {sorted(found)})")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                migrate(connection, self._path)
                connection.commit()
                self._check_schema(connection)
        except sa.exc.OperationalError as error:
            raise Busy(f"{self._path} cannot be opened now: {error.orig}") from error
        except (sa.exc.DatabaseError, UnicodeDecodeError) as error:  # the latter where SQLite quotes what it found
            raise Invalid(
                f"{self._path} is damaged or not an SQLite database ({getattr(error, 'orig', error)}): "
                "restore it from a backup, or name another file"
            ) from error

    def _check_schema(self, connection: sa.Connection) -> None:
        """A damaged name of a column would look like trouble that passes."""
        for table in tables.metadata.sorted_tables:
            found = [row[1] for row in connection.exec_driver_sql(f"PRAGMA table_info({table.name})")]
            if found != [column.name for column in table.columns]:
                raise Invalid(
                    f"{self._path} is damaged: its table {table.name} has the columns {found}; restore it from a backup"
                )
        connection.rollback()

    # -- reading ---------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self, run: str = "") -> Iterator[sa.Connection]:
        whose = f"run {run!r}: " if run else ""
        if self._reading is None:
            raise Busy("the journal is closed")
        try:
            with self._reading.connect() as connection:
                yield connection
        except (sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            _log.warning("%s cannot be read now: %s", self._path, getattr(error, "orig", None) or error)
            raise Busy("the store cannot be read now: the service's log says why") from error
        except sa.exc.DatabaseError as error:
            _log.error("%s%s is damaged: %s", whose, self._path, error.orig)
            raise Damaged(f"{whose}the store's file is damaged: the service's log says how") from error
        except (TypeError, ValueError) as error:  # SQLite gives back whatever stands in a damaged row
            _log.error("%s%s is damaged: %s", whose, self._path, error)
            raise Damaged(f"{whose}the store's file is damaged: the service's log says how") from error

    def record(self, run: str) -> RunRecord | None:
        with self._read(run) as connection:
            found = connection.execute(sa.select(tables.runs).where(tables.runs.c.run == run)).one_or_none()
        return None if found is None else record_of(found)

    def records(self, where: RunFilter, *, after: tuple[int, str] | None, limit: int) -> list[RunRecord]:
        runs = tables.runs.c
        query = sa.select(tables.runs).where(*conditions(where))
        if after is not None:
            created_at, run = after
            query = query.where((runs.created_at < created_at) | ((runs.created_at == created_at) & (runs.run < run)))
        query = query.order_by(runs.created_at.desc(), runs.run.desc()).limit(limit)
        with self._read() as connection:
            return [record_of(found) for found in connection.execute(query)]

    def rows(
        self, run: str, *, after: int = 0, until: int | None = None, kinds: frozenset[str] | None = None
    ) -> Iterator[Row]:
        if kinds is not None and kinds <= NOTED:
            yield from (one.row for one in self.audit.of(run, after=after, until=until) if one.row.kind in kinds)
            return
        for page in self._pages(run, after, until):
            for stored in page:
                for row in unpack(run, stored, kinds):
                    if until is not None and row.seq > until:
                        return
                    if row.seq > after:
                        after = row.seq
                        yield row

    def snapshot(self, run: str, *, until: int | None = None) -> Snapshot | None:
        table = tables.snapshots.c
        query = sa.select(table.seq, table.attempt, table.step, table.state).where(table.run == run)
        if until is not None:
            query = query.where(table.seq <= until)
        with self._read(run) as connection:
            found = connection.execute(query.order_by(table.seq.desc()).limit(1)).one_or_none()
        if found is None:
            return None
        seq, attempt, step, state = found
        try:
            return Snapshot(seq, attempt, step, unseal(state).decode())
        except (AttributeError, TypeError, ValueError) as error:
            raise Damaged(f"run {run!r}, the snapshot at row {seq} is damaged: {error}") from error

    def snapshots(self, run: str) -> list[int]:
        table = tables.snapshots.c
        with self._read(run) as connection:
            query = sa.select(table.seq).where(table.run == run).order_by(table.seq.desc())
            return [seq for seq in connection.execute(query).scalars() if type(seq) is int]

    def count(self, run: str, until: int) -> int:
        table = tables.journal.c
        rows = sa.select(sa.func.sum(table.last_seq - table.seq + 1)).where(table.run == run, table.seq <= until)
        with self._read() as connection:
            return int(connection.execute(rows).scalar() or 0)

    def names(self) -> list[str]:
        found: set[str] = set()
        for table in tables.OF_RUNS:
            try:
                with self._read() as connection:
                    found.update(map(str, connection.execute(sa.select(table.c.run).distinct()).scalars()))
            except Damaged:  # `check` tells; the other tables may know more
                continue
        return sorted(found)

    def check(self) -> list[str]:
        try:
            with self._read() as connection:
                return checking.problems(connection)
        except Damaged as error:
            return [str(error)]

    def blocks(self, run: str, columns: Iterable[str]) -> Iterator[Block]:
        asked = tuple(columns)
        after = 0
        for page in self._pages(run, 0, None):
            singles: list[Stored] = []
            for stored in page:  # single rows are always the newest ones of a run
                if stored.last_seq > stored.seq:
                    yield from segment_blocks(run, stored, asked, after)
                    after = stored.last_seq
                else:
                    singles.append(stored)
            yield from row_blocks(singles, asked, after)
            after = page[-1].last_seq

    def _pages(self, run: str, after: int, until: int | None) -> Iterator[list[Stored]]:
        """The table rows that hold the rows with after < seq <= until; the first may begin before."""
        table = tables.journal.c
        columns = [table[name] for name in Stored._fields]
        while True:
            holder = sa.select(sa.func.max(table.seq)).where(table.run == run, table.seq <= after + 1)
            query = sa.select(*columns).where(
                table.run == run, table.seq >= sa.func.coalesce(holder.scalar_subquery(), 0), table.last_seq > after
            )
            if until is not None:
                query = query.where(table.seq <= until)
            with self._read(run) as connection:
                found = connection.execute(query.order_by(table.seq).limit(PAGE_ROWS))
                page = [check_types(run, Stored._make(row)) for row in found]
            if not page:
                return
            yield page
            after = page[-1].last_seq


def _not_for_writing() -> Busy:
    return Busy("the journal is not started, or was opened beside the service that writes it")


def _text(data: bytes) -> str:
    """A damaged text is one that differs, and no error of the whole query."""
    return data.decode("utf-8", "backslashreplace")
