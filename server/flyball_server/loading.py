"""A run as its journal has it: folded, and proved on the way.

Rule of this module: nothing is folded whose hash does not follow from what stands before it, and the run's record must
say what the fold says. Where something is wrong, what lies before it is still folded, for whoever reads.

A snapshot is a cache: one that cannot be read, or is not of this run's row, is passed over for an older one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flyball_server import deletion, limits, records
from flyball_server.auth.access import unknown_run
from flyball_server.core import run as fold
from flyball_server.core.errors import Busy, Damaged, NotFound
from flyball_server.core.events import Observed, Origin, Spec
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Settings
from flyball_server.proving import check_row, checked, unread_problem
from flyball_server.queries import cutoffs
from flyball_server.storage.journal import DELETED, GENESIS, STORE, Journal, Row, RunRecord

#: Builds what a specification means (policy, base, guard); raises Invalid.
Ruler = Callable[[Spec], Rules]
#: The steps of a batch and the settings decided in it.
Batch = tuple[int, int, Sequence[tuple[int, Settings]]]

_log = logging.getLogger("flyball_server")


class Deleted(NotFound):
    """There was such a run; the message says who deleted it, when and why."""


class Loaded(NamedTuple):
    """A run from the journal. unread: the rows before the snapshot it was folded from, and the hash of the last of
    them. problem: what is damaged ("" where nothing is); `run` is then as of the last row before that."""

    spec: Spec
    origin: Origin | None
    rules: Rules
    run: Run
    record: RunRecord
    snapshot_at: int
    unread: tuple[int, bytes]
    problem: str


def check_is_run(run_id: str) -> None:
    """The store's own journal is no run, whoever asks."""
    if run_id == STORE:
        raise unknown_run(run_id)


def load(journal: Journal, ruler: Ruler, run_id: str) -> Loaded:
    """Fold a run. Raises NotFound, Deleted, and Damaged where not even its first row can be read."""
    record = journal.record(run_id)
    if record is None and next(journal.rows(run_id), None) is not None:
        record = journal.record(run_id)  # somebody may have begun the run between these reads
        if record is None:
            raise Damaged(f"run {run_id!r}: there are rows, but the run's record is missing")
    if record is None:
        raise unknown_run(run_id)
    first = next(journal.rows(run_id, until=1), None)
    if record.status == DELETED:
        raise _deleted(journal, record, first)
    if first is None:
        raise Damaged(f"run {run_id!r}: row 1 is missing")
    check_row(run_id, GENESIS, first, 1)
    spec = records.spec_of(first)
    rules, origin = ruler(spec), records.origin_of(first)
    while True:
        begun = Loaded(spec, origin, rules, fold.create(rules, origin), record, 0, (0, GENESIS), "")
        loaded = _fold(journal, run_id, first, begun)
        if not loaded.problem and journal.count(run_id, loaded.unread[0]) != loaded.unread[0]:
            # Rows before the snapshot are not read here, but they have to be there.
            loaded = loaded._replace(problem=unread_problem(journal, run_id, loaded.unread))
        if loaded.problem or not _more(journal, run_id, record.seq):
            return loaded
        again = journal.record(run_id)  # where another process appends at this moment, its record is newer
        if again is None or again.seq <= record.seq:
            return loaded._replace(problem=f"run {run_id!r}, row {record.seq + 1}: it is not in the run's record")
        record = again


def _fold(journal: Journal, run_id: str, first: Row, begun: Loaded) -> Loaded:
    """Fold up to the record's row, from the newest snapshot that is one."""
    record, rules = begun.record, begun.rules
    head, last, problem = first.hash, first, ""
    at, run = _snapshot(journal, run_id, rules, record.seq, begun.origin)
    unread = (0, GENESIS) if at is None else (at.seq, at.hash)
    if at is not None:
        head, last = at.hash, at
    snapshot_at = run.observations
    try:
        for row in checked(run_id, journal.rows(run_id, after=run.seq, until=record.seq), run.seq, head):
            run, _ = fold.apply(rules, run, records.from_row(row, begun.spec.groups)[0])
            last = row
        problem = _differs(begun, run, record, first, last)
    except Damaged as error:
        problem = str(error)
    except Busy:
        raise
    except Exception as error:  # the hashes match, so it was written like this
        problem = f"run {run_id!r}, row {run.seq + 1}: {type(error).__name__}: {error}"
    if problem:  # nobody must take a hash from a record that is not believed
        record = record._replace(seq=run.seq, hash=last.hash)
    return begun._replace(run=run, record=record, snapshot_at=snapshot_at, unread=unread, problem=problem)


