"""Errors over HTTP: RFC 9457 problem+json, one table of statuses."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flyball_server.core.errors import Busy, SteeringError

STATUS = {
    "invalid": (422, "The request is wrong"),
    "not_found": (404, "There is no such thing"),
    "conflict": (409, "Somebody else moved first"),
    "stale": (412, "Somebody else moved first"),
    "denied": (403, "Not allowed"),
    "busy": (503, "A limit is full, come back later"),
    "damaged": (500, "The stored record is damaged"),
    "internal": (500, "The service failed"),
}


def problem(status: int, title: str, detail: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """One problem document. `code` is the machine's word, `detail` names the field, the value and the remedy."""
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _found(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "json_invalid":
        return f"{where}: {error['msg']}: {error.get('ctx', {}).get('error', '')}"
    if isinstance(error["input"], bytes):
        return f"{where}: the body was not read as JSON: send it with Content-Type: application/json"
    return f"{where}: {error['msg']} (got {error['input']!r:.80})"


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""

    @app.exception_handler(SteeringError)
    async def steering(_: Request, error: SteeringError) -> JSONResponse:
        status, title = STATUS[error.code]
        headers = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, Busy) else None
        return problem(status, title, str(error), error.code, headers)

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, STATUS["invalid"][1], "; ".join(_found(e) for e in error.errors()[:8]), "invalid")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else "invalid"
        title = HTTPStatus(error.status_code).phrase
        return problem(error.status_code, title, str(error.detail), code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # What went wrong stands in the log (starlette raises it on), not in the answer.
        status, title = STATUS["internal"]
        return problem(status, title, "an unexpected error; the service's log has it", "internal")
