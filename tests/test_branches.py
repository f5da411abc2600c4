"""Goal: forks, tokens of unknown runs, shadows and what-ifs all say what a run under those rules would have said.

Method: real services over a journal in memory. One history with everything in it (a rewind, a gap, side signals,
receipts, an end) is told to runs under every specification; what a fork, a shadow or a what-if decides is compared, bit
for bit, with a run that was under that policy all along.
"""

import asyncio
import json
import math
import subprocess
import sys
from itertools import count

import pytest
from tests.callers import ANYBODY, caller
from tests.core.specs import SPECS

from flyball_server import records
from flyball_server.core import run as fold
from flyball_server.core.errors import Conflict, Invalid, NotFound
from flyball_server.core.events import Receipt
from flyball_server.core.types import Group, Settings
from flyball_server.engine import Engine
from flyball_server.messages import Attach, Fork, Report, SideReport, WhatIfRequest
from flyball_server.queries import SeriesRequest
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage import open_journal
from flyball_server.storage.memory import MemoryJournal
from flyball_server.verify import verify

GROUPS = (Group("backbone", 0.1, 0.9), Group("head", 0.01, betas=(0.9, 0.99)))
WINDOWED = {"type": "windowed", "window_size": 4, "cooldown_steps": 0}
PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.9, "threshold": 0.0}
COSINE = {"type": "cosine", "T_max": 90}


def loss(step):
    """Falls, wobbles, jumps; now and then it is no number, or none was measured."""
    if step % 31 == 30:
        return None
    return math.nan if step % 23 == 22 else 2 * math.exp(-step / 40) + 0.3 * math.sin(step * 1.7)


def attach(run="r", session="s1", **fields):
    blank = Attach(
        "default", run, session, {}, GROUPS, WINDOWED, None, {}, "absolute", 3, None, False, None, None, 0, "", "test"
    )
    return blank._replace(**fields)


class World:
    """A service of its own; `told` tells a run's losses step by step in reports of odd sizes."""

    def __init__(self, journal=None):
        self.journal = journal or MemoryJournal()
        clock = count(1_700_000_000_000_000, 1000)
        self.engine = Engine(self.journal, rules_of, lambda: next(clock))
        self.service = Service(self.engine, self.journal)
        self.numbers = count(1)

    async def told(self, run, first, last, attempt=1, session="s1", *, receipts=True, size=7, end=""):
        for start in range(first, last, size):
            steps = list(range(start, min(start + size, last)))
            signals = {
                "loss": [loss(s) for s in steps],
                "reward": [math.cos(s / 3) for s in steps],
                "grad_norm": [1.0 + s % 5 for s in steps],
            }
            made = Receipt(next(self.numbers), steps[0], steps[0] - 1, Settings((0.1, 0.01)), False, "", 1)
            report = Report(run, session, attempt, steps, signals, (made,) if receipts else (), (), "")
            if end and steps[-1] == last - 1:
                report = report._replace(end=end)
            await self.service.report(report, ANYBODY)

    async def history(self, run="r", **fields):
        """Attempt 1 to step 60, with side signals; 2 from step 35 of it, to 70; 3 from 80 on behind a gap; an end."""
        await self.service.attach(attach(run, **fields), ANYBODY)
        await self.told(run, 0, 30)
        await self.service.add_signals(run, SideReport({"val_loss": 0.7}), caller("b"))
        await self.told(run, 30, 60)
        await self.service.add_signals(run, SideReport({"val_loss": 9.9}), caller("b"))
        again = attach(run, resume=True, policy={})
        await self.service.attach(again._replace(session="s2", from_step=35, from_attempt=1), ANYBODY)
        self.numbers = count(1)
        await self.told(run, 35, 70, 2, "s2")
        await self.service.attach(again._replace(session="s3", from_step=80, from_attempt=2), ANYBODY)
        self.numbers = count(1)
        await self.told(run, 80, 110, 3, "s3", end="finished")

    async def live(self, run):
        return await self.engine.find(run)


def ran(work):
    """A world after `work(world)`, and what that returned."""

    async def main():
        world = World()
        await world.engine.start()
        return world, await work(world)

    return asyncio.run(main())


