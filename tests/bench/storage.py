"""Bytes on disk of an observation of four float32-born signals, after compaction.

Method: the real service stores runs and is stopped; the file is then compacted to the newest row (the service does
that by itself in larger portions) and measured in used pages. Pages that compaction freed are reused by later rows
and are named in the note.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.bench.load import SIGNALS, WINDOWED, drive, send, streams
from tests.bench.processes import Server, service, stop
from tests.bench.table import Row

from flyball_server.storage import open_journal

BYTES_MAX = 17


def measure(quick: bool) -> list[Row]:
    """Reports of 64 observations, and lockstep's reports of one; and a policy that moves at every observation."""
    return [
        _stored("64-observation reports", runs=4, reports=256 if quick else 1024, per_report=64),
        _stored("lockstep reports", runs=16, reports=2048 if quick else 8192, per_report=1),
        _stored("`adaptive` on noise", runs=2, reports=256, per_report=64, policy='{"type": "adaptive"}', budget=None),
    ]


def _stored(
    what: str,
    *,
    runs: int,
    reports: int,
    per_report: int,
    policy: str = WINDOWED,
    budget: float | None = BYTES_MAX,
) -> Row:
    async def load(server: Server) -> None:
        lag = None if per_report > 1 else 0
        size = {"per_report": per_report, "signals": len(SIGNALS), "variety": reports, "policy": policy}
        async with streams(server, "s", runs, lag=lag, **size) as opened:
            await send(opened, reports)

    with service() as server:
        drive(lambda: load(server))
        stop(server)
        as_left = server.store.stat().st_size
        _compact(server.store, [f"s-{i}" for i in range(runs)])
        used, free = _pages(server.store)
    observations = runs * reports * per_report
    note = (
        f"{observations:,} observations; {free / observations:.1f} bytes more are free pages for the next rows; "
        f"the file as the stopped server left it: {as_left / observations:.1f}"
    )
    raw = 4.0 * len(SIGNALS)
    return Row(
        f"storage of 4 signals, {what}",
        used / observations,
        "bytes/obs",
        raw,
        "float32",
        used / observations / raw,
        budget,
        note=note,
    )


def _compact(store: Path, runs: list[str]) -> None:
    journal = open_journal(f"sqlite:///{store}")
    journal.start(lambda _: None)
    for run in runs:
        journal.compact(run)
    journal.close()


def _pages(store: Path) -> tuple[int, int]:
    """Bytes of used and of free pages."""
    with closing(sqlite3.connect(store)) as db:
        size, total, free = (
            db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_size", "page_count", "freelist_count")
        )
    return size * (total - free), size * free
