"""Goal: a range test finds what there is to find, changes nothing where it cannot be undone, and what it found outlasts
the going back that takes its own memory away.

Method: whole lives of runs through the fold, with jobs whose loss depends on the learning rate in force in a known way,
which keep checkpoints of the fold and go back to them, decline, die, or have settings applied late.
"""

import json
import math

import pytest

from flyball_server.core import run as fold
from flyball_server.core.events import Applied, Attached, CommandMoved, DirectiveAnswered, Observed, Receipt, Spec
from flyball_server.core.policies.range_test import Config
from flyball_server.core.types import ANSWERS, APPLIED, ROLLBACKS, Group, Settings
from flyball_server.policy_files import resolve
from flyball_server.rules import rules_of

GROUPS = (Group("body", 0.02, 0.9), Group("head", 0.01), Group("frozen", 0.0))
REFERENCE = (0.02, 0.01, 0.0)
#: Without smoothing, so that what is found can be said exactly.
PLAIN = {"type": "range_test", "min_lr": 1e-4, "max_lr": 1.0, "steps": 41, "beta": 0.0}


def valley(lr):
    """Flat at 2.3 up to 1e-3, steepest at 1e-2, lowest (1.3) at 1e-1, and then it blows up."""
    x = math.log10(lr)
    if x <= -3:
        return 2.3
    if x <= -1:
        return 1.8 + 0.5 * math.cos(math.pi * (x + 3) / 2)
    return 1.3 + 8.0 * (x + 1) ** 2


class Life:
    """A run and its job. loss: of the learning rate in force."""

    def __init__(self, policy=PLAIN, loss=valley, lag=0, delay=0):
        self.spec = Spec("r", "p", "r", {}, GROUPS, resolve(policy).spec(), None, {}, "absolute", 1)
        self.rules = rules_of(self.spec)
        self.loss, self.delay, self.receipts = loss, delay, 0
        self.marks, self.used, self.kept = [], [], {}
        #: (learning rates, the step that decided them), as decided after each step; the newest last.
        self.run = fold.create(self.rules)
        self.told = [(self.run.settings.lr, -1)]
        self.attach(0, None, lag)

    def attach(self, step, restored, lag=0):
        attempt = self.run.attempt + 1
        self.apply(Attached(attempt, attempt - 1, step, f"s{attempt}", "", lag, restored))
        self.told, self.receipts = [(self.run.settings.lr, step - 1)], 0

    def apply(self, event):
        self.run = fold.load(self.rules, json.loads(json.dumps(fold.dump(self.run), allow_nan=False)))
        self.run, outcome = fold.apply(self.rules, self.run, event)
        self.marks += outcome.marks

    def train(self, n, *, obliging=True):
        """Steps of the job, each under what was decided `delay` steps ago; it does what it is asked for."""
        for _ in range(n):
            step = self.run.through + 1
            lr, decided = self.told[max(0, len(self.told) - 1 - self.delay)]
            self.receipts += 1
            settings = Settings(lr, None, None)
            self.apply(Applied(self.run.attempt, (Receipt(self.receipts, step, decided, settings, False, "", 1),)))
            self.used.append(lr)
            self.apply(Observed(self.run.attempt, [step], {"loss": [self.loss(lr[0])]}))
            self.told.append((self.run.settings.lr, step))
            if obliging:
                for command in self.run.steering.commands:
                    self.oblige(command)

    def oblige(self, command):
        if command.kind == "checkpoint":
            # Saved before it is answered, as by a job.
            self.kept[command.args["tag"]] = self.saved()
            self.answer(command.id)
        elif command.kind == "restore":
            self.attach(*self.kept[command.args["tag"]])

    def saved(self):
        return self.run.through + 1, json.loads(json.dumps(fold.dump(self.run)))

    def answer(self, directive, outcome="done", note=""):
        self.apply(DirectiveAnswered(self.run.attempt, directive, outcome, note, self.run.through + 1))

    @property
    def open(self):
        return [(command.kind, command.id) for command in self.run.steering.commands]

    @property
    def codes(self):
        return [mark.code for mark in self.marks]

    @property
    def told_last(self):
        mark = self.marks[-1]
        policy, config = self.rules.policy, self.rules.config
        return policy.explain(config, self.run.decision), mark.fields


