"""Re-execution: check a run's hash chain and fold its journal again, comparing every stored decision bit for bit.

Rule of this module: it trusts nothing but the events themselves. The run's record and its snapshots follow from them,
too, so they are compared as well. The journal may grow meanwhile: what counts is what the record said at the start.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from flyball_server import deletion, records
from flyball_server.core import run as fold
from flyball_server.core.errors import Damaged, NotFound
from flyball_server.core.run import Rules, Run
from flyball_server.loading import differs, load, projected
from flyball_server.rules import rules_of
from flyball_server.storage.audit import Noted, noted, project_in
from flyball_server.storage.journal import DELETED, GENESIS, STORE, Column, Journal, Row, RunRecord, chained, header


class Verdict(NamedTuple):
    """What a check of one run found. `problem` is "" where everything matches, else what differs first, and where."""

    run: str
    rows: int
    observations: int
    decisions: int
    head: str
    problem: str


class _Folded:
    """How far the rows were folded, and what was found on the way."""

    def __init__(self) -> None:
        self.rules: Rules | None = None
        self.state: Run | None = None
        self.first: Row | None = None
        self.newest: Row | None = None
        self.shadows: tuple[str, ...] = ()
        self.noted: list[Row] = []
        self.rows = self.decisions = 0
        self.snapshot_problem = ""

    @property
    def head(self) -> bytes:
        """The newest row's hash."""
        return GENESIS if self.newest is None else self.newest.hash


def names(journal: Journal) -> list[str]:
    """Every run there is anything of, but for deleted ones."""
    return [name for name in journal.names() if name != STORE and not _is_deleted(journal, name)]


def verify_store(journal: Journal) -> list[str]:
    """What is wrong where no single run can tell: a line for each."""
    out = journal.check() + deletion.problems(journal) + _store_noted(journal)
    for name in journal.names():
        if name != STORE and _is_deleted(journal, name):
            if next(journal.audit.of(name), None) is not None:
                out.append(f"run {name!r}: it was deleted, and rows of it are noted: `flyball-server compact` helps")
            try:
                load(journal, rules_of, name)
            except NotFound:  # as it should be
                continue
            except Damaged as error:
                out.append(str(error))
    return out


def _store_noted(journal: Journal) -> list[str]:
    try:
        rows = list(journal.rows(STORE))
    except Damaged:  # `deletion.problems` names it
        return []
    right = [Noted(STORE, project_in(STORE, "", row), row) for row in rows]
    problem = _compare_noted(journal, STORE, right, rows[-1].seq if rows else 0)
    return [f"the store's journal: {problem}"] if problem else []


def verify(journal: Journal, run_id: str) -> Verdict:
    """Check one run from its first row to its newest."""
    folded = _Folded()
    try:
        record = journal.record(run_id)
        if record is not None and record.status == DELETED:
            problem = "the run was deleted: `flyball tombstones` tells when and why"
        else:
            problem = _follow(journal, run_id, record, folded) or _ends(journal, run_id, record, folded)
    except Exception as error:  # there is no telling what a damaged row does to whoever reads it
        words = str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"
        problem = f"behind row {folded.rows}: {words}"
    observations = 0 if folded.state is None else folded.state.observations
    return Verdict(run_id, folded.rows, observations, folded.decisions, folded.head.hex(), problem)


def _is_deleted(journal: Journal, name: str) -> bool:
    try:
        record = journal.record(name)
    except Damaged:
        return False
    return record is not None and record.status == DELETED


