"""Goal: a simulation answers every observation exactly as the specification says, and refuses a bad trace by line.

Method: recorded traces through whole policies; hand-made lines for the step discipline and for every wrong field.
"""

import json
import math
from pathlib import Path

import pytest

from flyball_server.core.base import build
from flyball_server.core.errors import Invalid
from flyball_server.core.types import Group
from flyball_server.simulate import read_groups, simulate

TRACES = Path(__file__).parent / "traces"


def lines(*losses):
    return [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]


def test_a_recorded_trace_gives_one_answer_a_line_with_all_its_parts():
    answers = list(simulate({"type": "windowed"}, TRACES / "healthy_decay.jsonl"))
    assert [answer["step"] for answer in answers] == list(range(600))
    parts = ("step", "settings", "phase", "decision", "reason", "fields")
    assert {tuple(answer) for answer in answers} == {(*parts, "lr_multiplier", "noise_std", "noise_seed")}
    assert answers[0]["settings"] == [{"group": "default", "lr": 5e-5, "momentum": None, "noise_std": 0.0}]
    assert answers[599]["settings"][0]["lr"] == pytest.approx(0.0001426558353)
    assert answers[99]["decision"] == "increase"
    assert answers[99]["fields"]["old_lr"] == 5e-5
    assert "improvement_rate=" in answers[99]["reason"]
    for answer in simulate({"type": "windowed"}, str(TRACES / "nan_blip.jsonl")):
        json.dumps(answer, allow_nan=False)


def test_a_base_schedule_is_multiplied_and_is_one_step_ahead():
    spec = {"type": "plateau", "patience": 0, "factor": 0.5, "base": {"type": "linear", "warmup_steps": 4}}
    base = build(spec["base"])
    answers = list(simulate(spec, lines(1.0, 1.0, 0.5, 0.4), [{"name": "a", "lr": 0.1}, Group("frozen", 0.0)]))
    got = [answer["settings"][0]["lr"] for answer in answers]
    assert got == [base.lr(1, 0.1), base.lr(2, 0.1) * 0.5, base.lr(3, 0.1) * 0.5, base.lr(4, 0.1) * 0.5]
    assert {answer["settings"][1]["lr"] for answer in answers} == {0.0}


def test_one_cycle_moves_momentum_or_beta1_where_the_optimizer_has_one_like_torch():
    spec = {"type": "one_cycle", "total_steps": 10, "max_lr": 0.5}
    groups = [Group("sgd", 0.1, 0.9), Group("plain", 0.1), {"name": "adam", "lr": 0.1, "betas": [0.9, 0.99]}]
    answers = list(simulate(spec, lines(1.0, 1.0), groups))
    assert [row["momentum"] for row in answers[1]["settings"]] == [
        build(spec).momentum(2),
        None,
        build(spec).momentum(2),
    ]
    assert {row["lr"] for row in answers[1]["settings"]} == {build(spec).lr(2, 0.1)}
    still = next(simulate({"type": "cosine", "T_max": 9}, lines(1.0), groups))
    assert [row["momentum"] for row in still["settings"]] == [0.9, None, None]


def test_a_repeated_step_changes_nothing_and_a_gap_is_allowed():
    spec = {"type": "plateau", "patience": 1}
    trace = [json.dumps({"step": step, "loss": 1.0}) for step in (3, 7, 7, 8)]
    answers = list(simulate(spec, trace))
    assert [answer["decision"] for answer in answers] == ["first", "waiting", "waiting", "reduce"]
    assert answers[1] == answers[2]


def test_non_finite_numbers_may_be_written_as_the_wire_writes_them():
    bare = list(simulate({"type": "plateau"}, lines(1.0, float("nan"), float("-inf"))))
    quoted = ['{"step": 0, "loss": 1.0}', '{"step": 1, "loss": "NaN"}', '{"step": 2, "loss": "-Infinity"}']
    assert list(simulate({"type": "plateau"}, quoted)) == bare


def test_an_older_step_is_refused_after_the_answers_before_it():
    stream = simulate({"type": "constant"}, ['{"step": 5}', "", '{"step": 4}'])
    assert next(stream)["step"] == 5
    with pytest.raises(Invalid, match=r"^stale_step: line 3: step 4 comes after step 5"):
        next(stream)


