"""Ranks come together before they make a group: one that is refused tells the others, one that is missing is named.

Rule of this module: only torch.distributed's key-value store is used, so that no collective is left half made.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Sequence

import torch.distributed as dist

from flyball import limits
from flyball.errors import FlyballError

log = logging.getLogger("flyball")

#: How often these ranks came together: every call of `attach` counts, refused or not.
_count: dict[tuple[int, ...], int] = {}


def meet(members: Sequence[int], within_s: float) -> None:
    """Wait until every one of these ranks attaches. Raises FlyballError where one is refused, or does not come."""
    store, prefix, own = dist.distributed_c10d._get_default_store(), _next(members), dist.get_rank()
    store.set(f"{prefix}/{own}", "here")
    store.add(f"{prefix}/there", 1)
    began, next_log, pause = time.monotonic(), limits.WAIT_LOG_S, limits.SETTLE_S
    while store.add(f"{prefix}/there", 0) < len(members):
        waited = time.monotonic() - began
        if waited >= min(next_log, within_s):
            missing = ", ".join(str(rank) for rank in members if not store.check([f"{prefix}/{rank}"]))
            text = f"rank {own} has waited {waited:.0f} s for rank {missing} to attach: every rank must call attach"
            if waited >= within_s:
                # As if it had never come, so that the next time is the same one for all.
                _count[tuple(members)] -= 1
                store.delete_key(f"{prefix}/{own}")
                store.add(f"{prefix}/there", -1)
                raise FlyballError(f"{text}, or give ranks=None")
            log.warning("flyball: %s", text)
            next_log += limits.WAIT_LOG_AGAIN_S
        time.sleep(pause)
        pause = min(2 * pause, limits.MEETING_POLL_S)
    if store.check([f"{prefix}/refused"]):
        raise FlyballError(f"no rank is attached: {store.get(f'{prefix}/refused').decode()}")


def refuse(members: Sequence[int], error: Exception) -> None:
    """This rank is refused, and the others shall be."""
    store, prefix, own = dist.distributed_c10d._get_default_store(), _next(members), dist.get_rank()
    store.set(f"{prefix}/refused", f"rank {own}: {type(error).__name__}: {error}"[: limits.NOTE_CHARS])
    store.set(f"{prefix}/{own}", "here")
    store.add(f"{prefix}/there", 1)


def _next(members: Sequence[int]) -> str:
    number = _count[tuple(members)] = _count.get(tuple(members), 0) + 1
    return f"flyball/attach/{zlib.crc32(repr(list(members)).encode())}/{number}"
