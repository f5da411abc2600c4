"""Commands of `flyball` to many runs: fleet, freeze, thaw, canary.

Rule of this module: as in `cli`, ask the REST SDK and print. Nothing is done to many runs that a person at a terminal
has not seen beforehand, or a script has not said --yes to.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from flyball.api import Client
from flyball.cli_output import Force, Json, Server, Token, errors, print_json, section, short, table, typer
from flyball.cli_values import assigned, pairs, policy_of, seconds
from flyball.cli_words import asked, carried, clamped
from flyball.errors import FlyballError

Selector = Annotated[
    str,
    typer.Argument(
        metavar="SELECTOR", help="project=vision,label.team=a,policy=windowed,status=active,run='ablation-*'"
    ),
]
Why = Annotated[str, typer.Option(help="Why; it stays in the record.")]
Project = Annotated[str | None, typer.Option(help="Only this project; everything without it.")]
CanaryId = Annotated[str, typer.Argument(metavar="ID", help="The canary's id, as `flyball canary list` shows it.")]
#: What of a command's words stands for which field; the others are settings, limits and policies.
_DIRECTIVES = ("checkpoint", "restore", "evaluate", "stop", "rewind")
KINDS = ("override", "hold", "release", "bounds", "switch-policy", "set-profile", *_DIRECTIVES, "note")

canary = typer.Typer(help="Try another policy on a share of the runs, then on all, or go back.", no_args_is_help=True)


def add(cli: typer.Typer) -> None:
    """Add the commands to `flyball`."""
    cli.command()(fleet)
    cli.command()(freeze)
    cli.command()(thaw)
    cli.command()(frozen)
    cli.add_typer(canary, name="canary")


def fleet(
    selector: Selector,
    kind: Annotated[str, typer.Argument(metavar="COMMAND", help=", ".join(KINDS))],
    reason: Why,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORDS]...", help="What COMMAND takes: lr=0.01, max_lr=0.1, a policy")
    ] = None,
    factor: Annotated[bool, typer.Option("--factor", help="override: the number is a factor.")] = False,
    group: Annotated[list[str] | None, typer.Option(help="override: only this group; may be repeated.")] = None,
    force: Force = False,
    for_steps: Annotated[int | None, typer.Option(min=1, help="override, hold: so many optimizer steps.")] = None,
    until_step: Annotated[int | None, typer.Option(min=1, help="override, hold: up to this optimizer step.")] = None,
    for_: Annotated[str | None, typer.Option("--for", metavar="TIME", help="So long: 90s, 30min, 2h, 1d.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Until then: 2027-01-31T12:00:00Z.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing: show what would change.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")] = False,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Give every run that SELECTOR means a command; without a status, to those that have not ended."""
    given = {**_fields(kind, words or [], factor), "groups": group or None, "for_steps": for_steps}
    given["force"] = force or None
    said = {**given, "until_step": until_step, "expires_in_s": seconds(for_), "expires_at": until}
    name = kind.replace("-", "_")
    what = asked({"kind": name, "args": said}) if name in ("switch_policy", "set_profile") else ""
    with errors(), Client(server, token) as client:
        if not yes and not dry_run:
            if json_output or not sys.stdin.isatty():
                raise FlyballError("nobody is here to confirm: look with --dry-run, then say --yes")
            _print_results(client.fleet(selector, name, reason=reason, dry_run=True, **said), what)
            typer.confirm("Do this?", abort=True)
        found = client.fleet(selector, name, reason=reason, dry_run=dry_run, **said)
    if json_output:
        print_json(found)
    else:
        _print_results(found, what)
    if found["counts"].get("refused"):
        raise SystemExit(1)


def freeze(reason: Why, project: Project = None, json_output: Json = False, server: Server = None,
           token: Token = None) -> None:  # fmt: skip
    """Hold every active run, those that come later too, and refuse commands, until `flyball thaw`."""
    with errors(), Client(server, token) as client:
        found = client.freeze(reason=reason, project=project)
    if json_output:
        print_json(found)
        return
    print(f"frozen: {project or 'everything'}; {found['held']} active runs are on hold")
    _print_failed(found["failed"])


def thaw(reason: Why, project: Project = None, json_output: Json = False, server: Server = None,
         token: Token = None) -> None:  # fmt: skip
    """End a freeze, and release the holds it gave."""
    with errors(), Client(server, token) as client:
        found = client.thaw(reason=reason, project=project)
        left = client.frozen()
    if json_output:
        print_json({**found, "freezes": left})
        return
    print(f"thawed: {project or 'everything'}, which {found['actor']} froze at {found['at']}: {found['reason']}")
    for one in left:
        print(f"still frozen: {_frozen(one)}, by {one['actor']}: {one['reason']}")
    _print_failed(found["failed"])


