"""Goal: what the service asks of a job is done by the thread that trains, once, and never hurts the training.

Method: a real optimizer, governor and link thread; the other side is a service of a few lines that says what a test
tells it to, so that a test knows what was sent and when.
"""

import logging
import threading
import time

import pytest
import torch

from flyball import Declined, directives, limits, wire
from flyball.adapters.torch_groups import Groups
from flyball.governor import Governor
from flyball.link import Link
from flyball.session import Session


class Service:
    """Speaks as a transport does, for ever; `say` is put into the next answer."""

    def __init__(self):
        self.reports, self.attempts, self.say, self.kept, self.gate = [], 0, {}, {}, threading.Event()
        self.gate.set()
        self.through, self.receipts, self.lr = -1, 0, 0.1
        self.arrived = threading.Condition()

    def attach(self, message):
        begin = 0 if message.from_step is None else message.from_step
        if self.attempts == 0 or message.resume:
            self.attempts += 1
            self.through, self.receipts = begin - 1, 0
        changes = ((self.through, wire.Settings((self.lr,))),)
        return wire.Attached(
            "r", self.attempts, begin, self.through, self.receipts, 1, "d", "constant@1", changes, "", "", "", (0.1,)
        )

    def report(self, message):
        self.gate.wait(10)
        if message.steps:
            self.through = message.steps[-1]
        if message.receipts:
            self.receipts = message.receipts[-1].number
        said, self.say = {**self.kept, **self.say}, {}
        with self.arrived:
            self.reports.append(message)
            self.arrived.notify_all()
        changes = ((self.through, wire.Settings((self.lr,))),)
        blank = wire.Advice(message.attempt, self.through, self.receipts, 1, "d", changes, "", "", "", ())
        return blank._replace(**said)

    def close(self):
        pass

    def wait(self, done, within_s=5.0):
        """Until `done()`; also what the session makes of an answer, which comes a moment later."""
        until = time.monotonic() + within_s
        while not done():
            assert time.monotonic() < until, self.reports[-5:]
            with self.arrived:
                self.arrived.wait(0.005)

    @property
    def answers(self):
        return [answer for report in list(self.reports) for answer in report.answers]

    @property
    def receipts_seen(self):
        return [receipt for report in list(self.reports) for receipt in report.receipts]


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def job(service):
    """A governor, and what trains one step."""
    opened = []

    def start(lag=None, on_outage="hold"):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        groups = (wire.Group("default", 0.1),)
        attach = wire.Attach(
            "default", "r", "s1", {}, groups, {}, None, {}, "absolute", 0, lag, False, None, None, 0, "", "test"
        )
        session = Session(attach, base=None, on_outage=on_outage, now=time.monotonic())
        link = Link(session, lambda: service)
        link.start()
        assert link.wait(lambda: session.attached is not None, 5.0, "the answer")
        steered = Groups(optimizer, groups, False)
        governor = Governor(steered, session, link, wait_s=1.0, close_s=2.0)
        steered.steer(governor.before_step, governor.after_step)
        opened.append(governor)

        def train(n=1):
            for _ in range(n):
                optimizer.step()
                governor.step(1.0)

        train.governor = governor
        return governor, train

    yield start
    for governor in opened:
        governor.close("")


def heard(service, train, **say):
    """Train a step, and have its answer say this."""
    session = train.governor._session
    service.wait(lambda: session.drained)
    service.say, before = say, service.through
    train()
    service.wait(lambda: service.through > before and not service.say and session.drained)
    with session._lock:  # the whole answer was taken in
        pass


def ask(kind, **args):
    return (wire.Directive("c1", kind, args),)


def test_a_handler_runs_on_the_training_thread_behind_the_observation_and_its_note_is_told(service, job):
    governor, train = job()
    seen = []

    def save(args):
        seen.append((threading.current_thread(), dict(args), governor.status.step))
        return "saved to b.pt"

    governor.on("checkpoint", save)
    train(3)
    heard(service, train, directives=ask("checkpoint", name="b"))
    assert seen == []
    train()
    assert seen == [(threading.main_thread(), {"name": "b"}, 5)]
    service.wait(lambda: service.answers)
    assert service.answers == [wire.Answer("c1", "done", "saved to b.pt", 5)]


def test_a_handler_that_fails_declines_and_training_goes_on(service, job, caplog):
    governor, train = job()

    def broken(args):
        raise OSError("disk full")

    governor.on("evaluate", broken)
    heard(service, train, directives=ask("evaluate"))
    with caplog.at_level(logging.WARNING, "flyball"):
        train(2)
    service.wait(lambda: service.answers)
    assert service.answers[0][1:3] == ("declined", "OSError: disk full")
    assert "evaluate was declined" in caplog.text


def test_handlers_are_given_as_decorators_and_decline_in_words_of_their_own(service, job, caplog):
    governor, train = job()
    done = []
    for kind in directives.KINDS:
        assert getattr(governor, f"on_{kind}")(done.append) == done.append

    @governor.on_evaluate
    def busy(args):
        raise Declined(f"no time for {args['what']}")

    assert callable(busy)
    heard(service, train, directives=ask("evaluate", what="this"))
    with caplog.at_level(logging.WARNING, "flyball"):
        train(2)
    service.wait(lambda: service.answers)
    assert service.answers[0][1:3] == ("declined", "no time for this")
    (record,) = [one for one in caplog.records if "was declined" in one.message]
    assert record.exc_info is None
    heard(service, train, directives=(wire.Directive("c2", "stop", {}),))
    train()
    assert done == [{}]
    assert not governor.should_stop


