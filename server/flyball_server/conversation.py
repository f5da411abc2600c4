"""A driver's conversation in values: what of a report is new to the run, and what the driver is told.

Rule of this module: it looks at a run and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyball_server.checks import check_room, checked_receipt
from flyball_server.core import run as fold
from flyball_server.core.events import Applied, Ended, Event, Observed
from flyball_server.core.run import Run
from flyball_server.core.types import Group, Settings
from flyball_server.engine import LiveRun
from flyball_server.messages import Advice, Attached, Report


def new_events(run: Run, request: Report, groups: Sequence[Group]) -> list[Event]:
    """The part of a report that is not in the run yet."""
    check_room(run, request.signals)
    events: list[Event] = []
    observed = fold.fresh(run, Observed(request.attempt, request.steps, request.signals))
    receipts = tuple(checked_receipt(r, groups) for r in request.receipts if r.number > run.receipts_through)
    if receipts:  # first: a policy may ask what was in force at an observation
        events.append(Applied(request.attempt, receipts))
    if observed is not None:
        events.append(observed)
    events += [answer for answer in request.answers if answer.directive not in run.answered]
    if request.end and run.status == "active":
        events.append(Ended(request.attempt, request.end))
    return events


def attached(live: LiveRun, earlier: Sequence[tuple[int, Settings]]) -> Attached:
    """The answer to an attach. earlier: see `Engine.earlier`."""
    run = live.run
    return Attached(
        run=live.spec.run,
        attempt=run.attempt,
        from_step=run.from_step,
        through=run.through,
        receipts_through=run.receipts_through,
        seq=run.seq,
        digest=live.record.hash.hex(),
        policy=live.rules.policy.tag,
        decided=run.through,
        settings=run.settings,
        phase=run.decision.phase,
        code=run.decision.code,
        reason=reason(live),
        reference=tuple(g.lr for g in live.spec.groups),
        seed=live.spec.seed,
        guard=live.spec.guard,
        earlier=earlier,
    )


def advice(live: LiveRun, changes: Sequence[tuple[int, Settings]]) -> Advice:
    """The answer to a report: all changes where decisions belong to steps, else the newest settings."""
    run = live.run
    if run.lag is None or not changes:
        changes = [(run.through, run.settings)]
    return Advice(
        attempt=run.attempt,
        through=run.through,
        receipts_through=run.receipts_through,
        seq=run.seq,
        digest=live.record.hash.hex(),
        changes=changes,
        phase=run.decision.phase,
        code=run.decision.code,
        reason=reason(live),
    )


def reason(live: LiveRun) -> str:
    """The newest decision in words; only made where the decision has something to say."""
    decision = live.run.decision
    return "" if decision.fields is None else live.rules.policy.explain(live.rules.config, decision)
