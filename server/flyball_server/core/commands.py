"""Commands: what people and programs ask of a run, and how an accepted one bends the settings.

Rule of this module: pure. A command changes a run only as an event of its journal, and never beyond the run's guard.

An **override** puts its own value, or a factor, in the place of what policy, base schedule and guard say, and is
clamped once, when it is given: to the guard's bounds, and to the largest change the guard allows one decision. The
bounds hold on while it lasts. A **hold** is an override of everything, with the settings of that moment. The policy
underneath goes on deciding, and has the word again when the command is released, expires or is superseded. Commands are
not training time: going back to an earlier step leaves them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flyball_server.core import guard
from flyball_server.core.types import Answered, Group, Settings

#: What stays in force until somebody or some step ends it.
LASTING = ("override", "hold")
#: What changes the rules the run is folded under.
RULING = ("bounds", "switch_policy", "set_profile")
#: What is asked of the training job, which answers.
DIRECTIVES = ("checkpoint", "restore", "rewind", "evaluate", "stop")
#: All kinds.
KINDS = (*LASTING, "release", *RULING, *DIRECTIVES, "note")
#: Of these a receipt tells when they were applied.
CONFIRMED = (*LASTING, "release", *RULING)
#: Where a command can end.
FINAL = ("applied", "done", "declined", "expired", "superseded", "released", "withdrawn")
#: Idempotency keys, rules, conflicts and reporters that a run remembers, the newest.
KEYS_KEPT = 256
PLANS_KEPT = 64
CONFLICTS_KEPT = 8
REPORTERS_KEPT = 64
#: Answers to what its policy asked that a run remembers, the newest.
POLICY_ANSWERS_KEPT = 16


class Held(NamedTuple):
    """What a lasting command puts in the place of the settings, per group; None: nothing about it.

    relative: the numbers are factors on what policy, base and guard say. controls: values by name.
    """

    lr: tuple[float | None, ...] | None = None
    momentum: tuple[float | None, ...] | None = None
    noise_std: tuple[float | None, ...] | None = None
    controls: Mapping[str, float] = {}
    relative: bool = False


class Command(NamedTuple):
    """An accepted command that is not over. id: "c" and the number of its row, or "a" of a policy's own asking.

    status: accepted, clamped or applied. until: the first step it does not hold for; expires_at: microseconds since
    1970 UTC when somebody ends it. held: of a lasting one. clamped: whether the guard left less of it than was asked.
    """

    id: str
    kind: str
    seq: int
    actor: str
    reason: str
    status: str
    args: Mapping[str, Any]
    until: int | None = None
    expires_at: int | None = None
    held: Held | None = None
    clamped: bool = False


class Control(NamedTuple):
    """A scalar of the training job that it declared: the value it begins with, and its bounds."""

    name: str
    value: float
    min: float
    max: float


class Proposal(NamedTuple):
    """A command somebody may only propose. approved: by whom so far; needed: how many it takes."""

    id: str
    kind: str
    seq: int
    actor: str
    reason: str
    args: Mapping[str, Any]
    needed: int
    approved: tuple[str, ...] = ()
    until: int | None = None
    expires_at: int | None = None


class Steering(NamedTuple):
    """What a run has of commands. It is no part of training time: going back to an earlier step leaves it.

    commands: those not over, oldest first. plans: (row, rules as JSON) where a command changed the rules. newest: the
    row of the newest command: whoever knew only of earlier rows decided without it. unsettled: a command waits for the
    next observation to show in the settings. whole: momentum was steered once, so that from then on it is always said.
    controls, applied_controls: the declared ones, and their values as of the newest receipt. proposals: open ones.
    reporters: newest number by source. keys: (idempotency key with its actor, command). confirmed: the newest row a
    receipt confirmed. restoring: the policy asked the job to go back, and it neither has nor declined. rollbacks: how
    often it has, since the policy is in force. conflicts: (words, step, attempt), newest last. answers: what became of
    what the policy in force asked, for one that reads ANSWERS.
    """

    commands: tuple[Command, ...] = ()
    plans: tuple[tuple[int, str], ...] = ()
    newest: int = 0
    unsettled: bool = False
    whole: bool = False
    controls: tuple[Control, ...] = ()
    applied_controls: Mapping[str, float] = {}
    proposals: tuple[Proposal, ...] = ()
    reporters: Mapping[str, int] = {}
    keys: tuple[tuple[str, str], ...] = ()
    confirmed: int = 0
    restoring: bool = False
    rollbacks: int = 0
    conflicts: tuple[tuple[str, int, int], ...] = ()
    answers: tuple[Answered, ...] = ()


#: A run that nobody ever gave a command.
NONE = Steering()


def lasting(commands: Sequence[Command]) -> tuple[Command, ...]:
    """Those that bend the settings."""
    return tuple([command for command in commands if command.held is not None])


def bent(
    limits: guard.Limits, groups: tuple[Group, ...], commands: Sequence[Command], step: int, settings: Settings
) -> Settings:
    """The settings of `step` under the lasting commands that hold then, inside the guard's bounds."""
    lr, momentum, noise_std = settings
    for command in commands:
        held = command.held
        if held is None or (command.until is not None and step >= command.until):
            continue
        if held.lr is not None:
            lr = _over(held.lr, lr, held.relative)
        if held.momentum is not None:
            now = momentum if momentum is not None else own_momentum(groups)
            momentum = tuple([m if h is None else h for h, m in zip(held.momentum, now, strict=True)])
        if held.noise_std is not None:
            noise_std = _over(held.noise_std, noise_std or (0.0,) * len(groups), held.relative)
    if lr is not settings.lr:
        lr = guard.within(limits, groups, lr)
    return settings if (lr, momentum, noise_std) == settings else Settings(lr, momentum, noise_std)


