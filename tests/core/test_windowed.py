"""Goal: `windowed` does what its specification and the published class do, in every recorded case.

Method: golden cases of both modes; an independent brute-force reading of the rule on random losses; each stated
decision alone; one trace with every code whose states and decisions are spelled out; the edge of every comparison.
"""

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from tests.core.reference import unrolled

from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.windowed import Emergency, Measures, Plan, State, _judge, _jumped, _spiked, measure
from flyball_server.core.state import dump_state
from flyball_server.core.types import Decision, Group, Observation

WINDOWED = POLICIES["windowed"]
TRACES = Path(__file__).parent.parent / "traces"
CASES = {
    f"{mode}/{name}": case
    for mode in ("default", "original")
    for name, case in json.loads((TRACES / "windowed@1" / f"{mode}.json").read_text()).items()
}


def observations(name):
    lines = (TRACES / f"{name}.jsonl").read_text().splitlines()
    return [Observation(**json.loads(line)) for line in lines]


ONE_GROUP = (Group("all", 1e-3),)


def run(config, losses, groups=ONE_GROUP):
    state, decision = WINDOWED.init(config, groups, 0)
    decisions = [decision]
    for step, loss in enumerate(losses):
        state, decision = WINDOWED.step(config, state, Observation(step, loss))
        decisions.append(decision)
    return decisions


@pytest.mark.parametrize("name", CASES)
def test_a_golden_case_is_met_at_every_step(name):
    case = CASES[name]
    original = case["mode"] == "original"
    config = WINDOWED.config(compat=case["mode"], **case["config"])
    groups = tuple(Group(str(i), lr) for i, lr in enumerate(case["groups"]["lrs"]))
    # The published class has no rule for unusable losses, so its cases end where one occurs.
    end = min(case["n"], case["comparable_until"], case.get("overflow_at") or case["n"]) if original else case["n"]
    state, _ = WINDOWED.init(config, groups, 0)
    events = []
    rows = {key: unrolled(case[key], case["n"]) for key in ("lr", "phase", "decision") if key in case}
    assert case["every"] == 1
    for step, seen in enumerate(observations(case["trace"])[:end]):
        state, decision = WINDOWED.step(config, state, seen)
        assert decision.lr == pytest.approx(rows["lr"][step], rel=1e-8), step
        assert decision.momentum is None
        if not original:
            assert (decision.phase, decision.code) == (rows["phase"][step], rows["decision"][step]), step
        fields = decision.fields or {}
        if "decision_original" in fields:
            events.append([step + 1, fields["decision_original"], fields["new_lr"], fields["change_pct"]])
    if original:
        keys = ("step", "decision", "new_lr", "change_pct")
        expected = [[event[key] for key in keys] for event in case["events"] if event["step"] <= end]
        assert [event[:2] for event in events] == [event[:2] for event in expected]
        assert [event[2:] for event in events] == [pytest.approx(event[2:], rel=1e-6) for event in expected]
    if end == case["n"]:
        assert decision.lr == pytest.approx(case["final"]["lr"], rel=1e-8)


def brute_force(losses, window, cooldown, patience, lr):
    """The rule in one piece, after the prose: whole lists, library statistics, a loop over windows."""
    low, high, start = lr / 100, lr * 20, 0
    previous, stuck, last_change, codes = None, 0, 0, []
    for start in range(0, len(losses) - window + 1, window):
        part = losses[start : start + window]
        mean, spread = statistics.fmean(part), statistics.pstdev(part)
        slope = statistics.linear_regression(range(window), part).slope
        cv, factor = spread / max(abs(mean), 1e-12), None
        rate = None if previous is None else (previous - mean) / max(abs(previous), 1e-12)
        if previous is None:
            code = "baseline_window"
        elif start + window - last_change < cooldown:
            code = "cooldown"
        elif mean - previous > (1.2 - 1) * max(abs(previous), 1e-12):
            code, factor = "spike_decrease", 0.5
        elif cv > 0.5:
            code, factor = "unstable_decrease", 0.7
        elif rate > 0.02 and cv < 0.3 and slope < 0 and lr < high:
            code, factor = "increase", 1.1
        elif rate < 0.001:
            code, factor = ("plateau_decrease", 0.7) if stuck + 1 >= patience and lr > low else ("plateau_wait", None)
        else:
            code = "hold"
        stuck = stuck + 1 if code == "plateau_wait" else stuck if code in ("baseline_window", "cooldown") else 0
        if factor is not None:
            new = min(max(lr * factor, low), high)
            code, last_change = (code, start + window) if new != lr else (code + "@bound", last_change)
            lr = new
        previous = mean
        codes.append((code, lr))
    return codes


