"""Profiles: policies with their guard that a platform team keeps in a file and jobs refer to by name.

Rule of this module: a file with anything wrong in it is refused as a whole, before the service begins.

    vision:                        # attach(optimizer, run=..., policy="vision")
      about: ResNets on eight GPUs
      policy: {type: conservative, patience: 60}
      base: {type: cosine, T_max: 90000}
      guard: {preset: careful, max_lr: 0.4}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flyball_server.core.base import SCHEDULES, nearest
from flyball_server.core.errors import Invalid
from flyball_server.core.policies import POLICIES
from flyball_server.guards import expanded, limits_of
from flyball_server.names import NAME
from flyball_server.policy_files import load_data, resolve
from flyball_server.presets import PRESETS

_KEYS = ("about", "base", "guard", "policy")


class Profile(NamedTuple):
    """A checked profile. policy: with every default, and with its base where it has one. guard: its limits."""

    name: str
    about: str
    policy: Mapping[str, Any]
    guard: Mapping[str, Any]


def load_profiles(path: str | Path) -> dict[str, Profile]:
    """The profiles in a JSON, YAML or TOML file, by name. Raises Invalid with the path of what is wrong."""
    data = load_data(path)
    if not isinstance(data, Mapping):
        raise Invalid(f"{path}: give a mapping of profiles by name, each with a policy")
    try:
        return {name: _profile(name, one) for name, one in data.items()}
    except Invalid as error:
        raise Invalid(f"{path}: {error}") from error


def _profile(name: Any, data: Any) -> Profile:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Invalid(f"{name!r:.60} is no name for a profile: use letters, digits, '.', '_' or '-'")
    if name in POLICIES or name in PRESETS or name in SCHEDULES:
        raise Invalid(f"{name}: is the name of a policy, preset or base schedule; choose another")
    if not isinstance(data, Mapping) or "policy" not in data:
        raise Invalid(f"{name}: give a mapping with a policy, such as policy: {{type: steady}}")
    for key in data:
        if key not in _KEYS:
            raise Invalid(f"{name}.{key}: a profile has no such key{nearest(key, list(_KEYS))}")
    policy = data["policy"]
    policy = {"type": policy} if isinstance(policy, str) else policy
    try:
        if isinstance(policy, Mapping) and data.get("base") is not None:
            if policy.get("base") is not None:
                raise Invalid("base is given twice, in the policy and beside it: give it once")
            policy = {**policy, "base": data["base"]}
        resolved = resolve(policy).spec()
        guard = data.get("guard") or {}
        if not isinstance(guard, Mapping):
            raise Invalid(f"guard: {guard!r:.60} is not allowed; give a mapping of limits")
        guard = expanded(guard)
        limits_of(guard)
    except Invalid as error:
        raise Invalid(f"{name}: {error}") from error
    return Profile(name, str(data.get("about", "")), resolved, guard)


def use_profile(profile: Profile, policy: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of a job that asks for `profile`. Raises Invalid where it would change it."""
    extra = [key for key in policy if key != "type"]
    if extra:
        raise Invalid(
            f"{extra[0]}: the profile {profile.name!r} is used as it is; leave out what stands beside its name, or "
            "name a policy or preset instead"
        )
    return dict(profile.policy)
