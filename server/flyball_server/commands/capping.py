"""What holds a run to the limits of today: its project's and the service's, which may be stricter than what it began
with here, or wherever it was imported from.

Rule of this module: a run is tightened by a command that is on record like any other, and never loosened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from flyball_server.core import run as fold
from flyball_server.core.events import Commanded, Event
from flyball_server.core.run import Run
from flyball_server.engine import Engine
from flyball_server.guards import limits_of
from flyball_server.live import LiveRun
from flyball_server.rules import plan_of, spec_under

#: Who holds a run to them, and why, for the record.
ACTOR, REASON = "service", "limits of the project"


class Caps(Protocol):
    """What a project says about the limits of its runs."""

    def enforced(self, project: str, guard: Mapping[str, Any], groups: Iterable[str]) -> Mapping[str, Any]:
        """The limits of a run that has begun, as far as they may go today; what contradicts that gives way."""


def tightening(live: LiveRun, run: Run, caps: Caps | None) -> list[Event]:
    """The command that holds the run to what may be today; [] where it is."""
    if caps is None:
        return []
    spec = spec_under(live.spec, run)
    guard = dict(caps.enforced(spec.project, spec.guard, [group.name for group in spec.groups]))
    if guard == spec.guard or limits_of(guard) == limits_of(spec.guard):
        return []
    words = {"guard": json.dumps(guard, sort_keys=True)}
    args = {"guard": guard, "clamped": False, "plan": plan_of(spec._replace(guard=guard)), "words": words}
    return [Commanded("bounds", args, ACTOR, REASON)]


def tightened(live: LiveRun, run: Run, caps: Caps | None) -> Run:
    """The run as `tighten` would make it; in memory only."""
    for event in tightening(live, run, caps):
        run, _ = fold.apply(live.rules, run, event)
    return run


async def tighten(engine: Engine, live: LiveRun, caps: Caps | None) -> None:
    """Hold the run to what may be today. Call inside a turn."""
    if events := tightening(live, live.run, caps):
        await engine.commit(live, events, ACTOR)