def _over(held: Sequence[float | None], now: Sequence[float], relative: bool) -> tuple[float, ...]:
    pairs = zip(held, now, strict=True)
    return tuple([n if h is None else n * h if relative else h for h, n in pairs])


def own_momentum(groups: tuple[Group, ...]) -> tuple[float | None, ...]:
    """The momentum (or beta1) each group was declared with."""
    return tuple([g.betas[0] if g.momentum is None and g.betas is not None else g.momentum for g in groups])


def control_values(controls: Sequence[Control], commands: Sequence[Command], step: int) -> dict[str, float]:
    """The value of every declared control at `step`."""
    values = {control.name: control.value for control in controls}
    bounds = {control.name: control for control in controls}
    for command in commands:
        held = command.held
        if held is None or (command.until is not None and step >= command.until):
            continue
        for name, value in held.controls.items():
            if name in bounds:
                one = bounds[name]
                value = values[name] * value if held.relative else value
                values[name] = min(max(value, one.min), one.max)
    return values


def holding(
    limits: guard.Limits,
    state: guard.GuardState,
    groups: tuple[Group, ...],
    base: tuple[float, ...] | None,
    controls: Sequence[Control],
    *,
    args: Mapping[str, Any],
    free: Settings,
    now: Settings,
    values: Mapping[str, float],
) -> tuple[Held, bool]:
    """What an override with these arguments puts in the place of the settings, and whether the guard clamped it.

    args: {"setting", "groups" ([]: all), "value" or "factor"}. free: the settings without any command; now: those in
    force; values: the controls' values in force.
    """
    setting, names, factor = args["setting"], args["groups"], args.get("factor")
    wanted = args["value"] if factor is None else factor
    meant = [not names or group.name in names for group in groups]
    asked = tuple([wanted if one else None for one in meant])
    relative = factor is not None
    if setting == "lr":
        targets = _over(asked, free.lr, True) if relative else _over(asked, now.lr, False)
        allowed = guard.allowed(limits, state, groups, base, now.lr, targets)
        clamped = any(one and a != t for one, a, t in zip(meant, allowed, targets, strict=True))
        if not clamped:
            return Held(lr=asked, relative=relative), False
        if relative:
            pairs = zip(allowed, free.lr, meant, strict=True)
            return Held(lr=tuple([(a / f if f > 0 else 1.0) if m else None for a, f, m in pairs]), relative=True), True
        return Held(lr=tuple([a if m else None for a, m in zip(allowed, meant, strict=True)])), True
    if setting == "momentum":
        before = free.momentum if free.momentum is not None else own_momentum(groups)
        momenta = [None if m is None or not one else m * factor if factor is not None else wanted
                   for m, one in zip(before, meant, strict=True)]  # fmt: skip
        kept = tuple([None if m is None else min(max(m, 0.0), guard.MOMENTUM_MAX) for m in momenta])
        return Held(momentum=kept), kept != tuple(momenta)
    if setting == "noise_std":
        return Held(noise_std=asked, relative=relative), False
    control = next(one for one in controls if one.name == setting)
    target = control.value * factor if factor is not None else wanted
    value = min(max(target, control.min), control.max)
    return Held(controls={setting: value}), value != target


