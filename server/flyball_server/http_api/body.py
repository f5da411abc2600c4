"""A request body has a size limit, whether or not the request says its size beforehand."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: reading a body beyond `bytes_max` (`others`: by path) raises an HTTPException, status 413."""

    def __init__(self, app: ASGIApp, bytes_max: int, others: Mapping[str, int]) -> None:
        self._app = app
        self._bytes_max = bytes_max
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is read."""
        seen = 0
        other = self._others.get(scope.get("path", ""))
        bytes_max = self._bytes_max if other is None else other

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > bytes_max:
                remedy = "send fewer observations at once" if other is None else "such a file is not taken"
                raise HTTPException(413, f"the body has more than {bytes_max} bytes: {remedy}")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