def _follow(journal: Journal, run_id: str, record: RunRecord | None, folded: _Folded) -> str:
    """Fold the rows up to the record's newest one; what is wrong with the first that is not right."""
    snapshots = set(journal.snapshots(run_id))
    for row in journal.rows(run_id, until=None if record is None else record.seq):
        where = f"row {row.seq} ({row.kind}, steps {row.first_step}..{row.last_step})"
        if row.seq != folded.rows + 1:
            return f"row {folded.rows + 1} is missing"
        if chained(folded.head, run_id, row) != row.hash:
            return f"{where}: the hash differs"
        folded.newest = row
        folded.rows += 1
        if found := noted(row):
            folded.noted.append(found)
        if folded.rules is None or folded.state is None:
            spec = records.spec_of(row)
            folded.first, folded.rules, folded.shadows = row, rules_of(spec), (*spec.shadows,)
            folded.state = fold.create(folded.rules, records.origin_of(row))
        else:
            event, stored = records.from_row(row, folded.rules.groups)
            folded.state, outcome = fold.apply(folded.rules, folded.state, event)
            if not _same(row, records.to_entry(event, outcome, folded.shadows)):
                return f"{where}: the decisions differ"
            folded.decisions += len(stored.marks)
        if row.seq in snapshots and not folded.snapshot_problem:
            folded.snapshot_problem = _compare_snapshot(journal, run_id, folded.state)
    return ""


def _ends(journal: Journal, run_id: str, record: RunRecord | None, folded: _Folded) -> str:
    """Whether the rows end where the record says, which the chain alone cannot tell; then the caches."""
    rows = folded.rows
    if record is None:
        return "no such run" if rows == 0 and not journal.snapshots(run_id) else "the run's record is missing"
    if record.seq > rows or folded.state is None or folded.rules is None or folded.first is None:
        return f"row {rows + 1} is missing: the newest was row {record.seq}"
    if next(journal.rows(run_id, after=rows, until=rows + 1), None) is not None and _stands_still(journal, record):
        return f"row {rows + 1} is not in the run's record"
    assert folded.newest is not None
    spec, (first, newest) = records.spec_of(folded.first), (folded.first, folded.newest)
    origin = records.origin_of(first)
    right = projected(spec, origin, folded.rules, folded.state, first.at, newest.at, newest.hash)
    if record.hash != newest.hash:
        return f"row {rows}: the newest row's hash is not the recorded one"
    if wrong := differs(record, right):
        return wrong
    for seq in journal.snapshots(run_id):
        if seq > rows and _stands_still(journal, record):
            return f"there is a snapshot at row {seq}, which does not exist: delete it"
    copies = [Noted(run_id, spec.project, row) for row in folded.noted]
    return folded.snapshot_problem or _compare_noted(journal, run_id, copies, rows)


def _compare_noted(journal: Journal, run_id: str, right: list[Noted], until: int) -> str:
    """Whether what is noted of the rows is what they are."""
    remedy = "it is a copy, which `flyball-server compact` makes again; nothing is lost with it"
    try:
        found = list(journal.audit.of(run_id, until=until))
    except Damaged as error:
        return f"{error}: {remedy}"
    if found == right:
        return ""
    wrong = {one.row.seq for one in found if one not in right} | {one.row.seq for one in right if one not in found}
    return f"row {min(wrong, default=0)}: what is noted of it differs from the row: {remedy}"


def _stands_still(journal: Journal, record: RunRecord) -> bool:
    """Whether nobody has written to the run since its record was read."""
    again = journal.record(record.run)
    return again is None or again.seq == record.seq


def _compare_snapshot(journal: Journal, run_id: str, state: Run) -> str:
    where = f"the snapshot at row {state.seq}"
    try:
        snapshot = journal.snapshot(run_id, until=state.seq)
    except Damaged as error:
        return f"{error}: it is a cache; nothing is lost with it"
    if snapshot is None or snapshot.seq != state.seq:  # thinned out meanwhile
        return ""
    if (snapshot.attempt, snapshot.step) != (state.attempt, state.through):
        return f"{where} says another attempt or step than the fold: it is a cache; nothing is lost with it"
    if _canonical(json.loads(snapshot.state)) != _canonical(fold.dump(state)):
        return f"{where} differs from the fold: it is a cache; nothing is lost with it"
    return ""


def _canonical(state: Any) -> str:
    """The state as text, whatever order its mappings came in: a state that went through the journal has another."""
    return json.dumps(state, sort_keys=True, allow_nan=False)


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
