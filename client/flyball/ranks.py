"""Whether a run is shared by several ranks of one training job, and what they exchange bytes through.

Rule of this module: the standard library only. What speaks to torch.distributed is adapters/ranks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from flyball import limits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one job that share a run.

    group: a process group whose ranks they are; None: all there are. We make a gloo group of our own of the same ranks,
    so that nothing of ours comes between collectives of the job. every: how many optimizer steps lie between two
    exchanges where no step waits (lag=None). timeout_s: how long an exchange may wait for a rank; None: as long as
    torch's gloo groups do (30 minutes).
    """

    group: Any = None
    every: int = 8
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or not 1 <= self.every <= limits.EVERY_MAX:
            raise ValueError(f"ranks: every is {self.every!r:.80}: give 1 to {limits.EVERY_MAX} optimizer steps")
        timeout = self.timeout_s
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0):
            raise ValueError(f"ranks: timeout_s is {timeout!r:.80}: give seconds, or None")


class Broken(Exception):
    """The ranks cannot exchange anything any more: one is gone, or was waited for too long."""


class Exchange(Protocol):
    """Every rank gives bytes, and gets those of all. One exchange at a time; all ranks make the same ones in order."""

    rank: int
    ranks: int
    every: int
    #: Nanoseconds spent waiting, so far.
    waited_ns: int

    def start(self, mine: bytes) -> None:
        """Give, without waiting. Raises Broken."""

    def finish(self, within_s: float | None = None) -> Sequence[bytes]:
        """Wait until all ranks have given to the exchange started last; theirs, by rank. Raises Broken, also where that
        takes longer than `within_s` (None: than the group's timeout)."""

    def timed(self, do: Callable[[], T]) -> T:
        """What `do` returns; the time it takes is counted as waited."""

    def pause(self, seconds: float) -> None:
        """Let time pass."""

    def close(self) -> None:
        """Let go of the group."""


def across(ranks: Any) -> Exchange | None:
    """What the option `ranks` means here: the exchange between them (every rank makes it at once), or None where this
    process is alone. Raises ValueError where it means nothing."""
    if ranks is None:
        return None
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if isinstance(ranks, str):
            return None
        raise ValueError("ranks is given, but there is no process group: call torch.distributed.init_process_group")
    from flyball.adapters.ranks import exchange

    return exchange(ranks if isinstance(ranks, Ranks) else Ranks(None if isinstance(ranks, str) else ranks))
