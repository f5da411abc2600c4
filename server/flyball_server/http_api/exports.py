"""The routes of what leaves and enters: export files, tables, schedules, the signing key.

Rule of this module: nothing is held in memory. What goes out is made while it is sent; what comes in is a file first.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from flyball_server.core.errors import Busy
from flyball_server.exports.exchange import Exchange
from flyball_server.http_api.guarded import caller_of
from flyball_server.http_api.runs import Count

#: Where bodies may be larger than elsewhere.
IMPORT_PATH = "/v1/import"


class SigningKey(BaseModel):
    """The public key (PEM) that exports are signed with, and its fingerprint, to be compared."""

    public_key: str
    fingerprint: str


class Imported(BaseModel):
    """status: "imported", or "unchanged" where the very same run is there already. signer: the fingerprint of the key
    that signed the file; digest: the hash of row `seq`, the newest."""

    run: str
    status: str
    seq: int
    digest: str
    signer: str


def router(exchange: Exchange) -> APIRouter:
    """The routes over one exchange."""
    routes = APIRouter(prefix="/v1", tags=["exports"])

    @routes.get("/runs/{run}/export", response_class=StreamingResponse)
    async def export(run: str, request: Request) -> StreamingResponse:
        """The run as one self-contained, signed file; docs/export.md describes it."""
        return _stream(await exchange.export(run, caller_of(request)), "application/octet-stream")

    @routes.get("/runs/{run}/table", response_class=StreamingResponse)
    async def table(run: str, request: Request, attempt: Count | None = None) -> StreamingResponse:
        """Every step of an attempt's line: a JSON line with `columns`, then one JSON array per step."""
        return _stream(await exchange.table(run, attempt, caller_of(request)), "application/x-ndjson")

    @routes.get("/runs/{run}/schedule")
    async def schedule(run: str, request: Request, attempt: Count | None = None) -> dict[str, Any]:
        """The settings applied on an attempt's line, as a static schedule by parameter group."""
        return await exchange.schedule(run, attempt, caller_of(request))

    @routes.get("/signing-key")
    async def signing_key(request: Request) -> SigningKey:
        """The public key that exports are signed with."""
        return SigningKey(**exchange.signing_key(caller_of(request)))

    @routes.post("/import")
    async def import_run(request: Request) -> Imported:
        """Take the run in an export file (the raw body), once all of it is checked."""
        caller = caller_of(request)
        exchange.may_import(caller)  # before a gigabyte is taken in
        async with _kept(request) as path:
            return Imported(**await exchange.import_file(path, caller))

    return routes


def _stream(pieces: Iterator[bytes], media_type: str) -> StreamingResponse:
    return StreamingResponse(pieces, media_type=media_type)


@asynccontextmanager
async def _kept(request: Request) -> AsyncIterator[Path]:
    """The request's body as a temporary file."""
    with tempfile.NamedTemporaryFile(prefix="flyball-import-") as file:
        try:
            async for piece in request.stream():
                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(file.flush)
        except ClientDisconnect as error:
            raise HTTPException(400, "the body broke off: send the file again") from error
        except OSError as error:
            raise Busy(f"the file cannot be kept while it is checked: {error.strerror}", 30.0) from error
        yield Path(file.name)