def projected(
    spec: Spec, origin: Origin | None, rules: Rules, run: Run, created_at: int, updated_at: int, head: bytes
) -> RunRecord:
    """The record that belongs to a fold."""
    step = run.through if run.observations else None
    policy = fold.ruling(rules, run).policy.tag
    return RunRecord(
        spec.run, spec.project, spec.name, run.status, policy, spec.labels, run.attempt, step, created_at, updated_at,
        run.seq, head, parent_of(origin),
    )  # fmt: skip


def parent_of(origin: Origin | None) -> str:
    """The run that a run is a fork of, as its record says; "" where it is none."""
    return origin.run if origin is not None and origin.kind == "fork" else ""


def _differs(begun: Loaded, run: Run, record: RunRecord, first: Row, last: Row) -> str:
    if run.seq < record.seq:
        return f"run {record.run!r}: row {run.seq + 1} is missing: the newest was row {record.seq}"
    return differs(record, projected(begun.spec, begun.origin, begun.rules, run, first.at, last.at, last.hash))


def differs(record: RunRecord, right: RunRecord) -> str:
    """What a run's record says otherwise than its rows; "" where they agree."""
    for name, found, wanted in zip(RunRecord._fields, record, right, strict=True):
        if found != wanted:
            if name == "hash":
                return f"run {right.run!r}, row {right.seq}: its hash is not the one in the run's record"
            return f"run {right.run!r}: its record has the {name} {found!r:.80}, where its rows have {wanted!r:.80}"
    return ""


def _more(journal: Journal, run_id: str, seq: int) -> bool:
    return next(journal.rows(run_id, after=seq, until=seq + 1), None) is not None


def _snapshot(
    journal: Journal, run_id: str, rules: Rules, newest: int, origin: Origin | None
) -> tuple[Row | None, Run]:
    """The newest snapshot up to row `newest` that can be used, and the row it stands on; None where there is none."""
    for seq in journal.snapshots(run_id):
        if seq > newest:
            continue
        found = _usable(journal, run_id, rules, seq)
        if found is not None:
            row = next(journal.rows(run_id, after=seq - 1, until=seq), None)
            if row is not None:
                return row, found
    return None, fold.create(rules, origin)


def _usable(journal: Journal, run_id: str, rules: Rules, seq: int) -> Run | None:
    """The state in a snapshot; None, with a line in the log, where it is none of this row."""
    try:
        snapshot = journal.snapshot(run_id, until=seq)
        if snapshot is None:  # thinned out meanwhile
            return None
        run = fold.load(rules, json.loads(snapshot.state))
        if (snapshot.seq, snapshot.attempt, snapshot.step) == (seq, run.attempt, run.through) and run.seq == seq:
            return run
        problem = "its state is of another row"
    except Busy:
        raise
    except Exception as error:  # a cache: whatever is wrong with it, the rows are there
        problem = f"{type(error).__name__}: {error}"
    _log.warning("run %r: the snapshot at row %d is passed over: %s", run_id, seq, problem)
    return None


def _deleted(journal: Journal, record: RunRecord, first: Row | None) -> Exception:
    """The error that says what became of a deleted run."""
    row = next(journal.rows(STORE, after=record.seq - 1, until=record.seq), None) if record.seq > 0 else None
    if first is not None or row is None or row.kind != deletion.KIND or record != deletion.left_by(row):
        return Damaged(f"run {record.run!r}: its record says that it was deleted, but the store's journal does not")
    return Deleted(
        f"run {record.run!r} was deleted at {records.utc(row.at)} by {row.actor}: {row.meta['reason']}; "
        "`flyball tombstones` lists what was"
    )


