"""Goal: `greedy` is transformers' GreedyLR, except for what makes it safe.

Method: random metric traces through transformers' own class beside ours, with the same absolute bounds; then every
threshold where equality is exact, each stated difference alone, and one run with its whole state and every sentence.
"""

import math
import random
import re
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from transformers.optimization import GreedyLR

from flyball_server.core.policies import POLICIES
from flyball_server.core.state import dump_state
from flyball_server.core.types import Group, Observation

GREEDY = POLICIES["greedy"]
ONE_GROUP = (Group("all", 1.0),)
TWO_GROUPS = (Group("body", 0.5), Group("head", 0.01))
#: Everything at once and by powers of two.
QUICK = {"patience": 0, "factor": 0.5}


def run(losses, groups=ONE_GROUP, signals=None, **parameters):
    config = GREEDY.config(**parameters)
    state, decision = GREEDY.init(config, groups, 0)
    decisions = [decision]
    for step, loss in enumerate(losses):
        state, decision = GREEDY.step(config, state, Observation(step, loss, others=signals and signals[step]))
        assert (decision.momentum, decision.noise_std) == (None, None)
        assert GREEDY.explain(config, decision).endswith(".")
        decisions.append(decision)
    return decisions


def codes(losses, **parameters):
    return [decision.code for decision in run(losses, **parameters)[1:]]


def lrs(losses, **parameters):
    return [decision.lr[0] for decision in run(losses, **parameters)[1:]]


def published(values, groups, **parameters):
    opt = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": group.lr} for group in groups], lr=1.0)
    scheduler = GreedyLR(opt, **parameters)
    rows = [tuple(group["lr"] for group in opt.param_groups)]
    for value in values:
        scheduler.step(value)
        rows.append(tuple(group["lr"] for group in opt.param_groups))
    return rows


# ---- the published class ----------------------------------------------------------------------------------


def random_metric(chance, n):
    level, values = 50.0, []
    for i in range(n):
        if i % 80 == 0:
            drift, noise = chance.choice([-0.02, -0.004, 0.0, 0.01]), chance.choice([0.0, 0.0, 0.001, 0.1])
        level = min(max(0.01, level * (1 + drift * chance.random())), 1e6)
        values.append(level * (1 + noise * chance.random()))
    return values


def random_trial(trial):
    """Parameters, the bounds of a group with LR 1, and a metric."""
    chance = random.Random(trial)
    parameters = {
        "mode": chance.choice(["min", "min", "max"]),
        "factor": chance.choice([0.5, 0.9, 0.95]),
        "patience": chance.choice([0, 1, 3, 10]),
        "threshold": chance.choice([0.0, 1e-6, 0.05]),
        "threshold_mode": chance.choice(["rel", "abs"]),
        "cooldown": chance.choice([0, 1, 5]),
        "warmup": chance.choice([0, 1, 5]),
        "eps": 0.0,
        "smooth": chance.choice([False, True]),
        "window_size": chance.choice([1, 2, 7, 50]),
        "reset_start": chance.choice([1, 2, 5, 500]),
    }
    return parameters, chance.choice([0.1, 0.8, 1.0]), chance.choice([1.0, 1.5, 10.0]), random_metric(chance, 800)


@pytest.mark.parametrize("groups", [TWO_GROUPS[:1], TWO_GROUPS], ids=["one group", "two groups"])
@pytest.mark.parametrize("trial", range(60))
def test_every_lr_equals_the_published_class_s_on_a_random_metric(trial, groups):
    parameters, low, high, values = random_trial(trial)
    bounds = {"min_lr": [group.lr * low for group in groups], "max_lr": [group.lr * high for group in groups]}
    expected = published(values, groups, **parameters, **bounds)
    got = [one.lr for one in run(values, groups, **parameters, min_lr=0.5 * low, max_lr=0.5 * high)]
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-12), step


