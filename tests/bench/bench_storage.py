"""What the SQL journal costs: appending, compacting, and reading a long run back.

Goal: the durable budgets (rows and observations a second, bytes an observation, a 1 M-observation run as numpy).
Method: one SQLite file in a temporary directory; `python tests/bench/bench_storage.py` prints a line per measurement.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from flyball_server.storage.journal import GENESIS, Append, Column, Row, RunRecord, chained
from flyball_server.storage.sql import SqlJournal

SIGNALS = ("loss", "grad_norm", "update_norm", "reward")
AT = 1_700_000_000_000_000


def signals(count: int, seed: int) -> np.ndarray:
    """Four float32 signals of a run that learns, one line each."""
    noise = np.random.default_rng(seed).normal(size=(4, count))
    falling = 3 * np.exp(-np.arange(count) / 2000) + 0.2
    scale = np.stack([falling, np.ones(count), np.full(count, 1e-3), np.full(count, 0.1)])
    return (scale * np.exp(0.2 * noise)).astype(np.float32)


def appends(run: str, count: int, per_row: int, seed: int) -> list[Append]:
    """The appends of `count` rows of `per_row` observations each, a row an append."""
    values = signals(count * per_row, seed)
    jitter = np.random.default_rng(seed + 1).normal(0, 100, count)
    out, previous, at = [], GENESIS, AT
    for i in range(count):
        first, last = i * per_row, (i + 1) * per_row
        at += int(1000 * per_row + jitter[i])
        columns = tuple(Column(n, "f", v[first:last].tobytes()) for n, v in zip(SIGNALS, values, strict=True))
        row = Row(i + 1, "observed", 1, first, last - 1, "driver", at, {}, columns, b"")
        row = row._replace(hash=chained(previous, run, row))
        previous = row.hash
        record = RunRecord(run, "p", run, "active", "plateau@1", {"team": "a"}, 1, last - 1, AT, at, i + 1, row.hash)
        out.append(Append(i, (row,), record, None, None))
    return out


def pour(path: Path, runs: Sequence[list[Append]], window: int) -> dict[str, float]:
    """Append all, run by run in turn, with at most `window` waiting; the seconds it took, by thread."""
    slots, failures, writer_s = threading.Semaphore(window), [], [0.0]

    def deliver(results: Sequence[tuple[Append, Exception | None]]) -> None:
        failures.extend(error for _, error in results if error)
        writer_s[0] = time.thread_time()
        slots.release(len(results))

    journal = SqlJournal(f"sqlite:///{path}")
    journal.start(deliver)
    start, caller_s = time.perf_counter(), 0.0
    for turn in zip(*runs, strict=True):
        for append in turn:
            slots.acquire()
            before = time.perf_counter()
            journal.append(append)
            caller_s += time.perf_counter() - before
    for _ in range(window):
        slots.acquire()
    total = time.perf_counter() - start
    journal.close()
    assert not failures, failures[0]
    return {"total": total, "caller": caller_s, "writer": writer_s[0]}


def measure_appends(path: Path, runs: int, rows: int, per_row: int, window: int) -> None:
    taken = pour(path, [appends(f"run-{i}", rows, per_row, i) for i in range(runs)], window)
    count = runs * rows
    print(
        f"{runs} runs x {rows} rows x {per_row} obs, {window} waiting: {count / taken['total']:,.0f} rows/s, "
        f"{count * per_row / taken['total']:,.0f} obs/s; a row costs {taken['caller'] / count * 1e6:.1f} us on the "
        f"caller's thread, {taken['writer'] / count * 1e6:.1f} us CPU on the writer's (compaction included)"
    )


def measure_reading(path: Path, rows: int, per_row: int) -> None:
    observations = rows * per_row
    pour(path, [appends("long", rows, per_row, 0)], 256)
    journal = SqlJournal(f"sqlite:///{path}")
    journal.start(lambda results: None)
    journal.compact("long")
    best, blocks = 1e9, 0
    for _ in range(5):
        start = time.perf_counter()
        found = list(journal.blocks("long", SIGNALS))
        best = min(best, time.perf_counter() - start)
        blocks = len(found)
        assert sum(len(block.arrays["loss"]) for block in found) == observations
    journal.close()
    with closing(sqlite3.connect(path)) as db:
        page, total, free = (
            db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_size", "page_count", "freelist_count")
        )
    print(
        f"{observations:,} obs in rows of {per_row}: {page * (total - free) / observations:.2f} bytes/obs used in the "
        f"file, {page * free / observations:.2f} free for the next rows, "
        f"read as numpy in {best * 1e3:.1f} ms ({blocks} blocks)"
    )


if __name__ == "__main__":
    print(f"Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        measure_appends(Path(folder, "a.db"), 64, 256, 64, 64)
        measure_appends(Path(folder, "b.db"), 64, 256, 1, 64)
        measure_appends(Path(folder, "c.db"), 1, 512, 1, 1)
        measure_reading(Path(folder, "d.db"), 15_625, 64)
        measure_reading(Path(folder, "e.db"), 65_536, 1)
