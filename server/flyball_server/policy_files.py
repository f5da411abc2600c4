"""Policy specifications at the edge: files and mappings in, a policy with checked parameters out.

Rule of this module: whatever is wrong is refused here, with the path of the key, the value and what is
allowed; behind it everything is typed. A specification is `{"type": NAME, parameters ..., "base": {...}}`;
NAME may carry a version (`windowed@1`), and the name of a base schedule alone is short for the constant
policy on that base. `Resolved.spec()` is the specification with every default filled in: the journal keeps
it, and resolving it again gives the same.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from flyball_server.core.base import SCHEDULES, Base, build, nearest
from flyball_server.core.errors import Invalid
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.types import Part, Policy
from flyball_server.presets import PRESETS

#: A policy or group file larger than this is a mistake.
MAX_FILE_BYTES = 1 << 20

#: YAML 1.2's floats. PyYAML reads YAML 1.1, where `1e-5` is a string.
_YAML_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


#: A policy inside a policy: its name, or the whole.
_INNER_SCHEMA = ({"type": "object", "required": ["type"]}, {"type": "string"})


class Resolved(NamedTuple):
    """A checked specification."""

    policy: Policy
    config: Any
    base: Base | None

    def spec(self) -> dict[str, Any]:
        """Everything with its default, as plain JSON values; `resolve` reads it back."""
        whole = {"type": self.policy.tag, **_plain(asdict(self.config))}
        return whole if self.base is None else {**whole, "base": self.base.spec()}


def load_policy(path: str | Path) -> dict[str, Any]:
    """The mapping in a policy file (JSON, YAML or TOML). Raises Invalid."""
    data = load_data(path)
    if not isinstance(data, dict):
        raise Invalid(f"{path}: holds {_kind(data)}; a policy file holds one mapping, with a key 'type'")
    return data


def load_data(path: str | Path) -> Any:
    """What a JSON, YAML or TOML file holds, told by its suffix; any other is tried as JSON, then as YAML."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Invalid(f"{path}: {path.stat().st_size} bytes; the limit is {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: cannot be read ({error})") from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix in (".yaml", ".yml"):
            return _yaml(text)
        try:
            return json.loads(text, object_pairs_hook=_once)
        except ValueError:
            if suffix == ".json":
                raise
            return _yaml(text)
    except ValueError as error:
        raise Invalid(f"{path}: {error}") from error
    except RecursionError as error:
        raise Invalid(f"{path}: nested too deeply to be read") from error


def _once(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, Any]:
    """The mapping of the pairs; a key that stands twice would silently lose its first value."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} stands twice in one mapping; give it once")
        found[key] = value
    return found


def _yaml(text: str) -> Any:
    import yaml  # not at the top: a service that gets its policies over the wire never needs it

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain data only
    except yaml.MarkedYAMLError as error:
        # Without the lines it would quote: a file of webhooks has addresses in it that nobody shall read in a log.
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not readable as YAML ({error.problem or error.context}{where})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not readable as YAML ({error})") from error


def resolve(spec: Mapping[str, Any], profiles: Iterable[str] = ()) -> Resolved:
    """The policy, its checked parameters and the base schedule of a specification. Raises Invalid.

    profiles: names that may have been meant, too, by a wrong one.
    """
    spec = _mapping(spec, "")
    kind = spec.get("type")
    if isinstance(kind, str) and kind in SCHEDULES and kind not in POLICIES:
        if "base" in spec:
            raise Invalid(f"base: {kind!r} is itself a base schedule; give only one of the two")
        constant = POLICIES["constant"]
        return Resolved(constant, constant.config(), _base(spec, ""))
    base = spec.get("base")
    part = _part(
        {key: value for key, value in spec.items() if key != "base"}, "", [*POLICIES, *PRESETS, *SCHEDULES, *profiles]
    )
    return Resolved(*part, None if base is None else _base(base, "base."))


def _mapping(spec: Any, where: str) -> Mapping[str, Any]:
    """A specification with the preset it may name filled in; a name alone is short for {"type": NAME}."""
    if isinstance(spec, str) and where:
        spec = {"type": spec}
    if not isinstance(spec, Mapping):
        raise Invalid(
            f"{where.rstrip('.') or 'policy'}: {_kind(spec)} is not allowed; give a mapping with a key 'type'"
        )
    preset = PRESETS.get(str(spec.get("type")))
    return spec if preset is None else {**preset.spec, **{k: v for k, v in spec.items() if k != "type"}}


def _part(spec: Mapping[str, Any], where: str, known: list[str], within: tuple[str, ...] = ()) -> Part:
    """The policy of a specification without base, with its parameters.

    where: its path, for messages. known: what may be meant by a wrong name. within: the policies it stands in.
    """
    kind = spec.get("type")
    name, _, version = kind.partition("@") if isinstance(kind, str) else ("", "", "")
    if name in POLICIES and kind not in ALL and kind != name:
        tags = [tag for tag in ALL if tag.startswith(name + "@")]
        raise Invalid(f"{where}type: {kind!r:.60} is no version of {name} that is known{nearest(kind, tags)}")
    if name in SCHEDULES and name not in POLICIES:
        raise Invalid(f"{where}type: {kind!r:.60} is a base schedule, which may only stand beside the outermost policy")
    if name not in POLICIES:
        shown = repr(kind)[:80] if "type" in spec else f"None (the keys are {', '.join(map(repr, spec)) or 'none'})"
        raise Invalid(
            f"{where}type: {shown} is no policy, preset or profile{nearest(kind, list(dict.fromkeys(known)))}"
        )
    policy = ALL[str(kind)] if version else POLICIES[name]
    if name in within:
        raise Invalid(f"{where}type: {kind!r} is not allowed in here; a {name} cannot hold another one")
    parameters = _copied({key: value for key, value in spec.items() if key != "type"}, where)
    inner = {}
    for keys in [keys for path in policy.parts for keys in _slots(parameters, path.split("."))]:
        inner[keys] = _inner(parameters, keys, where, (*within, name))
        _at(parameters, keys[:-1])[keys[-1]] = {}
    config = _config(policy, parameters, where)
    for keys, part in inner.items():
        # Frozen for everybody else; nobody has seen it yet.
        object.__setattr__(_at(config, keys[:-1]), str(keys[-1]), part)
    return Part(policy, config)


def _inner(parameters: dict[str, Any], keys: tuple[int | str, ...], where: str, within: tuple[str, ...]) -> Part:
    """The policy that stands at `keys` inside another one's parameters."""
    path = where + ".".join(map(str, keys)) + "."
    spec = _mapping(_at(parameters, keys), path)
    for key, instead in (("base", "a base schedule stands"), ("seed", "the seed is given")):
        if spec.get(key) is not None:
            raise Invalid(f"{path}{key}: not allowed in here; {instead} beside the outermost policy")
    return _part({key: value for key, value in spec.items() if key != "base"}, path, [*POLICIES, *PRESETS], within)


def _slots(holder: Any, path: list[str], done: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """The places that `path` (with `*` for every item) names in plain data, where something stands."""
    if not path:
        return [] if holder is None else [done]
    if path[0] == "*":
        items = enumerate(holder) if isinstance(holder, list) else holder.items() if isinstance(holder, dict) else ()
        return [slot for key, one in items for slot in _slots(one, path[1:], (*done, key))]
    return _slots(holder.get(path[0]), path[1:], (*done, path[0])) if isinstance(holder, dict) else []


def _at(holder: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        holder = holder[key] if isinstance(holder, Mapping | list | tuple) else getattr(holder, str(key))
    return holder


def resolved_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` with every default filled in, as plain JSON values."""
    return resolve(spec).spec()


def json_schema(name: str, *, base: bool = False) -> dict[str, Any]:
    """The JSON Schema of the parameters of a policy, or of a base schedule (`base` where both exist).

    Raises Invalid for an unknown name.
    """
    if not base and name in PRESETS:
        return _preset_schema(name)
    policy = None if base else ALL.get(name, POLICIES.get(name))
    if policy is None and name not in SCHEDULES:
        raise Invalid(f"type: {name!r} is no policy or base schedule{nearest(name, [*POLICIES, *PRESETS, *SCHEDULES])}")
    schema = _adapter(name if policy is None else policy.tag).json_schema()
    if policy is not None and policy.parts:
        for part in (schema, *schema.get("$defs", {}).values()):
            inner = part["properties"].get("policy", {})
            inner["anyOf"] = [*_INNER_SCHEMA, *([{"type": "null"}] if "default" in inner else [])]
    properties = {"type": {"const": name}, **schema.get("properties", {})}
    if policy is not None:
        properties["base"] = {"type": ["object", "null"], "description": "A base schedule the policy multiplies."}
    return {**schema, "title": name, "properties": properties, "required": ["type", *schema.get("required", [])]}


def _preset_schema(name: str) -> dict[str, Any]:
    """The schema of the preset's policy, with the preset's values as defaults."""
    spec = PRESETS[name].spec
    schema = json_schema(spec["type"])
    properties = {
        key: {**facts, "default": spec[key]} if key in spec and key != "type" else facts
        for key, facts in schema["properties"].items()
    }
    properties["type"] = {"const": name}
    required = [key for key in schema["required"] if key == "type" or key not in spec]
    return {**schema, "title": name, "properties": properties, "required": required}


def summary(name: str, *, base: bool = False) -> str:
    """What a policy (or base schedule) does, in one line: the head of its module (or of its parameters)."""
    if not base and name in PRESETS:
        return PRESETS[name].about
    policy = None if base else ALL.get(name, POLICIES.get(name))
    text = SCHEDULES[name].config.__doc__ if policy is None else sys.modules[policy.config.__module__].__doc__
    name = name if policy is None else policy.name
    return (text or "").strip().splitlines()[0].removeprefix(f"Policy `{name}`: ")


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """The validator of a policy's parameters, by tag, or of a base schedule's, by name."""
    return TypeAdapter(ALL[name].config if name in ALL else SCHEDULES[name].config)


def _base(spec: Any, prefix: str) -> Base:
    spec = {"type": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping):
        raise Invalid(f"base: {_kind(spec)} is not allowed; give a mapping with a key 'type'")
    try:
        return build(spec)
    except ValueError as error:
        raise Invalid(f"{prefix}{error}") from error


def _copied(parameters: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy all the way down, in which every value is JSON's."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(parameters))
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"{where.rstrip('.') or 'policy'}: the parameters are not plain JSON values ({error})") from error
    return copy


def _config(policy: Policy, parameters: dict[str, Any], where: str) -> Any:
    """The policy's Config from `parameters`; strict as JSON is: "5" and true are no numbers, a list is a list."""
    try:
        return _adapter(policy.tag).validate_json(json.dumps(parameters), strict=True)
    except ValidationError as error:
        raise Invalid("; ".join(where + text for text in _problems(policy, parameters, error))) from error


def _problems(policy: Policy, parameters: dict[str, Any], error: ValidationError) -> list[str]:
    """One sentence per wrong key, the first that pydantic found for each."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        path, holder = _path(parameters, one["loc"])
        if one["type"] == "unexpected_keyword_argument" and path in ("guard", "seed", "lag", "mode"):
            text = f"{path}: {policy.name} has no such parameter; give it beside the policy, not in it"
        elif one["type"] == "unexpected_keyword_argument":
            text = f"{path}: {policy.name} has no such parameter{_nearest_field(policy, holder, one['loc'])}"
        elif one["type"] == "value_error":  # from __post_init__, which names the field itself
            text = (f"{path}." if path else "") + str(one["ctx"]["error"])
        elif one["type"] == "missing":
            text = f"{path}: {policy.name} needs it"
        else:
            text = f"{path}: {one['input']!r} is not allowed; {one['msg']}"
        found.setdefault(path or text, text)
    return list(found.values())


def _path(parameters: Any, loc: tuple[int | str, ...]) -> tuple[str, tuple[str, ...]]:
    """The dotted path of an error's location, without pydantic's names for the members of a union."""
    keys: list[str] = []
    here = parameters
    for part in loc:
        if isinstance(here, dict) and isinstance(part, str):
            keys.append(part)
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            keys.append(str(part))
            here = here[part]
    return ".".join(keys), tuple(keys[:-1])


def _nearest_field(policy: Policy, holder: tuple[str, ...], loc: tuple[int | str, ...]) -> str:
    """The known name closest to the misspelt last part of `loc`."""
    name = str(loc[-1])
    if holder:
        schema = _adapter(policy.tag).json_schema()
        known = [key for part in schema.get("$defs", {}).values() for key in part.get("properties", {})]
        return nearest(name, known)
    if policy.name in SCHEDULES and name in _names(SCHEDULES[policy.name].config):
        return f"; the base schedule {policy.name!r} has: give it under 'base'"
    return nearest(name, [*_names(policy.config), "base", "type"])


def _names(config: type[Any]) -> list[str]:
    return [entry.name for entry in fields(config)]


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return {"type": value.policy.tag, **_plain(value.config)}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "nothing"}.get(type(value), repr(value))