def test_the_random_metrics_lead_to_every_move():
    met, moving = set(), 0
    for trial in range(60):
        parameters, low, high, values = random_trial(trial)
        decisions = run(values, **parameters, min_lr=low, max_lr=high)
        met |= {one.code for one in decisions}
        moving += len({one.lr for one in decisions}) > 3
    assert met == set(GREEDY.codes) - {"no_loss", "no_metric", "nonfinite_hold", "nonfinite_backoff"}
    assert moving > 30


def test_with_the_published_defaults_and_a_usual_lr_only_ours_goes_down_on_a_rising_loss():
    groups = (Group("all", 1e-4),)
    rising = [1 + 0.01 * i for i in range(900)]
    assert published(rising, groups)[-1] == (1e-4,)
    assert run(rising, groups)[-1].lr[0] < 2e-6
    falling = [100 * 0.99**i for i in range(1300)]
    assert published(falling, groups)[-1][0] > 0.01
    assert run(falling, groups)[-1].lr == (1e-3,)


# ---- what an improvement is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "how", "best", "same", "better"),
    [
        ("min", "abs", 1.0, 0.75, 0.75 - 2**-30),
        ("max", "abs", 1.0, 1.25, 1.25 + 2**-30),
        ("min", "abs", -1.0, -1.25, -1.25 - 2**-30),
        ("max", "abs", -1.0, -0.75, -0.75 + 2**-30),
        ("min", "rel", 2.0, 1.5, 1.5 - 2**-30),
        ("max", "rel", 2.0, 2.5, 2.5 + 2**-30),
        ("min", "rel", 0.5, 0.375, 0.375 - 2**-30),
        ("max", "rel", 0.5, 0.625, 0.625 + 2**-30),
        ("min", "rel", -2.0, -2.5, -2.5 - 2**-30),  # a part of |best|, where the published class accepts -1.6
        ("max", "rel", -2.0, -1.5, -1.5 + 2**-30),
        ("min", "rel", 0.0, 0.0, -(2**-30)),
        ("max", "rel", 0.0, 0.0, 2**-30),
    ],
)
def test_a_value_at_the_threshold_is_no_improvement_and_one_beyond_it_is(mode, how, best, same, better):
    parameters = {"mode": mode, "threshold": 0.25, "threshold_mode": how}
    assert codes([best, same], **parameters) == ["first", "waiting"]
    assert codes([best, better], **parameters) == ["first", "improved"]


def test_the_default_threshold_is_absolute():
    assert codes([0.0, -1e-6, -1.1e-6]) == ["first", "waiting", "improved"]


def test_smoothing_judges_the_mean_of_the_newest_values():
    decisions = run([4.0, 2.0, 6.0, 1.0], smooth=True, window_size=2)[1:]
    assert [one.fields["metric"] for one in decisions] == [4.0, 3.0, 4.0, 3.5]
    assert [one.code for one in decisions] == ["first", "improved", "waiting", "waiting"]
    spiked = run([1.0, 1e99, 0.1, 0.2], smooth=True, window_size=2)[-1]
    assert spiked.fields["metric"] == (0.1 + 0.2) / 2  # the published running sum would be left with 0
    assert GREEDY.explain(GREEDY.config(smooth=True), spiked).startswith("The mean loss ")
    assert GREEDY.explain(GREEDY.config(), run([1.0])[-1]) == "First value of loss: 1."


# ---- moves ------------------------------------------------------------------------------------------------


def test_more_than_patience_in_a_row_move_the_lr_and_counting_begins_anew():
    falling = run([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], patience=2, factor=0.5)[1:]
    assert [one.code for one in falling] == ["first", "improved", "increase", "improved", "improved", "increase"]
    assert [one.lr[0] for one in falling] == [1.0, 1.0, 2.0, 2.0, 2.0, 4.0]
    assert falling[2].fields == {"metric": 7.0, "best": 8.0, "good": 3, "bad": 0, "old_lr": 1.0, "new_lr": 2.0}
    rising = run([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], patience=2, factor=0.5)[1:]
    assert [one.code for one in rising] == ["first", "waiting", "waiting", "reduce", "waiting", "waiting", "reduce"]
    assert [one.lr[0] for one in rising] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert rising[3].fields == {"metric": 4.0, "best": 1.0, "good": 0, "bad": 3, "old_lr": 1.0, "new_lr": 0.5}
    assert rising[0].fields == {"metric": 1.0, "best": None, "good": 1, "bad": 0}


