"""Where everything is wired together: store, engine, service, both skins. The only place that builds things.

Order of starting: bind the sockets, open the journal, then serve. Order of stopping: refuse new work, let what
is in flight finish, commit and close the journal. Killing the process at any point of it loses nothing that
was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn

from flyball_server import grpc_api, http_api
from flyball_server.audit.auditing import Auditing
from flyball_server.audit.heads import Heads
from flyball_server.audit.hook_files import load_hooks
from flyball_server.audit.webhooks import Hooks
from flyball_server.auth.access import Caller
from flyball_server.auth.door import Door, OpenDoor, TokenDoor
from flyball_server.auth.refusals import Refusals
from flyball_server.auth.tls import open_tls
from flyball_server.auth.tokens import Tokens
from flyball_server.commands.commanding import Commanding
from flyball_server.core.errors import Invalid
from flyball_server.engine import Engine
from flyball_server.exports.exchange import Exchange
from flyball_server.exports.imports import Imports
from flyball_server.fleet.canaries import Canaries
from flyball_server.fleet.fleet import Fleet
from flyball_server.fleet.freezing import Freezing
from flyball_server.http_api.protocol import BoundedProtocol
from flyball_server.limits import CONNECTIONS_MAX, DRAIN_S, KEEP_ALIVE_S
from flyball_server.profiles import load_profiles
from flyball_server.projects import NOWHERE, load_projects
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.settings import Settings, split_address
from flyball_server.signing import Signer, new_signer, open_signer
from flyball_server.storage import open_journal
from flyball_server.storage.journal import Journal
from flyball_server.tail import Tail

log = logging.getLogger("flyball_server")


def version() -> str:
    """The version of the installed distribution."""
    try:
        return installed_version("flyball")
    except PackageNotFoundError:
        return "0+unknown"


async def serve(settings: Settings, stop: asyncio.Event, started: Callable[[str, str, Tokens], None]) -> None:
    """Serve until `stop` is set, then drain and return. `started` is told the HTTP and gRPC addresses, with schemes.

    Raises OSError where an address is taken, Invalid for a wrong profile or project or an address of a store
    that means nothing, an error naming the file where the store cannot be opened.
    """
    for name in ("httpx", "httpcore"):  # they log every request with its address, and a webhook's may hold secrets
        logging.getLogger(name).setLevel(logging.WARNING)
    profiles = load_profiles(settings.profiles) if settings.profiles else {}
    projects = load_projects(settings.projects) if settings.projects else NOWHERE
    named_hooks = load_hooks(settings.webhooks, os.environ) if settings.webhooks else {}
    tls = open_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    sock = _bind(settings.http)
    journal = open_journal(settings.store, bytes_max=settings.store_bytes_max, disk_free_min=settings.disk_free_min)
    hooks = Hooks(named_hooks, journal, _now_us)
    engine = Engine(journal, rules_of, _now_us, hooks)
    tail = Tail(engine.ledger)
    freezing, imports = Freezing(engine, journal, tail), Imports(journal, tail)
    service = Service(engine, journal, profiles, projects, freezing)
    tokens, refusals = Tokens(engine.ledger, tail, engine.now_us, os.urandom), Refusals(engine.ledger)
    commanding = Commanding(engine, journal, profiles, projects, freezing, imports, tokens.makers)
    fleet = Fleet(engine, journal, commanding, tail)
    canaries = Canaries(
        engine, journal, tail, fleet=fleet, commanding=commanding, freezing=freezing, lapsed=tokens.lapsed
    )
    door = _door(settings, tokens, refusals)
    ready = threading.Event()
    credentials = None if tls is None else tls.grpc()
    grpc_server, grpc_port = grpc_api.serve(service, settings.grpc, door=door, credentials=credentials)
    try:
        await engine.start()
        # Behind the journal's lock: of two services on one file only one makes the key.
        signer = signer_of(settings)
        heads = Heads(journal, engine.ledger, signer, _now_us)
        exchange = Exchange(engine, journal, signer, version(), heads)
        if settings.auth:
            await _check_tokens(tokens, settings.store)
        auditing = Auditing(engine, journal, imports)
        many = http_api.Many(fleet, freezing, canaries)
        parts = http_api.Parts(service, commanding, many, exchange, tokens, auditing, heads, hooks)
        app = http_api.build(parts, door=door, version=version(), is_ready=ready.is_set)
        options: dict[str, Any] = {} if tls is None else tls.uvicorn()
        config = uvicorn.Config(app, http=BoundedProtocol, log_config=None, access_log=False, lifespan="off", **options)
        config.limit_concurrency = CONNECTIONS_MAX
        # Anybody could name another address as theirs; what tells callers apart behind a proxy are tokens.
        config.proxy_headers = config.server_header = False
        # Training steps may be a minute apart; a client that finds its connection closed has to come again.
        config.timeout_keep_alive = KEEP_ALIVE_S
        config.timeout_graceful_shutdown = int(DRAIN_S)
        http_server = _HttpServer(config)
        await grpc_server.start()
        http_task = asyncio.create_task(http_server.serve(sockets=[sock]))
        while not http_server.started and not http_task.done():
            await asyncio.sleep(0.005)
        await tail.refresh_if_possible()  # before anybody is heard: who asks for a run may not see it unfrozen
        works = (
            commanding.sweep(),
            tail.watch(),
            canaries.watch(),
            hooks.run(),
            heads.keep_signing(settings.heads_every_s),
        )
        working = [asyncio.create_task(work) for work in works]
        ready.set()
        s = "" if tls is None else "s"
        http_address = _address(settings.http, sock.getsockname()[1])
        started(f"http{s}://{http_address}", f"grpc{s}://{_address(settings.grpc, grpc_port)}", tokens)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, http_task}, return_when=asyncio.FIRST_COMPLETED)
        ready.clear()
        # Streams of training jobs never end by themselves; a second is ample for a report under way, and what
        # is cut off after that was not acknowledged and comes again.
        await grpc_server.stop(grace=1.0)
        http_server.should_exit = True
        stopping.cancel()
        for work in working:
            work.cancel()
        await http_task
        await asyncio.gather(*working, return_exceptions=True)
    finally:
        await refusals.close()
        await engine.close()
        sock.close()


@contextlib.asynccontextmanager
async def beside(store: str) -> AsyncIterator[Tokens]:
    """The tokens of a store, to be read and written beside the service that runs on it, if one does.

    A store that does not exist is made. Raises Invalid for one that keeps nothing.
    """
    journal = open_journal(store, beside=True)
    if store == "memory:":
        raise Invalid("store is 'memory:', where nothing is kept: name the file the service is started with")
    engine = _engine(journal)
    try:
        await engine.start()
    except Invalid:  # there is no such file yet, or one of an older version: as its owner, then
        engine = _engine(open_journal(store))
        await engine.start()
    try:
        yield Tokens(engine.ledger, Tail(engine.ledger), engine.now_us, os.urandom)
    finally:
        await engine.close()


def _now_us() -> int:
    return time.time_ns() // 1000


def _engine(journal: Journal) -> Engine:
    return Engine(journal, rules_of, _now_us)


def _door(settings: Settings, tokens: Tokens, refusals: Refusals) -> Door:
    if settings.auth:
        return TokenDoor(tokens, refusals, settings.requests_per_s)
    return OpenDoor(refusals, settings.requests_per_s)


async def _check_tokens(tokens: Tokens, store: str) -> None:
    """Say how to make a token where there is none: everybody will be refused."""
    await tokens.refresh()
    if not tokens.any_valid():
        log.warning(
            "no token is valid, so every request will be refused; this makes one for an admin: "
            "flyball-server token create --name admin --role admin --store %s",
            store,
        )


def signer_of(settings: Settings) -> Signer:
    """The key that exports are signed with: the named file's, else the one beside the store, made where it is missing;
    of a store in memory one that ends with the process. Raises Invalid for a file that holds none."""
    if settings.signing_key:
        return open_signer(Path(settings.signing_key), make=False)
    return new_signer() if settings.own_key is None else open_signer(settings.own_key, make=True)


#: Who asks in the process itself, or on the machine that holds the store.
LOCAL = Caller(f"local:{os.getuid()}" if hasattr(os, "getuid") else "local", "admin")
#: What the environment says is for the service of a machine, and not for one inside a test or a notebook.
_ALONE = {"auth": False, "insecure": False, "tls_cert": "", "tls_key": "", "tls_client_ca": "", "webhooks": ""}


class Running:
    """A real service on a thread of this process, for tests and notebooks; see `running`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._tokens: Tokens | None = None
        self._up = threading.Event()
        self.http = ""
        self.grpc = ""

    def start(self) -> Running:
        """Start and return once it serves. Raises what `serve` raises."""
        self._up.clear()
        self._error = None
        self._thread = threading.Thread(target=self._main, name="flyball-server", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def new_token(self, role: str = "admin", projects: Collection[str] | None = None, name: str = "local") -> str:
        """The secret of a new token, made in this process, where nobody needs one to ask."""
        assert self._loop is not None, "start() comes first"
        made = asyncio.run_coroutine_threadsafe(self._new_token(role, projects, name), self._loop)
        return made.result()

    def stop(self) -> None:
        """Drain, flush and end; may be called twice."""
        if self._thread is not None and self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Running:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await serve(self._settings, self._stop, self._started)

    async def _new_token(self, role: str, projects: Collection[str] | None, name: str) -> str:
        assert self._tokens is not None
        return str((await self._tokens.create(name, role, projects, None, LOCAL))["secret"])

    def _started(self, http: str, grpc: str, tokens: Tokens) -> None:
        self.http, self.grpc, self._tokens = http, grpc, tokens
        self._up.set()


def running(
    store: str = "memory:",
    http: str = "127.0.0.1:0",
    grpc: str = "127.0.0.1:0",
    profiles: str = "",
    store_bytes_max: int | None = None,
    **settings: Any,
) -> Running:
    """A real service with explicit start and stop: `with running() as service: service.http, service.grpc`.

    By default it listens on free loopback ports and keeps its journal in memory. settings: further ones, such as
    `auth=True` (`service.new_token()` makes a token), `tls_cert` and `tls_key`.
    """
    given = {"store": store, "http": http, "grpc": grpc, "profiles": profiles, "store_bytes_max": store_bytes_max}
    return Running(Settings(**{**_ALONE, **given, **settings}))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where it is installed, else the standard one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _bind(address: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}; name another address") from error


def _address(asked: str, port: int) -> str:
    return f"{asked.rpartition(':')[0]}:{port}"


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: `serve` decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield
