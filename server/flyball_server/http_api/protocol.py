"""HTTP/1.1 as uvicorn speaks it, with limits on what comes before anybody is known.

Rule of this module: of a connection that has not said who asks, no more than a stated number of bytes is held, for no
longer than a stated time. What a body may take is `BodyLimit`'s matter.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flyball_server import limits

_TOO_LARGE = "431 Request Header Fields Too Large"
_TOO_LATE = "408 Request Timeout"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The parser calls the `on_` methods while it is fed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Bytes that came since the last that were for the body: the parser may be holding all of them.
        self._held = 0
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is waited for from now on."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._in_head = False
        self._await_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and refuse what it would go on collecting."""
        self._held += len(data)
        super().data_received(data)
        if self._held > limits.HEAD_BYTES_MAX:
            self._refuse(_TOO_LARGE)
        elif self._in_head != (self._deadline is not None):
            self._await_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head; those behind a body nobody asked for."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there, perhaps all at once. Raises where it is too large, which ends the connection."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > limits.HEAD_BYTES_MAX:
            self._refused = _TOO_LARGE
            raise httptools.HttpParserError(_TOO_LARGE)
        self._held, self._in_head = 0, False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, which the application takes."""
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes now is the next request."""
        self._held = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, with the status of the reason where that is ours."""
        if self._refused:
            self._refuse(self._refused)
        else:
            super().send_400_response(msg)

    def _await_head(self) -> None:
        """Start the time that a head has, or end it."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._in_head:
            self._deadline = self.loop.call_later(limits.HEAD_S, self._refuse, _TOO_LATE)

    def _refuse(self, status: str) -> None:
        self._in_head = False
        self._await_head()
        if not self.transport.is_closing():
            self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            self.transport.close()
