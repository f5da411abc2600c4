"""The gRPC transport: one bidirectional stream per run. Needs `pip install flyball[grpc]`.

Rule of this module: tuples to protobuf and back, nothing else. A dead peer is noticed by keep-alive pings, so
that even a stream without its own deadline ends.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from flyball import limits, wire
from flyball.errors import LinkError, Refused
from flyball.secure import tls_hint
from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc

_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.NOT_FOUND: "not_found",
    grpc.StatusCode.ABORTED: "conflict",
    grpc.StatusCode.PERMISSION_DENIED: "denied",
    grpc.StatusCode.UNAUTHENTICATED: "denied",
}

_OPTIONS = (
    ("grpc.keepalive_time_ms", int(limits.ANSWER_S * 1000 / 2)),
    ("grpc.keepalive_timeout_ms", int(limits.ANSWER_S * 1000 / 2)),
    ("grpc.http2.ping_timeout_ms", int(limits.ANSWER_S * 1000 / 2)),
    ("grpc.http2.max_pings_without_data", 0),
    # A connection per run: a shared one would let a stalled run hold up its neighbours.
    ("grpc.use_local_subchannel_pool", 1),
    # Our own link decides when to try again.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class GrpcTransport:
    """Speaks to `target` (host:port), with a bearer token if there is one. certificates: for TLS, the CA's, this
    process's own and its key, each None where there is none."""

    def __init__(
        self,
        target: str,
        token: str | None,
        certificates: tuple[bytes | None, bytes | None, bytes | None] | None = None,
    ) -> None:
        self._hint = tls_hint("grpc" if certificates is None else "grpcs", "")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        if certificates is not None:
            ca, cert, key = certificates
            credentials = grpc.ssl_channel_credentials(ca, key, cert)
            self._channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._outgoing: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._call: Any = None

    def attach(self, message: wire.Attach) -> wire.Attached:
        """Open the stream and say Attach."""
        self._connect()
        stub = pb_grpc.SteeringStub(self._channel)
        self._call = stub.Steer(iter(self._outgoing.get, None), metadata=self._metadata)
        return _attached(self._exchange(pb.ClientMessage(attach=_attach(message))).attached)

    def _connect(self) -> None:
        """Wait for the connection; a refused one is known at once, and not only when the time is up."""
        known = threading.Event()
        state = grpc.ChannelConnectivity.IDLE

        def changed(now: grpc.ChannelConnectivity) -> None:
            nonlocal state
            state = now
            if now not in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                known.set()

        self._channel.subscribe(changed, try_to_connect=True)
        try:
            if not known.wait(limits.CONNECT_S):
                raise LinkError(f"no connection within {limits.CONNECT_S:g} s")
            if state is not grpc.ChannelConnectivity.READY:
                raise LinkError(f"cannot connect: is the service running, and is that its gRPC port? {self._hint}")
        finally:
            self._channel.unsubscribe(changed)

    def report(self, message: wire.Report) -> wire.Advice:
        """Send a report and wait for its advice."""
        return _advice(self._exchange(pb.ClientMessage(report=_report(message))).advice)

    def close(self) -> None:
        """Cancel the stream, which also ends a call that waits on it."""
        self._outgoing.put(None)
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def _exchange(self, message: pb.ClientMessage) -> pb.ServerMessage:
        self._outgoing.put(message)
        try:
            answer: pb.ServerMessage = next(self._call)
            return answer
        except StopIteration:
            raise LinkError("the service ended the stream") from None
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code in _REFUSALS:
                raise Refused(_REFUSALS[code], str(details)) from error
            raise LinkError(f"{code.name}: {details}") from error
        except ValueError as error:  # the channel was closed under the call
            raise LinkError(str(error)) from error


