"""Commands of `flyball` about the record: journal, audit, heads, deliveries.

Rule of this module: as in `cli`, ask the REST SDK and print.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Annotated, Any

from flyball.api import Client
from flyball.cli_output import Json, RunId, Server, Token, errors, print_json, table, typer

Kinds = Annotated[list[str] | None, typer.Option("--kind", help="Only rows of this kind; may be repeated.")]
Actor = Annotated[str | None, typer.Option(help="Only what this one did.")]
FromTime = Annotated[str | None, typer.Option("--from", help="From this time on, such as 2027-01-31T12:00:00Z.")]
Until = Annotated[str | None, typer.Option(help="Before this time.")]
Csv = Annotated[bool, typer.Option("--csv", help="CSV: all that match, whatever --limit says.")]


def add(cli: typer.Typer) -> None:
    """Add the commands to `flyball`."""
    cli.command()(journal)
    cli.command()(audit)
    cli.command()(heads)
    cli.command()(deliveries)


def journal(
    run: RunId,
    kind: Kinds = None,
    actor: Actor = None,
    from_time: FromTime = None,
    until: Until = None,
    attempt: Annotated[int | None, typer.Option(help="Only rows of this attempt.")] = None,
    since: Annotated[int, typer.Option(min=0, help="Only rows behind this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="So many rows.")] = 100,
    csv_output: Csv = False,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Print the rows of a run's journal, oldest first: what came in, from whom, when, and what was done."""
    _one_form(csv_output, json_output)
    where: dict[str, Any] = {"actor": actor, "from_time": from_time, "until": until, "attempt": attempt, "since": since}
    with errors(), Client(server, token) as client:
        if csv_output:
            sys.stdout.writelines(client.journal_csv(run, kinds=kind or (), **where))
            return
        rows = list(islice(client.journal(run, kinds=kind or (), **where), limit + 1))
    problem = rows.pop()["problem"] if rows and "problem" in rows[-1] else ""
    more, rows = rows[limit:], rows[:limit]
    if json_output:
        print_json(rows)
    else:
        table(
            ("row", "at", "kind", "attempt", "steps", "actor", "what"),
            [[r["seq"], r["at"], r["kind"], r["attempt"] or "-", _steps(r), r["actor"], r["text"]] for r in rows],
        )
    if more:
        print(f"flyball: there are more rows: --since {rows[-1]['seq']}, or a higher --limit", file=sys.stderr)
    if problem:
        print(f"flyball: not all of it: {problem}", file=sys.stderr)


def audit(
    kind: Kinds = None,
    actor: Actor = None,
    project: Annotated[str | None, typer.Option(help="Only this project.")] = None,
    run: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    from_time: FromTime = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="So many, the newest first.")] = 50,
    csv_output: Csv = False,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Print what was asked of all runs, what became of it, who was given access and who was refused, newest first."""
    _one_form(csv_output, json_output)
    where = {"actor": actor, "project": project, "run": run, "from_time": from_time, "until": until}
    with errors(), Client(server, token) as client:
        if csv_output:
            sys.stdout.writelines(client.audit_csv(kinds=kind or (), **where))
            return
        found = list(islice(client.audit(kinds=kind or (), **where), limit + 1))
    more, found = found[limit:], found[:limit]
    if json_output:
        print_json(found)
    else:
        table(
            ("at", "kind", "run", "actor", "what"),
            [[one["at"], one["kind"], one["run"] or "-", one["actor"], _told(one)] for one in found],
        )
    if more:
        print(f"flyball: there are more than {limit}: --limit shows them", file=sys.stderr)


def _told(entry: dict[str, Any]) -> str:
    return f"{entry['text']} (imported, as {entry['imported']} says)" if entry["imported"] else str(entry["text"])


def heads(
    since: Annotated[int, typer.Option(min=0, help="Only lists behind this row of the store's journal.")] = 0,
    project: Annotated[str | None, typer.Option(help="Only this project.")] = None,
    server: Server = None,
    token: Token = None,
) -> None:
    """Print the signed heads of all runs, a JSON line for each list, to be kept where the service cannot reach them.

    `flyball-server verify --heads` checks stores and exports against them.
    """
    with errors(), Client(server, token) as client:
        for one in client.heads(since=since, project=project):
            print(json.dumps(one, allow_nan=False))


def deliveries(
    hook: Annotated[str | None, typer.Option(help="Only this webhook.")] = None,
    status: Annotated[str | None, typer.Option(help="pending, delivered or failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many, the newest first.")] = 50,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Print what was sent to webhooks, is to be sent, or could not be."""
    with errors(), Client(server, token) as client:
        found = list(islice(client.deliveries(hook=hook, status=status), limit))
    if json_output:
        print_json(found)
        return
    header = ("at", "hook", "event", "run", "status", "attempts", "next_at", "error")
    table(header, [["-" if one[name] in (None, "") else one[name] for name in header] for one in found])


def _one_form(csv_output: bool, json_output: bool) -> None:
    if csv_output and json_output:
        raise typer.BadParameter("give --csv or --json, not both")


def _steps(row: dict[str, Any]) -> str:
    first, last = row["first_step"], row["last_step"]
    return "-" if first is None else str(first) if first == last else f"{first}..{last}"
