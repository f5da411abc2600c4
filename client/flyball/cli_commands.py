"""Commands of `flyball` to one run: override, hold, release, bounds and the others, and proposals.

Rule of this module: as in `cli`, ask the REST SDK and print. The result goes to stdout; with --wait, what happens on
the way goes to stderr, and the exit code tells how it ended: 0 applied or done, 1 not, 3 not yet when time was over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

from flyball.api import Client
from flyball.cli_output import Force, Json, RunId, Server, Token, errors, print_json, table, typer
from flyball.cli_values import assigned, pairs, policy_of, seconds
from flyball.cli_words import approved, asked, stage, titled
from flyball.errors import FlyballError, Refused

Reason = Annotated[str, typer.Option(help="Why; it stays in the run's journal, and in the job's log.")]
Wait = Annotated[bool, typer.Option("--wait", help="Until it is applied, or over; tells each stage on stderr.")]
Timeout = Annotated[float, typer.Option(min=0, help="How many seconds --wait waits.")]
IfMatch = Annotated[
    int | None, typer.Option(help="The newest journal row you know (seq): refused where a command came since.")
]
ForSteps = Annotated[int | None, typer.Option(min=1, help="So many optimizer steps.")]
UntilStep = Annotated[int | None, typer.Option(min=1, help="Up to this optimizer step.")]
For = Annotated[str | None, typer.Option("--for", metavar="TIME", help="So long: 90s, 30min, 2h, 1d.")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Until then: 2027-01-31T12:00:00Z.")]
Args = Annotated[list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="For the job's own handler.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The proposal's id, as `flyball proposals` shows it.")]
WAIT_S = 60.0
TIMED_OUT = 3


class Common(NamedTuple):
    """What every command takes beside its own."""

    run: str
    wait: bool
    timeout: float
    json_output: bool
    server: str | None
    token: str | None


def add(cli: typer.Typer) -> None:
    """Add the commands to `flyball`."""
    for name, function in (
        ("override", override), ("hold", hold), ("release", release), ("bounds", bounds),
        ("switch-policy", switch_policy), ("set-profile", set_profile), ("rewind", rewind), ("note", note),
        ("commands", commands), ("proposals", proposals), ("approve", approve), ("reject", reject),
        ("withdraw", withdraw),
    ):  # fmt: skip
        cli.command(name=name)(function)
    for kind, words in (
        ("checkpoint", "save a checkpoint"), ("restore", "load a checkpoint"), ("evaluate", "evaluate"),
        ("stop", "end"),
    ):  # fmt: skip
        cli.command(name=kind, help=f"Ask the job of RUN to {words}; it may decline.")(_directive(kind))


def override(
    run: RunId,
    setting: Annotated[str, typer.Argument(metavar="SETTING=NUMBER", help="lr, momentum, noise_std or a control.")],
    reason: Reason,
    factor: Annotated[bool, typer.Option("--factor", help="NUMBER is a factor on what the policy says.")] = False,
    group: Annotated[list[str] | None, typer.Option(help="Only this group; may be repeated.")] = None,
    force: Force = False,
    for_steps: ForSteps = None,
    until_step: UntilStep = None,
    for_: For = None,
    until: Until = None,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Put a value in the place of a setting, within the run's guard, until it ends or is released."""
    name, number = assigned(setting)
    ends = _ends(for_steps, until_step, for_, until)
    said: dict[str, Any] = {"setting": name, "groups": group or None, "factor" if factor else "value": number, **ends}
    said["force"] = force or None
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.command(run, "override", reason=reason, if_match=if_match, **said))


def hold(
    run: RunId,
    reason: Reason,
    for_steps: ForSteps = None,
    until_step: UntilStep = None,
    for_: For = None,
    until: Until = None,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Leave all settings of RUN as they are, until it ends or is released."""
    ends = _ends(for_steps, until_step, for_, until)
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.command(run, "hold", reason=reason, if_match=if_match, **ends))


def release(
    run: RunId,
    reason: Reason,
    command: Annotated[str | None, typer.Option(metavar="ID", help="Only this override, hold or directive.")] = None,
    setting: Annotated[str | None, typer.Option(help="Only the overrides of this setting.")] = None,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Give the settings of RUN back to its policy."""
    common = Common(run, wait, timeout, json_output, server, token)
    _give(
        common,
        lambda client: client.release(run, command=command, setting=setting, reason=reason, if_match=if_match),
    )


def bounds(
    run: RunId,
    limits: Annotated[list[str], typer.Argument(metavar="LIMIT=VALUE...", help="max_lr=0.1; none takes one away.")],
    reason: Reason,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Change the limits that hold for RUN, whatever its policy or anybody says."""
    guard = pairs(limits, "limit")
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.bounds(run, guard, reason=reason, if_match=if_match))


def switch_policy(
    run: RunId,
    policy: Annotated[str, typer.Argument(metavar="NAME|JSON|FILE", help="A policy, or a file that holds one.")],
    reason: Reason,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Go on with RUN under another policy, from the learning rates in force."""
    named = policy_of(policy) or {}
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.switch_policy(run, named, reason=reason, if_match=if_match))


def set_profile(
    run: RunId,
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="As `flyball-server policies` lists it.")],
    reason: Reason,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Go on with RUN under a profile of the service: its policy, base schedule and limits."""
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.set_profile(run, profile, reason=reason, if_match=if_match))


def rewind(
    run: RunId,
    step: Annotated[int, typer.Argument(min=0, help="The step to go back to.")],
    reason: Reason,
    arg: Args = None,
    if_match: IfMatch = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Ask the job of RUN to go back to a step; it may decline."""
    args = pairs(arg or [], "argument") or None
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.rewind(run, step=step, reason=reason, args=args, if_match=if_match))


