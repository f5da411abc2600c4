"""Goal: every base schedule equals its library's, at every step, and can neither raise nor leave the range.

Method: 10 000 steps of the real torch / transformers scheduler beside the closed form; hypothesis for the rest.
"""

import json
import math
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import optimization

from flyball_server.core.base import LARGEST_LR, SCHEDULES, build

schedulers = torch.optim.lr_scheduler
STEPS = 10_000


def optimizer(lr, momentum=0.9):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)


def recorded(opt, scheduler, steps):
    """[(lr, momentum) in force at step 0, 1, ...]"""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            rows.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
            if step < steps - 1:
                scheduler.step()
    return rows


TORCH = [
    ("ConstantLR", "constant", [{"factor": 0.25, "total_iters": 100}, {"factor": 1.0, "total_iters": 0}]),
    (
        "LinearLR",
        "linear",
        [{}, {"start_factor": 0.01, "total_iters": 777}, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 9999}],
    ),
    ("CosineAnnealingLR", "cosine", [{"T_max": 1}, {"T_max": 37, "eta_min": 1e-3}, {"T_max": 4000}, {"T_max": 20000}]),
    ("StepLR", "step", [{"step_size": 1000}, {"step_size": 7, "gamma": 0.99}]),
    ("MultiStepLR", "multistep", [{"milestones": [0, 10, 10, 5000]}, {"milestones": [900, 30], "gamma": 0.5}]),
    ("ExponentialLR", "exponential", [{"gamma": 0.999}, {"gamma": 1.0001}, {"gamma": 0.0}]),
    ("PolynomialLR", "polynomial", [{}, {"total_iters": 8000, "power": 2.0}, {"total_iters": 500, "power": 0.5}]),
    (
        "CosineAnnealingWarmRestarts",
        "cosine_restarts",
        [{"T_0": 1}, {"T_0": 50, "eta_min": 1e-4}, {"T_0": 10, "T_mult": 2}, {"T_0": 3, "T_mult": 3}],
    ),
]


@pytest.mark.parametrize(
    ("library", "name", "parameters"), [(cls, name, one) for cls, name, sets in TORCH for one in sets]
)
def test_a_schedule_equals_torchs_at_every_step(library, name, parameters):
    opt = optimizer(0.7)
    rows = recorded(opt, getattr(schedulers, library)(opt, **parameters), STEPS)
    base = build({"type": name, **parameters})
    # torch's recursive cosine itself drifts by 1e-12 over hundreds of turns; its closed form is compared below.
    tolerance = 1e-11 if library == "CosineAnnealingLR" and parameters["T_max"] < 100 else 1e-12
    for step, (lr, _) in enumerate(rows):
        assert base.lr(step, 0.7) == pytest.approx(lr, rel=0, abs=tolerance * max(1.0, lr)), step


