"""Which runs were brought from elsewhere, by whom, and whose key vouches for what they say: rows of the store's own
journal.

Rule of this module: an import is on record before the run is there, and it counts for the very rows whose newest hash
it names, and for no others: one that came too late, or failed, says nothing about the run that has the name.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from flyball_server.core.commands import Proposal
from flyball_server.core.errors import Damaged
from flyball_server.ledger import Ledger
from flyball_server.storage.journal import Journal, Row, RunRecord
from flyball_server.tail import Tail

#: The kind of the rows.
KIND = "imported"


class Import(NamedTuple):
    """Rows 1..rows of a run came from elsewhere: `digest` is the last one's hash, `signer` the fingerprint of the key
    that signed them."""

    rows: int
    digest: str
    signer: str


async def put_on_record(ledger: Ledger, record: RunRecord, signer: str, actor: str) -> None:
    """Say who is about to bring which run. Raises Busy, and Damaged where the store's journal is."""
    meta: dict[str, Any] = {
        "run": record.run,
        "project": record.project,
        "signer": signer,
        "digest": record.hash.hex(),
        "rows": record.seq,
    }
    await ledger.append(KIND, meta, actor)


class Imports:
    """The imports of a store, as its journal tells of them."""

    def __init__(self, journal: Journal, tail: Tail) -> None:
        self._journal = journal
        self._tail = tail
        self._told: dict[str, list[Import]] = {}
        self._proved: dict[str, Import] = {}
        tail.on(KIND, self._learn)

    async def look(self) -> None:
        """Learn what other processes brought, where the store's journal can be read."""
        await self._tail.refresh_if_possible()

    def of(self, run: str) -> Import | None:
        """The import that a run came with; None also where it cannot be read. Reads the journal the first time."""
        if run not in self._proved:
            for one in self._told.get(run, ()):
                with suppress(Damaged):
                    row = next(self._journal.rows(run, after=one.rows - 1, until=one.rows), None)
                    if row is not None and row.hash.hex() == one.digest:
                        self._proved[run] = one
        return self._proved.get(run)

    def approvals(self, run: str, proposal: Proposal) -> int:
        """How many of a proposal's approvals were given elsewhere. Raises Damaged."""
        found = self.of(run)
        if found is None or proposal.seq > found.rows:
            return 0
        rows = (noted.row for noted in self._journal.audit.of(run, after=proposal.seq, until=found.rows))
        judged = [row.meta for row in rows if row.kind == "judged" and row.meta["proposal"] == proposal.id]
        return sum(meta["verdict"] == "approved" for meta in judged)

    def _learn(self, row: Row) -> None:
        meta = row.meta
        self._told.setdefault(meta["run"], []).append(Import(meta["rows"], meta["digest"], meta["signer"]))