def decided(journal, run, *, first=0, attempts=None):
    """The settings decided by each step: step -> Settings, in journal order (a later attempt's overwrites)."""
    rows = list(journal.rows(run))
    groups = records.spec_of(rows[0]).groups
    out, now = {}, None
    for row in rows:
        if row.kind == "observed" and (attempts is None or row.attempt in attempts):
            event, outcome = records.from_row(row, groups)
            changes = dict(outcome.changes)
            for step in event.steps:
                now = changes.get(step, now)
                if step >= first:
                    out[step] = now
    return out


def state_of(run):
    """What of a run's state its policy and guard decide by."""
    dumped = fold.dump(run)
    return json.dumps([dumped[name] for name in ("policy_state", "decision", "guard_state", "settings")])


# -- forks


@pytest.mark.parametrize("name", SPECS)
def test_a_fork_goes_on_as_the_run_it_left_would_have(name):
    async def work(world):
        await world.service.attach(attach(policy=SPECS[name], guard={"max_factor": 50.0}), ANYBODY)
        await world.told("r", 0, 40, receipts=False)
        await world.told("r", 40, 90, receipts=False)
        await world.service.attach(attach("f", "s2", policy={}, fork=Fork("r", None, 40)), ANYBODY)
        await world.told("f", 40, 90, 1, "s2", receipts=False)
        return state_of((await world.live("r")).run), state_of((await world.live("f")).run)

    world, (left, own) = ran(work)
    assert decided(world.journal, "f") == decided(world.journal, "r", first=40)
    assert own == left
    assert verify(world.journal, "f").problem == ""


def test_a_fork_under_another_policy_begins_at_the_settings_that_held():
    async def work(world):
        await world.service.attach(attach(policy=PLATEAU), ANYBODY)
        await world.told("r", 0, 60)
        at = decided(world.journal, "r")[39]
        attached = await world.service.attach(attach("f", "s2", policy=WINDOWED, fork=Fork("r", 1, 40)), ANYBODY)
        return at, attached

    _, (at, attached) = ran(work)
    assert attached.from_step == 40
    assert attached.settings.lr == attached.reference == at.lr != (0.1, 0.01)


def test_a_fork_with_a_base_schedule_stands_on_the_references_of_the_run_it_left():
    async def work(world):
        await world.service.attach(attach(policy=PLATEAU), ANYBODY)
        await world.told("r", 0, 60)
        return await world.service.attach(attach("f", "s2", policy=COSINE, fork=Fork("r", 1, 45)), ANYBODY)

    _, attached = ran(work)
    assert attached.reference == (0.1, 0.01)
    assert attached.settings.lr == pytest.approx((0.05, 0.005)), "half of the cosine's way"


def test_a_fork_made_over_rest_waits_for_its_job():
    async def work(world):
        await world.service.attach(
            attach(policy=PLATEAU, base=COSINE, guard={"max_lr": 0.5}, labels={"k": "v"}), ANYBODY
        )
        await world.told("r", 0, 60)
        asked = attach("f", "fork", policy={}, groups=(), mode="", seed=0, fork=Fork("r", None, 30))
        view = await world.service.fork(asked, caller("b"))
        with pytest.raises(Conflict, match=r"fork of .r. at step 30: .* resume=True"):
            await world.service.attach(attach("f", "s2"), ANYBODY)
        attached = await world.service.attach(attach("f", "s3", policy={}, resume=True), ANYBODY)
        await world.told("f", 30, 60, 1, "s3")
        return view, attached

    world, (view, attached) = ran(work)
    assert (view.record.status, view.record.parent, view.record.labels) == ("created", "r", {"k": "v"})
    assert view.spec.seed == 3
    assert attached.from_step == 30
    assert decided(world.journal, "f") == decided(world.journal, "r", first=30)


