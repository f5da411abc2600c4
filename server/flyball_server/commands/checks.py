"""What a command must be: a request in, arguments out with every default filled in, ready to be folded.

Rule of this module: a refusal names the field, the value and the remedy, and nothing has happened yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from math import isfinite
from typing import Any, NamedTuple

from flyball_server import limits
from flyball_server.checks import alternative, check_text
from flyball_server.core import commands
from flyball_server.core.base import nearest
from flyball_server.core.errors import Conflict, Invalid, NotFound
from flyball_server.core.events import Spec
from flyball_server.core.guard import Limits
from flyball_server.core.numbers import LARGEST_LR
from flyball_server.core.run import Run
from flyball_server.core.types import Group
from flyball_server.guards import expanded, limits_of
from flyball_server.messages import CommandRequest
from flyball_server.profiles import Profile
from flyball_server.rules import plan_of

#: What stands beside `kind` and `reason` in a request, by kind.
_FIELDS: dict[str, tuple[str, ...]] = {
    "override": ("setting", "groups", "value", "factor", "for_steps", "until_step", "force"),
    "hold": ("for_steps", "until_step"),
    "release": ("command", "setting"),
    "bounds": ("guard",),
    "switch_policy": ("policy", "base"),
    "set_profile": ("profile",),
    "rewind": ("step", "args"),
    **dict.fromkeys(("checkpoint", "restore", "evaluate", "stop"), ("args",)),
    "note": (),
}
#: What is never one too many: it ends others, or the training, or adds nothing that stays.
_ALWAYS = ("note", "release", "hold", "stop")
SETTINGS = ("lr", "momentum", "noise_std")
#: What can be taken away from a guard.
_LIMITS = [field.name for field in dataclass_fields(Limits)]


class Checked(NamedTuple):
    """A command ready to be folded. until: the first step it does not hold for."""

    args: dict[str, Any]
    until: int | None
    expires_at: int | None


class Around(NamedTuple):
    """What a command is checked against: the run as it stands, known profiles, and the caps on a project's limits."""

    spec: Spec
    run: Run
    profiles: Mapping[str, Profile]
    capped: Callable[[str, Mapping[str, Any], Iterable[str]], Mapping[str, Any]]


def check_envelope(request: CommandRequest) -> CommandRequest:
    """The request with its words trimmed. Raises Invalid for a kind that is none, fields that are not the kind's, and a
    reason that is missing or too long."""
    if request.kind not in commands.KINDS:
        raise Invalid(f"kind is {request.kind!r:.60}: there is no such command; give one of "
                      f"{', '.join(commands.KINDS)}")  # fmt: skip
    for name in request.fields:
        if name not in _FIELDS[request.kind]:
            allowed = ", ".join(_FIELDS[request.kind]) or "nothing but a reason"
            raise Invalid(f"{name}: {request.kind} takes no such field; it takes {allowed}")
    reason = " ".join(request.reason.split())
    if not reason:
        raise Invalid(f"reason is empty: say why; it stays in the journal with the {request.kind}")
    if len(reason) > limits.REASON_MAX:
        raise Invalid(f"reason has {len(reason)} characters: give at most {limits.REASON_MAX}")
    if len(request.key) > limits.NAME_MAX:
        raise Invalid(f"Idempotency-Key has {len(request.key)} characters: give at most {limits.NAME_MAX}")
    fields = json.dumps(dict(request.fields), ensure_ascii=False)
    for name, text in (("reason", reason), ("fields", fields), ("Idempotency-Key", request.key)):
        check_text(name, text)
    if len(fields.encode()) > limits.COMMAND_BYTES_MAX:
        raise Invalid(f"command has {len(fields.encode())} bytes: give at most {limits.COMMAND_BYTES_MAX}")
    return request._replace(reason=reason)


def expiry(request: CommandRequest, now_us: int) -> int | None:
    """When the command ends by itself, in microseconds since 1970 UTC; None: never. Raises Invalid for a time that is
    none, or over."""
    if request.expires_in_s is not None and request.expires_at is not None:
        raise Invalid("expires_in_s and expires_at are both given: give one")
    if request.expires_in_s is not None:
        if not (isfinite(request.expires_in_s) and 0 < request.expires_in_s <= limits.EXPIRES_MAX_S):
            raise Invalid(f"expires_in_s is {request.expires_in_s}: give 0 to {limits.EXPIRES_MAX_S:.0f} seconds")
        return now_us + int(request.expires_in_s * 1e6)
    if request.expires_at is None:
        return None
    try:
        moment = datetime.fromisoformat(request.expires_at)
    except ValueError:
        raise Invalid(f"expires_at is {request.expires_at!r:.40}: give a time such as 2027-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise Invalid(f"expires_at is {request.expires_at!r:.40}, which names no time zone: end it with Z for UTC")
    at = int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)
    if not now_us < at <= now_us + int(limits.EXPIRES_MAX_S * 1e6):
        raise Invalid(f"expires_at is {request.expires_at!r:.40}: that is over, or too far away")
    return at


