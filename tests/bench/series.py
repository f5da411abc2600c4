"""The chart of a run of a million steps: the REST call for 2 000 points, and the query behind it in process."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from tests.bench.load import drive, send, streams
from tests.bench.processes import Server, service, stop
from tests.bench.table import Row

from flyball_server import queries
from flyball_server.engine import Engine
from flyball_server.live import LiveRun
from flyball_server.rules import rules_of
from flyball_server.storage import open_journal
from flyball_server.storage.journal import Journal

STEPS = 1_000_000
POINTS = 2000
#: The largest reports a client sends, after an outage say.
PER_REPORT = 1000
MS_MAX = 150


def measure(quick: bool) -> list[Row]:
    """Milliseconds of the call."""
    calls = 5 if quick else 15
    with service() as server:
        drive(lambda: _report(server))
        asked = _median_ms(lambda: _get(server, "loss"), calls)
        both = _median_ms(lambda: _get(server, "loss,decided_lr:default"), calls)
        stop(server)
        inside, reading = _in_process(server.store, calls)
    thinning = _median_ms(_thin_bare(), calls)
    return [
        Row(
            f"series of a {STEPS:,}-step run, {POINTS:,} points: REST",
            asked,
            "ms",
            reading,
            "ms to read",
            asked / reading,
            MS_MAX,
            note=f"in process {inside:.0f} ms, of which finding the extremes alone {thinning:.1f} ms; REST with "
            f"decided_lr beside loss {both:.0f} ms; the floor reads the column's blocks and does nothing else",
        )
    ]


async def _report(server: Server) -> None:
    async with streams(server, "long", 1, per_report=PER_REPORT, signals=2, lag=None) as runs:
        await send(runs, STEPS // PER_REPORT)


def _get(server: Server, names: str) -> None:
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=60)
    connection.request("GET", f"/v1/runs/long-0/series?signals={names}&points={POINTS}")
    body = json.load(connection.getresponse())
    connection.close()
    found = body["series"]["loss"]
    assert 0.9 * POINTS <= len(found["step"]) <= POINTS, f"{len(found['step'])} points"
    assert found["step"][-1] > 0.99 * STEPS, found["step"][-1]


def _in_process(store: Path, calls: int) -> tuple[float, float]:
    """Milliseconds of `queries.series`, and of reading the blocks it reads."""
    journal = open_journal(f"sqlite:///{store}")
    live = asyncio.run(_load(journal))
    request = queries.SeriesRequest(["loss"], POINTS)
    times = (
        _median_ms(lambda: queries.series(journal, live.spec, live.run, request), calls),
        _median_ms(lambda: list(journal.blocks(live.spec.run, {"loss"})), calls),
    )
    journal.close()
    return times


async def _load(journal: Journal) -> LiveRun:
    engine = Engine(journal, rules_of, lambda: time.time_ns() // 1000)
    await engine.start()
    return await engine.find("long-0")


def _thin_bare() -> Callable[[], object]:
    values = np.random.default_rng(1).normal(size=STEPS)
    steps = np.arange(STEPS)
    return lambda: queries.thin(steps, values, POINTS)


def _median_ms(call: Callable[[], object], calls: int) -> float:
    """The median of so many calls, after one that warms up."""
    call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times) * 1000
