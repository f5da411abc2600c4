"""A request body has a size limit, whether or not the request says its size beforehand."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flyball_server.http_api.problems import problem


class BodyLimit:
    """ASGI middleware that answers 413 as soon as a body grows beyond `bytes_max`."""

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is read."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        seen = 0
        started = False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._bytes_max:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if not started:
                detail = f"the body has more than {self._bytes_max} bytes: send fewer observations at once"
                await problem(413, "The body is too large", detail, "invalid")(scope, receive, send)


class _TooLarge(Exception):
    """Raised out of the application's read; never leaves this module."""
