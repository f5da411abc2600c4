"""How long nobody has heard of a run's job: active, then stale, then lost; and active again when it comes back.

Rule of this module: these are words for how old the newest news is. They change nothing about a run.
"""

from __future__ import annotations

from flyball_server import limits
from flyball_server.storage.journal import Heard, RunFilter, RunRecord, newest_news


def aged(where: RunFilter, now: int) -> RunFilter:
    """The filter with what active, stale and lost mean at `now` (microseconds since 1970 UTC)."""
    stale, lost = (now - int(after_s * 1e6) for after_s in (limits.STALE_AFTER_S, limits.LOST_AFTER_S))
    return where._replace(stale_before=stale, lost_before=lost)


def status_of(record: RunRecord, heard: Heard, now: int) -> tuple[str, float]:
    """The run's status, and for how many seconds there was no news of its job. What others add to a run is none."""
    silent_s = max(0, now - newest_news(record, heard)) / 1e6
    if record.status != "active" or silent_s <= limits.STALE_AFTER_S:
        return record.status, silent_s
    return "stale" if silent_s <= limits.LOST_AFTER_S else "lost", silent_s