def test_a_whole_test_sweeps_goes_back_and_goes_on_at_what_it_found():
    life = Life()
    life.train(50)
    assert life.codes == ["range_asked", "range_begun", "range_sweep", "range_found", "range_over"]
    assert (life.run.attempt, life.run.from_step) == (2, 1)
    # The whole sweep: one step a level, the same ratio between them, and between the groups.
    found = next(mark.fields for mark in life.marks if mark.code == "range_found")
    swept = life.used[2 : 2 + found["levels"]]
    assert life.used[:2] == [REFERENCE, REFERENCE]
    assert [lr[0] for lr in swept] == pytest.approx([1e-4 * 10 ** (i / 10) for i in range(len(swept))])
    assert all(lr[1] == pytest.approx(lr[0] / 2) and lr[2] == 0.0 for lr in swept)
    # In the first tenth of the levels nothing is looked at; the fall is 1.0, and a tenth of it done at 10^-2.6.
    assert found["first_loss"] == 2.3
    assert found["lowest_loss"] == pytest.approx(1.3)
    assert found["upper"] == pytest.approx(1e-1)
    assert found["suggested"] == pytest.approx(1e-2)
    assert found["lower"] == pytest.approx(10**-2.5)
    assert valley(found["lower"]) < 2.2 < valley(found["lower"] / 10**0.1)
    assert (found["levels"], found["ended"]) == (38, "the loss was 4 times its lowest")
    assert life.used[40] == REFERENCE  # at once, before the job has gone back
    sentence, fields = life.told_last
    assert fields["suggested"] == found["suggested"]
    assert life.run.settings.lr == pytest.approx((0.01, 0.005, 0.0))
    life.train(20)
    assert set(life.used[-20:]) == {life.run.settings.lr}
    assert life.codes[-1] == "range_over"
    assert "Suggested is 0.01, bounds 0.00316 to 0.1" in life.rules.policy.explain(
        life.rules.config, life.run.decision._replace(code="range_over", fields=fields)
    )
    assert sentence


def test_a_smoothed_loss_counts_for_the_levels_it_is_of():
    """Though it is known late, the learning rates found are those without smoothing, and noise does not lead astray."""
    noise = iter(math.sin(37 * i * i) for i in range(10**6))
    life = Life({**PLAIN, "beta": 0.9, "steps": 400}, loss=lambda lr: valley(lr) + 0.1 * next(noise))
    life.train(420)
    found = next(mark.fields for mark in life.marks if mark.code == "range_found")
    assert found["suggested"] == pytest.approx(1e-2, rel=0.6)
    assert found["upper"] == pytest.approx(1e-1, rel=0.6)
    assert found["lower"] == pytest.approx(10**-2.6, rel=0.6)


