"""Real stores with a few runs in them, made once and copied, and what of them is whose.

Goal: tests of damage state only what is damaged. Method: the service itself writes the runs; SQL looks at the file.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

from tests.callers import ANYBODY, caller

from flyball_server import limits
from flyball_server.core.types import Group
from flyball_server.engine import Engine
from flyball_server.messages import Attach, Report
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage import open_journal
from flyball_server.storage.journal import Journal

GROUPS = (Group("a", 0.1, 0.9), Group("b", 0.01))
POLICY = {"type": "plateau", "patience": 0, "factor": 0.9, "threshold": 0.0}
#: Steps in a report, and reports of a run.
BATCH, BATCHES = 5, 16
RUNS = ("left", "hit", "right")
AT = 1_700_000_000_000_000


def attach_message(run: str, session: str = "s1", **fields: Any) -> Attach:
    """A job that asks to be steered."""
    blank = Attach(
        "default", run, session, {"team": run}, GROUPS, POLICY, None, {}, "absolute", 0, None, False, None, None, 0,
        "", "test",
    )  # fmt: skip
    return blank._replace(**fields)


def report_message(run: str, batch: int, *, end: str = "", session: str = "s1", attempt: int = 1) -> Report:
    """Its report number `batch`."""
    steps = list(range(batch * BATCH, (batch + 1) * BATCH))
    return Report(run, session, attempt, steps, {"loss": [float(s * 7 % 11) for s in steps]}, (), (), end)


class Opened:
    """`async with` it: an engine and a service over one journal, and a clock that the test moves."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.late_us = 0
        ticks = count(AT, 1000)
        self.engine = Engine(journal, rules_of, lambda: next(ticks) + self.late_us)
        self.service = Service(self.engine, journal)

    async def __aenter__(self) -> Opened:
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()


async def fill(opened: Opened, run: str, batches: int = BATCHES, end: str = "") -> None:
    """A run with so many reports."""
    await opened.service.attach(attach_message(run), ANYBODY)
    for batch in range(batches):
        await opened.service.report(report_message(run, batch, end=end if batch == batches - 1 else ""), ANYBODY)


def make_store(path: Path, monkeypatch: Any, every: int = 30) -> Path:
    """A file with RUNS, each with snapshots, one segment and single rows behind it, and one deleted run."""
    monkeypatch.setattr(limits, "SNAPSHOT_EVERY", every)

    async def write() -> None:
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            for run in (*RUNS, "gone"):
                await fill(opened, run, BATCHES // 2 if run != "gone" else 2, "finished" if run == "gone" else "")
            for run in RUNS:
                await asyncio.to_thread(opened.journal.compact, run)
            for batch in range(BATCHES // 2, BATCHES):
                for run in RUNS:
                    await opened.service.report(report_message(run, batch), ANYBODY)
            await opened.service.delete_run("gone", "a test", caller("tester"))

    asyncio.run(write())
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def copied(path: Path, folder: Path, name: str = "copy.db") -> Path:
    """A copy of a closed store."""
    return Path(shutil.copy(path, folder / name))


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the file by run, as SQL says it."""
    out: dict[str, list[tuple[Any, ...]]] = {}
    with closing(sqlite3.connect(path)) as db:
        db.text_factory = lambda b: b.decode("utf-8", "backslashreplace")
        for table in ("journal", "snapshots", "runs", "labels"):
            for row in db.execute(f"SELECT * FROM {table} NOT INDEXED"):
                out.setdefault(row[0], []).append((table, *row))
        if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("integrity")
    return out
