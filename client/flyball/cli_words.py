"""Commands in the words of the command line: what was asked, how far it is, who has a hand in a run.

Rule of this module: it prints or says what the service told, and asks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyball.cli_output import section, short


def print_steering(run: Mapping[str, Any]) -> None:
    """What of a run people and programs have a hand in: open commands, proposals, controls, and who else wrote."""
    given = [(c["id"], c["kind"], c["status"], c["actor"], _until(c), c["reason"]) for c in run["commands"]]
    section("commands", ("id", "command", "status", "by", "until", "reason"), given)
    open_ = [(p["id"], p["kind"], p["actor"], approved(p), p["reason"]) for p in run["proposals"]]
    section("proposals (flyball approve)", ("id", "command", "by", "approved", "reason"), open_)
    numbers = ("value", "applied", "declared", "min", "max")
    controls = [(c["control"], *(short(_number(c[name])) for name in numbers)) for c in run["controls"]]
    section("controls", ("control", *numbers), controls)
    conflicts = [(c["step"], c["attempt"], c["words"]) for c in run["conflicts"]]
    section("conflicts", ("step", "attempt", "who wrote what"), conflicts)


def stage(view: Mapping[str, Any], entry: Mapping[str, Any], groups: Sequence[str] | None = None) -> str:
    """One line of a command's history in words."""
    status, note = entry["status"], entry.get("note")
    told = f": {note}" if note else ""
    if status in ("accepted", "clamped"):
        lr = (view["verdict"] or {}).get("lr") or []
        settings = ", ".join(f"{name} {short(one)}" for name, one in zip(groups or [], lr, strict=False))
        words = f"; lr: {settings}" if settings else ""
        return f"clamped by the guard{words}" if status == "clamped" else f"accepted{words}"
    if status == "applied":
        return f"applied at step {entry['step']} on {entry['ranks']}/{entry['of_ranks']} ranks{told}"
    if status == "proposed":
        return f"proposed, approved by {approved(view)}"
    if status in ("rejected", "approved", "withdrawn", "expired") and entry.get("reason"):
        return f"{status} by {entry['actor']}: {entry['reason']}"
    return f"{status} at step {entry['step']}{told}" if "step" in entry else f"{status}{told}"


def asked(view: Mapping[str, Any]) -> str:
    """The command in a few words."""
    args, kind = view["args"], str(view["kind"])
    if kind == "override":
        what = f"x {short(args['factor'])}" if "factor" in args else short(args.get("value"))
        groups = args.get("groups")
        return f"override {args.get('setting', 'lr')} {what}" + (f" of {', '.join(groups)}" if groups else "")
    if kind == "bounds":
        return "bounds " + " ".join(
            f"{name}={'none' if value is None else value}" for name, value in args.get("guard", {}).items()
        )
    return kind


def approved(view: Mapping[str, Any]) -> str:
    """How many people approved a proposal, of how many it takes, and who."""
    by = view.get("approvals", view.get("approved", []))
    return f"{len(by)} of {view['needed']}" + (f" ({', '.join(by)})" if by else "")


def _until(command: Mapping[str, Any]) -> str:
    ends = [f"step {command['until_step']}"] if command["until_step"] is not None else []
    lasts = "released" if command["kind"] in ("override", "hold") else "-"
    return ", ".join([*ends, command["expires_at"]] if command["expires_at"] else ends) or lasts


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value