def _attach(m: wire.Attach) -> pb.Attach:
    groups = [
        pb.Group(name=g.name, lr=g.lr, momentum=g.momentum, betas=g.betas or (), lr_free=g.lr_free) for g in m.groups
    ]
    return pb.Attach(
        project=m.project,
        run=m.run,
        session=m.session,
        labels=dict(m.labels),
        groups=groups,
        policy_json=json.dumps(m.policy),
        base_json="" if m.base is None else json.dumps(m.base),
        guard_json=json.dumps(m.guard) if m.guard else "",
        mode=m.mode,
        seed=m.seed,
        lag=m.lag,
        resume=m.resume,
        from_step=m.from_step,
        from_attempt=m.from_attempt,
        seq=m.seq,
        digest=m.digest,
        client=m.client,
        shadows_json=json.dumps(m.shadows) if m.shadows else "",
        fork=None if m.fork is None else pb.Fork(**m.fork._asdict()),
        on_unknown=m.on_unknown,
    )


def _report(m: wire.Report) -> pb.Report:
    return pb.Report(
        run=m.run,
        session=m.session,
        attempt=m.attempt,
        step=m.steps,
        signals=[_column(name, values) for name, values in m.signals.items()],
        receipts=[_receipt(r) for r in m.receipts],
        answers=[pb.DirectiveAnswer(**answer._asdict()) for answer in m.answers],
        end=m.end,
        controls=[pb.Control(**control._asdict()) for control in m.controls],
    )


def _column(name: str, values: Sequence[float | None]) -> pb.Column:
    if None not in values:
        return pb.Column(name=name, value=values)  # type: ignore[arg-type]
    missing = [i for i, v in enumerate(values) if v is None]
    return pb.Column(name=name, value=[0.0 if v is None else v for v in values], missing=missing)


def _receipt(r: wire.Receipt) -> pb.Receipt:
    settings = r.settings
    return pb.Receipt(
        number=r.number,
        step=r.step,
        decided=r.decided,
        lr=settings.lr,
        momentum=None if settings.momentum is None else [0.0 if m is None else m for m in settings.momentum],
        noise_std=settings.noise_std,
        late=r.late,
        conflict=r.conflict,
        ranks=r.ranks,
        confirms=r.confirms,
        controls=r.controls,
        wanted_lr=r.wanted_lr,
        of_ranks=r.of_ranks,
    )


def _attached(m: pb.Attached) -> wire.Attached:
    return wire.Attached(
        run=m.run,
        attempt=m.attempt,
        from_step=m.from_step,
        through=m.through,
        receipts_through=m.receipts_through,
        seq=m.seq,
        digest=m.digest,
        policy=m.policy,
        changes=tuple(_changes(m.changes)),
        phase=m.phase,
        code=m.code,
        reason=m.reason,
        reference=tuple(m.reference),
        seed=m.seed,
        guard=_json(m.guard_json),
        controls=dict(m.controls),
        confirm=m.confirm,
    )


def _json(text: str) -> Any:
    """The mapping in `text`; the text itself where it is no JSON, for the session to say so."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _advice(m: pb.Advice) -> wire.Advice:
    return wire.Advice(
        attempt=m.attempt,
        through=m.through,
        receipts_through=m.receipts_through,
        seq=m.seq,
        digest=m.digest,
        changes=tuple(_changes(m.changes)),
        phase=m.phase,
        code=m.code,
        reason=m.reason,
        directives=tuple(wire.Directive(d.id, d.kind, _json(d.args_json)) for d in m.directives),
        confirm=m.confirm,
        controls=dict(m.controls),
        guard=_json(m.guard_json),
        notices=tuple(m.notices),
    )


def _changes(m: pb.Changes) -> Iterator[tuple[int, wire.Settings]]:
    count = len(m.decided)
    groups = len(m.lr) // count if count else 0
    lr, momentum, noise = list(m.lr), list(m.momentum), list(m.noise_std)
    for i, decided in enumerate(m.decided):
        part = slice(i * groups, (i + 1) * groups)
        noises = _row(noise[part])
        std = None if noises is None else tuple(n or 0.0 for n in noises)
        yield decided, wire.Settings(tuple(lr[part]), _row(momentum[part]), std)


def _row(values: list[float]) -> tuple[float | None, ...] | None:
    """NaN says nothing about its group; a row of them about none."""
    row = tuple(None if value != value else value for value in values)
    return row if any(value is not None for value in row) else None
