"""Where runs come from and where they part: forks, attempts and the line of each.

Rule of this module: what is decided here is written into a run's first row or an attempt's, and nowhere else.

A **line** is the steps that lead to where an attempt stands: its own, and before them those of the attempt it came
from, up to the step where it left that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

import numpy as np

from flyball_server import limits, queries, records
from flyball_server.auth.access import Caller
from flyball_server.checks import alternative, check_seed, spec_from
from flyball_server.core import run as fold
from flyball_server.core.errors import Conflict, Invalid, NotFound
from flyball_server.core.events import ASIDE, Event, Observed, Origin, Outcome, Spec
from flyball_server.core.run import Run
from flyball_server.core.types import Group
from flyball_server.guards import expanded, strictest
from flyball_server.messages import Attach, Fork, WhatIfRequest
from flyball_server.names import project_of
from flyball_server.profiles import Profile
from flyball_server.projects import Projects
from flyball_server.queries import cutoffs, in_thread, steps_of
from flyball_server.storage.journal import Journal, RunFilter, RunRecord


def unknown_token(run: str, seq: int, digest: str) -> Conflict:
    """The refusal of a checkpoint token whose row the journal does not hold."""
    return Conflict(
        f"run {run}: the checkpoint token names row {seq} with the hash {digest[:12]}..., which this journal "
        "does not hold: it is of another run of this name, or newer than this store; resume with on_unknown='import' "
        "to go on all the same, without the token to go on after the newest step, or begin a run of another name"
    )


async def check_session(journal: Journal, run: Run, request: Attach, run_id: str) -> None:
    """Who drove an earlier attempt does not come back by itself: that is a message which was long on its way, or a
    process that has not noticed yet. Raises Conflict."""
    for number, (_, seq, _) in list(enumerate(run.attempts, 1))[-limits.ATTEMPTS_CHECKED :]:
        found = await in_thread(queries.row, journal, run_id, seq)
        if found is not None and found.meta["session"] == request.session:
            raise Conflict(
                f"run {run_id}: the session {request.session!r:.60} drove attempt {number}, and another process has "
                "taken the run over since: attach under a new session to take it back"
            )


async def holds(journal: Journal, run_id: str, seq: int, digest: str) -> bool:
    """Whether the run's journal holds the row that a checkpoint token names by its hash."""
    found = await in_thread(queries.row, journal, run_id, seq)
    return found is not None and found.hash.hex() == digest


def check_fork(fork: Fork, run: Run) -> tuple[int, int]:
    """The attempt and the first step that a fork of `run` means. Raises NotFound, Conflict or Invalid."""
    if run.attempt == 0:
        raise Conflict(f"run {fork.run} has no step yet: there is nothing to fork")
    attempt = run.attempt if fork.attempt is None else fork.attempt
    if not 1 <= attempt <= run.attempt:
        raise NotFound(f"run {fork.run}: attempt {attempt} is not known (newest: {run.attempt})")
    step = run.through + 1 if fork.step is None else fork.step
    if not 0 <= step <= limits.INTEGER_MAX:
        raise Invalid(f"fork.step is {step}: give 0 to {limits.INTEGER_MAX}")
    return attempt, step


def forked(
    request: Attach,
    parent: Spec,
    left: Run,
    origin: Origin,
    *,
    profiles: Mapping[str, Profile],
    projects: Projects,
) -> tuple[Spec, Origin]:
    """The specification and origin of the run that `request` begins as a fork of `parent`, left in the state `left`.

    What the request does not say is the parent's. Under the parent's policy, base, mode and seed the state goes on.
    Another policy begins afresh: at the settings in force where it leaves, or, with a base schedule or in multiplier
    mode, from the parent's references. The limits of project and service are those of today.

    Raises Invalid where the groups are others than the parent's, or its limits and today's cannot both hold.
    """
    names, now = [g.name for g in parent.groups], [g.name for g in request.groups]
    if now and names != now:
        raise Invalid(
            f"groups: the run {parent.run} has {names!s:.200}, this process has {now!s:.200}: fork like to like"
        )
    own = bool(request.policy)
    asked = request._replace(
        mode=request.mode or parent.mode,
        policy=request.policy or parent.policy,
        base=request.base if own or request.base is not None else parent.base,
        guard=request.guard or (parent.guard if parent.asked_guard is None else parent.asked_guard),
        seed=request.seed or parent.seed,
        labels=request.labels or parent.labels,
        groups=parent.groups,
    )
    spec = spec_from(asked, profiles, projects)
    if not request.guard:
        wanted = spec.guard if spec.asked_guard is None else spec.asked_guard
        guard = strictest(("the new run", spec.guard), (f"the run {parent.run}", parent.guard))
        spec = spec._replace(guard=guard, asked_guard=None if guard == wanted else wanted)
    if not own and spec.profile == "":
        spec = spec._replace(profile=parent.profile)
    same = all(getattr(spec, name) == getattr(parent, name) for name in ("policy", "base", "mode", "seed"))
    if same:
        state = {name: value for name, value in fold.dump(left).items() if name != "shadows"}
        return spec, origin._replace(state=state)
    if spec.base is None:
        spec = _standing_at(spec, left.settings.lr, left.settings.momentum)
    return spec, origin


