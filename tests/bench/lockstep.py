"""Lockstep: one observation a report, the next one only after the answer; durable, with the bare echo beside it.

Method: rounds of service and echo in turn, over connections that stay open; medians of the rounds' ratios.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles

from tests.bench.load import Seen, closed_loop, drive, streams
from tests.bench.processes import Server, echo, service
from tests.bench.table import Row

MANY = 64


def measure(quick: bool) -> list[Row]:
    """One run and 64 runs."""
    rounds, seconds = (3, 0.7) if quick else (7, 1.5)
    rows = []
    for count in (1, MANY):
        with service() as server, echo() as bare:
            pairs, cpu_s = drive(lambda n=count: _rounds(server, bare, n, rounds, seconds))
        rows.append(_one(pairs, cpu_s, _commit_us()) if count == 1 else _many(pairs, cpu_s))
    return rows


async def _rounds(
    server: Server, bare: Server, count: int, rounds: int, seconds: float
) -> tuple[list[tuple[Seen, Seen]], tuple[float, float]]:
    """Pairs of rounds (service, echo), and the CPU seconds a report of each."""
    async with streams(server, "r", count) as ours, streams(bare, "r", count) as theirs:
        for warm in (ours, theirs):
            await closed_loop(warm, seconds / 2)
        pairs, spent = [], [0.0, 0.0]
        for _ in range(rounds):
            seen = []
            for i, (process, runs) in enumerate(((server, ours), (bare, theirs))):
                cpu_s = process.cpu_s()
                seen.append(await closed_loop(runs, seconds))
                spent[i] += process.cpu_s() - cpu_s
            pairs.append((seen[0], seen[1]))
    reports = [sum(pair[i].reports for pair in pairs) for i in (0, 1)]
    return pairs, (spent[0] / reports[0], spent[1] / reports[1])


def _one(pairs: list[tuple[Seen, Seen]], cpu_s: tuple[float, float], commit_us: float) -> Row:
    ours, bare = ([median(seen[i].trips) * 1e6 for seen in pairs] for i in (0, 1))
    p99 = [median(quantiles(seen[i].trips, n=100)[98] * 1e6 for seen in pairs) for i in (0, 1)]
    return Row(
        "lockstep round trip, 1 run, durable: p50",
        median(ours),
        "us",
        median(bare),
        "us echo",
        median(a / b for a, b in zip(ours, bare, strict=True)),
        2.5,
        "ratio",
        note=f"p99 {p99[0]:,.0f} us, echo {p99[1]:,.0f} us; {_cpu(cpu_s)}; what no durable answer "
        f"can do without, a bare SQLite commit of one row, takes {commit_us:.0f} us here",
    )


def _many(pairs: list[tuple[Seen, Seen]], cpu_s: tuple[float, float]) -> Row:
    return Row(
        f"lockstep, {MANY} runs, durable",
        median(a.rate for a, _ in pairs),
        "reports/s",
        median(b.rate for _, b in pairs),
        "/s echo",
        median(a.rate / b.rate for a, b in pairs),
        0.7,
        "ratio",
        at_least=True,
        note=_cpu(cpu_s),
    )


def _cpu(cpu_s: tuple[float, float]) -> str:
    return f"server CPU {cpu_s[0] * 1e6:.0f} us a report, echo {cpu_s[1] * 1e6:.0f} us"


def _commit_us() -> float:
    """The median of committing one row of 300 bytes to an SQLite file with the service's settings."""
    with (
        tempfile.TemporaryDirectory(prefix="flyball-bench-") as folder,
        closing(sqlite3.connect(Path(folder, "commit.db"), isolation_level=None)) as db,
    ):
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)")
        taken = []
        for number in range(1000):
            started = time.perf_counter()
            db.execute("INSERT INTO t VALUES (?, ?)", (number, bytes(300)))
            taken.append(time.perf_counter() - started)
    return median(taken) * 1e6
