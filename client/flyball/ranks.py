"""Whether a run is shared by several ranks of one training job, and what they exchange bytes through.

Rule of this module: the standard library only. What speaks to torch.distributed is adapters/ranks.py.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

from flyball import limits

log = logging.getLogger("flyball")

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of one job that share a run.

    group: a process group whose ranks they are; None: all there are. We make a gloo group of our own of the same ranks,
    so that nothing of ours comes between collectives of the job. every: how many optimizer steps lie between two
    exchanges where no step waits (lag=None). timeout_s: how long attach, an optimizer step or close may wait for
    another rank; None: 5 minutes, and close as long as torch's gloo groups do (30 minutes).
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
    #: How long an optimizer step may wait for another rank, in seconds.
    patience_s: float
    #: Nanoseconds spent waiting, so far.
    waited_ns: int

    def start(self, mine: bytes) -> None:
        """Give, without waiting. Raises Broken."""

    def finish(self, within_s: float | None = None, waiting_for: str = "") -> Sequence[bytes]:
        """Wait until all ranks have given to the exchange started last; theirs, by rank. Raises Broken, also where that
        takes longer than `within_s` (None: than the group's timeout). waiting_for: for the log, where it takes long."""

    def timed(self, do: Callable[[], T]) -> T:
        """What `do` returns; the time it takes is counted as waited."""

    def pause(self, seconds: float) -> None:
        """Let time pass."""

    def tell_failed(self) -> None:
        """This rank failed, and takes part in nothing any more. Does not wait."""

    def failed(self) -> bool:
        """Whether a rank has told so. Does not wait."""

    def close(self) -> None:
        """Let go of the group. Where an exchange is under way that other ranks may never end, it is left as it is, so
        that the process can exit."""


def across(ranks: Any) -> Exchange | None:
    """What the option `ranks` means here: the exchange between them (every rank makes it at once), or None where this
    process is alone. Raises ValueError where it means nothing."""
    if ranks is None:
        return None
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if isinstance(ranks, str):
            world = os.environ.get("WORLD_SIZE", "")
            if distributed is not None and world.isdecimal() and int(world) > 1:
                log.warning(
                    "flyball: this is one of %s processes, and each is a run of its own: call "
                    "torch.distributed.init_process_group before attach, or give ranks=None", world,
                )  # fmt: skip
            return None
        raise ValueError("ranks is given, but there is no process group: call torch.distributed.init_process_group")
    from flyball.adapters.ranks import exchange

    shared = _of(ranks)
    _met[0] += 1
    return exchange(shared)


def _of(ranks: Any) -> Ranks:
    return ranks if isinstance(ranks, Ranks) else Ranks(None if isinstance(ranks, str) else ranks)


#: How often this process asked the other ranks to come together.
_met = [0]


@contextmanager
def refusing(options: Mapping[str, Any]) -> Iterator[None]:
    """What is raised inside before the ranks have come together is raised on all: none waits in vain for this one."""
    met = _met[0]
    try:
        yield
    except Exception as error:
        ranks, distributed = options.get("ranks", "auto"), sys.modules.get("torch.distributed")
        there = distributed is not None and distributed.is_available() and distributed.is_initialized()
        if there and ranks is not None and met == _met[0]:
            from flyball.adapters.ranks import refuse

            _met[0] += 1
            refuse(_of(ranks), error)
        raise


def together(attach: Callable[P, T]) -> Callable[P, T]:
    """An adapter's `attach`, refused on all ranks where it is refused on one."""

    @functools.wraps(attach)
    def attached(*args: P.args, **options: P.kwargs) -> T:
        with refusing(options):
            return attach(*args, **options)

    return attached
