"""Goal: a spike takes the rungs of the playbook in order and no further than its limits, whatever becomes of what the
job is asked for; and between spikes nobody notices that there is a playbook.

Method: another reading of the rule, in plain lists, beside the policy on traces of every kind; then whole lives of runs
through the fold, with the answers and the rewinds of their jobs.
"""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball_server.core import run as fold
from flyball_server.core.errors import Invalid
from flyball_server.core.events import Attached, Commanded, DirectiveAnswered, Observed, Spec
from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.spike_guard import Config
from flyball_server.core.types import ROLLBACKS, Group, Observation
from flyball_server.policy_files import resolve
from flyball_server.rules import plan_of, rules_of

GROUPS = (Group("body", 1.0, 0.9), Group("head", 0.5), Group("frozen", 0.0))
#: Quick to judge and to act: the mean of ten values, two suspect ones are a spike.
QUICK = {"type": "spike_guard", "policy": "constant", "min_samples": 10, "confirm": 2, "cooldown_steps": 5}
QUICK |= {"memory_steps": 40, "rewarm_steps": 4, "skip_batches": 7, "cut_factor": 0.5}


def level(step):
    """A loss around 2, with some life in it."""
    return 2.0 + 0.1 * (step % 3 - 1)


def decided(spec, losses, groups=GROUPS, **signals):
    """Every decision on the losses, one per step."""
    policy, config, _ = resolve(spec)
    state, _ = policy.init(config, groups, 0)
    out = []
    for step, loss in enumerate(losses):
        others = {name: column[step] for name, column in signals.items()}
        state, decision = policy.step(config, state, Observation(step, loss, **others))
        out.append(decision)
    return out


def rungs(decisions):
    """(step, rung) of every rung taken."""
    marks = ((step, decision.code.rpartition("+spike_")[2]) for step, decision in enumerate(decisions))
    return [(step, mark) for step, mark in marks if "spike_" in decisions[step].code]


def calm(n, *spikes, height=50.0):
    """Ordinary losses, but for those at `spikes`."""
    return [height if step in spikes else level(step) for step in range(n)]


# The rule, read another way


class Reading:
    """The rule as prose says it, for one group of learning rate 1 under the constant policy."""

    def __init__(self, config):
        self.config, self.factor, self.ramp = config, 1.0, None
        self.seen = {"loss": [], "grad_norm": []}
        self.streaks = {"loss": 0, "grad_norm": 0}
        self.taken, self.newest, self.acted = 0, None, None
        self.ladder = ["cut"] * config.max_cuts + ["rewarm"] * config.max_rewarms
        self.ladder += ["restore"] * config.max_restores + ["stop"]

    def step(self, step, loss, grad):
        if loss is not None:
            self.watch("loss", loss)
        if grad is not None and not grad < 0:
            self.watch("grad_norm", math.log(max(grad, 1e-30)) if grad <= 1e100 else grad)
        rung = ""
        if self.newest is not None and step - self.newest >= self.config.memory_steps:
            self.taken, self.newest, self.acted = 0, None, None
        if max(self.streaks.values()) >= self.config.confirm:
            self.newest = step
            waited = self.acted is None or step - self.acted >= self.config.cooldown_steps
            if waited and self.taken < len(self.ladder):
                rung, self.taken, self.acted = self.ladder[self.taken], self.taken + 1, step
        if rung in ("cut", "rewarm"):
            before, floor = self.factor, min(self.config.min_factor, self.factor)
            self.factor = max(before * self.config.cut_factor, floor)
            self.ramp = (step, self.factor, before) if rung == "rewarm" else None
        elif self.ramp:
            begun, low, high = self.ramp
            done = min(1, (step - begun) / self.config.rewarm_steps)
            self.factor = low + (high - low) * done
            self.ramp = None if done == 1 else self.ramp
        return self.factor, rung

    def watch(self, name, value):
        """Values enter as (mean, deviation) pairs, the newest last."""
        past, config = self.seen[name], self.config
        if math.isnan(value) or abs(value) > 1e100:
            self.streaks[name] += 1
            return
        if not past:
            past.append((value, 0.0))
            self.streaks[name] = 0
            return
        (mean, deviation), n = past[-1], len(past)
        least = config.min_deviation * (abs(mean) if name == "loss" else 1.0)
        scale = max(deviation, least, 1e-12)
        wild = n >= config.min_samples and value > mean + config.deviations * scale
        self.streaks[name] = self.streaks[name] + 1 if wild else 0
        away = value - mean
        if n >= 10:
            away = max(-config.clip * scale, min(config.clip * scale, away))
        weight = 1 - config.beta
        if n < max(config.min_samples, 10):
            weight = max(weight, 1 / (n + 1))
        past.append((mean + weight * away, deviation + weight * (abs(away) - deviation)))


