"""The routes about where runs come from and where they might have gone: fork, lineage, what-if.

Rule of this module: no decision is taken here; every route is one call of the service.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from flyball_server import limits
from flyball_server.http_api.guarded import caller_of
from flyball_server.http_api.runs import Count, RunDetail, detail
from flyball_server.messages import Attach, Fork, WhatIfRequest
from flyball_server.service import Service


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ForkRunBody(_Body):
    """name: the new run's, in `project` (the default one without). step: its first (behind the newest without), on the
    line of `attempt` (the newest without). What is left out is the other run's: policy, base, guard, labels, seed."""

    name: str
    project: str = "default"
    step: Count | None = None
    attempt: Count | None = None
    policy: dict[str, Any] = {}
    base: dict[str, Any] | None = None
    guard: dict[str, Any] = {}
    labels: dict[str, str] = {}
    seed: int = 0
    shadows: dict[str, dict[str, Any]] = {}


class WhatIfBody(_Body):
    """policy: as in an attach. Without `base` it stands on the run's own, unless the policy names one (or null);
    without `guard` and `seed` they are the run's. points: of each series; limit: of the other policy's decisions."""

    policy: dict[str, Any]
    base: dict[str, Any] | None = None
    guard: dict[str, Any] = {}
    seed: int | None = None
    attempt: Count | None = None
    points: Annotated[int, Field(ge=2, le=limits.POINTS_MAX)] = 2000
    limit: Annotated[int, Field(ge=0, le=limits.DECISIONS_MAX)] = 1000


def router(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(prefix="/v1", tags=["branches"])

    @routes.post("/runs/{run}/fork", status_code=201)
    async def fork(run: str, body: ForkRunBody, request: Request) -> RunDetail:
        """Begin a run that leaves this one at a step. Its job loads this run's checkpoint of the step and attaches with
        resume."""
        attach = Attach(
            project=body.project,
            run=body.name,
            session="fork",
            labels=body.labels,
            groups=(),
            policy=body.policy,
            base=body.base,
            guard=body.guard,
            mode="",
            seed=body.seed,
            lag=None,
            resume=False,
            from_step=None,
            from_attempt=None,
            seq=0,
            digest="",
            client="",
            shadows=body.shadows,
            fork=Fork(run, body.attempt, body.step),
        )
        return detail(await service.fork(attach, caller_of(request)))

    @routes.get("/runs/{run}/lineage")
    async def lineage(run: str, request: Request) -> dict[str, Any]:
        """Where a run comes from, the runs that left it, and its attempts with their gaps."""
        return await service.lineage(run, caller_of(request))

    @routes.post("/runs/{run}/what-if")
    async def what_if(run: str, body: WhatIfBody, request: Request) -> dict[str, Any]:
        """What another policy would have decided on the recorded signals, beside what was decided. Changes nothing."""
        asked = WhatIfRequest(run, body.policy, body.base, body.guard, body.seed, body.attempt)
        return await service.what_if(asked, caller_of(request), points=body.points, limit=body.limit)

    return routes