def test_what_is_due_is_done_behind_every_so_many_steps_and_counted_anew_after_going_back(service, job, caplog):
    governor, train = job()
    done = []
    governor.every(3, lambda: done.append(governor.status.step))
    governor.every(4, lambda: 1 / 0)
    with caplog.at_level(logging.WARNING, "flyball"):
        train(7)
    assert done == [3, 6]
    assert "what is due every 4 steps failed: division by zero" in caplog.text
    token = governor.state_dict()
    governor.on_restore(lambda _: governor.load_state_dict(token))
    heard(service, train, directives=ask("restore"))
    train()  # goes back to step 7
    done.clear()
    train(3)
    assert done == [10]


def test_a_slow_handler_is_neither_an_outage_nor_time_that_steering_costs(service, job, monkeypatch):
    monkeypatch.setattr(limits, "OUTAGE_AFTER_S", 0.2)
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.05)
    governor, train = job(on_outage="stop")
    governor.on("checkpoint", lambda _: time.sleep(0.6))
    heard(service, train, directives=ask("checkpoint"))
    before = len(service.reports)
    train()
    assert len(service.reports) - before >= 4, "heartbeats go on meanwhile"
    train(3)
    told = governor.status
    assert (told.outage, told.should_stop, told.state) == (False, False, "steering")
    assert told.added_us < 50_000


def test_a_stop_without_a_handler_sets_should_stop_and_says_why(service, job, caplog):
    governor, train = job()
    with caplog.at_level(logging.WARNING, "flyball"):
        heard(service, train, directives=ask("stop", reason="loss is flat"))
        train()
        service.wait(lambda: service.answers)
    assert governor.should_stop
    assert governor.status.should_stop
    assert "loss is flat" in governor.status.stop_reason
    assert "loss is flat" in caplog.text
    assert service.answers[0].outcome == "done"


def test_a_stop_with_a_handler_is_the_handlers_to_decide(service, job):
    governor, train = job()
    governor.on("stop", lambda args: f"in {args['grace_s']} s")
    heard(service, train, directives=ask("stop", grace_s=30))
    train()
    service.wait(lambda: service.answers)
    assert not governor.should_stop
    assert service.answers[0].note == "in 30 s"


def test_a_handler_may_go_back_to_a_checkpoint_and_its_answer_arrives_in_the_new_attempt(service, job):
    governor, train = job()
    train(3)
    token = governor.state_dict()
    train(3)
    governor.on("restore", lambda _: governor.load_state_dict(token))
    heard(service, train, directives=ask("restore"))
    train()
    assert governor.status.step == 3
    service.wait(lambda: service.answers)
    report = next(report for report in service.reports if report.answers)
    assert report.attempt == 2
    assert report.answers == (wire.Answer("c1", "done", "", 3),)
    train(2)
    governor.close("")
    assert [list(r.steps) for r in service.reports if r.attempt == 2 and r.steps][-1][-1] == 4


def test_a_directive_between_optimizer_steps_waits_for_the_next_one(service, job):
    governor, train = job()
    calls = []
    governor.on("evaluate", calls.append)
    heard(service, train, directives=ask("evaluate"))
    governor.step(1.0)  # a micro-batch
    assert calls == []
    train()
    assert len(calls) == 1


@pytest.mark.parametrize(("kind", "handler", "error"), [("dance", print, ValueError), ("stop", "print", TypeError)])
def test_a_senseless_handler_is_refused_when_it_is_given(job, kind, handler, error):
    governor, _ = job()
    with pytest.raises(error, match="give"):
        governor.on(kind, handler)


@pytest.mark.parametrize("lag", [None, 0])
def test_a_command_is_confirmed_at_once_though_nothing_changed(service, job, lag):
    _, train = job(lag)
    train()
    heard(service, train, confirm=8)
    train()
    service.wait(lambda: any(r.confirms == 8 for r in service.receipts_seen))
    confirming = [r for r in service.receipts_seen if r.confirms]
    assert [(r.step, r.settings.lr) for r in confirming] == [(2, (0.1,))]
    train(5)
    assert len([r for r in service.receipts_seen if r.confirms]) == 1


def test_notices_are_in_the_jobs_log_once(service, job, caplog):
    _, train = job()
    service.kept = {"notices": ("override c17 by alice: too hot",)}
    with caplog.at_level(logging.INFO, "flyball"):
        for _ in range(4):
            heard(service, train)
    assert [r.getMessage() for r in caplog.records] == ["flyball: override c17 by alice: too hot"]


def test_a_control_changes_between_steps_and_the_step_from_which_it_holds_is_told(service, job):
    governor, train = job()
    kl = governor.control("kl_coef", 0.1, min=0, max=1)
    service.wait(lambda: any(report.controls for report in service.reports))
    train(2)
    service.kept = {"controls": {"kl_coef": 0.5}, "confirm": 9}
    heard(service, train)
    assert kl.value == 0.5
    train(3)
    service.wait(lambda: any(r.controls == {"kl_coef": 0.5} for r in service.receipts_seen))
    told = [(r.step, dict(r.controls), r.confirms) for r in service.receipts_seen if r.controls]
    at_first = next(entry for entry in told if entry[1] == {"kl_coef": 0.5})
    assert told[-1] == at_first, "once"
    assert at_first[2] == 9, "and no earlier step confirms the command"
    assert all(confirms == 0 for _, _, confirms in told[:-1])


def test_reading_a_control_is_safe_from_any_thread_while_it_changes(service, job):
    governor, train = job()
    kl = governor.control("kl_coef", 0.0, min=0, max=1)
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            if kl.value not in (0.0, 0.25, 0.5):
                wrong.append(kl.value)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(20):
        heard(service, train, controls={"kl_coef": (0.25, 0.5)[i % 2]})
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
