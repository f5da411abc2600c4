"""What was refused, for the record: a line in the log and a row of the store's journal, with a count.

Rule of this module: however much is refused, a peer and a reason come to the record once in REFUSED_EVERY_S; the first
time at once, then with how often it happened since. No secret gets here.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from flyball_server import limits
from flyball_server.ledger import Ledger

KIND = "refused"
_log = logging.getLogger("flyball_server")


class Refusals:
    """All of it belongs to one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._since: dict[tuple[str, str], int] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._writing: set[asyncio.Task[Any]] = set()

    def note(self, peer: str, why: str) -> None:
        """Somebody was refused. Returns at once; the record follows."""
        key = (peer, why)
        if key not in self._since and len(self._since) >= limits.REFUSED_PEERS_MAX:
            key = ("others", "many reasons")
        if key in self._since:
            self._since[key] += 1
        else:
            self._record(key, 1)

    async def close(self) -> None:
        """Write what was counted and not written yet."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        left, self._since = self._since, {}
        for key, count in left.items():
            if count:
                self._write(key, count)
        await asyncio.gather(*self._writing)

    def _record(self, key: tuple[str, str], count: int) -> None:
        self._since[key] = 0
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(limits.REFUSED_EVERY_S, self._due, key)
        self._write(key, count)

    def _due(self, key: tuple[str, str]) -> None:
        count = self._since.pop(key)
        del self._timers[key]
        if count:
            self._record(key, count)

    def _write(self, key: tuple[str, str], count: int) -> None:
        peer, why = key
        _log.warning("refused %s (%d×): %s", peer, count, why)
        task = asyncio.create_task(self._append(peer, why, count))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _append(self, peer: str, why: str, count: int) -> None:
        try:
            await self._ledger.append(KIND, {"why": why, "count": count}, peer)
        except Exception as error:  # a full or damaged store must not turn a refusal into anything else
            _log.warning("what was refused does not stand in the store's journal: %s", error)