usual = st.floats(0.5, 3.0)
spiky = st.lists(
    st.tuples(
        usual | st.sampled_from([math.nan, math.inf, 50.0, 60.0, 1e99, 1e300]) | st.none(),
        usual | st.sampled_from([math.nan, math.inf, -1.0, 0.0, 900.0]) | st.none(),
        st.sampled_from([1, 2, 3, 4, 20]),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    trace=spiky,
    limits=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    confirm=st.integers(1, 3),
    beta=st.sampled_from([0.0, 0.9, 0.99]),
    cooldown=st.integers(0, 12),
    memory=st.integers(1, 20),
    least=st.sampled_from([0.0, 0.01, 0.4]),
)
def test_the_policy_is_the_rule_read_another_way(trace, limits, confirm, beta, cooldown, memory, least):
    names = dict(zip(("max_cuts", "max_rewarms", "max_restores"), limits, strict=True))
    spec = {**QUICK, **names, "confirm": confirm, "beta": beta, "cooldown_steps": cooldown, "min_factor": 0.2}
    spec |= {"memory_steps": cooldown + memory, "min_deviation": least}
    policy, config, _ = resolve(spec)
    state, _ = policy.init(config, (Group("a", 1.0),), 0)
    reading, step = Reading(config), 0
    for loss, grad, times in [*((level(i), 1.0, 1) for i in range(12)), *trace]:
        for _ in range(times):
            state, decision = policy.step(config, state, Observation(step, loss, grad_norm=grad))
            factor, rung = reading.step(step, loss, grad)
            assert decision.lr == pytest.approx((factor,), rel=1e-9), step
            assert decision.code == ("keep" if loss is None or abs(loss) <= 1e100 else "nonfinite_hold") + (
                f"+spike_{rung}" if rung else ""
            )
            step += 1


# The playbook


def test_a_spike_that_goes_on_takes_every_rung_and_then_there_is_nothing_left_to_do():
    decisions = decided(QUICK, [*calm(20), *[math.nan] * 60])
    assert rungs(decisions) == [(21, "cut"), (26, "rewarm"), (31, "restore"), (36, "restore"), (41, "stop")]
    taken = [decisions[step] for step, _ in rungs(decisions)]
    assert all(decision.milestone for decision in taken)
    assert [decision.fields["rung"] for decision in taken] == [1, 2, 3, 4, 5]
    assert [[ask.kind for ask in decision.asks] for decision in taken] == [[], [], ["restore"], ["restore"], ["stop"]]
    assert taken[2].asks[0].args == {"skip_batches": 7, "before_step": 20}
    assert taken[4].asks[0].args == {}
    assert "the job is asked to stop" in taken[4].asks[0].reason
    assert [decision.lr[0] for decision in decisions[20:33]] == [
        1.0, *[0.5] * 5, 0.25, 0.3125, 0.375, 0.4375, *[0.5] * 3
    ]  # fmt: skip
    policy, config, _ = resolve(QUICK)
    said = [policy.explain(config, decision) for decision in taken]
    assert all("Spike since step 20 (loss nan, running " in sentence for sentence in said)
    assert said[2].endswith("before it and to skip 7 batches (restore 1 of 2).")
    assert taken[2].asks[0].reason in said[2]
    assert "cut to 0.25 of the policy's, and back to 0.5 over 4 steps" in said[1]


def test_spikes_in_a_row_climb_and_one_that_comes_late_begins_at_the_first_rung():
    near, far = (30, 31, 50, 51), (100, 101)
    decisions = decided(QUICK, calm(130, *near, *far))
    assert rungs(decisions) == [(31, "cut"), (51, "rewarm"), (101, "cut")]
    assert decisions[-1].lr == (0.25, 0.125, 0.0)  # a lasting cut lasts, a ramped one does not


def test_a_single_wild_value_is_no_spike_and_hardly_moves_the_detector():
    assert rungs(decided(QUICK, calm(100, 30, 40, 50, 60, height=1e99))) == []
    # Were the mean pulled up by what came before, the last ones would not stand out.
    assert rungs(decided(QUICK, calm(100, 30, 40, 50, 60, 90, 91, height=20.0))) == [(91, "cut")]


def test_a_small_step_of_the_level_is_believed_after_one_cut_and_a_large_one_leads_to_going_back():
    spec = {"type": "spike_guard", "policy": "constant"}
    noise = [0.05 * math.sin(step * step) for step in range(1000)]
    small = [2.0 + noise[step] + (0.3 if step >= 500 else 0.0) for step in range(1000)]
    large = [2.0 + noise[step] + (5.0 if step >= 500 else 0.0) for step in range(1000)]
    assert rungs(decided(spec, small)) == [(502, "cut")]
    assert [rung for _, rung in rungs(decided(spec, large))][:3] == ["cut", "rewarm", "restore"]


def test_the_gradient_norm_is_watched_as_well_and_on_a_logarithmic_scale():
    norms = [1.0 + 0.2 * (step % 5) for step in range(60)]
    norms[40:42] = [30.0, 40.0]
    decisions = decided(QUICK, calm(60), grad_norm=norms)
    assert rungs(decisions) == [(41, "cut")]
    assert decisions[41].fields["signal"] == "grad_norm"
    assert decisions[41].fields["value"] == 40.0
    assert 1.0 < decisions[41].fields["mean"] < 2.5  # in the signal's own unit
    # A norm that is missing at the loss's spike, or a loss at the norm's, hides nothing.
    assert rungs(decided(QUICK, [None, *calm(59)], grad_norm=norms)) == [(41, "cut")]
    losses = calm(60, 40, 42)
    losses[41] = None
    assert rungs(decided(QUICK, losses, grad_norm=[1.0] * 60)) == [(42, "cut")]


def test_before_there_are_enough_samples_only_unusable_losses_count():
    assert rungs(decided(QUICK, [1.0, 500.0, 500.0, 900.0, 900.0])) == []
    assert rungs(decided(QUICK, [1.0, math.nan, math.inf, 1.0])) == [(2, "cut")]


def test_a_rung_of_limit_0_is_passed_over_and_cuts_end_at_the_lowest_factor():
    never = {**QUICK, "max_cuts": 0, "max_rewarms": 0, "max_restores": 0}
    assert rungs(decided(never, [*calm(20), *[math.nan] * 60])) == [(21, "stop")]
    often = {**QUICK, "max_cuts": 4, "max_rewarms": 0, "min_factor": 0.3}
    decisions = decided(often, [*calm(20), *[math.nan] * 30])
    assert [decisions[step].lr[0] for step, _ in rungs(decisions)][:4] == [0.5, 0.3, 0.3, 0.3]


def test_between_spikes_the_inner_decision_comes_through_as_it_is():
    policy, config, _ = resolve({**QUICK, "policy": {"type": "cycle", "window_size": 5, "patience": 10}})
    inner, own = config.policy
    state, first = policy.init(config, GROUPS, 3)
    alone, same = inner.init(own, GROUPS, 3)
    assert first == same
    for step in range(200):
        seen = Observation(step, level(step), grad_norm=1.0)
        state, decision = policy.step(config, state, seen)
        assert decision.lr is state.lr
        alone, same = inner.step(own, alone, seen)
        assert decision == same
    assert policy.reads(config) == {ROLLBACKS}


@pytest.mark.parametrize(
    "inner",
    [
        {"type": "adaptive", "use_reward": True},
        {"type": "aees", "episode_length": 4, "lr_candidates": [0.5, 1], "noise_candidates": [0.1, 0.2]},
    ],
    ids=lambda inner: inner["type"],
)
def test_a_rung_changes_the_learning_rates_and_nothing_else_of_the_inner_decision(inner):
    policy, config, _ = resolve({**QUICK, "policy": inner})
    part = config.policy
    state, _ = policy.init(config, GROUPS, 3)
    alone, _ = part.policy.init(part.config, GROUPS, 3)
    factor = 1.0
    for step, loss in enumerate([*calm(20), *[math.nan] * 30, *calm(20)]):
        seen = Observation(step, loss, reward=math.sin(step))
        state, decision = policy.step(config, state, seen)
        alone, own = part.step(alone, seen)
        assert decision[1:4] == own[1:4]
        factor = state.factor
        assert decision.lr == (own.lr if factor == 1.0 else pytest.approx([lr * factor for lr in own.lr], rel=1e-12))
        assert decision.code.partition("+spike_")[0] == own.code
        assert policy.explain(config, decision).startswith(part.explain(own))
    assert factor < 1.0
    assert policy.finish(config, state) == part.finish(alone)


def test_what_a_spike_is_seen_by_stands_in_the_fields():
    losses = calm(60, 40, 41, height=7.0)
    cut = decided({**QUICK, "beta": 0.5}, losses)[41]
    own = {name: value for name, value in cut.fields.items() if name in ("signal", "value", "since", "rung", "factor")}
    assert own == {"signal": "loss", "value": 7.0, "since": 40, "rung": 1, "factor": 0.5}
    assert (2.0 < cut.fields["mean"] < 3.0, 0.0 < cut.fields["deviation"] < 1.0) == (True, True)
    assert cut.fields["spike"] == f"loss 7, running {cut.fields['mean']:.4g}"
    norms = [1.0] * 40 + [math.inf, math.nan]
    cut = decided(QUICK, calm(42), grad_norm=norms)[41]
    assert (cut.fields["value"], cut.fields["mean"], cut.fields["spike"]) == (None, 1.0, "grad_norm nan, running 1")
    first = decided(QUICK, [math.nan, math.nan])[1]
    assert first.fields["spike"] == "loss nan"


def test_a_fork_has_gone_back_less_often_than_the_run_it_left():
    policy, config, _ = resolve(QUICK)
    state, _ = policy.init(config, GROUPS, 0)
    marks = []
    for step, rollbacks in enumerate([0, 2, 2, 0, 0, 1]):
        state, decision = policy.step(config, state, Observation(step, 2.0, rollbacks=rollbacks))
        marks.append(decision.fields and (decision.fields["restore"], decision.fields["of"]))
        assert ("spike_returned" in decision.code) == (marks[-1] is not None)
    # Two at once are two of the job's attempts.
    assert marks == [None, (2, 2), None, None, None, (2, 2)]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"policy": None}, "policy: null is not allowed"),
        ({"memory_steps": 50}, "memory_steps: 50 is not above cooldown_steps = 50"),
        ({"cut_factor": 1.0}, "cut_factor: 1.0 is out of range; give less than 1"),
        ({"confirm": 0}, "confirm: 0 is out of range; give at least 1"),
    ],
)
def test_parameters_that_cannot_be_are_refused_with_what_is_allowed(parameters, words):
    with pytest.raises(ValueError, match=words):
        Config(**{"policy": {}, **parameters})


