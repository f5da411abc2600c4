"""The command `flyball-server`.

Rule of this module: parse, call, print. Errors go to stderr with exit code 1 (2 for a wrong command line).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flyball_server import app as application
from flyball_server.branches import otherwise
from flyball_server.core.base import SCHEDULES
from flyball_server.core.errors import Damaged, Invalid, SteeringError
from flyball_server.core.numbers import finite
from flyball_server.core.policies import POLICIES
from flyball_server.exports.check import check
from flyball_server.loading import load
from flyball_server.messages import WhatIfRequest
from flyball_server.policy_files import json_schema, load_policy
from flyball_server.policy_files import summary as about
from flyball_server.presets import GUARDS, PRESETS
from flyball_server.profiles import Profile, load_profiles
from flyball_server.rules import rules_of
from flyball_server.settings import Settings
from flyball_server.signing import fingerprint, open_signer, pem, read_public_key
from flyball_server.simulate import read_groups, simulate
from flyball_server.storage import open_journal
from flyball_server.storage.journal import Journal
from flyball_server.verify import names as verify_names
from flyball_server.verify import verify, verify_store
from flyball_server.what_if import Asked, beside, summary, what_if

cli = typer.Typer(
    name="flyball-server",
    help="The service that steers the learning rates of training jobs, and audits every move.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@cli.command()
def serve(
    http: Annotated[str | None, typer.Option(help="HOST:PORT of REST; default: 127.0.0.1:1788.")] = None,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT of gRPC; default: 127.0.0.1:1789.")] = None,
    store: Annotated[
        str | None, typer.Option(help="sqlite:///FILE, or memory:; default: sqlite:///flyball.db.")
    ] = None,
    profiles: Annotated[
        str | None, typer.Option(help="File of named policies and guards that jobs may ask for (JSON, YAML or TOML).")
    ] = None,
    store_bytes_max: Annotated[
        int | None, typer.Option(help="Bytes the store may take; beyond it appends are refused. Default: no limit.")
    ] = None,
    disk_free_min: Annotated[
        int | None, typer.Option(help="Bytes to keep free on the store's disk; default: 64 MiB.")
    ] = None,
    signing_key: Annotated[
        str | None, typer.Option(help="File of the Ed25519 key that signs exports (PEM); default: beside the store.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses that other machines reach, without authentication.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the addresses as one JSON line.")] = False,
) -> None:
    """Start the service. Options win over FLYBALL_HTTP, FLYBALL_GRPC, FLYBALL_STORE, FLYBALL_PROFILES,
    FLYBALL_STORE_BYTES_MAX, FLYBALL_DISK_FREE_MIN, FLYBALL_SIGNING_KEY and FLYBALL_INSECURE.

    SIGTERM and SIGINT drain it: requests under way finish, the journal is flushed, the exit code is 0.
    """
    given: dict[str, Any] = {
        "http": http, "grpc": grpc, "store": store, "profiles": profiles, "store_bytes_max": store_bytes_max,
        "disk_free_min": disk_free_min, "signing_key": signing_key, "insecure": insecure or None,
    }  # fmt: skip
    _log_in_utc()
    with _errors():
        settings = Settings(**{name: value for name, value in given.items() if value is not None})

        def started(http_address: str, grpc_address: str) -> None:
            addresses = {"http": f"http://{http_address}", "grpc": f"grpc://{grpc_address}", "store": settings.store}
            line = "flyball-server ready: " + ", ".join(f"{k} {v}" for k, v in addresses.items())
            print(json.dumps(addresses) if json_output else line, flush=True)

        with asyncio.Runner(loop_factory=application.loop_factory()) as runner:
            runner.run(_serve(settings, started))


def _log_in_utc() -> None:
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


async def _serve(settings: Settings, started: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await application.serve(settings, stop, started)


@cli.command(name="simulate")
def simulate_command(
    policy: Annotated[Path, typer.Option(help="Policy file: JSON, YAML or TOML with `type: NAME` and parameters.")],
    trace: Annotated[Path, typer.Option(help='JSON lines such as {"step": 0, "loss": 2.3}; "-" reads stdin.')],
    groups: Annotated[
        Path | None, typer.Option(help="Parameter groups: a list of {name, lr, momentum?, betas?}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the policy's chance, where it has any.")] = 0,
) -> None:
    """Run a policy over a recorded trace, without a server: one JSON line per observation.

    The settings of a line are those in force after observing its step, that is for the next step.
    """
    with _errors():
        group_list = None if groups is None else read_groups(groups)
        with contextlib.ExitStack() as stack:
            lines = sys.stdin if str(trace) == "-" else stack.enter_context(trace.open(encoding="utf-8"))
            for line in simulate(load_policy(policy), lines, group_list, seed):
                print(json.dumps(line, allow_nan=False))


@cli.command()
def policies(
    name: Annotated[
        str | None, typer.Argument(help="A policy, preset, base schedule, guard or profile; all are listed without.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of its parameters.")] = False,
    profiles: Annotated[Path | None, typer.Option(help="List (and check) the profiles in this file, too.")] = None,
) -> None:
    """List the policies, presets, base schedules and guards, or describe one."""
    with _errors():
        known = load_profiles(profiles) if profiles else {}
        if name is None:
            for kind, title, text in _listed(known):
                print(f"{kind:<8}{title:<20} {text}")
            return
        if name in known:
            profile = known[name]
            print(json.dumps({"about": profile.about, "policy": profile.policy, "guard": profile.guard}, indent=2))
            return
        if name in GUARDS:
            print(json.dumps({"about": GUARDS[name].about, "guard": dict(GUARDS[name].spec)}, indent=2))
            return
        described = json_schema(name)
        if schema:
            print(json.dumps(described, indent=2))
            return
        print(about(name))
        for field, facts in described["properties"].items():
            if field != "type":
                default = json.dumps(facts["default"]) if "default" in facts else "-"
                print(f"{field:<26} {default:<12} {facts.get('description', '')}")


def _listed(profiles: Mapping[str, Profile]) -> Iterator[tuple[str, str, str]]:
    yield from (("policy", policy.tag, about(policy.name)) for policy in POLICIES.values())
    yield from (("preset", name, preset.about) for name, preset in PRESETS.items())
    yield from (("base", name, about(name, base=True)) for name in SCHEDULES)
    yield from (("guard", name, guard.about) for name, guard in GUARDS.items())
    yield from (("profile", profile.name, profile.about) for profile in profiles.values())


@cli.command()
def key(
    store: Annotated[str | None, typer.Option(help="The service's store: its key lies beside the file.")] = None,
    signing_key: Annotated[str | None, typer.Option(help="The key file, where the service was given one.")] = None,
) -> None:
    """Print the public key that exports are signed with (PEM), and its fingerprint."""
    given: dict[str, Any] = {"store": store, "signing_key": signing_key}
    with _errors():
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        path = Path(settings.signing_key) if settings.signing_key else settings.own_key
        if path is None:
            raise Invalid(f"store is {settings.store!r}, which keeps no key: name the file of a service")
        if not path.exists():
            raise Invalid(f"{path} does not exist: `flyball-server serve` makes the key when it is first started")
        public = open_signer(path, make=False).public
        print(f"{pem(public)}{fingerprint(public)}")


@cli.command(name="verify")
def verify_command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run ids, or export files (*.flyball); without any, all runs."),
    ] = None,
    store: Annotated[str, typer.Option(help="sqlite:///FILE; the service may be running.")] = "sqlite:///flyball.db",
    public_key: Annotated[
        Path | None, typer.Option(help="File of the public key (PEM) that must have signed the export files.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON line per run, and one of the store's own problems.")
    ] = False,
) -> None:
    """Check the hash chain of runs and fold their journals again, comparing every decision bit for bit; and their
    records, their snapshots, and what of the store is no single run's.

    Exit code 1 where anything differs. Of an export file its checksums and its signature are checked, too; it needs
    no store.
    """
    files = [Path(name) for name in runs or () if name.endswith(".flyball") and Path(name).is_file()]
    if files:
        if len(files) < len(runs or ()):
            raise typer.BadParameter("give run ids or export files, not both")
        with _errors():
            _verify_files(files, None if public_key is None else read_public_key(public_key), json_output)
        return
    if public_key is not None:
        raise typer.BadParameter("--public-key is for export files; name one (*.flyball)")
    wrong = False
    with _errors(), _opened(store, read_only=True) as journal:
        for name in runs or verify_names(journal):
            verdict = verify(journal, name)
            wrong = wrong or bool(verdict.problem)
            if json_output:
                print(json.dumps(verdict._asdict()), flush=True)
            else:
                result = verdict.problem or "matches bit for bit"
                print(
                    f"{name}: {verdict.observations} observations, {verdict.decisions} decisions: {result}", flush=True
                )
        problems = [] if runs else verify_store(journal)
        if problems and json_output:
            print(json.dumps({"store": store, "problems": problems}))
        elif problems:
            print(f"the store {store}: {'; '.join(problems)}")
    if wrong or problems:
        raise typer.Exit(1)


def _verify_files(files: Iterable[Path], key: bytes | None, json_output: bool) -> None:
    failed = False
    for path in files:
        verdict, signer, _, _ = check(path, key)
        failed = failed or bool(verdict.problem)
        if json_output:
            print(json.dumps({**verdict._asdict(), "file": str(path), "signer": signer}))
        elif verdict.problem:
            print(f"{path}: {verdict.problem}")
        else:
            known = "the key given" if key is not None else "only a fingerprint you know proves who signed"
            print(
                f"{verdict.run}: {verdict.observations} observations, {verdict.decisions} decisions: matches bit for "
                f"bit, signed by {signer} ({known})"
            )
    if failed:
        raise typer.Exit(1)


@cli.command()
def replay(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    policy: Annotated[Path, typer.Option(help="Policy file: JSON, YAML or TOML with `type: NAME` and parameters.")],
    store: Annotated[str, typer.Option(help="sqlite:///FILE; the service may be running.")] = "sqlite:///flyball.db",
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps; the newest attempt's without it.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="So many lines where the two streams part, from the first.")] = 20,
    json_output: Annotated[
        bool, typer.Option("--json", help="A JSON line per step at which one of them changes; a summary at the end.")
    ] = False,
) -> None:
    """What another policy would have decided on the signals that a run recorded, beside what was decided.

    A policy without a base of its own stands on the run's.
    """
    with _errors(), _opened(store, read_only=True) as journal:
        _replay(journal, WhatIfRequest(run, load_policy(policy), None, {}, None, attempt), limit, json_output)


def _replay(journal: Journal, request: WhatIfRequest, limit: int, json_output: bool) -> None:
    found = load(journal, rules_of, request.run)
    spec, own = otherwise(request, found.spec, {})
    asked = Asked(found.spec, found.origin, found.run, rules_of(spec), own)
    streams = what_if(journal, asked, request.attempt)
    summed = summary(streams, spec.groups)
    if json_output:
        for line in beside(streams, asked.rules):
            print(json.dumps(finite(line), allow_nan=False))
        print(json.dumps({"run": request.run, "policy": asked.rules.policy.tag, "summary": summed}, allow_nan=False))
        return
    print(f"{request.run}: {summed['observations']} observations, steps {summed['from_step']} to {summed['to_step']}")
    apart = (line for line in beside(streams, asked.rules) if line["real"] != line["what_if"])
    for line in islice(apart, limit):
        for group, lr in line["real"]["lr"].items():
            print(
                f"  step {line['step']:<8} {group}: {lr:.6g} really, {line['what_if']['lr'][group]:.6g} under", end=" "
            )
            print(f"{asked.rules.policy.tag}  {line['reason']}".rstrip())
    if summed["first_difference"] is None:
        print("the settings would have been the same at every step")
    else:
        print(f"first difference decided at step {summed['first_difference']}; {summed['steps_apart']} steps apart")


@cli.command()
def compact(
    runs: Annotated[list[str] | None, typer.Argument(help="Run ids; all runs of the store without one.")] = None,
    store: Annotated[str, typer.Option(help="sqlite:///FILE of a stopped service.")] = "sqlite:///flyball.db",
) -> None:
    """Merge what runs have not merged yet, and give the space of deleted and merged rows back to the disk.

    The disk needs room for the file a second time meanwhile. A damaged run is left as it is, with exit code 1.
    """
    damaged = []
    with _errors(), _opened(store) as journal:
        before = journal.usage().bytes
        size_before = _size(store)
        for name in runs or journal.names():
            try:
                journal.compact(name)
            except Damaged as error:
                damaged.append(str(error))
        journal.shrink()
        print(f"{store}: {before} bytes in use before, {journal.usage().bytes} after; the file: ", end="")
        print(f"{size_before} before, {_size(store)} after")
    if damaged:
        _fail("; ".join(damaged))


@contextlib.contextmanager
def _opened(store: str, *, read_only: bool = False) -> Iterator[Journal]:
    """An existing store. Opening would create it, and "nothing wrong" is no good news about a mistyped name."""
    journal = open_journal(store, read_only=read_only)
    if store == "memory:":
        raise Invalid("store is 'memory:', where nothing is kept: name the file the service was started with")
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise Invalid(f"{store} does not exist: name the file the service was started with")
    journal.start(lambda _: None)
    try:
        yield journal
    finally:
        journal.close()


def _size(store: str) -> int:
    path = Path(store.removeprefix("sqlite:///"))
    log = Path(f"{path}-wal")
    return path.stat().st_size + (log.stat().st_size if log.exists() else 0)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors of the user's making end in one line on stderr, not in a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has enough: no error, typer ends quietly
    except (SteeringError, OSError) as error:
        _fail(str(error))
    except ValidationError as error:
        _fail("; ".join(_setting(e) for e in error.errors()))


def _setting(error: Any) -> str:
    name = "".join(f"{part}: " for part in error["loc"])
    if error["type"] == "value_error":
        return name + str(error["msg"]).removeprefix("Value error, ")
    setting = name.rstrip(": ")
    option = setting.replace("_", "-")
    return f"{name}{error['input']!r} is no good (option --{option}, or FLYBALL_{setting.upper()})"


def _fail(message: str) -> None:
    print(f"flyball-server: {message}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """The entry point."""
    cli()


if __name__ == "__main__":
    main()
