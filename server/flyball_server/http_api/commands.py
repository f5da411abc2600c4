"""The routes of commands: give, look, wait, approve.

Rule of this module: no decision is taken here; every route is one call of the service.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from flyball_server import limits
from flyball_server.commands.commanding import Commanding
from flyball_server.commands.log import CommandView
from flyball_server.core.errors import Invalid
from flyball_server.http_api.guarded import caller_of
from flyball_server.http_api.runs import Count
from flyball_server.messages import CommandRequest

#: What of a body is no field of a kind's own.
_ENVELOPE = ("kind", "reason", "expires_in_s", "expires_at")


class CommandBody(BaseModel):
    """kind: override, hold, release, bounds, switch_policy, set_profile, checkpoint, restore, rewind, evaluate, stop or
    note. reason: why; it stays in the journal. expires_in_s, expires_at: when it ends by itself. The rest by kind:
    override takes setting, groups, and value or factor (force: a value of lr also for an optimizer that finds its own
    step size); override and hold take for_steps or until_step; release command or setting; bounds guard; switch_policy
    policy and base; set_profile profile; the directives args (rewind: step)."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    reason: str
    setting: str | None = None
    groups: list[str] | None = None
    value: float | None = None
    factor: float | None = None
    force: bool | None = None
    for_steps: Annotated[int, Field(ge=1)] | None = None
    until_step: Annotated[int, Field(ge=1)] | None = None
    command: str | None = None
    guard: dict[str, Any] | None = None
    policy: dict[str, Any] | str | None = None
    base: dict[str, Any] | None = None
    profile: str | None = None
    args: dict[str, Any] | None = None
    step: Count | None = None
    expires_in_s: float | None = None
    expires_at: str | None = None

    def fields(self) -> dict[str, Any]:
        """What was said beside the envelope."""
        return {name: getattr(self, name) for name in self.model_fields_set if name not in _ENVELOPE}


class Moment(BaseModel):
    """One row of a command's history."""

    model_config = ConfigDict(extra="allow")

    seq: int
    at: str
    actor: str
    status: str


class CommandAnswer(BaseModel):
    """A command or a proposal. status: proposed, accepted, clamped, applied, done, declined, expired, superseded,
    released, withdrawn, rejected, approved. verdict: what the guard left of it. applied: at which step, on how many of
    how many ranks. clamped: whether the guard left less than was asked, whatever became of it since; clamped_to: what
    it left, in words. command: what came of an approved proposal. over: whether nothing more will happen to it."""

    id: str
    run: str
    kind: str
    status: str
    over: bool
    seq: int
    actor: str
    reason: str
    at: str
    args: dict[str, Any]
    until_step: int | None
    expires_at: str | None
    verdict: dict[str, Any] | None
    clamped: bool
    clamped_to: str
    applied: dict[str, int] | None
    proposal: str
    command: str
    approvals: list[str]
    needed: int
    history: list[Moment]


class CommandPage(BaseModel):
    """One page; `next` is the value of `after` for the next one, null at the end."""

    run: str
    commands: list[CommandAnswer]
    next: int | None


class VerdictBody(BaseModel):
    """What somebody says to a proposal, and why."""

    model_config = ConfigDict(extra="forbid")

    verdict: Literal["approved", "rejected", "withdrawn"]
    reason: str


def router(commanding: Commanding) -> APIRouter:
    """The routes over the use cases of commands."""
    routes = APIRouter(prefix="/v1", tags=["commands"])

    @routes.post("/runs/{run}/commands", status_code=201)
    async def give(
        run: str,
        body: CommandBody,
        request: Request,
        response: Response,
        if_match: Annotated[str | None, Header(description="the newest row you know; a later command: 412")] = None,
        idempotency_key: Annotated[str, Header(description="repeating a request with it changes nothing")] = "",
    ) -> CommandAnswer:
        """Give a run a command, or propose it (202) where the caller may only propose or the project wants more people
        than one."""
        given = await commanding.give(asked(run, body, if_match, idempotency_key), caller_of(request))
        if given.repeated:
            response.status_code = 200
        elif given.view.status == "proposed":
            response.status_code = 202
        return answer(given.view)

    @routes.get("/runs/{run}/commands")
    async def commands(
        run: str,
        request: Request,
        after: Count = 0,
        limit: Count = 100,
        open_only: Annotated[bool, Query(alias="open", description="only those that are not over")] = False,
    ) -> CommandPage:
        """The commands and proposals of a run, oldest first, with all that happened to each."""
        found = await commanding.list(run, caller_of(request), after=after, limit=limit, open_only=open_only)
        return CommandPage(**{**found, "commands": [answer(view) for view in found["commands"]]})

    @routes.get("/runs/{run}/commands/{command}")
    async def command(
        run: str,
        command: str,
        request: Request,
        wait_s: Annotated[float, Query(ge=0, le=limits.WAIT_MAX_S, description="until it is applied or over")] = 0.0,
    ) -> CommandAnswer:
        """One command or proposal; with `wait_s` as soon as it is applied or over, or the time is."""
        return answer(await commanding.get(run, command, caller_of(request), wait_s))

    @routes.post("/runs/{run}/proposals/{proposal}")
    async def judge(run: str, proposal: str, body: VerdictBody, request: Request) -> CommandAnswer:
        """Approve or reject a proposal, or take back one's own. The last approval it takes makes it a command, which is
        the answer then."""
        return answer(await commanding.judge(run, proposal, body.verdict, body.reason, caller_of(request)))

    return routes


def asked(run: str, body: CommandBody, if_match: str | None, key: str) -> CommandRequest:
    """The request. Raises Invalid for an If-Match that is none."""
    seq = None
    if if_match is not None and if_match != "*":
        text = if_match.strip().removeprefix("W/").strip('"')
        if not (text.isascii() and text.isdecimal()) or int(text) > limits.INTEGER_MAX:
            raise Invalid(f"If-Match is {if_match!r:.40}: give the number of the newest row you know, as in the ETag")
        seq = int(text)
    return CommandRequest(run, body.kind, body.reason, body.fields(), seq, key, body.expires_in_s, body.expires_at)


def answer(view: CommandView) -> CommandAnswer:
    """A command as JSON."""
    return CommandAnswer(**{**view._asdict(), "over": view.over})
