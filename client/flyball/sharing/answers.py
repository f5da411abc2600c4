"""What the service asks of all ranks, and their answers as one.

Rule of this module: a directive is done where it is done on every rank that is still there, and begun on none where one
of them has no handler for it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from flyball import limits
from flyball.directives import Directives
from flyball.link import Link
from flyball.session import Session
from flyball.sharing.slots import DONE, Slot
from flyball.wire import Directive

log = logging.getLogger("flyball")


class Asked:
    """Directives as one rank's governor sees them. real: rank 0's session's."""

    def __init__(self, real: Directives | None) -> None:
        self.pending: deque[Directive] = deque(maxlen=limits.DIRECTIVES_PENDING_MAX)
        self._real = real
        self._handles: list[str] = []

    def to_tell(self) -> list[str]:
        """What this rank has got handlers for since the last exchange."""
        handles, self._handles = self._handles, []
        return handles

    def handle(self, kind: str) -> None:
        """See `Directives.handle`."""
        self._handles.append(kind)
        if self._real is not None:
            self._real.handle(kind)

    def take(self, asked: Iterable[Sequence[Any]]) -> None:
        """All ranks are asked."""
        self.pending.extend(Directive(*one) for one in asked)

    def next(self) -> Directive | None:
        """See `Directives.next`."""
        return self.pending.popleft() if self.pending else None


class Answers:
    """The answers of all ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._mine: list[list[Any]] = []
        #: By directive: what each rank answered.
        self._told: dict[str, dict[int, tuple[str, str, int]]] = {}
        #: By rank: what it has handlers for, as far as all ranks have told; and those that are through.
        self._handles: list[set[str]] = [set() for _ in range(ranks)]
        self._through: set[int] = set()
        self._waiting: list[Directive] = []

    def to_ask(self, session: Session, link: Link) -> list[list[Any]]:
        """Rank 0: what all ranks are asked for now. Handlers that scripts give at the same step are told in the same
        exchange, so what rank 0's is not told of yet waits."""
        while (directive := session.directive()) is not None:
            self._waiting.append(directive)
        asked, waiting, self._waiting = [], self._waiting, []
        for one in waiting:
            if one.kind not in self._handles[0]:
                self._waiting.append(one)
                continue
            there = (rank for rank in range(self._ranks) if rank not in self._through)
            without = [str(rank) for rank in there if one.kind not in self._handles[rank]]
            if not without:
                asked.append([one.id, one.kind, dict(one.args)])
                continue
            note = f"no handler for {one.kind} on rank {', '.join(without)}"
            session.answer(one.id, "declined", note[: limits.NOTE_CHARS], session.through + 1)
            log.warning("flyball: %s was declined: %s", one.kind, note)
            link.wake()
        return asked

    def own(self, directive: str, outcome: str, note: str, step: int) -> None:
        """This rank's answer."""
        self._mine.append([directive, outcome, note[: limits.NOTE_CHARS], step])

    def to_tell(self) -> list[list[Any]]:
        """This rank's answers since the last exchange."""
        mine, self._mine = self._mine, []
        return mine

    def collect(self, slots: Sequence[Slot], session: Session, link: Link) -> None:
        """Rank 0: answer the service what every rank has answered."""
        for rank, slot in enumerate(slots):
            self._handles[rank].update(slot.more.get("handles", ()))
            for directive, outcome, note, step in slot.more.get("answers", ()):
                self._told.setdefault(directive, {})[rank] = (outcome, note, step)
        self._through = {rank for rank, slot in enumerate(slots) if slot.head.tag == DONE}
        there = {rank for rank, slot in enumerate(slots) if slot.head.tag != DONE}
        for directive in [d for d, told in self._told.items() if there <= told.keys()]:
            told = self._told.pop(directive)
            rank, (outcome, note, _) = next(
                ((rank, one) for rank, one in sorted(told.items()) if one[0] != "done"), min(told.items())
            )
            where = f"rank {rank}: " if outcome != "done" else ""
            session.answer(directive, outcome, where + note, told[min(told)][2])
            link.wake()
