"""One run in memory, as the engine keeps it.

Rule of this module: what is here is durable already; whoever changes it holds the run's turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from flyball_server.core import run as fold
from flyball_server.core.events import Origin, Spec
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Settings
from flyball_server.storage.journal import Heard, RunRecord


class LiveRun:
    """One run in memory: its newest durable state and the place its next row goes to."""

    def __init__(self, spec: Spec, origin: Origin | None, rules: Rules, run: Run, record: RunRecord) -> None:
        self.spec = spec
        self.origin = origin
        self.rules = rules
        self.run = run
        self.record = record
        self.lock = asyncio.Lock()
        self.waiting = 0
        self.stale = False
        #: When its job was last heard of, as far as this process knows, and when the journal was last told of it.
        self.heard = Heard()
        self.told = 0
        self._watchers: list[asyncio.Future[None]] = []
        self.snapshot_at = run.observations
        #: The newest batches' settings, for steps that a client sends again.
        self.recent: deque[tuple[int, int, Sequence[tuple[int, Settings]]]] = deque(maxlen=64)

    async def changed(self, within_s: float) -> None:
        """Return when something was committed here, or the time is over."""
        future = asyncio.get_running_loop().create_future()
        self._watchers.append(future)
        await asyncio.wait([future], timeout=within_s)
        if future in self._watchers:
            self._watchers.remove(future)

    def tell(self) -> None:
        """Wake whoever waits for a change."""
        watchers, self._watchers = self._watchers, []
        for future in watchers:
            if not future.done():
                future.set_result(None)

    @property
    def ruling(self) -> Rules:
        """The rules in force, which a command may have changed."""
        return fold.ruling(self.rules, self.run)
