"""Guard specifications at the edge: a mapping in, checked limits out.

Rule of this module: whatever is wrong is refused here, with the path of the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flyball_server.core.base import nearest
from flyball_server.core.errors import Invalid
from flyball_server.core.guard import GroupLimits, Limits
from flyball_server.presets import GUARDS

_ADAPTER = TypeAdapter(Limits)


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
