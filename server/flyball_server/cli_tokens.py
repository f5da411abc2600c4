"""The commands `flyball-server token create | list | revoke`.

Rule of this module: whoever may write the store's file may make tokens, and nobody else. A secret is printed once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from flyball_server.auth.access import Caller
from flyball_server.auth.tokens import Tokens, seconds_of
from flyball_server.cli_output import errors
from flyball_server.settings import Settings

T = TypeVar("T")
Store = Annotated[
    str | None,
    typer.Option(help="sqlite:///FILE; the service may be running. Default: FLYBALL_STORE, as `serve` has it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

cli = typer.Typer(help="Make, list and revoke the tokens that `serve --auth` asks for.", no_args_is_help=True)


@cli.command()
def create(
    name: Annotated[str, typer.Option(help="What it is for, such as ci; stands in the record of what it did.")],
    role: Annotated[str, typer.Option(help="viewer, reporter, driver, proposer, operator or admin.")],
    project: Annotated[
        list[str] | None, typer.Option(help="A project it reaches; may be repeated. Without any: all projects.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="How long it lives, such as 12h, 30d or 8w. Default: for ever.")
    ] = None,
    store: Store = None,
    json_output: Json = False,
) -> None:
    """Make a token and print its secret, which is shown this once. A running service knows it within a second."""
    with errors():
        lives_s = None if expires is None else seconds_of(expires)
        made = _with(store, lambda tokens, caller: tokens.create(name, role, project, lives_s, caller))
        if json_output:
            print(json.dumps(made))
            return
        print(made["secret"])
        print(f"flyball-server: token {made['id']}, {_reach(made)}; the secret is not shown again", file=sys.stderr)


@cli.command(name="list")
def list_tokens(store: Store = None, json_output: Json = False) -> None:
    """List the tokens, oldest first; never a secret."""
    with errors():
        found = _with(store, lambda tokens, caller: tokens.listed(caller))
        for one in found:
            if json_output:
                print(json.dumps(one))
                continue
            until = f", until {one['expires_at']}" if one["expires_at"] else ""
            left = f": {one['reason']}" if one["reason"] else ""
            print(f"{one['id']:<6} {one['status']:<8} {one['name']:<20} {_reach(one)}{until}{left}")


@cli.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="Its id, as `token list` shows it.")],
    reason: Annotated[str, typer.Option(help="Why; stays in the record.")],
    store: Store = None,
    json_output: Json = False,
) -> None:
    """Revoke a token for good. A running service refuses it within a second."""
    with errors():
        revoked = _with(store, lambda tokens, caller: tokens.revoke(token, reason, caller))
        print(json.dumps(revoked) if json_output else f"token {revoked['id']} ({revoked['name']}) is revoked")


def _with(store: str | None, ask: Callable[[Tokens, Caller], Awaitable[T]]) -> T:
    settings: dict[str, Any] = {} if store is None else {"store": store}
    # Where the service listens is no matter here, so it is not refused for that.
    where = Settings(**settings, insecure=True).store

    # Only here: the other commands need no skin, and start in half the time without.
    from flyball_server.app import LOCAL, beside

    async def work() -> T:
        async with beside(where) as tokens:
            return await ask(tokens, LOCAL)

    return asyncio.run(work())


def _reach(token: dict[str, Any]) -> str:
    projects = "all projects" if token["projects"] is None else ", ".join(token["projects"])
    return f"{token['role']} in {projects}"