def _standing_at(spec: Spec, lr: Sequence[float], momentum: Sequence[float | None] | None) -> Spec:
    """The specification with the groups as they are steered now; in multiplier mode factors go on from the same 1."""
    if spec.mode == "multiplier":
        return spec
    groups = zip(spec.groups, lr, momentum or [group.momentum for group in spec.groups], strict=True)
    return spec._replace(groups=tuple([_standing(group, value, m) for group, value, m in groups]))


def _standing(group: Group, lr: float, momentum: float | None) -> Group:
    """The group as it is steered now."""
    if momentum is None:
        return group._replace(lr=lr)
    if group.betas is not None and group.momentum is None:
        return group._replace(lr=lr, betas=(momentum, group.betas[1]))
    return group._replace(lr=lr, momentum=momentum)


def otherwise(
    request: WhatIfRequest, spec: Spec, origin: Origin | None, profiles: Mapping[str, Profile]
) -> tuple[Spec, bool]:
    """The specification of a run under another policy; whether that is its own one after all. Raises Invalid.

    Of a fork another policy begins where a real one would have: at the settings in force where it left.
    """
    policy = dict(request.policy)
    if request.base is not None:
        if policy.get("base") is not None:
            raise Invalid("base is given twice, in the policy and beside it: give it once")
        policy["base"] = request.base
    changed = alternative(policy, spec.base, profiles)
    own = changed == {"policy": spec.policy, "base": spec.base}
    seed = changed["policy"].get("seed")
    seed = (spec.seed if request.seed is None else request.seed) if seed is None else seed
    check_seed(seed)
    guard = expanded(request.guard) if request.guard else spec.guard
    if not own and origin is not None and origin.state is not None and changed["base"] is None:
        lr, momentum, _ = origin.state["settings"]
        spec = _standing_at(spec, lr, momentum)
    return spec._replace(**changed, guard=guard, seed=seed, shadows={}), own


def line(journal: Journal, spec: Spec, run: Run, attempt: int) -> Iterator[tuple[Event, Outcome]]:
    """The events of one attempt's line in order, and what came of them; those of abandoned steps are left out.

    A batch that was observed before the line left and went on behind it is cut. Side signals belong to the line where
    they arrived before the step at which it left was observed.
    """
    until = cutoffs(run, attempt)
    through = {number: run.attempts[number - 1][0] - 1 for number in until if number}
    on_line = False
    for row in journal.rows(spec.run):
        now = row.attempt in through and through[row.attempt] < until[row.attempt] - 1
        if row.kind in ("attached", "observed"):
            on_line = now
        # Side signals (attempt 0) are of whatever line the run is on, until the next step is observed.
        if not (on_line if row.attempt == 0 else now):
            continue
        event, outcome = records.from_row(row, spec.groups)
        if isinstance(event, Observed):
            cutoff = until[row.attempt]
            through[row.attempt] = event.steps[-1]
            on_line = event.steps[-1] < cutoff
            if event.steps[0] >= cutoff:
                continue
            if not on_line:
                event, outcome = _before(event, outcome, int(cutoff))
        if not isinstance(event, ASIDE):
            yield event, outcome


