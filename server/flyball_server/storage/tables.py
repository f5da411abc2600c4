"""The tables of the SQL journal, and the two statements whose spelling depends on the database.

Rule of this module: it says what is stored, `migrations/` how a database gets there; a test holds the two together.

journal    a run's rows, one table row each, or a segment of many (last_seq > seq; see `blocks`). The primary key
           is the lock of the distributed design: two writers of the same sequence number cannot both win.
snapshots  cached folds (zstd), free to be dropped
runs       the projection for listing, always of the newest row; `labels` as JSON text
labels     the same labels once more, one per table row, for filtering
heard      when a run's job was heard of, where its record does not tell (see `Heard`); no fold depends on it
audit      copies of the rows that people ask for, made again from the journal at any time (see `audit`)
deliveries what is to be sent to others, and what became of it (see `outbox`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

metadata = sa.MetaData()

journal = sa.Table(
    "journal",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("first_step", sa.BigInteger),
    sa.Column("last_step", sa.BigInteger),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger),
    sa.Column("state", sa.LargeBinary, nullable=False),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("parent", sa.Text, nullable=False, server_default=""),
    sa.Index("runs_by_age", "created_at", "run"),
    sa.Index("runs_of_project", "project", "created_at", "run"),
    sa.Index("runs_by_parent", "parent", "created_at", "run", sqlite_where=sa.text("parent <> ''")),
)

heard = sa.Table(
    "heard",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("beside", sa.BigInteger, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False),
    sa.Column("first_step", sa.BigInteger),
    sa.Column("last_step", sa.BigInteger),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("meta", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Index("audit_by_time", "at", "run", "seq"),
    sa.Index("audit_of_project", "project", "at", "run", "seq"),
    sa.Index("audit_by_kind", "kind", "at", "run", "seq"),
    sa.Index("audit_by_actor", "actor", "at", "run", "seq"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    # SQLite numbers rows by itself only where the column is an INTEGER.
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("hook", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("run", sa.Text, nullable=False),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("attempts", sa.BigInteger, nullable=False),
    sa.Column("next_at", sa.BigInteger, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("done_at", sa.BigInteger, nullable=False),
    sa.Index("deliveries_by_id", "id", unique=True),
    sa.Index("deliveries_of_hook", "hook", "status", "number"),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index("labels_by_value", "key", "value", "run"),
)

#: The tables whose rows belong to runs: what has none in any of these is no run.
OF_RUNS = (journal, snapshots, runs, heard, audit, labels)


def insert_or_update(table: sa.Table, dialect: str) -> sa.Insert:
    """Insert a table row, or overwrite the one with the same primary key."""
    insert = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table)
    keys = [column.name for column in table.primary_key]
    rest = {c.name: insert.excluded[c.name] for c in table.columns if c.name not in keys}
    return insert.on_conflict_do_update(index_elements=keys, set_=rest)


#: What of a run's record moves with every append.
MOVE_RUN = (
    sa.update(runs)
    .where(runs.c.run == sa.bindparam("run"))
    .values({name: sa.bindparam(name) for name in ("status", "policy", "attempt", "step", "updated_at", "seq", "hash")})
)


class Prepared:
    """A statement turned into the driver's own text once; executing it then costs a tuple a row.

    Values go to the driver as they are, so only plain ones (text, numbers, bytes, None) will do.
    """

    def __init__(self, statement: sa.Insert | sa.Update, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._order: Sequence[str] | None = getattr(compiled, "positiontup", None)

    def execute(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run it once per row."""
        order = self._order
        values: Any = rows if order is None else [tuple([row[name] for name in order]) for row in rows]
        connection.exec_driver_sql(self._text, values)
