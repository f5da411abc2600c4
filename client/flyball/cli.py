"""The command `flyball`: runs, one run, series, exports, from a terminal or a script.

Rule of this module: ask the REST SDK, print. Tables are for terminals; piped output is plain, and --json and --csv are
for programs. Errors go to stderr in one line with exit code 1 (2 for a wrong command line).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from flyball import cli_audit, cli_branches, cli_commands, cli_fleet, cli_report
from flyball.api import Client
from flyball.cli_output import Json, RunId, Server, Token, errors, plain, print_json, section, short, table, typer
from flyball.cli_words import print_steering
from flyball.errors import FlyballError
from flyball.exporting import TEXT_FORMATS, Format, export_run

#: Decisions that `show` prints.
DECISIONS_SHOWN = 5
#: What `show` prints of a parameter group.
_SETTINGS = ("lr", "applied_lr", "reference_lr", "momentum", "noise_std")

cli = typer.Typer(
    name="flyball",
    help="Look at training runs, and steer them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class RunStatus(StrEnum):
    """What a run's status can be."""

    CREATED = "created"
    ACTIVE = "active"
    STALE = "stale"
    LOST = "lost"
    FINISHED = "finished"
    FAILED = "failed"
    DELETED = "deleted"


@cli.command()
def runs(
    project: Annotated[str | None, typer.Option(help="Only runs of this project.")] = None,
    status: Annotated[RunStatus | None, typer.Option(help="Only runs of this status.")] = None,
    policy: Annotated[str | None, typer.Option(help="Only runs under this policy: NAME or NAME@VERSION.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only runs with this label; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many, the newest first.")] = 50,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """List runs, newest first."""
    labels = _labels(label or [])
    with errors(), Client(server, token) as client:
        matching = client.runs(project=project, status=status, policy=policy, labels=labels)
        found = list(islice(matching, limit + 1))
        frozen = [] if json_output else client.frozen()
    more, found = found[limit:], found[:limit]
    if json_output:
        print_json(found)
        return
    table(
        ("run", "status", "policy", "attempt", "step", "last news", "labels"),
        [
            (
                run["run"],
                run["status"],
                run["policy"],
                run["attempt"],
                _step(run["step"]),
                _ago(run["stale_s"]),
                ",".join(f"{key}={value}" for key, value in sorted(run["labels"].items())),
            )
            for run in found
        ],
    )
    if more:
        print(f"flyball: there are more than {limit}: --limit shows them", file=sys.stderr)
    if frozen:
        print("flyball: something is frozen: `flyball frozen` tells what and why", file=sys.stderr)


@cli.command()
def show(run: RunId, json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """Show one run: where it stands, its settings, its newest signals and decisions."""
    with errors(), Client(server, token) as client:
        found = client.run(run)
        newest = client.newest_decisions(run, DECISIONS_SHOWN)
    newest.reverse()
    if json_output:
        print_json({**found, "newest_decisions": newest})
        return
    _print_run(found)
    section(
        "settings",
        ("group", "lr decided", "lr applied", "lr at attach", "momentum", "noise_std"),
        [[group["group"], *(short(group[name]) for name in _SETTINGS)] for group in found["settings"]],
    )
    print_steering(found)
    section("signals", ("signal", "newest"), [(n, short(value)) for n, value in sorted(found["signals"].items())])
    section(
        "newest decisions",
        ("step", "group", "lr", "decision", "reason"),
        [(one["step"], group, lr, _decided(one), one["reason"]) for one in newest for group, lr in _moved(one)],
    )


@cli.command()
def series(
    run: RunId,
    signals: Annotated[
        str, typer.Option(help="Comma-separated: loss, lr:GROUP (as applied), decided_lr:GROUP ...")
    ] = "loss",
    points: Annotated[int, typer.Option(min=2, help="At most so many points of each; minima and maxima stay.")] = 2000,
    from_step: Annotated[int | None, typer.Option("--from", help="First step.")] = None,
    to_step: Annotated[int | None, typer.Option("--to", help="Last step.")] = None,
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps; the newest attempt's without it.")] = None,
    csv_output: Annotated[bool, typer.Option("--csv", help="CSV: step, then a column for each signal.")] = False,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Print signals and settings over the steps.

    A step of which a signal has no point is left empty there; lr:GROUP has a point wherever it changed.
    """
    if csv_output and json_output:
        raise typer.BadParameter("give --csv or --json, not both")
    names = [name.strip() for name in signals.split(",") if name.strip()]
    with errors(), Client(server, token) as client:
        found = client.series(run, names, points=points, from_step=from_step, to_step=to_step, attempt=attempt)
    if found.get("problem"):
        print(f"flyball: not all of it: {found['problem']}", file=sys.stderr)
    if json_output:
        print_json(found)
        return
    header, rows = _joined(found["series"])
    if csv_output:
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)
    else:
        table(header, rows)


@cli.command()
def delete(
    run: RunId,
    reason: Annotated[str, typer.Option(help="Why; it stays in the store's own journal.")],
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Delete a run for good. Its name is not used again."""
    with errors(), Client(server, token) as client:
        left = client.delete(run, reason=reason)
    if json_output:
        print_json(left)
        return
    observations = "unknown" if left["observations"] is None else left["observations"]
    print(f"deleted {left['run']}: {left['attempts']} attempts, {observations} observations, {left['rows']} rows")


@cli.command()
def tombstones(json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """List the deleted runs: which, when, by whom and why."""
    with errors(), Client(server, token) as client:
        found = list(client.tombstones())
    if json_output:
        print_json(found)
        return
    header = ("run", "at", "actor", "observations", "reason")
    table(header, [["-" if one[name] is None else one[name] for name in header] for one in found])


@cli.command()
def export(
    run: RunId,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file; '-' or none: stdout, for jsonl, csv and schedule.")
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="flyball: all of the run in one signed file; else its steps as a table.")
    ] = Format.FLYBALL,
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps; the newest attempt's without it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it is there already.")] = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Write a run to a file.

    flyball: journal, configuration, versions and signature, for `flyball-server verify` and `flyball import`. jsonl,
    csv, parquet: every step with its signals and settings. schedule: the learning rates applied, as FILE.json with a
    Python module beside it that uses them with torch, optax or Keras, without any service.
    """
    path = None if out is None or str(out) == "-" else out
    if path is None and format_ not in TEXT_FORMATS:
        raise typer.BadParameter(f"--format {format_} is no text: name a file with -o")
    if path is not None and format_ is Format.SCHEDULE and path.suffix != ".json":
        raise typer.BadParameter(f"-o is {str(path)!r}: give a name that ends with .json, the module goes beside it")
    if attempt is not None and format_ is Format.FLYBALL:
        raise typer.BadParameter("--attempt is for tables and schedules: --format flyball holds all attempts")
    with errors(), Client(server, token) as client:
        export_run(client, run, format_, path, attempt=attempt, force=force)


@cli.command(name="import")
def import_command(
    file: Annotated[Path, typer.Argument(help="What `flyball export` wrote.")],
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Give the service a run that another one exported. It takes nothing that does not verify."""
    with errors(), Client(server, token) as client:
        try:
            with file.open("rb") as opened:
                found = client.import_run(opened)
        except OSError as error:
            raise FlyballError(f"{file} cannot be read: {error.strerror}") from error
    if json_output:
        print_json(found)
        return
    what = "imported" if found["status"] == "imported" else "is there already, unchanged"
    print(f"{found['run']}: {what}, {found['seq']} rows, signed by {found['signer']}")


# Leaves


def _joined(found: Mapping[str, Mapping[str, Sequence[Any]]]) -> tuple[list[str], list[list[Any]]]:
    """Series side by side: one row for every step any of them has; "" where one has no point."""
    columns = {name: dict(zip(one["step"], one["value"], strict=True)) for name, one in found.items()}
    steps = sorted(set().union(*columns.values()))
    rows = [[step, *(_full(column.get(step)) for column in columns.values())] for step in steps]
    return ["step", *columns], rows


def _print_run(run: Mapping[str, Any]) -> None:
    base = "" if run["base"] is None else f" on base {run['base']['type']}"
    base += f" (profile {run['profile']})" if run.get("profile") else ""
    labels = "".join(f" {key}={value}" for key, value in sorted(run["labels"].items()))
    facts = {
        "run": run["run"] + labels,
        "status": f"{run['status']}, last news {_ago(run['stale_s'])} ago",
        "attempt": run["attempt"],
        "step": f"{_step(run['step'])} ({run['observations']} observations)",
        "policy": f"{run['policy']}{base}, {run['mode']} mode, lag {'none' if run['lag'] is None else run['lag']}",
        "phase": f"{run['phase']}, {run['decision']}" + (f": {run['reason']}" if run["reason"] else ""),
        "guard": json.dumps(run["guard"]) if run["guard"] else "only finite, not negative",
    }
    if run.get("problem"):
        facts["damage"] = run["problem"]
    for name, fact in facts.items():
        print(f"{name:<8} {fact}")


def _moved(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The groups whose learning rate a decision is about, and how it moved; of an override only those it names."""
    fields = (decision["fields"] or {}) if decision["decision"] == "command_override" else {}
    if fields.get("setting", "lr") != "lr":
        return [("-", "-")]
    before, after = decision["lr_before"], decision["lr_after"]
    named = str(fields.get("groups", "")).split(", ")
    shown = [group for group in before if group in named] or list(before)
    return [(group, f"{short(before[group])} -> {short(after[group])}") for group in shown]


def _decided(decision: Mapping[str, Any]) -> str:
    return f"{decision['decision']} ({decision['guard']})" if decision["guard"] else str(decision["decision"])


def _step(step: int | None) -> str:
    return "-" if step is None or step < 0 else str(step)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


def _full(value: float | None) -> str:
    """Every digit: for programs. NaN as such, nothing where there is no value."""
    return "" if value is None else str(plain(value))


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise typer.BadParameter(f"{pair!r} is no label: give KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


cli_branches.add(cli)
cli_report.add(cli)
cli_commands.add(cli)
cli_fleet.add(cli)
cli_audit.add(cli)


def main() -> None:
    """The entry point."""
    cli()


if __name__ == "__main__":
    main()
