"""The routes of the record: a run's rows, the audit across runs, signed heads, deliveries to webhooks.

Rule of this module: no decision is taken here; every route is one call of a use case. What is streamed is made while it
is sent, and a cell of CSV is never a formula to whoever opens it in a spreadsheet.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from flyball_server.audit.auditing import Auditing, AuditRequest, JournalRequest, moment
from flyball_server.audit.heads import Heads
from flyball_server.audit.webhooks import Hooks
from flyball_server.http_api.guarded import caller_of
from flyball_server.http_api.runs import Count
from flyball_server.http_api.text import encoded, json_line

Format = Annotated[
    Literal["json", "jsonl", "csv"], Query(description="jsonl and csv: all that match, streamed, without pages")
]
Kinds = Annotated[list[str] | None, Query(description="may be repeated; any of them")]
From = Annotated[str | None, Query(alias="from", description="ISO 8601 with a time zone, this moment included")]
Until = Annotated[str | None, Query(description="ISO 8601 with a time zone, this moment not included")]

_JOURNAL = ("seq", "kind", "attempt", "first_step", "last_step", "actor", "at", "text", "summary", "meta", "hash")
_AUDIT = ("at", "kind", "actor", "project", "run", "seq", "store", "attempt", "text", "meta", "hash", "imported")
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "application/x-ndjson": {}, "text/csv": {}}}
}


class JournalRow(BaseModel):
    """One row. text: in words; summary: of a row with columns, what they hold; columns: their values, if asked for."""

    seq: int
    kind: str
    attempt: int
    first_step: int | None
    last_step: int | None
    actor: str
    at: str
    hash: str
    text: str
    meta: dict[str, Any]
    summary: dict[str, Any] | None
    columns: dict[str, list[Any]] | None = None


class JournalPage(BaseModel):
    """Rows, oldest first. The page tells of every row up to `through`, so that asking again with `since=through` misses
    none; `next` is that where there is more now, else null. A page may have fewer rows than `limit` and still a `next`.
    problem: of a damaged run, what comes behind these rows."""

    run: str
    rows: list[JournalRow]
    through: int
    next: int | None
    problem: str = ""


class AuditEntry(BaseModel):
    """One thing that was asked, done or refused. store: a row of the store's own journal, else of the run's. meta: the
    row's, without whole states and specifications. imported: of a row that came with an import, who vouches for it: the
    fingerprint of the key that signed the file."""

    at: str
    kind: str
    actor: str
    project: str
    run: str | None
    seq: int
    store: bool
    attempt: int
    text: str
    meta: dict[str, Any]
    hash: str
    imported: str | None


class AuditPage(BaseModel):
    """Entries, newest first; `cursor` asks for the next page, null at the end."""

    entries: list[AuditEntry]
    cursor: str | None


class SignedHeads(BaseModel):
    """One signed list. heads: what is signed, as canonical JSON; key: the Ed25519 public key; seq: its row in the
    store's own journal."""

    seq: int
    project: str
    heads: dict[str, Any]
    key: str
    signature: str


class HeadsPage(BaseModel):
    """Lists, oldest first; `next` is the value of `since` for the next page, null at the end."""

    heads: list[SignedHeads]
    next: int | None


class DeliveryDetail(BaseModel):
    """What became of one event for one hook. status: pending, delivered or failed; next_at: when it is tried again."""

    id: str
    number: int
    hook: str
    event: str
    run: str
    project: str
    seq: int
    at: str
    status: str
    attempts: int
    next_at: str | None
    done_at: str | None
    error: str


class DeliveryPage(BaseModel):
    """Deliveries, newest first; `next` is the value of `before` for the next page, null at the end. dropped: events
    that were not taken because too many waited for their hook, by hook, since the service started."""

    deliveries: list[DeliveryDetail]
    next: int | None
    dropped: dict[str, int]


def router(auditing: Auditing, heads: Heads, hooks: Hooks) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["audit"])

    @routes.get("/runs/{run}/journal", response_model=JournalPage, responses=_STREAMED)
    async def journal(
        run: str,
        request: Request,
        kind: Kinds = None,
        actor: str | None = None,
        from_: From = None,
        until: Until = None,
        attempt: Count | None = None,
        since: Annotated[Count, Query(description="rows behind this one: `through` of the page before")] = 0,
        limit: Count = 100,
        columns: Annotated[bool, Query(description="with every value of every row")] = False,
        format: Format = "json",
    ) -> Any:
        """The rows of a run's journal, oldest first, without gaps."""
        asked = JournalRequest(
            run, tuple(kind or ()), actor, moment("from", from_), moment("until", until), attempt, since, limit, columns
        )
        if format != "json":
            return _streamed(await auditing.all_rows(asked, caller_of(request)), format, _JOURNAL)
        return await auditing.rows(asked, caller_of(request))

    @routes.get("/audit", response_model=AuditPage, responses=_STREAMED)
    async def audit(
        request: Request,
        kind: Kinds = None,
        actor: str | None = None,
        project: str | None = None,
        run: str | None = None,
        from_: From = None,
        until: Until = None,
        cursor: str | None = None,
        limit: Count = 100,
        format: Format = "json",
    ) -> Any:
        """What was asked of runs, what became of it, who was given access and who was refused: newest first."""
        asked = AuditRequest(
            tuple(kind or ()), actor, project, run, moment("from", from_), moment("until", until), cursor, limit
        )
        if format != "json":
            return _streamed(await auditing.all_audit(asked, caller_of(request)), format, _AUDIT)
        return await auditing.audit(asked, caller_of(request))

    @routes.get("/heads")
    async def signed_heads(
        request: Request,
        since: Annotated[Count | None, Query(description="lists behind this row; without it the newest ones")] = None,
        project: str | None = None,
        limit: Count = 100,
    ) -> HeadsPage:
        """How far each run had come, signed: `flyball-server verify --heads` checks it against stores and exports."""
        return HeadsPage(**await heads.listed(since, project, limit, caller_of(request)))

    @routes.get("/webhooks/deliveries")
    async def deliveries(
        request: Request,
        hook: str | None = None,
        status: Literal["pending", "delivered", "failed"] | None = None,
        before: Count | None = None,
        limit: Count = 100,
    ) -> DeliveryPage:
        """What was sent to webhooks, is to be sent, or could not be: newest first."""
        return DeliveryPage(**await hooks.listed(hook, status, before, limit, caller_of(request)))

    return routes


def _streamed(found: Iterator[dict[str, Any]], form: str, columns: tuple[str, ...]) -> StreamingResponse:
    if form == "jsonl":
        return StreamingResponse(map(json_line, found), media_type="application/x-ndjson")
    return StreamingResponse(map(encoded, _csv(found, columns)), media_type="text/csv; charset=utf-8")


def _csv(found: Iterator[Mapping[str, Any]], columns: tuple[str, ...]) -> Iterator[str]:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(columns)
    for one in found:
        # At a damage there are no further rows, and somebody who has only the table must hear of it.
        row = one if "problem" not in one else {"kind": "problem", "text": one["problem"]}
        out.writerow([cell(row.get(name)) for name in columns])
        if text.tell() > 65536:
            yield text.getvalue()
            text.seek(0)
            text.truncate()
    yield text.getvalue()


def cell(value: Any) -> Any:
    """A value as a cell: no text that a spreadsheet would compute."""
    if value is None or isinstance(value, bool | int):
        return "" if value is None else value
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    return "'" + text if text.lstrip(" ")[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text
