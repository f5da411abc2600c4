"""The journal's contract: what a store must keep, and how the engine and the readers talk to it.

Rule of this module: types and one Protocol, no behaviour beyond the canonical bytes and the hash chain.

Ownership. The engine makes rows (sequence number, time and hash included) and hands them over; a store
never changes a row's meaning. It may merge old rows into compressed segments, as long as reading gives
back rows that are equal field by field, so that the hash chain can be checked at any time.

Threads. `append` may be called from one thread (the event loop's) and returns at once; the store commits
on a thread of its own and then calls `deliver` once per commit, from that thread. Reads may be called
from any thread and see every row whose append was delivered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from flyball_server.storage.audit import Audit
    from flyball_server.storage.blocks import Stored
    from flyball_server.storage.outbox import Delivery, Outbox

#: The hash "before" the first row of a run.
GENESIS = bytes(32)
#: The store's own journal: rows of this id tell what concerns no single run, such as which runs were deleted, by whom
#: and why, or who was given access. No run can be called so.
STORE = "#store"
#: The status of what is left of a deleted run: its record, whose `seq` and `hash` are those of its row in STORE.
DELETED = "deleted"


class Column(NamedTuple):
    """A packed little-endian column: `type` is one of f (float32), d (float64), I (uint32), q (int64)."""

    name: str
    type: str
    data: bytes


class Row(NamedTuple):
    """One event of one run. `at` is microseconds since 1970 UTC; `meta` is plain JSON without NaN.

    `hash` = sha256(previous row's hash + canonical(run, row)).
    """

    seq: int
    kind: str
    attempt: int
    first_step: int | None
    last_step: int | None
    actor: str
    at: int
    meta: Mapping[str, Any]
    columns: tuple[Column, ...]
    hash: bytes


class RunRecord(NamedTuple):
    """The projection of a run for listing and filtering, written in the same transaction as its rows.

    `status` is "active" or how the run ended ("finished", "failed"), or DELETED; "damaged" where the record cannot
    even be read. `step` is the last observed step.
    `seq` and `hash` are those of the newest row. `parent`: the run it is a fork of, or "".
    """

    run: str
    project: str
    name: str
    status: str
    policy: str
    labels: Mapping[str, str]
    attempt: int
    step: int | None
    created_at: int
    updated_at: int
    seq: int
    hash: bytes
    parent: str = ""


class Snapshot(NamedTuple):
    """A cached fold: the run's state as JSON text after the row `seq`. `step` = last observed step."""

    seq: int
    attempt: int
    step: int | None
    state: str


class Append(NamedTuple):
    """Rows to add to one run: all or none, and only if the run's newest row is `expected_seq` (0: none yet)."""

    expected_seq: int
    rows: tuple[Row, ...]
    record: RunRecord
    snapshot: Snapshot | None
    #: Whatever the caller wants back with the result (a future, say); the store does not look at it.
    token: Any
    #: What others are to be told of these rows, once they are written.
    deliveries: tuple[Delivery, ...] = ()


class Deletion(NamedTuple):
    """A run to remove: its rows, snapshots and labels go, `record` takes the place of its record, and `row` is added
    to STORE behind the row `row.seq - 1`: all or nothing. expected_seq: the run's newest row; None: whatever is left
    of a damaged run."""

    expected_seq: int | None
    row: Row
    record: RunRecord
    token: Any


class Note(NamedTuple):
    """A row to add to STORE behind the row `row.seq - 1`, which changes no run."""

    row: Row
    token: Any


#: What the journal is given to write.
Work = Append | Deletion | Note


class Usage(NamedTuple):
    """What a store takes and may take. bytes: pages in use and the write-ahead log; None: not on a disk.

    state: "ok", "nearly_full" or "full" (appends are refused with Busy). words: what to do about it, or "".
    """

    bytes: int | None
    bytes_max: int | None
    disk_free: int | None
    disk_free_min: int
    state: str
    words: str


class RunFilter(NamedTuple):
    """Which runs to list; None matches all, but deleted ones are only listed by status. `labels` must all match.
    `stale_before`, `lost_before` (with status "active", "stale" or "lost"): an active run is stale when its newest row
    and the newest sign of life of its job (`Journal.hear`) are older than the one time, and lost when older than the
    other. `parent`: the forks of this run. `projects`: of any of these only."""

    project: str | None = None
    status: str | None = None
    policy: str | None = None
    labels: Mapping[str, str] | None = None
    stale_before: int | None = None
    lost_before: int | None = None
    parent: str | None = None
    projects: frozenset[str] | None = None


class Heard(NamedTuple):
    """When a run's job was last heard of, in microseconds since 1970 UTC, where the run's record does not tell: the job
    had nothing to add to the journal, or somebody else added to it last. beside: that time of theirs, at which
    `updated_at` is no sign of the job."""

    at: int = 0
    beside: int = 0


#: Called once per commit, on the store's thread, with every append of it and its error (None: durable).
Deliver = Callable[[Sequence[tuple[Work, Exception | None]]], None]


class Reading(Protocol):
    """What a query needs from a store."""

    def rows(
        self, run: str, *, after: int = 0, until: int | None = None, kinds: frozenset[str] | None = None
    ) -> Iterator[Row]:
        """The rows with after < seq <= until (of these kinds), in order. Raises Damaged where one cannot be read;
        hashes are for the reader to check. With `kinds` not everything that lies between is read."""

    def blocks(self, run: str, columns: Iterable[str]) -> Iterator[Block]:
        """The packed form for series: see `Block`. Much cheaper than `rows` for long runs."""


class Journal(Reading, Protocol):
    """What the engine needs from a store. `memory.MemoryJournal` and `sql.SqlJournal` keep it."""

    @property
    def audit(self) -> Audit:
        """The rows that people ask for, of all runs and of STORE."""

    @property
    def outbox(self) -> Outbox:
        """What is to be sent to others."""

    def start(self, deliver: Deliver) -> None:
        """Open the store (creating or migrating its schema) and begin to accept appends."""

    def close(self) -> None:
        """Commit what was accepted, deliver it, and release everything. May be called twice."""

    def append(self, append: Append) -> None:
        """Accept an append. Its result comes through `deliver`: None, or
        `Conflict` (someone else appended first; nothing was written), or
        `Busy` (the store cannot write now, a full disk say; nothing was written).
        Raises `Busy` at once when more than APPENDS_MAX appends wait."""

    def delete(self, deletion: Deletion) -> None:
        """Accept a deletion. Its result comes through `deliver`, as that of an append; Invalid for STORE, which is no
        run. It may be written where appends are refused because the store is full."""

    def hear(self, run: str, heard: Heard) -> None:
        """Remember when the run's job was heard of, where the run's record does not tell. Returns at once, and may be
        lost: no fold depends on it."""

    def heard(self, runs: Sequence[str]) -> Mapping[str, Heard]:
        """What was remembered of these runs."""

    def note(self, note: Note) -> None:
        """Accept a row for STORE. Its result comes through `deliver`: Conflict where STORE has gone on meanwhile. It
        may be written where appends are refused because the store is full."""

    def insert(self, record: RunRecord, segments: Iterable[Stored]) -> None:
        """Write a whole run at once, and wait until it is durable: all or nothing. The caller has proved its rows.
        Only the last of `segments` may be a single row. Raises Conflict where the run exists, Busy where the store
        cannot write now, and whatever `segments` raises while it is read."""

    def record(self, run: str) -> RunRecord | None:
        """The projection of one run, or None."""

    def records(self, where: RunFilter, *, after: tuple[int, str] | None, limit: int) -> list[RunRecord]:
        """Runs in order of (created_at, run) descending (newest first), starting behind the key `after`."""

    def snapshot(self, run: str, *, until: int | None = None) -> Snapshot | None:
        """The newest snapshot with seq <= until. Raises Damaged where it cannot be read."""

    def snapshots(self, run: str) -> list[int]:
        """The rows that the run's snapshots stand on, newest first."""

    def compact(self, run: str) -> None:
        """Merge the run's rows into segments now, down to the newest row, and small segments into larger ones (a
        store may also do so by itself)."""

    def shrink(self) -> None:
        """Give the space of what was deleted or merged back to the disk."""

    def usage(self) -> Usage:
        """What the store takes now."""

    def count(self, run: str, until: int) -> int:
        """How many rows with seq <= until there are, by the numbers they have."""

    def names(self) -> list[str]:
        """Everything that has a record, rows, snapshots or labels, in order, STORE included."""

    def check(self) -> list[str]:
        """What is wrong with the store where no single run can tell: a line for each."""


class Block(NamedTuple):
    """Consecutive rows of one kind and attempt with the same asked-for column names, columns concatenated.

    Rows of other kinds may lie between them; rows without any asked-for column are left out. Blocks come in order
    of `seq`, the first row's. meta: the rows' own where all have the same one, else empty. A column that is float32
    in some rows and float64 in others comes out as float64.
    arrays: for each asked-for column present: a numpy array, rows one after the other.
    counts: for each of those columns: how many values each row contributed (numpy int64 array, one per row).
    first_step, last_step: numpy int64 arrays, one entry per row (-1 where the row has none).
    """

    kind: str
    attempt: int
    seq: int
    meta: Mapping[str, Any]
    first_step: Any
    last_step: Any
    arrays: Mapping[str, Any]
    counts: Mapping[str, Any]


#: Making an encoder costs more than most of what it encodes.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


@lru_cache(4096)
def _layout(columns: tuple[tuple[str, str, int], ...]) -> str:
    """The same few layouts come again and again."""
    return _encode(columns)


def header(row: Row) -> bytes:
    """A row's meta and column layout as canonical JSON: sorted keys, no spaces, no NaN."""
    meta = _encode(row.meta) if row.meta else "{}"
    return f"[{meta},{_layout(tuple([(c.name, c.type, len(c.data)) for c in row.columns]))}]".encode()


def canonical(run: str, row: Row) -> bytes:
    """The bytes that the hash chain covers: every field of the row but the hash, and the run's id."""
    fields = [run, row.seq, row.kind, row.attempt, row.first_step, row.last_step, row.actor, row.at]
    head = _encode(fields).encode()
    return b"\n".join((head, header(row), b"".join(c.data for c in row.columns)))


def chained(previous: bytes, run: str, row: Row) -> bytes:
    """The hash of `row` behind a row with the hash `previous`."""
    return hashlib.sha256(previous + canonical(run, row)).digest()


def newest_news(record: RunRecord, heard: Heard) -> int:
    """When a run's job was last heard of (microseconds since 1970 UTC)."""
    return heard.at if record.updated_at == heard.beside else max(record.updated_at, heard.at)