@pytest.mark.parametrize("trial", range(40))
def test_the_rule_agrees_with_a_brute_force_reading_of_it(trial):
    chance = random.Random(trial)
    window, cooldown, patience = chance.choice([2, 5, 10]), chance.choice([0, 7, 25]), chance.choice([1, 3])
    level, losses = chance.choice([3.0, -3.0, 0.2]), []
    for i in range(1500):
        if i % 100 == 0:
            drift, noise = chance.choice([-0.02, -0.002, 0.0, 0.01]), chance.choice([0.0, 0.02, 0.5, 2.0])
        level += drift
        losses.append(level + noise * chance.gauss(0, 1))
    config = WINDOWED.config(window_size=window, cooldown_steps=cooldown, patience=patience)
    decisions = run(config, losses)[1:]
    got = [(decision.code, decision.lr[0]) for decision in decisions if decision.code != "filling_window"]
    expected = brute_force(losses, window, cooldown, patience, 1e-3)
    assert [code for code, _ in got] == [code for code, _ in expected]
    assert [lr for _, lr in got] == pytest.approx([lr for _, lr in expected], rel=1e-12)


def test_the_measures_of_a_window_are_exact_where_they_must_be():
    for value in (0.1, -3.7, 1e-9, 1e99, 0.0):
        assert measure((value,) * 50, None, False).slope == 0.0
    rounded = (0.05,) * 3  # whose mean is not 0.05
    assert measure(rounded, None, False).mean != 0.05
    assert measure(rounded, None, False).slope == 0.0
    far = measure(tuple(1e9 + 0.25 * i for i in range(100)), 1e9, False)
    assert far.slope == 0.25
    assert far.cv == pytest.approx(statistics.pstdev([0.25 * i for i in range(100)]) / far.mean, rel=1e-12)


def test_the_original_mode_keeps_the_published_class_s_measures():
    assert measure((-1.0, -3.0), 2.0, True)[:2] == (-2.0, 0.0)
    assert [measure((1.0, 1.0), prev, True).rate for prev in (None, 0.0, -1.0, 2.0)] == [0.0, 0.0, 0.0, 0.5]
    falling = [-1.0] * 4 + [-1.1] * 4
    original = {"window_size": 4, "cooldown_steps": 0, "patience": 9}
    assert run(WINDOWED.config(compat="seed", **original), falling)[-1].code == "spike_decrease"
    assert run(WINDOWED.config(**original), falling)[-1].code == "hold"
    assert run(WINDOWED.config(compat="seed", **original), falling)[4].code == "plateau_wait"  # no baseline there
    assert run(WINDOWED.config(**original), falling)[4].code == "baseline_window"


def test_a_spike_halves_unless_it_is_rate_limited():
    losses = [1.0] * 10 + [2.0] * 10
    assert run(WINDOWED.config(window_size=10, cooldown_steps=0), losses)[-1].lr == (5e-4,)
    limited = run(WINDOWED.config(window_size=10, cooldown_steps=0, rate_limit_spike=True), losses)[-1]
    assert limited.lr == pytest.approx((7e-4,))
    assert limited.fields["change_pct"] == pytest.approx(-30)


def test_parameters_follow_the_length_of_the_run():
    short, long = WINDOWED.config(total_steps=100), WINDOWED.config(total_steps=100_000)
    assert (short.window_size, short.warmup_steps, short.patience) == (10, 10, 2)
    assert (long.window_size, long.warmup_steps, long.patience) == (50, 10_000, 20)
    plain, original = WINDOWED.config(), WINDOWED.config(compat="seed")
    assert (plain.window_size, plain.warmup_steps, plain.patience, plain.group_mode) == (50, 0, 20, "ratio")
    assert (original.compat, original.initial_lr, original.lr_min, original.lr_max) == ("original", 5e-5, 1e-7, 1e-2)
    assert (original.rate_limit_spike, original.group_mode) == (True, "same")


def test_warm_up_ends_at_the_full_rate_whether_or_not_losses_arrive():
    decisions = run(WINDOWED.config(warmup_steps=4), [1.0, None, math.nan, 1.0, 1.0])
    assert [d.lr[0] for d in decisions] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert [d.code for d in decisions] == ["initial", "warmup", "warmup", "warmup", "warmup_done", "filling_window"]
    assert [d.phase for d in decisions] == ["warmup"] * 4 + ["adaptive"] * 2


