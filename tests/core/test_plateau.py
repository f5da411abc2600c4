"""Goal: `plateau` is torch's ReduceLROnPlateau, except where torch is wrong.

Method: random metric traces through torch's own class beside ours, then each stated difference alone; one trace with
every code whose states and decisions are spelled out; the edge of every comparison.
"""

import math
import random

import pytest
import torch

from flyball_server.core.policies import POLICIES
from flyball_server.core.state import dump_state
from flyball_server.core.types import Decision, Group, Observation

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


def judged(metric, best, waited, **lrs):
    return {"metric": metric, "best": best, "waited": waited, **lrs}


def braked(bad_run, old, new):
    return {"bad_run": bad_run, "old_lr": old, "new_lr": new}


#: loss, phase, code, learning rates, [best, waited, cooling, bad_run], fields: patience 1, cooldown 2, bad_limit 2.
TRACE = [
    (1.0, "track", "first", (0.5, 0.01), [1.0, 0, 0, 0], judged(1.0, None, 0)),
    (0.5, "track", "improved", (0.5, 0.01), [0.5, 0, 0, 0], judged(0.5, 1.0, 0)),
    (0.75, "track", "waiting", (0.5, 0.01), [0.5, 1, 0, 0], judged(0.75, 0.5, 1)),
    (None, "track", "no_loss", (0.5, 0.01), [0.5, 1, 0, 0], None),
    (math.nan, "track", "nonfinite_hold", (0.5, 0.01), [0.5, 1, 0, 1], None),
    (0.75, "cooldown", "reduce", (0.25, 0.005), [0.5, 0, 2, 0], judged(0.75, 0.5, 2, old_lr=0.5, new_lr=0.25)),
    (None, "cooldown", "no_loss", (0.25, 0.005), [0.5, 0, 2, 0], None),
    (math.nan, "cooldown", "nonfinite_hold", (0.25, 0.005), [0.5, 0, 2, 1], None),
    (math.inf, "cooldown", "nonfinite_backoff", (0.2, 0.004), [0.5, 0, 2, 2], braked(2, 0.25, 0.2)),
    (0.75, "cooldown", "cooldown", (0.2, 0.004), [0.5, 0, 1, 0], judged(0.75, 0.5, 0)),
    (0.25, "track", "improved", (0.2, 0.004), [0.25, 0, 0, 0], judged(0.25, 0.5, 0)),
    (0.25, "track", "waiting", (0.2, 0.004), [0.25, 1, 0, 0], judged(0.25, 0.25, 1)),
    (0.25, "cooldown", "reduce@bound", (0.2, 0.004), [0.25, 0, 2, 0], judged(0.25, 0.25, 2, old_lr=0.2, new_lr=0.2)),
    (1e101, "cooldown", "nonfinite_hold", (0.2, 0.004), [0.25, 0, 2, 1], None),
    (-1e101, "cooldown", "nonfinite_backoff", (0.2, 0.004), [0.25, 0, 2, 2], braked(2, 0.2, 0.2)),
]  # fmt: skip


def test_every_code_has_the_state_and_the_numbers_of_its_place():
    config = PLATEAU.config(factor=0.5, patience=1, cooldown=2, min_lr=(0.2, 0.004), bad_limit=2)
    state, decision = PLATEAU.init(config, GROUPS, 0)
    assert dump_state(state) == [[0.5, 0.01], None, 0, 0, 0]
    assert decision == Decision((0.5, 0.01), None, None, "track", "initial")
    for step, (loss, phase, code, lr, counters, fields) in enumerate(TRACE):
        moved = lr != state.lr
        state, decision = PLATEAU.step(config, state, Observation(step, loss))
        assert dump_state(state) == [list(lr), *counters], step
        assert decision == Decision(lr, None, None, phase, code, fields, moved), step
        assert decision.milestone is moved


@pytest.mark.parametrize(
    ("parameters", "values", "code"),
    [
        ({"mode": "min", "threshold_mode": "abs", "threshold": 0.5}, [1.0, 0.5], "waiting"),
        ({"mode": "min", "threshold_mode": "abs", "threshold": 0.5}, [1.0, 0.4999], "improved"),
        ({"mode": "max", "threshold_mode": "abs", "threshold": 0.5}, [1.0, 1.5], "waiting"),
        ({"mode": "max", "threshold_mode": "abs", "threshold": 0.5}, [1.0, 1.5001], "improved"),
        ({"mode": "min", "threshold": 0.5}, [0.5, 0.25], "waiting"),
        ({"mode": "min", "threshold": 0.5}, [0.5, 0.2499], "improved"),
        ({"mode": "max", "threshold": 0.5}, [0.5, 0.75], "waiting"),
        ({"mode": "max", "threshold": 0.5}, [0.5, 0.7501], "improved"),
        ({"patience": 0, "eps": 0.25}, [1.0, 1.0], "reduce@bound"),
        ({"patience": 0, "eps": 0.2499}, [1.0, 1.0], "reduce"),
        ({}, [1e100], "first"),
        ({}, [-1e100], "first"),
        ({}, [1.0001e100], "nonfinite_hold"),
        ({"metric": "val_loss"}, [1e100], "first"),
        ({"metric": "val_loss"}, [-1e100], "first"),
        ({"metric": "val_loss"}, [1.0001e100], "no_metric"),
        ({"metric": "LOSS"}, [1.0], "first"),
    ],
)
def test_the_edge_of_every_comparison_is_exact(parameters, values, code):
    config = PLATEAU.config(factor=0.5, **parameters)
    groups, name = (Group("all", 0.5),), parameters.get("metric")
    if name == "LOSS":
        decisions = run(config, [None], groups, others=[{"LOSS": values[0]}])
    elif name:
        decisions = run(config, [None] * len(values), groups, val_loss=values)
    else:
        decisions = run(config, values, groups)
    assert decisions[-1].code == code


def test_a_cut_goes_down_to_the_smallest_learning_rate_and_no_further():
    config = PLATEAU.config(factor=0.5, patience=0, eps=0.0)
    decisions = run(config, [1.0] * 3, (Group("all", 2e-300),))
    assert [(d.code, d.lr) for d in decisions[2:]] == [("reduce", (1e-300,)), ("reduce@bound", (1e-300,))]


def test_its_sentences_name_the_metric_and_the_numbers():
    config = PLATEAU.config(metric="accuracy", mode="max", patience=1, factor=0.5)
    assert PLATEAU.reads(config) == frozenset({"accuracy"})
    decisions = run(config, [None] * 4, others=[None, {"accuracy": 0.5}, {"accuracy": 0.25}, {"accuracy": 0.25}])
    assert [PLATEAU.explain(config, decision) for decision in decisions] == [
        "Starting with the learning rates of the optimizer.",
        "accuracy was not measured, or is not a usable number: nothing counts.",
        "First value of accuracy: 0.5.",
        "accuracy 0.25 is no improvement on 0.5: 1 of 1 tolerated.",
        "accuracy has not improved on 0.5 for more than 1 observations: learning rate cut from 0.5 to 0.25 (group 0).",
    ]


def test_a_parameter_that_cannot_be_is_refused_with_its_remedy():
    with pytest.raises(ValueError, match=r"^min_lr: 3 values for 2 groups; give one number, or one per group$"):
        PLATEAU.init(PLATEAU.config(min_lr=(0.1, 0.1, 0.1)), GROUPS, 0)
    with pytest.raises(ValueError, match=r"^metric: '' is empty; give the name of a signal, such as 'loss'$"):
        PLATEAU.config(metric="")