def test_a_fork_can_leave_a_line_that_was_abandoned():
    async def work(world):
        await world.history(policy=PLATEAU)
        await world.service.attach(attach("f", "s9", policy={}, fork=Fork("r", 1, 50)), ANYBODY)
        await world.told("f", 50, 60, 1, "s9")

    world, _ = ran(work)
    assert decided(world.journal, "f") == decided(world.journal, "r", first=50, attempts={1})


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"fork": Fork("nobody", None, 3)}, NotFound, "nobody"),
        ({"fork": Fork("r", 9, 3)}, NotFound, "attempt 9"),
        ({"fork": Fork("r", None, 3, 2, "ab" * 32)}, Conflict, "does not hold"),
        ({"fork": Fork("r", None, -1)}, Invalid, "fork.step is -1"),
        ({"fork": Fork("r", None, 3), "groups": GROUPS[:1]}, Invalid, "groups"),
        ({"fork": Fork("r", None, 3), "resume": True}, Invalid, "fork and resume"),
        ({"fork": Fork("r", None, 3), "run": "r"}, Conflict, "exists already"),
        ({"fork": None, "resume": True, "on_unknown": "import"}, Invalid, "policy is not given"),
        ({"fork": Fork("r", None, 3), "policy": {"type": "windowde"}}, Invalid, "windowed"),
        ({"fork": Fork("r", None, 3), "shadows": {str(i): WINDOWED for i in range(4)}}, Invalid, "at most 3"),
    ],
)
def test_a_fork_that_cannot_be_begins_nothing(fields, error, words):
    async def work(world):
        await world.service.attach(attach(), ANYBODY)
        await world.told("r", 0, 20)
        with pytest.raises(error, match=words):
            await world.service.attach(attach("f", "s2", **{"policy": {}, **fields}) if "run" not in fields else attach(
                session="s2", fork=fields["fork"]), ANYBODY)  # fmt: skip

    world, _ = ran(work)
    assert world.journal.record("f") is None


def test_a_fork_over_rest_beyond_the_line_is_a_mistake_but_a_checkpoint_may_be_newer():
    async def work(world):
        await world.service.attach(attach(), ANYBODY)
        await world.told("r", 0, 20)
        beyond = attach("f", "s2", policy={}, fork=Fork("r", None, 25))
        with pytest.raises(Invalid, match="ends with step 19"):
            await world.service.fork(beyond, ANYBODY)
        return await world.service.attach(beyond, ANYBODY)

    _, attached = ran(work)
    assert attached.from_step == 25


@pytest.mark.parametrize("step", [0, 1, 10, 20, 30, 31])
def test_a_run_with_gaps_between_its_steps_can_be_forked_at_any_of_them(step):
    async def work(world):
        await world.service.attach(attach(policy=PLATEAU), ANYBODY)
        for at in (0, 10, 20, 30):
            await world.service.report(Report("r", "s1", 1, [at], {"loss": [loss(at)]}, (), (), ""), ANYBODY)
        with pytest.raises(Invalid, match="ends with step 30"):
            await world.service.fork(attach("g", policy={}, groups=(), mode="", fork=Fork("r", None, 32)), ANYBODY)
        view = await world.service.fork(attach("f", policy={}, groups=(), mode="", fork=Fork("r", None, step)), ANYBODY)
        return view.run.from_step

    _, from_step = ran(work)
    assert from_step == step


EVALUATED = {"type": "plateau", "metric": "val_loss", "patience": 0, "factor": 0.5, "threshold": 0.0}


@pytest.mark.parametrize("token", [True, False])
def test_what_was_reported_before_a_checkpoint_is_seen_behind_it(token):
    """Evaluate, save, be killed, resume: the usual order."""

    async def straight(world):
        await world.service.attach(attach(policy=EVALUATED), ANYBODY)
        await world.told("r", 0, 2)
        await world.service.add_signals("r", SideReport({"val_loss": 1.0}), caller("b"))
        await world.told("r", 2, 4)
        await world.service.add_signals("r", SideReport({"val_loss": 5.0}), caller("b"))
        await world.told("r", 4, 9)

    async def resumed(world):
        await world.service.attach(attach(policy=EVALUATED), ANYBODY)
        await world.told("r", 0, 2)
        await world.service.add_signals("r", SideReport({"val_loss": 1.0}), caller("b"))
        await world.told("r", 2, 4)
        await world.service.add_signals("r", SideReport({"val_loss": 5.0}), caller("b"))
        again = attach(session="s2", policy={}, resume=True)
        if token:
            await world.told("r", 4, 6)  # goes on, and is killed
            again = again._replace(from_step=4, from_attempt=1)
        await world.service.attach(again, ANYBODY)
        await world.told("r", 4, 9, 2, "s2")
        asked = WhatIfRequest("r", EVALUATED, None, {}, None, None)
        return (await world.service.what_if(asked, ANYBODY, points=9, limit=0))["summary"]

    calm, _ = ran(straight)
    world, summary = ran(resumed)
    wanted = decided(calm.journal, "r", first=4)
    assert len({settings.lr for settings in decided(calm.journal, "r").values()}) > 1
    assert decided(world.journal, "r", first=4, attempts={2}) == wanted
    assert summary["first_difference"] is None


