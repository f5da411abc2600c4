"""The rows that people ask for, kept a second time where they are found without reading any observation.

Rule of this module: a noted row is a copy of a row of the journal, written in the same transaction, and never the only
one: it can be made again from the journal at any time, and `verify` compares the two.

Noted are the rows of NOTED, which have no columns; of an observed row in which a policy asked for something, what it
asked (the kind ASKED); and every row of the store's own journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa

from flyball_server.core.errors import Damaged
from flyball_server.storage import tables
from flyball_server.storage.blocks import Stored, check_types, read_segment, unpack
from flyball_server.storage.journal import STORE, Row

#: The kinds of a run's rows that are noted whole: what concerns the run, and not one of its steps.
NOTED = frozenset(
    {
        "attached", "command_moved", "commanded", "created", "declared", "directive_answered", "ended", "judged",
        "proposed",
    }
)  # fmt: skip
#: What is noted of an observed row in which a policy asked for something: no kind of a row.
ASKED = "asked"
#: Noted rows read at a time.
PAGE = 500
#: A place among all noted rows: (at, run, seq).
Place = tuple[int, str, int]

_ROW = ("seq", "kind", "attempt", "first_step", "last_step", "actor", "at", "meta", "hash")
_COLUMNS = [tables.audit.c[name] for name in ("run", "project", *_ROW)]
_STORED = [tables.journal.c[name] for name in Stored._fields]
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Noted(NamedTuple):
    """A noted row. run: the run's id, or STORE. project: the run's; of a row of STORE the one it is about, or ""."""

    run: str
    project: str
    row: Row


class AuditFilter(NamedTuple):
    """Which noted rows; None matches all. without: none of these kinds. from_us <= at < until_us. store_kinds: of the
    store's own journal only rows of these kinds."""

    run: str | None = None
    project: str | None = None
    projects: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    actor: str | None = None
    from_us: int | None = None
    until_us: int | None = None
    store_kinds: frozenset[str] | None = None

    def matches(self, noted: Noted) -> bool:
        """Whether the noted row is one of them."""
        run, project, row = noted
        return (
            self.run in (None, run)
            and self.project in (None, project)
            and (self.projects is None or project in self.projects)
            and (self.kinds is None or row.kind in self.kinds)
            and row.kind not in self.without
            and self.actor in (None, row.actor)
            and (self.from_us is None or row.at >= self.from_us)
            and (self.until_us is None or row.at < self.until_us)
            and (self.store_kinds is None or run != STORE or row.kind in self.store_kinds)
        )


class Audit(Protocol):
    """The noted rows of a store."""

    def of(self, run: str, *, after: int = 0, until: int | None = None) -> Iterator[Noted]:
        """Those of a run (or STORE) with after < seq <= until, in order. Raises Damaged where one makes no sense."""

    def newest(self, where: AuditFilter, *, before: Place | None, limit: int) -> list[Noted]:
        """Those that match, newest first, behind the place `before`."""


def noted(row: Row) -> Row | None:
    """What of a run's row is noted."""
    if row.kind in NOTED:
        return row
    if row.kind == "observed" and "asks" in row.meta:
        return row._replace(kind=ASKED, meta={"asks": row.meta["asks"]}, columns=())
    return None


def project_in(run: str, project: str, row: Row) -> str:
    """The project a noted row belongs to. project: the run's."""
    if run != STORE:
        return project
    about = row.meta.get("project")
    return about if isinstance(about, str) else ""


def noted_in(run: str, stored: Stored) -> Iterator[Row]:
    """What is noted of a table row of the journal, without unpacking a segment that holds nothing of it."""
    if run == STORE:
        yield from unpack(run, stored)
        return
    if stored.last_seq == stored.seq:
        if stored.kind not in NOTED and stored.kind != "observed":
            return
    else:
        _, batch = read_segment(run, stored)
        if not any(shape.kind in NOTED for shape in batch.shapes) and not any(b'"asks":' in m for m in batch.metas):
            return
    for row in unpack(run, stored):
        if found := noted(row):
            yield found


