"""Commands in the words of the command line: what was asked, how far it is, who has a hand in a run.

Rule of this module: it prints or says what the service told, and asks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyball.cli_output import section, short


def print_steering(run: Mapping[str, Any]) -> None:
    """What of a run people and programs have a hand in: open commands, proposals, controls, and who else wrote."""
    given = [
        (c["id"], f"{c['kind']}{clamped(c)}", c["status"], c["actor"], _until(c), c["reason"]) for c in run["commands"]
    ]
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
        words = _verdict(view, groups or [])
        if status == "accepted":
            return f"accepted{words}"
        limits = f" to {view['clamped_to']}" if view["kind"] in ("bounds", "set_profile") else ""
        return f"clamped by the guard{limits}{words}"
    if status == "applied":
        return f"applied at step {entry['step']} on {entry['ranks']}/{entry['of_ranks']} ranks{told}"
    if status == "proposed":
        return f"proposed, approved by {approved(view)}"
    if status == "approved":
        judged = [one for one in view["history"] if one["status"] == "approved" and one["seq"] <= entry["seq"]]
        return f"approved {len(judged)} of {view['needed']} by {entry['actor']}: {entry.get('reason', '')}"
    if status in ("rejected", "withdrawn", "expired") and entry.get("reason"):
        return f"{status} by {entry['actor']}: {entry['reason']}"
    return f"{status} at step {entry['step']}{told}" if "step" in entry else f"{status}{told}"


def asked(view: Mapping[str, Any]) -> str:
    """The command in a few words."""
    args, kind = view["args"], str(view["kind"])
    if kind == "override":
        what = f"x {short(args['factor'])}" if "factor" in args else short(args.get("value"))
        groups = args.get("groups")
        return f"override {args.get('setting') or 'lr'} {what}" + (f" of {', '.join(groups)}" if groups else "")
    if kind == "bounds":
        return "bounds " + " ".join(
            f"{name}={'none' if value is None else value}" for name, value in args.get("guard", {}).items()
        )
    if kind in ("switch_policy", "set_profile"):
        return f"{kind} to {_target(args)}"
    return kind


def titled(view: Mapping[str, Any]) -> str:
    """The command in a few words, and what the guard left of it, whatever became of it since."""
    return asked(view) + ("" if view["history"][-1]["status"] == "clamped" else clamped(view))


def clamped(view: Mapping[str, Any]) -> str:
    """What the guard left of a clamped command."""
    return f", clamped to {view['clamped_to']}" if view.get("clamped_to") else ""


def carried(names: Sequence[str]) -> str:
    """What another policy took over from the one before it."""
    return f"carried over: {', '.join(names)}" if names else ""


def _verdict(view: Mapping[str, Any], groups: Sequence[str]) -> str:
    """What a command does at once: to the learning rates, or to the setting or control that it is about."""
    verdict, setting = view["verdict"] or {}, view["args"].get("setting") or "lr"
    if setting != "lr":
        left = clamped(view).removeprefix(", clamped to ")
        held = (verdict.get("held") or {}).get("controls") or {}
        now = left or ", ".join(short(value) for value in held.values())
        return f"; {setting} {now}" if now else ""
    told = ", ".join(f"{name} {short(one)}" for name, one in zip(groups, verdict.get("lr") or [], strict=False))
    return "; ".join(["", *([f"lr: {told}"] if told else []), *filter(None, [carried(verdict.get("carried") or ())])])


def _target(args: Mapping[str, Any]) -> str:
    """The policy that a switch is to, and the profile that it is of."""
    plan = args.get("plan") or args
    policy, profile = plan.get("policy") or "", plan.get("profile") or ""
    name = str(policy if isinstance(policy, str) else policy.get("type", ""))
    return f"{profile} ({name})" if profile and name else str(profile or name)


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