def test_a_second_fork_of_the_same_name_is_told_so():
    async def work(world):
        await straight_run(world, 20)
        asked = attach("f", policy={}, groups=(), mode="", fork=Fork("r", None, 5))
        await world.service.fork(asked, ANYBODY)
        with pytest.raises(Conflict, match="'f' exists already"):
            await world.service.fork(asked, ANYBODY)

    ran(work)


def test_lineage_names_ancestors_forks_attempts_and_gaps():
    async def work(world):
        await world.history()
        await world.service.attach(attach("f", "s7", policy={}, fork=Fork("r", 2, 50)), ANYBODY)
        await world.told("f", 50, 60, 1, "s7")
        await world.service.attach(attach("g", "s8", policy=PLATEAU, fork=Fork("f", None, 55)), ANYBODY)
        return [await world.service.lineage(run, ANYBODY) for run in ("r", "f", "g")]

    _, (r, f, g) = ran(work)
    assert r["ancestors"] == []
    assert [fork["run"] for fork in r["forks"]] == ["f"]
    assert [(a["run"], a["attempt"], a["step"], a["carried"]) for a in g["ancestors"]] == [
        ("f", 1, 55, False), ("r", 2, 50, True)
    ]  # fmt: skip
    assert f["forks"][0] | {"created_at": ""} == {"run": "g", "attempt": 1, "step": 55, "created_at": ""}
    told = [{k: a[k] for k in ("attempt", "parent", "from_step", "through", "gap", "left_at")} for a in r["attempts"]]
    assert told == [
        {"attempt": 1, "parent": 0, "from_step": 0, "through": 59, "gap": None, "left_at": 35},
        {"attempt": 2, "parent": 1, "from_step": 35, "through": 69, "gap": 0, "left_at": 80},
        {"attempt": 3, "parent": 2, "from_step": 80, "through": 109, "gap": 10, "left_at": None},
    ]
    assert all(a["on_newest_line"] for a in r["attempts"])


# -- tokens that this service cannot place


TOKEN = {"resume": True, "from_step": 40, "from_attempt": 5, "seq": 77, "digest": "ab" * 32}


def test_a_token_of_an_unknown_run_is_refused_or_imported_as_the_caller_says():
    async def work(world):
        with pytest.raises(NotFound, match="on_unknown='import'"):
            await world.service.attach(attach(**TOKEN), ANYBODY)
        assert world.journal.record("r") is None
        first = await world.service.attach(attach(**TOKEN, on_unknown="import"), ANYBODY)
        await world.told("r", 40, 60)
        again = await world.service.attach(attach(session="s2", **TOKEN, on_unknown="import"), ANYBODY)
        refusing = await world.service.attach(attach(session="s3", **TOKEN), ANYBODY)
        return first, again, refusing, await world.service.lineage("r", ANYBODY)

    world, (first, again, refusing, lineage) = ran(work)
    assert [(a.attempt, a.from_step) for a in (first, again, refusing)] == [(1, 40), (2, 40), (3, 40)]
    assert first.settings == again.settings == refusing.settings
    [origin] = lineage["ancestors"]
    assert (origin["kind"], origin["step"], origin["seq"], origin["digest"]) == ("token", 40, 77, "ab" * 32)
    assert verify(world.journal, "r").problem == ""


