"""The HTTP skin: JSON to messages and back, problem documents, probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastapi import FastAPI, Response

from flyball_server import limits
from flyball_server.canaries import Canaries
from flyball_server.commanding import Commanding
from flyball_server.exports.exchange import Exchange
from flyball_server.fleet import Fleet
from flyball_server.freezing import Freezing
from flyball_server.http_api import branches, commands, exports, fleet, problems, runs, steer, store
from flyball_server.http_api.body import BodyLimit
from flyball_server.service import Service


class Many(NamedTuple):
    """The use cases over many runs."""

    fleet: Fleet
    freezing: Freezing
    canaries: Canaries


def build(
    service: Service, commanding: Commanding, many: Many, *, version: str, is_ready: Callable[[], bool],
    exchange: Exchange,
) -> FastAPI:  # fmt: skip
    """The FastAPI application over one service, its commands, those of many runs, and its exchange. `is_ready`: false
    while starting and draining."""
    app = FastAPI(
        title="Flyball",
        version=version,
        summary="Steers and audits the learning rates of training jobs",
        # Those pages load scripts from other people's servers; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    app.include_router(steer.router(service))
    app.include_router(runs.router(service))
    app.include_router(branches.router(service))
    app.include_router(commands.router(commanding))
    app.include_router(fleet.router(*many))
    app.include_router(store.router(service))
    app.include_router(exports.router(exchange))

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
        return await service.ready()

    others = {exports.IMPORT_PATH: limits.IMPORT_BYTES_MAX}
    app.add_middleware(BodyLimit, bytes_max=limits.BODY_BYTES_MAX, others=others)
    return app
