"""Who tells others what happens, as the engine knows them.

Rule of this module: telling is never waited for, and what goes wrong with it is nobody else's trouble.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from flyball_server.core.events import Event, Outcome
from flyball_server.core.run import Run
from flyball_server.storage.journal import RunRecord
from flyball_server.storage.outbox import Delivery


class Herald(Protocol):
    """Who tells others what happens. Nothing here waits or raises."""

    def outgoing(
        self, record: RunRecord, before: Run, events: Sequence[Event], outcomes: Sequence[Outcome], at: int
    ) -> tuple[Delivery, ...]:
        """What is to be told of events that are about to be written; it is written with them."""

    def added(self, deliveries: Iterable[Delivery]) -> None:
        """These were written."""

    def damaged(self, run: str, words: str) -> None:
        """A run was found damaged."""
