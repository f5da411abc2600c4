"""The HTTP skin: JSON to messages and back, problem documents, probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer

from flyball_server import limits
from flyball_server.audit.auditing import Auditing
from flyball_server.audit.heads import Heads
from flyball_server.audit.webhooks import Hooks
from flyball_server.auth.door import Door
from flyball_server.auth.tokens import Tokens
from flyball_server.commands.commanding import Commanding
from flyball_server.exports.exchange import Exchange
from flyball_server.fleet.canaries import Canaries
from flyball_server.fleet.fleet import Fleet
from flyball_server.fleet.freezing import Freezing
from flyball_server.http_api import audit, branches, commands, exports, fleet, problems, runs, steer, store
from flyball_server.http_api import tokens as tokens_api
from flyball_server.http_api.body import BodyLimit
from flyball_server.http_api.guarded import Application, Guarded, caller_of, peer_of
from flyball_server.http_api.text import Json
from flyball_server.service import Service


class Many(NamedTuple):
    """The use cases over many runs."""

    fleet: Fleet
    freezing: Freezing
    canaries: Canaries


class Parts(NamedTuple):
    """The use cases that the routes call."""

    service: Service
    commanding: Commanding
    many: Many
    exchange: Exchange
    tokens: Tokens
    auditing: Auditing
    heads: Heads
    hooks: Hooks


def build(parts: Parts, *, door: Door, version: str, is_ready: Callable[[], bool]) -> FastAPI:
    """The application over all use cases. door: who comes in. is_ready: false while starting and draining."""
    app = Application(
        title="Flyball",
        version=version,
        summary="Steers and audits the learning rates of training jobs",
        # Those pages load scripts from other people's servers; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
        # It would tell whoever asks to come again at an address of their own choosing: the Host of the request.
        redirect_slashes=False,
    )

    def denied(request: Request, why: str) -> None:
        door.denied(caller_of(request), peer_of(request.scope), why)

    problems.install(app, denied)
    routers = [part.router(parts.service) for part in (steer, runs, branches, store)]
    routers += [commands.router(parts.commanding), fleet.router(*parts.many), exports.router(parts.exchange)]
    routers += [tokens_api.router(parts.tokens), audit.router(parts.auditing, parts.heads, parts.hooks)]
    for routes in routers:
        # The door has looked at the token already; this only tells readers of the schema that there is one.
        app.include_router(routes, responses=problems.ANSWERS, dependencies=[Depends(HTTPBearer(auto_error=False))])

    @app.get("/healthz", tags=["probes"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["probes"])
    async def readyz(response: Response) -> dict[str, object]:
        """The journal is open and requests are accepted; 503 otherwise."""
        if not is_ready():
            response.status_code = 503
            return {"status": "not ready"}
        return await parts.service.ready()

    others = {exports.IMPORT_PATH: limits.IMPORT_BYTES_MAX}
    app.add_middleware(BodyLimit, bytes_max=limits.BODY_BYTES_MAX, others=others)
    app.add_middleware(Guarded, door=door)  # outside of all: of who is not let in, no body is read
    return app
