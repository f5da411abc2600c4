"""What the service asks of all ranks, and their answers as one.

Rule of this module: a directive is done where it is done on every rank that is still there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from flyball import limits
from flyball.directives import Directives
from flyball.link import Link
from flyball.session import Session
from flyball.sharing.slots import DONE, Slot
from flyball.wire import Directive


class Asked:
    """Directives as one rank's governor sees them. real: rank 0's session's."""

    def __init__(self, real: Directives | None) -> None:
        self.pending: deque[Directive] = deque(maxlen=limits.DIRECTIVES_PENDING_MAX)
        self._real = real

    def handle(self, kind: str) -> None:
        """See `Directives.handle`."""
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
            for directive, outcome, note, step in slot.more.get("answers", ()):
                self._told.setdefault(directive, {})[rank] = (outcome, note, step)
        there = {rank for rank, slot in enumerate(slots) if slot.head.tag != DONE}
        for directive in [d for d, told in self._told.items() if there <= told.keys()]:
            told = self._told.pop(directive)
            rank, (outcome, note, _) = next(
                ((rank, one) for rank, one in sorted(told.items()) if one[0] != "done"), min(told.items())
            )
            where = f"rank {rank}: " if outcome != "done" else ""
            session.answer(directive, outcome, where + note, told[min(told)][2])
            link.wake()