def test_an_inner_policy_that_does_not_fit_is_refused_with_its_place():
    policy, config, _ = resolve({"type": "spike_guard", "policy": {"type": "plateau", "min_lr": [0.1, 0.1]}})
    with pytest.raises(ValueError, match=r"^policy\."):
        policy.init(config, GROUPS, 0)
    with pytest.raises(Invalid, match="cannot hold another one"):
        resolve({"type": "spike_guard", "policy": {"type": "spike_guard", "policy": "constant"}})


# Lives of runs


class Life:
    """A run, folded event by event as a service would, with the checkpoints of its job."""

    def __init__(self, policy=QUICK, shadows=None):
        resolved = {name: {"policy": resolve(one).spec(), "base": None} for name, one in (shadows or {}).items()}
        self.spec = Spec("r", "p", "r", {}, GROUPS, resolve(policy).spec(), None, {}, "absolute", 1, "", resolved)
        self.rules = rules_of(self.spec)
        self.marks = []
        self.run = fold.create(self.rules)
        self.attach(0, None)

    def attach(self, step, restored):
        attempt = self.run.attempt + 1
        self.apply(Attached(attempt, attempt - 1, step, f"s{attempt}", "", None, restored))

    def apply(self, event):
        # Through JSON, as from a snapshot: nothing may hang on what only memory has.
        self.run = fold.load(self.rules, json.loads(json.dumps(fold.dump(self.run), allow_nan=False)))
        self.run, outcome = fold.apply(self.rules, self.run, event)
        self.marks += outcome.marks

    def train(self, *losses, batch=1):
        for i in range(0, len(losses), batch):
            part, first = list(losses[i : i + batch]), self.run.through + 1
            self.apply(Observed(self.run.attempt, list(range(first, first + len(part))), {"loss": part}))

    def spike(self):
        self.train(math.nan, math.nan)

    def settle(self, n=10):
        self.train(*map(level, range(n)))

    def checkpoint(self):
        return self.run.through + 1, json.loads(json.dumps(fold.dump(self.run)))

    def answer(self, outcome="done"):
        self.apply(DirectiveAnswered(self.run.attempt, self.open[-1].id, outcome, "", self.run.through + 1))

    @property
    def open(self):
        return self.run.steering.commands

    @property
    def rungs(self):
        return [mark.code.rpartition("+spike_")[2] for mark in self.marks if "spike_" in mark.code]


