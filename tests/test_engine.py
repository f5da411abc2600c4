"""Goal: persist, then publish. Whatever the journal answers, a run in memory never knows more than the journal.

Method: real services over one MemoryJournal; in between a wrapper that fails, loses or holds appends as the test says.
What a run ought to be is always the fold of the journal's own rows.
"""

import asyncio
import json
from itertools import count

import pytest
from tests.callers import ANYBODY, caller

from flyball_server import limits, records
from flyball_server.core import run as fold
from flyball_server.core.errors import Busy, Conflict, NotFound
from flyball_server.core.types import Group
from flyball_server.engine import Engine
from flyball_server.messages import Attach, Report, SideReport
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage.memory import MemoryJournal
from flyball_server.verify import verify

#: Decides often and remembers everything it saw.
POLICY = {"type": "plateau", "patience": 0, "factor": 0.9, "threshold": 0.0}
GROUPS = (Group("a", 0.1, 0.9), Group("b", 0.01))


def attach_message(session="s1", **fields):
    blank = Attach(
        "default", "r", session, {}, GROUPS, POLICY, None, {}, "absolute", 0, None, False, None, None, 0, "", "test"
    )
    return blank._replace(**fields)


def loss(step, attempt=1):
    """Rises and falls, and differently in every attempt."""
    return float((step * 7 + attempt * 5) % 11)


def report_message(first, last, attempt=1, session="s1", **fields):
    steps = list(range(first, last + 1))
    values = {"loss": [loss(step, attempt) for step in steps]}
    return Report("r", session, attempt, steps, values, (), (), "")._replace(**fields)


class Scripted:
    """A journal whose next appends do what the script says: "busy", "raise", "late" (durable, but the answer comes
    only with `let_go`), or any callable, run just before the append. Everything else is the real journal's."""

    def __init__(self, journal):
        self._journal = journal
        self.script = []
        self.held = []

    def __getattr__(self, name):
        return getattr(self._journal, name)

    def start(self, deliver):
        self._deliver = deliver
        self._holding = False
        self._journal.start(lambda results: self.held.append(results) if self._holding else deliver(results))

    def append(self, append):
        act = self.script.pop(0) if self.script else None
        if act == "raise":
            raise Busy("too many appends wait")
        if act == "busy":
            return self._deliver([(append, Busy("the disk is full"))])
        if callable(act):
            act()
        self._holding = act == "late"
        try:
            self._journal.append(append)
        finally:
            self._holding = False
        return None

    def let_go(self):
        while self.held:
            self._deliver(self.held.pop(0))


class Shared:
    """One journal that several engines of a test open: each has its own `deliver`."""

    def __init__(self, journal):
        self._journal = journal
        journal.start(self._route)

    def _route(self, results):
        for append, error in results:
            append.token[0]([(append._replace(token=append.token[1]), error)])

    def door(self):
        return Door(self._journal)


class Door:
    def __init__(self, journal):
        self._journal = journal

    def __getattr__(self, name):
        return getattr(self._journal, name)

    def start(self, deliver):
        self._deliver = deliver

    def close(self):
        pass

    def append(self, append):
        self._journal.append(append._replace(token=(self._deliver, append.token)))


async def opened(journal):
    clock = count(1_700_000_000_000_000, 1000)
    engine = Engine(journal, rules_of, lambda: next(clock))
    await engine.start()
    return engine, Service(engine, journal)


def text(run, *without):
    data = {name: value for name, value in fold.dump(run).items() if name not in without}
    return json.dumps(data, sort_keys=True, allow_nan=False)


def folded(journal, until=None):
    """The run as the journal's rows say it is."""
    rows = list(journal.rows("r", until=until))
    rules = rules_of(records.spec_of(rows[0]))
    run = fold.create(rules)
    for row in rows[1:]:
        run, _ = fold.apply(rules, run, records.from_row(row, rules.groups)[0])
    return run


