"""Goal: whatever happens to the link, every observation arrives once and in order, and every step gets the settings it
ought to have.

Method: the session is pure, so a test is the clock and the link; on the other side is the service's own fold, and what
ought to be decided is that fold undisturbed.
"""

import asyncio
import math
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.callers import ANYBODY

from flyball import limits, wire
from flyball.base import build
from flyball.session import Session
from flyball_server import messages, records
from flyball_server.core import rng, types
from flyball_server.core.errors import Conflict
from flyball_server.core.events import DirectiveAnswered, Observed, Receipt
from flyball_server.engine import Engine
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage.memory import MemoryJournal

GROUPS = (wire.Group("a", 0.1, 0.9), wire.Group("b", 0.01))
#: Every rise of the loss cuts: most steps have a learning rate of their own.
POLICY = {"type": "plateau", "patience": 0, "factor": 0.97, "threshold": 0.0}
FLAT = wire.Settings((0.1, 0.01))


def attach_message(lag=None, **fields):
    blank = wire.Attach(
        "default", "r", "s1", {}, GROUPS, POLICY, None, {}, "absolute", 0, lag, False, None, None, 0, "", "test"
    )
    return blank._replace(**fields)


def session_of(lag=None, on_outage="hold", base=None, now=0.0, **fields):
    built = None if base is None else build(base)
    return Session(attach_message(lag, base=base, **fields), base=built, on_outage=on_outage, now=now)


def attached(attempt=1, from_step=0, through=-1, receipts=0, at=FLAT):
    return wire.Attached(
        "r", attempt, from_step, through, receipts, 2, "d", "plateau@1", ((through, at),), "p", "c", "", (0.1, 0.01)
    )


def advice(through, changes=None, receipts=0, directives=()):
    changes = ((through, FLAT),) if changes is None else changes
    return wire.Advice(1, through, receipts, 3, "d", changes, "p", "c", "", directives)


def steering(lag=None, now=0.0, **options):
    session = session_of(lag, now=now, **options)
    session.on_attached(attached(), session.attach, now)
    return session


def observe(session, *steps, loss=1.0):
    return [session.observe(step, (loss, None, None, None)) for step in steps]


def loss_of(step):
    return None if step % 11 == 7 else math.nan if step % 17 == 16 else float((step * 7) % 13)


class TheService:
    """The real service, spoken to in the client's messages."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self.journal = MemoryJournal()
        clock = count(1_700_000_000_000_000)
        engine = Engine(self.journal, rules_of, lambda: next(clock))
        self._service = Service(engine, self.journal)
        self._run(engine.start())

    def _run(self, work):
        return self._loop.run_until_complete(work)

    def close(self):
        self._loop.close()

    def attach(self, message):
        groups = tuple(types.Group(*g) for g in message.groups)
        found = self._run(self._service.attach(messages.Attach(*message)._replace(groups=groups), ANYBODY))
        data = found._asdict()
        told = (*data.pop("earlier"), (data.pop("decided"), data.pop("settings")))
        changes = tuple((step, wire.Settings(*settings)) for step, settings in told)
        return wire.Attached(**data, changes=changes)

    def report(self, message):
        receipts = tuple(Receipt(*r)._replace(settings=types.Settings(*r.settings)) for r in message.receipts)
        answers = tuple(DirectiveAnswered(message.attempt, *a) for a in message.answers)
        told = messages.Report(*message)._replace(receipts=receipts, answers=answers)
        found = self._run(self._service.report(told, ANYBODY))
        changes = tuple((step, wire.Settings(*s)) for step, s in found.changes)
        return wire.Advice(**{**found._asdict(), "changes": changes, "directives": ()})

    def arrived(self):
        """The steps and losses in the journal, and the numbers of the receipts."""
        steps, losses, numbers, groups = [], [], [], tuple(types.Group(*g) for g in GROUPS)
        for row in self.journal.rows("r"):
            event, _ = records.from_row(row, groups)
            if isinstance(event, Observed):
                steps += event.steps
                losses += event.signals.get("loss", [None] * len(event.steps))
            elif row.kind == "applied":
                numbers += [r.number for r in event.receipts]
        return steps, losses, numbers


def decided(n):
    """The settings that each step's observation decides, from a service that nothing disturbs; [0] is the first."""
    service, session, out = TheService(), session_of(0), []
    first = service.attach(session.attach)
    out.append(first.changes[0][1])
    for step in range(n):
        report = wire.Report("r", "s1", 1, [step], {"loss": [loss_of(step)]}, (), (), "")
        out.append(service.report(report).changes[-1][1])
    service.close()
    return out


