"""The gRPC skin: protobuf to messages and back, one table of statuses, nothing else.

Rule of this module: no decision is taken here; every call is one call of the service.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from math import ceil
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc
from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.auth.door import Door, Peer
from flyball_server.core.commands import Control
from flyball_server.core.errors import Busy, Denied, Invalid, SteeringError
from flyball_server.core.events import DirectiveAnswered, Receipt
from flyball_server.core.types import Group, Settings
from flyball_server.messages import Advice, Attach, Attached, Fork, Report, SideReport
from flyball_server.service import RunView, Service
from flyball_server.storage.journal import RunFilter

log = logging.getLogger("flyball_server")

STATUS = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "conflict": grpc.StatusCode.ABORTED,
    "stale": grpc.StatusCode.ABORTED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "denied": grpc.StatusCode.PERMISSION_DENIED,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "damaged": grpc.StatusCode.DATA_LOSS,
    "internal": grpc.StatusCode.INTERNAL,
}

NAN = float("nan")
_OPTIONS = (
    # At the default a fifth of 5 000 streams opened at once is turned away.
    ("grpc.server.max_pending_requests", limits.STREAMS_MAX),
    ("grpc.server.max_pending_requests_hard_limit", 2 * limits.STREAMS_MAX),
    ("grpc.max_concurrent_streams", limits.STREAMS_MAX),
    ("grpc.max_receive_message_length", limits.BODY_BYTES_MAX),
    # Clients ping to notice a dead link; a training job may be silent for minutes between two steps.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)


class Steering(pb_grpc.SteeringServicer):
    """The servicer; its methods have the names of steering.proto. door: who comes in.

    Requests that are one message come as bytes: nothing is read of what nobody has vouched for.
    """

    def __init__(self, service: Service, door: Door) -> None:
        self._service = service
        self._door = door

    async def Steer(  # noqa: N802 - the name is the contract's
        self, request_iterator: AsyncIterator[pb.ClientMessage], context: Any
    ) -> AsyncIterator[pb.ServerMessage]:
        """One training job's conversation: every message is answered by one message."""
        async with self._call(context) as call:
            await call.admit()
            async for message in request_iterator:
                # A token may have been revoked, or have expired, since the stream was opened.
                caller = await call.admit_again()
                if message.HasField("report"):
                    advice = await self._service.report(read_report(message.report), caller)
                    yield pb.ServerMessage(advice=write_advice(advice))
                elif message.HasField("attach"):
                    attached = await self._service.attach(read_attach(message.attach), caller)
                    yield pb.ServerMessage(attached=write_attached(attached))
                else:
                    raise Invalid("the message holds neither attach nor report: is the client newer than the service?")

    async def AddSignals(self, data: bytes, context: Any) -> pb.AddSignalsReply:  # noqa: N802
        """Side signals from another process."""
        async with self._call(context) as call:
            caller = await call.admit()
            request = pb.AddSignalsRequest.FromString(data)
            said = SideReport(dict(request.signals), request.source, request.number, request.note)
            seq = await self._service.add_signals(request.run, said, caller)
        return pb.AddSignalsReply(seq=seq)

    async def GetRun(self, data: bytes, context: Any) -> pb.RunStatus:  # noqa: N802
        """One run."""
        async with self._call(context) as call:
            caller = await call.admit()
            view = await self._service.get_run(pb.GetRunRequest.FromString(data).run, caller)
        return write_run(view)

    async def ListRuns(self, data: bytes, context: Any) -> pb.ListRunsReply:  # noqa: N802
        """One page of runs."""
        async with self._call(context) as call:
            caller = await call.admit()
            request = pb.ListRunsRequest.FromString(data)
            where = RunFilter(
                request.project or None, request.status or None, request.policy or None, dict(request.labels) or None
            )
            runs, cursor = await self._service.list_runs(where, request.cursor or None, request.limit or 50, caller)
        return pb.ListRunsReply(runs=[write_run(run) for run in runs], cursor=cursor)

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncIterator[_Call]:
        """Every error as its gRPC status; what nobody thought of stands in the log, not in the answer."""
        call = _Call(self._door, context)
        try:
            yield call
        except SteeringError as error:
            if isinstance(error, Denied):
                call.denied(str(error))
            if isinstance(error, Busy):
                context.set_trailing_metadata((("retry-after", str(max(1, ceil(error.retry_after_s)))),))
            await context.abort(STATUS[error.code], str(error))
        except grpc.aio.AbortError:
            raise
        except DecodeError as error:
            await context.abort(STATUS["invalid"], f"these bytes are no message of this service: {error}")
        except Exception:
            log.exception("a call failed")
            await context.abort(STATUS["internal"], "an unexpected error; the service's log has it")


