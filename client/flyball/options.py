"""What the options of `attach` must be: a wrong one is refused by name, before anything is sent.

Rule of this module: what an option means is not known here, only what it may look like. The service checks the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def check(name: str, value: Any, *kinds: type, wanted: str) -> None:
    """Raise ValueError where `value` is of none of the kinds. True and False are no numbers here."""
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r:.80}: give {wanted}")


def check_mapping(name: str, value: Any, wanted: str, *, or_text: bool = False) -> None:
    """Raise ValueError where `value` is neither None nor a mapping (or text) that JSON can carry."""
    if value is None or (or_text and isinstance(value, str)):
        return
    check(name, value, Mapping, wanted=wanted)
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {value!r:.80}, which is no plain JSON ({error}): give {wanted}") from error


def check_seconds(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise ValueError where `value` is no time."""
    if value is None and or_none:
        return
    wanted = "seconds, 0 or more" + (", or None" if or_none else "")
    check(name, value, int, float, wanted=wanted)
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}: give {wanted}")


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raise ValueError where `value` is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.80}: give one of {', '.join(repr(choice) for choice in choices)}")
