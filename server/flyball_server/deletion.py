"""Tombstones: what the store's own journal keeps of runs that were deleted.

Rule of this module: it is a hash-chained journal like any run's, so a tombstone cannot be taken away or changed without
being found; the record of the deleted run points at it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from flyball_server import ledger, limits, records
from flyball_server.checks import check_text
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.proving import checked
from flyball_server.storage.journal import DELETED, GENESIS, STORE, Journal, Row, RunRecord

#: The kind of a tombstone among the rows of the store's journal.
KIND = "deleted"
#: What of a tombstone is the deleted run's record.
_KEPT = ("run", "project", "name", "policy", "created_at", "attempts", "step")


def check_reason(reason: str, wanted: str = "say why the run is deleted") -> str:
    """The reason without spaces around it. Raises Invalid where there is none, or too much of it."""
    reason = " ".join(reason.split())
    if not reason:
        raise Invalid(f"reason is empty: {wanted}; it stays in the store's journal")
    if len(reason) > limits.REASON_MAX:
        raise Invalid(f"reason has {len(reason)} characters: give at most {limits.REASON_MAX}")
    check_text("reason", reason)
    return reason


def bare_record(run: str) -> RunRecord:
    """What is known of a run whose rows are there and whose record is not: its name."""
    project, _, name = run.rpartition(":")
    return RunRecord(run, project or "default", name, "damaged", "", {}, 0, None, 0, 0, 0, b"")


def tombstone(
    record: RunRecord, observations: int | None, reason: str, actor: str, now: int, last: Row | None
) -> tuple[Row, RunRecord]:
    """The row behind `last` that tells of the deletion, and the record that is left of the run."""
    meta: dict[str, Any] = {
        "run": record.run,
        "project": record.project,
        "name": record.name,
        "reason": reason,
        "policy": record.policy,
        "created_at": record.created_at,
        "attempts": record.attempt,
        "step": record.step,
        "observations": observations,
        "rows": record.seq,
        "digest": record.hash.hex(),
    }
    row = ledger.behind(last, KIND, meta, actor, now)
    return row, left_by(row)


def left_by(row: Row) -> RunRecord:
    """The record of a deleted run, all of which follows from its tombstone."""
    run, project, name, policy, created_at, attempts, step = (row.meta[key] for key in _KEPT)
    return RunRecord(run, project, name, DELETED, policy, {}, attempts, step, created_at, row.at, row.seq, row.hash)


def described(row: Row) -> dict[str, Any]:
    """A tombstone for people and programs."""
    created_at = records.utc(row.meta["created_at"])
    return {"seq": row.seq, "at": records.utc(row.at), "actor": row.actor, **row.meta, "created_at": created_at}


def tombstones(journal: Journal, after: int, limit: int, reaches: Callable[[str], bool]) -> dict[str, Any]:
    """A page of those whose project `reaches` says yes to, oldest first; `next` is the value of `after` for the page
    behind it, None at the end."""
    if not 1 <= limit <= limits.TOMBSTONES_MAX:
        raise Invalid(f"limit is {limit}: give 1 to {limits.TOMBSTONES_MAX}")
    rows = journal.rows(STORE, after=after)
    found = list(islice((row for row in rows if row.kind == KIND and reaches(row.meta["project"])), limit + 1))
    page = found[:limit]
    following = page[-1].seq if len(found) > limit else None
    return {"tombstones": [described(row) for row in page], "next": following}


def problems(journal: Journal) -> list[str]:
    """What is wrong with the store's journal: its chain, and whether each tombstone is where the run's record says."""
    out = []
    try:
        for row in checked(STORE, journal.rows(STORE), 0, GENESIS):
            if row.kind != KIND:
                continue
            run = str(row.meta.get("run"))
            if journal.record(run) != left_by(row):
                out.append(f"run {run!r}: its tombstone is row {row.seq}, but its record does not say so")
    except Damaged as error:
        out.append(f"the store's journal: {error}")
    return out
