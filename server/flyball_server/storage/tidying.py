"""What becomes of a run's table rows: merged into segments, joined, thinned out, or taken away.

Rule of this module: each function is part of the caller's transaction, and merges nothing that is not what was
written: a damaged row stays where it is and as it is, to be named and restored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import sqlalchemy as sa

from flyball_server.core.errors import Conflict, Damaged
from flyball_server.storage import tables
from flyball_server.storage.blocks import Stored, check_types, pack_segment, prove, store, unpack
from flyball_server.storage.journal import GENESIS, STORE, Deletion

#: The rows, their observations, and the bytes of their payloads, in one segment. The last row may go beyond.
SEGMENT_ROWS_MAX = 4096
SEGMENT_OBSERVATIONS_MAX = 16384
SEGMENT_BYTES_MAX = 8 << 20
#: The newest snapshots of a run, and the new ones after which the older ones are thinned out.
SNAPSHOTS_KEPT = 8

_COLUMNS = [tables.journal.c[name] for name in Stored._fields]


def singles(connection: sa.Connection, run: str, segment_end: int) -> list[Stored]:
    """The oldest single rows, at most one segment of them."""
    table = tables.journal.c
    query = sa.select(*_COLUMNS).where(table.run == run, table.seq > segment_end)
    rows: list[Stored] = []
    size = seen = 0
    with connection.execute(query.order_by(table.seq).limit(SEGMENT_ROWS_MAX)) as found:
        for row in found:
            rows.append(check_types(run, Stored._make(row)))
            size += len(rows[-1].payload)
            seen += observations(rows[-1].first_step, rows[-1].last_step)
            if len(rows) > 1 and (size >= SEGMENT_BYTES_MAX or seen >= SEGMENT_OBSERVATIONS_MAX):
                break
    return rows


def merge(connection: sa.Connection, save_row: tables.Prepared, run: str, rows: list[Stored], found: int) -> Stored:
    """Consecutive single rows become one segment. Those up to row `found` were there when this process began, and
    are proved first. Raises Damaged."""
    table = tables.journal.c
    before = sa.select(table.last_seq, table.hash).where(table.run == run, table.seq < rows[0].seq)
    last_seq, previous = connection.execute(before.order_by(table.seq.desc()).limit(1)).one_or_none() or (0, GENESIS)
    for seq, row in enumerate(rows, last_seq + 1):
        if row.seq != seq:
            raise Damaged(f"run {run!r}: row {seq} is missing")
    prove(run, previous, (row for row in rows if row.seq <= found))
    segment = pack_segment(previous, rows)
    _replace(connection, save_row, run, segment)
    return segment


def join(connection: sa.Connection, save_row: tables.Prepared, run: str) -> bool:
    """Make one of the first segments and rows that fit into one; False where there are none."""
    table = tables.journal.c
    sizes = sa.select(
        table.seq, table.last_seq, table.first_step, table.last_step, sa.func.length(table.payload)
    ).where(table.run == run)
    group: list[int] = []
    count = seen = size = end = 0
    for seq, last_seq, first_step, last_step, payload in connection.execute(sizes.order_by(table.seq)).all():
        rows, steps = last_seq - seq + 1, observations(first_step, last_step)
        count, seen, size = count + rows, seen + steps, size + payload
        if count > SEGMENT_ROWS_MAX or seen > SEGMENT_OBSERVATIONS_MAX or size > SEGMENT_BYTES_MAX // 4:
            if len(group) > 1:
                break
            group, count, seen, size = [], rows, steps, payload
        group.append(seq)
        end = last_seq
    if len(group) < 2:
        return False
    between = sa.select(*_COLUMNS).where(table.run == run, table.seq.between(group[0], end)).order_by(table.seq)
    found = [check_types(run, Stored._make(row)) for row in connection.execute(between)]
    rows_of = [store(row) for one in found for row in unpack(run, one)]
    before = sa.select(table.hash).where(table.run == run, table.seq < group[0]).order_by(table.seq.desc()).limit(1)
    previous = connection.execute(before).scalar() or GENESIS
    prove(run, previous, rows_of)
    _replace(connection, save_row, run, pack_segment(previous, rows_of))
    return True


def _replace(connection: sa.Connection, save_row: tables.Prepared, run: str, segment: Stored) -> None:
    table = tables.journal
    merged = table.c.seq.between(segment.seq, segment.last_seq)
    connection.execute(sa.delete(table).where(table.c.run == run, merged))
    save_row.execute(connection, [{"run": run, **segment._asdict()}])


def thin_snapshots(connection: sa.Connection, run: str) -> None:
    """Drop the snapshots that are too many."""
    table = tables.snapshots
    found = sa.select(table.c.seq).where(table.c.run == run).order_by(table.c.seq.desc())
    drop = superfluous(connection.execute(found).scalars())
    if drop:
        gone = sa.delete(table).where(table.c.run == run, table.c.seq == sa.bindparam("gone"))
        connection.execute(gone, [{"gone": seq} for seq in drop])


def superfluous(newest_first: Iterable[int]) -> list[int]:
    """The snapshots to drop: of those behind the newest SNAPSHOTS_KEPT, all but the oldest per doubling."""
    seqs = list(newest_first)
    oldest = {(seqs[0] - seq).bit_length(): seq for seq in seqs}
    return [seq for seq in seqs[SNAPSHOTS_KEPT:] if oldest[(seqs[0] - seq).bit_length()] != seq]


def lock_store(connection: sa.Connection, seq: int) -> None:
    """Take the database's write lock, and raise Conflict where the newest row of STORE is not row `seq`.

    Of STORE nothing is remembered between two writes: other processes may add to it beside the one that owns the file.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    table = tables.journal.c
    newest = connection.execute(sa.select(sa.func.max(table.last_seq)).where(table.run == STORE)).scalar() or 0
    if newest != seq:
        raise Conflict(f"{STORE!r} is at {newest}, not at {seq}")


def remove(connection: sa.Connection, save_row: tables.Prepared, deletion: Deletion) -> None:
    """Take a run away and write its tombstone."""
    run = deletion.record.run
    for table in (tables.journal, tables.snapshots, tables.labels, tables.heard, tables.audit):
        connection.execute(sa.delete(table).where(table.c.run == run))
    save_run = tables.insert_or_update(tables.runs, connection.dialect.name)
    connection.execute(save_run, [{**deletion.record._asdict(), "labels": json.dumps(dict(deletion.record.labels))}])
    save_row.execute(connection, [{"run": STORE, **store(deletion.row)._asdict()}])


def observations(first_step: int | None, last_step: int | None) -> int:
    """About how many observations a table row holds."""
    return 1 if first_step is None or last_step is None else max(last_step - first_step + 1, 1)
