"""The stream's JSON twin: what a training job says over plain HTTP.

Rule of this module: same names and meanings as steering.proto. JSON has no NaN, so non-finite numbers travel as
the strings "NaN", "Infinity" and "-Infinity"; null means "not measured".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from flyball_server.core.commands import Control
from flyball_server.core.events import DirectiveAnswered, Receipt
from flyball_server.core.types import Group, Settings
from flyball_server.http_api.guarded import caller_of
from flyball_server.messages import Advice, Attach, Attached, Fork, Report, SideReport
from flyball_server.service import Service

#: The header of a request that may be repeated.
Key = Annotated[str, Header(description="repeating a request with it changes nothing")]
Number = Annotated[float, Field(description='a number, or "NaN", "Infinity", "-Infinity"')]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GroupBody(_Body):
    """A parameter group with the settings it has when the job attaches."""

    name: str
    lr: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    lr_free: bool = False


class ForkBody(_Body):
    """See Fork in steering.proto."""

    run: str
    attempt: int | None = None
    step: int | None = None
    seq: int = 0
    digest: str = ""


class AttachBody(_Body):
    """See Attach in steering.proto."""

    run: str
    session: str
    groups: list[GroupBody]
    project: str = "default"
    labels: dict[str, str] = {}
    policy: dict[str, Any] = {}
    base: dict[str, Any] | None = None
    guard: dict[str, Any] = {}
    mode: Literal["absolute", "multiplier"] = "absolute"
    seed: int = 0
    lag: int | None = None
    resume: bool = False
    from_step: int | None = None
    from_attempt: int | None = None
    seq: int = 0
    digest: str = ""
    client: str = ""
    shadows: dict[str, dict[str, Any]] = {}
    fork: ForkBody | None = None
    on_unknown: Literal["refuse", "import"] = "refuse"


class ReceiptBody(_Body):
    """See Receipt in steering.proto."""

    number: int
    step: int
    decided: int
    lr: list[Number]
    momentum: list[Number | None] | None = None
    noise_std: list[Number] | None = None
    late: bool = False
    conflict: str = ""
    ranks: int = 1
    confirms: int = 0
    controls: dict[str, Number] = {}
    wanted_lr: list[Number] | None = None
    of_ranks: int = 0


class AnswerBody(_Body):
    """See DirectiveAnswer in steering.proto."""

    directive: str
    outcome: Literal["done", "declined"]
    note: str = ""
    step: int = 0


class ControlBody(_Body):
    """See Control in steering.proto."""

    name: str
    value: float
    min: float
    max: float


class ReportBody(_Body):
    """See Report in steering.proto; `signals` has one list per signal, as long as `step`."""

    session: str
    attempt: int
    step: list[int] = []
    signals: dict[str, list[Number | None]] = {}
    receipts: list[ReceiptBody] = []
    answers: list[AnswerBody] = []
    end: Literal["", "finished", "failed"] = ""
    controls: list[ControlBody] = []


class SignalsBody(_Body):
    """Side signals by name. source, number: who reports, and its count 1, 2, 3 ...: each number is taken once."""

    signals: dict[str, Number] = {}
    source: str = ""
    number: int = 0
    note: str = ""


class ChangesBody(BaseModel):
    """See Changes in steering.proto: one row per entry, one value per group (null: the group has none)."""

    decided: list[int]
    lr: list[list[float]]
    momentum: list[list[float | None] | None] | None = None
    noise_std: list[list[float] | None] | None = None


class AttachedBody(BaseModel):
    """See Attached in steering.proto."""

    run: str
    attempt: int
    from_step: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    policy: str
    changes: ChangesBody
    phase: str
    code: str
    reason: str
    reference: list[float]
    seed: int
    guard: dict[str, Any]
    controls: dict[str, float]
    confirm: int


class DirectiveBody(BaseModel):
    """See Directive in steering.proto."""

    id: str
    kind: str
    args: dict[str, Any]


class AdviceBody(BaseModel):
    """See Advice in steering.proto."""

    attempt: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    changes: ChangesBody
    phase: str
    code: str
    reason: str
    directives: list[DirectiveBody]
    confirm: int
    controls: dict[str, float]
    guard: dict[str, Any]
    notices: list[str]


class SignalsReply(BaseModel):
    """The journal row that holds the signals."""

    seq: int


def router(service: Service) -> APIRouter:
    """The routes of a training job and of reporters."""
    routes = APIRouter(prefix="/v1", tags=["steering"])

    @routes.post("/attach")
    async def attach(body: AttachBody, request: Request) -> AttachedBody:
        """Begin a run, reconnect to it, or open a new attempt of it."""
        groups = tuple(Group(g.name, g.lr, g.momentum, g.betas, g.lr_free) for g in body.groups)
        fork = None if body.fork is None else Fork(**dict(body.fork))
        fields = {**{name: getattr(body, name) for name in Attach._fields}, "groups": groups, "fork": fork}
        return _attached(await service.attach(Attach(**fields), caller_of(request)))

    @routes.post("/runs/{run}/report")
    async def report(run: str, body: ReportBody, request: Request) -> AdviceBody:
        """What the driver saw and did; the answer is the acknowledgement and the newest settings."""
        answers = tuple(DirectiveAnswered(body.attempt, a.directive, a.outcome, a.note, a.step) for a in body.answers)
        receipts = tuple(_receipt(r) for r in body.receipts)
        message = Report(
            run,
            body.session,
            body.attempt,
            body.step,
            body.signals,
            receipts,
            answers,
            body.end,
            tuple(Control(**dict(c)) for c in body.controls),
        )
        return _advice(await service.report(message, caller_of(request)))

    @routes.post("/runs/{run}/signals")
    async def signals(run: str, body: SignalsBody, request: Request, idempotency_key: Key = "") -> SignalsReply:
        """Signals and notes from another process, such as an evaluation job; the policy sees them at the next step."""
        return SignalsReply(
            seq=await service.add_signals(run, SideReport(**dict(body), key=idempotency_key), caller_of(request))
        )

    return routes


def _receipt(r: ReceiptBody) -> Receipt:
    settings = Settings(
        tuple(r.lr),
        None if r.momentum is None else tuple(r.momentum),
        None if r.noise_std is None else tuple(r.noise_std),
    )
    wanted = None if r.wanted_lr is None else tuple(r.wanted_lr)
    return Receipt(
        r.number, r.step, r.decided, settings, r.late, r.conflict, r.ranks, r.confirms, r.controls, wanted, r.of_ranks
    )


def _changes(changes: Any) -> ChangesBody:
    settings = [s for _, s in changes]
    rows: dict[str, Any] = {
        name: [None if (row := getattr(s, name)) is None else list(row) for s in settings]
        if any(getattr(s, name) is not None for s in settings)
        else None
        for name in ("momentum", "noise_std")
    }
    return ChangesBody(decided=[d for d, _ in changes], lr=[list(s.lr) for s in settings], **rows)


def _attached(a: Attached) -> AttachedBody:
    fields = {name: value for name, value in a._asdict().items() if name not in ("decided", "settings", "earlier")}
    return AttachedBody(**fields, changes=_changes([*a.earlier, (a.decided, a.settings)]))


def _advice(a: Advice) -> AdviceBody:
    fields = {name: getattr(a, name) for name in a._fields if name not in ("changes", "directives")}
    directives = [DirectiveBody(**d._asdict()) for d in a.directives]
    return AdviceBody(**fields, directives=directives, changes=_changes(a.changes))