def test_the_whole_playbook_in_one_life():
    life = Life()
    life.settle(20)
    saved = life.checkpoint()
    life.settle()
    life.spike()
    assert (life.rungs, life.run.settings.lr) == (["cut"], (0.5, 0.25, 0.0))
    life.settle()
    life.spike()
    assert (life.rungs, life.run.settings.lr) == (["cut", "rewarm"], (0.25, 0.125, 0.0))
    life.settle()
    life.spike()
    (asked,) = life.open
    assert (asked.kind, asked.args) == ("restore", {"skip_batches": 7, "before_step": 54})
    assert "to skip 7 batches (restore 1 of 2)" in asked.reason
    life.answer()
    assert life.open == ()
    life.attach(*saved)
    life.settle()  # the state of then: no cut, but the next rung stands
    assert (life.rungs[3:], life.run.settings.lr) == (["returned"], (1.0, 0.5, 0.0))
    life.spike()
    life.attach(*saved)  # the job went back before it got to answering
    assert life.open == ()
    life.settle()
    life.spike()
    assert life.rungs[3:] == ["returned", "restore", "returned", "stop"]
    assert [command.kind for command in life.open] == ["stop"]
    assert [mark.fields["rung"] for mark in life.marks if "spike_re" in mark.code] == [2, 3, 3, 4, 4]


