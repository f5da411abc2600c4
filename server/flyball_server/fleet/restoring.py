"""What takes a run back to the rules it had before a command: further commands, which say so.

Rule of this module: it only asks for what the command changed, and for nothing where somebody changed it again since.
"""

from __future__ import annotations

import json
from typing import Any

from flyball_server.core.errors import Conflict
from flyball_server.core.events import Spec
from flyball_server.core.run import Run
from flyball_server.live import LiveRun
from flyball_server.messages import CommandRequest
from flyball_server.rules import spec_under


def commands_back(live: LiveRun, command: str, reason: str, key: str) -> list[CommandRequest]:
    """The commands that undo what `command` (an id) made of policy, base schedule and limits. The policy's state begins
    afresh, at the learning rates in force. Raises Conflict where the rules are others since."""
    seq, (spec, run) = int(command[1:]), (live.spec, live.run)
    before, switched, now = _under(spec, run, seq - 1), _under(spec, run, seq), spec_under(spec, run)
    out = []
    if _decides(now) != _decides(before):
        if _decides(now) != _decides(switched):
            raise Conflict(f"run {spec.run}: it was switched again since {command}: left as it is")
        fields: dict[str, Any] = {"policy": dict(before.policy), "base": before.base and dict(before.base)}
        out.append(CommandRequest(spec.run, "switch_policy", reason, fields, key=key))
    if before.guard != switched.guard and now.guard == switched.guard:
        guard = {**dict.fromkeys(now.guard), **before.guard}
        out.append(CommandRequest(spec.run, "bounds", reason, {"guard": guard}, key=f"{key}:bounds"))
    return out


def _decides(spec: Spec) -> Any:
    return spec.policy, spec.base


def _under(spec: Spec, run: Run, seq: int) -> Spec:
    """The specification as of a row of the run."""
    plan = next((text for at, text in reversed(run.steering.plans) if at <= seq), "")
    return spec._replace(**json.loads(plan)) if plan else spec
