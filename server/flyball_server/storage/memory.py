"""A journal in lists and dicts, for tests and simulation: nothing outlives the process.

Rule of this module: it answers as `sql.SqlJournal` does, without a thread. `deliver` is called inside `append`,
on the caller's thread, so a simulation is deterministic; an append made from within `deliver` is
accepted there and delivered once that call has returned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from flyball_server.core.errors import Busy, Conflict, Invalid
from flyball_server.storage.audit import AuditFilter, Noted, Place, noted, project_in
from flyball_server.storage.blocks import Stored, check_order, store, unpack, unpack_row
from flyball_server.storage.journal import (
    DELETED,
    STORE,
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
    Work,
    newest_news,
)
from flyball_server.storage.outbox import MemoryOutbox
from flyball_server.storage.series import row_blocks

#: Rows that become blocks together.
ROWS_PER_BATCH = 4096


class MemoryJournal:
    """See `journal.Journal`. Appends never wait, so only a closed journal is Busy."""

    def __init__(self) -> None:
        self._deliver: Deliver | None = None
        self._lock = threading.RLock()
        self._waiting: deque[Work] = deque()
        self._delivering = False
        self._stored: dict[str, list[Stored]] = {}
        self._records: dict[str, RunRecord] = {}
        self._heard: dict[str, Heard] = {}
        self._snapshots: dict[str, list[Snapshot]] = {}
        self._noted: dict[str, list[Noted]] = {}
        self.audit = MemoryAudit(self._lock, self._noted)
        self.outbox = MemoryOutbox()

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def close(self) -> None:
        self._deliver = None

    def append(self, append: Append) -> None:
        self._accept(append)

    def delete(self, deletion: Deletion) -> None:
        self._accept(deletion)

    def note(self, note: Note) -> None:
        self._accept(note)

    def hear(self, run: str, heard: Heard) -> None:
        with self._lock:
            self._heard[run] = heard

    def heard(self, runs: Sequence[str]) -> Mapping[str, Heard]:
        with self._lock:
            return {run: self._heard[run] for run in runs if run in self._heard}

    def _accept(self, item: Work) -> None:
        if self._deliver is None:
            raise Busy("the journal is closed")
        self._waiting.append(item)
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._waiting and self._deliver is not None:
                accepted = self._waiting.popleft()
                self._deliver([(accepted, self._written(accepted))])
        finally:
            self._delivering = False

    def _written(self, item: Work) -> Exception | None:
        if isinstance(item, Append):
            return self._add(item)
        return self._remove(item) if isinstance(item, Deletion) else self._set_down(item)

    def _set_down(self, note: Note) -> Exception | None:
        with self._lock:
            rows = self._stored.setdefault(STORE, [])
            if len(rows) != note.row.seq - 1:
                return Conflict(f"{STORE!r} is at {len(rows)}, not at {note.row.seq - 1}")
            rows.append(store(note.row))
            self._note(STORE, "", [note.row])
            return None

    def _add(self, append: Append) -> Exception | None:
        run = append.record.run
        with self._lock:
            newest = len(self._stored.get(run, ()))
            if newest != append.expected_seq or self._is_deleted(run):
                return Conflict(f"run {run!r} is at {newest}, not at {append.expected_seq}")
            try:
                check_order(append)
                stored = [store(row) for row in append.rows]
            except Invalid as error:
                return error
            self._stored.setdefault(run, []).extend(stored)
            self._records[run] = append.record
            if append.snapshot:
                self._snapshots.setdefault(run, []).append(append.snapshot)
            self._note(run, append.record.project, filter(None, map(noted, append.rows)))
            self.outbox.add(append.deliveries)
            return None

    def _note(self, run: str, project: str, rows: Iterable[Row]) -> None:
        found = [Noted(run, project_in(run, project, row), unpack_row(run, store(row))) for row in rows]
        if found:
            self._noted.setdefault(run, []).extend(found)

    def _remove(self, deletion: Deletion) -> Exception | None:
        run, expected = deletion.record.run, deletion.expected_seq
        if run == STORE:
            return Invalid(f"{STORE!r} is no run: it cannot be deleted")
        with self._lock:
            newest, tombstones = len(self._stored.get(run, ())), len(self._stored.get(STORE, ()))
            if self._is_deleted(run) or expected not in (None, newest) or tombstones != deletion.row.seq - 1:
                return Conflict(f"run {run!r} is at {newest}, not at {expected}, or another was deleted meanwhile")
            self._stored.setdefault(STORE, []).append(store(deletion.row))
            self._note(STORE, "", [deletion.row])
            self._noted.pop(run, None)
            self._stored.pop(run, None)
            self._snapshots.pop(run, None)
            self._heard.pop(run, None)
            self._records[run] = deletion.record
            return None

    def _is_deleted(self, run: str) -> bool:
        record = self._records.get(run)
        return record is not None and record.status == DELETED

    def insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        if self._deliver is None:
            raise Busy("the journal is closed")
        with self._lock:
            if self._stored.get(record.run) or self._is_deleted(record.run):
                raise Conflict(f"run {record.run!r} exists already")
            rows = [row for one in segments for row in unpack(record.run, one)]
            self._stored[record.run] = [store(row) for row in rows]
            self._records[record.run] = record
            self._note(record.run, record.project, filter(None, map(noted, rows)))

    def record(self, run: str) -> RunRecord | None:
        return self._records.get(run)

    def records(self, where: RunFilter, *, after: tuple[int, str] | None, limit: int) -> list[RunRecord]:
        with self._lock:
            found = [record for record in self._records.values() if _matches(record, where, self._heard)]
        found.sort(key=attrgetter("created_at", "run"), reverse=True)
        return [r for r in found if after is None or (r.created_at, r.run) < after][:limit]

    def rows(
        self, run: str, *, after: int = 0, until: int | None = None, kinds: frozenset[str] | None = None
    ) -> Iterator[Row]:
        with self._lock:
            stored = self._stored.get(run, [])[after:until]  # row 1 is at place 0
        return (unpack_row(run, row) for row in stored if kinds is None or row.kind in kinds)

    def snapshot(self, run: str, *, until: int | None = None) -> Snapshot | None:
        with self._lock:
            found = [s for s in self._snapshots.get(run, ()) if until is None or s.seq <= until]
        return max(found, key=attrgetter("seq"), default=None)

    def snapshots(self, run: str) -> list[int]:
        with self._lock:
            return sorted({s.seq for s in self._snapshots.get(run, ())}, reverse=True)

    def count(self, run: str, until: int) -> int:
        with self._lock:
            return sum(row.seq <= until for row in self._stored.get(run, ()))

    def names(self) -> list[str]:
        with self._lock:
            return sorted({*self._records, *self._stored, *self._snapshots})

    def check(self) -> list[str]:
        return []

    def usage(self) -> Usage:
        return Usage(None, None, None, 0, "ok", "")

    def blocks(self, run: str, columns: Iterable[str]) -> Iterator[Block]:
        asked = tuple(columns)
        with self._lock:
            stored = self._stored.get(run, [])[:]
        for start in range(0, len(stored), ROWS_PER_BATCH):
            yield from row_blocks(stored[start : start + ROWS_PER_BATCH], asked)

    def compact(self, run: str) -> None:
        """There is nothing to make smaller."""

    def shrink(self) -> None:
        """Nor is there a disk."""


class MemoryAudit:
    """See `audit.Audit`, over the lists that the journal keeps."""

    def __init__(self, lock: threading.RLock, found: Mapping[str, list[Noted]]) -> None:
        self._lock = lock
        self._found = found

    def of(self, run: str, *, after: int = 0, until: int | None = None) -> Iterator[Noted]:
        with self._lock:
            found = list(self._found.get(run, ()))
        return (one for one in found if one.row.seq > after and (until is None or one.row.seq <= until))

    def newest(self, where: AuditFilter, *, before: Place | None, limit: int) -> list[Noted]:
        with self._lock:
            found = [one for of_run in self._found.values() for one in of_run if where.matches(one)]
        placed = sorted((((one.row.at, one.run, one.row.seq), one) for one in found), reverse=True)
        return [one for place, one in placed if before is None or place < before][:limit]


def _matches(record: RunRecord, where: RunFilter, heard: Mapping[str, Heard]) -> bool:
    status, stale_before, lost_before = where.status, where.stale_before, where.lost_before
    if status in ("stale", "lost") or (status == "active" and stale_before is not None):
        news = newest_news(record, heard.get(record.run, Heard()))
        lost = lost_before is not None and news < lost_before
        stale = stale_before is not None and news < stale_before
        if record.status != "active" or status != ("lost" if lost else "stale" if stale else "active"):
            return False
    elif record.status == DELETED if status is None else record.status != status:
        return False
    return (
        where.project in (None, record.project)
        and (where.projects is None or record.project in where.projects)
        and where.parent in (None, record.parent)
        and (where.policy is None or where.policy in (record.policy, record.policy.partition("@")[0]))
        and (where.labels or {}).items() <= record.labels.items()
    )
