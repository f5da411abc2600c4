"""Re-execution: check a run's hash chain and fold its journal again, comparing every stored decision bit for bit.

Rule of this module: it trusts nothing but the events themselves.
"""

from __future__ import annotations

from typing import NamedTuple

from flyball_server import records
from flyball_server.core import run as fold
from flyball_server.core.run import NOTHING
from flyball_server.service import rules_of
from flyball_server.storage.journal import GENESIS, Column, Journal, Row, chained, header


class Verdict(NamedTuple):
    """What a check of one run found. `problem` is "" where everything matches, else what differs first, and where."""

    run: str
    rows: int
    observations: int
    decisions: int
    head: str
    problem: str


def verify(journal: Journal, run_id: str) -> Verdict:
    """Check one run from its first row to its newest."""
    rows = observations = decisions = 0
    previous = GENESIS
    rules, state = None, None
    try:
        for row in journal.rows(run_id):
            where = f"row {row.seq} ({row.kind}, steps {row.first_step}..{row.last_step})"
            if row.seq != rows + 1:
                return Verdict(run_id, rows, observations, decisions, previous.hex(), f"row {rows + 1} is missing")
            if chained(previous, run_id, row) != row.hash:
                return Verdict(run_id, rows, observations, decisions, previous.hex(), f"{where}: the hash differs")
            previous = row.hash
            rows += 1
            if rules is None or state is None:
                spec = records.spec_of(row)
                rules = rules_of(spec)
                state = fold.create(rules, records.origin_of(row))
                continue
            event, stored = records.from_row(row, rules.groups)
            state, outcome = fold.apply(rules, state, event)
            if not _same(row, records.to_entry(event, outcome, spec.shadows)):
                return Verdict(run_id, rows, observations, decisions, previous.hex(), f"{where}: the decisions differ")
            observations = state.observations
            decisions += len(stored.marks) if stored is not NOTHING else 0
        problem = _cut_off(journal, run_id, rows, previous)
    except Exception as error:  # there is no telling what a damaged row does to whoever reads it
        problem = f"behind row {rows}: {type(error).__name__}: {error}"
    return Verdict(run_id, rows, observations, decisions, previous.hex(), problem)


def _cut_off(journal: Journal, run_id: str, rows: int, head: bytes) -> str:
    """Whether the newest rows are missing, which the chain alone cannot tell."""
    record = journal.record(run_id)
    if record is None:
        return "no such run" if rows == 0 else "the run's record is missing"
    if record.seq > rows:
        return f"row {rows + 1} is missing: the newest was row {record.seq}"
    return "" if record.hash == head else "the newest row's hash is not the recorded one"


def _same(row: Row, entry: records.Entry) -> bool:
    """Whether a stored row and the one made today are equal, byte for byte."""
    again = row._replace(meta=entry.meta, columns=entry.columns)
    return (
        _bytes(row.columns) == _bytes(entry.columns)
        and header(row) == header(again)
        and (row.first_step, row.last_step, row.attempt) == (entry.first_step, entry.last_step, entry.attempt)
    )


def _bytes(columns: tuple[Column, ...]) -> list[tuple[str, str, bytes]]:
    return [(c.name, c.type, bytes(c.data)) for c in columns]
