"""Goal: a run is a fold, and the rules at the head of `run.py` hold for every policy, base schedule and guard.

Method: property tests over all of them. Two folds are the same where their dumps are the same text, which also shows
that nothing in a run is a number that JSON cannot carry.
"""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball_server.core import run as fold
from flyball_server.core.errors import Conflict, Invalid
from flyball_server.core.events import (
    Applied,
    Attached,
    Created,
    DirectiveAnswered,
    Ended,
    Observed,
    Receipt,
    Reported,
    Spec,
)
from flyball_server.core.policies import POLICIES
from flyball_server.core.run import NOTHING
from flyball_server.core.types import Group, Settings
from flyball_server.rules import rules_of

GROUPS = (Group("body", 1e-3, 0.9), Group("head", 1e-2, None, (0.9, 0.999)), Group("frozen", 0.0))
#: Every policy as it comes, and quick ones that decide within a short trace.
NOISY = {"type": "aees", "episode_length": 4, "lr_candidates": [0.5, 1], "noise_candidates": [0, 0.1]}
PARAMETERS = [{"type": name} for name, policy in POLICIES.items() if not policy.parts] + [
    NOISY,
    {"type": "adaptive", "use_reward": True, "use_cosine": True, "T0": 7, "patience": 2, "momentum_target": "beta1"},
    {"type": "rules", "lr_rule": "trend", "momentum_rule": "relative", "reward_rule": "variance"},
    {"type": "cycle", "window_size": 6, "patience": 4, "smoothing": 0.5},
    {"type": "gradient_aware", "policy": "adaptive", "min_samples": 2},
    {"type": "per_group", "policy": "windowed", "groups": {"head": {"policy": NOISY}, "x*": {"scale": 2.0}}},
    {
        "type": "sequence",
        "stages": [{"policy": "cycle", "until": 9}, {"policy": NOISY, "until": 40}, {"policy": "steady"}],
    },
    {"type": "windowed", "window_size": 5, "cooldown_steps": 2, "patience": 2, "warmup_steps": 7},
    {"type": "plateau", "patience": 1, "factor": 0.3, "bad_limit": 2},
    {"type": "plateau", "patience": 2, "metric": "reward", "mode": "max", "cooldown": 3},
]
BASES = [
    None,
    {"type": "cosine", "T_max": 40, "warmup_steps": 5},
    {"type": "one_cycle", "max_lr": 0.05, "total_steps": 60},
]
GUARDS = [
    {},
    {"max_lr": 5e-3, "min_lr": 1e-4, "warmup_steps": 9},
    {"max_change": 1.1},
    {"max_change_per_window": 1.3, "window_steps": 10},
    {"cooldown_steps": 8, "max_factor": 2.0, "min_factor": 0.5},
    {"max_change": 1.5, "cooldown_steps": 3, "warmup_steps": 4, "groups": {"head": {"scale": 0.5, "max_lr": 4e-3}}},
]
WILD = [0.5, 1.0, 2.0, 0.1, 0.9, 4.0, math.nan, math.inf, -math.inf, 1e300, -1.0, 0.0, None]


def spec(policy=None, base=None, guard=None, **fields):
    policy = {"type": "constant"} if policy is None else policy
    blank = Spec("r", "default", "r", {}, GROUPS, policy, base, guard or {}, "absolute", 7)
    return blank._replace(**fields)


def begun(rules, from_step=0, attempt=1, restored=None, run=None):
    run = fold.create(rules) if run is None else run
    event = Attached(
        attempt=attempt,
        parent=attempt - 1,
        from_step=from_step,
        session=f"s{attempt}",
        client="",
        lag=None,
        restored=restored,
    )
    return fold.apply(rules, run, event)[0]


def text(run, *without):
    """The run as text, bit for bit; it has none where a number in it is not finite."""
    data = {name: value for name, value in fold.dump(run).items() if name not in without}
    return json.dumps(data, allow_nan=False, sort_keys=True)


