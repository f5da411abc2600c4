"""Goal: `plateau` is torch's ReduceLROnPlateau, except where torch is wrong.

Method: random metric traces through torch's own class beside ours, then each stated difference alone.
"""

import math
import random

import pytest
import torch

from flyball_server.core.policies import POLICIES
from flyball_server.core.types import Group, Observation

PLATEAU = POLICIES["plateau"]
GROUPS = (Group("body", 0.5), Group("head", 0.01))


def run(config, losses, groups=GROUPS, **signals):
    state, decision = PLATEAU.init(config, groups, 0)
    decisions = [decision]
    for step, loss in enumerate(losses):
        seen = Observation(step, loss, **{name: values[step] for name, values in signals.items()})
        state, decision = PLATEAU.step(config, state, seen)
        decisions.append(decision)
    return decisions


def torchs(parameters, values):
    opt = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": group.lr} for group in GROUPS], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, **parameters)
    rows = [tuple(group["lr"] for group in opt.param_groups)]
    for value in values:
        scheduler.step(value)
        rows.append(tuple(group["lr"] for group in opt.param_groups))
    return rows


@pytest.mark.parametrize("trial", range(60))
def test_every_lr_equals_torchs_on_a_random_positive_metric(trial):
    chance = random.Random(trial)
    parameters = {
        "mode": chance.choice(["min", "max"]),
        "factor": chance.choice([0.1, 0.5, 0.9]),
        "patience": chance.choice([0, 1, 3, 10]),
        "threshold": chance.choice([0.0, 1e-4, 0.05]),
        "threshold_mode": chance.choice(["rel", "abs"]),
        "cooldown": chance.choice([0, 1, 5]),
        "min_lr": chance.choice([0.0, 1e-3, [0.05, 1e-4]]),
        "eps": chance.choice([1e-8, 1e-3, 0.0]),
    }
    drift = chance.choice([-0.01, 0.0, 0.01])
    values, level = [], 5.0
    for _ in range(400):
        level = max(0.01, level * (1 + drift * chance.random()))
        values.append(level * chance.choice([1.0, 1.0, 0.9 + 0.2 * chance.random()]))
    floors = parameters["min_lr"]
    config = PLATEAU.config(**parameters | {"min_lr": tuple(floors) if isinstance(floors, list) else floors})
    expected = torchs(parameters, values)
    assert len(set(expected)) > 1 or parameters["patience"] == 10
    for step, (decision, lr) in enumerate(zip(run(config, values), expected, strict=True)):
        assert decision.lr == pytest.approx(lr, rel=1e-12), step


def test_a_negative_metric_improves_by_a_part_of_its_size_where_torch_would_accept_a_worse_one():
    config = PLATEAU.config(threshold=0.1, patience=0, factor=0.5)
    codes = [decision.code for decision in run(config, [-10.0, -10.5, -11.5, -11.5])]
    assert codes == ["initial", "first", "reduce", "improved", "reduce"]
    assert torchs({"threshold": 0.1, "patience": 0, "factor": 0.5}, [-10.0, -9.5])[-1] == (0.5, 0.01)  # -9.5 "improves"
    rising = PLATEAU.config(threshold=0.1, patience=0, factor=0.5, mode="max")
    assert [decision.code for decision in run(rising, [-10.0, -9.5, -8.5])][2:] == ["reduce", "improved"]


def test_codes_follow_the_counters():
    config = PLATEAU.config(patience=1, cooldown=2, factor=0.5, min_lr=0.25)
    decisions = run(config, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5], groups=(Group("all", 0.5),))
    assert [decision.code for decision in decisions] == [
        "initial", "first", "waiting", "reduce", "cooldown", "cooldown", "waiting", "reduce@bound", "improved",
    ]  # fmt: skip
    assert [decision.phase for decision in decisions[3:6]] == ["cooldown", "cooldown", "track"]
    assert decisions[7].lr is decisions[3].lr


def test_a_missing_metric_moves_no_counter():
    config = PLATEAU.config(patience=2)
    with_gaps = [1.0, None, 1.0, None, None, 1.0, None, 1.0]
    dense = [value for value in with_gaps if value is not None]
    decisions = run(config, with_gaps)
    assert [one for one in decisions if one.code != "no_loss"] == run(config, dense)
    assert sum(one.code == "no_loss" for one in decisions) == 4


def test_another_signal_is_watched_while_the_training_loss_still_guards():
    config = PLATEAU.config(metric="accuracy", mode="max", patience=0, factor=0.5)
    signals = [{"accuracy": 0.5}, None, {"accuracy": math.nan}, {"accuracy": 0.6}, {"accuracy": 0.7}, {"accuracy": 0.6}]
    decisions = run(config, [1.0, 1.0, 1.0, math.inf, 1.0, 1.0], others=signals)
    expected = ["first", "no_metric", "no_metric", "nonfinite_hold", "improved", "reduce"]
    assert [decision.code for decision in decisions[1:]] == expected


def test_every_third_unusable_loss_in_a_row_cuts_once():
    config = PLATEAU.config(factor=0.5, patience=50)
    losses = [1.0, math.nan, math.inf, None, 1e200, -math.inf, 1.0, math.nan, math.nan]
    decisions = run(config, losses)[1:]
    assert [decision.code for decision in decisions] == [
        "first", "nonfinite_hold", "nonfinite_hold", "no_loss", "nonfinite_backoff", "nonfinite_hold",
        "waiting", "nonfinite_hold", "nonfinite_hold",
    ]  # fmt: skip
    assert decisions[-1].lr == (0.25, 0.005)


def test_one_floor_per_group_must_fit_the_groups():
    with pytest.raises(ValueError, match="min_lr: 3 values for 2 groups"):
        PLATEAU.init(PLATEAU.config(min_lr=(0.1, 0.1, 0.1)), GROUPS, 0)
