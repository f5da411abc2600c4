"""Rows of the record in words: one sentence for each kind of what people and programs did.

Rule of this module: it says only what the row says. A kind that is not known here is shown by its fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flyball_server.core import commands

#: What a sentence is cut off at.
TEXT_MAX = 300
#: What of a list is shown.
LIST_MAX = 20
#: What of a row is not for a list of rows: whole states, the rules in force, digests of secrets.
_HIDDEN = ("restored", "state", "plan", "words", "sha256", "marks", "shadow_marks", "spec", "held", "content", "reach")


def text(kind: str, meta: Mapping[str, Any]) -> str:
    """What a row of this kind and meta says."""
    write = _WRITERS.get(kind)
    try:
        said = _fields(meta) if write is None else write(meta)
    except (KeyError, TypeError, AttributeError):  # a row of another version, or another kind of this name
        said = _fields(meta)
    said = " ".join(said.split())
    return said if len(said) <= TEXT_MAX else said[: TEXT_MAX - 1] + "…"


def slim(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A row's meta without what no list is read for: whole states, specifications, digests of secrets."""
    out: dict[str, Any] = {}
    for name, value in meta.items():
        if name == "spec" and isinstance(value, Mapping):
            out |= {key: value[key] for key in ("policy", "base", "guard", "labels", "profile") if key in value}
        elif name not in _HIDDEN:
            out[name] = slim(value) if isinstance(value, Mapping) else _cut(value) if isinstance(value, list) else value
    return out


def _cut(values: list[Any]) -> list[Any]:
    """A fleet may have thousands of runs."""
    more = len(values) - LIST_MAX
    return values if more <= 0 else [*values[:LIST_MAX], f"and {more} more"]


def _fields(meta: Mapping[str, Any]) -> str:
    shown = {name: one if isinstance(one, str) else json.dumps(one) for name, one in slim(meta).items()}
    return ", ".join(f"{name} {words}" for name, words in shown.items())


def _created(meta: Mapping[str, Any]) -> str:
    origin, said = meta.get("origin"), f"begun under {meta['spec']['policy']['type']}"
    if origin is None:
        return said
    how = "as a fork of" if origin["kind"] == "fork" else "from a checkpoint of"
    return f"{said}, {how} {origin['run']} at step {origin['step']}"


def _attached(meta: Mapping[str, Any]) -> str:
    back = ", going back" if meta["restored"] is not None else ""
    return f"attached from step {meta['from_step']}{back}, session {meta['session']}"


def _commanded(meta: Mapping[str, Any]) -> str:
    verdict = meta.get("verdict") or {}
    status = f"{verdict.get('status', 'given')}{clamped(meta['args'], verdict)}"
    of = f" (proposal {meta['proposal']})" if meta.get("proposal") else ""
    return f"{asked(meta['kind'], meta['args'])}, {status}{of}: {meta['reason']}"


def _moved(meta: Mapping[str, Any]) -> str:
    applied = meta["status"] == "applied"
    where = f" at step {meta['step']} on {meta['ranks']}/{meta['of_ranks']} ranks" if applied else ""
    note = f": {meta['note']}" if meta["note"] else ""
    left = f", clamped to {meta['clamped_to']}" if meta.get("clamped_to") else ""
    return f"command {meta['command']} {meta['status']}{where}{left}{note}"


def _answered(meta: Mapping[str, Any]) -> str:
    note = f": {meta['note']}" if meta["note"] else ""
    return f"directive {meta['directive']} {meta['outcome']} by the job{note}"


def _proposed(meta: Mapping[str, Any]) -> str:
    return f"proposes {asked(meta['kind'], meta['args'])}, {meta['needed']} to approve: {meta['reason']}"


def _judged(meta: Mapping[str, Any]) -> str:
    # Of several approvals that a proposal takes, this is one.
    return f"proposal {meta['proposal']}: {meta['verdict']} by {meta['actor']}: {meta['reason']}"


def _asked(meta: Mapping[str, Any]) -> str:
    return "; ".join(f"the policy asks for {asked(kind, args)}: {reason}" for kind, args, reason in meta["asks"])


def _deleted(meta: Mapping[str, Any]) -> str:
    return f"run {meta['run']} deleted, {meta['rows']} rows: {meta['reason']}"


def _imported(meta: Mapping[str, Any]) -> str:
    return f"run {meta['run']} imported, {meta['rows']} rows, signed by {meta['signer']}"


def _token_created(meta: Mapping[str, Any]) -> str:
    where = "all projects" if meta["projects"] is None else ", ".join(meta["projects"])
    return f"token {meta['name']} made, {meta['role']} in {where}"


def _frozen(meta: Mapping[str, Any]) -> str:
    return f"{'everything' if meta['project'] is None else 'project ' + meta['project']} frozen: {meta['reason']}"


def _thawed(meta: Mapping[str, Any]) -> str:
    return f"{'everything' if meta['project'] is None else 'project ' + meta['project']} thawed: {meta['reason']}"


def _fleet(meta: Mapping[str, Any]) -> str:
    command = meta["command"]
    return f"{command['kind']} for the {len(meta['runs'])} runs of {meta['selector']}: {command['reason']}"


def _canary(meta: Mapping[str, Any]) -> str:
    share, command = f"{100 * meta['share']:g} % of the {len(meta['runs'])} runs", meta["command"]
    return f"canary of {command['kind']} on {share} of {meta['selector']}: {command['reason']}"


def asked(kind: str, args: Mapping[str, Any]) -> str:
    """A command and what it is about."""
    words = args.get("words") or {}
    if kind == "override":
        how = words.get("asked") or (f"x {args['factor']:g}" if "factor" in args else f"{args['value']:g}")
        setting = args.get("setting", "lr")
        everywhere = " of all groups" if setting in ("lr", "momentum", "noise_std") else ""  # a control has none
        groups = f" of {', '.join(args['groups'])}" if args.get("groups") else everywhere
        return f"override of {setting}{groups}: {how}"
    rest = {name: value for name, value in args.items() if name not in (*_HIDDEN, "clamped") and value}
    about = next((words[name] for name in ("released", "profile", "after", "guard") if words.get(name)), "")
    about = about or (json.dumps(rest) if rest else "")
    return f"{kind} {about}".rstrip()


def clamped(args: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """What the guard left of a command with this verdict: " to 0.02", or "" where it left all."""
    left = commands.clamped_to(args, verdict.get("held")) if verdict.get("status") == "clamped" else ""
    return f" to {left}" if left else ""


_WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "created": _created,
    "attached": _attached,
    "ended": lambda meta: f"ended, {meta['outcome']}",
    "declared": lambda meta: "declared controls " + ", ".join(str(one[0]) for one in meta["controls"]),
    "commanded": _commanded,
    "command_moved": _moved,
    "directive_answered": _answered,
    "proposed": _proposed,
    "judged": _judged,
    "asked": _asked,
    "deleted": _deleted,
    "imported": _imported,
    "token_created": _token_created,
    "token_revoked": lambda meta: f"token t{meta['token']} revoked: {meta['reason']}",
    "refused": lambda meta: f"refused {meta['count']} times: {meta['why']}",
    "frozen": _frozen,
    "thawed": _thawed,
    "fleet": _fleet,
    "canary": _canary,
    "heads": lambda meta: f"heads of {len(meta['heads']['runs'])} runs signed",
}
