"""Webhooks as a file names them: who is told, of what, and where the secret lies that signs it.

Rule of this module: a file with anything wrong in it is refused as a whole, before the service begins; and no secret
stands in it, but the name of the variable or the file that holds one. An address may be one, too, as those of chat
services are: behind its host nothing of it is ever shown.

    ops:
      url: https://ops.example/flyball
      secret_env: OPS_HOOK_SECRET
      events: [spike, conflict, command, ended]
      projects: [vision]
      labels: {team: a}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flyball_server import limits
from flyball_server.core.base import nearest
from flyball_server.core.errors import Invalid
from flyball_server.names import NAME
from flyball_server.policy_files import load_data

#: What a hook may be told of.
EVENTS = ("spike", "conflict", "stale", "lost", "command", "proposal", "ended", "damaged")
#: Characters a secret must have at least: it is guessed off-line, from one signed body.
SECRET_MIN = 16
_NEEDED = "url, events and secret_env or secret_file"
_KEYS = ("url", "secret_env", "secret_file", "events", "projects", "labels")


class Secret:
    """Bytes that no message shows."""

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret(...)"


class Hook(NamedTuple):
    """Where events go. projects: None: of all. labels: of runs that have all of these."""

    name: str
    url: str
    secret: Secret
    events: frozenset[str]
    projects: frozenset[str] | None
    labels: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Hook({self.name!r}, {self.place!r})"

    @property
    def place(self) -> str:
        """What may be shown of the address: scheme, host and port."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def wants(self, event: str, project: str, labels: Mapping[str, str]) -> bool:
        """Whether it is told of this event of a run."""
        return (
            event in self.events
            and (self.projects is None or project in self.projects)
            and self.labels.items() <= labels.items()
        )


def load_hooks(path: str | Path, environment: Mapping[str, str]) -> dict[str, Hook]:
    """The hooks in a JSON, YAML or TOML file, by name. Raises Invalid with the path of what is wrong."""
    data = load_data(path)
    if not isinstance(data, Mapping) or not data:
        raise Invalid(f"{path}: give a mapping of webhooks by name, each with {_NEEDED}")
    if len(data) > limits.HOOKS_MAX:
        raise Invalid(f"{path}: {len(data)} webhooks; the limit is {limits.HOOKS_MAX}")
    try:
        return {name: _hook(name, one, environment, Path(path).parent) for name, one in data.items()}
    except Invalid as error:
        raise Invalid(f"{path}: {error}") from error


def _hook(name: Any, data: Any, environment: Mapping[str, str], folder: Path) -> Hook:
    if not isinstance(name, str) or len(name) > limits.NAME_MAX or not NAME.fullmatch(name):
        raise Invalid(f"{name!r:.60} is no name for a webhook: use letters, digits, '.', '_' or '-'")
    if not isinstance(data, Mapping):
        raise Invalid(f"{name}: give a mapping with {_NEEDED}")
    for key in data:
        if key == "secret":
            raise Invalid(f"{name}.secret: a secret does not belong into this file; name its variable or file instead")
        if key not in _KEYS:
            raise Invalid(f"{name}.{key}: a webhook has no such key{nearest(str(key), list(_KEYS))}")
    return Hook(
        name,
        _url(name, data.get("url")),
        _secret(name, data, environment, folder),
        _events(name, data.get("events")),
        _projects(name, data.get("projects")),
        _labels(name, data.get("labels")),
    )


def _url(name: str, url: Any) -> str:
    try:
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right or not isinstance(url, str):
        raise Invalid(f"{name}.url is no address: give https://HOST/PATH (http:// only where the network is trusted)")
    if parts.username or parts.password:
        raise Invalid(f"{name}.url holds a name or a password: leave them out, the signature says who sends")
    return url


def _secret(name: str, data: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> Secret:
    variable, file = data.get("secret_env"), data.get("secret_file")
    if (variable is None) == (file is None) or not isinstance(variable or file, str):
        raise Invalid(f"{name}: give either secret_env, the name of a variable, or secret_file, the path of a file")
    if variable is not None:
        found, where = environment.get(variable, ""), f"{name}.secret_env: the variable {variable}"
    else:
        where = f"{name}.secret_file: {file}"
        try:
            found = (folder / str(file)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"{where} cannot be read ({type(error).__name__})") from None
    value = found.strip().encode()
    if len(value) < SECRET_MIN:
        raise Invalid(f"{where} holds {len(value)} bytes: a secret has at least {SECRET_MIN}; `openssl rand -hex 32`")
    return Secret(value)


def _events(name: str, events: Any) -> frozenset[str]:
    if not isinstance(events, list) or not events:
        raise Invalid(f"{name}.events: give a list of {', '.join(EVENTS)}")
    for event in events:
        if event not in EVENTS:
            raise Invalid(f"{name}.events: {event!r:.40} is none{nearest(str(event), list(EVENTS))}")
    return frozenset(events)


def _projects(name: str, projects: Any) -> frozenset[str] | None:
    if projects is None:
        return None
    if not isinstance(projects, list) or not all(isinstance(p, str) and re.fullmatch(NAME, p) for p in projects):
        raise Invalid(f"{name}.projects is {projects!r:.80}: give a list of projects, or leave it out for all")
    return frozenset(projects)


def _labels(name: str, labels: Any) -> Mapping[str, str]:
    found = {} if labels is None else labels
    if not isinstance(found, Mapping) or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise Invalid(f"{name}.labels is {labels!r:.80}: give a mapping of texts")
    return dict(found)
