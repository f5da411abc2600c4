"""Commands of `flyball` about where runs come from and where they might have gone: fork, lineage, what-if.

Rule of this module: as in `cli`, ask the REST SDK and print.
"""

from __future__ import annotations

from typing import Annotated, Any

from flyball.api import Client
from flyball.cli_output import Json, RunId, Server, Token, errors, print_json, section, short, typer
from flyball.cli_values import policy_of

PolicyArg = Annotated[
    str | None,
    typer.Option(metavar="NAME|JSON|FILE", help="A policy: its name, a JSON object, or a file that holds one."),
]


def add(cli: typer.Typer) -> None:
    """Add the commands to `flyball`."""
    cli.command()(fork)
    cli.command()(lineage)
    cli.command(name="what-if")(what_if)


def fork(
    run: RunId,
    name: Annotated[str, typer.Argument(help="The new run's name.")],
    step: Annotated[int | None, typer.Option(help="Its first step; behind the run's newest without it.")] = None,
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps it leaves; the newest attempt's.")] = None,
    policy: PolicyArg = None,
    project: Annotated[str | None, typer.Option(help="The new run's project.")] = None,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Begin a new run that leaves RUN at a step; its job attaches to it with resume=True."""
    with errors(), Client(server, token) as client:
        options = {} if project is None else {"project": project}
        found = client.fork(run, name, step=step, attempt=attempt, policy=policy_of(policy), **options)
    if json_output:
        print_json(found)
        return
    print(f"{found['run']}: {found['policy']}, {found['phase']}, begins at step {found['decided_step'] + 1}")


def lineage(run: RunId, json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """Show where a run comes from, the runs that left it, and its attempts."""
    with errors(), Client(server, token) as client:
        found = client.lineage(run)
    if json_output:
        print_json(found)
        return
    for one in found["ancestors"]:
        how = "forked from" if one["kind"] == "fork" else "begun from a checkpoint of"
        here = "" if one["known"] else " (not in this store)"
        print(f"{how} {one['run']} at step {one['step']} of attempt {one['attempt']}{here}")
    section(
        "attempts",
        ("attempt", "from", "through", "came from", "gap", "opened", "left at", "by"),
        [
            [
                one["attempt"],
                one["from_step"],
                "-" if one["through"] is None else one["through"],
                one["parent"] or "-",
                one["gap"] or "-",
                one["opened_at"],
                ("-" if one["left_at"] is None else one["left_at"]) if one["on_newest_line"] else "abandoned",
                one["client"],
            ]
            for one in found["attempts"]
        ],
    )
    section(
        "forks",
        ("run", "attempt", "step", "begun"),
        [[one["run"], one["attempt"], one["step"], one["created_at"]] for one in found["forks"]],
    )


def what_if(
    run: RunId,
    policy: Annotated[str, typer.Option(metavar="NAME|JSON|FILE", help="The other policy.")],
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps; the newest attempt's without it.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="So many of its decisions.")] = 20,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Show what another policy would have decided on the signals that RUN recorded."""
    with errors(), Client(server, token) as client:
        found = client.what_if(run, policy_of(policy) or {}, attempt=attempt, limit=limit)
    if json_output:
        print_json(found)
        return
    print_summary(found)
    section(
        f"decisions of {found['policy']}",
        ("step", "group", "lr", "decision", "reason"),
        [
            (one["step"], group, f"{short(before)} -> {short(one['lr_after'][group])}", one["decision"], one["reason"])
            for one in found["decisions"]
            for group, before in one["lr_before"].items()
        ],
    )


def print_summary(found: dict[str, Any]) -> None:
    """Where the two streams part."""
    summary = found["summary"]
    counts = summary["decisions"]
    print(f"{found['run']}, steps {summary['from_step']} to {summary['to_step']}, under {found['policy']}")
    if summary["first_difference"] is None:
        print("the settings would have been the same at every step")
    else:
        print(f"first difference decided at step {summary['first_difference']}; {summary['steps_apart']} steps apart")
    print(f"decisions: {counts['what_if']} where there were {counts['real']}")
    section(
        "learning rates at the end",
        ("group", "real", "what if", "largest ratio", "smallest ratio"),
        [
            (name, short(one["real_lr"]), short(one["what_if_lr"]), _extreme(one["largest"]), _extreme(one["smallest"]))
            for name, one in summary["groups"].items()
        ],
    )


def _extreme(one: dict[str, Any] | None) -> str:
    return "-" if one is None else f"{short(one['ratio'])} at step {one['step']}"