async def undisturbed(*parts):
    """The journal of a run whose reports all went through at once."""
    journal = MemoryJournal()
    _, service = await opened(journal)
    await service.attach(attach_message(), ANYBODY)
    for part in parts:
        await service.report(part, ANYBODY)
    return journal


@pytest.mark.parametrize("trouble", ["busy", "raise"])
def test_what_the_journal_did_not_take_is_not_in_the_run(trouble):
    async def scenario():
        journal = Scripted(MemoryJournal())
        engine, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        await service.report(report_message(0, 9), ANYBODY)
        live = await engine.find("r")
        before = text(live.run)
        journal.script = [trouble]
        with pytest.raises(Busy):
            await service.report(report_message(10, 19), ANYBODY)
        assert text(live.run) == before == text(folded(journal))
        advice = await service.report(report_message(10, 19), ANYBODY)
        assert advice.through == 19
        assert text((await engine.find("r")).run) == text(folded(journal))
        assert verify(journal, "r").problem == ""
        twin = await undisturbed(report_message(0, 9), report_message(10, 19))
        assert text(folded(journal)) == text(folded(twin))

    asyncio.run(scenario())


@pytest.mark.parametrize("kept", [True, False])
def test_a_cancelled_report_leaves_the_run_as_the_journal_has_it(kept):
    async def scenario():
        journal = Scripted(MemoryJournal())
        engine, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        if kept:
            journal.script = ["late"]
        else:  # cancelled before the journal took it
            journal.script = [lambda: (_ for _ in ()).throw(asyncio.CancelledError())]
        asked = asyncio.create_task(service.report(report_message(0, 9), ANYBODY))
        await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await engine.find("r")).run.through == -1, "nothing is published that nobody has acknowledged"
        journal.let_go()
        advice = await service.report(report_message(0, 12), ANYBODY)
        assert advice.through == 12
        assert text((await engine.find("r")).run) == text(folded(journal))
        assert folded(journal).observations == 13
        assert verify(journal, "r").problem == ""

    asyncio.run(scenario())


def test_an_advice_waits_for_the_journal():
    async def scenario():
        journal = Scripted(MemoryJournal())
        _engine, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        journal.script = ["late"]
        asked = asyncio.create_task(service.report(report_message(0, 9), ANYBODY))
        await asyncio.sleep(0.02)
        assert not asked.done()
        assert (await service.get_run("r", ANYBODY)).run.through == -1
        journal.let_go()
        assert (await asked).through == 9

    asyncio.run(scenario())