def test_groups_keep_their_ratios_and_a_frozen_group_stays_frozen():
    groups = (Group("frozen", 0.0), Group("body", 1e-3), Group("head", 1e-2))
    losses = [1.0] * 50 + [2.0] * 50
    assert run(WINDOWED.config(), losses, groups)[-1].lr == (0.0, 5e-4, pytest.approx(5e-3))
    assert run(WINDOWED.config(group_mode="same"), losses, groups)[-1].lr == (0.0, 5e-4, 5e-4)


def test_every_third_unusable_loss_cuts_and_empties_the_window():
    config = WINDOWED.config(window_size=3, cooldown_steps=0, lr_min=4e-4)
    decisions = run(config, [1.0, 1.0, math.nan, math.inf, 1e101, None, math.nan, 1.0, 1.0, 1.0] + [math.nan] * 3)
    assert [d.code for d in decisions[1:]] == [
        "filling_window", "filling_window", "nonfinite_hold", "nonfinite_hold", "nonfinite_backoff", "no_loss",
        "nonfinite_hold", "filling_window", "filling_window", "baseline_window",
        "nonfinite_hold", "nonfinite_hold", "nonfinite_backoff",
    ]  # fmt: skip
    assert [decisions[5].lr, decisions[-1].lr] == [(5e-4,), (4e-4,)]