def _directive(kind: str) -> Callable[..., None]:
    def directive(
        run: RunId,
        reason: Reason,
        arg: Args = None,
        for_: For = None,
        if_match: IfMatch = None,
        wait: Wait = False,
        timeout: Timeout = WAIT_S,
        json_output: Json = False,
        server: Server = None,
        token: Token = None,
    ) -> None:
        said: dict[str, Any] = {"args": pairs(arg or [], "argument") or None, "expires_in_s": seconds(for_)}
        common = Common(run, wait, timeout, json_output, server, token)
        _give(common, lambda client: client.command(run, kind, reason=reason, if_match=if_match, **said))

    return directive


def note(
    run: RunId,
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Put words into the journal of RUN."""
    _give(Common(run, False, 0, json_output, server, token), lambda client: client.note(run, text))


def commands(
    run: RunId,
    open_only: Annotated[bool, typer.Option("--open", help="Only those that are not over.")] = False,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """List the commands and proposals of RUN, and what became of each."""
    with errors(), Client(server, token) as client:
        found = list(client.commands(run, open_only=open_only))
    if json_output:
        print_json(found)
        return
    header = ("id", "command", "status", "by", "at", "reason")
    table(header, [(c["id"], titled(c), stage(c, c["history"][-1]), c["actor"], c["at"], c["reason"]) for c in found])


def proposals(run: RunId, json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """List the proposals of RUN that wait to be approved."""
    with errors(), Client(server, token) as client:
        found = [one for one in client.commands(run, open_only=True) if one["status"] == "proposed"]
    if json_output:
        print_json(found)
        return
    header = ("id", "command", "by", "approved", "at", "reason")
    rows = [(c["id"], asked(c), c["actor"], approved(c), c["at"], c["reason"]) for c in found]
    table(header, rows)


def approve(
    run: RunId,
    proposal: Id,
    reason: Reason,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Approve a proposal of somebody else; with the last approval it takes, it becomes a command."""
    common = Common(run, wait, timeout, json_output, server, token)
    _give(common, lambda client: client.approve(run, proposal, reason=reason))


def reject(
    run: RunId, proposal: Id, reason: Reason, json_output: Json = False, server: Server = None, token: Token = None
) -> None:
    """Reject a proposal."""
    common = Common(run, False, 0, json_output, server, token)
    _give(common, lambda client: client.reject(run, proposal, reason=reason))


def withdraw(
    run: RunId, proposal: Id, reason: Reason, json_output: Json = False, server: Server = None, token: Token = None
) -> None:
    """Take back a proposal of your own."""
    common = Common(run, False, 0, json_output, server, token)
    _give(common, lambda client: client.withdraw(run, proposal, reason=reason))


# Leaves


def _ends(for_steps: int | None, until_step: int | None, for_: str | None, until: str | None) -> dict[str, Any]:
    return {"for_steps": for_steps, "until_step": until_step, "expires_in_s": seconds(for_), "expires_at": until}


def _give(common: Common, call: Callable[[Client], dict[str, Any]]) -> None:
    with errors(), Client(common.server, common.token) as client:
        with _stale_explained(common.run):
            view = call(client)
        if common.wait:
            view = client.wait(common.run, view["id"], common.timeout, on_change=_Teller(client))
        if common.json_output:
            print_json(view)
        else:
            print(f"{view['id']} {titled(view)}: {stage(view, view['history'][-1], _groups(client, view))}")
    if not common.wait or view["applied"] is not None or view["status"] == "done":
        return
    if view["over"]:
        raise SystemExit(1)
    print(f"flyball: {view['id']} is still {view['status']} after {common.timeout:g} s", file=sys.stderr)
    raise SystemExit(TIMED_OUT)


@contextmanager
def _stale_explained(run: str) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        if error.code != "stale":
            raise
        raise FlyballError(
            f"{error} (here: --if-match; `flyball commands {run}` shows what was commanded since)"
        ) from error


class _Teller:
    """Prints each stage of a command once, as it happens."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: set[tuple[str, int, str]] = set()

    def __call__(self, view: dict[str, Any]) -> None:
        for entry in view["history"]:
            mark = (view["id"], entry["seq"], entry["status"])
            if mark not in self._told:
                self._told.add(mark)
                words = stage(view, entry, _groups(self._client, view))
                print(f"{view['id']} {words}", file=sys.stderr, flush=True)


def _groups(client: Client, view: Mapping[str, Any]) -> list[str]:
    """The names of the groups that a verdict's numbers belong to; asked for where they are told."""
    if not (view["verdict"] or {}).get("lr"):
        return []
    return [group["group"] for group in client.run(view["run"])["settings"]]