def observed(steps, signals, attempt=1):
    return Observed(attempt, list(steps), {name: list(column) for name, column in signals.items()})


def part(event, low, high):
    return event._replace(
        steps=event.steps[low:high], signals={name: column[low:high] for name, column in event.signals.items()}
    )


def in_force(start, steps, changes):
    """The settings after each of the steps."""
    by_step, out = dict(changes), []
    for step in steps:
        start = by_step.get(step, start)
        out.append(start)
    return out


rules_of_any_kind = st.builds(
    lambda policy, base, guard: rules_of(spec(policy, base, guard)),
    st.sampled_from(PARAMETERS),
    st.sampled_from(BASES),
    st.sampled_from(GUARDS),
)


@st.composite
def events(draw, min_size=1, max_size=90):
    n = draw(st.integers(min_size, max_size))
    gaps = draw(st.sampled_from([[1], [1], [1, 2], [1, 5, 1]]))
    steps, step = [], draw(st.integers(0, 3))
    for i in range(n):
        steps.append(step)
        step += gaps[i % len(gaps)]
    values = st.lists(st.sampled_from(WILD) | st.none() | st.floats(), min_size=n, max_size=n)
    names = draw(st.lists(st.sampled_from(["loss", "loss", "reward", "grad_norm", "mine"]), unique=True, max_size=3))
    return observed(steps, {name: draw(values) for name in names})


@settings(max_examples=150, deadline=None)
@given(rules=rules_of_any_kind, event=events(), cuts=st.lists(st.integers(0, 90), max_size=4))
def test_a_batch_equals_its_observations_one_by_one_and_in_any_parts(rules, event, cuts):
    start = begun(rules)
    whole, outcome = fold.apply(rules, start, event)
    assert outcome.changes[0][0] == event.steps[0], "each row can be read alone"
    before = text(start)
    n = len(event.steps)
    for edges in ([0, *sorted(c for c in cuts if c < n), n], range(n + 1)):
        run, settings_now, marks = start, [], []
        for low, high in pairwise(edges):
            if low == high:
                continue
            one = part(event, low, high)
            was = run.settings
            run, found = fold.apply(rules, run, one)
            assert found.changes[0][0] == one.steps[0]
            settings_now += in_force(was, one.steps, found.changes)
            marks += found.marks
        assert text(run, "seq") == text(whole, "seq")
        assert settings_now == in_force(start.settings, event.steps, outcome.changes)
        assert repr(marks) == repr(list(outcome.marks))
    assert text(start) == before, "the run given is never altered"


@settings(max_examples=60, deadline=None)
@given(rules=rules_of_any_kind, event=events(2), low=st.integers(0, 89), high=st.integers(1, 90))
def test_what_is_folded_already_changes_nothing_and_an_overlap_folds_only_what_is_new(rules, event, low, high):
    n = len(event.steps)
    high = 1 + high % n
    low = low % high
    start = begun(rules)
    run, _ = fold.apply(rules, start, part(event, 0, high))
    again, outcome = fold.apply(rules, run, part(event, low, high))
    assert again is run
    assert outcome is NOTHING
    whole, _ = fold.apply(rules, start, event)
    if high < n:
        run, outcome = fold.apply(rules, run, part(event, low, n))
        assert outcome.changes[0][0] == event.steps[high]
    assert text(run, "seq") == text(whole, "seq")


@settings(max_examples=80, deadline=None)
@given(rules=rules_of_any_kind, event=events(2), cut=st.integers(1, 89))
def test_a_run_loaded_from_text_at_any_step_goes_on_bit_for_bit(rules, event, cut):
    cut = 1 + cut % (len(event.steps) - 1)
    run, _ = fold.apply(rules, begun(rules), part(event, 0, cut))
    run, _ = fold.apply(rules, run, Reported(0, {"val_loss": math.nan, "reward": 2.0}))
    loaded = fold.load(rules, json.loads(text(run)))
    assert text(loaded) == text(run)
    assert loaded.settings == run.settings
    assert loaded.guard_state == run.guard_state
    rest = part(event, cut, None)
    one, first = fold.apply(rules, run, rest)
    two, second = fold.apply(rules, loaded, rest)
    assert text(one) == text(two)
    assert repr(first) == repr(second)