def fold_until(
    journal: Journal, spec: Spec, origin: Origin | None, rules: Rules, live: Run, attempt: int, step: int
) -> Run:
    """The run before it observed `step`, on the line of `attempt`; see `Engine.restored`. Raises Damaged."""
    run_id, attempts = spec.run, live.attempts
    # Before its first step an attempt shares the line of the one it came from.
    while attempts[attempt - 1][0] > step and attempts[attempt - 1][2] > 0:
        attempt = attempts[attempt - 1][2]
    opened = attempts[attempt - 1][1]
    at, run = _snapshot(journal, run_id, rules, live.seq, origin)
    while at is not None and not (run.seq < opened or (run.attempt == attempt and run.through < step)):
        at, run = _snapshot(journal, run_id, rules, run.seq - 1, origin)
    head = at.hash if at is not None else _first_hash(journal, run_id)
    for row in checked(run_id, journal.rows(run_id, after=run.seq), run.seq, head):
        if row.seq > opened and run.through >= step - 1:
            # What others reported before the step was observed belongs to it.
            if row.kind in ("observed", "attached"):
                break
            if row.kind != "reported":
                continue
        elif row.seq > opened and row.kind == "attached":
            break
        event, _ = records.from_row(row, spec.groups)
        if isinstance(event, Observed) and row.seq > opened and event.steps[-1] >= step:
            earlier = _before(event, step)
            return run if earlier is None else fold.apply(rules, run, earlier)[0]
        run, _ = fold.apply(rules, run, event)
    return run


def decided_before(
    journal: Journal, spec: Spec, origin: Origin | None, rules: Rules, live: Run
) -> list[tuple[int, Settings]]:
    """What holds from the decision on that belongs to the newest attempt's first step, up to its beginning: the
    settings by the step that decided them. Raises Damaged."""
    from_step, opened, parent = live.attempts[-1]
    first = max(from_step - 1 - (live.lag or 0), 0)
    at = fold_until(journal, spec, origin, rules, live, parent, first)
    out = [(first - 1, at.settings)]
    until = cutoffs(live, parent)
    # The newest row of that fold may hold steps from `first` on.
    for row in journal.rows(spec.run, after=at.seq - 1, until=opened):
        if row.kind == "observed" and row.attempt in until:
            changes = records.from_row(row, spec.groups)[1].changes
            end = min(until[row.attempt], from_step - 1)
            out += [change for change in changes if first <= change[0] < end]
    return out


def _first_hash(journal: Journal, run_id: str) -> bytes:
    first = next(journal.rows(run_id, until=1), None)
    if first is None:
        raise Damaged(f"run {run_id!r}: row 1 is missing")
    check_row(run_id, GENESIS, first, 1)
    return first.hash


def _before(event: Observed, step: int) -> Observed | None:
    """The part of a batch that lies before `step`; None where there is none."""
    cut = next((i for i, s in enumerate(event.steps) if s >= step), len(event.steps))
    if cut == 0:
        return None
    return Observed(event.attempt, event.steps[:cut], {n: c[:cut] for n, c in event.signals.items()})


def recent_batches(journal: Journal, spec: Spec, run: Run) -> list[Batch]:
    """The settings decided in the newest rows of the newest attempt. Raises Damaged."""
    run_id = spec.run
    after = max(0, run.seq - limits.RESENT_ROWS_MAX)
    out: list[Batch] = []
    rows = journal.rows(run_id, after=max(0, after - 1))
    head = GENESIS
    if after > 0:
        before = next(rows, None)
        if before is None or before.seq != after:
            raise Damaged(f"run {run_id!r}: row {after} is missing")
        head = before.hash
    for row in checked(run_id, rows, after, head):
        if row.kind == "observed" and row.attempt == run.attempt:
            event, outcome = records.from_row(row, spec.groups)
            assert isinstance(event, Observed)
            out.append((event.steps[0], event.steps[-1], outcome.changes))
    return out


def within(batches: Iterable[Batch], first: int, last: int) -> list[tuple[int, Settings]]:
    """The settings decided at the steps first..last; [] where the batches begin too late for it."""
    out: list[tuple[int, Settings]] = []
    for start, end, changes in batches:
        if end >= first and start <= last:
            out.extend(changes)
    # An older batch's last change may cover `first`; a later change than `last` is not asked for.
    return [change for change in out if change[0] <= last] if out and out[0][0] <= first else []
