"""Where a training process is wired to the service: environment, address, transport, session, link.

Rule of this module: everything that can be refused is refused here, before training has begun.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flyball.base import Base, build
from flyball.errors import FlyballError, Refused
from flyball.link import Link, Transport
from flyball.options import Options
from flyball.secure import Certificates, checked_token
from flyball.session import Session
from flyball.wire import Attach, Fork, Group

log = logging.getLogger("flyball")

#: Where the service is looked for when neither `server=` nor FLYBALL_SERVER says.
DEFAULT_SERVER = "http://127.0.0.1:1788"

#: The process that first asked for a gRPC connection, which its forked children learn from here.
_grpc_began_in: int | None = None


def connect(groups: tuple[Group, ...], one: Options) -> tuple[Session, Link]:
    """A session and its running link, for checked options. Waits up to `start_wait_s` for the service's first answer.

    Raises Refused where the service says no in that time, FlyballError or ValueError where an argument is wrong or
    an extra is missing. A service that cannot be reached is no error: the link goes on trying.
    """
    run, project, resume, fork = one["run"], one["project"], one["resume"], one["fork"]
    policy, base, shadows = one["policy"], one["base"], one["shadows"]
    # Nothing said: a resumed run goes on under its own policy, a new one keeps its settings.
    spec = {"type": policy} if isinstance(policy, str) else dict(policy or {})
    declared = _declared_base(spec, base)
    if one["on_outage"] == "base" and declared is None:
        raise ValueError("on_outage='base' needs a base schedule: declare one with base={'type': 'cosine', ...}")
    token_of = None if isinstance(resume, bool | str | None) else check_token(resume, run, project)
    message = Attach(
        project=project,
        run=run,
        session=new_session(),
        labels=dict(one["labels"] or {}),
        groups=groups,
        policy=spec,
        base=None if base is None else dict(base),
        guard=dict(one["guard"] or {}),
        mode=one["mode"],
        seed=one["seed"],
        lag=one["lag"],
        resume=bool(resume),
        from_step=None if token_of is None else token_of.step,
        from_attempt=None if token_of is None else token_of.attempt,
        seq=0 if token_of is None else token_of.seq,
        digest="" if token_of is None else token_of.digest,
        client=f"flyball/{_version()}",
        shadows={name: {"type": one} if isinstance(one, str) else one for name, one in (shadows or {}).items()},
        fork=None if fork is None else _fork(fork),
        on_unknown=one["on_unknown"],
    )
    make = transport(one["server"] or os.environ.get("FLYBALL_SERVER") or DEFAULT_SERVER, one["token"])
    session = Session(
        message, base=declared, on_outage=one["on_outage"], now=time.monotonic(), or_begin=resume == "auto"
    )
    link = Link(session, make)
    link.start()
    # A connection that is refused is no answer: the service may be about to start.
    link.wait(lambda: session.state in ("steering", "refused"), one["start_wait_s"], "the service's first answer")
    if session.state == "refused":
        link.close(0.0)
        raise Refused("refused", session.last_error)
    if session.attached is None:
        log.warning("flyball: no answer from the service yet; run %r begins with its own settings", run)
    return session, link


def transport(server: str, token: str | None) -> Callable[[], Transport]:
    """How to make a connection to `server`: grpc://, grpcs://, http:// or https://, with host and port.

    Raises FlyballError for anything else, and where gRPC is asked for but not installed, or in a forked child.
    """
    parts = urlsplit(server)
    try:
        _ = parts.port
    except ValueError as error:
        raise FlyballError(f"server is {server!r}: {error}; give a port from 1 to 65535") from None
    token = checked_token(token or os.environ.get("FLYBALL_TOKEN"))
    known = certificates()
    if parts.scheme in ("http", "https") and parts.hostname:
        from flyball.over_http import HttpTransport

        context = known.context() if parts.scheme == "https" else None
        return lambda: HttpTransport(server, token, context)
    if parts.scheme in ("grpc", "grpcs") and parts.hostname and parts.port:
        # gRPC's own fork handlers crash a forked child now and then (a DataLoader's worker, say). The link keeps
        # inherited links silent, so they are not needed. gRPC reads this when it is imported.
        _begin_grpc(server)
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        try:
            from flyball.over_grpc import GrpcTransport
        except ImportError as error:
            raise FlyballError(
                f"server is {server!r}, but gRPC is not installed ({error}): pip install 'flyball[grpc]', or use the "
                "service's http:// address, which needs nothing"
            ) from error
        if parts.scheme == "grpcs":
            known.context()  # gRPC would say nothing of a file that is no certificate, and never connect
            contents = known.contents()
            return lambda: GrpcTransport(parts.netloc, token, contents)
        return lambda: GrpcTransport(parts.netloc, token)
    raise FlyballError(
        f"server is {server!r}: give grpc://HOST:PORT or http://HOST:PORT (grpcs:// and https:// for TLS)"
    )


def _begin_grpc(server: str) -> None:
    """Remember which process uses gRPC. Raises FlyballError in a forked child of it."""
    global _grpc_began_in
    if _grpc_began_in is None:
        _grpc_began_in = os.getpid()
    if _grpc_began_in != os.getpid():
        # gRPC's threads stayed behind: making a channel would wait for them for ever, with the interpreter's lock held.
        raise FlyballError(
            f"server is {server!r}, but gRPC was begun in the parent process and does not survive a fork: use the "
            "service's http:// address in forked children, or the spawn start method"
        )


def certificates() -> Certificates:
    """The files that FLYBALL_CA, FLYBALL_CERT and FLYBALL_KEY name."""
    return Certificates(*(os.environ.get(f"FLYBALL_{name}", "") for name in ("CA", "CERT", "KEY")))


def new_session() -> str:
    """A new session id."""
    return uuid.uuid4().hex


class Token(NamedTuple):
    """A checkpoint token, checked: the next optimizer step, its attempt, and the journal's newest row then."""

    step: int
    attempt: int | None
    seq: int
    digest: str