def test_the_range_is_swept_to_its_end_where_the_loss_stays():
    life = Life({**PLAIN, "spacing": "linear", "min_lr": 0.1, "max_lr": 0.5, "steps": 5}, loss=lambda lr: 2.0 - lr)
    life.train(8)
    assert [lr[0] for lr in life.used[2:7]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    found = next(mark.fields for mark in life.marks if mark.code == "range_found")
    assert (found["ended"], found["upper"]) == ("the whole range", 0.5)


@pytest.mark.parametrize(
    ("loss", "ended"),
    [
        (lambda lr: math.nan if lr > 1e-3 else 2.0, "the loss was no number any more"),
        (lambda lr: 1e300 if lr > 1e-3 else 2.0, "the loss was no number any more"),
        (lambda lr: 2.0 + lr, "the whole range"),
        (lambda lr: -2.0 if lr < 1e-3 else 9.0, "the loss was 4 times its lowest"),
    ],
)
def test_where_nothing_falls_nothing_is_suggested_and_everything_is_as_before(loss, ended):
    life = Life(loss=loss)
    life.train(60)
    assert life.codes == ["range_asked", "range_begun", "range_sweep", "range_nothing", "range_over"]
    assert life.marks[-2].fields["ended"] == ended
    assert life.run.settings.lr == REFERENCE
    assert life.told_last[1]["result"].startswith("No learning rate is suggested")


@pytest.mark.parametrize("how", ["declined", "withdrawn", "silent"])
def test_a_job_without_checkpoints_is_left_in_peace_and_told_why(how):
    life = Life({**PLAIN, "wait_steps": 30})
    life.train(1, obliging=False)
    ((kind, directive),) = life.open
    assert kind == "checkpoint"
    if how == "declined":
        life.answer(directive, "declined", "this client has no handler for checkpoint")
    elif how == "withdrawn":
        life.apply(CommandMoved(directive, "withdrawn"))
    life.train(40, obliging=False)
    assert set(life.used) == {REFERENCE}
    assert life.codes == ["range_asked", "range_declined"]
    why = {"declined": "this client has no handler for checkpoint", "withdrawn": "withdrawn"}
    assert life.told_last[1]["why"] == why.get(how, "no answer in 30 steps")
    policy, config = life.rules.policy, life.rules.config
    said = policy.explain(config, life.run.decision._replace(code="range_declined", fields=life.told_last[1]))
    assert said.startswith("No range test: the job made no checkpoint to go back to")


def test_a_job_that_does_not_go_back_goes_on_at_the_learning_rate_of_before():
    for outcome in ("declined", "silent"):
        life = Life({**PLAIN, "wait_steps": 20})
        life.train(2)
        while life.marks[-1].code != "range_found":
            life.train(1, obliging=False)
        if outcome == "declined":
            life.answer(life.open[0][1], "declined", "no room")
        life.train(25, obliging=False)
        assert life.codes[-1] == "range_not_undone"
        assert set(life.used[-24:]) == {REFERENCE}
        assert life.told_last[1]["why"] == ("no room" if outcome == "declined" else "no answer in 20 steps")


def test_a_job_that_dies_in_the_middle_gives_up_and_one_that_comes_back_from_before_begins_anew():
    life = Life()
    life.train(1)
    life.train(20)
    assert life.codes[-1] == "range_sweep"
    life.attach(life.run.through + 1, None)
    life.train(3)
    assert life.codes[-1] == "range_interrupted"
    assert life.run.settings.lr == REFERENCE
    life = Life()
    early = life.saved()
    life.train(20)
    life.attach(*early)
    life.train(60)
    assert life.codes[-5:] == ["range_asked", "range_begun", "range_sweep", "range_found", "range_over"]


def test_each_level_waits_for_a_loss_that_was_had_under_it():
    """However late settings are applied, the same is found."""
    prompt = Life()
    prompt.train(60)
    late = Life(lag=None, delay=7)
    late.train(500)
    assert late.codes == [code for code in prompt.codes if code != "range_sweep"]  # many steps of which nothing comes
    one, other = (next(m.fields for m in life.marks if m.code == "range_found") for life in (prompt, late))
    assert one == {**other, "tag": one["tag"]}
    # A step whose loss was not measured says nothing of its level.
    seen = iter(range(10**6))
    gaps = Life(loss=lambda lr: None if next(seen) % 3 else valley(lr))
    gaps.train(200)
    assert next(m.fields for m in gaps.marks if m.code == "range_found") == one


def test_without_any_loss_the_test_ends_and_is_undone():
    life = Life({**PLAIN, "wait_steps": 10}, loss=lambda lr: None)
    life.train(20)
    assert life.codes == ["range_asked", "range_begun", "range_nothing", "range_over"]
    assert life.marks[-2].fields["ended"] == "no loss in 10 steps"


def test_the_policy_that_follows_begins_there_and_counts_its_own_goings_back():
    spikes = {"type": "spike_guard", "policy": "constant", "min_samples": 10, "confirm": 2, "cooldown_steps": 1}
    spikes |= {"memory_steps": 40, "max_cuts": 0, "max_rewarms": 0}
    height = [0.0]
    life = Life({**PLAIN, "policy": spikes}, loss=lambda lr: valley(lr) + height[0])
    life.train(80)
    assert life.codes[-1] == "range_over"
    assert life.run.decision.phase.startswith("over.")
    assert life.run.settings.lr == pytest.approx((0.01, 0.005, 0.0))
    assert life.rules.policy.reads(life.rules.config) == {ANSWERS, APPLIED, ROLLBACKS}
    saved = life.saved()
    height[0] = 50.0
    life.train(2, obliging=False)
    (asked,) = life.run.steering.commands
    assert (asked.kind, life.run.steering.rollbacks) == ("restore", 1)
    assert asked.reason.endswith("(restore 1 of 2).")
    height[0] = 0.0
    life.attach(*saved)
    life.train(3)
    assert life.run.steering.rollbacks == 2
    assert [code for code in life.codes if "spike" in code][-1].endswith("+spike_returned")
    # Back to the test's own checkpoint, for another reason: what was found is still known, and nothing is swept again.
    before = len(life.used)
    life.attach(*life.kept["range_test-0"])
    life.train(5)
    assert life.codes[-1] == "range_over"
    assert life.used[before] == REFERENCE
    assert life.run.settings.lr == pytest.approx((0.01, 0.005, 0.0))
    policy, config = life.rules.policy, life.rules.config
    assert policy.explain(config, life.run.decision).endswith(".")


def test_two_tests_in_a_sequence_are_two():
    stages = [{"policy": {**PLAIN, "after": "reference"}, "until": 60}, {"policy": PLAIN}]
    life = Life({"type": "sequence", "stages": stages})
    life.train(200)
    tags = [mark.fields["tag"] for mark in life.marks if mark.code == "range_asked"]
    assert tags == ["range_test-0", "range_test-60"]
    assert life.codes.count("range_over") == 2
    assert life.run.settings.lr == pytest.approx((0.01, 0.005, 0.0))


def test_answers_are_kept_for_those_who_read_them_and_for_no_other_policy():
    life = Life({"type": "spike_guard", "policy": "constant", "min_samples": 10, "confirm": 2, "max_cuts": 0,
                 "max_rewarms": 0}, loss=lambda lr: math.nan)  # fmt: skip
    life.train(5, obliging=False)
    life.answer(life.open[0][1], "declined")
    assert life.run.steering.answers == ()
    assert "answers" not in json.dumps(fold.dump(life.run))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"min_lr": 0.5, "max_lr": 0.5}, "min_lr: 0.5 is not below max_lr = 0.5; give less"),
        ({"steps": 2}, "steps: 2 is out of range; give at least 3"),
        ({"stop_factor": 1.0}, "stop_factor: 1.0 is out of range; give greater than 1"),
    ],
)
def test_parameters_that_cannot_be_are_refused_with_what_is_allowed(parameters, words):
    with pytest.raises(ValueError, match=words):
        Config(**parameters)


def test_a_policy_afterwards_that_does_not_fit_is_refused_when_the_test_begins():
    policy, config, _ = resolve({**PLAIN, "policy": {"type": "plateau", "min_lr": [0.1, 0.1]}})
    with pytest.raises(ValueError, match=r"^policy\."):
        policy.init(config, GROUPS, 0)
