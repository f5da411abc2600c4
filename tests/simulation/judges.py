"""What must hold in every world, whatever went wrong in it.

Rule of this module: a judge compares what was really sent, applied and stored with what ought to have been, and
believes neither the session nor the engine about it. Each says in its docstring what it asserts.
"""

from math import inf

from tests.simulation.reference import Record, undisturbed

from flyball_server.core.run import dump, load
from flyball_server.verify import verify

#: Slack for sums of virtual seconds.
EPSILON_S = 1e-6


class Broken(Exception):
    """A judge found something. judge: its name."""

    def __init__(self, judge, text):
        super().__init__(f"{judge}: {text}")
        self.judge = judge


def persisted(world, run, seq, digest):
    """Persist, then publish: whatever a server answers names a row that the journal holds at that moment."""
    row = next(world.disk.journal.rows(run, after=seq - 1, until=seq), None)
    if row is None or row.hash.hex() != digest:
        world.fail("persist, then publish", f"{run}: row {seq} was answered, but the journal does not hold it")


def live_is_replay(world, server):
    """What a server holds of a run in memory is the fold of the journal's rows up to there: never more, never less."""
    for live in list(server.engine._live.values()):
        _is_replay(world, live.spec.run, live.run.seq, dump(live.run), "a live run")


def snapshots_are_replay(world):
    """Every snapshot is the fold of the rows it stands behind."""
    import json

    for run, snapshots in world.disk.journal._snapshots.items():
        for snapshot in snapshots:
            _is_replay(world, run, snapshot.seq, json.loads(snapshot.state), "a snapshot")


def _is_replay(world, run, seq, dumped, what):
    record = world.record(run)
    if seq >= len(record.states):
        world.fail("replay equals live", f"{what} of {run} is at row {seq}, the journal ends at {len(record.rows)}")
    if dump(load(record.rules, dumped)) != dump(record.states[seq]):
        world.fail("replay equals live", f"{what} of {run} is not the fold of its rows up to {seq}")


def journals_are_sound(world, run):
    """The chain is whole, and folding the journal gives every stored decision again, bit for bit."""
    verdict = verify(world.disk.journal, run)
    if verdict.problem:
        world.fail("replay equals live", f"{run}: {verdict.problem}")


def decisions_are_those_without_faults(world, job, record):
    """Folding what was observed one by one, and going back by the attempts alone, gives the stored decisions; no step
    is folded twice on any line."""
    if record.differs:
        judge = "none folded twice" if "twice" in record.differs else "decisions equal"
        world.fail(judge, f"{job.plan.name}: {record.differs}")
    for number in record.lines:
        steps = record.steps_of(number)
        if len(steps) != len(set(steps)):
            world.fail("none folded twice", f"{job.plan.name}: attempt {number}")


def nothing_acknowledged_is_lost(world, job, record):
    """Each step that was acknowledged stands in the journal under its attempt, with the very signals; and nothing
    stands there that the job's process did not see."""
    for story in job.stories:
        number, line = record.line_of(story.session)
        if line is None:
            if story.acknowledged:
                world.fail("no acknowledged observation lost", f"{job.plan.name}: a whole attempt")
            continue
        observed = {**story.elsewhere, **story.observed()}
        if lost := sorted(story.acknowledged - line.signals.keys()):
            world.fail("no acknowledged observation lost", f"{job.plan.name}, attempt {number}: steps {lost[:9]}")
        for step, signals in line.signals.items():
            if step not in observed or _columns(observed[step]) != _told(signals):
                world.fail(
                    "no acknowledged observation lost",
                    f"{job.plan.name}, attempt {number}, step {step}: {signals}, but seen was {observed.get(step)}",
                )


def everything_arrived(world, job, record):
    """Once the faults are over, the last process's whole past stands in the journal, each step once, each receipt once,
    and so does its end."""
    story = job.stories[-1]
    number, line = record.line_of(story.session)
    steps = record.steps_of(number)
    missing = sorted(set(story.observed()) - set(steps))
    if line is None or missing or record.run_status != "finished":
        world.fail("everything arrives", f"{job.plan.name}: steps {missing[:9]} of {len(steps)}, {record.run_status}")
    receipts = job.process.session._receipt_number
    if line.numbers != list(range(1, receipts + 1)):
        world.fail("everything arrives", f"{job.plan.name}: receipts {line.numbers} of 1 to {receipts}")


