"""Forks: the run that a run comes from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("runs", sa.Column("parent", sa.Text, nullable=False, server_default=""))
    op.create_index("runs_by_parent", "runs", ["parent", "created_at", "run"], sqlite_where=sa.text("parent <> ''"))