def frozen(json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """List what is frozen: by whom, since when and why."""
    with errors(), Client(server, token) as client:
        found = client.frozen()
    if json_output:
        print_json(found)
        return
    if not found:
        print("nothing is frozen")
        return
    header = ("what", "by", "since", "reason")
    rows = [(_frozen(one), one["actor"], one["at"], one["reason"]) for one in found]
    table(header, rows)


@canary.command()
def start(
    selector: Selector,
    reason: Why,
    policy: Annotated[str | None, typer.Argument(metavar="[NAME|JSON|FILE]", help="The other policy.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Part of the runs, 0 to 1.")] = 0.1,
    profile: Annotated[str | None, typer.Option(help="A profile of the service instead of a policy.")] = None,
    json_output: Json = False,
    server: Server = None,
    token: Token = None,
) -> None:
    """Switch a share of the runs, chosen by hash."""
    if (policy is None) == (profile is None):
        raise typer.BadParameter("give a policy or --profile")
    change: dict[str, Any] = {"policy": policy_of(policy)} if profile is None else {"profile": profile}
    with errors(), Client(server, token) as client:
        found = client.canary_start(selector, share=share, reason=reason, **change)
    _print_canary(found, json_output)


@canary.command(name="list")
def list_canaries(json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """List the canaries, newest first."""
    with errors(), Client(server, token) as client:
        found = client.canaries()
    if json_output:
        print_json(found)
        return
    header = ("id", "status", "share", "selector", "actor", "at", "reason")
    table(header, [[one[name] for name in header] for one in found])


@canary.command()
def show(canary_id: CanaryId, json_output: Json = False, server: Server = None, token: Token = None) -> None:
    """Show both arms of a canary, and how they did since the switch."""
    with errors(), Client(server, token) as client:
        found = client.canary(canary_id)
    _print_canary(found, json_output)


@canary.command()
def promote(
    canary_id: CanaryId, reason: Why, json_output: Json = False, server: Server = None, token: Token = None
) -> None:
    """Switch the rest as well."""
    with errors(), Client(server, token) as client:
        found = client.canary_promote(canary_id, reason=reason)
    _print_end(found, json_output)


@canary.command()
def back(
    canary_id: CanaryId, reason: Why, json_output: Json = False, server: Server = None, token: Token = None
) -> None:
    """Switch the members back to what they had."""
    with errors(), Client(server, token) as client:
        found = client.canary_back(canary_id, reason=reason)
    _print_end(found, json_output)


# Leaves


def _fields(kind: str, words: Sequence[str], factor: bool) -> dict[str, Any]:
    """What the words of a fleet command say, as its fields."""
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is no command: give one of {', '.join(KINDS)}")
    if kind == "bounds" and words:
        return {"guard": pairs(words, "limit")}
    if kind in _DIRECTIVES and words:
        args = pairs(words, "argument")
        step = args.pop("step", None) if kind == "rewind" else None
        return {"args": args or None, "step": step}
    if kind in ("override", "switch-policy", "set-profile"):
        if len(words) != 1:
            takes = {"override": "SETTING=NUMBER", "switch-policy": "a policy", "set-profile": "a profile"}[kind]
            raise typer.BadParameter(f"{kind} takes {takes}, and nothing else")
        if kind == "override":
            name, number = assigned(words[0])
            return {"setting": name, "factor" if factor else "value": number}
        return {"profile": words[0]} if kind == "set-profile" else {"policy": policy_of(words[0])}
    if words:
        raise typer.BadParameter(f"{kind} takes no {words[0]!r}")
    return {}


def _frozen(freeze: Mapping[str, Any]) -> str:
    return f"project {freeze['project']}" if freeze["project"] else "everything"


def _print_results(found: Mapping[str, Any], what: str = "") -> None:
    """What became of each run. what: the policy or profile that they are switched to."""
    rows = [(one["run"], one["status"], one["id"] or "-", _change(one, what)) for one in found["results"]]
    if rows:
        table(("run", "would be" if found["dry_run"] else "status", "id", "what"), rows)
    counts = ", ".join(f"{n} {status}" for status, n in found["counts"].items()) or "no run matches"
    print(f"{'dry run, nothing changed: ' if found['dry_run'] else ''}{counts}")


def _change(one: Mapping[str, Any], what: str) -> str:
    if one["error"]:
        return str(one["error"])
    left = clamped(one).removeprefix(", ")
    told = [words for words in (what, left, carried(one["carried"])) if words]
    would = one["would"]
    if not would:
        return "; ".join(told)
    moved = [
        f"{group} {short(lr)} -> {short(would['after'][group])}"
        for group, lr in would["before"].items()
        if lr != would["after"][group]
    ]
    ended = would["ends"]
    told.append(", ".join(moved) or "no learning rate moves")
    return "; ".join([*told, *([f"ends {', '.join(ended)}"] if ended else [])])


def _print_failed(failed: Sequence[Mapping[str, str]]) -> None:
    for one in failed:
        print(f"flyball: {one['run']} follows with its next report: {one['error']}", file=sys.stderr)


def _print_canary(found: Mapping[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(found)
        return
    members, controls = found["members"], found["controls"]
    print(f"{found['id']} {found['status']}: {len(members)} of {len(members) + len(controls)} runs, {found['reason']}")
    if found["paused"]:
        print(f"paused: {found['paused']}; runs that come later are not switched")
    section("members", ("run", "status", "command", "words"), [
        (one["run"], one["status"], one["command"] or "-", one["words"]) for one in members
    ])  # fmt: skip
    header = ("arm", "runs", "steps", "smoothed loss (middle half)", "spikes", "guard", "conflicts", "status")
    section("since the switch", header, [_arm(name, found["comparison"][name]) for name in ("members", "controls")])
    for words in found["comparison"]["words"]:
        print(words)


def _arm(name: str, arm: Mapping[str, Any]) -> tuple[Any, ...]:
    change = arm["loss_change"]
    middle = [_percent(change[one]) for one in ("median", "q1", "q3")] if change["n"] else []
    loss = "{} ({} to {}, n={})".format(*middle, change["n"]) if middle else "-"
    status = " ".join(f"{n} {word}" for word, n in arm["status"].items())
    return name, arm["runs"], short(arm["steps"]), loss, arm["spikes"], arm["guard"], arm["conflicts"], status


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _print_end(found: Mapping[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(found)
        return
    rows = [(one["run"], one["status"], one["id"] or "-", one["error"] or "") for one in found["results"]]
    table(("run", "status", "id", "error"), rows)
    print(f"{found['canary']}: {found['closed']}")
