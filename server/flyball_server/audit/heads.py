"""Signed heads: now and then the service signs how far each run has come, so that nobody can shorten or rewrite what
came before, not even whoever holds the store.

Rule of this module: one signed list per project. A list with entries hidden could not be verified, and a list of all
would tell every project about the others; so each holds the runs of its project only, and the head of the store's own
journal. Lists are rows of that journal, and each names the one before it in its project, so that none can be left out.
docs/audit.md describes a list.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flyball_server import limits, queries, records
from flyball_server.auth.access import VIEW, Caller
from flyball_server.core.errors import Busy, Damaged, Invalid
from flyball_server.exports.form import plain
from flyball_server.ledger import Ledger
from flyball_server.signing import Signer
from flyball_server.storage.audit import AuditFilter, Noted
from flyball_server.storage.journal import GENESIS, STORE, Journal, Row, RunFilter, RunRecord

#: The kind of the rows in the store's journal, and the first line of what is signed.
KIND = "heads"
FORM = "flyball-heads 1"
_ACTOR = "service"
_log = logging.getLogger("flyball_server")


class _Signed:
    """What was signed of a project: how many lists, the digest of the newest, and the newest row of each run."""

    __slots__ = ("number", "previous", "seqs")

    def __init__(self) -> None:
        self.number = 0
        self.previous = ""
        self.seqs: dict[str, int] = {}

    def take(self, heads: Mapping[str, Any]) -> None:
        """One more list."""
        self.number, self.previous = heads["number"], digest(heads)
        self.seqs |= {run: seq for run, seq, _ in heads["runs"]}


class Heads:
    """Signs the heads of what moved. All of it belongs to one event loop."""

    def __init__(self, journal: Journal, ledger: Ledger, signer: Signer, now_us: Callable[[], int]) -> None:
        self._journal = journal
        self._ledger = ledger
        self._signer = signer
        self._now_us = now_us
        self._turn = asyncio.Lock()
        self._signed: dict[str, _Signed] | None = None

    async def keep_signing(self, every_s: float) -> None:
        """Sign what has moved, again and again, for as long as the service runs."""
        while True:
            try:
                await self.sign()
            except (Busy, Damaged) as error:
                _log.warning("the heads of runs are not signed now: %s", error)
            except Exception:
                _log.exception("signing the heads of runs failed")
            await asyncio.sleep(every_s)

    async def sign(self, run: str | None = None) -> int:
        """Sign the heads of all runs that moved, or of one; returns how many. Raises Busy, Damaged."""
        async with self._turn:
            if self._signed is None:
                self._signed = await queries.in_thread(_signed_before, self._journal)
            moved = await queries.in_thread(_moved, self._journal, self._signed, run)
            for project, found in sorted(moved.items()):
                for start in range(0, len(found), limits.HEADS_RUNS_MAX):
                    await self._sign(project, found[start : start + limits.HEADS_RUNS_MAX])
            return sum(map(len, moved.values()))

    async def sign_exported(self, run: str) -> None:
        """Sign the head of a run that leaves; where that fails, its export is still right."""
        try:
            await self.sign(run)
        except (Busy, Damaged) as error:
            _log.warning("the head of run %s is not signed now: %s", run, error)

    async def listed(self, since: int | None, project: str | None, limit: int, caller: Caller) -> dict[str, Any]:
        """The signed lists of the caller's projects, oldest first: those behind row `since` of the store's journal, or
        (None) the newest ones. `next` is the value of `since` for the page behind it, None at the end."""
        caller.check_role(VIEW)
        if project is not None:
            caller.check(VIEW, project)
        if not 1 <= limit <= limits.HEADS_LISTS_MAX:
            raise Invalid(f"limit is {limit}: give 1 to {limits.HEADS_LISTS_MAX}")
        where = AuditFilter(run=STORE, kinds=frozenset({KIND}), project=project, projects=caller.projects)
        if since is None:
            newest = await queries.in_thread(self._journal.audit.newest, where, before=None, limit=limit)
            return {"heads": [_described(one) for one in sorted(newest, key=lambda one: one.row.seq)], "next": None}
        found = await queries.in_thread(_behind, self._journal, where, since, limit + 1)
        following = found[limit - 1].row.seq if len(found) > limit else None
        return {"heads": [_described(one) for one in found[:limit]], "next": following}

    async def _sign(self, project: str, found: list[RunRecord]) -> None:
        assert self._signed is not None
        known = self._signed.setdefault(project, _Signed())

        def made(last: Row | None) -> dict[str, Any]:
            seq, hash_ = (0, GENESIS) if last is None else (last.seq, last.hash)
            heads = {
                "form": FORM,
                "project": project,
                "number": known.number + 1,
                "previous": known.previous,
                "at": records.utc(self._now_us()),
                "store": [seq, hash_.hex()],
                "runs": sorted([record.run, record.seq, record.hash.hex()] for record in found),
            }
            signature = self._signer.sign(plain(heads)).hex()
            return {"project": project, "heads": heads, "key": self._signer.public.hex(), "signature": signature}

        row = await self._ledger.append(KIND, made, _ACTOR)
        known.take(row.meta["heads"])


def digest(heads: Mapping[str, Any]) -> str:
    """What the next list of the project calls this one."""
    return hashlib.sha256(plain(heads)).hexdigest()


def _signed_before(journal: Journal) -> dict[str, _Signed]:
    found: dict[str, _Signed] = {}
    for one in journal.audit.of(STORE):
        if one.row.kind == KIND:
            found.setdefault(one.project, _Signed()).take(one.row.meta["heads"])
    return found


def _moved(journal: Journal, signed: Mapping[str, _Signed], run: str | None) -> dict[str, list[RunRecord]]:
    """The runs that have rows beyond those signed, by project."""
    out: dict[str, list[RunRecord]] = {}
    records = _all(journal) if run is None else filter(None, [journal.record(run)])
    for record in records:
        known = signed.get(record.project)
        if record.status not in ("damaged", "deleted") and (
            known is None or record.seq > known.seqs.get(record.run, 0)
        ):
            out.setdefault(record.project, []).append(record)
    return out


def _all(journal: Journal) -> Iterable[RunRecord]:
    after = None
    while page := journal.records(RunFilter(), after=after, limit=limits.PAGE_MAX):
        yield from page
        after = (page[-1].created_at, page[-1].run)


def _behind(journal: Journal, where: AuditFilter, since: int, limit: int) -> list[Noted]:
    found: list[Noted] = []
    for one in journal.audit.of(STORE, after=since):
        if where.matches(one):
            found.append(one)
            if len(found) == limit:
                break
    return found


def _described(noted: Noted) -> dict[str, Any]:
    """A list as it is kept elsewhere: of its row only the number, which follows from what is signed."""
    return {"seq": noted.row.seq, **noted.row.meta}
