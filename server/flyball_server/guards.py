"""Guard specifications at the edge: a mapping in, checked limits out.

Rule of this module: whatever is wrong is refused here, with the path of the key, the value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flyball_server.core.errors import Invalid
from flyball_server.core.guard import GroupLimits, Limits

_ADAPTER = TypeAdapter(Limits)


def limits_of(guard: Mapping[str, Any]) -> Limits:
    """The limits that `guard` describes, such as {"max_lr": 0.1, "groups": {"router": {"scale": 0.1}}}.

    Raises Invalid naming the key, the value and what is allowed.
    """
    try:
        # As JSON: strict there still takes a mapping for a dataclass, but no string for a number.
        return _ADAPTER.validate_json(json.dumps(dict(guard)), strict=True)
    except ValidationError as error:
        raise Invalid("; ".join(_problem(found) for found in error.errors())) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a guard."""
    return _ADAPTER.json_schema()


def _problem(found: Any) -> str:
    path = ".".join(("guard", *(str(part) for part in found["loc"])))
    if found["type"] == "unexpected_keyword_argument":
        limits = GroupLimits if len(found["loc"]) > 2 else Limits
        return f"{path}: there is no such limit; allowed are {', '.join(field.name for field in fields(limits))}"
    return f"{path}: {found['msg'].removeprefix('Value error, ')} (got {found['input']!r:.80})"
