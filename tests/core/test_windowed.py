"""Goal: `windowed` does what its specification and the published class do, in every recorded case.

Method: golden cases of both modes; an independent brute-force reading of the rule on random losses; each stated
decision alone.
"""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.windowed import Emergency, measure
from flyball_server.core.types import Group, Observation

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


def unrolled(rows, n):
    """Run-length rows [[step, value], ...] as one value per step."""
    values = []
    for (step, value), (end, _) in zip(rows, [*rows[1:], (n, None)], strict=True):
        values += [value] * (end - step)
    return values


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


def test_bounds_that_leave_nothing_for_these_groups_are_refused_at_attach():
    with pytest.raises(ValueError, match=r"lr_min: 0\.5 is above lr_max"):
        WINDOWED.init(WINDOWED.config(lr_min=0.5), ONE_GROUP, 0)
