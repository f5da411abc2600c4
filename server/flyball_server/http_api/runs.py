"""The routes people query: runs, series, decisions, policies.

Rule of this module: no decision is taken here; every route is one call of the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from flyball_server import limits, records
from flyball_server.core.base import SCHEDULES
from flyball_server.core.commands import Command, clamped_to, control_values
from flyball_server.core.errors import Invalid
from flyball_server.core.policies import POLICIES
from flyball_server.guards import json_schema as guard_schema
from flyball_server.http_api.guarded import caller_of
from flyball_server.policy_files import json_schema, summary
from flyball_server.presets import GUARDS, PRESETS
from flyball_server.queries import SeriesRequest, plain
from flyball_server.rules import spec_under
from flyball_server.service import RunView, Service
from flyball_server.storage.journal import RunFilter

#: A step, a row or a number of things.
Count = Annotated[int, Field(ge=0, le=limits.INTEGER_MAX)]


class RunSummary(BaseModel):
    """A run in a listing. status: created, active, stale and lost (active without news for 60 s,
    900 s), finished, failed, deleted, or
    damaged (`problem` says what is)."""

    run: str
    project: str
    name: str
    status: str
    policy: str
    labels: dict[str, str]
    attempt: int
    step: int | None
    created_at: str
    updated_at: str
    stale_s: float
    seq: int
    digest: str
    problem: str


class GroupSettings(BaseModel):
    """One parameter group: what is decided for the next step, and what the last receipt says was applied."""

    group: str
    lr: float
    momentum: float | None
    noise_std: float
    applied_lr: float | str | None
    reference_lr: float


class ShadowDetail(BaseModel):
    """A policy that decides beside the run's own and is never applied: its newest decision, learning rates by group."""

    policy_config: dict[str, Any]
    base: dict[str, Any] | None
    phase: str
    decision: str
    lr: dict[str, float]


class OpenCommand(BaseModel):
    """A command that is not over: see `GET /v1/runs/RUN/commands/ID` for what happened to it so far.
    clamped_to: what the guard left of it where it is clamped."""

    id: str
    kind: str
    status: str
    actor: str
    reason: str
    until_step: int | None
    expires_at: str | None
    clamped: bool
    clamped_to: str


class OpenProposal(BaseModel):
    """A command that waits to be approved: by `needed` people, of whom `approved` have."""

    id: str
    kind: str
    actor: str
    reason: str
    needed: int
    approved: list[str]


class ControlDetail(BaseModel):
    """A scalar that the job declared: decided for the next step, and as of the last receipt."""

    control: str
    value: float
    applied: float | str | None
    declared: float
    min: float
    max: float


class Foreign(BaseModel):
    """Somebody else wrote a setting: who and what, in words, and at which step of which attempt it was noticed."""

    words: str
    step: int
    attempt: int


class RunDetail(RunSummary):
    """A run with its folded state. signals: the newest measured value of each. The policy, base and guard are those in
    force, whatever the run was begun with. command_seq: the row of the newest command: `If-Match` must not be older."""

    mode: str
    seed: int
    lag: int | None
    phase: str
    decision: str
    reason: str
    decided_step: int
    applied_step: int | None
    observations: int
    settings: list[GroupSettings]
    signals: dict[str, float | str]
    policy_config: dict[str, Any]
    profile: str
    base: dict[str, Any] | None
    guard: dict[str, Any]
    shadows: dict[str, ShadowDetail]
    commands: list[OpenCommand]
    proposals: list[OpenProposal]
    command_seq: int
    controls: list[ControlDetail]
    conflicts: list[Foreign]


class RunPage(BaseModel):
    """One page of runs; `cursor` asks for the next one, null at the end."""

    runs: list[RunSummary]
    cursor: str | None


