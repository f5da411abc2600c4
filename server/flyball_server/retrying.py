"""A use case tried again where another replica was faster.

Rule of this module: what is tried again has changed nothing yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from flyball_server import limits
from flyball_server.core.errors import Busy
from flyball_server.ledger import Lost

T = TypeVar("T")


async def retried(once: Callable[[], Awaitable[T]]) -> T:
    """Run a use case again where another replica was faster. Raises Busy where that never ends."""
    for _ in range(limits.APPEND_TRIES):
        try:
            return await once()
        except Lost:
            continue
    raise Busy("the run is written by several processes at once; try again", 1.0)
