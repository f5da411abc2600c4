"""Ranks attach together: one outcome for all of them.

Rule of this module: what is refused on one rank is refused on all, with the same error; nobody waits for a rank that
has given up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from flyball.connect import connect
from flyball.errors import FlyballError, Refused
from flyball.link import Link
from flyball.options import Options
from flyball.ranks import Broken, Exchange
from flyball.session import Session
from flyball.sharing.session import Shared
from flyball.wire import Group

#: Options that only rank 0's count of, or that may well differ.
_OWN = {"close_s", "fork", "labels", "ranks", "report_to", "resume", "server", "start_wait_s", "token"}


#: What rank 0 may be told, as the other ranks raise it.
_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


class _Named(NamedTuple):
    run: str
    project: str


def share(exchange: Exchange, groups: tuple[Group, ...], one: Options) -> tuple[Shared, SharedLink]:
    """A session that all ranks have part in, and its link. Every rank calls this at once.

    Raises what `connect` raises, on all ranks, and ValueError where ranks differ in their options or groups.
    """
    asked = {name: value for name, value in one.items() if name not in _OWN}
    try:
        told = _all(exchange, {"groups": [list(group) for group in groups], "options": asked})
        try:
            _check_alike(told)
        except ValueError:
            exchange.close()
            raise
        own: tuple[Session, Link] | None = None
        failure: Exception | None = None
        if exchange.rank == 0:
            try:
                own = connect(groups, one)
            except Exception as error:
                failure = error
        named = _Named(one["run"], one["project"])
        shared = Shared(exchange, named, groups, own, lag=one["lag"], wait_s=one["wait_s"])
        mine = {"word": shared.word(0)} if failure is None else {"failure": [type(failure).__name__, str(failure)]}
        outcome = _all(exchange, mine)[0]
    except Broken as error:
        raise FlyballError(f"the ranks could not attach together: {error}") from error
    if "failure" in outcome:
        exchange.close()
        kind, text = outcome["failure"]
        raise failure or (Refused("refused", text) if kind == "Refused" else _KINDS.get(kind, FlyballError)(text))
    shared.hear(outcome["word"])
    return shared, SharedLink(shared, exchange, None if own is None else own[1])


def _all(exchange: Exchange, mine: Any) -> list[Any]:
    """What every rank says."""
    exchange.start(json.dumps(mine, default=repr).encode())
    return [json.loads(told) for told in exchange.finish(None, "all ranks to attach")]


def _check_alike(told: list[Any]) -> None:
    first = told[0]
    for rank, other in enumerate(told):
        theirs, own = other["groups"], first["groups"]
        if [group[0] for group in theirs] != [group[0] for group in own]:
            raise ValueError(
                f"rank {rank} has the groups {', '.join(g[0] for g in theirs)}, and rank 0 has "
                f"{', '.join(g[0] for g in own)}: give the same names in the same order on every rank"
            )
        for mine, ours in zip(theirs, own, strict=True):
            if mine != ours:
                raise ValueError(
                    f"group {mine[0]} begins with {mine[1:]} on rank {rank} and with {ours[1:]} on rank 0 (learning "
                    "rate, momentum, betas): give every rank the same"
                )
        for name, value in other["options"].items():
            if value != first["options"].get(name):
                raise ValueError(
                    f"{name} is {value!r:.80} on rank {rank} and {first['options'].get(name)!r:.80} on rank 0: give "
                    "every rank the same"
                )


class SharedLink:
    """The link of one rank: rank 0's own, or nothing at all."""

    def __init__(self, shared: Shared, exchange: Exchange, own: Link | None) -> None:
        self._shared = shared
        self._exchange = exchange
        self._own = own
        self._pid = os.getpid()

    @property
    def on_notice(self) -> Callable[[str], None]:
        """See `Link.on_notice`; only rank 0 hears any."""
        return (lambda line: None) if self._own is None else self._own.on_notice

    @on_notice.setter
    def on_notice(self, call: Callable[[str], None]) -> None:
        if self._own is not None:
            self._own.on_notice = call

    @property
    def is_ours(self) -> bool:
        """See `Link.is_ours`."""
        return os.getpid() == self._pid if self._own is None else self._own.is_ours

    def wake(self) -> None:
        """See `Link.wake`."""
        if self._own is not None:
            self._own.wake()

    def wait(self, done: Callable[[], bool], budget_s: float | None, waiting_for: str) -> bool:
        """See `Link.wait`; only rank 0 ever waits for the service."""
        return done() if self._own is None else self._own.wait(done, budget_s, waiting_for)

    def restart(self) -> None:
        """See `Link.restart`."""
        if self._own is not None:
            self._own.restart()

    def abandon(self, within_s: float, then: Callable[[], None]) -> None:
        """See `Link.abandon`. The other ranks are not told: they may not have let go of theirs yet."""
        if self._own is not None:
            self._own.abandon(within_s, then)

    def close(self, within_s: float) -> bool:
        """See `Link.close`, and `Shared.leave`."""
        self._shared.leave(within_s)
        self._exchange.close()
        return True if self._own is None else self._own.close(within_s)
