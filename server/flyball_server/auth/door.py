"""The doors: from a request's peer and its Authorization header to a caller.

Rule of this module: both skins ask the same door for every request, and again for every message of a stream; what a
refused caller is told is the same for every reason.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.auth.rates import Rates
from flyball_server.auth.refusals import Refusals
from flyball_server.auth.tokens import Tokens
from flyball_server.core.errors import Limited, Unauthenticated

UNAUTHENTICATED = (
    "no valid token: send `Authorization: Bearer TOKEN` with one that is neither expired nor revoked; "
    "`flyball-server token create` makes one"
)


class Peer(NamedTuple):
    """Where a request comes from. actor: for the record, where nobody is asked for a token; address: without a port."""

    actor: str
    address: str


class Door(Protocol):
    """Who comes in."""

    async def admit(self, peer: Peer, authorization: str | None) -> Caller:
        """The caller of a request. Raises Unauthenticated; Limited where they ask too often."""

    async def admit_again(self, peer: Peer, authorization: str | None) -> Caller:
        """The caller of the next message of a stream; who asks too often waits."""

    def denied(self, caller: Caller, peer: Peer, why: str) -> None:
        """Put on record that a caller wanted more than the role allows."""


class _Paced:
    """What every door does: hold callers to a rate, and put on record what was denied."""

    def __init__(self, refusals: Refusals, requests_per_s: float) -> None:
        self._refusals = refusals
        self._rates = Rates(requests_per_s, max(requests_per_s, 1.0), limits.CALLERS_MAX)

    def denied(self, caller: Caller, peer: Peer, why: str) -> None:
        self._refusals.note(peer.address if caller.actor == peer.actor else f"{caller.actor} at {peer.address}", why)

    def _hold(self, key: str) -> None:
        if wait_s := self._rates.take(key, _now()):
            raise Limited("more requests a second than one caller may send (requests_per_s): slow down", wait_s)

    async def _pace(self, key: str) -> None:
        while wait_s := self._rates.take(key, _now()):
            await asyncio.sleep(wait_s)


class OpenDoor(_Paced):
    """Everybody who reaches the port is an admin: for this machine alone, or a network that is trusted."""

    async def admit(self, peer: Peer, authorization: str | None) -> Caller:
        self._hold(peer.address)
        return Caller(peer.actor, "admin")

    async def admit_again(self, peer: Peer, authorization: str | None) -> Caller:
        await self._pace(peer.address)
        return Caller(peer.actor, "admin")


class TokenDoor(_Paced):
    """Who holds a valid token is whom it names."""

    def __init__(self, tokens: Tokens, refusals: Refusals, requests_per_s: float) -> None:
        super().__init__(refusals, requests_per_s)
        self._tokens = tokens
        per_s = limits.FAILURES_MAX / limits.FAILURES_WITHIN_S
        self._failures = Rates(per_s, limits.FAILURES_MAX, limits.CALLERS_MAX)
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")

    async def admit(self, peer: Peer, authorization: str | None) -> Caller:
        caller = await self._known(peer, authorization)
        self._hold(caller.actor)
        return caller

    async def admit_again(self, peer: Peer, authorization: str | None) -> Caller:
        caller = await self._known(peer, authorization)
        await self._pace(caller.actor)
        return caller

    async def _known(self, peer: Peer, authorization: str | None) -> Caller:
        started = _now()
        if started - self._read_at > limits.TOKENS_FRESH_S:
            await self._read(started)
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and secret:
            token, why = self._tokens.find(secret.strip())
            if token is not None:
                return token.caller
        else:
            why = "no token"
        self._refusals.note(peer.address, why)
        # A valid token is served whatever else its address does: behind a proxy all addresses are one.
        if wait_s := self._failures.take(peer.address, started):
            raise Limited("too many requests without a valid token from this address: come back later", wait_s)
        raise Unauthenticated(UNAUTHENTICATED)

    async def _read(self, asked_at: float) -> None:
        """Learn of new and revoked tokens; who came while another read goes by what that one found."""
        async with self._reading:
            if asked_at - self._read_at > limits.TOKENS_FRESH_S:
                now = _now()
                await self._tokens.refresh()
                self._read_at = now


def _now() -> float:
    return asyncio.get_running_loop().time()