def settings_are_those_decided(world, job, record):
    """lag=k: what is applied at a step, and not called late, is what the step k + 1 before it decided; anything else is
    what the decision it is said to be decided. And all of it is within the guard, on every rank alike."""
    bounds = _bounds(job.plan)
    for story in job.stories:
        number, line = record.line_of(story.session)
        for made in story.steps:
            if len(set(made.lr)) > 1:
                world.fail("all ranks equal", f"{job.plan.name}, step {made.model}: {made.lr}")
            for lr, (low, high) in zip(made.lr[0], bounds, strict=True):
                if not low <= lr <= high:
                    world.fail("within guard", f"{job.plan.name}, step {made.model}: {lr} is not in {low} to {high}")
            if made.target is None or made.based or not made.known or line is None:
                continue
            step, decided = made.local + story.offset, made.target.decided
            if job.plan.lag is not None and not made.target.late:
                decided = step - 1 - job.plan.lag
            ought = record.in_force(number, decided)
            if made.target.settings[:3] != tuple(ought):
                world.fail(
                    "applied is decided",
                    f"{job.plan.name}, step {step}: {made.target} is not what step {decided} decided: {ought}",
                )


def nobody_waits_too_long(world, job):
    """A step waits at most its budget, not at all with lag=None, and not at all once one has waited in vain, until an
    answer has come."""
    plan = job.plan
    for story in job.stories:
        for made in story.steps:
            budget_s = 0.0 if plan.lag is None or not made.answered else plan.wait_s
            if budget_s is not None and made.waited_s > budget_s + EPSILON_S:
                world.fail("wait budget", f"{plan.name}, step {made.model}: {made.waited_s:.3f} s")


def exact_jobs_are_undisturbed(world, job, record):
    """A job that waits for every decision applies, from its first step to its last, the very bits of a world without
    faults. Only what a crash took with it right behind a checkpoint may be missing."""
    plan = job.plan
    applied = [(made.model, made.lr[0]) for story in job.stories for made in story.steps[: story.kept]]
    ought = undisturbed(record.spec, record.rules, plan, job.lost(record))
    if applied != ought:
        at = next((i for i, pair in enumerate(zip(applied, ought, strict=False)) if pair[0] != pair[1]), -1)
        world.fail(
            "decisions equal",
            f"{plan.name}: exact, but the {at}th of {len(applied)} steps differs from the {len(ought)} without faults: "
            f"{applied[at]} is not {ought[at]}",
        )


def judge(world):
    """Everything at the end of a world."""
    for server in world.servers:
        live_is_replay(world, server)
    snapshots_are_replay(world)
    for job in world.jobs:
        record = world.record(job.plan.name)
        decisions_are_those_without_faults(world, job, record)
        nothing_acknowledged_is_lost(world, job, record)
        everything_arrived(world, job, record)
        settings_are_those_decided(world, job, record)
        nobody_waits_too_long(world, job)
        if job.plan.exact:
            exact_jobs_are_undisturbed(world, job, record)
        journals_are_sound(world, job.plan.name)
        side = {(name, value) for event in record.side for name, value in event.signals.items()}
        if lost := world.side.get(job.plan.name, set()) - side:
            world.fail("no acknowledged observation lost", f"{job.plan.name}: side signals {lost}")


def _columns(signals):
    loss, reward, grad_norm, others = signals
    return _told({"loss": loss, "reward": reward, "grad_norm": grad_norm, **(others or {})})


def _told(signals):
    """Signals by name as text, so that a NaN equals itself; what was not measured is left out."""
    return {name: repr(value) for name, value in signals.items() if value is not None}


def _bounds(plan):
    """The lowest and the highest learning rate per group that the guard allows."""
    guard, out = plan.guard, []
    for name, lr, *_ in plan.groups:
        own = guard.get("groups", {}).get(name, {})
        low = max(guard.get("min_lr", 0.0), own.get("min_lr", 0.0), guard.get("min_factor", 0.0) * lr)
        high = min(guard.get("max_lr", inf), own.get("max_lr", inf), guard.get("max_factor", inf) * lr if lr else inf)
        out.append((low, high) if lr else (0.0, inf))
    return out


__all__ = ["Broken", "Record", "judge", "live_is_replay", "persisted"]
