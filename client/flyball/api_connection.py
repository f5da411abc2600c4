"""The REST SDK's connection to one service: how it is asked, and what goes wrong in words.

Rule of this module: it knows no route. What the service refuses and what does not reach it are told apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from flyball.connect import DEFAULT_SERVER, certificates
from flyball.errors import FlyballError, LinkError, Refused
from flyball.secure import checked_token, tls_hint

if TYPE_CHECKING:
    import httpx

#: How long the service may be busy with a whole run before its answer comes.
EXCHANGE_S = 600.0


class Connection:
    """One service's address and connection, kept open between requests.

    server: its http:// or https:// address; default: FLYBALL_SERVER, then http://127.0.0.1:1788. token: the bearer
    token; default: FLYBALL_TOKEN. For https:// FLYBALL_CA names who vouches for the service, FLYBALL_CERT and
    FLYBALL_KEY what this process shows. timeout_s: how long connecting and each wait for data may take. Proxies that
    the environment names are not used, as they are not by a training job.

    Every method raises Refused where the service says no (`code`: not_found, invalid, conflict, denied,
    unauthenticated) and LinkError where it cannot be reached, has no time, or answers no sense. Making one raises
    FlyballError for an address, a token or a certificate that is none, and where httpx is missing.
    """

    def __init__(self, server: str | None = None, token: str | None = None, timeout_s: float = 10.0) -> None:
        try:
            import httpx
        except ImportError as error:
            raise FlyballError(f"httpx is not installed ({error}): pip install 'flyball[cli]'") from error
        self.server = rest_address(server)
        token = checked_token(token or os.environ.get("FLYBALL_TOKEN"))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        context = certificates().context() if self.server.startswith("https:") else False
        self._unreachable = httpx.TransportError
        self._no_address = httpx.InvalidURL
        self._broken_off = httpx.RemoteProtocolError
        # With a transport of its own httpx asks the environment for no proxy, which would stand between this
        # machine and itself.
        self._http = httpx.Client(
            base_url=self.server,
            headers=headers,
            timeout=timeout_s,
            transport=httpx.HTTPTransport(verify=context, retries=1),
        )

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_lost(self, error: LinkError) -> bool:
        return isinstance(error.__cause__, self._unreachable)

    def _new_key(self) -> str:
        return os.urandom(16).hex()

    def _get(self, path: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        asked = {name: value for name, value in (parameters or {}).items() if value is not None}
        return self._answer("GET", path, parameters=asked)

    def _answer(
        self, method: str, path: str, *, parameters: Any = None, body: Any = None, **options: Any
    ) -> dict[str, Any]:
        with self._reaching():
            answer = self._http.request(method, path, params=parameters, json=body, **options)
        return _checked(answer, self.server)

    @contextmanager
    def _streamed(self, path: str, parameters: Mapping[str, Any]) -> Iterator[httpx.Response]:
        asked = {name: value for name, value in parameters.items() if value is not None}
        with self._reaching(), self._http.stream("GET", path, params=asked, timeout=EXCHANGE_S) as answer:
            if not answer.is_success:
                answer.read()
                _checked(answer, self.server)
            yield answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """What goes wrong with the connection meanwhile, in words."""
        try:
            yield
        except self._broken_off as error:
            if "without sending a response" in str(error):
                raise LinkError(f"{self.server} ended the connection without an answer: {self._hint(error)}") from error
            raise LinkError(f"{self.server} broke off its answer: the service's log says why; try again") from error
        except self._no_address as error:
            raise FlyballError(f"this cannot be asked for: {error}; give shorter arguments") from error
        except self._unreachable as error:
            raise LinkError(
                f"no answer from {self.server} ({error or type(error).__name__}): is the service running there? "
                "`flyball-server serve` starts one; --server or FLYBALL_SERVER names another address"
                + (f"; {self._hint(error)}" if "ssl" in str(error).lower() else "")
            ) from error

    def _hint(self, error: Exception) -> str:
        return tls_hint(urlsplit(self.server).scheme, error)


def rest_address(server: str | None) -> str:
    """The service's HTTP address: the given one, else FLYBALL_SERVER's, else the default.

    Raises FlyballError for a gRPC address, which a training job may use but REST cannot, and for what is none.
    """
    given = server or os.environ.get("FLYBALL_SERVER") or DEFAULT_SERVER
    name = "server" if server else "FLYBALL_SERVER"
    parts = urlsplit(given)
    if parts.scheme in ("grpc", "grpcs"):
        raise FlyballError(
            f"{name} is {given!r}, which training jobs may use, but queries need the service's REST address, "
            f"http://{parts.hostname or 'HOST'}:1788 where it has the default port: give that one with --server"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FlyballError(f"{name} is {given!r}: give http://HOST:PORT (https:// for TLS)")
    return given.rstrip("/")


def _checked(answer: httpx.Response, server: str) -> dict[str, Any]:
    """The answer's JSON. Only the service itself says no with a code; a proxy's bare 404 is no refusal."""
    try:
        data = json.loads(answer.content)
    except ValueError:
        data = None
    if answer.is_success and isinstance(data, dict):
        return data
    status = answer.status_code
    if not isinstance(data, dict) or "code" not in data:
        raise LinkError(f"{server} answered with HTTP status {status}, and not as the service does: check the address")
    detail = str(data.get("detail") or data.get("title"))
    if status == 429 or status >= 500:
        wait = answer.headers.get("Retry-After", "")
        raise LinkError(f"{server}: {detail}", float(wait) if wait.isdigit() else 0.0)
    raise Refused(str(data["code"]), f"{server}: {detail}")
