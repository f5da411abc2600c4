"""Memory of the server for each connected run: an open stream, its folded state and its share of the journal.

Method: resident memory after and before that many runs attach, each on a connection of its own, and report a
window of observations; other runs attach before, so that what is paid once (page caches above all) is not counted.
"""

from __future__ import annotations

import asyncio
import resource

from tests.bench.load import SIGNALS, drive, send, streams
from tests.bench.processes import Server, echo, service
from tests.bench.table import Row

KIB_MAX = 48
WARM_UP = 200
PER_REPORT = 64


def measure(quick: bool) -> list[Row]:
    """KiB a run, of the service and of the echo."""
    count = 200 if quick else 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with service() as server, echo() as bare:
        ours = drive(lambda: _growth(server, count))
        theirs = drive(lambda: _growth(bare, count))
    return [
        Row(
            f"memory of a connected run ({count} runs)",
            ours / count,
            "KiB",
            theirs / count,
            "KiB echo",
            ours / theirs,
            KIB_MAX,
            note=f"each on its own connection, after 2 reports of {PER_REPORT} observations of {len(SIGNALS)} signals",
        )
    ]


async def _growth(server: Server, count: int) -> float:
    """KiB of resident memory that the runs added."""
    size = {"per_report": PER_REPORT, "signals": len(SIGNALS), "lag": None}
    async with streams(server, "warm", WARM_UP, **size) as first:
        await send(first, 10)
        await asyncio.sleep(0.5)
        before = server.rss_kib()
        async with streams(server, "run", count, **size) as runs:
            await send(runs, 2)
            await asyncio.sleep(0.5)
            return server.rss_kib() - before