def table_row(run: str, project: str, row: Row) -> dict[str, Any]:
    """A noted row as the table keeps it."""
    return {
        "run": run, "seq": row.seq, "project": project_in(run, project, row), "kind": row.kind,
        "attempt": row.attempt, "first_step": row.first_step, "last_step": row.last_step, "actor": row.actor,
        "at": row.at, "meta": _encode(row.meta), "hash": row.hash,
    }  # fmt: skip


def make_again(connection: sa.Connection, run: str) -> None:
    """Note a run's rows anew, as the journal has them, in the caller's transaction. Raises Damaged."""
    table, journal = tables.audit, tables.journal.c
    project = connection.execute(sa.select(tables.runs.c.project).where(tables.runs.c.run == run)).scalar() or ""
    connection.execute(sa.delete(table).where(table.c.run == run))
    seqs = connection.execute(sa.select(journal.seq).where(journal.run == run).order_by(journal.seq)).scalars().all()
    for seq in seqs:
        one = connection.execute(sa.select(*_STORED).where(journal.run == run, journal.seq == seq)).one()
        rows = [table_row(run, project, row) for row in noted_in(run, check_types(run, Stored._make(one)))]
        if rows:
            connection.execute(sa.insert(table), rows)


class SqlAudit:
    """See `Audit`. reading: a connection to read with, by the run it is about ("": all)."""

    def __init__(self, reading: Callable[[str], AbstractContextManager[sa.Connection]]) -> None:
        self._reading = reading

    def of(self, run: str, *, after: int = 0, until: int | None = None) -> Iterator[Noted]:
        table = tables.audit.c
        while True:
            query = sa.select(*_COLUMNS).where(table.run == run, table.seq > after)
            if until is not None:
                query = query.where(table.seq <= until)
            with self._reading(run) as connection:
                page = [_noted(found) for found in connection.execute(query.order_by(table.seq).limit(PAGE))]
            if not page:
                return
            yield from page
            after = page[-1].row.seq

    def newest(self, where: AuditFilter, *, before: Place | None, limit: int) -> list[Noted]:
        table = tables.audit.c
        query = sa.select(*_COLUMNS).where(*_conditions(where))
        if before is not None:
            query = query.where(sa.tuple_(table.at, table.run, table.seq) < sa.tuple_(*map(sa.literal, before)))
        query = query.order_by(table.at.desc(), table.run.desc(), table.seq.desc()).limit(limit)
        with self._reading("") as connection:
            return [_noted(found) for found in connection.execute(query)]


def _conditions(where: AuditFilter) -> list[sa.ColumnElement[bool]]:
    table = tables.audit.c
    found: list[sa.ColumnElement[bool]] = []
    for column, value in ((table.run, where.run), (table.project, where.project), (table.actor, where.actor)):
        if value is not None:
            found.append(column == value)
    for column, values in ((table.project, where.projects), (table.kind, where.kinds)):
        if values is not None:
            found.append(column.in_(sorted(values)))
    if where.without:
        found.append(table.kind.not_in(sorted(where.without)))
    if where.from_us is not None:
        found.append(table.at >= where.from_us)
    if where.until_us is not None:
        found.append(table.at < where.until_us)
    if where.store_kinds is not None:
        found.append((table.run != STORE) | table.kind.in_(sorted(where.store_kinds)))
    return found


def _noted(found: Any) -> Noted:
    run, project, seq, kind, attempt, first, last, actor, at, text, hash_ = found
    where = f"run {run!r}, row {seq}: what is noted of it is damaged (`flyball-server compact` makes it again)"
    numbers = (seq, attempt, at, first or 0, last or 0)
    if any(type(number) is not int for number in numbers) or type(hash_) is not bytes:
        raise Damaged(f"{where}: its columns do not have their types")
    try:
        meta = json.loads(text)
    except (TypeError, ValueError) as error:
        raise Damaged(f"{where}: {error}") from error
    if not isinstance(meta, dict) or _encode(meta) != text:
        raise Damaged(f"{where}: its meta is not as it was written")
    return Noted(run, project, Row(seq, kind, attempt, first, last, actor, at, meta, (), hash_))