class _Call:
    """One call, and who makes it."""

    def __init__(self, door: Door, context: Any) -> None:
        peer = context.peer()
        self._door = door
        self._peer = Peer(f"grpc:{peer}", _address(peer))
        found = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        # Of several nobody knows which one counts.
        self._authorization = found[0] if len(found) == 1 and isinstance(found[0], str) else None
        self._caller: Caller | None = None

    async def admit(self) -> Caller:
        self._caller = await self._door.admit(self._peer, self._authorization)
        return self._caller

    async def admit_again(self) -> Caller:
        self._caller = await self._door.admit_again(self._peer, self._authorization)
        return self._caller

    def denied(self, why: str) -> None:
        if self._caller is not None:
            self._door.denied(self._caller, self._peer, why)


def _address(peer: str) -> str:
    """The address in what gRPC calls a peer, such as ipv4:127.0.0.1:5000, as HTTP has it."""
    kind, _, rest = peer.partition(":")
    return unquote(rest.rpartition(":")[0]).strip("[]") if kind in ("ipv4", "ipv6") else peer


def serve(
    service: Service, address: str, *, door: Door, credentials: grpc.ServerCredentials | None
) -> tuple[grpc.aio.Server, int]:
    """A server bound to `address` (host:port, port 0 = any free one) but not started; and its port. credentials: those
    of TLS, None without.

    Raises OSError where the address is taken.
    """
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((_handlers(Steering(service, door)),))
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise OSError(f"cannot listen on {address}: is another service there?")
    return server, port


def _handlers(steering: Steering) -> grpc.GenericRpcHandler[Any, Any]:
    """What the generated code would register, but for what reads the requests of one message."""
    contract = pb.DESCRIPTOR.services_by_name["Steering"]
    stream = grpc.stream_stream_rpc_method_handler(
        steering.Steer, pb.ClientMessage.FromString, pb.ServerMessage.SerializeToString
    )
    handlers = {"Steer": stream}
    for method in contract.methods:
        if method.name != "Steer":
            write = getattr(pb, method.output_type.name).SerializeToString
            act = getattr(steering, method.name)
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(act, response_serializer=write)
    return grpc.method_handlers_generic_handler(contract.full_name, handlers)