def test_an_improvement_and_a_failure_end_each_other_s_row():
    assert codes([9.0, 8.0, 8.0, 7.0, 7.0, 7.0, 6.0], patience=2) == [
        "first", "improved", "waiting", "improved", "waiting", "waiting", "improved",
    ]  # fmt: skip


def test_a_rising_loss_lowers_the_lr_however_long_ago_the_best_was_and_never_past_the_floor():
    falling, level = [100 * 0.9**i for i in range(60)], 100 * 0.9**59
    values = falling + [level * (1 + 0.001 * i) for i in range(1, 3000)]
    seen = lrs(values)
    assert max(seen) == seen[60] > 1
    assert all(after <= before for before, after in pairwise(seen[60:]))
    assert seen[-1] == 0.01


def test_the_bounds_are_never_crossed_and_said_to_be_reached():
    falling = run([8.0, 7.0, 6.0, 5.0], **QUICK, max_lr=3.0)[1:]
    assert [(one.code, one.lr[0]) for one in falling] == [
        ("increase", 2.0), ("increase", 3.0), ("increase@bound", 3.0), ("increase@bound", 3.0),
    ]  # fmt: skip
    assert falling[3].lr is falling[1].lr
    rising = run([1.0, 2.0, 3.0, 4.0, 5.0], **QUICK, max_lr=1.0, min_lr=0.3)[1:]
    assert [(one.code, one.lr[0]) for one in rising] == [
        ("increase@bound", 1.0), ("reduce", 0.5), ("reduce", 0.3), ("reduce@bound", 0.3), ("reduce@bound", 0.3),
    ]  # fmt: skip
    assert rising[4].lr is rising[2].lr


def test_bounds_are_by_default_a_hundredth_and_ten_times_the_reference_lr():
    chance = random.Random(0)
    groups = (Group("frozen", 0.0), Group("body", 3e-5), Group("head", 6e-4))
    seen = [one.lr for one in run([chance.random() for _ in range(400)], groups, **QUICK)]
    seen += [one.lr for one in run([-float(i) for i in range(400)], groups, **QUICK)]
    assert (min(lr[1] for lr in seen), max(lr[1] for lr in seen)) == (3e-5 / 100, 3e-5 * 10)
    assert all(lr[0] == 0.0 and lr[2] == pytest.approx(20 * lr[1], rel=1e-12) for lr in seen)


def test_a_cooldown_follows_a_cut_and_a_warm_up_a_rise_and_both_count_nothing():
    down = run([1.0, 2.0, 2.0, 0.5, 2.0, 2.0], patience=1, factor=0.5, cooldown=2)[1:]
    assert [one.code for one in down] == ["first", "waiting", "reduce", "cooldown", "cooldown", "waiting"]
    assert [one.phase for one in down] == ["track", "track", "cooldown", "cooldown", "track", "track"]
    assert down[5].fields["best"] == 1.0  # what was seen in the cooldown is not the best
    up = run([9.0, 8.0, 7.0, 6.0, 7.5, 6.5, 5.5], patience=1, factor=0.5, warmup=2)[1:]
    assert [one.code for one in up] == ["first", "increase", "warmup", "warmup", "improved", "increase", "warmup"]
    assert [one.phase for one in up[1:6]] == ["warmup", "warmup", "track", "track", "warmup"]
    assert [one.fields["good"] for one in up] == [1, 2, 0, 0, 1, 2, 0]
    assert codes([1.0, 2.0, 3.0, 0.5, 4.0], **QUICK) == ["increase", "reduce", "reduce", "increase", "reduce"]


