"""Batched: 64 runs, 64 observations of 4 signals in a report, durable, compaction included.

The budget is about a server core: observations per CPU second of the server process, all its threads. The closed
loop's own rate shares the machine with the load generator and is given beside it.
"""

from __future__ import annotations

from statistics import median

from tests.bench.load import SIGNALS, closed_loop, drive, streams
from tests.bench.processes import Server, echo, service
from tests.bench.table import Row

RUNS = 64
PER_REPORT = 64


def measure(quick: bool) -> list[Row]:
    """Observations a second, and a server CPU second."""
    rounds, seconds = (3, 1.0) if quick else (7, 2.0)
    with service() as server, echo() as bare:
        seen = drive(lambda: _rounds((server, bare), rounds, seconds))
    rates, per_core = [[PER_REPORT * reports / spent for reports, spent, _ in side] for side in seen], []
    for side in seen:
        per_core.append([PER_REPORT * reports / cpu_s for reports, _, cpu_s in side])
    what = f"batched x{PER_REPORT}, {RUNS} runs, durable"
    return [
        Row(
            f"{what}: per server CPU second",
            median(per_core[0]),
            "obs/s",
            median(per_core[1]),
            "echo",
            median(a / b for a, b in zip(*per_core, strict=True)),
            200_000,
            at_least=True,
            note=f"{PER_REPORT * 1e6 / median(per_core[0]):.0f} us of server CPU a report of {len(SIGNALS)} signals",
        ),
        Row(
            f"{what}: closed loop",
            median(rates[0]),
            "obs/s",
            median(rates[1]),
            "echo",
            median(a / b for a, b in zip(*rates, strict=True)),
        ),
    ]


async def _rounds(servers: tuple[Server, Server], rounds: int, seconds: float) -> list[list[tuple[int, float, float]]]:
    """For both servers, for each round: reports, seconds, CPU seconds."""
    out: list[list[tuple[int, float, float]]] = [[], []]
    size = {"per_report": PER_REPORT, "signals": len(SIGNALS), "lag": None}
    async with streams(servers[0], "b", RUNS, **size) as ours, streams(servers[1], "b", RUNS, **size) as theirs:
        for runs in (ours, theirs):
            await closed_loop(runs, seconds / 2)
        for _ in range(rounds):
            for server, runs, found in zip(servers, (ours, theirs), out, strict=True):
                cpu_s = server.cpu_s()
                seen = await closed_loop(runs, seconds)
                found.append((seen.reports, seen.seconds, server.cpu_s() - cpu_s))
    return out