def test_a_token_newer_than_the_store_leaves_a_gap_where_the_caller_wants_that():
    async def work(world):
        await world.service.attach(attach(), ANYBODY)
        await world.told("r", 0, 30)
        with pytest.raises(Conflict, match="newer than this store"):
            await world.service.attach(attach(session="s2", **TOKEN), ANYBODY)
        attached = await world.service.attach(attach(session="s2", **TOKEN, on_unknown="import"), ANYBODY)
        await world.told("r", 40, 60, 2, "s2")
        # An older one of that other line goes back on this one.
        back = TOKEN | {"from_step": 20, "digest": "cd" * 32, "on_unknown": "import"}
        await world.service.attach(attach(session="s3", **back), ANYBODY)
        await world.told("r", 20, 60, 3, "s3")
        return attached, await world.service.lineage("r", ANYBODY)

    world, (attached, lineage) = ran(work)
    assert (attached.attempt, attached.from_step) == (2, 40)
    assert [(a["gap"], a["claimed"] is not None) for a in lineage["attempts"]] == [(None, False), (10, True), (0, True)]
    straight, _ = ran(lambda world: straight_run(world, 60))
    assert decided(world.journal, "r", attempts={3}) == decided(straight.journal, "r", first=20)
    assert verify(world.journal, "r").problem == ""


async def straight_run(world, last, **fields):
    await world.service.attach(attach(**fields), ANYBODY)
    await world.told("r", 0, last)


# -- shadows


SHADOWS = {"bold": {"type": "windowed", "window_size": 3, "cooldown_steps": 0}, "flat": PLATEAU | {"base": COSINE}}


@pytest.mark.parametrize("name", SPECS)
def test_a_shadow_decides_what_a_run_of_that_policy_would_have_and_disturbs_nothing(name):
    watched, _ = ran(lambda world: world.history(policy=WINDOWED, shadows={"x": SPECS[name], **SHADOWS}))
    alone, _ = ran(lambda world: world.history(policy=WINDOWED))
    other, live = ran(lambda world: unreceipted(world, SPECS[name]))
    assert decided(watched.journal, "r") == decided(alone.journal, "r")
    assert beside(watched.journal, "r", "x") == decided(other.journal, "r")
    assert verify(watched.journal, "r").problem == ""
    run = asyncio.run(watched.live("r")).run
    assert state_of(run.shadows[-1]) == state_of(live.run)


async def unreceipted(world, policy):
    """The history under a policy that is told of no receipts, as a shadow is not."""
    told = world.told

    async def bare(*args, **kwargs):
        await told(*args, **(kwargs | {"receipts": False}))

    world.told = bare
    await world.history(policy=policy)
    return await world.live("r")


def beside(journal, run, shadow):
    """As `decided`, of a shadow, out of the stored columns alone."""
    out = {}
    for row in journal.rows(run):
        if row.kind == "observed":
            columns = tuple(
                c._replace(name=c.name.removesuffix("@" + shadow))
                for c in row.columns
                if c.name.endswith("@" + shadow) or not c.name.startswith("=") or c.name == "=step"
            )
            event, outcome = records.from_row(row._replace(columns=columns), GROUPS)
            changes, now = dict(outcome.changes), None
            for step in event.steps:
                now = out[step] = changes.get(step, now)
    return out


def test_shadows_survive_a_restart_and_are_queryable_beside_the_real_one():
    async def work(world):
        await world.history(shadows=SHADOWS)
        again = World(world.journal)
        await again.engine.start()
        assert fold.dump((await again.live("r")).run) == fold.dump((await world.live("r")).run)
        names = ["decided_lr:head", "shadow:bold:lr:head", "shadow:flat:lr:backbone"]
        found = await again.service.series("r", SeriesRequest(names, 2000), ANYBODY)
        marks = await again.service.decisions("r", ANYBODY, after=0, limit=1000, newest=False, shadow="bold")
        newest = await again.service.decisions("r", ANYBODY, after=0, limit=1, newest=True, shadow="bold")
        for call in (
            again.service.decisions("r", ANYBODY, after=0, limit=10, newest=False, shadow="who"),
            again.service.series("r", SeriesRequest(["shadow:who:lr:head"], 10), ANYBODY),
        ):
            with pytest.raises(NotFound, match="it has bold, flat"):
                await call
        return found["series"], marks["decisions"], newest["decisions"]

    world, (series, marks, newest) = ran(work)
    assert marks
    assert marks[-1] == newest[0]
    assert all(mark["reason"] for mark in marks)
    shadow = beside(world.journal, "r", "bold")
    line = series["shadow:bold:lr:head"]
    assert all(shadow[step].lr[1] == value for step, value in zip(line["step"], line["value"], strict=True))
    assert series["decided_lr:head"]["value"] != line["value"]
    cosine = series["shadow:flat:lr:backbone"]["value"]
    assert cosine[0] > cosine[-1]