def check_token(token: Mapping[str, Any], run: str, project: str) -> Token:
    """The token in what `state_dict` returned. Raises ValueError where it is none, or another run's."""
    step = token.get("step") if isinstance(token, Mapping) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{token!r:.80} is no checkpoint token: give what governor.state_dict() returned")
    if token.get("run") != run:
        raise ValueError(f"the checkpoint token is of run {token.get('run')!r}, but this is run {run!r}")
    if token.get("project", project) != project:
        raise ValueError(f"the checkpoint token is of project {token['project']!r:.80}, but this is {project!r}")
    return Token(step, token.get("attempt"), int(token.get("seq", 0)), str(token.get("digest", "")))


def _fork(fork: Mapping[str, Any]) -> Fork:
    """The run to leave, out of its checkpoint token or of {"run", "step"} and perhaps "project", "attempt"."""
    step = fork.get("step") if isinstance(fork, Mapping) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(fork.get("run"), str):
        raise ValueError(
            f"fork is {fork!r:.80}: give a checkpoint token of the run to leave, or {{'run': NAME, 'step': STEP}}"
        )
    project, name = fork.get("project", "default"), fork["run"]
    run = name if project == "default" else f"{project}:{name}"
    return Fork(run, fork.get("attempt"), step, int(fork.get("seq", 0)), str(fork.get("digest", "")))


def _declared_base(spec: Mapping[str, Any], base: Mapping[str, Any] | None) -> Base | None:
    """The base schedule the run declares, wherever it is written."""
    declared = base if base is not None else spec.get("base")
    if declared is None and spec:
        try:
            # A policy may be named after a schedule: {"type": "cosine", ...} is that schedule alone.
            return build(spec) if spec.get("type") != "constant" else None
        except ValueError:
            return None  # a policy proper; the service checks it
    if declared is None:
        return None
    try:
        return build(declared)
    except ValueError as error:
        raise ValueError(f"base.{error}") from error


def _version() -> str:
    try:
        return installed_version("flyball")
    except PackageNotFoundError:
        return "0+unknown"
