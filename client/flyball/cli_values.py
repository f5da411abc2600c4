"""What the commands of `flyball` read from words on the command line: settings, limits, policies, spans of time.

Rule of this module: a word that means nothing is a wrong command line, and the message says what would mean something.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flyball import yaml
from flyball.cli_output import typer
from flyball.errors import FlyballError

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NOTHING = ("none", "null")


def assigned(word: str) -> tuple[str, float]:
    """`lr=0.01` as name and number."""
    name, sign, text = word.partition("=")
    try:
        if name and sign:
            return name, float(text)
    except ValueError:
        pass
    raise typer.BadParameter(f"{word!r} is no setting: give SETTING=NUMBER, such as lr=0.01")


def pairs(words: Sequence[str], what: str) -> dict[str, Any]:
    """`KEY=VALUE` words as a mapping. A value is JSON where it is any, else text; none: no value."""
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not name or not sign:
            raise typer.BadParameter(f"{word!r} is no {what}: give NAME=VALUE")
        if text.lower() in _NOTHING:
            found[name] = None
            continue
        try:
            found[name] = json.loads(text, parse_constant=str)
        except ValueError:
            found[name] = text
    return found


def seconds(text: str | None) -> float | None:
    """`90s`, `30min`, `2h`, `1d` in seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|d)", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no span of time: give a number and s, min, h or d, such as 2h")
    return float(found[1]) * _SECONDS[found[2]]


def policy_of(given: str | None) -> dict[str, Any] | None:
    """A policy as the command line names it: its name, a JSON object, or a file that holds one."""
    if given is None:
        return None
    text, suffix = given.strip(), Path(given.strip()).suffix
    if text.startswith("{"):
        return _object(given, _json(text, given))
    if suffix not in (".json", ".yaml", ".yml", ".toml"):
        return {"type": text}
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise typer.BadParameter(f"{given} cannot be read: {words}") from error
    if suffix == ".toml":
        try:
            return tomllib.loads(content)
        except tomllib.TOMLDecodeError as error:
            raise typer.BadParameter(f"{given} is no TOML: {error}") from error
    if suffix == ".json":
        return _object(given, _json(content, given))
    try:
        return _object(given, yaml.parsed(content, given))
    except FlyballError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error


def _json(text: str, given: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{given!r:.80} is no JSON: {error}") from error


def _object(given: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{given!r:.80} holds no policy: give a mapping with a `type`")
    return found