def test_after_reset_start_cuts_without_room_all_begins_anew():
    losses = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    decisions = run(losses, **QUICK, min_lr=0.5, max_lr=1.0, reset_start=3, cooldown=0)[1:]
    assert [(one.code, one.lr[0]) for one in decisions] == [
        ("increase@bound", 1.0), ("reduce", 0.5), ("reduce@bound", 0.5), ("reset", 1.0), ("increase@bound", 1.0),
        ("reduce", 0.5), ("reduce@bound", 0.5), ("reset", 1.0),
    ]  # fmt: skip
    assert decisions[4].fields["best"] is None
    assert (decisions[3].fields["old_lr"], decisions[3].fields["new_lr"]) == (0.5, 1.0)
    never = run([1.0] * 9000, patience=0)
    assert "reset" not in {one.code for one in never}
    # The eighth cut, 2 / 2^8, is at the floor.
    assert codes([1.0] * 700, **QUICK, reset_start=500).index("reset") == 8 + 499
    with_cooldown = run(losses, **QUICK, min_lr=0.5, max_lr=1.0, reset_start=1, cooldown=1)[1:4]
    assert [(one.code, one.phase) for one in with_cooldown] == [
        ("increase@bound", "track"), ("reset", "cooldown"), ("cooldown", "track"),
    ]  # fmt: skip


def test_a_rise_forgives_the_cuts_that_had_no_room():
    losses = [1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0]
    assert codes(losses, **QUICK, min_lr=1.0, max_lr=1.0, reset_start=3) == [
        "increase@bound", "reduce@bound", "reduce@bound", "increase@bound", "reduce@bound", "reduce@bound", "reset",
    ]  # fmt: skip


def test_a_reset_empties_the_window_of_the_mean():
    decisions = run([1.0, 2.0, 4.0], **QUICK, smooth=True, min_lr=1.0, reset_start=1)[1:]
    assert [one.code for one in decisions] == ["increase", "reset", "increase"]
    assert [one.fields["metric"] for one in decisions] == [1.0, 1.5, 4.0]


def test_a_change_is_left_out_by_its_part_of_the_lr_not_by_its_amount():
    tiny = (Group("all", 2.0**-40),)
    assert run([1.0, 2.0, 3.0], tiny, **QUICK)[-1].lr == (2.0**-41,)  # each change is far below 1e-8
    assert lrs([1.0], patience=0, factor=0.5, max_lr=1.25, eps=0.25) == [1.0]  # exactly eps
    assert lrs([1.0], patience=0, factor=0.5, max_lr=1.25 + 2**-30, eps=0.25) == [1.25 + 2**-30]
    cuts = [1.0, 2.0, 2.0]
    assert codes(cuts, patience=0, factor=0.5, max_lr=1.0, min_lr=0.75, eps=0.25)[1:] == ["reduce@bound"] * 2
    assert lrs(cuts, patience=0, factor=0.5, max_lr=1.0, min_lr=0.75 - 2**-30, eps=0.25)[1] == 0.75 - 2**-30
    assert lrs([1.0], patience=0, max_lr=2**-26 + 1) == [2**-26 + 1]  # 1.49e-8 of the LR
    assert lrs([1.0], patience=0, max_lr=2**-27 + 1) == [1.0]  # 0.75e-8


def test_an_lr_that_eps_holds_above_its_floor_counts_as_being_there():
    parameters = {"patience": 0, "factor": 0.5, "max_lr": 1.0, "reset_start": 2}
    assert codes([1.0, 2.0, 2.0], **parameters, min_lr=0.75, eps=0.25)[1:] == ["reduce@bound", "reset"]
    assert codes([1.0, 2.0, 2.0], **parameters, min_lr=0.25, eps=0.0)[1:] == ["reduce", "reduce"]
    twice = {"groups": (Group("all", 2.0),), "patience": 0, "factor": 0.5, "max_lr": 2.0, "reset_start": 2}
    assert codes([1.0, 2.0, 2.0], **twice, min_lr=1.5, eps=0.25)[1:] == ["reduce@bound", "reset"]


