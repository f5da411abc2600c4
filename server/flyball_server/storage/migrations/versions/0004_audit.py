"""Rows that people ask for, found without reading observations; what is to be sent to others.

Rule of this migration: a damaged run is left out. It says so itself when it is read, and `verify` and `compact` later.
"""

from contextlib import suppress

import sqlalchemy as sa
from alembic import op

from flyball_server.core.errors import Damaged
from flyball_server.storage.audit import make_again

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("first_step", sa.BigInteger),
        sa.Column("last_step", sa.BigInteger),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("meta", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run", "seq"),
    )
    op.create_index("audit_by_time", "audit", ["at", "run", "seq"])
    op.create_index("audit_of_project", "audit", ["project", "at", "run", "seq"])
    op.create_index("audit_by_kind", "audit", ["kind", "at", "run", "seq"])
    op.create_index("audit_by_actor", "audit", ["actor", "at", "run", "seq"])
    op.create_table(
        "deliveries",
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
    )
    op.create_index("deliveries_by_id", "deliveries", ["id"], unique=True)
    op.create_index("deliveries_of_hook", "deliveries", ["hook", "status", "number"])
    _note()


def _note() -> None:
    connection = op.get_bind()
    for run in connection.execute(sa.text("SELECT DISTINCT run FROM journal")).scalars().all():
        with suppress(Damaged), connection.begin_nested():
            make_again(connection, str(run))