def test_a_resumed_run_keeps_its_shadows_and_says_so_to_a_job_that_asks_for_others():
    async def work(world):
        await world.history(shadows=SHADOWS, base=COSINE)
        again = attach(session="s4", policy={}, resume=True)
        with pytest.raises(Invalid, match=r"shadows: .*bold is recorded"):
            await world.service.attach(again._replace(shadows={"bold": PLATEAU}), ANYBODY)
        await world.service.attach(again._replace(shadows=SHADOWS), ANYBODY)
        await world.service.attach(again._replace(session="s5"), ANYBODY)
        return (await world.live("r")).run

    _, run = ran(work)
    assert (run.attempt, len(run.shadows)) == (5, 2)


# -- what if


@pytest.mark.parametrize("name", SPECS)
def test_what_if_under_the_runs_own_policy_is_what_was(name):
    async def work(world):
        await world.history(policy=SPECS[name], guard={"max_change": 3.0})
        asked = WhatIfRequest("r", SPECS[name], None, {}, None, None)
        return [
            await world.service.what_if(asked._replace(attempt=attempt), ANYBODY, points=2000, limit=0)
            for attempt in (None, 1, 2, 3)
        ]

    _, found = ran(work)
    for one, observations in zip(found, (100, 60, 70, 100), strict=True):
        assert one["summary"]["first_difference"] is None
        assert one["summary"]["steps_apart"] == 0
        assert one["summary"]["decisions"]["real"] == one["summary"]["decisions"]["what_if"]
        assert one["summary"]["observations"] == observations


@pytest.mark.parametrize("name", SPECS)
def test_what_if_under_another_policy_is_what_a_shadow_decided(name):
    async def work(world):
        await world.history(shadows={"x": SPECS[name]}, guard={"max_factor": 20.0})
        asked = WhatIfRequest("r", SPECS[name], None, {}, None, None)
        answer = await world.service.what_if(asked, ANYBODY, points=2000, limit=1000)
        marks = await world.service.decisions("r", ANYBODY, after=0, limit=1000, newest=False, shadow="x")
        return answer, marks["decisions"]

    world, (answer, marks) = ran(work)
    shadow = beside(world.journal, "r", "x")
    for i, group in enumerate(GROUPS):
        stream = answer["series"][f"lr:{group.name}"]["what_if"]
        told = dict(zip(stream["step"], stream["value"], strict=True))
        assert all(shadow[step].lr[i] == value for step, value in told.items())
        assert {s.lr[i] for s in shadow.values()} == set(told.values())
    assert [mark["step"] for mark in answer["decisions"]] == [
        mark["step"] for mark in marks if mark["attempt"] != 1 or mark["step"] < 35
    ]


def test_what_if_of_a_fork_goes_on_from_where_it_left():
    async def work(world):
        await world.history(policy=PLATEAU)
        await world.service.attach(attach("f", "s9", policy={}, fork=Fork("r", 2, 50)), ANYBODY)
        await world.told("f", 50, 90, 1, "s9")
        own = await world.service.what_if(WhatIfRequest("f", PLATEAU, None, {}, None, None), ANYBODY, points=9, limit=0)
        still = WhatIfRequest("f", {"type": "constant"}, None, {}, None, None)
        held = (await world.service.what_if(still, ANYBODY, points=9, limit=0))["summary"]
        return own["summary"], held, decided(world.journal, "r")[49]

    _, (summary, held, left) = ran(work)
    assert (summary["first_difference"], summary["from_step"], summary["observations"]) == (None, 50, 40)
    # Another policy begins where the fork did.
    assert [held["groups"][group.name]["what_if_lr"] for group in GROUPS] == list(left.lr) != [0.1, 0.01]