def test_cosine_equals_torchs_closed_form_without_any_drift():
    scheduler = schedulers.CosineAnnealingLR(optimizer(0.7), T_max=37, eta_min=1e-3)
    base = build({"type": "cosine", "T_max": 37, "eta_min": 1e-3})
    for step in range(STEPS):
        scheduler.last_epoch = step
        assert base.lr(step, 0.7) == pytest.approx(scheduler._get_closed_form_lr()[0], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"pct_start": 0.1, "anneal_strategy": "linear", "div_factor": 10.0},
        {"three_phase": True, "final_div_factor": 100.0},
        {"three_phase": True, "pct_start": 0.45, "anneal_strategy": "linear"},
        {"cycle_momentum": False},
        {"base_momentum": 0.5, "max_momentum": 0.9, "pct_start": 0.0},
    ],
)
def test_one_cycle_equals_torchs_in_lr_and_momentum_and_holds_its_last_value(parameters):
    opt = optimizer(0.1)
    cycle = schedulers.OneCycleLR(opt, max_lr=0.6, total_steps=STEPS, **parameters)
    rows = recorded(opt, cycle, STEPS)
    base = build({"type": "one_cycle", "max_lr": 0.6, "total_steps": STEPS, **parameters})
    for step, (lr, momentum) in enumerate(rows):
        assert base.lr(step, 123.0) == pytest.approx(lr, rel=0, abs=1e-12)
        expected = momentum if parameters.get("cycle_momentum", True) else None
        assert base.momentum(step) == (expected if expected is None else pytest.approx(expected, abs=1e-12))
    assert base.lr(10 * STEPS, 123.0) == base.lr(STEPS - 1, 123.0)
    relative = build({"type": "one_cycle", "total_steps": STEPS, **parameters})
    assert relative.lr(STEPS // 3, 0.6) == base.lr(STEPS // 3, 123.0)


@pytest.mark.parametrize("warmup", [0, 1, 250])
@pytest.mark.parametrize(
    ("function", "arguments", "spec"),
    [
        ("get_constant_schedule_with_warmup", {}, {"type": "constant"}),
        (
            "get_linear_schedule_with_warmup",
            {"num_training_steps": 3000},
            {"type": "linear", "start_factor": 1, "end_factor": 0, "total_iters": "rest"},
        ),
        ("get_cosine_schedule_with_warmup", {"num_training_steps": 3000}, {"type": "cosine", "T_max": "rest"}),
        (
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": 3000, "power": 1.7, "lr_end": 1e-5},
            {"type": "polynomial", "power": 1.7, "lr_end": 1e-5, "total_iters": "rest"},
        ),
        ("get_inverse_sqrt_schedule", {}, {"type": "inverse_sqrt"}),
        ("get_inverse_sqrt_schedule", {"timescale": 900}, {"type": "inverse_sqrt", "timescale": 900}),
        (
            "get_wsd_schedule",
            {"num_training_steps": 3000, "num_decay_steps": 700},
            {"type": "wsd", "num_training_steps": 3000, "num_decay_steps": 700},
        ),
        *(
            (
                "get_wsd_schedule",
                {"num_stable_steps": 99, "num_decay_steps": 800, "min_lr_ratio": 0.1} | shapes,
                {"type": "wsd", "num_stable_steps": 99, "num_decay_steps": 800, "min_lr_ratio": 0.1} | shapes,
            )
            for shapes in (
                {"warmup_type": "cosine", "decay_type": "1-sqrt"},
                {"warmup_type": "1-sqrt", "decay_type": "linear"},
                {"num_cycles": 1.5},
            )
        ),
    ],
)
def test_a_schedule_with_warm_up_equals_transformers(function, arguments, spec, warmup):
    opt = optimizer(0.3)
    scheduler = getattr(optimization, function)(opt, num_warmup_steps=warmup, **arguments)
    spec = {key: 3000 - warmup if value == "rest" else value for key, value in spec.items()}
    base = build({**spec, "warmup_steps": warmup})
    rows = recorded(opt, scheduler, STEPS)
    for step, (lr, _) in enumerate(rows):
        assert base.lr(step, 0.3) == pytest.approx(lr, rel=0, abs=1e-12 * 0.3), step


EXAMPLES = {
    "cosine": {"T_max": 10},
    "step": {"step_size": 3},
    "multistep": {"milestones": [5, 2]},
    "exponential": {"gamma": 0.9},
    "one_cycle": {"total_steps": 10},
    "cosine_restarts": {"T_0": 4},
    "wsd": {"num_decay_steps": 2, "num_training_steps": 20},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_resolved_specification_is_json_and_builds_the_same_schedule(name):
    base = build({"type": name, **EXAMPLES.get(name, {})})
    assert build(json.loads(json.dumps(base.spec()))) == base
    assert list(base.spec()) == ["type", *(entry.name for entry in fields(base.config))]
    assert all(entry.metadata["description"] for entry in fields(base.config))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_accepted_schedule_never_raises_and_stays_finite_and_not_negative(data):
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    numbers = st.sampled_from([0, 1, 2, 7, 10_000, 2**53, 0.0, 1e-300, 0.1, 0.5, 1.0, 2.0, 1e300, 1.7e308])
    spec = {"type": name, **EXAMPLES.get(name, {})}
    for key in data.draw(st.sets(st.sampled_from(sorted(entry.name for entry in fields(SCHEDULES[name].config))))):
        value = data.draw(numbers | st.sampled_from([True, False, "linear", "1-sqrt", "cosine", "cos", None]))
        spec[key] = [value] if key == "milestones" else value
    try:
        base = build(spec)
    except ValueError:
        return
    for step in (0, 1, 2, 3, 9, 10, 11, 500, 10**6, 2**62):
        for reference in (0.0, 1e-300, 1e-3, 1.0):
            assert 0 <= base.lr(step, reference) <= LARGEST_LR
        momentum = base.momentum(step)
        assert momentum is None or 0 <= momentum < 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "cosin", "T_max": 5}, ["type", "'cosin'", "did you mean 'cosine'"]),
        ({"T_max": 5}, ["type", "None", "known are"]),
        ({"type": "cosine", "Tmax": 5}, ["Tmax", "did you mean 'T_max'"]),
        ({"type": "cosine"}, ["T_max", "needs it"]),
        ({"type": "cosine", "T_max": True}, ["T_max", "True", "an integer"]),
        ({"type": "cosine", "T_max": 5.0}, ["T_max", "5.0", "an integer"]),
        ({"type": "cosine", "T_max": 0}, ["T_max", "0", "at least 1"]),
        ({"type": "exponential", "gamma": math.nan}, ["gamma", "nan", "a finite number"]),
        ({"type": "exponential", "gamma": "0.5"}, ["gamma", "'0.5'", "a finite number"]),
        ({"type": "one_cycle", "total_steps": 9, "anneal_strategy": "cosine"}, ["anneal_strategy", "'cos', 'linear'"]),
        ({"type": "one_cycle", "total_steps": 9, "warmup_steps": 3}, ["warmup_steps", "no such parameter"]),
        ({"type": "wsd", "num_decay_steps": 9}, ["num_stable_steps", "num_training_steps"]),
        ({"type": "wsd", "num_decay_steps": 9, "num_training_steps": 8}, ["num_training_steps: 8", "9"]),
        ({"type": "multistep", "milestones": [3, -1]}, ["milestones", "at least 0"]),
    ],
)
def test_a_wrong_specification_is_refused_with_the_key_the_value_and_the_remedy(spec, words):
    with pytest.raises(ValueError, match=":") as refused:
        build(spec)
    assert all(word in str(refused.value) for word in words), str(refused.value)
