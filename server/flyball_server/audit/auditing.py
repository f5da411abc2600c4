"""The record read back by people and programs: the rows of a run, and what was asked, done and refused across all runs.

Rule of this module: it only reads, and shows a caller what lies in their projects and nothing of the rest. What
concerns no run is for admins, but for deletions and imports, which whoever might see the run may see.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from flyball_server import limits, queries, records
from flyball_server.audit import wording
from flyball_server.audit.heads import KIND as HEADS
from flyball_server.auth.access import ADMIN, VIEW, Caller
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.deletion import KIND as DELETION
from flyball_server.engine import Engine
from flyball_server.exports.imports import KIND as IMPORT
from flyball_server.exports.imports import Imports
from flyball_server.proving import Undamaged
from flyball_server.storage.audit import NOTED, AuditFilter, Noted, Place
from flyball_server.storage.blocks import DTYPES
from flyball_server.storage.journal import STORE, Journal, Reading, Row

#: The kinds of a run's rows.
KINDS = tuple(sorted({*NOTED, "applied", "observed", "reported"}))


class JournalRequest(NamedTuple):
    """Which rows of a run: None (kinds: nothing) matches all; from_us <= at < until_us. since: those behind this row.

    columns: with every value of every column.
    """

    run: str
    kinds: tuple[str, ...] = ()
    actor: str | None = None
    from_us: int | None = None
    until_us: int | None = None
    attempt: int | None = None
    since: int = 0
    limit: int = 100
    columns: bool = False


class AuditRequest(NamedTuple):
    """Which rows of the audit; None (kinds: nothing) matches all. cursor: from the page before."""

    kinds: tuple[str, ...] = ()
    actor: str | None = None
    project: str | None = None
    run: str | None = None
    from_us: int | None = None
    until_us: int | None = None
    cursor: str | None = None
    limit: int = 100


class Auditing:
    """The reads over one engine and its journal."""

    def __init__(self, engine: Engine, journal: Journal, imports: Imports) -> None:
        self._engine = engine
        self._journal = journal
        self._imports = imports

    async def rows(self, request: JournalRequest, caller: Caller) -> dict[str, Any]:
        """A page of a run's rows, oldest first: {"run", "rows", "through", "next"}.

        The page tells of every row up to `through`, whichever of them match; `next` is the value of `since` for the
        page behind it, None where there are no more rows now. Of a damaged run what comes before the damage, and what
        it is under `problem`. Raises NotFound, Invalid, Damaged where not even the first row can be read.
        """
        _check_limit(request.limit, limits.JOURNAL_ROWS_MAX)
        end = await self._end(request, caller)
        journal = Undamaged(self._journal)
        found = await queries.in_thread(_page, journal, request, end)
        if journal.problem:
            self._engine.found_damage(request.run, journal.problem)
        problem = self._engine.damage.words(request.run)
        return {**found, "problem": problem} if problem else found

    async def all_rows(self, request: JournalRequest, caller: Caller) -> Iterator[dict[str, Any]]:
        """All rows that match, to be read outside the event loop; at a damage one last entry says so."""
        end = await self._end(request, caller)
        return _all(self._journal, request, end)

    async def audit(self, request: AuditRequest, caller: Caller) -> dict[str, Any]:
        """A page of what was asked, done and refused, newest first: {"entries", "cursor"} (None at the end).

        Raises NotFound for a project out of reach, Invalid.
        """
        _check_limit(request.limit, limits.AUDIT_ROWS_MAX)
        where, before = _audited(request, caller), _place(request.cursor)
        found = await queries.in_thread(self._journal.audit.newest, where, before=before, limit=request.limit + 1)
        page = found[: request.limit]
        cursor = _cursor(page[-1]) if len(found) > request.limit else None
        await self._imports.look()
        return {"entries": await queries.in_thread(_entries, page, self._imports), "cursor": cursor}

    async def all_audit(self, request: AuditRequest, caller: Caller) -> Iterator[dict[str, Any]]:
        """All entries that match, to be read outside the event loop."""
        where, before = _audited(request, caller), _place(request.cursor)
        await self._imports.look()
        return _paged(self._journal, where, before, self._imports)

    async def _end(self, request: JournalRequest, caller: Caller) -> int:
        """The newest row to tell of. Raises NotFound, Invalid."""
        caller.check_run(VIEW, request.run)
        for kind in request.kinds:
            if kind not in KINDS:
                raise Invalid(f"kind is {kind!r:.40}: a run's rows are {', '.join(KINDS)}")
        live = await self._engine.find(request.run)
        return live.record.seq


def moment(name: str, text: str | None) -> int | None:
    """A time as people write it, in microseconds since 1970 UTC. Raises Invalid."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Invalid(f"{name} is {text!r:.40}: give a time such as 2027-01-31T12:00:00Z") from None
    if found.tzinfo is None:
        raise Invalid(f"{name} is {text!r:.40}, which names no time zone: end it with Z for UTC")
    return round((found - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)


# The rows of a run


def _matching(journal: Reading, request: JournalRequest, end: int) -> Iterator[tuple[Row, bool]]:
    kinds = frozenset(request.kinds) if request.kinds else None
    for row in journal.rows(request.run, after=request.since, until=end, kinds=kinds):
        yield (
            row,
            request.actor in (None, row.actor)
            and request.attempt in (None, row.attempt)
            and (request.from_us is None or row.at >= request.from_us)
            and (request.until_us is None or row.at < request.until_us),
        )


def _page(journal: Undamaged, request: JournalRequest, end: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    through = request.since
    try:
        for looked, (row, matches) in enumerate(_matching(journal, request, end)):
            if looked >= limits.JOURNAL_LOOKED_MAX or (matches and len(rows) >= request.limit):
                return {"run": request.run, "rows": rows, "through": through, "next": through}
            if matches:
                rows.append(described(request.run, row, columns=request.columns))
            through = row.seq
    except Damaged as error:
        journal.problem = str(error)
    if not journal.problem:  # rows of other kinds may stand behind the last that was looked at
        through = max(end, request.since)
    return {"run": request.run, "rows": rows, "through": through, "next": None}


def _all(journal: Journal, request: JournalRequest, end: int) -> Iterator[dict[str, Any]]:
    try:
        for row, matches in _matching(journal, request, end):
            if matches:
                yield described(request.run, row, columns=request.columns)
    except Damaged as error:
        yield {"problem": str(error)}


def described(run: str, row: Row, *, columns: bool = False) -> dict[str, Any]:
    """A row for people and programs; `columns`: with every value. Raises Damaged where it makes no sense."""
    try:
        return _described(row, columns)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise Damaged(f"run {run!r}, row {row.seq} is damaged: {type(error).__name__}: {error}") from error


def _described(row: Row, columns: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "seq": row.seq, "kind": row.kind, "attempt": row.attempt, "first_step": row.first_step,
        "last_step": row.last_step, "actor": row.actor, "at": records.utc(row.at), "hash": row.hash.hex(),
        "text": _summed(row), "meta": row.meta, "summary": _summary(row),
    }  # fmt: skip
    if columns:
        out["columns"] = {column.name: _values(column.type, column.data) for column in row.columns}
    return out


def _summary(row: Row) -> dict[str, Any] | None:
    """What the columns of a row hold, counted; None where it has none."""
    names = {column.name: column for column in row.columns}
    if row.kind == "observed":
        steps, at = names.get("=step"), names["=at"]
        first, last = row.first_step or 0, row.last_step or 0
        return {
            "observations": last - first + 1 if steps is None else len(steps.data) // 8,
            "signals": [name for name in names if not name.startswith("=") and not name.endswith("?")],
            "changes": len(at.data) // 4,
            "marks": len(row.meta.get("marks", ())),
            "asks": len(row.meta.get("asks", ())),
        }
    if row.kind == "applied":
        late = names.get("late")
        return {
            "receipts": len(names["number"].data) // 8,
            "late": 0 if late is None else len(late.data) // 4,
            "conflicts": len(row.meta.get("conflicts", ())),
        }
    if row.kind == "reported":
        return {"signals": {name: _values(column.type, column.data)[0] for name, column in names.items()}}
    return None


def _summed(row: Row) -> str:
    summary = _summary(row)
    if row.kind == "observed" and summary is not None:
        more = "".join(f", {summary[name]} {name}" for name in ("marks", "asks") if summary[name])
        return f"{summary['observations']} observations, {summary['changes']} settings{more}"
    if row.kind == "applied" and summary is not None:
        more = "".join(f", {summary[name]} {name}" for name in ("late", "conflicts") if summary[name])
        return f"{summary['receipts']} receipts{more}"
    if row.kind == "reported" and summary is not None:
        return ", ".join(f"{name} {value}" for name, value in summary["signals"].items())
    return wording.text(row.kind, row.meta)


def _values(kind: str, data: bytes) -> list[Any]:
    values = np.frombuffer(data, DTYPES[kind]).tolist()
    return [queries.plain(value) for value in values] if kind in ("f", "d") else values


# Across runs


def _audited(request: AuditRequest, caller: Caller) -> AuditFilter:
    caller.check_role(VIEW)
    if request.project is not None:
        caller.check(VIEW, request.project)
    if request.run is not None:
        caller.check_run(VIEW, request.run)
    return AuditFilter(
        run=request.run,
        project=request.project,
        projects=caller.projects,
        kinds=frozenset(request.kinds) if request.kinds else None,
        without=frozenset() if HEADS in request.kinds else frozenset({HEADS}),
        actor=request.actor,
        from_us=request.from_us,
        until_us=request.until_us,
        store_kinds=None if caller.may(ADMIN) else frozenset({DELETION, HEADS, IMPORT}),
    )


def _paged(journal: Journal, where: AuditFilter, before: Place | None, imports: Imports) -> Iterator[dict[str, Any]]:
    while True:
        page = journal.audit.newest(where, before=before, limit=limits.AUDIT_ROWS_MAX)
        yield from _entries(page, imports)
        if len(page) < limits.AUDIT_ROWS_MAX:
            return
        before = _where(page[-1])


def _entries(page: list[Noted], imports: Imports) -> list[dict[str, Any]]:
    return [_entry(one, imports) for one in page]


def _entry(noted: Noted, imports: Imports) -> dict[str, Any]:
    run, project, row = noted
    brought = None if run == STORE else imports.of(run)
    about = row.meta.get("run") if run == STORE else run
    return {
        "at": records.utc(row.at), "kind": row.kind, "actor": row.actor, "project": project,
        "run": about if isinstance(about, str) else None, "seq": row.seq, "store": run == STORE,
        "attempt": row.attempt, "text": wording.text(row.kind, row.meta), "meta": wording.slim(row.meta),
        "hash": row.hash.hex(), "imported": brought.signer if brought is not None and row.seq <= brought.rows else None,
    }  # fmt: skip


def _where(noted: Noted) -> Place:
    return noted.row.at, noted.run, noted.row.seq


def _cursor(noted: Noted) -> str:
    at, run, seq = _where(noted)
    return f"{at}~{seq}~{run}"


def _place(cursor: str | None) -> Place | None:
    if not cursor:
        return None
    at, _, rest = cursor.partition("~")
    seq, _, run = rest.partition("~")
    if not run or not all(n.isascii() and n.isdecimal() and int(n) <= limits.INTEGER_MAX for n in (at, seq)):
        raise Invalid(f"cursor is {cursor!r:.80}: give the one from the page before, unchanged")
    return int(at), run, int(seq)


def _check_limit(limit: int, most: int) -> None:
    if not 1 <= limit <= most:
        raise Invalid(f"limit is {limit}: give 1 to {most}")
