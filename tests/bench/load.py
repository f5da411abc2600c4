"""The load generator: many attached runs on one event loop, each sending its next report after the answer.

Rule of this module: the same messages and the same code drive the service and the echo; messages are built
beforehand as far as can be, because generator and server share the machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import grpc
import numpy as np
import uvloop
from tests.bench.processes import Server

from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc

T = TypeVar("T")

SIGNALS = ("loss", "grad_norm", "update_norm", "reward")
WINDOWED = '{"type": "windowed"}'
#: Different reports of a run before their values come again. (Storage asks for more: repetition compresses.)
VARIETY = 16
#: A connection of its own for each run, as for users.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


class Seen(NamedTuple):
    """What a round brought: how many reports, in how many seconds, and each one's round trip in seconds."""

    reports: int
    seconds: float
    trips: list[float]

    @property
    def rate(self) -> float:
        """Reports a second."""
        return self.reports / self.seconds


def values(count: int, seed: int) -> np.ndarray:
    """Four float32 signals of a run that learns, one line each."""
    noise = np.random.default_rng(seed).normal(size=(len(SIGNALS), count))
    falling = 3 * np.exp(-np.arange(count) / 2000) + 0.2
    scale = np.stack([falling, np.ones(count), np.full(count, 1e-3), np.full(count, 0.1)])
    return (scale * np.exp(0.2 * noise)).astype(np.float32)


class Stream:
    """One attached run. per_report: observations in a report; signals: how many of SIGNALS it has."""

    def __init__(
        self,
        server: Server,
        run: str,
        seed: int,
        *,
        per_report: int,
        signals: int,
        lag: int | None,
        variety: int,
        policy: str = WINDOWED,
    ) -> None:
        self.run = run
        self._per_report = per_report
        self._step = 0
        self._channel = grpc.aio.insecure_channel(server.target, options=_OPTIONS)
        self._call: Any = pb_grpc.SteeringStub(self._channel).Steer()
        self._attach = pb.Attach(
            run=run, session=run, groups=[pb.Group(name="default", lr=0.1)], policy_json=policy, lag=lag
        )
        self._reports = list(_reports(run, seed, per_report, signals, variety))

    async def attach(self) -> None:
        """Open the conversation."""
        await self._ask(pb.ClientMessage(attach=self._attach))

    async def report(self) -> None:
        """Send the next report and wait for its answer."""
        message = self._reports[self._step // self._per_report % len(self._reports)]
        if self._per_report == 1:
            message.report.step[0] = self._step
        else:
            message.report.step[:] = range(self._step, self._step + self._per_report)
        self._step += self._per_report
        await self._ask(message)

    async def close(self) -> None:
        """Let go of the connection; the run stays as it is."""
        self._call.cancel()
        await self._channel.close()

    async def _ask(self, message: pb.ClientMessage) -> None:
        await self._call.write(message)
        if await self._call.read() is grpc.aio.EOF:
            raise RuntimeError(f"run {self.run}: {await self._call.code()}: {await self._call.details()}")


def _reports(run: str, seed: int, per_report: int, signals: int, variety: int) -> Iterator[pb.ClientMessage]:
    columns = values(per_report * variety, seed)
    for i in range(variety):
        part = columns[:signals, i * per_report : (i + 1) * per_report].tolist()
        yield pb.ClientMessage(
            report=pb.Report(
                run=run,
                session=run,
                attempt=1,
                step=[0] * per_report,
                signals=[pb.Column(name=n, value=v) for n, v in zip(SIGNALS, part, strict=False)],
            )
        )


@asynccontextmanager
async def streams(
    server: Server,
    prefix: str,
    count: int,
    *,
    per_report: int = 1,
    signals: int = 1,
    lag: int | None = 0,
    variety: int = VARIETY,
    policy: str = WINDOWED,
) -> AsyncIterator[list[Stream]]:
    """That many attached runs."""
    opened = [
        Stream(
            server,
            f"{prefix}-{i}",
            i,
            per_report=per_report,
            signals=signals,
            lag=lag,
            variety=variety,
            policy=policy,
        )
        for i in range(count)
    ]
    try:
        for start in range(0, count, 50):
            await asyncio.gather(*(stream.attach() for stream in opened[start : start + 50]))
        yield opened
    finally:
        await asyncio.gather(*(stream.close() for stream in opened))


async def closed_loop(runs: Sequence[Stream], seconds: float) -> Seen:
    """All runs at once, each sending its next report when the last one was answered, for so long."""
    trips: list[float] = []
    started = time.perf_counter()
    until = started + seconds

    async def one(run: Stream) -> None:
        now = time.perf_counter()
        while now < until:
            before = now
            await run.report()
            now = time.perf_counter()
            trips.append(now - before)

    await asyncio.gather(*(one(run) for run in runs))
    return Seen(len(trips), time.perf_counter() - started, trips)


async def send(runs: Sequence[Stream], reports: int) -> None:
    """All runs at once, that many reports each."""

    async def one(run: Stream) -> None:
        for _ in range(reports):
            await run.report()

    await asyncio.gather(*(one(run) for run in runs))


def drive(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run the load on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())