def test_two_replicas_taking_turns_decide_as_one():
    async def scenario():
        shared = Shared(MemoryJournal())
        services = [(await opened(shared.door()))[1] for _ in range(2)]
        await services[0].attach(attach_message(lag=0), ANYBODY)
        advice = []
        for i, first in enumerate(range(0, 60, 5)):
            advice.append(await services[(i * i + i // 3) % 2].report(report_message(first, first + 4), ANYBODY))
            if i == 5:
                await services[i % 2].add_signals("r", SideReport({"val_loss": 2.0}), caller("b"))
        one = MemoryJournal()
        _, service = await opened(one)
        await service.attach(attach_message(lag=0), ANYBODY)
        alone = []
        for i, first in enumerate(range(0, 60, 5)):
            alone.append(await service.report(report_message(first, first + 4), ANYBODY))
            if i == 5:
                await service.add_signals("r", SideReport({"val_loss": 2.0}), caller("b"))
        assert [a._replace(digest="") for a in advice] == [a._replace(digest="") for a in alone]
        journal = shared.door()
        assert text(folded(journal)) == text(folded(one))
        assert verify(journal, "r").problem == ""

    asyncio.run(scenario())


def test_replicas_writing_at_once_fold_every_step_once():
    async def scenario():
        shared = Shared(MemoryJournal())
        services = [(await opened(shared.door()))[1] for _ in range(3)]
        await services[0].attach(attach_message(), ANYBODY)
        for first in range(0, 40, 4):
            asked = [s.report(report_message(first, first + 3), ANYBODY) for s in services]
            asked += [
                s.add_signals("r", SideReport({f"from_{i}": float(first)}), caller("b")) for i, s in enumerate(services)
            ]
            for answer in await asyncio.gather(*asked):
                assert isinstance(answer, int) or answer.through == first + 3
        journal = shared.door()
        assert folded(journal).observations == 40
        assert verify(journal, "r").problem == ""

    asyncio.run(scenario())


def test_of_two_processes_that_begin_one_run_one_gets_it():
    async def scenario():
        shared = Shared(MemoryJournal())
        services = [(await opened(shared.door()))[1] for _ in range(2)]
        asked = [services[i % 2].attach(attach_message(f"s{i}"), ANYBODY) for i in range(6)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(type(a).__name__ for a in answers) == ["Attached"] + ["Conflict"] * 5
        assert verify(shared.door(), "r").problem == ""

    asyncio.run(scenario())


def test_a_replica_that_missed_something_refuses_nothing_for_it():
    async def scenario():
        shared = Shared(MemoryJournal())
        (_, one), (_, two) = [await opened(shared.door()) for _ in range(2)]
        await one.attach(attach_message(), ANYBODY)
        await two.report(report_message(0, 9), ANYBODY)
        await one.attach(attach_message("s2", resume=True, from_step=5, from_attempt=1), ANYBODY)
        assert (await two.report(report_message(5, 9, 2, "s2"), ANYBODY)).attempt == 2
        # The other way round: what is over for all is over for whoever has not heard of it, too.
        with pytest.raises(Conflict, match="another process has taken the run over"):
            await two.report(report_message(10, 12), ANYBODY)
        # The first one knows of no attempt 3 yet.
        await two.attach(attach_message("s3", resume=True, from_step=8, from_attempt=2), ANYBODY)
        await two.report(report_message(8, 12, 3, "s3"), ANYBODY)
        assert (await one.attach(attach_message("s4", resume=True, from_step=10, from_attempt=3), ANYBODY)).attempt == 4
        assert verify(shared.door(), "r").problem == ""

    asyncio.run(scenario())


def test_a_late_attach_of_a_session_that_was_relieved_takes_nothing_back():
    async def scenario():
        _, service = await opened(MemoryJournal())
        await service.attach(attach_message(), ANYBODY)
        resumed = attach_message("s2", resume=True)
        assert (await service.attach(resumed, ANYBODY)).attempt == 2
        assert (await service.attach(resumed, ANYBODY)).attempt == 2
        await service.attach(attach_message("s3", resume=True), ANYBODY)
        with pytest.raises(Conflict, match="the session 's2' drove attempt 2"):
            await service.attach(resumed, ANYBODY)
        assert (await service.report(report_message(0, 9, 3, "s3"), ANYBODY)).through == 9

    asyncio.run(scenario())


def test_a_run_that_is_begun_while_somebody_looks_for_it_is_not_damaged():
    class Looking:
        """Its first look at a run's record comes just before the run is begun."""

        def __init__(self, journal):
            self._journal, self._early = journal, True

        def __getattr__(self, name):
            return getattr(self._journal, name)

        def record(self, run):
            early, self._early = self._early, False
            return None if early else self._journal.record(run)

    async def main():
        journal = await undisturbed(report_message(0, 3))
        engine, _ = await opened(Looking(journal))
        assert (await engine.find("r")).run.through == 3
        assert engine.damage.words("r") == ""

    asyncio.run(main())


def test_a_full_inbox_says_busy_and_loses_nothing():
    async def scenario():
        journal = Scripted(MemoryJournal())
        _, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        journal.script = ["late"]
        first = asyncio.create_task(service.report(report_message(0, 0), ANYBODY))
        await asyncio.sleep(0.01)
        others = [
            asyncio.create_task(service.add_signals("r", SideReport({"x": float(i)}), caller("b")))
            for i in range(limits.INBOX_MAX + 5)
        ]
        await asyncio.sleep(0.01)
        journal.let_go()
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert (await first).through == 0
        refused = [a for a in answers if isinstance(a, Busy)]
        assert len(refused) == 6, "the report holds one of the places"
        assert all(a.retry_after_s > 0 for a in refused)
        assert folded(journal).seq == 3 + limits.INBOX_MAX - 1
        assert (await service.report(report_message(1, 1), ANYBODY)).through == 1

    asyncio.run(scenario())


async def rewound():
    """Attempt 1 from 0 to 99, attempt 2 from its step 50 to 79, attempt 3 from step 30 of the second to 59."""
    journal = MemoryJournal()
    engine, service = await opened(journal)
    await service.attach(attach_message(), ANYBODY)
    for first in range(0, 100, 7):
        await service.report(report_message(first, min(first + 6, 99)), ANYBODY)
    for attempt, start, end, parent in ((2, 50, 80, 1), (3, 30, 60, 2)):
        message = attach_message(f"s{attempt}", resume=True, from_step=start, from_attempt=parent)
        answer = await service.attach(message, ANYBODY)
        assert (answer.attempt, answer.from_step, answer.through) == (attempt, start, start - 1)
        for first in range(start, end, 7):
            last = min(first + 6, end - 1)
            await service.report(report_message(first, last, attempt, f"s{attempt}"), ANYBODY)
    return journal, engine, service


async def on_line(*parts):
    """The fold of the steps of one line, each (attempt, first, last)."""
    rules = rules_of(records.spec_of(next((await undisturbed()).rows("r"))))
    run = folded(await undisturbed())
    for attempt, first, last in parts:
        run, _ = fold.apply(rules, run, records.Observed(1, *report_message(first, last, attempt)[3:5]))
    return run


OWN = ("seq", "attempts", "attempt", "session", "from_step", "decided", "steering")


@pytest.mark.parametrize(
    ("attempt", "step", "line"),
    [
        (1, 0, []),
        (1, 1, [(1, 0, 0)]),
        (1, 70, [(1, 0, 69)]),
        (1, 100, [(1, 0, 99)]),
        (2, 40, [(1, 0, 39)]),
        (2, 50, [(1, 0, 49)]),
        (2, 64, [(1, 0, 49), (2, 50, 63)]),
        (2, 80, [(1, 0, 49), (2, 50, 79)]),
        (3, 20, [(1, 0, 19)]),
        (3, 30, [(1, 0, 29)]),
        (3, 45, [(1, 0, 29), (3, 30, 44)]),
    ],
)
def test_any_step_of_any_attempt_is_found_again(attempt, step, line):
    async def scenario():
        _, engine, _ = await rewound()
        found = await engine.restored(await engine.find("r"), attempt, step)
        assert text(found, *OWN) == text(await on_line(*line), *OWN)

    asyncio.run(scenario())


def test_a_token_of_an_abandoned_attempt_goes_on_along_its_own_line():
    async def scenario():
        journal, engine, service = await rewound()
        await service.attach(attach_message("s4", resume=True, from_step=70, from_attempt=1), ANYBODY)
        await service.report(report_message(70, 75, 4, "s4"), ANYBODY)
        live = await engine.find("r")
        assert text(live.run, *OWN) == text(await on_line((1, 0, 69), (4, 70, 75)), *OWN)
        assert verify(journal, "r").problem == ""
        for step in (60, 55, 35):  # its own line runs through the first attempt, not through those in between
            found = await engine.restored(live, 4, step)
            assert text(found, *OWN) == text(await on_line((1, 0, step - 1)), *OWN)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("attempt", "step", "line"),
    [(1, 110, [(1, 0, 99)]), (2, 90, [(1, 0, 49), (2, 50, 79)]), (3, 61, [(1, 0, 29), (3, 30, 59)])],
)
def test_a_line_that_ends_before_the_step_goes_on_from_its_end(attempt, step, line):
    async def scenario():
        _, engine, _ = await rewound()
        found = await engine.restored(await engine.find("r"), attempt, step)
        assert text(found, *OWN) == text(await on_line(*line), *OWN)

    asyncio.run(scenario())


def test_a_checkpoint_between_two_observed_steps_can_be_resumed():
    """A job that reports every tenth step makes its checkpoints where it likes."""

    async def scenario():
        journal = MemoryJournal()
        _, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        for first in (0, 10, 20, 30):
            await service.report(report_message(first, first), ANYBODY)
        answer = await service.attach(attach_message("s2", resume=True, from_step=15, from_attempt=1), ANYBODY)
        assert (answer.attempt, answer.from_step) == (2, 15)
        assert folded(journal).observations == 2

    asyncio.run(scenario())


def test_a_checkpoint_whose_last_steps_never_arrived_can_be_resumed_again_and_again():
    async def scenario():
        _, service = await opened(MemoryJournal())
        await service.attach(attach_message(), ANYBODY)
        await service.report(report_message(0, 90), ANYBODY)
        for attempt in (2, 3):
            message = attach_message(f"s{attempt}", resume=True, from_step=95, from_attempt=1)
            assert (await service.attach(message, ANYBODY)).attempt == attempt

    asyncio.run(scenario())


def settings_by_step(advice):
    return dict(advice.changes)


@pytest.mark.parametrize("attempt", [0, 4, 99])
def test_an_attempt_that_never_was_is_not_found_and_opens_nothing(attempt):
    async def scenario():
        journal, _, service = await rewound()
        seq = journal.record("r").seq
        with pytest.raises(NotFound, match=f"attempt {attempt} "):
            await service.attach(attach_message("s4", resume=True, from_step=40, from_attempt=attempt), ANYBODY)
        assert journal.record("r").seq == seq

    asyncio.run(scenario())


@pytest.mark.parametrize("reloaded", [False, True])
def test_what_is_sent_again_is_answered_with_the_recorded_decisions(reloaded):
    async def scenario():
        journal = MemoryJournal()
        engine, service = await opened(journal)
        await service.attach(attach_message(lag=0), ANYBODY)
        told = {}
        for first in range(0, 300, 3):  # more batches than are kept in memory
            told |= settings_by_step(await service.report(report_message(first, first + 2), ANYBODY))
        if reloaded:
            engine, service = await opened(journal)
        for first, last in ((297, 299), (295, 298), (200, 299), (4, 4)):
            seq = (await engine.find("r")).run.seq
            again = await service.report(report_message(first, last), ANYBODY)
            assert again.seq == seq
            assert again.changes[0][0] <= first
            for step in range(first, last + 1):
                assert in_force(again.changes, step) == in_force(sorted(told.items()), step)
        both = await service.report(report_message(298, 301), ANYBODY)
        assert in_force(both.changes, 298) == in_force(sorted(told.items()), 298)
        assert both.through == 301

    asyncio.run(scenario())


def in_force(changes, step):
    return [settings for decided, settings in changes if decided <= step][-1]


def test_after_a_rewind_the_decisions_of_the_line_left_behind_are_not_sent_again():
    async def scenario():
        journal = MemoryJournal()
        _engine, service = await opened(journal)
        await service.attach(attach_message(lag=0), ANYBODY)
        await service.report(report_message(0, 9), ANYBODY)
        await service.attach(attach_message("s2", lag=0, resume=True, from_step=5, from_attempt=1), ANYBODY)
        first = await service.report(report_message(5, 7, 2, "s2"), ANYBODY)
        again = await service.report(report_message(5, 7, 2, "s2"), ANYBODY)
        for step in (5, 6, 7):
            assert in_force(again.changes, step) == in_force(first.changes, step)
        steps = [step for step, _ in again.changes]
        assert steps == sorted(set(steps))

    asyncio.run(scenario())


def test_a_repeated_report_writes_nothing_whatever_it_holds():
    async def scenario():
        journal = MemoryJournal()
        _, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        settings_now = fold.Settings((0.1, 0.01), (0.9, None))
        receipt = records.Receipt(1, 0, -1, settings_now, False, "", 1)
        answer = records.DirectiveAnswered(1, "d1", "done", "")
        message = report_message(0, 3, receipts=(receipt,), answers=(answer,), end="finished")
        once = await service.report(message, ANYBODY)
        twice = await service.report(message, ANYBODY)
        assert twice == once
        assert len(list(journal.rows("r"))) == once.seq

    asyncio.run(scenario())


def test_a_receipt_that_could_not_be_read_back_does_not_keep_a_run_from_ending_or_going_back():
    """A learning rate on a device is not waited for, so its receipt may say NaN."""

    async def scenario():
        journal = MemoryJournal()
        _, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        receipt = records.Receipt(1, 0, -1, fold.Settings((float("nan"), 0.01)), False, "", 1)
        await service.report(report_message(0, 9, receipts=(receipt,)), ANYBODY)
        await service.attach(attach_message("s2", resume=True, from_step=5, from_attempt=1), ANYBODY)
        receipts = (receipt._replace(step=5),)
        await service.report(report_message(5, 9, 2, "s2", receipts=receipts, end="finished"), ANYBODY)
        assert journal.record("r").status == "finished"
        assert verify(journal, "r").problem == ""

    asyncio.run(scenario())


def test_runs_leave_memory_least_recently_used_first_and_come_back_equal(monkeypatch):
    monkeypatch.setattr(limits, "LIVE_RUNS_MAX", 3)

    async def scenario():
        journal = MemoryJournal()
        engine, service = await opened(journal)
        for i in range(6):
            await service.attach(attach_message(run=f"r{i}"), ANYBODY)
            await service.report(report_message(0, 9)._replace(run=f"r{i}"), ANYBODY)
            assert engine.live_runs <= 3
        for i in range(6):
            advice = await service.report(report_message(8, 19)._replace(run=f"r{i}"), ANYBODY)
            assert advice.through == 19
            assert verify(journal, f"r{i}").problem == ""

    asyncio.run(scenario())


def test_a_snapshot_saves_folding_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(limits, "SNAPSHOT_EVERY", 20)

    async def scenario():
        journal, engine, _ = await rewound()
        assert journal.snapshot("r").seq > 10
        engine, _service = await opened(journal)
        live = await engine.find("r")
        assert text(live.run) == text(folded(journal))
        for attempt, step in ((1, 70), (2, 64), (3, 45), (2, 40)):
            found = await engine.restored(live, attempt, step)
            monkeypatch.setattr(journal, "snapshot", lambda run, until=None: None)
            assert text(found) == text(await engine.restored(live, attempt, step))
            monkeypatch.undo()
            monkeypatch.setattr(limits, "SNAPSHOT_EVERY", 20)

    asyncio.run(scenario())


def test_after_a_rewind_snapshots_go_on(monkeypatch):
    monkeypatch.setattr(limits, "SNAPSHOT_EVERY", 20)

    async def scenario():
        journal = MemoryJournal()
        _, service = await opened(journal)
        await service.attach(attach_message(), ANYBODY)
        for first in range(0, 200, 10):
            await service.report(report_message(first, first + 9), ANYBODY)
        await service.attach(attach_message("s2", resume=True, from_step=10, from_attempt=1), ANYBODY)
        for first in range(10, 110, 10):
            await service.report(report_message(first, first + 9, 2, "s2"), ANYBODY)
        newest = journal.snapshot("r")
        assert newest.attempt == 2
        assert newest.step > 80

    asyncio.run(scenario())


def test_a_process_that_was_replaced_is_told_so():
    async def scenario():
        _, service = await opened(MemoryJournal())
        await service.attach(attach_message(), ANYBODY)
        with pytest.raises(Conflict, match="exists already"):
            await service.attach(attach_message("s2"), ANYBODY)
        again = await service.attach(attach_message("s1"), ANYBODY)
        assert again.attempt == 1
        await service.attach(attach_message("s2", resume=True), ANYBODY)
        with pytest.raises(Conflict, match="another process has taken the run over"):
            await service.report(report_message(0, 3), ANYBODY)

    asyncio.run(scenario())
