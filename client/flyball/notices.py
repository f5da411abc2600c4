"""What people did to the run, for the job's own log.

Rule of this module: a line is given out once, however often the service repeats it, and is one line.
"""

from __future__ import annotations

from collections import deque

from flyball import limits


class Notices:
    """Not locked: the session does that."""

    def __init__(self) -> None:
        self._new: deque[str] = deque(maxlen=limits.NOTICES_MAX)
        self._seen: dict[str, None] = {}

    def take(self, lines: tuple[str, ...]) -> None:
        """The service tells, perhaps what it told before."""
        for words in lines:
            line = " ".join(str(words).split())[: limits.NOTE_CHARS]
            if line not in self._seen:
                self._seen[line] = None
                self._new.append(line)
                if len(self._seen) > limits.NOTICES_MAX:
                    del self._seen[next(iter(self._seen))]

    def new(self) -> list[str]:
        """What was not given out yet."""
        lines = list(self._new)
        self._new.clear()
        return lines