def _before(event: Observed, outcome: Outcome, step: int) -> tuple[Observed, Outcome]:
    """The part of a batch that lies before `step`."""
    n = sum(s < step for s in event.steps)
    signals = {name: column[:n] for name, column in event.signals.items()}
    changes = tuple(change for change in outcome.changes if change[0] < step)
    marks = tuple(mark for mark in outcome.marks if mark.step < step)
    return Observed(event.attempt, event.steps[:n], signals), Outcome(changes, marks)


def line_end(journal: Journal, spec: Spec, run: Run, attempt: int) -> int:
    """The newest step that an attempt observed itself; the one before its first where it observed none."""
    if attempt == run.attempt:
        return run.through
    steps = [
        b.last_step.max() for b in journal.blocks(spec.run, {"=at"}) if (b.kind, b.attempt) == ("observed", attempt)
    ]
    return int(max(steps, default=run.attempts[attempt - 1][0] - 1))


def lineage(journal: Journal, spec: Spec, origin: Origin | None, run: Run, caller: Caller) -> dict[str, Any]:
    """The runs this one comes from (nearest first), those that left it, and its attempts; without runs that the caller
    does not reach, and whatever lies behind one of them."""
    ancestors: list[dict[str, Any]] = []
    at = origin
    while at is not None and caller.reaches(project_of(at.run)) and len(ancestors) < limits.PAGE_MAX:
        first = next(journal.rows(at.run, until=1), None) if at.kind == "fork" else None
        ancestors.append({**_origin_json(at), "known": first is not None})
        at = None if first is None else records.origin_of(first)
    forks = journal.records(RunFilter(parent=spec.run, projects=caller.projects), after=None, limit=limits.PAGE_MAX)
    return {
        "run": spec.run,
        "ancestors": ancestors,
        "forks": [_fork_json(journal, record) for record in forks],
        "attempts": _attempts(journal, spec, run),
    }


def _origin_json(origin: Origin) -> dict[str, Any]:
    data = origin._asdict()
    data["carried"] = data.pop("state") is not None
    return data


def _fork_json(journal: Journal, record: RunRecord) -> dict[str, Any]:
    first = next(journal.rows(record.run, until=1))
    origin = records.origin_of(first)
    assert origin is not None, "only forks have a parent"
    return {"run": record.run, "attempt": origin.attempt, "step": origin.step, "created_at": records.utc(first.at)}


def _attempts(journal: Journal, spec: Spec, run: Run) -> list[dict[str, Any]]:
    steps: dict[int, Any] = {}
    for block in journal.blocks(spec.run, {"=at", "=step"}):
        if block.kind == "observed":
            steps[block.attempt] = np.concatenate([steps.get(block.attempt, np.empty(0, np.int64)), steps_of(block)])
    out = []
    until = cutoffs(run, run.attempt)
    for number, (from_step, seq, parent) in enumerate(run.attempts, 1):
        row = next(journal.rows(spec.run, after=seq - 1, until=seq))
        own = steps.get(number, [])
        before = _last_before(run.attempts, steps, parent, from_step)
        out.append(
            {
                "attempt": number,
                "parent": parent,
                "from_step": from_step,
                "through": int(own[-1]) if len(own) else None,
                "observations": len(own),
                # Steps that no attempt of this line ever reported.
                "gap": None if before is None else from_step - 1 - before,
                "seq": seq,
                "opened_at": records.utc(row.at),
                "actor": row.actor,
                **{name: row.meta[name] for name in ("session", "client", "lag")},
                "claimed": row.meta.get("claimed"),
                # Whether the newest attempt's line has steps of this one, and up to which it does (null: all).
                "on_newest_line": number in until,
                "left_at": None if until.get(number, inf) == inf else int(until[number]),
            }
        )
    return out


def _last_before(
    attempts: Sequence[tuple[int, int, int]], steps: Mapping[int, Any], parent: int, step: int
) -> int | None:
    """The newest step before `step` on the line of `parent`; None where it has none."""
    while parent > 0:
        own = steps.get(parent, np.empty(0, np.int64))
        place = int(np.searchsorted(own, step, "left"))
        if place:
            return int(own[place - 1])
        step = min(step, attempts[parent - 1][0])
        parent = attempts[parent - 1][2]
    return None
