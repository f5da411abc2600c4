"""The routes of tokens: make, list, revoke.

Rule of this module: no decision is taken here; every route is one call of the use cases. One answer holds a secret.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict

from flyball_server.auth.tokens import Tokens
from flyball_server.http_api.guarded import caller_of


class TokenBody(BaseModel):
    """projects: those the token reaches; null: all. expires_in_s: seconds it lives; null: until it is revoked."""

    model_config = ConfigDict(extra="forbid")

    name: str
    role: str
    projects: list[str] | None
    expires_in_s: int | None = None


class TokenDetail(BaseModel):
    """A token without its secret. status: valid, expired or revoked; projects null: all."""

    id: str
    name: str
    role: str
    projects: list[str] | None
    status: str
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: str | None
    revoked_by: str
    reason: str


class NewToken(TokenDetail):
    """A token with its secret, which is not told again."""

    secret: str


class TokenList(BaseModel):
    """The tokens that reach no further than the caller, oldest first."""

    tokens: list[TokenDetail]


def router(tokens: Tokens) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["access"])

    @routes.post("/tokens", status_code=201)
    async def create(body: TokenBody, request: Request) -> NewToken:
        """Make a token. It reaches no project that its maker does not."""
        made = await tokens.create(body.name, body.role, body.projects, body.expires_in_s, caller_of(request))
        return NewToken(**made)

    @routes.get("/tokens")
    async def listed(request: Request) -> TokenList:
        """All tokens, expired and revoked ones included; never a secret."""
        return TokenList(tokens=[TokenDetail(**one) for one in await tokens.listed(caller_of(request))])

    @routes.delete("/tokens/{token}")
    async def revoke(
        token: str, request: Request, reason: Annotated[str, Query(description="why; stays in the record")] = ""
    ) -> TokenDetail:
        """Revoke a token for good: within a second it opens nothing any more, and streams that it opened end."""
        return TokenDetail(**await tokens.revoke(token, reason, caller_of(request)))

    return routes