def test_what_the_job_declines_is_followed_by_the_next_rung_after_the_cooldown():
    life = Life()
    life.settle(20)
    life.train(*[math.nan] * 12)
    for number in (1, 2):
        assert [(c.kind, life.rungs.count("restore")) for c in life.open] == [("restore", number)]
        life.answer("declined")
        assert life.open == ()
        life.train(*[math.nan] * 4)
        assert life.open == ()  # still cooling down
        life.train(math.nan)
    assert [command.kind for command in life.open] == ["stop"]
    life.answer("declined")
    life.train(*[math.nan] * 100)
    assert life.rungs == ["cut", "rewarm", "restore", "restore", "stop"]


def test_a_job_that_is_killed_and_resumed_does_not_use_up_the_playbook():
    life = Life()
    life.settle(20)
    saved = life.checkpoint()
    for _ in range(5):
        life.settle(5)
        life.attach(*saved)
    life.settle(20)
    life.spike()
    assert life.rungs == ["cut"]
    # Nor does going back after it declined to, for reasons of its own.
    life.train(*[math.nan] * 10)
    life.answer("declined")
    life.attach(*saved)
    life.settle(20)
    life.spike()
    assert life.rungs == ["cut", "rewarm", "restore", "cut"]


def test_a_calm_time_after_going_back_ends_the_story():
    life = Life()
    life.settle(20)
    saved = life.checkpoint()
    life.train(*[math.nan] * 12)
    life.attach(*saved)
    life.settle(60)
    life.spike()
    assert life.rungs == ["cut", "rewarm", "restore", "returned", "cut"]


