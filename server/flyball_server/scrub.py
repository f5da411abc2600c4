"""The scrub: a slow second look at the rows that loading a run did not read, those before its snapshot.

Rule of this module: it takes its share of one core and no more, one run at a time, holds nothing of a run but its name
and a hash, and reports what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

from flyball_server import limits, proving
from flyball_server.core.errors import Damaged, SteeringError
from flyball_server.storage.journal import DELETED, Journal

_log = logging.getLogger("flyball_server")


class Scrub:
    """`found(run, words)` is told of damage. All of it belongs to one event loop."""

    def __init__(self, journal: Journal, found: Callable[[str, str], None]) -> None:
        self._journal = journal
        self._found = found
        self._waiting: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        self._done: OrderedDict[str, None] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def add(self, run_id: str, unread: tuple[int, bytes]) -> None:
        """Check the run's unread rows when its turn comes, once in this process."""
        if not unread[0] or run_id in self._done or self._stopping.is_set():
            return
        self._done[run_id] = None
        if len(self._done) > limits.SCRUBBED_MAX:
            self._done.popitem(last=False)
        self._waiting[run_id] = unread
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Finish the piece at hand, and no more."""
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        while self._waiting and not self._stopping.is_set():
            run_id, unread = self._waiting.popitem(last=False)
            try:
                await self._check(proving.proof(self._journal, run_id, unread))
            except Damaged as error:
                record = await asyncio.to_thread(self._journal.record, run_id)
                if record is None or record.status != DELETED:  # deleted while it was being read
                    self._found(run_id, str(error))
            except SteeringError as error:  # it cannot be read now: with its next load it comes again
                self._done.pop(run_id, None)
                _log.info("run %r was not checked: %s", run_id, error)
            except Exception:
                _log.exception("checking run %r failed", run_id)

    async def _check(self, rows: Iterator[None]) -> None:
        now = asyncio.get_running_loop().time
        more = True
        while more and not self._stopping.is_set():
            started = now()
            more = await asyncio.to_thread(_some, rows)
            with contextlib.suppress(TimeoutError):
                pause_s = (now() - started) * (1 / limits.SCRUB_SHARE - 1)
                await asyncio.wait_for(self._stopping.wait(), pause_s)


def _some(rows: Iterator[None]) -> bool:
    """Check the next rows; whether there may be more."""
    return sum(1 for _ in islice(rows, limits.SCRUB_ROWS)) == limits.SCRUB_ROWS
