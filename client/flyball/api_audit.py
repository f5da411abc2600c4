"""The record over REST: a run's journal, the audit across runs, signed heads, deliveries to webhooks.

Rule of this module: as in `api`, one method per route; it is a part of `api.Client`, which asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flyball.api_commands import run_path
from flyball.api_connection import Connection

#: Rows asked for in one request; more come in further ones.
RECORD_PAGE = 500


class Record(Connection):
    """Methods of `api.Client`. Times are ISO 8601 with a time zone, such as 2027-01-31T12:00:00Z."""

    def journal(
        self, run: str, *, kinds: Iterable[str] = (), since: int = 0, columns: bool = False, **where: Any
    ) -> Iterator[dict[str, Any]]:
        """The rows of a run's journal behind the row `since`, oldest first, as far as there are any now. kinds: of
        these only; where: actor, attempt, from_time, until. columns: with every value of every row.

        An entry with `problem` alone stands where a damaged run cannot be read any further.
        """
        asked = {**_where(kinds, where), "columns": columns or None, "limit": RECORD_PAGE}
        following: int | None = since
        while following is not None:
            page = self._get(run_path(run, "journal"), {**asked, "since": following})
            yield from page["rows"]
            following = page["next"]
            if page["problem"]:
                yield {"problem": page["problem"]}

    def audit(self, *, kinds: Iterable[str] = (), **where: Any) -> Iterator[dict[str, Any]]:
        """What was asked of runs, what became of it, who was given access and who was refused, newest first, as far as
        the token reaches. where: actor, project, run, from_time, until."""
        asked = {**_where(kinds, where), "limit": RECORD_PAGE}
        while True:
            page = self._get("/v1/audit", asked)
            yield from page["entries"]
            if not page["cursor"]:
                return
            asked["cursor"] = page["cursor"]

    def journal_csv(self, run: str, *, kinds: Iterable[str] = (), **where: Any) -> Iterator[str]:
        """`journal` as CSV, in pieces of text."""
        with self._streamed(run_path(run, "journal"), {**_where(kinds, where), "format": "csv"}) as answer:
            yield from answer.iter_text()

    def audit_csv(self, *, kinds: Iterable[str] = (), **where: Any) -> Iterator[str]:
        """`audit` as CSV, in pieces of text."""
        with self._streamed("/v1/audit", {**_where(kinds, where), "format": "csv"}) as answer:
            yield from answer.iter_text()

    def heads(self, *, since: int = 0, project: str | None = None) -> Iterator[dict[str, Any]]:
        """The signed heads of all runs, oldest list first: `flyball-server verify --heads` checks them."""
        following: int | None = since
        while following is not None:
            page = self._get("/v1/heads", {"since": following, "project": project})
            yield from page["heads"]
            following = page["next"]

    def deliveries(self, *, hook: str | None = None, status: str | None = None) -> Iterator[dict[str, Any]]:
        """What was sent to webhooks, is to be sent, or could not be, newest first. status: pending, delivered,
        failed."""
        asked: dict[str, Any] = {"hook": hook, "status": status, "limit": RECORD_PAGE}
        while True:
            page = self._get("/v1/webhooks/deliveries", asked)
            yield from page["deliveries"]
            if page["next"] is None:
                return
            asked["before"] = page["next"]


def _where(kinds: Iterable[str], where: Mapping[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {"kind": list(kinds), **where}
    asked["from"] = asked.pop("from_time", None)
    return asked