def checked(request: CommandRequest, around: Around, now_us: int) -> Checked:
    """The command as it can be folded into the run as it stands. Raises Invalid, NotFound, Conflict."""
    spec, run = around.spec, around.run
    if request.kind != "note" and run.status in ("finished", "failed"):
        raise Conflict(f"run {spec.run}: it has {run.status}; only a note can be added until a new attempt is opened")
    open_ = len(run.steering.commands)
    if request.kind not in _ALWAYS and open_ >= limits.COMMANDS_MAX:
        raise Conflict(f"run {spec.run}: {open_} commands are not over: release some first (at most "
                       f"{limits.COMMANDS_MAX})")  # fmt: skip
    fields = dict(request.fields)
    until = _until(fields, run)
    args = _ARGS[request.kind](fields, around)
    return Checked(args, until, expiry(request, now_us))


def _until(fields: dict[str, Any], run: Run) -> int | None:
    """The first step a lasting command does not hold for; its two fields are taken out."""
    steps, step = fields.pop("for_steps", None), fields.pop("until_step", None)
    if steps is not None and step is not None:
        raise Invalid("for_steps and until_step are both given: give one")
    for name, value in (("for_steps", steps), ("until_step", step)):
        if value is not None and (type(value) is not int or not 1 <= value <= limits.INTEGER_MAX // 2):
            raise Invalid(f"{name} is {value!r:.40}: give a whole number of optimizer steps, 1 or more")
    # With a lag, decisions of steps already observed are told: the command holds from the next decision on.
    first = run.through + 1 + (0 if run.lag is None else run.lag + 1)
    if step is not None and step <= first:
        raise Invalid(f"until_step is {step}, but the first step it can hold for is {first}: give a later one")
    return step if steps is None else int(first + steps)


def _override(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    spec, controls = around.spec, [control.name for control in around.run.steering.controls]
    setting, groups = fields.get("setting", "lr"), fields.get("groups") or []
    value, factor = fields.get("value"), fields.get("factor")
    if setting not in SETTINGS and setting not in controls:
        known = [*SETTINGS, *controls]
        raise Invalid(f"setting is {setting!r:.60}, which this run does not have; give one of {', '.join(known)}")
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise Invalid(f"groups is {groups!r:.60}: give a list of group names, or leave it out for all")
    names = {group.name: group for group in spec.groups}
    for group in groups:
        if group not in names:
            raise Invalid(f"groups: run {spec.run} has no group {group!r:.60}; it has {', '.join(names)}")
    if groups and setting in controls:
        raise Invalid(f"groups: the control {setting} has no groups: leave it out")
    if (value is None) == (factor is None):
        raise Invalid(f"give value or factor for {setting}, one of the two")
    name, number = ("factor", factor) if value is None else ("value", value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not _fits(number, setting):
        raise Invalid(f"{name} is {number!r:.40}: give a finite number, 0 or more")
    if setting == "momentum":
        _check_momentum(name, number, [names[one] for one in groups] or spec.groups)
    if spec.mode == "multiplier" and setting == "lr" and value is not None:
        raise Invalid(
            "value: the run is in multiplier mode, where a scheduler of its own sets the learning rate: give a factor "
            "(factor=0.5, or lr=0.5 --factor on the command line)"
        )
    forced = _forced(
        fields.get("force"), value if setting == "lr" else None, [names[one] for one in groups] or spec.groups
    )
    if spec.mode == "multiplier" and setting == "momentum":
        raise Invalid("setting: momentum is not steered in multiplier mode")
    meant = ", ".join(groups) or ("" if setting in controls else "all groups")
    words = {"setting": setting, "groups": meant, "asked": f"{number:g}" if factor is None else f"x {number:g}"}
    args = {"setting": setting, "groups": sorted(set(groups)), name: float(number), **forced}
    return {**args, "words": words}


def _fits(number: float, setting: str) -> bool:
    return abs(number) <= LARGEST_LR and (number >= 0 or setting not in SETTINGS)


def _check_momentum(name: str, number: float, groups: Any) -> None:
    if name == "value" and not number < 1:
        raise Invalid(f"value is {number!r}: a momentum lies in [0, 1)")
    for group in groups:
        if group.momentum is None and group.betas is None:
            raise Invalid(f"groups: {group.name} has no momentum to override")


def _forced(force: Any, lr: float | None, groups: Iterable[Group]) -> dict[str, bool]:
    """What an override of `lr` records of `force`. An absolute value is most often meant for another optimizer where
    this one finds its own step size: Invalid, unless it is forced."""
    if not isinstance(force, bool | None):
        raise Invalid(f"force is {force!r:.40}: give true or false")
    free = [group for group in groups if group.lr_free]
    if lr is None or not free:
        return {}
    if not force:
        raise Invalid(
            f"value is {lr:g}, but group {free[0].name} finds its own step size, and its lr ({free[0].lr:g} at attach) "
            "only multiplies that: give a factor, or force: true where the value is meant"
        )
    return {"force": True}


def _release(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    beside, run = around.run.steering, around.spec.run
    command, setting = fields.get("command", ""), fields.get("setting", "")
    if not isinstance(command, str) or not isinstance(setting, str) or (command and setting):
        raise Invalid("release: give the id of one command, or a setting, or neither for all")
    found = commands.released(beside.commands, {"command": command, "setting": setting})
    if not found and command:
        raise NotFound(f"run {run}: command {command!r:.40} is over already, or was never given")
    if not found:
        raise Conflict(f"run {run}: there is nothing to release{' for ' + setting if setting else ''}")
    return {"command": command, "setting": setting, "words": {"released": ", ".join(found)}}


def _bounds(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    given, spec = fields.get("guard"), around.spec
    if not isinstance(given, Mapping) or not given:
        raise Invalid(f"guard is {given!r:.60}: give limits, such as {{'max_lr': 0.1}}; null takes one away")
    for name, value in given.items():
        if value is None and name not in _LIMITS:
            raise Invalid(f"guard.{name!r:.60}: there is no such limit to take away{nearest(name, _LIMITS)}")
    asked = {**spec.guard, **expanded({name: value for name, value in given.items() if value is not None})}
    asked = {name: value for name, value in asked.items() if given.get(name, ...) is not None}
    limits_of(asked)
    unknown = limits_of(asked).groups.keys() - {group.name for group in spec.groups}
    if unknown:
        raise Invalid(f"guard.groups: there is no group {', '.join(sorted(unknown))}; give the optimizer's own names")
    guard = dict(around.capped(spec.project, asked, [group.name for group in spec.groups]))
    words = {"guard": json.dumps(guard, sort_keys=True)}
    return {
        "guard": dict(given),
        "clamped": guard != asked,
        "plan": plan_of(spec._replace(guard=guard)),
        "words": words,
    }


def _switch(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    policy = fields.get("policy")
    policy = {"type": policy} if isinstance(policy, str) else policy
    if not isinstance(policy, Mapping):
        raise Invalid(f"policy is {policy!r:.60}: give {{'type': NAME, parameters ...}}, or a name")
    if "base" in fields:
        if policy.get("base") is not None:
            raise Invalid("base is given twice, in the policy and beside it: give it once")
        policy = {**policy, "base": fields["base"]}
    return _to(policy, around.spec.guard, "", around)


def _profile(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    name = fields.get("profile")
    profile = around.profiles.get(name) if isinstance(name, str) else None
    if profile is None:
        known = ", ".join(around.profiles) or "none"
        raise Invalid(f"profile is {name!r:.60}: the service has no such profile; it has {known}")
    asked = {**around.spec.guard, **profile.guard}
    names = [group.name for group in around.spec.groups]
    guard = dict(around.capped(around.spec.project, asked, names))
    found = _to({"base": None, **profile.policy}, guard, profile.name, around)
    found["words"]["profile"] = profile.name
    return {**found, "clamped": guard != asked}


def _to(policy: Mapping[str, Any], guard: Mapping[str, Any], profile: str, around: Around) -> dict[str, Any]:
    spec = around.spec
    found = alternative(policy, spec.base, around.profiles)
    if spec.mode == "multiplier" and found["base"] is not None:
        raise Invalid("base: the run is in multiplier mode, where a scheduler of its own is the base: leave it out")
    plan = plan_of(spec._replace(**found, guard=guard, profile=profile))
    return {"plan": plan, "words": {"before": spec.policy["type"], "after": found["policy"]["type"]}}


def _directive(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    """What a directive carries is between the caller and the job's own handler."""
    args = fields.get("args") or {}
    if not isinstance(args, Mapping):
        raise Invalid(f"args is {args!r:.60}: give a mapping for the job's handler, or leave it out")
    args = {**args, **{name: value for name, value in fields.items() if name == "step"}}
    step = args.get("step")
    if step is not None and (type(step) is not int or not 0 <= step <= around.run.through + 1):
        raise Invalid(f"step is {step!r:.40}: give 0 to {around.run.through + 1}")
    try:
        size = len(json.dumps(args, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Invalid(f"args: {error}: give plain JSON values") from None
    if size > limits.DIRECTIVE_BYTES_MAX:
        raise Invalid(f"args has {size} bytes: give at most {limits.DIRECTIVE_BYTES_MAX}")
    return args


def _nothing(fields: Mapping[str, Any], around: Around) -> dict[str, Any]:
    return {}


_ARGS: dict[str, Callable[[Mapping[str, Any], Around], dict[str, Any]]] = {
    "override": _override,
    "hold": _nothing,
    "release": _release,
    "bounds": _bounds,
    "switch_policy": _switch,
    "set_profile": _profile,
    **dict.fromkeys(commands.DIRECTIVES, _directive),
    "note": _nothing,
}