def test_unusable_numbers_and_other_signals_are_read():
    trace = ['{"step": 0, "loss": NaN}', '{"step": 1, "loss": -Infinity, "val_loss": 2}', '{"step": 2, "acc": 0.5}']
    trace += ['{"step": 3, "acc": 1e999}', f'{{"step": 4, "acc": {10**400}}}', '{"step": 5, "acc": null, "loss": 1}']
    codes = [answer["decision"] for answer in simulate({"type": "plateau", "metric": "acc"}, trace)]
    assert codes == ["nonfinite_hold", "nonfinite_hold", "first", "no_metric", "no_metric", "no_metric"]
    codes = [answer["decision"] for answer in simulate({"type": "plateau", "metric": "val_loss"}, trace[1:3])]
    assert codes == ["nonfinite_hold", "no_metric"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ("3", ["3", "an object"]),
        ('{"loss": 1}', ["step", "None"]),
        ('{"step": -1}', ["step", "-1"]),
        ('{"step": 1.0}', ["step", "1.0", "integer"]),
        ('{"step": true}', ["step", "True"]),
        ('{"step": 1, "loss": "2"}', ["loss", "'2'", "a number"]),
        ('{"step": 1, "acc": [1]}', ["acc", "[1]"]),
        ('{"step": 1, "reward": false}', ["reward", "False"]),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_the_field_and_the_value(line, words):
    with pytest.raises(Invalid) as refused:
        list(simulate({"type": "constant"}, ['{"step": 0}', line]))
    assert all(word in str(refused.value) for word in ["line 2", *words]), str(refused.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "groups: 0 groups"),
        ([{"name": "a"}], "groups.0.lr: None"),
        ([{"name": "a", "lr": "1"}], "groups.0.lr: '1'"),
        ([{"name": "a", "lr": math.inf}], "groups.0.lr: inf"),
        ([{"name": "a", "lr": 1, "momentum": 1.0}], "groups.0.momentum: 1.0"),
        ([{"name": "a", "lr": 1, "beta": 0.9}], "groups.0.beta"),
        ([{"name": "a", "lr": 1, "betas": [0.9]}], "groups.0.betas"),
        ([{"name": "a", "lr": 1}, {"name": "a", "lr": 1}], "'a' is given twice"),
        ([3], "groups.0: 3"),
    ],
)
def test_wrong_groups_are_refused_at_once(groups, words):
    with pytest.raises(Invalid, match=words):
        simulate({"type": "constant"}, [], groups)


def test_a_specification_that_does_not_fit_the_groups_is_refused_at_once():
    with pytest.raises(Invalid, match="min_lr: 2 values for 1 groups"):
        simulate({"type": "plateau", "min_lr": [1e-5, 1e-5]}, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("g.json", '[{"name": "a", "lr": 1e-3, "momentum": 0.9}, {"name": "b", "lr": 1, "momentum": 0}]'),
        ("g.yaml", "- {name: a, lr: 1e-3, momentum: 0.9}\n- {name: b, lr: 1, betas: null}\n"),
        ("g.toml", '[[groups]]\nname = "a"\nlr = 1e-3\nmomentum = 0.9\n[[groups]]\nname = "b"\nlr = 1\n'),
    ],
)
def test_groups_are_read_from_any_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_groups(tmp_path / name) == (Group("a", 1e-3, 0.9), Group("b", 1.0))


@pytest.mark.parametrize(
    ("spec", "lr"),
    [
        ({"type": "constant"}, 1e-3),
        ({"type": "windowed"}, 5e-5),
        ({"type": "windowed", "initial_lr": 0.25}, 0.25),
        ({"type": "windowed", "compat": "original"}, 5e-5),
    ],
)
def test_without_groups_there_is_one_at_the_policys_own_initial_lr(spec, lr):
    assert next(simulate(spec, lines(1.0)))["settings"][0]["lr"] == lr


def test_parameters_that_overflow_give_settings_and_reasons_that_are_numbers():
    spec = {"type": "windowed", "window_size": 4, "cooldown_steps": 0, "increase_factor": 1e308}
    spec |= {"max_change_per_step": 1e308, "lr_max": 1e308}
    answers = list(simulate(spec, lines(*(1 / (1 + i) for i in range(40)))))
    for answer in answers:
        json.dumps(answer, allow_nan=False)
    assert 1.7976931348623157e308 in {answer["fields"].get("change_pct") for answer in answers}