@settings(max_examples=120, deadline=None)
@given(rules=rules_of_any_kind, event=events(4), cut=st.integers(0, 89), lost=events())
def test_a_rewound_run_equals_one_that_was_never_disturbed(rules, event, cut, lost):
    cut = 1 + cut % (len(event.steps) - 2)
    kept, rest = part(event, 0, cut), part(event, cut, None)
    before, _ = fold.apply(rules, begun(rules), kept)
    undisturbed, _ = fold.apply(rules, before, rest)
    away = lost._replace(steps=[rest.steps[0] + s for s in lost.steps])
    run, _ = fold.apply(rules, before, away)
    run = begun(rules, rest.steps[0], 2, json.loads(text(before)), run)
    assert run.attempts == ((0, 2, 0), (rest.steps[0], 5, 1))
    run, _ = fold.apply(rules, run, rest._replace(attempt=2))
    own = ("seq", "attempts", "attempt", "session", "from_step", "decided", "steering")
    assert text(run, *own) == text(undisturbed, *own)


@settings(max_examples=60, deadline=None)
@given(rules=rules_of_any_kind, event=events(2), cut=st.integers(0, 89))
def test_an_attempt_that_goes_on_behind_the_newest_step_changes_no_decision(rules, event, cut):
    cut = 1 + cut % (len(event.steps) - 1)
    rest = part(event, cut, None)
    before, _ = fold.apply(rules, begun(rules), part(event, 0, cut))
    undisturbed, _ = fold.apply(rules, before, rest)
    resumed = begun(rules, rest.steps[0], 2, None, before)
    resumed, _ = fold.apply(rules, resumed, rest._replace(attempt=2))
    own = ("seq", "attempts", "attempt", "session", "from_step", "decided", "steering")
    assert text(resumed, *own) == text(undisturbed, *own)


def test_only_the_newest_attempt_is_heard():
    rules = rules_of(spec())
    first = begun(rules)
    second = begun(rules, 0, 2, None, first)
    receipt = Receipt(1, 0, -1, Settings((1e-3, 1e-2, 0.0)), False, "", 1)
    for late in (
        observed([0], {"loss": [1.0]}),
        Applied(1, (receipt,)),
        DirectiveAnswered(1, "d", "done", ""),
        Ended(1, "finished"),
    ):
        with pytest.raises(Conflict, match="attempt 1 is not the newest one"):
            fold.apply(rules, second, late)
    with pytest.raises(Conflict, match="next attempt is 3"):
        begun(rules, 0, 2, None, second)
    with pytest.raises(Conflict, match="exists already"):
        fold.apply(rules, second, Created(spec()))
    done, _ = fold.apply(rules, second, observed([0, 1, 2], {"loss": [1.0, 1.0, 1.0]}, 2))
    with pytest.raises(Invalid, match="no state was restored"):
        begun(rules, 1, 3, None, done)


def test_an_ended_run_takes_only_a_new_attempt():
    rules = rules_of(spec())
    run, _ = fold.apply(rules, begun(rules), observed([0], {"loss": [1.0]}))
    run, _ = fold.apply(rules, run, Ended(1, "failed"))
    assert run.status == "failed"
    for event in (observed([1], {"loss": [1.0]}), Ended(1, "finished")):
        with pytest.raises(Conflict, match="has ended"):
            fold.apply(rules, run, event)
    assert begun(rules, 1, 2, None, run).status == "active"