def test_the_emergency_brake_acts_within_the_window_only_when_asked_for():
    losses = [1.0, 1.0, 1.0, 1.4, 1.8]
    assert run(WINDOWED.config(), losses)[-1].code == "filling_window"
    braked = run(WINDOWED.config(emergency=Emergency()), losses)[-1]
    assert (braked.code, braked.lr) == ("emergency", (5e-4,))
    assert run(WINDOWED.config(emergency=Emergency()), [*losses[:3], 1.6])[-1].code == "emergency"
    assert run(WINDOWED.config(emergency=Emergency(min_samples=5)), [*losses[:3], 1.6])[-1].code == "filling_window"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"window_size": 10_001}, "window_size: 10001 .* at most 10000"),
        ({"lr_min": 1e-2, "lr_max": 1e-3}, "lr_min: 0.01 is above lr_max"),
        ({"use_moe": True, "lr_max": 1e-6}, "lr_min: 1e-05 is above lr_max"),
        ({"compat": "original", "warmup_steps": 5}, "warmup_steps: 5.*base schedule"),
        ({"decrease_factor": 1.5}, "decrease_factor: 1.5 .* at most 1"),
        ({"patience": 0}, "patience: 0 .* at least 1"),
        ({"emergency": {"factor": 0.5}}, "emergency"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_the_remedy(parameters, words):
    with pytest.raises(ValueError, match=words):
        WINDOWED.config(**parameters)


def braked(bad_run, old, new, change):
    return {"bad_run": bad_run, "old_lr": old, "new_lr": new, "change_pct": change}


#: loss, code, LR, window, last mean, [since, waited, n, adjustments, bad_run], and the fields: of a window's judgement
#: (change_pct, improvement_rate, cv, trend) and, where it moved, the word of the published class.
TRACE = [
    (4.0, "filling_window", 0.75, (4.0,), None, [1, 0, 1, 0, 0], None),
    (4.0, "baseline_window", 0.75, (), 4.0, [2, 0, 2, 0, 0], (0.0, None, 0.0, 0.0)),
    (4.0, "filling_window", 0.75, (4.0,), 4.0, [3, 0, 3, 0, 0], None),
    (4.0, "plateau_wait", 0.75, (), 4.0, [4, 1, 4, 0, 0], (0.0, 0.0, 0.0, 0.0)),
    (4.0, "filling_window", 0.75, (4.0,), 4.0, [5, 1, 5, 0, 0], None),
    (4.0, "plateau_decrease", 0.5625, (), 4.0, [0, 0, 6, 1, 0], (-25.0, 0.0, 0.0, 0.0, "decrease")),
    (None, "no_loss", 0.5625, (), 4.0, [0, 0, 6, 1, 0], None),
    (4.0, "filling_window", 0.5625, (4.0,), 4.0, [1, 0, 7, 1, 0], None),
    (4.0, "cooldown", 0.5625, (), 4.0, [2, 0, 8, 1, 0], (0.0, 0.0, 0.0, 0.0)),
    (3.5, "filling_window", 0.5625, (3.5,), 4.0, [3, 0, 9, 1, 0], None),
    (3.0, "increase", 0.703125, (), 3.25, [0, 0, 10, 2, 0], (25.0, 0.1875, 0.25 / 3.25, -0.5, "increase")),
    (math.nan, "nonfinite_hold", 0.703125, (), 3.25, [0, 0, 11, 2, 1], {"bad_run": 1}),
    (math.nan, "nonfinite_backoff", 0.3515625, (), 3.25, [0, 0, 12, 2, 2], braked(2, 0.703125, 0.3515625, -50.0)),
    (4.0, "filling_window", 0.3515625, (4.0,), 3.25, [1, 0, 13, 2, 0], None),
    (4.0, "cooldown", 0.3515625, (), 4.0, [2, 0, 14, 2, 0], (0.0, -0.75 / 3.25, 0.0, 0.0)),
    (4.0, "filling_window", 0.3515625, (4.0,), 4.0, [3, 0, 15, 2, 0], None),
    (4.0, "plateau_wait", 0.3515625, (), 4.0, [4, 1, 16, 2, 0], (0.0, 0.0, 0.0, 0.0)),
    (1.0, "filling_window", 0.3515625, (1.0,), 4.0, [5, 1, 17, 2, 0], None),
    (7.0, "unstable_decrease", 0.263671875, (), 4.0, [0, 0, 18, 3, 0], (-25.0, 0.0, 0.75, 6.0, "decrease")),
    (4.0, "filling_window", 0.263671875, (4.0,), 4.0, [1, 0, 19, 3, 0], None),
    (4.0, "cooldown", 0.263671875, (), 4.0, [2, 0, 20, 3, 0], (0.0, 0.0, 0.0, 0.0)),
    (8.0, "filling_window", 0.263671875, (8.0,), 4.0, [3, 0, 21, 3, 0], None),
    (8.0, "spike_decrease", 0.25, (), 8.0, [0, 0, 22, 4, 0], (-100 * 7 / 135, -1.0, 0.0, 0.0, "spike_decrease")),
    (8.0, "filling_window", 0.25, (8.0,), 8.0, [1, 0, 23, 4, 0], None),
    (8.0, "cooldown", 0.25, (), 8.0, [2, 0, 24, 4, 0], (0.0, 0.0, 0.0, 0.0)),
    (8.0, "filling_window", 0.25, (8.0,), 8.0, [3, 0, 25, 4, 0], None),
    (7.8125, "hold", 0.25, (), 7.90625, [4, 0, 26, 4, 0], (0.0, 0.01171875, 0.09375 / 7.90625, -0.1875)),
    (16.0, "filling_window", 0.25, (16.0,), 7.90625, [5, 0, 27, 4, 0], None),
    (16.0, "spike_decrease@bound", 0.25, (), 16.0, [6, 0, 28, 4, 0], (0.0, -8.09375 / 7.90625, 0.0, 0.0)),
    (math.nan, "nonfinite_hold", 0.25, (), 16.0, [6, 0, 29, 4, 1], {"bad_run": 1}),
    (1.0, "filling_window", 0.25, (1.0,), 16.0, [7, 0, 30, 4, 0], None),
    (math.nan, "nonfinite_hold", 0.25, (1.0,), 16.0, [7, 0, 31, 4, 1], {"bad_run": 1}),
    (math.nan, "nonfinite_backoff", 0.25, (), 16.0, [0, 0, 32, 4, 2], braked(2, 0.25, 0.25, 0.0)),
]  # fmt: skip


def test_every_code_has_the_state_and_the_numbers_of_its_place():
    """Two losses per window, a cooldown of three, patience of two windows, LR within 1/4 and 7/8."""
    config = WINDOWED.config(
        window_size=2, cooldown_steps=3, patience=2, lr_min=0.25, lr_max=0.875, initial_lr=0.75, bad_limit=2,
        increase_factor=1.25, decrease_factor=0.75,
    )  # fmt: skip
    state, decision = WINDOWED.init(config, (Group("frozen", 0.0), Group("body", 1.0), Group("head", 0.5)), 0)
    plan = [0, 2, 2, 0.25, 0.875, [0.0, 1.0, 0.5]]
    assert dump_state(state) == [0.75, [0.0, 0.75, 0.375], [], None, 0, 0, 0, 0, 0, plan]
    assert decision == Decision((0.0, 0.75, 0.375), None, None, "adaptive", "initial")
    for step, (loss, code, lr, window, previous, counters, fields) in enumerate(TRACE):
        moved, before = lr != state.lr, state.lrs
        if isinstance(fields, tuple):
            names = ("change_pct", "improvement_rate", "cv", "trend", "decision_original")
            fields = dict(zip(names, fields, strict=False)) | {"old_lr": state.lr, "new_lr": lr, "pc": counters[1]}
            fields |= {"loss_avg": previous, "prev_avg": state.prev}
        state, decision = WINDOWED.step(config, state, Observation(step, loss))
        lrs = (0.0, lr, lr / 2)
        assert dump_state(state) == [lr, [*lrs], [*window], previous, *counters, plan], step
        assert decision == Decision(lrs, None, None, "adaptive", code, fields, moved), step
        assert decision.milestone is moved
        assert (decision.lr is before) is not moved


@pytest.mark.parametrize(
    ("code", "fields", "sentence"),
    [
        ("initial", None, "Starting with the initial learning rate, or the first step of the warm-up to it."),
        ("filling_window", None, "Collecting a window of 7 losses before the next judgement."),
        ("baseline_window", {"loss_avg": 2.0, "cv": 1.0}, "First full window: mean loss 2 is the baseline."),
        (
            "baseline_window",
            {"loss_avg": 2.0, "cv": 1.01},
            "First full window: mean loss 2 is the baseline. "
            "Its spread exceeds its mean: relative measures mean little for a loss around zero.",
        ),
        (
            "unstable_decrease",
            {"cv": 1.25, "old_lr": 1.0, "new_lr": 0.75, "change_pct": -25.0},
            "Unstable loss, cv=1.25 > instability_threshold=0.5: learning rate 1 -> 0.75 (-25 %).",
        ),
        (
            "spike_decrease@bound",
            {"loss_avg": 2.0, "prev_avg": 1.0, "old_lr": 1.0, "new_lr": 1.0, "change_pct": 0.0},
            "Loss spike, avg 2 vs previous 1: learning rate 1 -> 1 (+0 %), the bound it is already at.",
        ),
    ],
)
def test_its_sentences_hold_the_parameters_and_the_numbers(code, fields, sentence):
    decision = Decision((1.0,), None, None, "adaptive", code, fields)
    assert WINDOWED.explain(WINDOWED.config(window_size=7), decision) == sentence


ORIGINAL = {"compat": "original"}


@pytest.mark.parametrize(
    ("parameters", "window", "warmup", "patience"),
    [
        ({}, 50, 0, 20),
        ({"total_steps": 219}, 10, 21, 3),
        ({"total_steps": 220}, 11, 22, 3),
        ({"total_steps": 999}, 49, 99, 3),
        ({"total_steps": 1020}, 50, 102, 3),
        ({"total_steps": 1000, "patience_unit": "steps"}, 50, 100, 150),
        ({"total_steps": 5277}, 50, 527, 19),
        ({"total_steps": 6000}, 50, 600, 20),
        ({"total_steps": 100, "window_size": 4}, 4, 10, 4),
        ({"total_steps": 100, "window_size": 4, "warmup_steps": 0}, 4, 0, 5),
        ({"total_steps": 100, "patience": 7}, 10, 10, 7),
        ({"patience_unit": "steps"}, 50, 0, 20),
        ({**ORIGINAL, "total_steps": 400}, 20, 0, 20),
        ({**ORIGINAL, "total_steps": 400, "patience_unit": "steps"}, 20, 0, 20),
        ({**ORIGINAL, "warmup_steps": 0}, 50, 0, 20),
    ],
)
def test_window_warm_up_and_patience_follow_the_length_of_the_run(parameters, window, warmup, patience):
    config = WINDOWED.config(**parameters)
    assert (config.window_size, config.warmup_steps, config.patience) == (window, warmup, patience)


def test_the_original_mode_fills_in_its_own_numbers_only_where_none_are_given():
    given = {"initial_lr": 1e-3, "lr_min": 1e-4, "lr_max": 2e-3, "rate_limit_spike": False, "group_mode": "ratio"}
    for compat in ("original", "seed"):
        config = WINDOWED.config(compat=compat, **given)
        assert {name: getattr(config, name) for name in given} == given
        assert config.compat == "original"
    plain = WINDOWED.config()
    assert (plain.compat, plain.initial_lr, plain.lr_min, plain.lr_max) == ("default", None, None, None)
    assert (plain.rate_limit_spike, plain.group_mode) == (False, "ratio")
    same = WINDOWED.config(rate_limit_spike=True, group_mode="same")
    assert (same.rate_limit_spike, same.group_mode) == (True, "same")


@pytest.mark.parametrize(
    ("parameters", "lr", "plan"),
    [
        ({}, 1e-3, (0, 50, 20, 1e-5, 2e-2)),
        ({"initial_lr": 2.0}, 2.0, (0, 50, 20, 0.02, 40.0)),
        ({"lr_min": 0.5, "lr_max": 0.75}, 0.5, (0, 50, 20, 0.5, 0.75)),
        ({"lr_min": 1e-4, "lr_max": 5e-4}, 5e-4, (0, 50, 20, 1e-4, 5e-4)),
        ({"lr_min": 1e-3, "lr_max": 1e-3}, 1e-3, (0, 50, 20, 1e-3, 1e-3)),
        ({"use_moe": True, "initial_lr": 1.0, "lr_min": 1e-6, "lr_max": 2.0}, 2e-3, (0, 50, 20, 1e-5, 2e-3)),
        ({"use_moe": True, "lr_min": 1e-4, "lr_max": 1e-3}, 1e-3, (0, 50, 20, 1e-4, 1e-3)),
        ({"warmup_steps": 4, "patience": 101, "patience_unit": "steps"}, 1e-3, (4, 50, 3, 1e-5, 2e-2)),
        ({"patience": 100, "patience_unit": "steps"}, 1e-3, (0, 50, 2, 1e-5, 2e-2)),
        ({**ORIGINAL}, 5e-5, (0, 50, 20, 1e-7, 1e-2)),
        ({**ORIGINAL, "initial_lr": 1.0, "patience": 3}, 1.0, (0, 50, 3, 1e-7, 1e-2)),  # not clamped there
    ],
)
def test_what_follows_from_parameters_and_groups_is_worked_out_once(parameters, lr, plan):
    state, decision = WINDOWED.init(WINDOWED.config(**parameters), ONE_GROUP, 0)
    assert state.plan == (*plan, (1.0,))
    first = lr / plan[0] if plan[0] else lr
    assert state == State(lr, (first,), (), None, 0, 0, 0, 0, 0, state.plan)
    phase = "warmup" if plan[0] else "adaptive"
    assert decision == Decision((first,), None, None, phase, "initial")


def test_a_warm_up_counts_observations_and_nothing_else():
    config = WINDOWED.config(warmup_steps=3, initial_lr=0.75)
    state, _ = WINDOWED.init(config, ONE_GROUP, 0)
    plan = state.plan
    state = state._replace(window=(7.0,), prev=2.0, since=3, waited=4, adjustments=5, bad_run=6)
    for n, lr, phase, code in (
        (1, 0.5, "warmup", "warmup"),
        (2, 0.75, "warmup", "warmup"),
        (3, 0.75, "adaptive", "warmup_done"),
    ):
        state, decision = WINDOWED.step(config, state, Observation(n))
        assert state == State(0.75, (lr,), (7.0,), 2.0, 3, 4, n, 5, 6, plan)
        assert decision == Decision((lr,), None, None, phase, code, {"n": n, "warmup_steps": 3})
    assert WINDOWED.explain(config, decision) == "Warm-up finished after 3 steps: full learning rate from here on."


@pytest.mark.parametrize(
    ("loss", "code"),
    [
        (1e100, "filling_window"),
        (-1e100, "filling_window"),
        (1.001e100, "nonfinite_hold"),
        (-1.001e100, "nonfinite_hold"),
    ],
)
def test_a_loss_is_usable_up_to_the_largest_signal(loss, code):
    assert run(WINDOWED.config(), [loss])[-1].code == code


def test_where_every_group_is_frozen_a_cut_is_no_change():
    decision = run(WINDOWED.config(bad_limit=1), [math.nan], (Group("frozen", 0.0),))[-1]
    assert decision == Decision((0.0,), None, None, "adaptive", "nonfinite_backoff", braked(1, 0.0, 0.0, 0.0))


def test_a_cut_never_raises_a_learning_rate_that_began_below_the_bound():
    config = WINDOWED.config(compat="original", initial_lr=1e-8, bad_limit=1, emergency=Emergency(min_samples=2))
    assert run(config, [math.nan])[-1].lr == (1e-8,)
    assert run(config, [1.0, 9.0])[-1].lr == (1e-8,)


@pytest.mark.parametrize(
    ("window", "prev", "original", "expected"),
    [
        ((1.0, 3.0), 4.0, False, (2.0, 0.5, 2.0, 0.5)),
        ((-1.0, -3.0), -4.0, False, (-2.0, 0.5, -2.0, -0.5)),
        ((-1.0, 1.0), 0.0, False, (0.0, 1e12, 2.0, 0.0)),
        ((1.0, 1.0), 0.0, False, (1.0, 0.0, 0.0, -1e12)),
        ((0.0, 0.0, 6.0), None, False, (2.0, 2**0.5, 3.0, None)),
        ((1.0, 3.0), 4.0, True, (2.0, 0.5, 2.0, 0.5)),
        ((-1.0, 1.0), 0.5, True, (0.0, 0.0, 2.0, 1.0)),
        ((0.25, 0.75), 0.5, True, (0.5, 0.5, 0.5, 0.0)),
        ((-1.0, -3.0), -4.0, True, (-2.0, 0.0, -2.0, 0.0)),
    ],
)
def test_the_measures_of_small_windows(window, prev, original, expected):
    *measured, rate = measure(window, prev, original)
    assert measured == pytest.approx(expected[:3], rel=1e-15)
    assert rate == (None if expected[3] is None else pytest.approx(expected[3], rel=1e-15))


@pytest.mark.parametrize(
    ("mean", "prev", "default", "original"),
    [
        (9.0, None, False, False),
        (6.0, 4.0, False, False),
        (6.001, 4.0, True, True),
        (-2.0, -4.0, False, True),
        (-1.999, -4.0, True, True),
        (-6.0, -4.0, False, False),
        (-5.999, -4.0, False, True),
        (0.5e-12, 0.0, False, False),
        (0.51e-12, 0.0, True, False),
        (1.5, 1.0, False, False),
        (0.76, 0.5, True, True),
    ],
)
def test_a_spike_is_what_lies_above_the_threshold(mean, prev, default, original):
    assert _spiked(WINDOWED.config(spike_threshold=1.5), mean, prev) is default
    assert _spiked(WINDOWED.config(compat="original", spike_threshold=1.5), mean, prev) is original


RISING = Measures(4.0, 0.125, -0.5, 0.5)


@pytest.mark.parametrize(
    ("seen", "state", "expected"),
    [
        ({"rate": None, "cv": 9.0}, {"waited": 1}, ("baseline_window", 1.0, 1)),
        ({}, {"since": 8, "waited": 1}, ("cooldown", 1.0, 1)),
        ({}, {"since": 9, "waited": 1}, ("increase", 1.25, 0)),
        ({"mean": 6.0}, {"waited": 1}, ("increase", 1.25, 0)),
        ({"mean": 6.01, "cv": 9.0}, {"waited": 1}, ("spike_decrease", 0.5, 0)),
        ({"cv": 0.75}, {}, ("hold", 1.0, 0)),
        ({"cv": 0.76}, {"waited": 1}, ("unstable_decrease", 0.75, 0)),
        ({"cv": 0.25}, {}, ("hold", 1.0, 0)),
        ({"cv": 0.249}, {}, ("increase", 1.25, 0)),
        ({"slope": 0.0}, {}, ("hold", 1.0, 0)),
        ({"slope": 0.5}, {}, ("hold", 1.0, 0)),
        ({"slope": -1e-9}, {}, ("increase", 1.25, 0)),
        ({"rate": 0.25}, {"waited": 1}, ("hold", 1.0, 0)),
        ({"rate": 0.26}, {}, ("increase", 1.25, 0)),
        ({}, {"lr": 2.0}, ("hold", 1.0, 0)),
        ({}, {"lr": 1.99}, ("increase", 1.25, 0)),
        ({"rate": 0.125}, {"waited": 2}, ("hold", 1.0, 0)),
        ({"rate": 0.124}, {"waited": 1}, ("plateau_wait", 1.0, 2)),
        ({"rate": 0.124}, {"waited": 2}, ("plateau_decrease", 0.75, 0)),
        ({"rate": 0.124}, {"waited": 2, "lr": 0.5}, ("plateau_wait", 1.0, 3)),
        ({"rate": 0.124}, {"waited": 2, "lr": 0.51}, ("plateau_decrease", 0.75, 0)),
    ],
)
def test_the_first_check_that_matches_decides_and_its_edge_is_exact(seen, state, expected):
    parameters = {
        "cooldown_steps": 10, "spike_threshold": 1.5, "instability_threshold": 0.75, "stability_threshold": 0.25,
        "increase_threshold": 0.25, "plateau_threshold": 0.125, "increase_factor": 1.25, "decrease_factor": 0.75,
    }  # fmt: skip
    before = State(1.0, (1.0,), (), 4.0, 50, 0, 0, 0, 0, ())._replace(**state)
    plan = Plan(0, 2, 3, 0.5, 2.0, (1.0,))
    config = WINDOWED.config(**parameters)
    assert _judge(config, before, plan, RISING._replace(**seen)) == expected
    moe = WINDOWED.config(**parameters, use_moe=True, moe_increase_factor=1.5, moe_decrease_factor=0.25)
    factor = {1.25: 1.5, 0.75: 0.25}.get(expected[1], expected[1])
    assert _judge(moe, before, plan, RISING._replace(**seen)) == (expected[0], factor, expected[2])


def test_one_decision_moves_no_further_than_max_change_per_step():
    steep = {"window_size": 2, "cooldown_steps": 0, "initial_lr": 1.0, "max_change_per_step": 0.25}
    up = WINDOWED.config(**steep, increase_factor=2.0)
    assert run(up, [1.0, 1.0, 0.9, 0.8])[-1].lr == (1.25,)
    down = WINDOWED.config(**steep, decrease_factor=0.125, patience=1)
    assert run(down, [1.0] * 4)[-1].lr == (0.75,)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((1.0, 1.0), False),  # too few
        ((1.0, 1.0, 2.0), False),  # at the ratio itself
        ((1.0, 1.0, 2.001), True),
        ((9.0, 1.0, 1.0, 1.0, 2.001), True),  # of the three before only
        ((9.0, 9.0, 1.0, 1.0, 1.0, 2.0), False),
        ((1.0, 2.0, 6.0, 6.0), False),
        ((1.0, 2.0, 6.0, 6.001), True),
        ((-1.0, -1.0, 9.0), False),
        ((0.0, 0.0, 9.0), False),
        ((0.25, 0.25, 9.0), True),
    ],
)
def test_the_brake_compares_with_the_mean_of_the_three_losses_before(window, expected):
    assert _jumped(Emergency(ratio=2.0, min_samples=3), window) is expected