def _mapping(field: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{field} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Invalid(f"{field} is {text!r:.80}: give a JSON object")
    return value


def read_attach(m: pb.Attach) -> Attach:
    """Protobuf to message."""
    return Attach(
        project=m.project,
        run=m.run,
        session=m.session,
        labels=dict(m.labels),
        groups=tuple(_group(g) for g in m.groups),
        policy=_mapping("policy_json", m.policy_json) if m.policy_json else {},
        base=_mapping("base_json", m.base_json) if m.base_json else None,
        guard=_mapping("guard_json", m.guard_json) if m.guard_json else {},
        mode=m.mode or "absolute",
        seed=m.seed,
        lag=m.lag if m.HasField("lag") else None,
        resume=m.resume,
        from_step=m.from_step if m.HasField("from_step") else None,
        from_attempt=m.from_attempt if m.HasField("from_attempt") else None,
        seq=m.seq,
        digest=m.digest,
        client=m.client,
        shadows=_mapping("shadows_json", m.shadows_json) if m.shadows_json else {},
        fork=_fork(m.fork) if m.HasField("fork") else None,
        on_unknown=m.on_unknown or "refuse",
    )


def _fork(m: pb.Fork) -> Fork:
    attempt = m.attempt if m.HasField("attempt") else None
    return Fork(m.run, attempt, m.step if m.HasField("step") else None, m.seq, m.digest)


def _group(g: pb.Group) -> Group:
    if len(g.betas) not in (0, 2):
        raise Invalid(f"groups: {g.name}.betas has {len(g.betas)} values: give none or two")
    betas = (g.betas[0], g.betas[1]) if g.betas else None
    return Group(g.name, g.lr, g.momentum if g.HasField("momentum") else None, betas, g.lr_free)


def read_report(m: pb.Report) -> Report:
    """Protobuf to message; columns become lists in one C call each."""
    signals: dict[str, list[float | None]] = {}
    for column in m.signals:
        if column.name in signals:
            raise Invalid(f"signals: {column.name} is given twice")
        values: list[float | None] = list(column.value)
        for index in column.missing:
            if index >= len(values):
                raise Invalid(f"signals: {column.name}.missing has {index}, but there are {len(values)} values")
            values[index] = None
        signals[column.name] = values
    receipts = tuple(_receipt(r) for r in m.receipts) if m.receipts else ()
    answers = tuple(DirectiveAnswered(m.attempt, a.directive, a.outcome, a.note, a.step) for a in m.answers)
    controls = tuple(Control(c.name, c.value, c.min, c.max) for c in m.controls) if m.controls else ()
    return Report(m.run, m.session, m.attempt, list(m.step), signals, receipts, answers, m.end, controls)


def _receipt(r: pb.Receipt) -> Receipt:
    settings = Settings(tuple(r.lr), tuple(r.momentum) or None, tuple(r.noise_std) or None)
    wanted = tuple(r.wanted_lr) or None
    return Receipt(
        r.number, r.step, r.decided, settings, r.late, r.conflict, r.ranks or 1, r.confirms, dict(r.controls), wanted,
        r.of_ranks,
    )  # fmt: skip


def write_changes(changes: Sequence[tuple[int, Settings]]) -> pb.Changes:
    """Settings by the step that decided them, flattened row by row."""
    first = changes[0][1]
    if len(changes) == 1 and first.momentum is None and first.noise_std is None:
        return pb.Changes(decided=[changes[0][0]], lr=first.lr)
    out = pb.Changes(decided=[step for step, _ in changes])
    groups = len(first.lr)
    for _, settings in changes:
        out.lr.extend(settings.lr)
    for name in ("momentum", "noise_std"):
        if any(getattr(s, name) is not None for _, s in changes):
            field = getattr(out, name)
            for _, settings in changes:
                # NaN says nothing: about this group, or, all along the row, about any.
                row = getattr(settings, name) or (None,) * groups
                field.extend(NAN if v is None else v for v in row)
    return out


def write_attached(a: Attached) -> pb.Attached:
    """Message to protobuf."""
    return pb.Attached(
        run=a.run,
        attempt=a.attempt,
        from_step=a.from_step,
        through=a.through,
        receipts_through=a.receipts_through,
        seq=a.seq,
        digest=a.digest,
        policy=a.policy,
        changes=write_changes([*a.earlier, (a.decided, a.settings)]),
        phase=a.phase,
        code=a.code,
        reason=a.reason,
        reference=a.reference,
        seed=a.seed,
        guard_json=json.dumps(dict(a.guard)) if a.guard else "",
        controls=a.controls,
        confirm=a.confirm,
    )


def write_advice(a: Advice) -> pb.Advice:
    """Message to protobuf."""
    out = pb.Advice(
        attempt=a.attempt,
        through=a.through,
        receipts_through=a.receipts_through,
        seq=a.seq,
        digest=a.digest,
        changes=write_changes(a.changes),
        phase=a.phase,
        code=a.code,
        reason=a.reason,
    )
    if a.confirm or a.directives or a.controls or a.guard or a.notices:  # most have none of it
        out.directives.extend(
            pb.Directive(id=d.id, kind=d.kind, args_json=json.dumps(dict(d.args))) for d in a.directives
        )
        out.confirm = a.confirm
        out.controls.update(a.controls)
        out.guard_json = json.dumps(dict(a.guard)) if a.guard else ""
        out.notices.extend(a.notices)
    return out


def write_run(view: RunView) -> pb.RunStatus:
    """A run's view to protobuf; settings only where the run was folded (GetRun)."""
    record, settings = view.record, []
    if view.run is not None and view.spec is not None:
        now = view.run.settings
        for i, group in enumerate(view.spec.groups):
            entry = pb.GroupSettings(group=group.name, lr=now.lr[i])
            momentum = group.momentum if now.momentum is None else now.momentum[i]
            if momentum is not None:
                entry.momentum = momentum
            if now.noise_std is not None:
                entry.noise_std = now.noise_std[i]
            settings.append(entry)
    return pb.RunStatus(
        run=record.run,
        project=record.project,
        name=record.name,
        status=view.status,
        policy=record.policy,
        attempt=record.attempt,
        step=record.step,
        settings=settings,
        stale_s=view.stale_s,
        seq=record.seq,
        labels=record.labels,
        digest=record.hash.hex(),
    )
