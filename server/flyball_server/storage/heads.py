"""What the writer remembers of a run: where its next row goes, and what of it is not in segments yet.

Rule of this module: a head is a cache of the database; whoever is in doubt forgets it and reads again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

import sqlalchemy as sa

from flyball_server.storage import tables
from flyball_server.storage.journal import DELETED, Append
from flyball_server.storage.tidying import SNAPSHOTS_KEPT, observations

#: A run is compacted when it has this many observations, or this many rows, outside segments.
COMPACT_OBSERVATIONS = 4096
COMPACT_ROWS = 1024


class Head:
    """What the writer knows of a run. A commit that fails makes it forget the heads it touched."""

    __slots__ = ("deleted", "found", "labels", "observations", "rows", "segment_end", "seq", "snapshots")

    def __init__(self, seq: int, segment_end: int, rows: int, observations: int, labels: Mapping[str, str] | None):
        self.seq = seq
        self.found = 0  # the newest row that this process did not write itself
        self.deleted = False
        self.segment_end = segment_end
        self.rows = rows
        self.observations = observations
        self.labels = labels
        self.snapshots = 0

    def advance(self, append: Append) -> int:
        """The head behind the append; how many observations it brought."""
        brought = sum(observations(row.first_step, row.last_step) for row in append.rows)
        self.seq += len(append.rows)
        self.rows += len(append.rows)
        self.observations += brought
        self.snapshots += append.snapshot is not None
        self.labels = append.record.labels
        return brought

    def backlog(self) -> float:
        """How much lies outside segments, in units of what makes a compaction worthwhile."""
        return max(
            self.rows / COMPACT_ROWS, self.observations / COMPACT_OBSERVATIONS, self.snapshots / SNAPSHOTS_KEPT / 2
        )


def load_head(connection: sa.Connection, run: str) -> Head:
    """What the database says of a run."""
    table = tables.journal.c
    newest_first = (
        sa.select(table.seq, table.last_seq, table.first_step, table.last_step)
        .where(table.run == run)
        .order_by(table.seq.desc())
    )
    record = sa.select(tables.runs.c.labels, tables.runs.c.status).where(tables.runs.c.run == run)
    labels, status = connection.execute(record).one_or_none() or (None, None)
    known = None
    with suppress(TypeError, ValueError):  # labels that make no sense are written anew, or go with the run
        known = None if labels is None else json.loads(labels)
    head = Head(0, 0, 0, 0, known)
    head.deleted = status == DELETED
    with connection.execute(newest_first) as found:
        for seq, last_seq, first_step, last_step in found:
            head.seq = head.seq or last_seq
            if last_seq > seq:
                head.segment_end = last_seq
                break
            head.rows += 1
            head.observations += observations(first_step, last_step)
    head.found = head.seq
    return head
