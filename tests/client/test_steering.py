"""Goal: what people ask of a run reaches the job once and at its step, and what became of it comes back at once.

Method: as in test_session: the session is pure, so a test is the clock and the link.
"""

import math

import pytest

from flyball import limits, wire
from flyball.session import Session

FLAT = wire.Settings((0.1, 0.01))
HALF = wire.Settings((0.05, 0.005))


def attach_message(lag=None, **fields):
    blank = wire.Attach(
        "default", "r", "s1", {}, (wire.Group("a", 0.1, 0.9), wire.Group("b", 0.01)), {"type": "constant"}, None, {},
        "absolute", 0, lag, False, None, None, 0, "", "test",
    )  # fmt: skip
    return blank._replace(**fields)


def attached(attempt=1, from_step=0, through=-1, **fields):
    blank = wire.Attached(
        "r", attempt, from_step, through, 0, 2, "d", "constant@1", ((through, FLAT),), "p", "c", "", (0.1, 0.01)
    )
    return blank._replace(**fields)


def advice(through, *changes, **fields):
    changes = changes or ((through, FLAT),)
    return wire.Advice(1, through, 0, 3, "d", changes, "p", "c", "", ())._replace(**fields)


class Job:
    """A training loop of one step at a time, its session, and a clock."""

    def __init__(self, lag=None, attach=None, **fields):
        self.now = 0.0
        self.session = Session(attach_message(lag, **fields), base=None, on_outage="hold", now=0.0)
        self.session.on_attached(attach or attached(), self.session.attach, 0.0)
        self.step = 0

    def train(self, n=1):
        """What each step was asked to confirm."""
        asked = []
        for _ in range(n):
            asked.append(self.session.to_confirm(self.step))
            if asked[-1]:
                target = self.session.target(self.step)
                self.session.receipt(self.step, target.decided, target.settings, False, "", 1, confirms=asked[-1])
            self.session.observe(self.step, (1.0, None, None, None))
            self.step += 1
        return asked

    def send(self, after=0.1):
        self.now += after
        return self.session.report(self.now)

    def hear(self, *changes, through=None, **fields):
        """Send what there is, and hear this."""
        report = self.send()
        last = report.steps[-1] if report.steps else self.step - 1
        self.session.on_advice(advice(last if through is None else through, *changes, **fields), self.now)
        return report


# -- commands ----------------------------------------------------------------------------------------------------


def test_without_a_lag_the_very_next_step_confirms_once_and_at_once():
    job = Job()
    job.train(3)
    job.hear(confirm=7)
    assert job.train(3) == [7, 0, 0]
    report = job.send(after=0.0)
    assert [(r.step, r.confirms) for r in report.receipts] == [(3, 7)], "it leaves without waiting for the interval"
    job.session.on_advice(advice(5, confirm=7, receipts_through=1), job.now)
    assert job.train(2) == [0, 0], "the service may say it again"
    job.session.receipt(job.step, 4, HALF, False, "", 1)
    assert job.send().receipts[-1].confirms == 7, "later receipts are under the command as well"


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_with_a_lag_the_first_step_whose_decision_was_made_under_the_command_confirms(lag):
    job = Job(lag)
    job.train(2)
    job.hear()  # 0 and 1 are known
    job.train(2)
    job.hear((2, HALF), confirm=9)  # 2 and 3 came to the journal behind the command
    asked = job.train(lag + 2)
    first = 4 + asked.index(9) if 9 in asked else None
    assert first == max(4, 2 + 1 + lag)
    assert [s for s in asked if s] == [9]


def test_with_a_lag_an_answer_that_acknowledges_nothing_new_is_confirmed_by_a_later_decision():
    for heard in ("heartbeat", "attach"):
        job = Job(0)
        job.train(3)
        job.hear()
        if heard == "heartbeat":
            assert job.send(after=limits.HEARTBEAT_S) == wire.Report("r", "s1", 1, [], {}, (), (), "")
            job.session.on_advice(advice(2, (2, HALF), confirm=9), job.now)
        else:
            job.session.on_lost("reset", job.now)
            job.session.on_attached(attached(through=2, confirm=9), job.session.attach, job.now)
        assert job.session.target(3).settings == FLAT, "what was decided and told stays what it was"
        assert job.train() == [0]
        job.hear((3, HALF), confirm=9)
        assert job.train() == [9]
        assert job.session.target(4).settings == HALF


def test_many_commands_are_confirmed_with_the_newest_step_by_step():
    job = Job(2)
    seen = []
    for number in range(1, 300):
        job.train()
        job.hear(confirm=number)
        seen += [asked for asked in [job.session.to_confirm(job.step)] if asked]
    assert seen == list(range(1, 298)), "one after the other, with the lag"


