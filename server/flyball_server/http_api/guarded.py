"""What stands before every route: who asks; and behind every answer: headers that tell browsers to keep out.

Rule of this module: a path is open because it is named here; of any other, known or not, only a caller hears anything.
There are no CORS headers, so no page of another origin can read an answer.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flyball_server.auth.access import Caller
from flyball_server.auth.door import Door, Peer
from flyball_server.core.errors import SteeringError
from flyball_server.http_api import problems
from flyball_server.http_api.text import Json

#: Probes, and the description of the routes, which is the same everywhere.
OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_log = logging.getLogger("flyball_server")


class Application(FastAPI):
    """FastAPI whose every answer has the headers, also where everything else has failed."""

    def build_middleware_stack(self) -> ASGIApp:
        """The stack, with the headers around all of it."""
        return _Headers(super().build_middleware_stack())


class Guarded:
    """ASGI middleware: nothing passes without a caller, but to the open paths. See `caller_of`."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller, or answer that there is none."""
        if scope["type"] == "websocket":  # there are none; one that is added must come through a door of its own
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        answer: Json
        try:
            caller = await self._door.admit(peer_of(scope), _authorization(scope))
        except SteeringError as error:
            answer = problems.of(error)
        except Exception:
            _log.exception("finding out who asks failed")
            answer = problems.unexpected()
        else:
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)
            return
        await answer(scope, receive, send)


class _Headers:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        more = [*_HEADERS]
        if scope["path"].startswith("/v1"):
            more.append((b"cache-control", b"no-store"))
        if scope.get("scheme") == "https":
            more.append((b"strict-transport-security", b"max-age=31536000"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        await self._app(scope, receive, with_headers)


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.state.caller
    return caller


def peer_of(scope: Any) -> Peer:
    """Where a request comes from."""
    client = scope.get("client")
    address = client[0] if client else ""
    return Peer(f"http:{address}", address)


def _authorization(scope: Scope) -> str | None:
    """The one Authorization header; of several nobody knows which one counts."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return found[0].decode("latin-1") if len(found) == 1 else None