def test_side_signals_are_seen_by_the_next_observation_and_yield_to_what_the_driver_measured():
    rules = rules_of(spec({"type": "plateau", "metric": "val_loss", "patience": 0, "factor": 0.5}))
    run = begun(rules)
    for step, value in enumerate((1.0, 2.0)):
        run, _ = fold.apply(rules, run, Reported(0, {"val_loss": 9.0}))
        run, outcome = fold.apply(rules, run, Reported(0, {"val_loss": value}))
        assert outcome is NOTHING
        assert run.side == {"val_loss": value}
        run, _ = fold.apply(rules, run, observed([step], {"loss": [1.0]}))
        assert run.side == {}
    assert run.settings.lr[0] == 5e-4, "2.0 is no improvement on 1.0"
    assert run.last == {"loss": 1.0, "val_loss": 2.0}
    run, _ = fold.apply(rules, run, Reported(0, {"val_loss": 9.0, "mine": 3.0}))
    run, _ = fold.apply(rules, run, observed([2, 3], {"val_loss": [0.5, None], "mine": [None, None]}))
    assert run.settings.lr[0] == 5e-4, "the driver's own 0.5 counts"
    assert run.last == {"loss": 1.0, "val_loss": 0.5, "mine": 3.0}


# A policy's own warm-up goes by steps, measured or not.
@pytest.mark.parametrize(
    "policy",
    [p for p in PARAMETERS if "warmup_steps" not in p and p["type"] not in ("warmup", "sequence") and "T0" not in p],
    ids=lambda p: f"{p['type']}{len(p)}",
)
def test_steps_without_the_policys_signal_move_the_run_and_nothing_else(policy):
    rules = rules_of(spec(policy))
    other = "loss" if policy.get("metric") == "reward" else "reward"
    start = begun(rules)
    for signals in ({}, {"mine": [1.0] * 60}, {other: [1.0] * 60}):
        run, outcome = fold.apply(rules, start, observed(range(60), signals))
        assert (run.through, run.observations, run.settings) == (59, 60, start.settings)
        assert outcome.marks == ()
        assert run.last == dict.fromkeys(signals, 1.0)


def test_a_base_schedule_moves_without_any_signal():
    rules = rules_of(spec(base={"type": "linear", "start_factor": 1.0, "end_factor": 0.5, "total_iters": 10}))
    run, outcome = fold.apply(rules, begun(rules), observed(range(12), {}))
    assert [step for step, _ in outcome.changes] == list(range(10))
    assert run.settings.lr == pytest.approx((5e-4, 5e-3, 0.0))


def test_a_one_cycle_base_drives_momentum_where_there_is_one():
    rules = rules_of(spec(base={"type": "one_cycle", "max_lr": 0.05, "total_steps": 60}))
    run, _ = fold.apply(rules, begun(rules), observed(range(10), {"loss": [1.0] * 10}))
    body, head, frozen = run.settings.momentum
    assert body == head
    assert 0.85 <= body <= 0.95
    assert frozen is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "multiplier", "base": {"type": "cosine", "T_max": 9}}, "base is given in multiplier mode"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"groups": ()}, "groups is empty"),
        ({"groups": (Group("a", 1.0), Group("a", 1.0))}, "'a' stands twice"),
    ],
)
def test_a_specification_that_cannot_be_steered_is_refused_by_field(fields, words):
    with pytest.raises(Invalid, match=words):
        rules_of(spec(**fields))


def test_a_streak_of_the_same_decision_is_marked_where_it_begins_and_every_setting_is_recorded():
    rules = rules_of(spec({"type": "adaptive", "var_damp_scale": 0.0}))
    losses = [5.0 - i / 10 for i in range(20)] + [4.0 + i / 10 for i in range(5)]
    _, outcome = fold.apply(rules, begun(rules), observed(range(25), {"loss": losses}))
    assert [(mark.step, mark.code) for mark in outcome.marks] == [(1, "up"), (20, "down")]
    assert [step for step, _ in outcome.changes] == [0, *range(1, 25)]
    assert outcome.marks[0].fields["loss_ema"] < 5.0