def test_a_reconnect_confirms_nothing_twice_and_an_attempt_that_goes_back_begins_anew():
    job = Job()
    job.train()
    job.hear(confirm=7)
    assert job.train() == [7]
    job.session.on_lost("reset", job.now)
    job.session.on_attached(attached(through=0, confirm=7), job.session.attach, job.now)
    assert job.train() == [0]
    assert [r.confirms for r in job.send().receipts] == [7], "the receipt itself is sent until it is acknowledged"
    job.session.reattach("s2", 1, 0, 0, "")
    job.step = 0
    assert job.train() == [0]
    job.session.on_attached(attached(2, confirm=5), job.session.attach, job.now)
    assert job.train(2) == [5, 0], "journal row 5 is not above 7, but it is what this attempt is asked for"


def test_notices_are_given_out_once_each_and_as_one_bounded_line(monkeypatch):
    monkeypatch.setattr(limits, "NOTICES_MAX", 4)
    job = Job()
    job.train()
    job.hear(notices=("override c17 by alice: too hot", "a\nb" + "x" * 9999))
    told = job.session.notices()
    assert told[0] == "override c17 by alice: too hot"
    assert told[1].startswith("a b")
    assert len(told[1]) == limits.NOTE_CHARS
    for i in range(50):
        job.train()
        job.hear(notices=(f"n{i}", f"n{i}"))
    assert job.session.notices() == ["n46", "n47", "n48", "n49"]
    assert len(job.session._notices._seen) == 4


# -- limits ------------------------------------------------------------------------------------------------------


def test_limits_that_a_command_changed_replace_the_jobs_own_narrower_and_wider():
    job = Job(guard={"max_lr": 0.2})
    job.train()
    job.hear((0, wire.Settings((5.0, 5.0))))
    assert job.session.target(1).settings == wire.Settings((0.2, 0.2))
    job.train()
    job.hear((1, wire.Settings((5.0, 5.0))), guard={"max_lr": 0.15})
    assert job.session.target(2).settings == wire.Settings((0.15, 0.15))
    job.train()
    job.hear((2, wire.Settings((5.0, 5.0))), guard={"max_lr": 1.0, "groups": {"b": {"max_lr": 0.5}}})
    assert job.session.target(3).settings == wire.Settings((1.0, 0.5)), "what was told counts, not what was kept of it"
    assert job.session.bounds == ((0.0, 1.0), (0.0, 0.5))
    job.train()
    job.hear(guard="{no")
    assert "guard" in job.session.last_error
    assert job.session.bounds == ((0.0, 1.0), (0.0, 0.5))


def test_with_a_lag_new_limits_leave_what_was_told_before_as_it_was():
    job = Job(3)
    for step in range(4):
        job.train()
        job.hear((step, wire.Settings((0.1 * (step + 1), 0.01))))
    job.train()
    job.hear((4, wire.Settings((0.05, 0.01))), guard={"max_lr": 0.05})
    used = []
    for _ in range(4):
        used.append(job.session.target(job.step).settings.lr[0])
        job.train()
        job.hear((job.step - 1, wire.Settings((0.9, 0.01))))
    assert used == [0.2, pytest.approx(0.3), 0.4, 0.05]
    assert job.session.target(job.step).settings.lr[0] == 0.05, "0.9 is beyond them"


# -- directives --------------------------------------------------------------------------------------------------


def asks(*kinds, first=0, **args):
    return tuple(wire.Directive(f"c{first + i}", kind, args) for i, kind in enumerate(kinds))


def test_what_nobody_handles_is_declined_at_once_and_a_stop_is_taken_note_of():
    job = Job()
    job.train(3)
    job.hear(directives=asks("checkpoint", "restore", "rewind", "evaluate", "dance", "stop", reason="diverged"))
    told = {a.directive: (a.outcome, a.step) for a in job.send().answers}
    assert told == {f"c{i}": ("declined", 3) for i in range(5)} | {"c5": ("done", 3)}
    assert job.session.should_stop
    assert "diverged" in job.session.stop_reason
    declined, stop = [line for line in job.session.notices() if "declined" in line], job.session.stop_reason
    assert len(declined) == len(set(declined))
    assert stop in job.session.directives.lines


