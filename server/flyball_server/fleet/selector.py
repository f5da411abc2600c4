"""Which runs are meant: a selector such as `project=vision,label.team=a,policy=windowed,status=active,run=ablation-*`.

Rule of this module: all of its conditions must hold, and a word that means nothing is refused: a command to a thousand
runs is no place for guesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.core.base import nearest
from flyball_server.core.errors import Invalid
from flyball_server.staleness import aged
from flyball_server.storage.journal import Journal, RunFilter, RunRecord

#: What a condition may be about, beside `label.NAME`.
KEYS = ("project", "policy", "status", "run")
#: What a run may be that can be selected; without one: all that have not ended.
STATUSES = ("created", "active", "stale", "lost", "finished", "failed")
_OPEN = ("created", "active")
_CONDITION = re.compile(r'\s*([^=,\s]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^,"]*?))\s*(?:,|$)')


class Selector(NamedTuple):
    """A selector that was understood. where: what the store can filter by; globs: patterns, each of which must match a
    run's id, or its name within its project."""

    text: str
    where: RunFilter
    globs: tuple[str, ...]

    def matches(self, record: RunRecord) -> bool:
        """Whether it means this run, which passed `where`."""
        if self.where.status is None and record.status not in _OPEN:
            return False
        names = (record.run, record.name)
        return record.status != "damaged" and all(any(fnmatchcase(n, glob) for n in names) for glob in self.globs)


def parsed(text: str) -> Selector:
    """The selector that a text means. Raises Invalid with the condition that means nothing, and what would."""
    if len(text) > limits.SELECTOR_MAX:
        raise Invalid(f"selector has {len(text)} characters: give at most {limits.SELECTOR_MAX}")
    if not text.isprintable():
        raise Invalid(f"selector: {text!r:.60} holds a character that is none: give letters, digits and signs")
    if not text.strip():
        raise Invalid("selector is empty: give at least one condition, such as project=vision; run=* means every run")
    values: dict[str, str] = {}
    labels: dict[str, str] = {}
    globs: list[str] = []
    for key, value in _conditions(text):
        name = key.removeprefix("label.")
        if not value or (name != key and not name):
            raise Invalid(f"selector: {key}= lacks its {'value' if name else 'label'}: give {name or 'label.NAME'}=...")
        if key == "run":
            globs.append(value)
        elif key in values or (name != key and name in labels):
            raise Invalid(f"selector: {key} is given twice, and no run can be both: leave one out")
        elif name != key:
            labels[name] = value
        elif key in KEYS:
            values[key] = value
        else:
            known = [*KEYS, "label.NAME"]
            raise Invalid(f"selector: {key!r:.60} is nothing to select by{nearest(key, known)}")
    if len(labels) > limits.LABELS_MAX:
        raise Invalid(f"selector: {len(labels)} labels are too many; no run has more than {limits.LABELS_MAX}")
    status = values.get("status")
    if status is not None and status not in STATUSES:
        raise Invalid(f"selector: status is {status!r:.60}{nearest(status, list(STATUSES))}")
    return Selector(text, RunFilter(values.get("project"), status, values.get("policy"), labels or None), tuple(globs))


def _conditions(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        match = _CONDITION.match(text, at)
        if match is None:
            raise Invalid(f"selector: {text[at:].strip()!r:.60} is no condition: give NAME=VALUE, with commas between; "
                          'a value with a comma goes into "..."')  # fmt: skip
        key, quoted, bare = match.groups()
        found.append((key, bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)))
        at = match.end()
    return found


def selected(journal: Journal, selector: Selector, caller: Caller, now: int) -> list[RunRecord]:
    """The runs that a selector means at `now` among those the caller reaches, newest first.

    Raises Invalid where they are more than FLEET_MAX.
    """
    found: list[RunRecord] = []
    for record in every(journal, aged(selector.where, now)):
        if caller.reaches(record.project) and selector.matches(record):
            found.append(record)
            if len(found) > limits.FLEET_MAX:
                raise Invalid(
                    f"selector {selector.text!r:.100} means more than {limits.FLEET_MAX} runs: add a condition, such "
                    "as run=a*, and send several"
                )
    return found


def every(journal: Journal, where: RunFilter) -> Iterator[RunRecord]:
    """All records that match, newest first, read in pages."""
    after = None
    while True:
        page = journal.records(where, after=after, limit=limits.PAGE_MAX)
        yield from page
        if len(page) < limits.PAGE_MAX:
            return
        after = (page[-1].created_at, page[-1].run)