def test_a_summary_says_where_the_streams_part_and_how_far():
    async def work(world):
        await world.service.attach(attach(policy={"type": "constant"}), ANYBODY)
        await world.told("r", 0, 50)
        cut = {"type": "step", "step_size": 20, "gamma": 0.1}
        return await world.service.what_if(WhatIfRequest("r", cut, None, {}, None, None), ANYBODY, points=100, limit=5)

    _, answer = ran(work)
    summary = answer["summary"]
    # Step 19 decides what holds from step 20 on.
    assert (summary["first_difference"], summary["steps_apart"], summary["to_step"]) == (19, 31, 49)
    head = summary["groups"]["head"]
    assert head["real_lr"] == 0.01
    assert head["smallest"] == {"step": 39, "ratio": pytest.approx(0.01)}
    assert head["largest"] == {"step": 0, "ratio": 1.0}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"policy": {}}, Invalid, "policy"),
        ({"policy": {"type": "windowde"}}, Invalid, "windowed"),
        ({"policy": {"type": "windowed", "base": COSINE}, "base": COSINE}, Invalid, "base is given twice"),
        ({"guard": {"max_lrr": 1}}, Invalid, "max_lr"),
        ({"attempt": 7}, NotFound, "attempt 7"),
        ({"run": "nobody"}, NotFound, "nobody"),
    ],
)
def test_a_what_if_that_cannot_be_says_why(fields, error, words):
    async def work(world):
        await straight_run(world, 20)
        asked = WhatIfRequest("r", WINDOWED, None, {}, None, None)._replace(**fields)
        with pytest.raises(error, match=words):
            await world.service.what_if(asked, ANYBODY, points=100, limit=5)
        # The one place where what-ifs are counted is free again.
        return await world.service.what_if(
            WhatIfRequest("r", WINDOWED, None, {}, None, None), ANYBODY, points=100, limit=5
        )

    _, answer = ran(work)
    assert answer["summary"]["observations"] == 20


# -- on the store itself


def replayed(store, *words):
    command = [sys.executable, "-m", "flyball_server.cli", "replay", "r", "--store", store, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_replay_on_the_store_says_what_the_service_says(tmp_path):
    store, policy = f"sqlite:///{tmp_path}/j.db", tmp_path / "policy.yaml"
    policy.write_text("type: plateau\npatience: 0\nfactor: 0.9\nthreshold: 0\n")

    async def work():
        world = World(open_journal(store))
        await world.engine.start()
        await world.history()
        asked = WhatIfRequest("r", PLATEAU, None, {}, None, None)
        # The file is read beside the running service.
        done = [await asyncio.to_thread(replayed, store, "--policy", str(policy), *json) for json in ([], ["--json"])]
        answer = await world.service.what_if(asked, ANYBODY, points=2000, limit=0)
        await world.engine.close()
        return answer, *done

    answer, text, lines = asyncio.run(work())
    assert (text.returncode, text.stderr, lines.stderr) == (0, "", "")
    *stream, last = [json.loads(line) for line in lines.stdout.splitlines()]
    assert last["summary"] == answer["summary"]
    assert f"first difference decided at step {last['summary']['first_difference']};" in text.stdout
    told = dict(zip(*[answer["series"]["lr:head"]["what_if"][name] for name in ("step", "value")], strict=True))
    assert {line["step"]: line["what_if"]["lr"]["head"] for line in stream}.items() >= set(list(told.items())[:-1])
    apart = [line for line in stream if line["real"] != line["what_if"]]
    assert apart[0]["step"] == last["summary"]["first_difference"]


def test_replay_says_what_is_wrong(tmp_path):
    (tmp_path / "p.json").write_text('{"type": "windowed"}')
    gone = replayed(f"sqlite:///{tmp_path}/none.db", "--policy", str(tmp_path / "p.json"))
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "does not exist" in gone.stderr