def test_another_policy_begins_a_playbook_of_its_own():
    life = Life()
    life.settle(20)
    saved = life.checkpoint()
    life.train(*[math.nan] * 12)
    life.attach(*saved)
    life.settle(20)
    other = resolve({**QUICK, "max_restores": 1}).spec()
    life.apply(Commanded("switch_policy", {"plan": plan_of(life.spec._replace(policy=other))}, "ann", "calmer"))
    life.settle(20)
    life.spike()
    assert life.rungs[-1] == "cut"
    life.train(*[math.nan] * 10)
    assert [command.kind for command in life.open if command.id[0] == "a"] == ["restore"]


def test_several_rungs_in_one_report_are_several_directives():
    life = Life({**QUICK, "max_cuts": 0, "max_rewarms": 0, "max_restores": 1})
    life.train(*[*map(level, range(20)), *[math.nan] * 12], batch=32)
    assert [command.kind for command in life.open] == ["restore", "stop"]
    assert len({command.id for command in life.open}) == 2


def test_a_spike_guard_inside_other_policies_is_heard_by_the_job():
    inside = {"type": "sequence", "stages": [{"policy": {"type": "warmup", "steps": 5}, "until": 5}, {"policy": QUICK}]}
    groups = {"type": "per_group", "policy": "constant", "groups": {"head": {"policy": QUICK, "scale": 0.5}}}
    twice = {"type": "per_group", "policy": QUICK, "groups": {"head": {"policy": QUICK}}}
    for spec in (inside, groups, twice, {"type": "gradient_aware", "policy": QUICK}):
        life = Life(spec)
        life.settle(30)
        saved = life.checkpoint()
        life.train(*[math.nan] * 12)
        assert [command.kind for command in life.open] == ["restore"], spec
        life.attach(*saved)
        life.train(level(0))
        assert life.run.steering.rollbacks == 1
        assert "spike_returned" in life.run.decision.code
        policy, config = life.rules.policy, life.rules.config
        assert "The run went back" in policy.explain(config, life.run.decision)


def test_a_shadow_asks_nobody_for_anything():
    life = Life({"type": "constant"}, {"beside": QUICK})
    life.settle(20)
    life.train(*[math.nan] * 12)
    assert life.open == ()
    assert life.run.shadows[0].decision.code == "nonfinite_hold+spike_restore"


def test_the_preset_is_steady_inside_a_spike_guard():
    whole, steady = resolve({"type": "spike_safe"}).spec(), resolve({"type": "steady"}).spec()
    assert (whole["type"], whole["policy"]) == ("spike_guard@1", steady)
    assert POLICIES["spike_guard"].tag == "spike_guard@1"
