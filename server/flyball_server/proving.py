"""Rows proved by their hashes, and reading that ends where a record is damaged.

Rule of this module: a row is what was written if its hash follows from the row before it; nothing else counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flyball_server.core.errors import Damaged
from flyball_server.storage.journal import GENESIS, Block, Journal, Row, chained


def checked(run_id: str, rows: Iterable[Row], seq: int, previous: bytes) -> Iterator[Row]:
    """The rows, which must follow row `seq` with the hash `previous`. Raises Damaged where one does not."""
    for row in rows:
        seq += 1
        check_row(run_id, previous, row, seq)
        previous = row.hash
        yield row


def check_row(run_id: str, previous: bytes, row: Row, seq: int) -> None:
    """Raise Damaged where this is not row `seq` behind the hash `previous`."""
    if row.seq != seq:
        raise Damaged(f"run {run_id!r}: row {seq} is missing")
    try:
        matches = chained(previous, run_id, row) == row.hash
    except (TypeError, ValueError):  # a value that no row can have
        matches = False
    if not matches:
        raise Damaged(f"run {run_id!r}, row {seq} is damaged: its hash is not that of its contents")


def unread_problem(journal: Journal, run_id: str, unread: tuple[int, bytes]) -> str:
    """What is wrong with the rows before a snapshot; "" where nothing is."""
    try:
        for _ in proof(journal, run_id, unread):
            pass
    except Damaged as error:
        return str(error)
    return ""


def whole_problem(journal: Journal, run_id: str) -> str:
    """What is wrong with any of a run's rows; "" where nothing is."""
    try:
        for _ in checked(run_id, journal.rows(run_id), 0, GENESIS):
            pass
    except Damaged as error:
        return str(error)
    return ""


def proof(journal: Journal, run_id: str, unread: tuple[int, bytes]) -> Iterator[None]:
    """Check the rows before a snapshot, one with each turn. Raises Damaged."""
    until, head = unread
    seq, previous = 0, GENESIS
    for row in checked(run_id, journal.rows(run_id, until=until), 0, GENESIS) if until else ():
        seq, previous = row.seq, row.hash
        yield
    if seq < until:
        raise Damaged(f"run {run_id!r}: row {seq + 1} is missing")
    if previous != head and until:
        raise Damaged(f"run {run_id!r}, row {until} is damaged: its hash changed")


class Undamaged:
    """A journal for one query: what it reads ends where it is damaged, and `problem` then says so."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.problem = ""

    def rows(
        self, run: str, *, after: int = 0, until: int | None = None, kinds: frozenset[str] | None = None
    ) -> Iterator[Row]:
        try:
            yield from self._journal.rows(run, after=after, until=until, kinds=kinds)
        except Damaged as error:
            self.problem = str(error)

    def blocks(self, run: str, columns: Iterable[str]) -> Iterator[Block]:
        try:
            yield from self._journal.blocks(run, columns)
        except Damaged as error:
            self.problem = str(error)
        except (ValueError, LookupError, TypeError, OverflowError) as error:  # blocks are not proved as rows are
            self.problem = f"run {run!r} is damaged: {error}"
