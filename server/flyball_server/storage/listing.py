"""The table of runs read back: records, and the filter of a listing as SQL.

Rule of this module: a record that makes no sense is still a record, of the status "damaged": one of them must not keep
the others from being listed.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from flyball_server.storage import tables
from flyball_server.storage.journal import DELETED, RunFilter, RunRecord

#: The last microsecond of the year 9999: a time beyond it is none.
AT_MAX = 253_402_300_799_999_999


def record_of(found: Any) -> RunRecord:
    """The record; where it makes no sense, one of the status "damaged" with what does."""
    record = RunRecord._make(found)
    text: Any = record.labels
    try:
        labels = json.loads(text)
    except (TypeError, ValueError):
        labels = None
    texts = (record.run, record.project, record.name, record.status, record.policy, record.parent)
    numbers = (record.attempt, record.step or 0, record.seq, record.created_at, record.updated_at)
    if (
        isinstance(labels, dict)
        and json.dumps(labels, sort_keys=True) == text
        and all(type(text) is str for text in (*texts, *labels.values()))
        and all(type(number) is int for number in numbers)
        and min(record.created_at, record.updated_at) >= 0
        and max(record.created_at, record.updated_at) <= AT_MAX
        and type(record.hash) is bytes
    ):
        return record._replace(labels=labels)
    run, project, name, _, policy, parent = map(str, texts)
    attempt, step, seq, *times = (number if type(number) is int else 0 for number in numbers)
    created_at, updated_at = (at if 0 <= at <= AT_MAX else 0 for at in times)
    hash_ = record.hash if type(record.hash) is bytes else b""
    return RunRecord(
        run, project, name, "damaged", policy, {}, attempt, step, created_at, updated_at, seq, hash_, parent
    )


def conditions(where: RunFilter) -> list[sa.ColumnElement[bool]]:
    """The filter as SQL."""
    runs = tables.runs.c
    found: list[sa.ColumnElement[bool]] = []
    if where.project is not None:
        found.append(runs.project == where.project)
    if where.projects is not None:
        found.append(runs.project.in_(sorted(where.projects)))
    if where.status is None:
        found.append(runs.status != DELETED)
    else:
        found.append(runs.status == ("active" if where.status in ("stale", "lost") else where.status))
    if where.status in ("stale", "lost"):
        newest = where.stale_before if where.status == "stale" else where.lost_before
        found.append(sa.false() if newest is None else _silent_since(newest))
    if where.status == "stale" and where.lost_before is not None:
        found.append(~_silent_since(where.lost_before))
    if where.status == "active" and where.stale_before is not None:
        found.append(~_silent_since(where.stale_before))
    if where.policy is not None:  # LIKE would ignore case
        versions = where.policy + "@"
        found.append((runs.policy == where.policy) | (sa.func.substr(runs.policy, 1, len(versions)) == versions))
    if where.parent is not None:
        found.append(runs.parent == where.parent)
    for key, value in (where.labels or {}).items():
        labels = tables.labels.c
        found.append(runs.run.in_(sa.select(labels.run).where(labels.key == key, labels.value == value)))
    return found


def _silent_since(before: int) -> sa.ColumnElement[bool]:
    """Whether a run has had neither a row nor a sign of life since."""
    runs, heard = tables.runs.c, tables.heard.c
    later = sa.select(heard.run).where(heard.run == runs.run, heard.at >= before)
    not_its_own = sa.select(heard.run).where(heard.run == runs.run, heard.beside == runs.updated_at)
    return ((runs.updated_at < before) | sa.exists(not_its_own)) & ~sa.exists(later)
