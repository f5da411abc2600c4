"""Which runs are known to be damaged, and when each is to be examined again.

Rule of this module: a run stands here until it was examined whole and found well. It is remembered by its name and the
words of what was found, so it costs no memory worth a limit of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from flyball_server import limits
from flyball_server.core.errors import Damaged

_log = logging.getLogger("flyball_server")
_REMEDY = "nothing is written to it until the store is restored from a backup, or the run is deleted"


class _Known(NamedTuple):
    words: str
    recheck_at: float


class Damage:
    """Damaged runs by name. Times are those of the event loop."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def words(self, run_id: str) -> str:
        """What is wrong with the run; "" where nothing is known."""
        known = self._known.get(run_id)
        return "" if known is None else known.words

    def all(self) -> Mapping[str, str]:
        """The words of every run."""
        return {run_id: known.words for run_id, known in self._known.items()}

    def check(self, run_id: str) -> None:
        """Raise Damaged where the run is."""
        if self._known and (words := self.words(run_id)):
            raise Damaged(f"{words}; {_REMEDY}")

    def is_due(self, run_id: str, now: float) -> bool:
        """Whether it is known, and time to look again."""
        known = self._known.get(run_id)
        return known is not None and now >= known.recheck_at

    def note(self, run_id: str, words: str, now: float, took_s: float) -> None:
        """Remember it. took_s: how long finding out took; looking again must not become a load of its own."""
        if self.words(run_id) != words:
            _log.error("%s; %s", words, _REMEDY)
        wait_s = max(limits.DAMAGE_RECHECK_S, limits.DAMAGE_RECHECK_SHARE * took_s)
        self._known[run_id] = _Known(words, now + wait_s)

    def forget(self, run_id: str) -> None:
        """It is well, or not there any more."""
        if self._known.pop(run_id, None) is not None:
            _log.info("run %r is not damaged any more", run_id)
