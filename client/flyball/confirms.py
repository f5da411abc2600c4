"""Which optimizer step confirms a command.

Rule of this module: a receipt confirms a command only where its step was under it for certain.

An answer's `confirm` says that a command up to that journal row awaits a receipt. The first optimizer step that is
under it makes one, even where nothing changed, and it is sent at once.

Without a lag the newest settings hold at once: it is the very next step. With lag=k a decision belongs to one step, and
those told before stay as they are. One was made under the command for certain where its observation came to the journal
behind it: those of the steps that the answer acknowledges, but for steps the service was known to have before. An
answer to attach, or to a report without steps, acknowledges none, so only decisions still to come count. A number is
never asked for twice within an attempt; one that goes back begins anew with what its Attached asks.
"""

from __future__ import annotations

from collections import deque
from math import inf

from flyball import limits


class Confirms:
    """What awaits confirming. given: the newest number that a receipt has confirmed; 0: none in this attempt."""

    def __init__(self, lag: int | None) -> None:
        self.given = 0
        self._lag = lag
        self._asked = 0
        #: The number, and the step whose decision is the first under it.
        self._waiting: deque[tuple[int, float]] = deque(maxlen=limits.CONFIRMS_MAX)
        self._through = -1

    def begin(self) -> None:
        """An attempt begins."""
        self.given = self._asked = 0
        self._waiting.clear()

    def ask(self, number: int, through: int, acknowledged: bool) -> None:
        """An answer says so; the service has every step up to `through`. acknowledged: it has some from this answer's
        report."""
        first = (self._through if acknowledged else through) + 1
        self._through = through
        if number > self._asked:
            self._asked = number
            self._waiting.append((number, -inf if self._lag is None else first))

    @property
    def waiting(self) -> bool:
        """Whether any step to come is to confirm something."""
        return bool(self._waiting)

    def due(self, basis: float) -> int:
        """The newest number to confirm with a step whose settings come from the decision of step `basis`, once; 0:
        none."""
        number = 0
        while self._waiting and self._waiting[0][1] <= basis:
            number = self._waiting.popleft()[0]
        return number