def test_a_braked_window_is_dropped_and_the_numbers_are_told():
    config = WINDOWED.config(
        window_size=9, initial_lr=1.0, lr_min=0.25, bad_limit=9, emergency=Emergency(factor=0.375, min_samples=3)
    )
    state, _ = WINDOWED.init(config, (Group("body", 1.0), Group("head", 0.5)), 0)
    state = state._replace(prev=2.0, waited=4, adjustments=5, n=6)
    for step, loss in enumerate((9.0, 1.0, math.nan, 2.0, 3.0)):
        state, decision = WINDOWED.step(config, state, Observation(step, loss))
    assert (decision.code, state.bad_run, state.since) == ("filling_window", 0, 4)
    state, _ = WINDOWED.step(config, state, Observation(5, math.nan))
    state, decision = WINDOWED.step(config, state, Observation(6, 4.0))
    assert state == State(0.375, (0.375, 0.1875), (), 2.0, 0, 4, 13, 6, 0, state.plan)
    numbers = {"old_lr": 1.0, "new_lr": 0.375, "change_pct": -62.5, "loss": 4.0, "mean_before": 2.0}
    assert decision == Decision((0.375, 0.1875), None, None, "adaptive", "emergency", numbers, True)
    for loss, lr, adjustments in (
        (1.0, 0.375, 6),
        (1.0, 0.375, 6),
        (4.0, 0.25, 7),
        (1.0, 0.25, 7),
        (1.0, 0.25, 7),
        (4.0, 0.25, 7),
    ):
        before = state
        state, decision = WINDOWED.step(config, state, Observation(9, loss))
        assert (state.lr, decision.lr, state.adjustments) == (lr, (lr, lr / 2), adjustments)
        assert decision.milestone is (lr != before.lr)
        assert (decision.lr is before.lrs) is (lr == before.lr)
    numbers = {"old_lr": 0.25, "new_lr": 0.25, "change_pct": 0.0, "loss": 4.0, "mean_before": 1.0}
    assert (decision.code, decision.fields) == ("emergency", numbers)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"compat": "original", "warmup_steps": 5},
            "warmup_steps: 5, but compat='original' has no warm-up of its own; "
            "remove it, or declare a base schedule with warmup_steps",
        ),
        (
            {"lr_min": 1e-2, "lr_max": 1e-3},
            "lr_min: 0.01 is above lr_max = 0.001; give both, with lr_min <= lr_max",
        ),
        ({"use_moe": True, "lr_min": 0.5}, "lr_min: 0.5 is above lr_max = 0.002; give both, with lr_min <= lr_max"),
        (
            {"use_moe": True, "moe_lr_min": 0.5},
            "lr_min: 0.5 is above lr_max = 0.002; give both, with lr_min <= lr_max",
        ),
    ],
)
def test_a_refusal_says_what_to_give_instead(parameters, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        WINDOWED.config(**parameters)
    assert WINDOWED.config(lr_min=0.5).lr_min == WINDOWED.config(lr_min=0.5, lr_max=0.5).lr_max == 0.5


def test_bounds_that_leave_nothing_for_these_groups_are_refused_at_attach():
    with pytest.raises(ValueError, match=r"lr_min: 0\.5 is above lr_max"):
        WINDOWED.init(WINDOWED.config(lr_min=0.5), ONE_GROUP, 0)
