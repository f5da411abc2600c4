"""Errors over HTTP: RFC 9457 problem+json, one table of statuses."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flyball_server.core.errors import Ahead, Busy, Denied, KeyReused, SteeringError, Unauthenticated
from flyball_server.http_api.text import Json

STATUS = {
    "invalid": (422, "The request is wrong"),
    "not_found": (404, "There is no such thing"),
    "conflict": (409, "Not possible as things are"),
    "stale": (412, "Somebody else moved first"),
    "unauthenticated": (401, "Nobody knows who asks"),
    "denied": (403, "Not allowed"),
    "busy": (503, "A limit is full, come back later"),
    "limited": (429, "Too many requests"),
    "damaged": (500, "The stored record is damaged"),
    "internal": (500, "The service failed"),
}

#: Titles of errors that say more than their code does.
_TITLES: dict[type[SteeringError], str] = {
    Ahead: "There is no such row yet",
    KeyReused: "The Idempotency-Key was used before",
}


class Problem(BaseModel):
    """RFC 9457. code: the machine's word; detail: the field, the value and the remedy."""

    type: str
    title: str
    status: int
    detail: str
    code: str


#: What every route may answer besides what it is asked for.
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
    }
    for status in (400, 401, 403, 404, 409, 412, 413, 422, 429, 500, 503)
}


def problem(status: int, title: str, detail: str, code: str, headers: dict[str, str] | None = None) -> Json:
    """One problem document. `code` is the machine's word, `detail` names the field, the value and the remedy."""
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    return Json(body, status, headers, media_type="application/problem+json")


def _found(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "json_invalid":
        return f"{where}: {error['msg']}: {error.get('ctx', {}).get('error', '')}"
    if isinstance(error["input"], bytes):
        return f"{where}: the body was not read as JSON: send it with Content-Type: application/json"
    return f"{where}: {error['msg']} (got {error['input']!r:.80})"


def of(error: SteeringError) -> Json:
    """The problem document of one of our errors."""
    status, title = STATUS[error.code]
    title = _TITLES.get(type(error), title)
    headers: dict[str, str] = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="flyball"'
    return problem(status, title, str(error), error.code, headers)


def unexpected() -> Json:
    """The problem document of what nobody thought of: it stands in the log, not in the answer."""
    status, title = STATUS["internal"]
    return problem(status, title, "an unexpected error; the service's log has it", "internal")


def install(app: FastAPI, denied: Callable[[Request, str], None]) -> None:
    """Make every error of `app` a problem document. denied: told of each refusal for want of a role."""

    @app.exception_handler(SteeringError)
    async def steering(request: Request, error: SteeringError) -> Json:
        if isinstance(error, Denied):
            denied(request, str(error))
        return of(error)

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Json:
        return problem(422, STATUS["invalid"][1], "; ".join(_found(e) for e in error.errors()[:8]), "invalid")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Json:
        code = "not_found" if error.status_code == 404 else "invalid"
        title = HTTPStatus(error.status_code).phrase
        return problem(error.status_code, title, str(error.detail), code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Json:
        return unexpected()  # starlette raises it on, and so it comes to the log
