"""The plain HTTP transport: standard library only.

Rule of this module: bytes in, bytes out; one keep-alive connection, every call within a time limit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from flyball import limits, wire
from flyball.errors import LinkError, Refused
from flyball.secure import tls_hint

#: HTTP statuses that mean no; any other that is not 2xx means "not now".
_REFUSALS = {
    400: "invalid",
    401: "denied",
    403: "denied",
    404: "not_found",
    409: "conflict",
    413: "invalid",
    422: "invalid",
}


class HttpTransport:
    """Speaks to `url` (http:// or https://), with a bearer token if there is one. context: of TLS, for https://."""

    def __init__(self, url: str, token: str | None, context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port
        self._scheme, self._path = parts.scheme, parts.path.rstrip("/")
        self._closed = False
        self._older = False
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=limits.CONNECT_S, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=limits.CONNECT_S)

    def attach(self, message: wire.Attach) -> wire.Attached:
        """POST /v1/attach."""
        try:
            data = self._post("/v1/attach", wire.attach_json(message))
            self._older = "confirm" not in data
            return wire.attached_of(data)
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError(f"the answer to attach makes no sense: {error!r}") from error

    def report(self, message: wire.Report) -> wire.Advice:
        """POST /v1/runs/RUN/report."""
        path = f"/v1/runs/{quote(message.run, safe='')}/report"
        try:
            return wire.advice_of(self._post(path, wire.report_json(message, older=self._older)))
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError(f"the answer to a report makes no sense: {error!r}") from error

    def close(self) -> None:
        """Close the socket, which also ends a call that waits on it."""
        self._closed = True
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # the other side may have closed it first
                sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        data = json.dumps(body, separators=(",", ":"), allow_nan=False)
        try:
            try:
                answer = self._exchange(path, data)
            except ConnectionError:
                # A connection that idled between two slow steps may have been closed by the other side. Every
                # message may be repeated, so one more is tried before this counts as a lost link.
                if self._closed:
                    raise
                self._connection.close()
                answer = self._exchange(path, data)
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise LinkError(f"{type(error).__name__}: {str(error)[:80]!a}{self._hint(error)}") from error
        return _checked(answer.status, answer.getheader("Retry-After"), content)

    def _hint(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLError | http.client.BadStatusLine | ConnectionResetError | BrokenPipeError):
            port = "is that the gRPC port? " if isinstance(error, http.client.BadStatusLine) else ""
            return f" ({port}{tls_hint(self._scheme, error)})"
        return ""

    def _exchange(self, path: str, data: str) -> http.client.HTTPResponse:
        connection = self._connection
        if connection.sock is None:
            connection.timeout = limits.CONNECT_S
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(limits.ANSWER_S)
        connection.request("POST", self._path + path, data, self._headers)
        return connection.getresponse()


def _checked(status: int, retry_after: str | None, content: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        data = None
    if 200 <= status < 300 and isinstance(data, dict):
        return data
    detail = data.get("detail") if isinstance(data, dict) else None
    message = str(detail or f"HTTP status {status}")
    # Only the service itself says no in this form; a proxy's bare 404 or 403 is no refusal.
    if status in _REFUSALS and detail is not None:
        raise Refused(_REFUSALS[status], message)
    raise LinkError(message, float(retry_after) if retry_after and retry_after.isdigit() else 0.0)