# ---- signals ----------------------------------------------------------------------------------------------


def test_a_missing_metric_moves_no_counter():
    with_gaps = [1.0, None, 1.0, None, None, 2.0, None, 3.0]
    decisions = run(with_gaps, patience=2)
    assert [one for one in decisions if one.code != "no_loss"] == run([1.0, 1.0, 2.0, 3.0], patience=2)
    assert sum(one.code == "no_loss" for one in decisions) == 4


def test_another_signal_is_watched_while_the_training_loss_still_guards():
    signals = [{"accuracy": value} for value in (0.5, 0.0, math.nan, 0.6, 0.7, 1e101, 0.8)]
    signals[1] = None
    decisions = run([None, 1.0, 1.0, math.inf, 1.0, 1.0, None], signals=signals, metric="accuracy", mode="max")[1:]
    assert [one.code for one in decisions] == [
        "first", "no_metric", "no_metric", "nonfinite_hold", "improved", "no_metric", "improved",
    ]  # fmt: skip
    assert GREEDY.reads(GREEDY.config(metric="accuracy")) == {"accuracy"}
    assert GREEDY.reads(GREEDY.config()) == {"loss"}


def test_every_third_unusable_loss_in_a_row_cuts_once_and_ends_every_row():
    nan = math.nan
    losses = [9.0, 8.0, nan, math.inf, None, 1.1e100, 7.0, nan, nan, 6.0, nan] + [-math.inf] * 5
    decisions = run(losses, patience=2, factor=0.5, cooldown=5, min_lr=0.2)[1:]
    assert [one.code for one in decisions] == [
        "first", "improved", "nonfinite_hold", "nonfinite_hold", "no_loss", "nonfinite_backoff", "improved",
        "nonfinite_hold", "nonfinite_hold", "improved", "nonfinite_hold", "nonfinite_hold", "nonfinite_backoff",
        "nonfinite_hold", "nonfinite_hold", "nonfinite_backoff",
    ]  # fmt: skip
    assert [one.lr[0] for one in decisions] == [1.0] * 5 + [0.5] * 7 + [0.25] * 3 + [0.2]
    assert decisions[5].fields == {"bad_run": 3, "old_lr": 1.0, "new_lr": 0.5}
    assert decisions[2].fields == {"bad_run": 1}
    assert {one.phase for one in decisions} == {"track"}
    assert codes([1e100, -1e100]) == ["first", "improved"]
    waited = codes([1.0, 2.0, 2.0, nan, 2.0, 2.0, 2.0], patience=2, bad_limit=1)
    assert waited == ["first", "waiting", "waiting", "nonfinite_backoff", "waiting", "waiting", "reduce"]
    cooled = run([1.0, 2.0, nan, nan], **QUICK, cooldown=2)
    assert [one.phase for one in cooled[2:]] == ["cooldown"] * 3


def test_an_observation_without_a_metric_still_ends_a_row_of_unusable_losses():
    decisions = codes([math.nan, math.nan, 1.0, math.nan], signals=[None] * 4, metric="accuracy")
    assert decisions == ["nonfinite_hold", "nonfinite_hold", "no_metric", "nonfinite_hold"]


def test_frozen_groups_keep_the_very_same_lrs():
    decisions = run([3.0, 2.0, 3.0], (Group("a", 0.0), Group("b", 0.0)), **QUICK, min_lr=0.1)
    assert all(one.lr is decisions[0].lr for one in decisions)
    assert decisions[0].lr == (0.0, 0.0)


# ---- the whole state --------------------------------------------------------------------------------------


