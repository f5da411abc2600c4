"""A request body has a size limit, whether or not the request says its size beforehand."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: reading a body beyond `bytes_max` raises an HTTPException with status 413."""

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is read."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._bytes_max:
                detail = f"the body has more than {self._bytes_max} bytes: send fewer observations at once"
                raise HTTPException(413, detail)
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