def test_a_directive_is_carried_out_once_however_often_it_is_asked_and_its_answer_is_kept():
    job = Job()
    job.session.directives.handle("checkpoint")
    asked = asks("checkpoint")
    job.train()
    job.hear(directives=asked)
    job.train()
    job.hear(directives=asked)
    assert job.session.directive().id == "c0"
    assert job.session.directive() is None
    job.train()
    job.hear(directives=asked)
    assert job.session.directive() is None, "it is being carried out"
    job.session.answer("c0", "done", "saved", job.step)
    report = job.send(after=0.0)
    assert report.answers == (wire.Answer("c0", "done", "saved", 3),), "it leaves at once"
    job.session.on_lost("reset", job.now)
    job.session.reattach("s2", 1, 2, 0, "")
    job.session.on_attached(attached(2, 2, 1), job.session.attach, job.now)
    assert job.send().answers == report.answers, "also in another attempt"
    job.session.on_advice(advice(1, directives=asked), job.now)
    assert job.send().answers == report.answers, "the service asks again: it is told again, and nothing is done again"
    job.session.on_advice(advice(1), job.now)
    assert not job.session.directives.unanswered
    assert job.session.directive() is None


def test_an_answer_that_the_service_refuses_is_not_told_for_ever():
    job = Job()
    job.train()
    job.hear(directives=asks("evaluate"))
    sent = 0
    for _ in range(20):
        job.train()
        sent += bool(job.send().answers)
        job.session.on_rejected("answers: c0 is unknown")
        job.train()
        job.hear(directives=asks("evaluate"))
    assert 1 <= sent <= 1 + limits.ANSWERS_AGAIN


def test_directives_are_bounded_and_senseless_ones_declined():
    job = Job()
    job.session.directives.handle("evaluate")
    job.train()
    job.hear(directives=(wire.Directive("odd", "evaluate", "[1"), *asks(*["evaluate"] * 1000)))
    answers = job.send().answers
    assert {a.outcome for a in answers} == {"declined"}
    assert "no mapping" in answers[0].note
    assert len(job.session.directives.pending) == limits.DIRECTIVES_PENDING_MAX
    assert len(job.session.directives._seen) <= limits.DIRECTIVES_MAX


# -- controls ----------------------------------------------------------------------------------------------------


def test_a_control_is_what_the_service_says_inside_its_declared_bounds():
    job = Job()
    kl = job.session.control("kl_coef", 0.1, 0, 1)
    assert (kl.name, kl.value, float(kl)) == ("kl_coef", 0.1, 0.1)
    report = job.send(after=0.0)
    assert report.controls == (wire.Control("kl_coef", 0.1, 0.0, 1.0),)
    job.session.on_advice(advice(-1, controls={"kl_coef": 0.4, "other": 3.0}), job.now)
    assert kl.value == 0.4
    assert job.session.controls.values == {"kl_coef": 0.4}
    for said, value in ((7.0, 1.0), (-7, 0.0), (math.nan, 0.0), (math.inf, 0.0), ("0.5", 0.0), (10**400, 0.0)):
        job.train()
        job.hear(controls={"kl_coef": said})
        assert kl.value == value
    job.session.on_lost("gone", job.now)
    job.session.tick(job.now + 99)
    assert kl.value == 0.0, "the last one holds"


def test_controls_are_declared_by_themselves_and_again_to_whoever_answers_next():
    job = Job()
    job.train()
    job.session.control("a", 1.0, 0.0, 2.0)
    job.session.control("b", 2.0, 0.0, 2.0)
    report = job.send()
    assert ([c.name for c in report.controls], list(report.steps)) == (["a", "b"], [])
    assert job.session.controls.values == {}, "nothing is told of what the service does not know yet"
    job.session.on_advice(advice(-1, controls={"a": 0.5, "b": 2.0}), job.now)
    assert job.session.controls.values == {"a": 0.5, "b": 2.0}
    assert job.send().steps == [0]
    job.session.on_lost("reset", job.now)
    job.session.on_attached(attached(controls={"a": 0.7}), job.session.attach, job.now)
    assert [c.name for c in job.send().controls] == ["a", "b"]
    assert job.session.control("a", 1.0, 0.0, 2.0).value == 0.7
    job.session.reattach("s2", 1, 0, 0, "")
    job.session.on_attached(attached(2, controls={"b": 1.5}), job.session.attach, job.now)
    assert [job.session.control(n, v, 0.0, 2.0).value for n, v in (("a", 1.0), ("b", 2.0))] == [1.0, 1.5]