#: Every move, every count and every phase: LR 1 and 4 within [0.5, 1], the mean of two losses.
ALL = {
    "patience": 1, "factor": 0.5, "cooldown": 2, "warmup": 1, "smooth": True, "window_size": 2, "bad_limit": 2,
    "reset_start": 2, "min_lr": 0.5, "max_lr": 1.0,
}  # fmt: skip
#: loss, code, phase, milestone; then lr, best, good, bad, cooling, warming, stuck, bad_run, window; then the sentence.
TABLE = (
    (8.0, "first", "track", False, 1.0, 8.0, 1, 0, 0, 0, 0, 0, [8.0], "First value of The mean loss: 8."),
    (4.0, "increase@bound", "warmup", False, 1.0, 6.0, 0, 0, 0, 1, 0, 0, [8.0, 4.0],
     "The mean loss improved 2 times in a row, but the learning rate 1 is at its upper bound."),
    (math.nan, "nonfinite_hold", "warmup", False, 1.0, 6.0, 0, 0, 0, 1, 0, 1, [8.0, 4.0],
     "The loss is not a usable number (1 in a row): nothing counts, the learning rate stays."),
    (2.0, "warmup", "track", False, 1.0, 6.0, 0, 0, 0, 0, 0, 0, [4.0, 2.0],
     "The mean loss 3: after a rise this does not count."),
    (None, "no_loss", "track", False, 1.0, 6.0, 0, 0, 0, 0, 0, 0, [4.0, 2.0], "No loss was measured: nothing counts."),
    (1.0, "improved", "track", False, 1.0, 1.5, 1, 0, 0, 0, 0, 0, [2.0, 1.0],
     "The mean loss improved from 6 to 1.5: 1 in a row."),
    (9.0, "waiting", "track", False, 1.0, 1.5, 0, 1, 0, 0, 0, 0, [1.0, 9.0],
     "The mean loss 5 is no improvement on 1.5: 1 of 1 tolerated."),
    (9.0, "reduce", "cooldown", True, 0.5, 1.5, 0, 0, 2, 0, 1, 0, [9.0, 9.0],
     "The mean loss has not improved on 1.5 for 2 observations: learning rate cut from 1 to 0.5."),
    (9.0, "cooldown", "cooldown", False, 0.5, 1.5, 0, 0, 1, 0, 1, 0, [9.0, 9.0],
     "The mean loss 9: after a cut this does not count."),
    (1.0, "cooldown", "track", False, 0.5, 1.5, 0, 0, 0, 0, 1, 0, [9.0, 1.0],
     "The mean loss 5: after a cut this does not count."),
    (1.0, "improved", "track", False, 0.5, 1.0, 1, 0, 0, 0, 1, 0, [1.0, 1.0],
     "The mean loss improved from 1.5 to 1: 1 in a row."),
    (0.0, "increase", "warmup", True, 1.0, 0.5, 0, 0, 0, 1, 0, 0, [1.0, 0.0],
     "The mean loss improved 2 times in a row: learning rate raised from 0.5 to 1."),
    (math.inf, "nonfinite_hold", "warmup", False, 1.0, 0.5, 0, 0, 0, 1, 0, 1, [1.0, 0.0],
     "The loss is not a usable number (1 in a row): nothing counts, the learning rate stays."),
    (-math.inf, "nonfinite_backoff", "warmup", True, 0.5, 0.5, 0, 0, 0, 1, 0, 2, [1.0, 0.0],
     "2 unusable losses in a row: learning rate 1 -> 0.5."),
    (1.0, "warmup", "track", False, 0.5, 0.5, 0, 0, 0, 0, 0, 0, [0.0, 1.0],
     "The mean loss 0.5: after a rise this does not count."),
    (1.0, "waiting", "track", False, 0.5, 0.5, 0, 1, 0, 0, 0, 0, [1.0, 1.0],
     "The mean loss 1 is no improvement on 0.5: 1 of 1 tolerated."),
    (1.0, "reduce@bound", "cooldown", False, 0.5, 0.5, 0, 0, 2, 0, 1, 0, [1.0, 1.0],
     "The mean loss has not improved on 0.5 for 2 observations, but the learning rate 0.5 is at its lower bound."),
    (1.0, "cooldown", "cooldown", False, 0.5, 0.5, 0, 0, 1, 0, 1, 0, [1.0, 1.0],
     "The mean loss 1: after a cut this does not count."),
    (1.0, "cooldown", "track", False, 0.5, 0.5, 0, 0, 0, 0, 1, 0, [1.0, 1.0],
     "The mean loss 1: after a cut this does not count."),
    (1.0, "waiting", "track", False, 0.5, 0.5, 0, 1, 0, 0, 1, 0, [1.0, 1.0],
     "The mean loss 1 is no improvement on 0.5: 1 of 1 tolerated."),
    (1.0, "reset", "cooldown", True, 1.0, None, 0, 0, 2, 0, 0, 0, [],
     "The mean loss has not improved through 2 cuts at the lower bound: all begins anew, learning rate 0.5 -> 1."),
)  # fmt: skip