STEPS = 60
DECIDED = decided(STEPS)

acts = st.lists(
    st.sampled_from(
        ["train", "train", "train", "send", "send", "lose before", "lose after", "refuse", "wait", "attach"]
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(acts=acts, lag=st.sampled_from([None, 0, 1, 3]), batch=st.sampled_from([3, 1024]))
def test_every_observation_arrives_once_and_in_order_and_every_decision_at_its_step(acts, lag, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "BATCH_MAX", batch)
        service, session, now, step = TheService(), session_of(lag), 0.0, 0
        seen = []

        def attach():
            session.on_attached(service.attach(session.attach), session.attach, now)

        def send(report):
            told = service.report(report)
            session.on_advice(told, now)
            seen.append(told.through)

        def check():
            """The settings for the step to come are those that the lag asks for, or called late."""
            target = session.target(step)
            if session.attached is None or target is None:
                return
            assert target.settings in DECIDED
            if lag is None:
                return
            need = max(step - 1 - lag, -1)
            assert target.late == session.missing(step)
            if not target.late:
                assert target.settings == DECIDED[need + 1]
                assert target.decided <= need

        for act in acts:
            now += 0.06 if act != "wait" else 7.0
            check()
            if act == "train" and step < STEPS:
                session.receipt(step, step - 1, FLAT, False, "", 1)
                session.observe(step, (loss_of(step), None, None, None))
                step += 1
            elif act == "attach" and session.state != "steering":
                attach()
            elif act == "refuse" and session.state != "steering":
                session.on_lost("no connection", now)
            elif act == "wait":
                session.tick(now)
            elif act in ("send", "lose before", "lose after") and (report := session.report(now)) is not None:
                assert session.report(now) is None, "one report is in flight"
                if act == "lose before":
                    session.on_lost("reset", now)
                elif act == "lose after":
                    service.report(report)
                    session.on_lost("reset", now)
                else:
                    send(report)
        session.end("finished")
        if session.state != "steering":
            attach()
        for _ in range(200):
            now += 1.0
            if session.drained:
                break
            if (report := session.report(now)) is not None:
                send(report)
        assert session.drained
        steps, losses, numbers = service.arrived()
        assert steps == list(range(step))
        assert repr(losses) == repr([loss_of(s) for s in range(step)])
        assert numbers == list(range(1, step + 1))
        assert service.journal.record("r").status == "finished"
        assert seen == sorted(seen)
        check()
        service.close()


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("back", [0, 1, 3, 20, 33])
def test_a_job_that_resumes_with_a_lag_applies_what_it_would_have(lag, back):
    """The decisions that belong to its first steps were made before it was resumed."""
    service = TheService()

    def life(session, first, last):
        session.on_attached(service.attach(session.attach), session.attach, 0.0)
        used = []
        for step in range(first, last):
            assert not session.missing(step - first)
            used.append(session.target(step - first).settings)
            session.observe(step - first, (loss_of(step), None, None, None))
            session.hurry()
            session.on_advice(service.report(session.report(1.0)), 1.0)
        return used

    straight = life(session_of(lag), 0, 40)
    assert len(set(straight)) > 10
    for again in ("s2", "s3"):  # and again, from the same checkpoint
        resumed = session_of(lag, session=again, resume=True, from_step=back, from_attempt=1)
        assert life(resumed, back, 40) == straight[back:]
    after = session_of(lag, session="s4", resume=True)
    assert life(after, 40, 60) == [settings for _, settings in after_straight(lag)]
    service.close()


def after_straight(lag):
    """What steps 40 to 59 use where nobody interrupts: (step, settings)."""
    table = decided(60)
    return [(step, table[max(step - 1 - lag, -1) + 1]) for step in range(40, 60)]


# -- when a report leaves ----------------------------------------------------------------------------------------


def test_a_report_leaves_after_fifty_milliseconds_or_so_many_observations_or_at_once_when_urgent():
    many = limits.FLUSH_OBSERVATIONS
    session = steering(now=10.0)
    assert session.report(10.0) is None
    assert observe(session, *range(many - 1)) == [False] * (many - 1)
    assert session.report(10.0 + limits.FLUSH_INTERVAL_S - 0.001) is None
    assert observe(session, many - 1) == [True]
    assert list(session.report(10.0).steps) == list(range(many))
    session.on_advice(advice(many - 1), 10.01)
    observe(session, many)
    assert session.report(10.04) is None
    assert session.report(10.0 + limits.FLUSH_INTERVAL_S).steps == [many]
    session.on_advice(advice(many), 10.06)
    observe(session, many + 1)
    session.hurry()
    assert session.report(10.061).steps == [many + 1]
    session.on_advice(advice(many + 1), 10.07)
    assert session.report(10.2) is None, "nothing to say"


class OnItsWay:
    """A number that has not left its device."""

    def ready(self):
        return False

    def value(self):
        raise AssertionError("nobody may wait for it")


def test_the_link_sleeps_until_something_is_due_however_long_there_is_nothing():
    session = steering(now=10.0)
    observe(session, 0)
    assert session.pause(10.02) == pytest.approx(limits.FLUSH_INTERVAL_S - 0.02)
    assert session.report(10.05).steps == [0]
    session.on_advice(advice(0), 10.06)
    for now in (10.15, 10.2, 12.0):
        assert session.report(now) is None
        assert session.pause(now) == limits.FLUSH_INTERVAL_S, "a step may take minutes"
    session.observe(1, (OnItsWay(), None, None, None))
    assert session.report(12.1) is None
    assert session.pause(12.1) == limits.DEVICE_POLL_S


def test_with_a_lag_each_observation_leaves_at_once():
    session = steering(lag=2)
    assert observe(session, 0, 1) == [True, True]
    assert session.report(0.0).steps == [0, 1]


def test_what_piles_up_behind_a_report_in_flight_goes_as_one_batch(monkeypatch):
    monkeypatch.setattr(limits, "BATCH_MAX", 100)
    session = steering()
    observe(session, *range(70))
    assert len(session.report(1.0).steps) == 70
    observe(session, *range(70, 230))
    assert session.report(2.0) is None
    session.on_advice(advice(69), 2.0)
    assert list(session.report(2.0).steps) == list(range(70, 170))


def test_signals_travel_as_columns_with_gaps():
    session = steering()
    session.observe(3, (1.0, None, 0.5, None))
    session.observe(5, (math.nan, None, None, {"acc": 0.1}))
    report = session.report(1.0)
    assert report.steps == [3, 5]
    assert repr(report.signals) == repr({"loss": [1.0, math.nan], "grad_norm": [0.5, None], "acc": [None, 0.1]})


class Slow:
    def __init__(self, value):
        self._value, self.arrived = value, False

    def ready(self):
        return self.arrived

    def value(self):
        assert self.arrived
        return self._value


def test_a_loss_still_on_its_device_holds_back_itself_and_what_follows():
    session, slow = steering(), Slow(2.5)
    observe(session, 0)
    session.observe(1, (slow, None, None, None))
    observe(session, 2)
    session.end("finished")
    report = session.report(1.0)
    assert (report.steps, report.end) == ([0], "")
    session.on_advice(advice(0), 1.0)
    assert session.report(2.0) is None
    slow.arrived = True
    report = session.report(3.0)
    assert (report.steps, report.signals, report.end) == ([1, 2], {"loss": [2.5, 1.0]}, "finished")


def test_the_end_rides_in_the_last_report_and_is_sent_until_acknowledged(monkeypatch):
    monkeypatch.setattr(limits, "RECEIPTS_BATCH_MAX", 2)
    session = steering()
    for step in range(3):
        session.receipt(step, -1, FLAT, False, "", 1)
    session.end("failed")
    assert session.report(0.0).end == ""
    session.on_advice(advice(-1, receipts=2), 0.1)
    assert session.report(1.0).end == "failed"
    session.on_lost("reset", 1.0)
    assert not session.drained
    session.on_attached(attached(receipts=3), session.attach, 2.0)
    assert session.report(3.0).end == "failed"
    session.on_advice(advice(-1, receipts=3), 3.0)
    assert session.drained


# -- trouble -----------------------------------------------------------------------------------------------------


def test_the_buffers_are_bounded_oldest_first_and_every_loss_is_counted(monkeypatch):
    monkeypatch.setattr(limits, "BUFFER_MAX", 10)
    monkeypatch.setattr(limits, "RECEIPTS_MAX", 4)
    session = session_of()
    observe(session, *range(25))
    for step in range(6):
        session.receipt(step, -1, FLAT, False, "", 1)
    assert session.status(25, 0.0, **COUNTERS).waiting == 10
    assert session.status(25, 0.0, **COUNTERS).dropped == 15 + 2
    session.on_attached(attached(), session.attach, 1.0)
    report = session.report(2.0)
    assert report.steps == list(range(15, 25))
    assert [r.number for r in report.receipts] == [3, 4, 5, 6]
    observe(session, *range(25, 30))  # some of what is in flight is dropped meanwhile
    session.on_advice(advice(24, receipts=6), 2.0)
    assert session.report(3.0).steps == list(range(25, 30))


COUNTERS = {
    "added_us": 0.0, "waited_s": 0.0, "bad_values": 0, "skipped": 0, "missed": 0, "conflicts": 0,
}  # fmt: skip


def test_a_report_refused_as_invalid_is_dropped_and_the_next_one_goes():
    session = steering()
    observe(session, 0, 1)
    session.receipt(0, -1, FLAT, False, "", 1)
    session.report(1.0)
    session.on_rejected("signals: 'no!' is no signal name")
    told = session.status(2, 1.0, **COUNTERS)
    assert (told.waiting, told.dropped, told.state) == (0, 3, "steering")
    assert "no!" in told.last_error
    assert session.report(2.0) is None
    observe(session, 2)
    assert session.report(3.0).steps == [2]


def test_a_refused_report_that_only_answers_a_directive_is_not_sent_for_ever():
    session = steering()
    observe(session, 0)
    session.report(1.0)
    session.on_advice(advice(0, directives=(wire.Directive("d1", "checkpoint", {}),)), 1.0)
    assert [a.directive for a in session.report(2.0).answers] == ["d1"]
    session.on_rejected("answers: d1 is unknown")
    assert session.report(3.0) is None


def test_no_step_waits_for_a_decision_that_was_refused():
    """With wait_s=None such a wait would never end."""
    session = steering(lag=0)
    observe(session, 0)
    session.report(1.0)
    session.on_rejected("signals: 'no!' is no signal name")
    assert not session.missing(1)


@pytest.mark.parametrize("k", [0, 2])
def test_a_decision_that_has_not_come_is_late_and_the_circuit_opens_until_all_is_caught_up(monkeypatch, k):
    session = steering(lag=k)
    slow = wire.Settings((0.05, 0.005))
    observe(session, *range(k + 1))
    assert not session.missing(k)
    assert session.missing(k + 1)
    assert session.target(k + 1).late
    session.missed()
    assert not session.missing(k + 1), "with the circuit open no step waits"
    observe(session, k + 1)
    monkeypatch.setattr(limits, "BATCH_MAX", k + 1)
    assert list(session.report(1.0).steps) == list(range(k + 1))
    session.on_advice(advice(k, tuple((s, slow) for s in range(k + 1))), 1.0)
    assert session.circuit_open, "more is waiting"
    assert session.target(2 * k + 2) == (slow, k, True)
    assert list(session.report(2.0).steps) == [k + 1]
    session.on_advice(advice(k + 1, ((k + 1, FLAT),)), 2.0)
    assert not session.circuit_open
    assert session.target(2 * k + 2) == (FLAT, k + 1, False)
    assert not session.missing(2 * k + 2)


def test_an_outage_begins_at_once_where_nothing_ever_answered_and_after_a_while_where_something_did():
    session = session_of(on_outage="stop")
    assert not session.should_stop
    session.on_lost("refused", 0.1)
    assert session.should_stop
    session.on_attached(attached(), session.attach, 1.0)
    assert not session.should_stop
    session.on_lost("reset", 2.0)
    session.tick(2.0 + limits.OUTAGE_AFTER_S - 0.01)
    assert not session.outage
    session.on_lost("reset", 3.0)
    session.tick(2.0 + limits.OUTAGE_AFTER_S)
    assert session.outage
    assert session.status(0, 9.0, **COUNTERS).stale_s == 8.0


def test_an_answer_that_does_not_come_is_an_outage_too():
    session = steering()
    observe(session, 0)
    session.report(1.0)
    session.tick(1.0 + limits.OUTAGE_AFTER_S - 0.01)
    assert not session.outage
    session.tick(1.0 + limits.OUTAGE_AFTER_S)
    assert session.outage
    session.on_advice(advice(0), 9.0)
    assert not session.outage


def test_a_silent_job_is_no_outage():
    session = steering()
    session.tick(1e6)
    assert not session.outage


def test_while_the_service_is_away_the_settings_hold_or_follow_the_base():
    base = {"type": "linear", "start_factor": 1.0, "end_factor": 0.0, "total_iters": 100}
    for on_outage, wanted in (("hold", 0.0495), ("base", 0.025), ("stop", 0.0495)):
        session = session_of(on_outage=on_outage, base=base)
        session.on_attached(attached(), session.attach, 0.0)
        observe(session, 0)
        session.report(1.0)
        session.on_advice(advice(0, ((0, wire.Settings((0.0495, 0.00495))),)), 1.0)  # half of the base's 0.099
        session.on_lost("reset", 2.0)
        session.tick(9.0)
        assert session.target(50).settings.lr[0] == pytest.approx(wanted)


def test_a_session_that_was_replaced_or_refused_says_no_more():
    session = steering(lag=0)
    observe(session, 0)
    session.report(1.0)
    session.on_refused("conflict", "another process drives it", 1.0)
    assert session.state == "superseded"
    assert session.outage
    assert session.report(9.0) is None
    assert not session.missing(1)
    assert session.target(1).settings == FLAT
    fresh = session_of(lag=0)
    fresh.on_refused("conflict", "exists already", 0.0)
    assert (fresh.state, fresh.target(0), fresh.missing(0)) == ("refused", None, False)
    fresh.close()
    assert fresh.state == "refused", "why it ended stays to be read"


def test_settings_beyond_the_clients_own_bounds_never_reach_the_optimizer():
    session = steering(guard={"max_lr": 0.2, "groups": {"b": {"min_lr": 0.005}}})
    observe(session, 0, 1)
    session.report(1.0)
    session.on_advice(advice(0, ((0, wire.Settings((5.0, 0.001))),)), 1.0)
    assert session.target(1).settings == wire.Settings((0.2, 0.005))
    for lr in ((math.nan, 0.1), (-1.0, 0.1), (math.inf, 0.1), (0.1,)):
        session.on_advice(advice(1, ((1, wire.Settings(lr)),)), 1.0)
        assert session.target(2).settings == wire.Settings((0.2, 0.005))


RECORDED = {"max_lr": 0.05, "groups": {"b": {"min_lr": 0.02}}}


@pytest.mark.parametrize("lag", [None, 0])
def test_the_runs_recorded_limits_hold_here_too(lag):
    session = session_of(lag, guard={"max_lr": 0.2})
    session.on_attached(attached()._replace(guard=RECORDED), session.attach, 0.0)
    assert session.target(0).settings == wire.Settings((0.05, 0.02))
    observe(session, 0)
    session.report(1.0)
    session.on_advice(advice(0, ((0, wire.Settings((5.0, 5.0))),)), 1.0)
    assert session.target(1).settings == wire.Settings((0.05, 0.05))
    assert session.last_error == ""


def test_what_was_learnt_before_the_limits_were_known_is_held_inside_them():
    session = steering(lag=0)
    assert session.target(0).settings == FLAT
    session.on_lost("reset", 1.0)
    session.on_attached(attached()._replace(guard=RECORDED), session.attach, 2.0)
    assert session.target(0).settings == session.target(9).settings == wire.Settings((0.05, 0.02))


def test_limits_by_factor_are_multiples_of_the_recorded_reference():
    """A resumed job may come with the learning rates of its checkpoint."""
    session = session_of(guard={"max_factor": 2.0})
    recorded = attached(at=wire.Settings((9.0, 9.0)))._replace(guard={"max_factor": 3.0}, reference=(1.0, 0.5))
    session.on_attached(recorded, session.attach, 0.0)
    assert session.target(0).settings.lr == (3.0, 1.5)
    assert session.reference == (1.0, 0.5)


UNREADABLE = [{"max_lr": "0.1"}, {"groups": [1]}, {"max_lr": 10**400}, "{no json", [1], 5]


@pytest.mark.parametrize("guard", UNREADABLE, ids=lambda guard: str(guard)[:20])
def test_limits_that_cannot_be_read_leave_the_jobs_own_in_force_and_are_named(guard):
    session = session_of(guard={"max_lr": 0.06})
    session.on_attached(attached()._replace(guard=guard), session.attach, 0.0)
    assert session.target(0).settings == wire.Settings((0.06, 0.01))
    assert "guard" in session.last_error
    observe(session, 0)
    session.report(1.0)
    session.on_advice(advice(0), 1.0)
    assert "guard" in session.last_error, "as long as it is so"
    assert session.target(1).settings == wire.Settings((0.06, 0.01))


@pytest.mark.parametrize("reference", [(), (math.nan, 0.1), (-1.0, 0.1), ("x", 0.1)])
def test_a_reference_that_makes_no_sense_is_left_aside(reference):
    session = session_of()
    session.on_attached(attached()._replace(reference=reference), session.attach, 0.0)
    assert session.reference == (0.1, 0.01)


def test_an_answer_of_an_older_service_leaves_the_jobs_own_limits_in_force():
    session = session_of(guard={"max_lr": 0.06})
    session.on_attached(attached(), session.attach, 0.0)
    assert session.target(0).settings == wire.Settings((0.06, 0.01))
    assert session.last_error == ""


def test_the_seed_of_gradient_noise_counts_the_runs_own_steps_under_the_runs_own_seed():
    session = session_of(seed=5)
    session.on_attached(attached()._replace(seed=7), session.attach, 0.0)
    assert [session.noise_seed(step) for step in (0, 3)] == [rng.u64(7, 0x300, step) >> 1 for step in (0, 3)]
    session.reattach("s2", 1, 3, 0, "")
    assert session.noise_seed(0) == rng.u64(7, 0x300, 3) >> 1


def test_a_checkpoint_goes_on_in_a_new_attempt_without_the_steps_behind_it():
    service, session = TheService(), session_of(0)
    session.on_attached(service.attach(session.attach), session.attach, 0.0)
    for step in range(10):
        session.observe(step, (loss_of(step), None, None, None))
        if step < 8:
            session.on_advice(service.report(session.report(step)), step)
    token = session.token(5)
    assert (token["run"], token["attempt"], token["step"], token["policy"]) == ("r", 1, 5, "plateau@1")
    session.reattach("s2", token["attempt"], token["step"], token["seq"], token["digest"])
    assert session.report(20.0) is None
    assert session.missing(0)  # the job counts anew from the checkpoint
    session.on_attached(service.attach(session.attach), session.attach, 21.0)
    assert session.attached.attempt == 2
    assert session.target(0) == (DECIDED[5], 4, False)
    session.observe(0, (loss_of(5), None, None, None))
    session.on_advice(service.report(session.report(22.0)), 22.0)
    assert session.target(1).settings == DECIDED[6]
    with pytest.raises(Conflict):
        service.report(wire.Report("r", "s1", 1, [10], {}, (), (), ""))
    service.close()


def test_going_back_again_before_the_first_time_was_answered_keeps_what_was_not_acknowledged():
    service, session = TheService(), session_of()
    session.on_attached(service.attach(session.attach), session.attach, 0.0)
    observe(session, *range(10))
    session.reattach("s2", 1, 8, 0, "")
    observe(session, 0, 1)
    session.reattach("s3", 1, 6, 0, "")
    session.on_attached(service.attach(session.attach), session.attach, 1.0)
    session.hurry()
    session.on_advice(service.report(session.report(2.0)), 2.0)
    assert service.arrived()[0] == [0, 1, 2, 3, 4, 5]
    assert session.status(0, 2.0, **COUNTERS).dropped == 6
    service.close()


def test_what_was_observed_before_a_resumed_job_knew_its_place_is_counted_when_it_is_dropped():
    session = session_of(resume=True)
    observe(session, 0, 1, 2)
    session.receipt(0, None, FLAT, False, "", 1)
    session.reattach("s2", 1, 8, 0, "")
    assert session.drained
    assert session.status(0, 2.0, **COUNTERS).dropped == 4


def test_a_checkpoint_of_another_line_takes_no_observation_of_this_one():
    session = session_of()
    session.on_attached(attached(), session.attach, 0.0)
    session.reattach("s2", 1, 20, 0, "")
    session.on_attached(attached(2, 20, 19), session.attach, 1.0)
    observe(session, 0, 1, 2)
    session.reattach("s3", 1, 30, 0, "")
    assert session.drained
    assert (session.attach.from_attempt, session.attach.from_step) == (1, 30)


def test_going_back_further_keeps_what_only_arrived_after_the_first_time():
    service, session = TheService(), session_of()
    session.on_attached(service.attach(session.attach), session.attach, 0.0)
    observe(session, *range(10))
    session.reattach("s2", 1, 8, 0, "")
    session.on_attached(service.attach(session.attach), session.attach, 1.0)
    session.hurry()
    session.on_advice(service.report(session.report(2.0)), 2.0)
    session.reattach("s3", 1, 5, 0, "")
    answer = service.attach(session.attach)
    assert (answer.attempt, answer.through) == (3, 4)
    assert answer.changes[0][1] == DECIDED[5], "steps 0 to 4 arrived under the second attempt, and count"
    service.close()
