"""The same work for many runs, a few of them at a time.

Rule of this module: what one run refuses is that run's answer, and keeps no other from its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from flyball_server import limits
from flyball_server.core.errors import SteeringError

T = TypeVar("T")
_log = logging.getLogger(__name__)


async def each(
    runs: Iterable[str], work: Callable[[str], Awaitable[T]], parallel: int = limits.FLEET_PARALLEL
) -> dict[str, T | SteeringError]:
    """The work's result by run, in their order; the error where a run refuses, or its work failed."""
    room = asyncio.Semaphore(parallel)

    async def one(run: str) -> T | SteeringError:
        async with room:
            try:
                return await work(run)
            except SteeringError as error:
                return error
            except Exception:
                _log.exception("a command to many runs failed at run %s", run)
                return SteeringError("an unexpected error; the service's log has it")

    names = list(runs)
    return dict(zip(names, await asyncio.gather(*(one(run) for run in names)), strict=True))
