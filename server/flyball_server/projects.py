"""Projects: the limits that a platform team sets for everybody, and for the runs of a project.

Rule of this module: the strictest wins. What a project or the service says can be tightened by a run, and by no run be
loosened; a file with anything wrong in it is refused as a whole, before the service begins.

    "*":                           # every project
      guard: {max_factor: 20}
    vision:
      about: ResNets on eight GPUs
      guard: {max_lr: 0.5, cooldown_steps: 10}
      approvals: 2                 # people that a proposed command takes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flyball_server.core.base import nearest
from flyball_server.core.errors import Invalid
from flyball_server.guards import expanded, limits_of, strictest, yielding
from flyball_server.limits import APPROVALS_MAX
from flyball_server.names import NAME
from flyball_server.policy_files import load_data

#: What holds for every project stands under this name.
EVERY = "*"
_KEYS = ("about", "approvals", "guard")


class Project(NamedTuple):
    """What a file says of one project. guard: its limits. approvals: how many people a proposed command takes."""

    name: str
    about: str = ""
    guard: Mapping[str, Any] = {}
    approvals: int = 1

    @property
    def said(self) -> str:
        """Whose limits these are, for messages."""
        return "the service" if self.name == EVERY else f"the project {self.name!r}"


class Projects:
    """The checked projects of a file, by name; without one nothing is limited. Raises Invalid where what is said of a
    project and of all cannot both hold."""

    def __init__(self, projects: Iterable[Project] = ()) -> None:
        self._known = {project.name: project for project in projects}
        for name in self._known:
            self.capped(name, {})

    def __iter__(self) -> Iterator[Project]:
        return iter(self._known.values())

    def capped(self, project: str, guard: Mapping[str, Any], groups: Iterable[str] | None = None) -> dict[str, Any]:
        """The limits of a run of `project` that asks for `guard`: the strictest of its own, the project's and the
        service's; of the latter two only about `groups`, where these are given.

        Raises Invalid where they contradict each other, see `guards.strictest`.
        """
        caps = [self._known[name] for name in dict.fromkeys((project, EVERY)) if name in self._known]
        return strictest(("the run", guard), *((cap.said, _about(cap.guard, groups)) for cap in caps))

    def enforced(self, project: str, guard: Mapping[str, Any], groups: Iterable[str]) -> dict[str, Any]:
        """The limits of a run that has begun with `guard`, as far as they may go today: where these and today's cannot
        both hold, its own give way."""
        groups = list(groups)
        return self.capped(project, yielding(guard, _about(self.capped(project, {}), groups)), groups)

    def approvals(self, project: str) -> int:
        """How many people a proposed command takes in the project."""
        return max((self._known[name].approvals for name in (project, EVERY) if name in self._known), default=1)


#: Where nobody has set any limits.
NOWHERE = Projects()


def _about(guard: Mapping[str, Any], groups: Iterable[str] | None) -> Mapping[str, Any]:
    """The limits without those of groups that there are not."""
    if groups is None or "groups" not in guard:
        return guard
    left = {name: one for name, one in guard["groups"].items() if name in set(groups)}
    rest = {key: value for key, value in guard.items() if key != "groups"}
    return {**rest, "groups": left} if left else rest


def load_projects(path: str | Path) -> Projects:
    """The projects in a JSON, YAML or TOML file. Raises Invalid with the path of what is wrong."""
    data = load_data(path)
    if not isinstance(data, Mapping):
        raise Invalid(f"{path}: give a mapping of projects by name, such as vision: {{guard: {{max_lr: 0.5}}}}")
    try:
        return Projects([_project(name, one) for name, one in data.items()])
    except Invalid as error:
        raise Invalid(f"{path}: {error}") from error


def _project(name: Any, data: Any) -> Project:
    if not isinstance(name, str) or (name != EVERY and not NAME.fullmatch(name)):
        raise Invalid(f"{name!r:.60} is no name for a project: use letters, digits, '.', '_' or '-', or '*' for all")
    if not isinstance(data, Mapping):
        raise Invalid(f"{name}: {data!r:.60} is not allowed; give a mapping, such as guard: {{max_lr: 0.5}}")
    for key in data:
        if key not in _KEYS:
            raise Invalid(f"{name}.{key}: a project has no such key{nearest(key, list(_KEYS))}")
    approvals = data.get("approvals", 1)
    if type(approvals) is not int or not 1 <= approvals <= APPROVALS_MAX:
        raise Invalid(f"{name}.approvals: {approvals!r:.60} is not allowed; give 1 to {APPROVALS_MAX} people")
    guard = data.get("guard") or {}
    if not isinstance(guard, Mapping):
        raise Invalid(f"{name}.guard: {guard!r:.60} is not allowed; give a mapping of limits")
    try:
        guard = expanded(guard)
        limits_of(guard)
    except Invalid as error:
        raise Invalid(f"{name}: {error}") from error
    return Project(name, str(data.get("about", "")), guard, approvals)
