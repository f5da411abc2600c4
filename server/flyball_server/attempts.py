"""How a run begins, is forked, and goes on with a further attempt.

Rule of this module: whatever is refused is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flyball_server import branches, queries
from flyball_server.auth.access import Caller
from flyball_server.checks import check_same
from flyball_server.commands.capping import tighten
from flyball_server.core import run as fold
from flyball_server.core.errors import Conflict, Invalid, NotFound
from flyball_server.core.events import Attached, Origin, Spec
from flyball_server.core.run import Run
from flyball_server.engine import Engine
from flyball_server.live import LiveRun
from flyball_server.messages import Attach
from flyball_server.names import project_of
from flyball_server.profiles import Profile
from flyball_server.projects import Projects
from flyball_server.rules import spec_under
from flyball_server.storage.journal import Journal


class Attempts:
    """Over one engine and its journal."""

    def __init__(self, engine: Engine, journal: Journal, profiles: Mapping[str, Profile], projects: Projects) -> None:
        self._engine = engine
        self._journal = journal
        self._profiles = profiles
        self._projects = projects

    async def begin(self, request: Attach, spec: Spec, actor: str) -> LiveRun:
        """A run that is not known: from its first step, as a fork, or from a checkpoint taken elsewhere."""
        if request.fork is not None:
            return await self.forked(request, actor, beyond=True)
        if not request.resume:
            return await self._engine.create(spec, actor)
        if request.on_unknown == "refuse":
            raise NotFound(
                f"run {spec.run!r} is not known, so it cannot be resumed: attach without resume to begin it, or with "
                "on_unknown='import' to go on here from the checkpoint of another service"
            )
        if not request.policy:
            raise Invalid(f"policy is not given, and none is recorded here for run {spec.run!r}: give it, too")
        attempt, step = request.from_attempt or 0, request.from_step or 0
        origin = Origin("token", spec.run, attempt, step, request.seq, request.digest, None)
        return await self._engine.create(spec, actor, origin)

    async def forked(self, request: Attach, actor: str, *, beyond: bool) -> LiveRun:
        """beyond: a checkpoint may be newer than what arrived before it was left; else that is a mistake."""
        fork = request.fork
        assert fork is not None
        parent = await self._engine.find(fork.run)
        attempt, step = branches.check_fork(fork, parent.run)
        if fork.digest and not await branches.holds(self._journal, parent.spec.run, fork.seq, fork.digest):
            raise branches.unknown_token(parent.spec.run, fork.seq, fork.digest)
        left = await self._engine.restored(parent, attempt, step)
        if not beyond and left.through + 1 < step:
            end = await queries.in_thread(branches.line_end, self._journal, parent.spec, parent.run, attempt)
            if end + 1 < step:
                raise Invalid(f"fork.step is {step}, but the line of attempt {attempt} ends with step {end}")
        seq, digest = (fork.seq, fork.digest) if fork.digest else (parent.record.seq, parent.record.hash.hex())
        origin = Origin("fork", fork.run, attempt, step, seq, digest, None)
        spec, origin = branches.forked(
            request, spec_under(parent.spec, left), left, origin, profiles=self._profiles, projects=self._projects
        )
        if await queries.in_thread(self._journal.record, spec.run) is not None:
            raise Conflict(f"run {spec.run!r} exists already: choose another name")
        return await self._engine.create(spec, actor, origin)

    async def open(self, live: LiveRun, request: Attach, spec: Spec, caller: Caller) -> None:
        """Open the next attempt, going back on the line where that is asked for."""
        run = live.run
        if run.attempt > 0 and not request.resume:
            raise Conflict(
                f"run {spec.run!r} exists already (attempt {run.attempt}, step {run.through}, {run.status}): choose "
                "another name, or attach with resume=True to open a new attempt of it"
            )
        if run.attempt == 0 and live.origin is not None and not (request.resume or request.fork):
            left = repr(live.origin.run) if caller.reaches(project_of(live.origin.run)) else "another run"
            raise Conflict(
                f"run {spec.run!r} exists already, as a fork of {left} at step {live.origin.step}: load that run's "
                "checkpoint of this step and attach with resume=True"
            )
        if request.fork is None:  # what a fork's rules are was decided when it was begun
            check_same(live.spec, spec, request)
        await branches.check_session(self._journal, live.run, request, spec.run)
        restored = claimed = None
        from_step = run.through + 1 if request.from_step is None else request.from_step
        attempt = run.attempt if request.from_attempt is None else request.from_attempt
        if request.digest and live.origin is not None and request.digest == live.origin.digest:
            attempt = min(1, run.attempt)  # the very checkpoint that this run began with
        elif request.digest and not await branches.holds(self._journal, spec.run, request.seq, request.digest):
            if request.on_unknown == "refuse":
                raise branches.unknown_token(live.spec.run, request.seq, request.digest)
            attempt, claimed = run.attempt, {"seq": request.seq, "digest": request.digest}
        if not min(1, run.attempt) <= attempt <= run.attempt:
            raise NotFound(f"run {spec.run}: attempt {attempt} is not known (newest: {run.attempt})")
        if run.attempt > 0 and (from_step <= run.through or attempt != run.attempt):
            restored = await self._engine.restored(live, attempt, from_step)
        event = next_attempt(live, attempt, from_step, request.session, request.client, request.lag, restored, claimed)
        await tighten(self._engine, live, self._projects)  # before the first step's settings follow from the limits
        await self._engine.commit(live, [event], caller.actor)


def next_attempt(
    live: LiveRun,
    parent: int,
    from_step: int,
    session: str,
    client: str,
    lag: int | None,
    restored: Run | None,
    claimed: Mapping[str, Any] | None = None,
) -> Attached:
    """The event that opens the run's next attempt."""
    if from_step < 0:
        raise Invalid(f"from_step is {from_step}: steps are counted from 0")
    state = None if restored is None else fold.dump(restored)
    return Attached(live.run.attempt + 1, parent, from_step, session, client, lag, state, claimed)
