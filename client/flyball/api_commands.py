"""The REST SDK's methods about commands: to one run, to many, proposals, freezes, canaries.

    view = client.override("first", value=0.01, reason="loss spikes")
    view = client.wait("first", view["id"], timeout_s=60)    # view["status"] == "applied"

Rule of this module: a request that changes something carries an Idempotency-Key, made here where none is given, so that
it may be sent again. That is done once where the connection was lost, and nothing happens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from flyball.api_connection import Connection
from flyball.errors import FlyballError, LinkError

#: Commands asked for in one request; more come in further ones.
COMMANDS_PAGE = 100
#: How long one request waits at the service for a command; waiting longer takes several.
WAIT_S = 20.0
#: How long the service may take for many runs before its answer comes.
MANY_S = 600.0


class Commands(Connection):
    """Part of `flyball.api.Client`. Every method raises what those of `Client` raise.

    A command is a dict: id, run, kind, status, over, reason, actor, args, verdict (what the guard left of it), clamped
    and clamped_to (the same in words, whatever became of it since), applied ({"step", "ranks", "of_ranks"}), history
    (each stage with its time). status: proposed, accepted, clamped, applied, done, declined, expired, superseded,
    released, withdrawn, rejected, approved.
    """

    def command(
        self,
        run: str,
        kind: str,
        *,
        reason: str,
        if_match: int | None = None,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Give a run a command, or propose it where that is all you may; the command as it stands then.

        if_match: the newest journal row you know (a run's `seq`): refused with the code `stale` where somebody gave a
        command since. fields: what stands beside the kind, and `expires_in_s` or `expires_at`; None: not given.
        """
        body = {"kind": kind, "reason": reason, **_given(fields)}
        headers = {} if if_match is None else {"If-Match": str(if_match)}
        return self._once(run_path(run, "commands"), body, idempotency_key, headers)

    def override(
        self,
        run: str,
        *,
        reason: str,
        value: float | None = None,
        factor: float | None = None,
        setting: str = "lr",
        groups: str | Sequence[str] | None = None,
        force: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """Put a value, or a factor on what the policy says, in the place of a setting (lr, momentum, noise_std or a
        control), in some groups or in all. force: a value of lr also for an optimizer that finds its own step size,
        of which it is a multiplier. more: for_steps or until_step, and what `command` takes."""
        names = [groups] if isinstance(groups, str) else None if groups is None else list(groups)
        said: dict[str, Any] = {"setting": setting, "groups": names, "value": value, "factor": factor}
        said["force"] = force or None
        return self.command(run, "override", reason=reason, **said, **more)

    def hold(self, run: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Leave every setting as it is. more: for_steps or until_step, and what `command` takes."""
        return self.command(run, "hold", reason=reason, **more)

    def release(
        self, run: str, *, reason: str, command: str | None = None, setting: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """End one override, hold or directive by its id, those of a setting, or all of them."""
        said: dict[str, Any] = {"command": command, "setting": setting}
        return self.command(run, "release", reason=reason, **said, **more)

    def bounds(self, run: str, guard: Mapping[str, Any], *, reason: str, **more: Any) -> dict[str, Any]:
        """Change limits of the run's guard; None takes one away."""
        return self.command(run, "bounds", reason=reason, guard=dict(guard), **more)

    def switch_policy(self, run: str, policy: str | Mapping[str, Any], *, reason: str, **more: Any) -> dict[str, Any]:
        """Go on under another policy, from the learning rates in force. more: base, and what `command` takes; a base of
        None takes the schedule away."""
        named = {"type": policy} if isinstance(policy, str) else dict(policy)
        if "base" in more and more["base"] is None:
            named["base"] = more.pop("base")
        return self.command(run, "switch_policy", reason=reason, policy=named, **more)

    def set_profile(self, run: str, profile: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Go on under a profile of the service: its policy, base schedule and limits."""
        return self.command(run, "set_profile", reason=reason, profile=profile, **more)

    def checkpoint(self, run: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Ask the job to save a checkpoint. args: a mapping for its handler. The job may decline, as with those that
        follow here."""
        return self.command(run, "checkpoint", reason=reason, **more)

    def restore(self, run: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Ask the job to load a checkpoint. args: which one, for its handler."""
        return self.command(run, "restore", reason=reason, **more)

    def rewind(self, run: str, *, reason: str, step: int | None = None, **more: Any) -> dict[str, Any]:
        """Ask the job to go back to a step."""
        return self.command(run, "rewind", reason=reason, step=step, **more)

    def evaluate(self, run: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Ask the job to evaluate."""
        return self.command(run, "evaluate", reason=reason, **more)

    def stop(self, run: str, *, reason: str, **more: Any) -> dict[str, Any]:
        """Ask the job to end."""
        return self.command(run, "stop", reason=reason, **more)

    def note(self, run: str, reason: str, **more: Any) -> dict[str, Any]:
        """Put words into the run's journal."""
        return self.command(run, "note", reason=reason, **more)

    def commands(self, run: str, *, open_only: bool = False) -> Iterator[dict[str, Any]]:
        """The commands and proposals of a run, oldest first; with `open_only` those that are not over."""
        after: int | None = 0
        while after is not None:
            asked = {"after": after, "limit": COMMANDS_PAGE, "open": open_only}
            page = self._answer("GET", run_path(run, "commands"), parameters=asked)
            yield from page["commands"]
            after = page["next"]

    def command_status(self, run: str, command: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """One command or proposal; with `wait_s` (at most 60) as soon as it is applied or over, or the time is."""
        path = run_path(run, f"commands/{quote(command, safe='')}")
        return self._answer("GET", path, parameters={"wait_s": wait_s}, timeout=wait_s + 10.0)

    def wait(
        self,
        run: str,
        command: str,
        timeout_s: float,
        *,
        on_change: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """The command once it is applied or over, or as it stands when the time is over: look at `status`.

        A proposal that is approved is followed as the command that it became. on_change: told each state on the way.
        """
        left = timeout_s
        while True:
            # The first look is for whoever watches; each further one lasts as long as it says, unless it has news.
            slice_s = min(left, WAIT_S) if left < timeout_s or on_change is None else 0.0
            found = self.command_status(run, command, wait_s=slice_s)
            if on_change is not None:
                on_change(found)
            if found["command"]:
                command = found["command"]
                continue
            if found["over"] or found["status"] == "applied" or left <= 0:
                return found
            left -= max(slice_s, 1e-9)

    def approve(self, run: str, proposal: str, *, reason: str) -> dict[str, Any]:
        """Approve a proposal; with the last approval that it takes, the command that it becomes."""
        return self._judge(run, proposal, "approved", reason)

    def reject(self, run: str, proposal: str, *, reason: str) -> dict[str, Any]:
        """Reject a proposal."""
        return self._judge(run, proposal, "rejected", reason)

    def withdraw(self, run: str, proposal: str, *, reason: str) -> dict[str, Any]:
        """Take back a proposal of one's own."""
        return self._judge(run, proposal, "withdrawn", reason)

    def fleet(
        self,
        selector: str,
        kind: str,
        *,
        reason: str,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Give a command to every run that a selector means: "project=vision,label.team=a,policy=windowed,
        status=active,run=ablation-*"; without a status, to those that have not ended.

        {"fleet", "matched", "counts": {status: n}, "results": [{"run", "status", "id", "clamped_to", "carried",
        "error", "code", "would"}]}.
        dry_run: change nothing, and tell under `would` the learning rates before and after.
        """
        command = {"kind": kind, "reason": reason, **_given(fields)}
        body = {"selector": selector, "command": command, "dry_run": dry_run}
        return self._once("/v1/fleet/commands", body, idempotency_key, {}, MANY_S)

    def frozen(self) -> list[dict[str, Any]]:
        """The freezes in force: project (None: everything), actor, at, reason."""
        found: list[dict[str, Any]] = self._answer("GET", "/v1/freeze")["freezes"]
        return found

    def freeze(self, *, reason: str, project: str | None = None) -> dict[str, Any]:
        """Hold every active run (of a project), those that come later too, and refuse commands, until `thaw`."""
        return self._many("/v1/freeze", {"reason": reason, "project": project})

    def thaw(self, *, reason: str, project: str | None = None) -> dict[str, Any]:
        """End a freeze; the holds that it gave are released."""
        return self._many("/v1/thaw", {"reason": reason, "project": project})

    def canary_start(self, selector: str, *, share: float, reason: str, **change: Any) -> dict[str, Any]:
        """Switch a share (0 to 1) of the runs, chosen by hash. change: policy (and base), or profile."""
        policy = change.get("policy")
        change = change | ({"policy": {"type": policy}} if isinstance(policy, str) else {})
        body = {"selector": selector, "share": share, "reason": reason, **change}
        return self._once("/v1/canaries", body, None, {}, MANY_S)

    def canaries(self) -> list[dict[str, Any]]:
        """The canaries, newest first."""
        found: list[dict[str, Any]] = self._answer("GET", "/v1/canaries")["canaries"]
        return found

    def canary(self, canary: str) -> dict[str, Any]:
        """One canary: members, controls, and the comparison of both since the switch."""
        return self._answer("GET", f"/v1/canaries/{quote(canary, safe='')}", timeout=MANY_S)

    def canary_promote(self, canary: str, *, reason: str) -> dict[str, Any]:
        """Switch the rest as well."""
        return self._many(f"/v1/canaries/{quote(canary, safe='')}/promote", {"reason": reason})

    def canary_back(self, canary: str, *, reason: str) -> dict[str, Any]:
        """Switch the members back to what they had."""
        return self._many(f"/v1/canaries/{quote(canary, safe='')}/back", {"reason": reason})

    def _judge(self, run: str, proposal: str, verdict: str, reason: str) -> dict[str, Any]:
        body = {"verdict": verdict, "reason": reason}
        return self._answer("POST", run_path(run, f"proposals/{quote(proposal, safe='')}"), body=body)

    def _many(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer("POST", path, body=body, timeout=MANY_S)

    def _once(
        self,
        path: str,
        body: Mapping[str, Any],
        key: str | None,
        headers: Mapping[str, str],
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send it, and where the connection is lost once more: under its key it is the same request."""
        options: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}
        options["headers"] = {**headers, "Idempotency-Key": key or self._new_key()}
        try:
            found: dict[str, Any] = self._answer("POST", path, body=body, **options)
        except LinkError as error:
            if not self._is_lost(error):
                raise
            found = self._answer("POST", path, body=body, **options)
        return found


def run_path(run: str, what: str = "") -> str:
    """A run's path; its id may hold a ':', and whatever else somebody types."""
    if not run:
        raise FlyballError("the run is '': give its id, as `flyball runs` shows it")
    return f"/v1/runs/{quote(run, safe='')}" + (f"/{what}" if what else "")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
