"""The schema's history, run by `SqlJournal.start`; released versions are never edited.

Rule of this package: a database of any released version becomes the newest one, in one transaction or not at all.
"""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from flyball_server.core.errors import Invalid

_FOLDER = str(Path(__file__).parent)


def is_current(connection: sa.Connection) -> bool:
    """Whether the database has the newest version."""
    newest = ScriptDirectory(_FOLDER).get_current_head()
    return MigrationContext.configure(connection).get_current_revision() == newest


def migrate(connection: sa.Connection, name: str) -> None:
    """Bring the database to the newest version inside the connection's open transaction. `name`: for the message
    of Invalid, raised where the database is from a newer version of Flyball."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # at INFO it speaks on every start
    config = Config()
    config.set_main_option("script_location", _FOLDER.replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise Invalid(f"{name} was written by a newer version of Flyball: upgrade this one ({error})") from error
