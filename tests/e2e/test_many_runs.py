"""Goal: a service that was killed with a thousand runs in its store is back within five seconds, and knows them all.

Method: the store is filled through the engine; then the real command is started on it, killed in mid-flight, and timed.
"""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from tests.e2e.processes import Server
from tests.storage.stores import BATCH, Opened, fill, report_message

from flyball_server.storage import open_journal

pytestmark = pytest.mark.alone

RUNS = 1000
READY_S = 5.0
#: Only every so many-th run, and the one behind it, has steps and is asked about.
STRIDE = 25


def test_a_killed_service_with_a_thousand_runs_is_ready_in_five_seconds(server: Server) -> None:
    async def build() -> None:
        async with Opened(open_journal(server.store)) as opened:
            await asyncio.gather(*(fill(opened, f"r{i}", 1 if i % STRIDE < 2 else 0) for i in range(RUNS)))

    asyncio.run(build())
    server.start()
    report = report_message("", 1)
    body = {"session": "s1", "attempt": 1, "step": report.steps, "signals": report.signals}
    with httpx.Client(base_url=server.url("http"), timeout=20) as http:
        for i in range(0, RUNS, STRIDE):
            assert http.post(f"/v1/runs/r{i}/report", json=body).status_code == 200
    server.kill()
    started = time.monotonic()
    server.start()
    with httpx.Client(base_url=server.url("http"), timeout=20) as http:
        assert http.get("/readyz").json()["status"] == "ready"
        took_s = time.monotonic() - started
        assert took_s <= READY_S
        for i in range(0, RUNS, STRIDE):
            assert http.get(f"/v1/runs/r{i}").json()["observations"] == 2 * BATCH
            assert http.get(f"/v1/runs/r{i + 1}").json()["observations"] == BATCH
    print(f"ready after {took_s:.2f} s")
    assert server.stop() == 0
