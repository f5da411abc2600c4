"""Guard specifications at the edge: a mapping in, checked limits out.

Rule of this module: whatever is wrong is refused here, with the path of the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flyball_server.core.base import nearest
from flyball_server.core.errors import Invalid
from flyball_server.core.guard import GroupLimits, Limits
from flyball_server.presets import GUARDS

_ADAPTER = TypeAdapter(Limits)
_WINDOW_STEPS = Limits().window_steps


def expanded(guard: Mapping[str, Any]) -> dict[str, Any]:
    """`guard` with the limits of the preset it may name; what stands beside the preset wins. Raises Invalid."""
    name = guard.get("preset")
    if name is None:
        return dict(guard)
    preset = GUARDS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise Invalid(f"guard.preset: there is no guard {name!r:.60}{nearest(name, list(GUARDS))}")
    return {**preset.spec, **{key: value for key, value in guard.items() if key != "preset"}}


def joined(profile: Mapping[str, Any], guard: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The limits of the profile `name` and those a job asks for beside them. Raises Invalid where they
    differ about one."""
    for key in sorted(profile.keys() & guard.keys()):
        if profile[key] != guard[key]:
            raise Invalid(
                f"guard.{key}: {guard[key]!r:.60} is not allowed; the profile {name!r} says {profile[key]!r:.60}, "
                "and no job may change that: "
                "leave it out"
            )
    return {**guard, **profile}


def strictest(*guards: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The limits of all of several guards at once; each is given with whose it is, for messages, the run's own first.

    Upper limits: the smallest; lower ones, warm-up and cooldown: the largest. Of change per window the smaller ratio
    over the longer window, which holds a run back more than either alone. A group has its limits from all that name it;
    a scale, which is no limit, may be lowered by an earlier guard and not raised.
    Raises Invalid, naming both, where a scale is raised, and where a lower limit is above another's upper one.
    """
    out, said = _tightest([(source, guard) for source, guard in guards], "guard")
    names = list(dict.fromkeys(name for _, guard in guards for name in guard.get("groups") or {}))
    groups = {}
    for name in names:
        own = [(source, guard["groups"][name]) for source, guard in guards if name in (guard.get("groups") or {})]
        groups[name], _ = _tightest(own, f"guard.groups.{name}")
    if said.get("groups"):
        out["groups"] = groups
    return out


def yielding(guard: Mapping[str, Any], cap: Mapping[str, Any]) -> dict[str, Any]:
    """`guard` with what contradicts `cap` moved to the nearest that does not: bounds on the other side of the cap's,
    and scales above its own. What `strictest` would refuse of the two it then takes."""
    out = _yielding(guard, cap)
    ours, theirs = guard.get("groups") or {}, cap.get("groups") or {}
    if ours.keys() & theirs.keys():
        out["groups"] = {name: _yielding(one, theirs.get(name, {})) for name, one in ours.items()}
    return out


def _yielding(guard: Mapping[str, Any], cap: Mapping[str, Any]) -> dict[str, Any]:
    """One level of it."""
    out = dict(guard)
    for name, other, nearest_of in (
        ("min_lr", "max_lr", min), ("max_lr", "min_lr", max), ("min_factor", "max_factor", min),
        ("max_factor", "min_factor", max), ("scale", "scale", min),
    ):  # fmt: skip
        if None not in (out.get(name), cap.get(other)):
            out[name] = nearest_of(out[name], cap[other])
    return out


#: Of two values of a limit, the stricter one.
_STRICTER: Mapping[str, Callable[[Any, Any], Any]] = {
    "min_lr": max, "max_lr": min, "min_factor": max, "max_factor": min, "max_change": min,
    "max_change_per_window": min, "warmup_steps": max, "cooldown_steps": max, "keep_ratios": max, "scale": min,
}  # fmt: skip


def _tightest(guards: list[tuple[str, Mapping[str, Any]]], path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The strictest values of one level, and whose each is."""
    out: dict[str, Any] = {}
    said: dict[str, str] = {}
    for source, guard in guards:
        for key, value in guard.items():
            known = out.get(key)
            if key == "scale" and known is not None and known > value:
                raise Invalid(
                    f"{path}.scale: {known!r} of {said[key]} is not allowed; {source} says {value!r}, and nobody may "
                    "raise that: give at most as much, or leave it out"
                )
            # A window's length counts with its ratio, below.
            if known is None or (value is not None and key in _STRICTER and _STRICTER[key](known, value) != known):
                out[key], said[key] = value, source
    lengths = [g.get("window_steps") for _, g in guards if g.get("max_change_per_window") is not None]
    if any(length is not None for length in lengths):
        out["window_steps"] = max(_WINDOW_STEPS if length is None else length for length in lengths)
    elif lengths:
        out.pop("window_steps", None)
    for low, high in (("min_lr", "max_lr"), ("min_factor", "max_factor")):
        if None not in (out.get(low), out.get(high)) and out[low] > out[high]:
            raise Invalid(
                f"{path}.{low}: {out[low]!r} of {said[low]} is above {high} = {out[high]!r} of {said[high]}: one of "
                "the two has to give way"
            )
    return out, said


def limits_of(guard: Mapping[str, Any]) -> Limits:
    """The limits that `guard` describes, such as {"max_lr": 0.1, "groups": {"router": {"scale": 0.1}}}.

    Raises Invalid naming the key, the value and what is allowed.
    """
    try:
        # As JSON: strict there still takes a mapping for a dataclass, but no string for a number.
        return _ADAPTER.validate_json(json.dumps(dict(guard)), strict=True)
    except ValidationError as error:
        raise Invalid("; ".join(_problem(found) for found in error.errors())) from None


def relative(limits: Limits) -> Limits:
    """The limits without absolute bounds, for multiplier mode: only the client knows what a factor multiplies there."""
    groups = {name: replace(one, min_lr=None, max_lr=None) for name, one in limits.groups.items()}
    return replace(limits, min_lr=None, max_lr=None, groups=groups)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a guard."""
    return _ADAPTER.json_schema()


def _problem(found: Any) -> str:
    path = ".".join(("guard", *(str(part) for part in found["loc"])))
    if found["type"] == "unexpected_keyword_argument":
        limits = GroupLimits if len(found["loc"]) > 2 else Limits
        return f"{path}: there is no such limit{nearest(found['loc'][-1], [field.name for field in fields(limits)])}"
    return f"{path}: {found['msg'].removeprefix('Value error, ')} (got {found['input']!r:.80})"
