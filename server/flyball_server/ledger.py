"""The store's own journal: what concerns no single run, such as deletions, tokens and refusals.

Rule of this module: its rows are hash-chained like any run's, and every row is proved before anything is made of it.
Other processes may add rows beside this one (a token made on the command line), so nothing is added without looking
first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from flyball_server import limits
from flyball_server.core.errors import Busy
from flyball_server.proving import checked
from flyball_server.storage.journal import GENESIS, STORE, Journal, Note, Row, chained

T = TypeVar("T")
#: Gives the journal something to write for whom it names, and waits until it has. Raises Lost where another process was
#: faster.
HandIn = Callable[[str, Callable[[asyncio.Future[None]], None]], Awaitable[None]]
#: A row's meta, made of the row before it.
Made = Callable[[Row | None], Mapping[str, Any]]


class Lost(Exception):
    """Another process appended first: read again and retry. No caller of the service sees it."""


async def retried(once: Callable[[], Awaitable[T]]) -> T:
    """Run a use case again where another process was faster."""
    for _ in range(limits.APPEND_TRIES):
        try:
            return await once()
        except Lost:
            continue
    raise Busy("the run is written by several processes at once; try again", 1.0)


class Ledger:
    """Rows of STORE. All of it belongs to one event loop, but for `read`."""

    def __init__(self, journal: Journal, hand_in: HandIn, now_us: Callable[[], int]) -> None:
        self._journal = journal
        self._hand_in = hand_in
        self._now_us = now_us
        self._turn = asyncio.Lock()
        self._newest: Row | None = None

    async def append(self, kind: str, meta: Mapping[str, Any] | Made, actor: str) -> Row:
        """Add a row and return it once it is durable. meta: the row's, or what makes it of the row before.

        Raises Busy, and Damaged where the rows before it are.
        """

        async def write(last: Row | None) -> Row:
            row = behind(last, kind, meta(last) if callable(meta) else meta, actor, self._now_us())
            await self._hand_in(STORE, lambda token: self._journal.note(Note(row, token)))
            return row

        for _ in range(limits.LEDGER_TRIES):
            try:
                return await self.extend(write)
            except Lost:
                continue
        raise Busy("the store's journal is written by several processes at once; try again", 1.0)

    async def extend(self, write: Callable[[Row | None], Awaitable[Row]]) -> Row:
        """Have `write` make the row that follows the newest one (None: there is none yet), and return it.

        Raises what `write` raises, and Damaged where the rows before it are not what was written.
        """
        async with self._turn:
            self._newest = await asyncio.to_thread(_end, self._journal, self._newest)
            self._newest = await write(self._newest)
            return self._newest

    async def rows(self, after: Row | None, limit: int = limits.LEDGER_PAGE) -> list[Row]:
        """The next rows behind `after` (None: from the first), proved, at most `limit`. Raises Damaged."""
        return await asyncio.to_thread(lambda: list(islice(read(self._journal, after), limit)))


def read(journal: Journal, after: Row | None) -> Iterator[Row]:
    """The rows of STORE behind `after` (None: all), proved. Raises Damaged."""
    seq, head = (0, GENESIS) if after is None else (after.seq, after.hash)
    return checked(STORE, journal.rows(STORE, after=seq), seq, head)


def _end(journal: Journal, after: Row | None) -> Row | None:
    for row in read(journal, after):
        after = row
    return after


def behind(last: Row | None, kind: str, meta: Mapping[str, Any], actor: str, now: int) -> Row:
    """The row of STORE that follows `last`."""
    seq, previous = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    row = Row(seq, kind, 0, None, None, actor, now, meta, (), b"")
    return row._replace(hash=chained(previous, STORE, row))