def router(service: Service) -> APIRouter:
    """The read-only routes."""
    routes = APIRouter(prefix="/v1", tags=["runs"])

    @routes.get("/runs")
    async def list_runs(
        request: Request,
        project: str | None = None,
        status: str | None = None,
        policy: str | None = None,
        label: Annotated[list[str] | None, Query(description="KEY=VALUE, may be repeated; all must match")] = None,
        cursor: str | None = None,
        limit: Count = 50,
    ) -> RunPage:
        """Runs, newest first; deleted ones only by their status. status: created, active, stale, lost, finished,
        failed, deleted; policy: NAME or NAME@VERSION."""
        where = RunFilter(project, status, policy, _labels(label or []))
        views, following = await service.list_runs(where, cursor, limit, caller_of(request))
        return RunPage(runs=[RunSummary(**_summary(view)) for view in views], cursor=following or None)

    @routes.get("/runs/{run}")
    async def get_run(run: str, request: Request, response: Response) -> RunDetail:
        """One run: status, attempt, step, settings now, newest signals, policy, staleness, commands, conflicts. Its
        ETag is what a command's If-Match takes."""
        found = detail(await service.get_run(run, caller_of(request)))
        response.headers["ETag"] = f'"{found.seq}"'
        return found

    @routes.get("/runs/{run}/series")
    async def series(
        run: str,
        request: Request,
        signals: Annotated[str, Query(description="comma-separated: loss, lr:GROUP, decided_lr:GROUP ...")] = "loss",
        points: Count = 2000,
        from_step: Annotated[Count | None, Query(alias="from")] = None,
        to_step: Annotated[Count | None, Query(alias="to")] = None,
        attempt: Count | None = None,
    ) -> dict[str, Any]:
        """Signals and settings over the steps, thinned to the smallest and largest of equal step ranges."""
        names = [name.strip() for name in signals.split(",") if name.strip()]
        asked = SeriesRequest(names, points, from_step, to_step, attempt)
        return await service.series(run, asked, caller_of(request))

    @routes.get("/runs/{run}/decisions")
    async def decisions(
        run: str, request: Request, after: Count = 0, limit: Count = 1000, newest: bool = False, shadow: str = ""
    ) -> dict[str, Any]:
        """The decisions that moved something, with code, reason and numbers, in journal order.

        `after`: a journal seq, the `next` of the page before. `newest`: the last `limit` ones instead. `shadow`: those
        of the run's shadow policy of this name.
        """
        caller = caller_of(request)
        return await service.decisions(run, caller, after=after, limit=limit, newest=newest, shadow=shadow)

    @routes.get("/runs/{run}/episodes")
    async def episodes(run: str, request: Request) -> dict[str, Any]:
        """Of a run under `aees`: arms, rewards, losses and steps of its closed episodes, one list each."""
        return await service.episodes(run, caller_of(request))

    @routes.get("/policies")
    async def policies(request: Request) -> dict[str, Any]:
        """Every policy and base schedule with the JSON Schema of its parameters; presets, guards and profiles."""
        return {
            "policies": [
                {"name": p.name, "version": p.version, "summary": summary(n), "schema": json_schema(n)}
                for n, p in POLICIES.items()
            ],
            "base_schedules": [
                {"name": n, "summary": summary(n, base=True), "schema": json_schema(n, base=True)} for n in SCHEDULES
            ],
            "presets": [{"name": n, "summary": p.about, "policy": p.spec} for n, p in PRESETS.items()],
            "guards": [{"name": n, "summary": p.about, "guard": p.spec} for n, p in GUARDS.items()],
            "guard_schema": guard_schema(),
            "profiles": [
                {"name": p.name, "summary": p.about, "policy": p.policy, "guard": p.guard}
                for p in service.profiles(caller_of(request)).values()
            ],
        }

    return routes


def _labels(pairs: list[str]) -> dict[str, str] | None:
    out = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise Invalid(f"label is {pair!r}: give KEY=VALUE")
        out[key] = value
    return out or None


def _summary(view: RunView) -> dict[str, Any]:
    record = view.record
    return {
        **{name: getattr(record, name) for name in ("run", "project", "name", "policy", "attempt", "step", "seq")},
        "status": view.status,
        "labels": dict(record.labels),
        "created_at": records.utc(record.created_at),
        "updated_at": records.utc(record.updated_at),
        "stale_s": round(view.stale_s, 3),
        "digest": record.hash.hex(),
        "problem": view.problem,
    }


def detail(view: RunView) -> RunDetail:
    """A run with its folded state."""
    assert view.run is not None and view.spec is not None
    run, spec = view.run, spec_under(view.spec, view.run)
    beside = run.steering
    values = control_values(beside.controls, beside.commands, run.through + 1)
    now, applied = run.settings, run.applied
    settings = [
        GroupSettings(
            group=group.name,
            lr=now.lr[i],
            momentum=group.momentum if now.momentum is None else now.momentum[i],
            noise_std=0.0 if now.noise_std is None else now.noise_std[i],
            applied_lr=None if applied is None else plain(applied.lr[i]),
            reference_lr=group.lr,
        )
        for i, group in enumerate(spec.groups)
    ]
    return RunDetail(
        **_summary(view),
        mode=spec.mode,
        seed=spec.seed,
        lag=run.lag,
        phase=run.decision.phase,
        decision=run.decision.code,
        reason=view.reason,
        decided_step=run.decided,
        applied_step=run.applied_step,
        observations=run.observations,
        settings=settings,
        signals={name: plain(value) for name, value in run.last.items()},
        policy_config=dict(spec.policy),
        profile=spec.profile,
        base=None if spec.base is None else dict(spec.base),
        guard=dict(spec.guard),
        shadows={
            name: ShadowDetail(
                policy_config=dict(beside["policy"]),
                base=beside["base"],
                phase=state.decision.phase,
                decision=state.decision.code,
                lr=dict(zip((g.name for g in spec.groups), state.settings.lr, strict=True)),
            )
            for (name, beside), state in zip(spec.shadows.items(), run.shadows, strict=True)
        },
        commands=[_command(one, [group.name for group in spec.groups]) for one in beside.commands],
        proposals=[OpenProposal(**{n: getattr(one, n) for n in OpenProposal.model_fields}) for one in beside.proposals],
        command_seq=beside.newest,
        controls=[
            ControlDetail(
                control=one.name,
                value=values[one.name],
                applied=plain(beside.applied_controls[one.name]) if one.name in beside.applied_controls else None,
                declared=one.value,
                min=one.min,
                max=one.max,
            )
            for one in beside.controls
        ],
        conflicts=[Foreign(words=words, step=step, attempt=attempt) for words, step, attempt in beside.conflicts],
    )


def _command(one: Command, groups: Sequence[str]) -> OpenCommand:
    expires_at = None if one.expires_at is None else records.utc(one.expires_at)
    fields = {name: getattr(one, name) for name in ("id", "kind", "status", "actor", "reason", "clamped")}
    held = None if one.held is None else one.held._asdict()
    left = clamped_to(one.args, held, groups) if one.clamped else ""
    return OpenCommand(**fields, until_step=one.until, expires_at=expires_at, clamped_to=left)