def test_a_declaration_that_is_refused_takes_nothing_with_it_and_is_not_repeated():
    job = Job()
    job.train()
    control = job.session.control("a", 1.0, 0.0, 2.0)
    assert job.send().controls
    job.session.on_rejected("controls: too many")
    assert job.send().steps == [0]
    job.session.on_lost("reset", job.now)
    job.session.on_attached(attached(), job.session.attach, job.now)
    assert job.send().controls == ()
    assert (control.value, job.session.controls.values) == (1.0, {})


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("9x", 1, 0, 2), ("", 1, 0, 2), ("a b", 1, 0, 2), ("x" * 129, 1, 0, 2), ("lr", 1, 0, 2), (3, 1, 0, 2),
        ("a", 3, 0, 2), ("a", 1, 2, 0), ("a", math.nan, 0, 2), ("a", 1, -math.inf, 2), ("a", 1, 0, 10**400),
        ("a", "1", 0, 2), ("a", True, 0, 2), ("a", 1, None, 2), ("known", 1, 0, 3),
    ],
)  # fmt: skip
def test_a_control_that_makes_no_sense_is_refused_by_name(name, value, low, high):
    job = Job()
    job.session.control("known", 1, 0, 2)
    with pytest.raises(ValueError, match=r"control .*give"):
        job.session.control(name, value, low, high)


def test_a_run_has_a_bounded_number_of_controls():
    job = Job()
    for i in range(limits.CONTROLS_MAX):
        job.session.control(f"c{i}", 0, 0, 1)
    with pytest.raises(ValueError, match="at most 32"):
        job.session.control("more", 0, 0, 1)
    assert job.session.control("c0", 0, 0, 1).name == "c0"


# -- heartbeats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [None, 1])
def test_an_idle_job_is_heard_of_now_and_then_and_hears_what_is_new(lag):
    job = Job(lag)
    job.train()
    job.hear()
    assert job.send(after=limits.HEARTBEAT_S - 0.2) is None
    beat = job.send(after=0.2)
    assert beat == wire.Report("r", "s1", 1, [], {}, (), (), "")
    assert job.send(after=99.0) is None, "they do not pile up"
    job.session.on_advice(advice(0, (0, HALF), notices=("n",), directives=asks("stop")), job.now)
    assert job.session.notices()[0] == "n"
    assert job.session.should_stop
    assert job.session.target(1).settings == (HALF if lag is None else FLAT)


def test_a_heartbeat_that_is_not_answered_is_no_outage_until_something_waits_behind_it():
    job = Job(0)
    job.train()
    job.hear()
    job.send(after=limits.HEARTBEAT_S)
    job.session.tick(job.now + 60)
    assert not job.session.outage
    assert not job.session.circuit_open
    job.train()
    job.session.tick(job.now + 60)
    job.session.tick(job.now + 60 + limits.OUTAGE_AFTER_S - 0.01)
    assert not job.session.outage
    job.session.tick(job.now + 60 + limits.OUTAGE_AFTER_S)
    assert job.session.outage
    job.session.on_advice(advice(0), job.now + 66)
    assert not job.session.outage
    assert job.session.missing(2), "the step's own decision is still to come"
    assert job.send().steps == [1]


class Slow:
    def ready(self):
        return False


def test_with_a_lag_steps_that_the_service_had_already_are_asked_for_and_not_taken_as_known():
    """Reconnected, and the losses of what was not answered still come from their device."""
    job = Job(0)
    job.train()
    job.hear()
    job.session.observe(1, (Slow(), None, None, None))
    job.session.on_lost("reset", job.now)
    job.session.on_attached(attached(through=1), job.session.attach, job.now)
    assert job.send(after=limits.HEARTBEAT_S) is not None
    job.session.on_advice(advice(1, (1, HALF)), job.now)
    assert job.session.missing(2)
    assert not job.session.drained


# -- older services ----------------------------------------------------------------------------------------------


def test_a_service_that_knows_none_of_this_is_told_none_of_it():
    plain = wire.Receipt(1, 2, 3, FLAT)
    new = plain._replace(confirms=3, controls={"a": 1.0}, wanted_lr=(0.1, math.nan), of_ranks=2)
    report = wire.Report("r", "s", 1, [0], {"loss": [1.0]}, (plain,), (wire.Answer("d", "done", ""),), "")
    newer = report._replace(
        receipts=(new,), answers=(wire.Answer("d", "done", "", 4),), controls=(wire.Control("a", 1.0, 0.0, 2.0),)
    )
    assert wire.report_json(newer, older=True) == wire.report_json(report)
    assert wire.report_json(report)["answers"] == [{"directive": "d", "outcome": "done", "note": ""}]
    told = wire.report_json(newer)
    assert told["controls"] == [{"name": "a", "value": 1.0, "min": 0.0, "max": 2.0}]
    assert told["receipts"][0]["wanted_lr"] == [0.1, "NaN"]
    assert told["receipts"][0]["controls"] == {"a": 1.0}


def test_what_is_asked_with_the_answer_to_the_end_is_not_asked_any_more():
    job = Job()
    job.session.end("finished")
    job.send()
    job.session.on_advice(advice(-1, directives=asks("checkpoint")), job.now)
    assert job.session.drained, "an answer would be refused: the run has ended"