def hold(now: Settings, groups: tuple[Group, ...], values: Mapping[str, float]) -> Held:
    """Everything as it is."""
    momentum = now.momentum if now.momentum is not None else own_momentum(groups)
    return Held(now.lr, momentum, now.noise_std or (0.0,) * len(groups), dict(values))


def superseded(commands: Sequence[Command], kind: str, args: Mapping[str, Any]) -> list[str]:
    """The lasting commands that a new one leaves nothing of: for the same setting, and for each of their groups.

    A hold covers overrides and ends none: they go on when it is over. That of a freeze ends with the freeze alone.
    """
    if "frozen" in args:
        return []
    if kind == "hold":
        return [command.id for command in commands if command.kind == "hold" and "frozen" not in command.args]
    if kind != "override":
        return []
    out = []
    for command in commands:
        if command.kind == "override" and command.args["setting"] == args["setting"]:
            before, after = set(command.args["groups"]), set(args["groups"])
            if not after or (before and before <= after):
                out.append(command.id)
    return out


def released(commands: Sequence[Command], args: Mapping[str, Any]) -> list[str]:
    """The commands that a release means: the one it names, those of a setting, or every one that lasts or waits for the
    job's answer."""
    if args.get("command"):
        return [command.id for command in commands if command.id == args["command"]]
    if args.get("setting"):
        return [c.id for c in commands if c.kind == "override" and c.args["setting"] == args["setting"]]
    return [c.id for c in commands if c.kind in (*LASTING, *DIRECTIVES)]


def clamped_to(args: Mapping[str, Any], held: Mapping[str, Any] | None, groups: Sequence[str] = ()) -> str:
    """What the guard left of a clamped command, in words: the value that holds (by group, where they differ), or the
    limits in force. held: a `Held` as a mapping; groups: their names, where they are known."""
    if held is None:
        limits = (args.get("plan") or {}).get("guard") or {}
        return " ".join(f"{name}={json.dumps(value)}" for name, value in sorted(limits.items()))
    times = "x " if held.get("relative") else ""
    if held.get("controls"):
        return ", ".join(f"{value:g}" for value in held["controls"].values())
    row = next((held[name] for name in ("lr", "momentum", "noise_std") if held.get(name)), ())
    told = [(groups[i] if groups else "", f"{times}{value:g}") for i, value in enumerate(row) if value is not None]
    if len({value for _, value in told}) == 1:
        return told[0][1]
    return ", ".join(f"{name} {value}".lstrip() for name, value in told)


_SENTENCES = {
    "override": "{actor} overrides {setting}{of}: {asked}{clamped}.",
    "hold": "{actor} holds all settings as they are.",
    "release": "{actor} releases {released}.",
    "bounds": "{actor} sets the limits {guard}{clamped}.",
    "switch_policy": "{actor} switches the policy from {before} to {after}; carried over: {carried}.",
    "set_profile": "{actor} sets the profile {profile}, and with it {after} for {before}; carried over: {carried}.",
}


def explain(fields: Mapping[str, Any]) -> str:
    """A command's mark in words, with the reason that was given."""
    of = f" of {fields['groups']}" if fields.get("groups") else ""
    sentence = _SENTENCES.get(fields["kind"], "{actor} asks for {kind}.").format(**fields, of=of)
    return f"{sentence} Reason: {fields['reason']}"