def test_a_milestone_is_marked_however_often_it_comes_and_where_nothing_moves():
    rules = rules_of(spec({"type": "plateau", "patience": 0, "factor": 0.5}))
    _, outcome = fold.apply(rules, begun(rules), observed(range(4), {"loss": [1.0] * 4}))
    assert [(mark.step, mark.code) for mark in outcome.marks] == [(1, "reduce"), (2, "reduce"), (3, "reduce")]
    single = {"type": "aees", "lr_candidates": [1.0], "episode_length": 2, "guard": False}
    rules = rules_of(spec(single))
    _, outcome = fold.apply(rules, begun(rules), observed(range(5), {"loss": [1.0, 0.9, 0.8, 0.7, 0.6]}))
    assert [(mark.step, mark.code) for mark in outcome.marks] == [(1, "episode_closed"), (3, "episode_closed")]
    assert all(mark.before == mark.after for mark in outcome.marks)


def test_a_policy_that_asks_is_told_which_decision_was_in_force_at_each_step():
    """Receipts count from the step they name, those that come later for later observations only. What nothing newer
    has changed counts as decided just now."""
    rules = rules_of(spec({"type": "aees", "lr_candidates": [0.5, 1.0], "episode_length": 4}))
    told, step = [], rules.policy.step

    def spy(config, state, seen):
        told.append(seen.applied)
        return step(config, state, seen)

    rules = rules._replace(policy=rules.policy._replace(step=spy))
    run = begun(rules)

    def applied(number, step, decided):
        return Applied(1, (Receipt(number, step, decided, Settings((0.1,) * 3), False, "", 1),))

    for event in (
        observed(range(2), {"loss": [1.0, 1.0]}),
        applied(1, 0, -1),
        applied(2, 4, 1),
        observed(range(2, 6), {"loss": [1.0] * 4}),
        observed(range(6, 8), {"loss": [1.0] * 2}),
        applied(3, 6, 5),
        observed(range(8, 10), {"loss": [1.0] * 2}),
    ):
        run = fold.load(rules, json.loads(json.dumps(fold.dump(run))))
        run, _ = fold.apply(rules, run, event)
    assert told == [None, None, 1, 2, 1, 1, 1, 1, 7, 8]
    assert run.in_force == ((6, 5),)


def test_the_end_of_a_run_lets_the_policy_have_the_last_word_and_changes_nothing():
    rules = rules_of(spec({"type": "aees", "lr_candidates": [0.5, 1.0], "episode_length": 4}))
    run, _ = fold.apply(rules, begun(rules), observed(range(6), {"loss": [1.0] * 6}))
    ended, outcome = fold.apply(rules, run, Ended(1, "finished"))
    assert [(mark.step, mark.code, mark.fields["final"]) for mark in outcome.marks] == [(5, "episode_closed", True)]
    assert ended == run._replace(seq=run.seq + 1, status="finished")
    quiet, outcome = fold.apply(rules_of(spec()), begun(rules_of(spec())), Ended(1, "failed"))
    assert (outcome, quiet.status) == (fold.NOTHING, "failed")


def test_an_arm_that_the_guard_clips_to_what_was_in_force_before_is_still_learnt_from():
    guard = {"max_factor": 1.0}
    rules = rules_of(spec({"type": "aees", "lr_candidates": [1.0, 2.0], "episode_length": 4}, None, guard))
    receipt = Receipt(1, 0, -1, Settings(tuple(group.lr for group in GROUPS)), False, "", 1)
    run, _ = fold.apply(rules, begun(rules), Applied(1, (receipt,)))
    _, outcome = fold.apply(rules, run, observed(range(40), {"loss": [1 / (1 + i) for i in range(40)]}))
    assert {mark.fields["closed_lr_index"] for mark in outcome.marks} == {0, 1}
    assert {mark.code for mark in outcome.marks} == {"episode_closed"}