def test_a_run_through_every_move_has_these_states_and_sentences():
    config, plan = GREEDY.config(**ALL), [0.5, 1.0, 1.0, [1.0, 4.0]]
    state, decision = GREEDY.init(config, (Group("a", 1.0), Group("b", 4.0)), 0)
    assert decision == ((1.0, 4.0), None, None, "track", "initial", None, False, ())
    assert GREEDY.explain(config, decision) == "Starting with the learning rates of the optimizer."
    assert dump_state(state) == [1.0, [1.0, 4.0], None, 0, 0, 0, 0, 0, 0, [], plan]
    for number, (loss, code, phase, milestone, lr, *counts, text) in enumerate(TABLE):
        state, decision = GREEDY.step(config, state, Observation(number, loss))
        assert (decision.code, decision.phase, decision.milestone) == (code, phase, milestone), number
        assert dump_state(state) == [lr, [lr, 4 * lr], *counts, plan], number
        assert decision.lr is state.lrs
        assert GREEDY.explain(config, decision) == text


def test_in_any_state_a_missing_metric_and_an_unusable_loss_touch_only_what_they_say():
    """A metric that is missing ends the row of unusable losses; one of those adds to it, at the limit it also cuts."""
    signals, config = (8.0, 4.0, 2.0, 9.0, 9.0, 9.0, 1.0, 0.0, 1.0, 1.0, 1.0), GREEDY.config(**ALL, metric="x")
    state, _ = GREEDY.init(config, ONE_GROUP, 0)
    for signal in signals:
        state, decision = GREEDY.step(config, state, Observation(0, None, others={"x": signal}))
        held, holding = GREEDY.step(config, state, Observation(1, math.nan))
        assert held == state._replace(bad_run=1)
        assert (holding.lr, holding.phase, holding.code) == (state.lrs, decision.phase, "nonfinite_hold")
        assert (holding.fields, holding.milestone) == ({"bad_run": 1}, False)
        for value in (None, 1.1e100, -1.1e100, math.nan):
            for loss, row in ((None, 1), (1.0, 0)):
                after, missing = GREEDY.step(config, held, Observation(2, loss, others={"x": value}))
                assert after == state._replace(bad_run=row)
                assert missing == (state.lrs, None, None, decision.phase, "no_metric", None, False, ())
                assert GREEDY.explain(config, missing) == (
                    "The mean x was not measured, or is not a usable number: nothing counts."
                )
        after, cutting = GREEDY.step(config, held, Observation(2, math.nan))
        assert after == state._replace(bad_run=2, lr=0.5, lrs=(0.5,), good=0, bad=0)
        assert cutting.fields == {"bad_run": 2, "old_lr": state.lr, "new_lr": 0.5}
        assert (cutting.phase, cutting.milestone) == (decision.phase, state.lr != 0.5)
        assert (after.lrs is state.lrs) == (state.lr == 0.5)


