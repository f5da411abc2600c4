"""The routes of the store itself: what it takes, deleting a run, and what is left of deleted ones.

Rule of this module: no decision is taken here; every route is one call of the service.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from flyball_server import limits
from flyball_server.http_api.guarded import caller_of
from flyball_server.http_api.runs import Count
from flyball_server.service import Service


class Store(BaseModel):
    """What the store takes and may take; null: no limit, or not on a disk. state: ok, nearly_full or full (then
    appends are refused with `busy`); words: what to do about it. damaged: what is wrong, by run, as far as known."""

    bytes: int | None
    bytes_max: int | None
    disk_free: int | None
    disk_free_min: int
    state: str
    words: str
    damaged: dict[str, str]


class Tombstone(BaseModel):
    """What is left of a deleted run. seq: its row in the store's own journal; rows, digest: how many rows the run had,
    and the hash of the newest; null where the run was too damaged to tell."""

    seq: int
    at: str
    actor: str
    run: str
    project: str
    name: str
    reason: str
    policy: str
    created_at: str
    attempts: int
    step: int | None
    observations: int | None
    rows: int
    digest: str


class TombstonePage(BaseModel):
    """One page; `next` is the value of `after` for the next one, null at the end."""

    tombstones: list[Tombstone]
    next: int | None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["store"])

    @routes.get("/store")
    async def store(request: Request) -> Store:
        """Bytes used, their limit, free bytes of the disk, whether the store is full, and runs found damaged."""
        caller = caller_of(request)
        return Store(**(await service.usage(caller))._asdict(), damaged=dict(service.damaged(caller)))

    @routes.delete("/runs/{run}")
    async def delete(
        run: str, request: Request, reason: Annotated[str, Query(description="why; stays in the tombstone")] = ""
    ) -> Tombstone:
        """Delete a run for good. Its name is not used again; the answer is what is left of it."""
        return Tombstone(**await service.delete_run(run, reason, caller_of(request)))

    @routes.get("/tombstones")
    async def tombstones(request: Request, after: Count = 0, limit: Count = limits.TOMBSTONES_MAX) -> TombstonePage:
        """The deleted runs, oldest first: which, when, by whom and why."""
        return TombstonePage(**await service.tombstones(after, limit, caller_of(request)))

    return routes
