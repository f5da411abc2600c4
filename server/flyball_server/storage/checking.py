"""What is wrong with an SQLite file where no single run can tell.

Rule of this module: it reads, and says a line for each thing; what it can, by the run's name.
"""

from __future__ import annotations

import json
import re

import sqlalchemy as sa

from flyball_server.storage import tables
from flyball_server.storage.journal import DELETED

#: How many of SQLite's own findings are told.
FINDINGS_MAX = 20


def problems(connection: sa.Connection) -> list[str]:
    """SQLite's own findings, and labels that do not agree with the records. Raises where it cannot be read."""
    found = connection.exec_driver_sql(f"PRAGMA integrity_check({FINDINGS_MAX})").scalars().all()
    out = [f"integrity check: {one}{_owner(connection, str(one))}" for one in found if one != "ok"]
    return out + _labels(connection)


def _owner(connection: sa.Connection, finding: str) -> str:
    """The run that a finding about a row of the journal is about, in brackets."""
    matched = re.search(r"row (\d+) missing from index \S*?_(journal|runs|snapshots|labels)_", finding)
    if not matched:
        return ""
    row, table = matched.groups()
    query = f"SELECT run FROM {table} NOT INDEXED WHERE rowid = ?"
    owner = connection.exec_driver_sql(query, (int(row),)).scalar()
    return "" if owner is None else f" (run {owner!r})"


def _labels(connection: sa.Connection) -> list[str]:
    """Where the table of labels differs from the records: a filter would list the wrong runs."""
    listed: dict[str, dict[str, str]] = {}
    for run, key, value in connection.execute(sa.select(tables.labels)):
        listed.setdefault(str(run), {})[str(key)] = str(value)
    runs = tables.runs.c
    out = []
    for run, text in connection.execute(sa.select(runs.run, runs.labels).where(runs.status != DELETED)):
        try:
            recorded = json.loads(text)
        except (TypeError, ValueError):
            recorded = None  # the run's own check names it
        if recorded is not None and recorded != listed.pop(str(run), {}):
            out.append(f"run {run!r}: the table of labels differs from its record")
    known = set(map(str, connection.execute(sa.select(runs.run)).scalars()))
    return out + [f"run {run!r}: there are labels without a record" for run in listed if run not in known]
