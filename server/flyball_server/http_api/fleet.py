"""The routes over many runs at once: fleet commands, freeze and thaw, canaries.

Rule of this module: no decision is taken here; every route is one call of the service.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from flyball_server.core.errors import Invalid
from flyball_server.fleet.canaries import Canaries, CanaryRequest
from flyball_server.fleet.fleet import Fleet, FleetRequest
from flyball_server.fleet.freezing import Freezing
from flyball_server.http_api.commands import CommandBody, asked
from flyball_server.http_api.guarded import caller_of

Key = Annotated[str, Header(description="repeating a request with it means the same runs, and commands none twice")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FleetBody(_Body):
    """selector: `project=vision,label.team=a,policy=windowed,status=active,run=ablation-*`; all of it must hold, and
    without a status those runs are meant that have not ended. command: as to one run. dry_run: change nothing, and tell
    what would change."""

    selector: str
    command: CommandBody
    dry_run: bool = False


class RunResult(BaseModel):
    """What became of one run. status: as of a command, or "refused" with `error` and `code`. would: of a dry run,
    learning rates by group `before` and `after`, what the guard leaves of it, and what it ends. clamped_to: the same in
    words, also when it is done; carried: what another policy took over."""

    run: str
    status: str
    id: str | None
    clamped_to: str = ""
    carried: list[str] = []
    error: str | None
    code: str | None
    would: dict[str, Any] | None = None


class FleetAnswer(BaseModel):
    """fleet: the id in the store's journal, null for a dry run. counts: runs by status."""

    fleet: str | None
    selector: str
    dry_run: bool
    matched: int
    counts: dict[str, int]
    results: list[RunResult]


class FreezeBody(_Body):
    """project: only its runs; null: all."""

    reason: str
    project: str | None = None


class FreezeState(BaseModel):
    """A freeze that is in force. project: null where it is everywhere. seq: its row in the store's journal."""

    seq: int
    project: str | None
    actor: str
    at: str
    reason: str


class FreezeList(BaseModel):
    """Those that concern the caller."""

    freezes: list[FreezeState]


class FailedRun(BaseModel):
    """A run that could not be reached; it follows with its next report."""

    run: str
    error: str
    code: str


class FreezeAnswer(FreezeState):
    """held: how many active runs are on hold for a freeze now."""

    held: int
    failed: list[FailedRun]
    thawed_by: str | None = None


class CanaryBody(_Body):
    """Give either a policy (as in `switch_policy`, with a base schedule where another one is wanted) or a profile.
    share: of the selected runs, chosen by hash."""

    selector: str
    share: Annotated[float, Field(gt=0, le=1)]
    reason: str
    policy: dict[str, Any] | str | None = None
    base: dict[str, Any] | None = None
    profile: str | None = None


class CanarySummary(BaseModel):
    """status: open, promoted or back. paused: why runs that come later are not switched, "" where they are: the token
    of whoever started it was revoked, or has expired."""

    id: str
    status: str
    at: str
    actor: str
    reason: str
    selector: str
    share: float
    paused: str
    command: dict[str, Any]
    closed_by: str
    closed_reason: str


class CanaryList(BaseModel):
    """Newest first."""

    canaries: list[CanarySummary]


class Member(BaseModel):
    """A run that is switched. status: of its command, or "not switched" with the reason in `words`."""

    run: str
    status: str
    command: str | None
    words: str


class CanaryAnswer(CanarySummary):
    """comparison: of each arm how many runs were `measured`, median `steps` since, `loss_change` of the smoothed loss
    (median and quartiles over the `n` runs that have one), and counts of `spikes`, `guard` interventions, `conflicts`
    and `status`; `words` say what that can and cannot tell."""

    members: list[Member]
    controls: list[str]
    comparison: dict[str, Any]


class ReasonBody(_Body):
    """Why; it stays in the record."""

    reason: str


class CanaryEnd(BaseModel):
    """closed: promoted or back. results: of the runs that were switched for it."""

    canary: str
    closed: str
    results: list[RunResult]


def router(fleet: Fleet, freezing: Freezing, canaries: Canaries) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["fleet"])

    @routes.post("/fleet/commands")
    async def command(body: FleetBody, request: Request, idempotency_key: Key = "") -> FleetAnswer:
        """Give every selected run a command; what one refuses is its result."""
        asked_for = FleetRequest(body.selector, asked("", body.command, None, ""), body.dry_run, idempotency_key)
        return FleetAnswer(**await fleet.command(asked_for, caller_of(request)))

    @routes.get("/freeze")
    async def state(request: Request) -> FreezeList:
        """The freezes in force."""
        return FreezeList(freezes=[FreezeState(**one) for one in await freezing.state(caller_of(request))])

    @routes.post("/freeze")
    async def freeze(body: FreezeBody, request: Request) -> FreezeAnswer:
        """Hold every active run, those that come later too, and refuse all commands but notes, holds, checkpoints and
        stops, until a thaw."""
        return FreezeAnswer(**await freezing.freeze(_project(body), body.reason, caller_of(request)))

    @routes.post("/thaw")
    async def thaw(body: FreezeBody, request: Request) -> FreezeAnswer:
        """End a freeze, and release the holds it gave."""
        return FreezeAnswer(**await freezing.thaw(_project(body), body.reason, caller_of(request)))

    _canary_routes(routes, canaries)
    return routes


def _canary_routes(routes: APIRouter, canaries: Canaries) -> None:
    @routes.post("/canaries", status_code=201)
    async def start(body: CanaryBody, request: Request, idempotency_key: Key = "") -> CanaryAnswer:
        """Switch a share of the selected runs, chosen by hash; the rest are what they are compared with."""
        return CanaryAnswer(**await canaries.start(_canary(body, idempotency_key), caller_of(request)))

    @routes.get("/canaries")
    async def canary_list(request: Request) -> CanaryList:
        """The canaries, newest first."""
        return CanaryList(canaries=[CanarySummary(**one) for one in await canaries.listed(caller_of(request))])

    @routes.get("/canaries/{canary}")
    async def show(canary: str, request: Request) -> CanaryAnswer:
        """Members, controls, and how both arms did since the switch."""
        return CanaryAnswer(**await canaries.show(canary, caller_of(request)))

    @routes.post("/canaries/{canary}/promote")
    async def promote(canary: str, body: ReasonBody, request: Request) -> CanaryEnd:
        """Switch the rest as well. Later runs are not switched any more."""
        return CanaryEnd(**await canaries.promote(canary, body.reason, caller_of(request)))

    @routes.post("/canaries/{canary}/back")
    async def back(canary: str, body: ReasonBody, request: Request) -> CanaryEnd:
        """Switch the members back to what they had."""
        return CanaryEnd(**await canaries.back(canary, body.reason, caller_of(request)))


def _canary(body: CanaryBody, key: str) -> CanaryRequest:
    given = body.model_fields_set & {"policy", "base", "profile"}
    if ("policy" in given) == ("profile" in given) or (body.profile is not None and "base" in given):
        raise Invalid("give a policy, with or without a base, or a profile: one of the two")
    kind = "set_profile" if "profile" in given else "switch_policy"
    fields = {name: getattr(body, name) for name in ("policy", "base", "profile") if name in given}
    return CanaryRequest(body.selector, asked("", CommandBody(kind=kind, reason=body.reason, **fields), None, ""),
                         body.share, key)  # fmt: skip


def _project(body: FreezeBody) -> str:
    if body.project == "":
        raise Invalid("project is '': leave it out for everything")
    return body.project or ""
