"""What Alembic runs: the migrations on the connection that `migrate` was given.

Rule of this module: it opens nothing and configures no logging.
"""

from alembic import context

from flyball_server.storage import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