def test_usable_values_of_another_signal_reach_to_1e100():
    signals = [{"x": value} for value in (1e100, -1e100, 1.0000001e100, -1.0000001e100)]
    expected = ["first", "improved", "no_metric", "no_metric"]
    assert codes([None] * 4, signals=signals, metric="x") == expected


# ---- parameters -------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_ones_except_for_the_bounds_and_the_reset():
    assert GREEDY.tag == "greedy@1"
    ours = asdict(GREEDY.config())
    assert {name: ours.pop(name) for name in ("metric", "min_lr", "max_lr", "bad_limit", "reset_start")} == {
        "metric": "loss", "min_lr": None, "max_lr": None, "bad_limit": 3, "reset_start": None,
    }  # fmt: skip
    scheduler = GreedyLR(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    assert ours == {name: getattr(scheduler, name) for name in ours}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"metric": ""}, "^metric: '' is empty; give the name of a signal, such as 'loss'$"),
        ({"min_lr": 0.2, "max_lr": 0.1}, r"^min_lr: 0\.2 is above max_lr = 0\.1; give min_lr <= max_lr$"),
        ({"factor": 1.0}, "factor: 1.0 .* less than 1"),
        ({"factor": 0.0}, "factor: 0.0 .* greater than 0"),
        ({"patience": -1}, "patience: -1 .* at least 0"),
        ({"threshold": -0.1}, "threshold: -0.1 .* at least 0"),
        ({"cooldown": -1}, "cooldown: -1 .* at least 0"),
        ({"warmup": -1}, "warmup: -1 .* at least 0"),
        ({"min_lr": 0.0}, "min_lr: 0.0 .* greater than 0"),
        ({"max_lr": 0.0}, "max_lr: 0.0 .* greater than 0"),
        ({"min_lr": 1e101}, r"min_lr: 1e\+101 .* at most"),
        ({"max_lr": 1e101}, r"max_lr: 1e\+101 .* at most"),
        ({"eps": -0.1}, "eps: -0.1 .* at least 0"),
        ({"eps": 1.0}, "eps: 1.0 .* less than 1"),
        ({"window_size": 0}, "window_size: 0 .* at least 1"),
        ({"window_size": 10_001}, "window_size: 10001 .* at most 10000"),
        ({"reset_start": 0}, "reset_start: 0 .* at least 1"),
        ({"bad_limit": 0}, "bad_limit: 0 .* at least 1"),
        ({"mode": "up"}, "mode: 'up'"),
        ({"threshold_mode": "part"}, "threshold_mode: 'part'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_the_remedy(parameters, words):
    with pytest.raises(ValueError, match=words):
        GREEDY.config(**parameters)


def test_bounds_that_shut_out_the_optimizer_s_lr_are_refused_at_attach():
    for parameters, words in (
        ({"min_lr": 1e-3}, "min_lr: 0.001 shuts out the optimizer's learning rate 0.0001"),
        ({"max_lr": 1e-5}, "max_lr: 1e-05 shuts out the optimizer's learning rate 0.0001"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}; leave it null or let them fit$"):
            GREEDY.init(GREEDY.config(**parameters), (Group("all", 1e-4),), 0)
    assert GREEDY.init(GREEDY.config(min_lr=1e-4, max_lr=1e-4), (Group("all", 1e-4),), 0)[1].lr == (1e-4,)
    assert GREEDY.config(min_lr=1e-4, max_lr=1e-4).max_lr == 1e-4
    with pytest.raises(ValueError, match=r"^max_lr: 1e-301 shuts out"):
        GREEDY.init(GREEDY.config(max_lr=1e-301), (Group("all", 1e-300),), 0)


def test_the_smallest_and_the_largest_lr_still_have_bounds():
    for lr, bounds in ((1e-299, (1e-300, 1e-298)), (1e100, (1e98, 1e100)), (1e-301, (1e-300, 1e-299))):
        state, _ = GREEDY.init(GREEDY.config(), (Group("all", lr),), 0)
        assert state.plan[:2] == pytest.approx(bounds, rel=1e-12)
