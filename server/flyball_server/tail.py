"""What the store's own journal says from now on, for those who act by it: tokens, freezes, canaries, fleet
commands.

Rule of this module: every row is given to whoever listens for its kind once, in the journal's order; so each process
comes to know the same, whichever wrote it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flyball_server import limits
from flyball_server.core.errors import SteeringError
from flyball_server.ledger import Ledger
from flyball_server.storage.journal import Row

_log = logging.getLogger(__name__)


class Tail:
    """The end of the journal as far as it was read."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._reading = asyncio.Lock()
        self._newest: Row | None = None
        self._listeners: dict[str, Callable[[Row], None]] = {}
        self._problem = ""

    @property
    def seq(self) -> int:
        """The newest row that was read; 0: none."""
        return 0 if self._newest is None else self._newest.seq

    def on(self, kind: str, learn: Callable[[Row], None]) -> None:
        """Give `learn` every row of this kind, the first one included."""
        self._listeners[kind] = learn

    async def refresh(self) -> None:
        """Read what was written since, here or by another process. Raises Busy, and Damaged where rows are."""
        async with self._reading:
            more = True
            while more:
                rows = await self._ledger.rows(self._newest)
                for row in rows:
                    learn = self._listeners.get(row.kind)
                    if learn is not None:
                        learn(row)
                    self._newest = row
                more = len(rows) >= limits.LEDGER_PAGE

    async def refresh_if_possible(self) -> None:
        """`refresh` for a training job, which a damaged journal of the store shall not keep from training: what was
        known before counts then."""
        try:
            await self.refresh()
            self._problem = ""
        except SteeringError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _log.error(
                    "the store's journal cannot be read, so tokens, freezes and canaries stay as they are: %s", error
                )

    async def watch(self) -> None:
        """Look again and again, for as long as the service runs."""
        while True:
            await self.refresh_if_possible()
            await asyncio.sleep(limits.TAIL_POLL_S)
