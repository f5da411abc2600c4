"""What is to be sent to others, and what became of it.

Rule of this module: what an append wants told stands here in the same transaction, and stays until it was delivered or
given up; so a process may end at any moment and nothing is forgotten. A delivery's id says what it is about: the same
one is never added twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from flyball_server.storage import tables

#: What is kept of deliveries that are over, the newest.
OVER_KEPT = 10_000
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
STATUSES = (PENDING, DELIVERED, FAILED)


class Delivery(NamedTuple):
    """One event for one hook. at, next_at, done_at: microseconds since 1970 UTC (0: not yet). number: its place in the
    order of the store, 0 before it has one. body: the JSON that is sent, dropped when the delivery is over."""

    id: str
    hook: str
    event: str
    run: str
    project: str
    seq: int
    at: int
    body: str
    number: int = 0
    status: str = PENDING
    attempts: int = 0
    next_at: int = 0
    error: str = ""
    done_at: int = 0


class Outbox(Protocol):
    """The deliveries of a store. All but the reads wait until they are durable."""

    def add(self, deliveries: Sequence[Delivery]) -> None:
        """Take them, but for those whose ids are known. Raises Busy."""

    def settle(self, delivery: Delivery) -> None:
        """Write down what became of a delivery: status, attempts, next_at, error, done_at. Raises Busy."""

    def pending(self, hook: str, limit: int) -> list[Delivery]:
        """Those of a hook that are not over, in order."""

    def waiting(self) -> dict[str, int]:
        """How many of each hook are not over."""

    def newest(self, hook: str | None, status: str | None, *, before: int | None, limit: int) -> list[Delivery]:
        """All that match, newest first, with numbers below `before`."""


_TABLE = tables.deliveries
_COLUMNS = [_TABLE.c[name] for name in Delivery._fields]


def table_row(delivery: Delivery) -> dict[str, Any]:
    """A new delivery as the table keeps it; the database numbers it."""
    fields = delivery._asdict()
    del fields["number"]
    return fields


def adding(dialect: str) -> Any:
    """The statement that adds deliveries."""
    insert = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(_TABLE)
    return insert.on_conflict_do_nothing(index_elements=["id"])


def settled(connection: sa.Connection, delivery: Delivery) -> None:
    """Write down what became of a delivery, in the caller's transaction; forget the oldest that are over."""
    over = delivery.status != PENDING
    changed = {name: getattr(delivery, name) for name in ("status", "attempts", "next_at", "error", "done_at")}
    update = sa.update(_TABLE).where(_TABLE.c.id == delivery.id)
    connection.execute(update.values(**changed, **({"body": ""} if over else {})))
    if over:
        oldest = sa.select(_TABLE.c.number).where(_TABLE.c.status != PENDING).order_by(_TABLE.c.number.desc())
        last = connection.execute(oldest.offset(OVER_KEPT).limit(1)).scalar()
        if last is not None:
            connection.execute(sa.delete(_TABLE).where(_TABLE.c.status != PENDING, _TABLE.c.number <= last))


class SqlOutbox:
    """See `Outbox`. reading: a connection to read with; writing: does a work in a transaction of the writer's."""

    def __init__(
        self,
        reading: Callable[[], AbstractContextManager[sa.Connection]],
        writing: Callable[[Callable[[sa.Connection], object]], None],
    ) -> None:
        self._reading = reading
        self._writing = writing

    def add(self, deliveries: Sequence[Delivery]) -> None:
        rows = [table_row(one) for one in deliveries]
        if rows:
            self._writing(lambda connection: connection.execute(adding(connection.dialect.name), rows))

    def settle(self, delivery: Delivery) -> None:
        self._writing(lambda connection: settled(connection, delivery))

    def pending(self, hook: str, limit: int) -> list[Delivery]:
        query = sa.select(*_COLUMNS).where(_TABLE.c.hook == hook, _TABLE.c.status == PENDING)
        return self._read(query.order_by(_TABLE.c.number).limit(limit))

    def waiting(self) -> dict[str, int]:
        query = sa.select(_TABLE.c.hook, sa.func.count()).where(_TABLE.c.status == PENDING).group_by(_TABLE.c.hook)
        with self._reading() as connection:
            return {str(hook): int(count) for hook, count in connection.execute(query)}

    def newest(self, hook: str | None, status: str | None, *, before: int | None, limit: int) -> list[Delivery]:
        query = sa.select(*_COLUMNS)
        if hook is not None:
            query = query.where(_TABLE.c.hook == hook)
        if status is not None:
            query = query.where(_TABLE.c.status == status)
        if before is not None:
            query = query.where(_TABLE.c.number < before)
        return self._read(query.order_by(_TABLE.c.number.desc()).limit(limit))

    def _read(self, query: sa.Select[Any]) -> list[Delivery]:
        with self._reading() as connection:
            return [Delivery._make(found) for found in connection.execute(query)]


class MemoryOutbox:
    """See `Outbox`; nothing outlives the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: dict[str, Delivery] = {}
        self._numbered = 0

    def add(self, deliveries: Iterable[Delivery]) -> None:
        with self._lock:
            for one in deliveries:
                if one.id not in self._all:
                    self._numbered += 1
                    self._all[one.id] = one._replace(number=self._numbered)

    def settle(self, delivery: Delivery) -> None:
        with self._lock:
            known = self._all.get(delivery.id)
            if known is None:
                return
            over = delivery.status != PENDING
            self._all[delivery.id] = delivery._replace(number=known.number, body="" if over else known.body)
            done = [one for one in self._all.values() if one.status != PENDING] if over else []
            for one in done[: max(len(done) - OVER_KEPT, 0)]:
                del self._all[one.id]

    def pending(self, hook: str, limit: int) -> list[Delivery]:
        with self._lock:
            return [one for one in self._all.values() if one.hook == hook and one.status == PENDING][:limit]

    def waiting(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._lock:
            for one in self._all.values():
                if one.status == PENDING:
                    found[one.hook] = found.get(one.hook, 0) + 1
        return found

    def newest(self, hook: str | None, status: str | None, *, before: int | None, limit: int) -> list[Delivery]:
        with self._lock:
            found = [
                one
                for one in self._all.values()
                if hook in (None, one.hook) and status in (None, one.status) and (before is None or one.number < before)
            ]
        return found[::-1][:limit]
