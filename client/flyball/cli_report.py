"""The command `flyball report`: signals and notes from a process beside the training job, such as an evaluation.

Rule of this module: as in `cli`, ask the REST SDK and print.
"""

from __future__ import annotations

from typing import Annotated

from flyball.api import Client
from flyball.cli_output import Json, RunId, Server, Token, errors, print_json, typer
from flyball.cli_values import assigned


def add(cli: typer.Typer) -> None:
    """Add the command to `flyball`."""
    cli.command()(report)


def report(
    run: RunId,
    signals: Annotated[list[str] | None, typer.Argument(metavar="SIGNAL=NUMBER...", help="val_loss=0.31 ...")] = None,
    note: Annotated[str, typer.Option(help="Words for the run's journal.")] = "",
    source: Annotated[
        str, typer.Option(help="Who reports, such as eval; its reports are numbered, and each is taken once.")
    ] = "",
    number: Annotated[
        int | None, typer.Option(min=1, help="This report's number, above the source's last; the time without it.")
    ] = None,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Give a run signals that its job does not measure itself; its policy sees them with the next step."""
    if not signals and not note:
        raise typer.BadParameter("give SIGNAL=NUMBER, such as val_loss=0.31, or a --note")
    if number is not None and not source:
        raise typer.BadParameter("--number counts the reports of a --source: give both")
    values = dict(assigned(word) for word in signals or ())
    with errors(), Client(server, token) as client:
        seq = client.report(run, values, note=note, source=source, number=number)
    print_json({"run": run, "seq": seq}) if json_output else print(f"{run}: row {seq}")
