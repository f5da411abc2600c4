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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flyball_server import cli_store, cli_tokens
from flyball_server.cli_output import errors
from flyball_server.core.base import SCHEDULES
from flyball_server.core.policies import POLICIES
from flyball_server.policy_files import json_schema, load_policy
from flyball_server.policy_files import summary as about
from flyball_server.presets import GUARDS, PRESETS
from flyball_server.profiles import Profile, load_profiles
from flyball_server.projects import NOWHERE, Projects, load_projects
from flyball_server.settings import Settings
from flyball_server.simulate import read_groups, simulate

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
    projects: Annotated[
        str | None, typer.Option(help="File of limits for the runs of each project, and of all (JSON, YAML or TOML).")
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
    heads_every_s: Annotated[
        float | None, typer.Option(help="How often the heads of runs are signed, in seconds; default: 3600.")
    ] = None,
    webhooks: Annotated[
        str | None, typer.Option(help="File of the webhooks that are told what happens (JSON, YAML or TOML).")
    ] = None,
    auth: Annotated[
        bool, typer.Option("--auth", help="Every request needs a bearer token: see `flyball-server token`.")
    ] = False,
    tls_cert: Annotated[str | None, typer.Option(help="File of the certificate chain (PEM), for both ports.")] = None,
    tls_key: Annotated[
        str | None, typer.Option(help="File of the certificate's key (PEM, without a password).")
    ] = None,
    tls_client_ca: Annotated[
        str | None,
        typer.Option(help="File of the CA (PEM) that clients' certificates must come from; then all need one."),
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(help="Requests a second of one token, or of one address; default: 5000.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses that other machines reach, without authentication.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the addresses as one JSON line.")] = False,
) -> None:
    """Start the service. Options win over FLYBALL_HTTP, FLYBALL_GRPC, FLYBALL_STORE, FLYBALL_PROFILES,
    FLYBALL_PROJECTS, FLYBALL_STORE_BYTES_MAX, FLYBALL_DISK_FREE_MIN, FLYBALL_SIGNING_KEY, FLYBALL_HEADS_EVERY_S,
    FLYBALL_WEBHOOKS, FLYBALL_AUTH, FLYBALL_TLS_CERT, FLYBALL_TLS_KEY, FLYBALL_TLS_CLIENT_CA, FLYBALL_REQUESTS_PER_S
    and FLYBALL_INSECURE.

    SIGTERM and SIGINT drain it: requests under way finish, the journal is flushed, the exit code is 0.
    """
    given: dict[str, Any] = {
        "http": http, "grpc": grpc, "store": store, "profiles": profiles, "projects": projects,
        "store_bytes_max": store_bytes_max, "disk_free_min": disk_free_min, "signing_key": signing_key,
        "heads_every_s": heads_every_s, "webhooks": webhooks, "auth": auth or None, "tls_cert": tls_cert,
        "tls_key": tls_key, "tls_client_ca": tls_client_ca, "requests_per_s": requests_per_s,
        "insecure": insecure or None,
    }  # fmt: skip
    _log_in_utc()
    with errors():
        settings = Settings(**{name: value for name, value in given.items() if value is not None})

        def started(http: str, grpc: str, _: object) -> None:
            addresses = {"http": http, "grpc": grpc, "store": settings.store}
            line = "flyball-server ready: " + ", ".join(f"{k} {v}" for k, v in addresses.items())
            print(json.dumps(addresses) if json_output else line, flush=True)

        # Only here: the other commands need neither skin, and start in half the time without.
        from flyball_server.app import loop_factory

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(settings, started))


def _log_in_utc() -> None:
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


async def _serve(settings: Settings, started: Any) -> None:
    from flyball_server import app as application

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
    with errors():
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
    projects: Annotated[Path | None, typer.Option(help="The same of a file of projects and their limits.")] = None,
) -> None:
    """List the policies, presets, base schedules and guards, or describe one."""
    with errors():
        known = load_profiles(profiles) if profiles else {}
        limited = load_projects(projects) if projects else NOWHERE
        if name is None:
            for kind, title, text in _listed(known, limited):
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


def _listed(profiles: Mapping[str, Profile], projects: Projects) -> Iterator[tuple[str, str, str]]:
    yield from (("policy", policy.tag, about(policy.name)) for policy in POLICIES.values())
    yield from (("preset", name, preset.about) for name, preset in PRESETS.items())
    yield from (("base", name, about(name, base=True)) for name in SCHEDULES)
    yield from (("guard", name, guard.about) for name, guard in GUARDS.items())
    yield from (("profile", profile.name, profile.about) for profile in profiles.values())
    for project in projects:
        limits = json.dumps(projects.capped(project.name, {}), sort_keys=True)
        yield "project", project.name, f"{project.about or project.said}: {limits}, approvals {project.approvals}"


cli_store.add(cli)
cli.add_typer(cli_tokens.cli, name="token")


def main() -> None:
    """The entry point."""
    cli()


if __name__ == "__main__":
    main()
