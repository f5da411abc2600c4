"""Goal: `rules` does what its specification says: every rule, their mixture, their bounds and their marks.

Method: recorded golden cases; an independent reading of the specification on random signals and parameters; each
decision of the specification and each threshold alone, with powers of two so that equality is exact.
"""

import json
import math
import random
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.reference import unrolled

from flyball_server.core.policies import POLICIES
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Group, Observation

RULES = POLICIES["rules"]
TRACES = Path(__file__).parent.parent / "traces"
CASES = json.loads((TRACES / "rules@1" / "default.json").read_text())
LR_RULES = ("none", "loss_decay", "trend", "variance", "grad_norm", "cyclical")
MOMENTUM_RULES = ("none", "inverse", "exp", "relative", "normalized")
REWARD_RULES = ("none", "scaling", "trend", "variance", "kelly")
MIXTURES = [
    {"lr_rule": lr_rule, "momentum_rule": momentum_rule, "reward_rule": reward_rule}
    for lr_rule, momentum_rule, reward_rule in product(LR_RULES, MOMENTUM_RULES, REWARD_RULES)
]
ONE = (Group("all", 1.0, 0.75),)
#: Bounds that no test with powers of two meets by accident.
WIDE = {"min_lr": 2.0**-40, "max_lr": 2.0**40, "min_momentum": 0.0, "max_momentum": 0.984375}


def fold(config, seen, groups=ONE):
    """Every decision, the initial one first. seen: losses, or dicts of signals."""
    config = RULES.config(**config)
    state, decision = RULES.init(config, groups, 0)
    decisions = [decision]
    for step, one in enumerate(seen):
        signals = one if isinstance(one, dict) else {"loss": one}
        state, decision = RULES.step(config, state, Observation(step, **signals))
        decisions.append(decision)
    return decisions


def lrs(decisions):
    return [decision.lr[0] for decision in decisions]


def momenta(decisions):
    return [decision.momentum[0] for decision in decisions]


def codes(decisions):
    return [decision.code for decision in decisions[1:]]


def rewards(*values):
    return [{"reward": value} for value in values]


# ---- golden cases and an independent reading -------------------------------------------------------------


def observations(name):
    return [Observation(**json.loads(line)) for line in (TRACES / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_a_golden_case_is_met_at_every_step(name):
    case = CASES[name]
    groups = case["groups"]
    has = groups["mom"] or [None] * len(groups["lrs"])
    groups = tuple(Group(str(i), lr, m) for i, (lr, m) in enumerate(zip(groups["lrs"], has, strict=True)))
    config = RULES.config(**case["config"])
    rows = {key: unrolled(case[key], case["n"]) for key in ("lr", "momentum", "phase", "decision")}
    state, _ = RULES.init(config, groups, 0)
    assert (case["mode"], case["every"]) == ("default", 1)
    for step, seen in enumerate(observations(case["trace"])[: case["n"]]):
        state, decision = RULES.step(config, state, seen)
        assert decision.lr == pytest.approx(rows["lr"][step], rel=1e-8), step
        assert (decision.phase, decision.code) == (rows["phase"][step], rows["decision"][step]), step
        expected = rows["momentum"][step]
        if any(has) and config.momentum_rule != "none":
            assert decision.momentum == tuple(m and pytest.approx(m, rel=1e-8) for m in expected), step
        else:
            assert decision.momentum is None
            assert expected == [None]
    assert step == case["n"] - 1
    assert decision.lr == pytest.approx(case["final"]["lr"], rel=1e-8)


def between(x, low, high):
    return min(max(x, low), high)


def unusable(x):
    return math.isnan(x) or math.isinf(x) or abs(x) > 1e100


def smoothed(values, beta):
    value = values[0]
    for x in values[1:]:
        value = x if beta is None else beta * value + (1 - beta) * x
    return value


def spread_of(values, window):
    part = values[-window:]
    return statistics.variance(part) if len(part) > 1 else 0.0


def read(c, lr, mu, trace):
    """The specification, line by line, over whole histories: (marks, LR, momentum) after every observation.

    c: every parameter by name. lr, mu: of the only group; mu is None where it has no momentum.
    """
    low = lr / 50 if c["min_lr"] is None else c["min_lr"]
    high = 10 * lr if c["max_lr"] is None else c["max_lr"]
    eta, f, r, t_c, length, bad_run = lr, 1.0, 1.0, 0, c["cycle_length"], 0
    history = {"loss": [], "reward": [], "grad_norm": []}
    smooth_losses, smooth_rewards, rows = [], [], []
    now = between(lr, low, high)
    mu = None if mu is None else between(mu, c["min_momentum"], c["max_momentum"])
    for seen in trace:
        given = {key: value for key, value in seen.items() if value is not None}
        if "loss" in given and unusable(given["loss"]):
            bad_run += 1
            if bad_run % c["bad_limit"] == 0:
                eta = max(eta / 2, low)
                now = between(eta * f * r, low, high)
            rows.append(("nonfinite_hold" if bad_run % c["bad_limit"] else "nonfinite_backoff", now, mu))
            continue
        given = {key: value for key, value in given.items() if not unusable(value)}
        for key, value in given.items():
            history[key].append(value)
        loss = before = better = reward = None
        if "loss" in given:
            bad_run = 0
            smooth_losses.append(smoothed(history["loss"], c["ema_loss_beta"]))
            loss = smooth_losses[-1]
            before = smooth_losses[-2] if len(smooth_losses) > 1 else None
            better = None if before is None else before - loss > c["trend_tol"] * abs(before)
        if "reward" in given:
            smooth_rewards.append(smoothed(history["reward"], c["ema_reward_beta"]))
            reward = smooth_rewards[-1]
        marks = []
        match c["lr_rule"]:
            case "cyclical":
                q = min(low / lr, 1)
                f = q + (1 - q) * (1 + math.cos(math.pi * t_c / length)) / 2
                t_c += 1
                if t_c < length:
                    marks.append("cyclical")
                else:
                    marks.append("cyclical_restart_next")
                    t_c, length = 0, max(1, int(length * c["cycle_mult"]))
            case "grad_norm" if "grad_norm" in given:
                f = 1 / (1 + c["grad_kappa"] * smoothed(history["grad_norm"], c["ema_grad_beta"]) ** 2)
                marks.append("grad_norm")
            case "grad_norm":
                marks.append("no_grad_norm")
            case "loss_decay" | "trend" | "variance" if loss is None:
                marks.append("no_loss")
            case "loss_decay":
                eta /= 1 + c["loss_decay_k"] * max(loss, 0)
                marks.append("loss_decay")
            case "trend" if better is None:
                marks.append("first")
            case "trend":
                eta *= c["lr_up"] if better else c["lr_down"]
                marks.append("trend_up" if better else "trend_down")
            case "variance":
                f = 1 / (1 + c["variance_alpha"] * spread_of(history["loss"], c["variance_window"]))
                marks.append("variance")
        rose = None
        match c["reward_rule"]:
            case "scaling" | "trend" | "variance" | "kelly" if reward is None:
                marks.append("no_reward")
            case "scaling":
                r = between(1 + (reward - c["reward_center"]) / c["reward_span"], 0, 2)
                marks.append("reward_scaling")
            case "trend" if len(smooth_rewards) == 1:
                marks.append("reward_first")
            case "trend":
                rose = smooth_rewards[-1] > smooth_rewards[-2]
                eta *= c["reward_up"] if rose else c["reward_down"]
                marks.append("reward_up" if rose else "reward_down")
            case "variance":
                r = 1 / (1 + c["reward_alpha"] * spread_of(smooth_rewards, c["reward_window"]))
                marks.append("reward_variance")
            case "kelly":
                r = 1 + c["kelly_gain"] * math.tanh(reward / c["kelly_temperature"])
                marks.append("reward_kelly")
        eta = between(eta, low, high)
        bottom, top, rate, rule = c["min_momentum"], c["max_momentum"], c["relative_rate"], c["momentum_rule"]
        if mu is not None and c["reward_momentum"] and rose is not None:
            mu = between(mu + rate * (top - mu) if rose else mu - rate * (mu - bottom), bottom, top)
        if rule != "none":
            marks.append("no_momentum" if mu is None else "momentum_no_loss" if loss is None else f"momentum_{rule}")
        if rule != "none" and mu is not None and loss is not None:
            positive = max(loss, 0)
            if rule == "inverse":
                mu = 1 / (1 + positive) if c["inverse_direction"] == "falling" else 1 - 1 / (1 + positive)
            elif rule == "exp":
                mu = 1 - math.exp(-c["exp_a"] * positive)
            elif rule == "normalized":
                largest = max(map(abs, smooth_losses))
                mu = top - (top - bottom) * (abs(loss) / largest if largest else 0)
            elif better is not None:
                mu = mu + rate * (top - mu) if better else mu - rate * (mu - bottom)
            mu = between(mu, bottom, top)
        now = between(eta * f * r, low, high)
        rows.append(("+".join(marks), now, mu))
    return rows


def some_config(chance):
    config = {
        "lr_rule": chance.choice(LR_RULES), "momentum_rule": chance.choice(MOMENTUM_RULES),
        "reward_rule": chance.choice(REWARD_RULES), "reward_momentum": chance.random() < 0.3,
        "inverse_direction": chance.choice(["rising", "falling"]), "bad_limit": chance.choice([1, 2, 3]),
        "variance_window": chance.choice([2, 3, 20]), "reward_window": chance.choice([2, 5, 20]),
        "cycle_length": chance.choice([1, 2, 7, 50]), "cycle_mult": chance.choice([0.3, 1.0, 1.5, 2]),
    }  # fmt: skip
    for key in ("ema_loss_beta", "ema_reward_beta", "ema_grad_beta"):
        config[key] = chance.choice([None, None, 0.0, 0.5, 0.9])
    for key, values in {
        "trend_tol": [0.0, 0.0, 0.01, 0.3], "variance_alpha": [0.0, 1.0, 10.0], "reward_alpha": [0.1, 1.0],
        "grad_kappa": [0.01, 1.0], "loss_decay_k": [1e-3, 0.1], "reward_center": [0.0, 0.5], "reward_span": [1.0, 0.3],
        "kelly_gain": [0.2, 1.0], "kelly_temperature": [1.0, 0.2], "exp_a": [1.0, 0.2], "relative_rate": [0.05, 0.5],
        "lr_up": [1.02, 1.3], "lr_down": [0.98, 0.8], "reward_up": [1.02, 1.2], "reward_down": [0.98, 0.7],
        "min_lr": [None, 0.01, 0.08], "max_lr": [None, 0.2, 0.09], "min_momentum": [0.5, 0.0], "max_momentum": [0.95],
    }.items():  # fmt: skip
        config[key] = chance.choice(values)
    if (config["lr_rule"], config["momentum_rule"], config["reward_rule"]) == ("none", "none", "none"):
        config["lr_rule"] = "trend"
    return config


def some_signals(chance, n):
    level = chance.choice([3.0, 0.5, -1.0])
    for _ in range(n):
        level += chance.choice([-0.05, -0.01, 0.02, 0.0])
        loss = round(level + chance.choice([0.0, 0.3]) * chance.gauss(0, 1), 2)  # two digits, so that values repeat
        unusual = [None, None, math.nan, math.inf, -1e101]
        yield {
            "loss": chance.choice(unusual) if chance.random() < 0.1 else loss,
            "reward": chance.choice(unusual) if chance.random() < 0.2 else round(chance.gauss(0.3, 0.6), 1),
            "grad_norm": chance.choice(unusual) if chance.random() < 0.2 else abs(chance.gauss(0, 2)),
        }


@pytest.mark.parametrize("trial", range(150))
def test_the_rules_agree_with_an_independent_reading_of_them(trial):
    chance = random.Random(trial)
    config, trace = some_config(chance), list(some_signals(chance, 200))
    lr, mu = chance.choice([0.1, 0.085, 1.0]) if config["min_lr"] is None else 0.085, chance.choice([0.9, 0.97, None])
    if lr == 1.0:
        config["max_lr"] = None
    got = fold(config, trace, (Group("all", lr, mu),))[1:]
    expected = read(asdict(RULES.config(**config)), lr, mu, trace)
    assert [one.code for one in got] == [code for code, _, _ in expected]
    assert lrs(got) == pytest.approx([now for _, now, _ in expected], rel=1e-9)
    moves = config["momentum_rule"] != "none" or (config["reward_momentum"] and config["reward_rule"] == "trend")
    if mu is None or not moves:
        assert {one.momentum for one in got} == {None}
    else:
        assert momenta(got) == pytest.approx([momentum for _, _, momentum in expected], rel=1e-9)


# ---- parameters ------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_table():
    assert RULES.tag == "rules@1"
    assert asdict(RULES.config()) == {
        "lr_rule": "none", "momentum_rule": "none", "reward_rule": "none",
        "ema_loss_beta": None, "ema_reward_beta": None, "ema_grad_beta": None,
        "loss_decay_k": 1e-3, "lr_up": 1.02, "lr_down": 0.98, "trend_tol": 0,
        "variance_window": 20, "variance_alpha": 1, "grad_kappa": 0.01, "cycle_length": 500, "cycle_mult": 2,
        "reward_center": 0, "reward_span": 1, "reward_up": 1.02, "reward_down": 0.98, "reward_momentum": False,
        "reward_window": 20, "reward_alpha": 1, "kelly_gain": 0.2, "kelly_temperature": 1,
        "exp_a": 1, "relative_rate": 0.05, "inverse_direction": "rising",
        "min_lr": None, "max_lr": None, "min_momentum": 0.5, "max_momentum": 0.95,
        "momentum_target": "momentum", "group_mode": "ratio", "bad_limit": 3,
    }  # fmt: skip


BELOW_1, TINY = math.nextafter(1, 0), 5e-324
LIMITS = {  # parameter: (smallest allowed, refused below it, largest allowed, refused above it)
    **dict.fromkeys(("ema_loss_beta", "ema_reward_beta", "ema_grad_beta"), (0, -TINY, BELOW_1, 1)),
    **dict.fromkeys(("loss_decay_k", "trend_tol", "variance_alpha", "grad_kappa"), (0, -TINY, 1e300, math.inf)),
    **dict.fromkeys(("reward_alpha", "exp_a"), (0, -TINY, 1e300, math.inf)),
    **dict.fromkeys(("lr_up", "reward_up"), (1, BELOW_1, 1e300, math.inf)),
    **dict.fromkeys(("lr_down", "reward_down"), (TINY, 0, 1, math.nextafter(1, 2))),
    **dict.fromkeys(("variance_window", "reward_window"), (2, 1, 10_000, 10_001)),
    **dict.fromkeys(("kelly_gain", "relative_rate"), (0, -TINY, 1, math.nextafter(1, 2))),
    **dict.fromkeys(("reward_span", "kelly_temperature", "min_lr", "max_lr"), (TINY, 0, 1e300, math.inf)),
    **dict.fromkeys(("cycle_length", "bad_limit"), (1, 0, 2**53, 2**53 + 1)),
    "cycle_mult": (TINY, 0, 1000, math.nextafter(1000, 2000)),
    "min_momentum": (0, -TINY, 0.95, 1),
    "max_momentum": (0.5, -TINY, BELOW_1, 1),
    "reward_center": (-1e300, -math.inf, 1e300, math.inf),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_parameter_is_taken_up_to_its_limits_and_refused_beyond(name):
    smallest, too_small, largest, too_large = LIMITS[name]
    for value in (smallest, largest):
        assert getattr(RULES.config(**{name: value}), name) == value
    for value in (too_small, too_large):
        with pytest.raises(ValueError, match=f"^{name}: "):
            RULES.config(**{name: value})


def test_every_numeric_parameter_has_its_limits_tested():
    words = {"lr_rule", "momentum_rule", "reward_rule", "reward_momentum", "inverse_direction", "momentum_target"}
    assert set(asdict(RULES.config())) == set(LIMITS) | words | {"group_mode"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"min_lr": 0.5, "max_lr": 0.25}, "min_lr: 0.5 is above max_lr = 0.25; give both"),
        ({"min_momentum": 0.96}, "min_momentum: 0.96 is above max_momentum = 0.95; give both"),
        ({"lr_rule": "cosine"}, "lr_rule: 'cosine'"),
        ({"group_mode": None}, "group_mode: None"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_the_remedy(parameters, words):
    with pytest.raises(ValueError, match=words):
        RULES.config(**parameters)


def test_bounds_may_be_equal_and_then_nothing_moves():
    pinned = {"min_lr": 0.5, "max_lr": 0.5, "min_momentum": 0.5, "max_momentum": 0.5}
    decisions = fold({**pinned, "lr_rule": "trend", "momentum_rule": "relative"}, [4.0, 3.0, 5.0])
    assert (set(lrs(decisions)), set(momenta(decisions))) == ({0.5}, {0.5})


@pytest.mark.parametrize("bound", [{"min_lr": 10.5}, {"max_lr": 0.019}])
def test_a_bound_that_the_derived_one_contradicts_is_refused_at_attach(bound):
    with pytest.raises(ValueError, match=r"min_lr: .* is above max_lr = .*; give both, with min_lr <= max_lr"):
        fold({"lr_rule": "trend", **bound}, [])
    assert lrs(fold(bound, [])) == [1.0]  # inert: no bound matters


# ---- D3-1: inert, and the first values -------------------------------------------------------------------


def test_with_all_rules_off_nothing_is_written_whatever_comes():
    config = RULES.config(min_lr=2.0, max_lr=4.0, min_momentum=0.1, max_momentum=0.2, reward_momentum=True)
    state, first = RULES.init(config, (Group("a", 1.0, 0.9), Group("b", 0.0)), 0)
    assert first[:5] == ((1.0, 0.0), None, None, "-", "initial")
    nothing = [[], 0.0, 0.0, 0.0, 0.0, 0]
    assert dump_state(state) == [
        1.0, 1.0, [1.0, 0.0], *[None] * 4, nothing, nothing, 1.0, 1.0, [0, 500], 0.0, 0, [],
    ]  # fmt: skip
    for seen in (1.0, math.nan, math.inf, None, math.nan, math.nan):
        before = state
        state, decision = RULES.step(config, state, Observation(0, seen, seen, seen))
        assert state is before
        assert decision.lr is first.lr
        assert decision[1:] == (None, None, "-", "inert", None, False, ())


@pytest.mark.parametrize(
    "rule", [{"lr_rule": "loss_decay"}, {"momentum_rule": "inverse"}, {"reward_rule": "scaling"}], ids=str
)
def test_any_single_rule_brings_the_first_values_within_the_bounds(rule):
    for bounds, lr in (({"min_lr": 2.0}, 2.0), ({"max_lr": 0.5}, 0.5)):
        assert lrs(fold({**rule, **bounds}, [None])) == [lr, lr]
    for bounds, momentum in (({"min_momentum": 0.875}, 0.875), ({"max_momentum": 0.625}, 0.625)):
        decisions = fold({**rule, **bounds}, [None])
        if "momentum_rule" in rule:
            assert momenta(decisions) == [momentum, momentum]
        else:
            assert [one.momentum for one in decisions] == [None, None]


def test_the_controller_remembers_a_base_outside_the_bounds_until_the_first_step():
    assert lrs(fold({"lr_rule": "loss_decay", "loss_decay_k": 1.0, "max_lr": 0.75}, [1.0])) == [0.75, 0.5]
    assert lrs(fold({"lr_rule": "loss_decay", "loss_decay_k": 1.0, "max_lr": 0.25}, [1.0, 1.0])) == [0.25, 0.25, 0.125]


# ---- bad numbers and missing ones ------------------------------------------------------------------------


def test_every_third_unusable_loss_in_a_row_halves_and_nothing_else_is_read():
    bad = {"loss": math.nan, "reward": 9.0, "grad_norm": 9.0}
    seen = [4.0, bad, bad, 2.0, bad, math.inf, {"reward": 1.0}, -math.inf, bad, bad, bad, {"reward": 1.0}]
    decisions = fold({"lr_rule": "trend", "lr_up": 2, "reward_rule": "scaling"}, seen)
    hold, cut = "nonfinite_hold", "nonfinite_backoff"
    assert codes(decisions) == [
        "first+no_reward", hold, hold, "trend_up+no_reward", hold, hold, "no_loss+reward_scaling", cut, hold, hold, cut,
        "no_loss+reward_scaling",
    ]  # fmt: skip
    assert lrs(decisions) == [1, 1, 1, 1, 2, 2, 2, 4, 2, 2, 2, 1, 1]
    assert decisions[2].fields == {"bad_run": 1}
    assert decisions[8].fields == {"bad_run": 3, "old_lr": 4.0, "new_lr": 2.0, "eta": 1.0}
    assert decisions[11].fields == {"bad_run": 6, "old_lr": 2.0, "new_lr": 1.0, "eta": 0.5}


def test_backing_off_stops_at_the_lowest_lr_and_keeps_the_momentum():
    decisions = fold({"lr_rule": "trend", "momentum_rule": "exp", "bad_limit": 1, "min_lr": 0.375}, [math.nan] * 3)
    assert lrs(decisions) == [1.0, 0.5, 0.375, 0.375]
    assert decisions[3].lr is decisions[2].lr
    assert momenta(decisions) == [0.75] * 4
    factor = fold({"reward_rule": "scaling", "bad_limit": 1, "max_lr": 1.25}, [*rewards(1.0), math.nan, math.nan])
    assert lrs(factor) == [1, 1.25, 1, 0.5]


def test_a_signal_counts_up_to_its_largest_size_and_no_further():
    beyond = math.nextafter(1e100, math.inf)
    assert codes(fold({"lr_rule": "trend"}, [1e100, -1e100, beyond, -beyond])) == [
        "first", "trend_up", "nonfinite_hold", "nonfinite_hold",
    ]  # fmt: skip
    for signal, rule, yes, no in (
        ("reward", {"reward_rule": "scaling"}, "reward_scaling", "no_reward"),
        ("grad_norm", {"lr_rule": "grad_norm"}, "grad_norm", "no_grad_norm"),
    ):
        values = [1e100, -1e100, beyond, -beyond, math.nan, math.inf, -math.inf, None]
        assert codes(fold(rule, [{signal: value} for value in values])) == [yes] * 2 + [no] * 6


@pytest.mark.parametrize(
    ("rule", "signal", "mark", "good"),
    [
        *[({"lr_rule": rule}, "loss", "no_loss", [4.0, 2.0]) for rule in ("trend", "loss_decay", "variance")],
        ({"lr_rule": "grad_norm"}, "grad_norm", "no_grad_norm", [1.0, 2.0]),
        *[({"reward_rule": rule}, "reward", "no_reward", [0.25, 0.5]) for rule in REWARD_RULES[1:]],
        *[({"momentum_rule": rule}, "loss", "momentum_no_loss", [4.0, 2.0]) for rule in MOMENTUM_RULES[1:]],
    ],
    ids=str,
)
def test_a_missing_signal_moves_nothing_and_is_marked(rule, signal, mark, good):
    """As if the steps without it had not been."""
    measured = [{signal: value} for value in good]
    gaps = fold(rule, [{}, measured[0], {}, {}, measured[1], {}])
    plain = fold(rule, measured)
    assert [codes(gaps)[i] for i in (0, 2, 3, 5)] == [mark] * 4
    assert [gaps[i][:2] for i in (1, 3, 4, 6)] == [plain[i][:2] for i in (0, 1, 1, 2)]
    assert [gaps[i].code for i in (2, 5)] == [plain[i].code for i in (1, 2)]


def test_d3_11_without_losses_the_trend_never_acts():
    decisions = fold({"lr_rule": "trend", "reward_rule": "trend"}, rewards(1.0, 2.0, 1.0))
    assert codes(decisions) == ["no_loss+reward_first", "no_loss+reward_up", "no_loss+reward_down"]


# ---- smoothing -------------------------------------------------------------------------------------------


def test_each_signal_has_an_exponential_mean_of_its_own():
    seen = [{"loss": 8.0, "reward": 4.0, "grad_norm": 2.0}, {"loss": 4.0, "reward": 8.0, "grad_norm": 6.0}]
    betas = {"ema_loss_beta": 0.75, "ema_reward_beta": 0.5, "ema_grad_beta": 0.25}
    for name, field, smooth, raw in (
        ("ema_loss_beta", "loss_s", 7.0, 4.0), ("ema_reward_beta", "reward_s", 6.0, 8.0),
        ("ema_grad_beta", "grad_s", 5.0, 6.0),
    ):  # fmt: skip
        assert fold({"lr_rule": "grad_norm", name: betas[name]}, seen)[-1].fields[field] == smooth
        others = {key: beta for key, beta in betas.items() if key != name}
        assert fold({"lr_rule": "grad_norm", **others}, seen)[-1].fields[field] == raw


def test_the_trend_compares_smoothed_values():
    seen = [{"loss": 8.0, "reward": 0.0}, {"loss": 0.0, "reward": 8.0}, {"loss": 3.0, "reward": 3.0}]
    rule = {"lr_rule": "trend", "reward_rule": "trend"}
    assert codes(fold(rule, seen))[-1] == "trend_down+reward_down"
    assert codes(fold({**rule, "ema_loss_beta": 0.5, "ema_reward_beta": 0.5}, seen))[-1] == "trend_up+reward_down"
    assert codes(fold({**rule, "ema_loss_beta": 0.75, "ema_reward_beta": 0.75}, seen))[-1] == "trend_up+reward_up"


def test_the_window_holds_raw_losses_but_smoothed_rewards():
    seen = [{"loss": 0.0, "reward": 0.0}, {"loss": 4.0, "reward": 4.0}]
    betas = {"ema_loss_beta": 0.5, "ema_reward_beta": 0.5}
    assert fold({"lr_rule": "variance", **betas}, seen)[-1].fields["var"] == 8.0
    assert fold({"reward_rule": "variance", **betas}, seen)[-1].fields["var"] == 2.0


# ---- the learning rate's rules ---------------------------------------------------------------------------


def test_d3_2_rules_with_a_memory_compound_and_factors_do_not():
    same = [{"loss": 4.0, "reward": 0.5, "grad_norm": 3.0}] * 5
    decay = lrs(fold({**WIDE, "lr_rule": "loss_decay", "loss_decay_k": 0.25}, same))
    assert decay == [1, 0.5, 0.25, 2**-3, 2**-4, 2**-5]
    assert lrs(fold({**WIDE, "lr_rule": "trend", "lr_down": 0.5}, same)) == [1, 1, 0.5, 0.25, 2**-3, 2**-4]
    assert lrs(fold({**WIDE, "reward_rule": "trend", "reward_down": 0.5}, same)) == [1, 1, 0.5, 0.25, 2**-3, 2**-4]
    factors = ({"lr_rule": "variance"}, {"lr_rule": "grad_norm"}, {"reward_rule": "scaling"}, {"reward_rule": "kelly"})
    for rule in factors:
        assert len(set(lrs(fold({**WIDE, **rule}, same))[1:])) == 1


def test_d3_2_a_mixture_is_the_product_within_the_bounds():
    seen = [{"loss": 4.0, "reward": 1.0, "grad_norm": 1.0}, {"loss": 2.0, "reward": 0.5, "grad_norm": 1.0}]
    mixed = fold({**WIDE, "lr_rule": "grad_norm", "grad_kappa": 1.0, "reward_rule": "scaling"}, seen)
    assert lrs(mixed) == [1.0, 0.5 * 2.0, 0.5 * 1.5]
    memory = fold({**WIDE, "lr_rule": "trend", "lr_up": 4.0, "reward_rule": "scaling"}, seen)
    assert lrs(memory) == [1.0, 2.0, 4.0 * 1.5]
    both = fold({**WIDE, "lr_rule": "trend", "lr_up": 4.0, "reward_rule": "trend", "reward_down": 0.5}, seen)
    assert lrs(both) == [1.0, 1.0, 2.0]


def test_a_controller_at_its_bound_turns_back_at_once():
    decisions = fold({"lr_rule": "trend", "lr_up": 8, "lr_down": 0.5, "max_lr": 4.0}, [4.0, 3.0, 2.0, 2.0])
    assert lrs(decisions) == [1, 1, 4, 4, 2]
    assert [one.fields["eta"] for one in decisions[1:]] == [1, 4, 4, 2]
    assert decisions[3].lr is decisions[2].lr
    down = fold({"lr_rule": "trend", "lr_up": 2, "lr_down": 0.125, "min_lr": 0.25}, [4.0, 4.0, 4.0, 3.0])
    assert lrs(down) == [1, 1, 0.25, 0.25, 0.5]


def test_loss_decay_divides_and_takes_a_negative_loss_for_zero():
    assert lrs(fold({"lr_rule": "loss_decay"}, [1000.0])) == [1.0, 0.5]
    assert lrs(fold({"lr_rule": "loss_decay"}, [-1000.0])) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("before", "loss", "tol", "mark"),
    [
        (4.0, 3.0, 0.25, "trend_down"), (4.0, 2.9, 0.25, "trend_up"),
        (-4.0, -5.0, 0.25, "trend_down"), (-4.0, -5.1, 0.25, "trend_up"), (-4.0, -4.5, 0.25, "trend_down"),
        (4.0, 4.0, 0.0, "trend_down"), (4.0, math.nextafter(4, 0), 0.0, "trend_up"), (0.0, -1e-300, 0.5, "trend_up"),
    ],
)  # fmt: skip
def test_a_loss_improves_only_by_more_than_the_tolerance(before, loss, tol, mark):
    decisions = fold({"lr_rule": "trend", "trend_tol": tol}, [before, loss])
    assert codes(decisions) == ["first", mark]
    assert lrs(decisions) == [1.0, 1.0, 1.02 if mark == "trend_up" else 0.98]


def test_d3_4_the_variance_is_that_of_the_window_from_the_second_value_on():
    decisions = fold({**WIDE, "lr_rule": "variance", "variance_window": 2}, [1.0, 3.0, 3.0, 5.0])
    assert lrs(decisions) == [1.0, 1.0, 1 / 3, 1.0, 1 / 3]
    assert [one.fields["var"] for one in decisions[1:]] == [0.0, 2.0, 0.0, 2.0]
    assert lrs(fold({**WIDE, "lr_rule": "variance", "variance_alpha": 0.5}, [1.0, 3.0])) == [1.0, 1.0, 0.5]
    for rule, seen in (("lr_rule", [1.0] + [0.0] * 20), ("reward_rule", rewards(1, *[0] * 20))):
        after = lrs(fold({**WIDE, rule: "variance"}, seen))  # the first value leaves a window of 20 with the 21st
        assert after[20] < 0.96
        assert after[21] == 1.0


def test_d3_5_the_gradient_norm_makes_a_trust_factor():
    assert lrs(fold({"lr_rule": "grad_norm"}, [{"grad_norm": 10.0}, {"grad_norm": 0.0}])) == [1.0, 0.5, 1.0]
    assert lrs(fold({"lr_rule": "grad_norm", "grad_kappa": 0.25}, [{"grad_norm": 2.0}])) == [1.0, 0.5]


def test_d3_6_the_cycle_goes_from_the_base_to_the_bottom_and_grows_at_each_restart():
    decisions = fold({"lr_rule": "cyclical", "min_lr": 0.5, "cycle_length": 2}, [None, 3.0, None, 2.0, None, 3.0, None])
    assert lrs(decisions) == pytest.approx([1, 1, 0.75, 1, 0.75 + 0.25 * 0.5**0.5, 0.75, 0.75 - 0.25 * 0.5**0.5, 1])
    plain, last = "cyclical", "cyclical_restart_next"
    assert codes(decisions) == [plain, last, plain, plain, plain, last, plain]
    assert [one.fields["t_c"] for one in decisions[1:]] == [0, 1, 0, 1, 2, 3, 0]
    assert [one.fields["T"] for one in decisions[1:]] == [2, 2, 4, 4, 4, 4, 8]


def test_a_cycle_is_never_shorter_than_one_observation_and_its_length_is_whole():
    for first, factor, lengths in ((3, 0.5, [3, 3, 3, 1, 1]), (1, 2.5, [1, 2, 2, 5])):
        decisions = fold({"lr_rule": "cyclical", "cycle_length": first, "cycle_mult": factor}, [1.0] * len(lengths))
        assert [one.fields["T"] for one in decisions[1:]] == lengths


def test_the_cycle_counts_observations_but_not_unusable_losses():
    decisions = fold({"lr_rule": "cyclical", "cycle_length": 2}, [1.0, math.nan, None])
    assert codes(decisions) == ["cyclical", "nonfinite_hold", "cyclical_restart_next"]


def test_a_bottom_above_the_base_is_no_cycle():
    decisions = fold({"lr_rule": "cyclical", "min_lr": 2.0, "cycle_length": 2}, [1.0] * 3)
    assert lrs(decisions) == [2.0] * 4
    frozen = fold({"lr_rule": "cyclical", "cycle_length": 2}, [1.0] * 3, (Group("frozen", 0.0),))
    assert {one.fields["f_lr"] for one in decisions[1:] + frozen[1:]} == {1.0}


# ---- the reward's rules ----------------------------------------------------------------------------------


def test_d3_3_reward_scaling_maps_center_minus_and_plus_span_to_nothing_and_twice_the_base():
    config = {"reward_rule": "scaling", "reward_center": 8.0, "reward_span": 4.0}
    seen = rewards(4.0, 8.0, 12.0, 6.0, 0.0, 1e6, -1e6)
    assert lrs(fold({**config, "min_lr": 2.0**-20}, seen)) == [1, 2.0**-20, 1, 2, 0.5, 2.0**-20, 2, 2.0**-20]
    assert lrs(fold(config, seen)) == [1, 0.02, 1, 2, 0.5, 0.02, 2, 0.02]
    assert lrs(fold({**config, "max_lr": 1.5}, seen))[3] == 1.5
    assert lrs(fold({"reward_rule": "scaling"}, rewards(-1.0, 0.0, 1.0))) == [1, 0.02, 1, 2]
    assert fold({**config, "min_lr": 0.25}, seen)[2 - 1].fields["f_rw"] == 0.0


def test_the_reward_s_trend_multiplies_and_equal_is_not_up():
    decisions = fold({"reward_rule": "trend"}, rewards(1.0, 1.0, 2.0, 1.0))
    assert codes(decisions) == ["reward_first", "reward_down", "reward_up", "reward_down"]
    assert lrs(decisions) == pytest.approx([1, 1, 0.98, 0.98 * 1.02, 0.98 * 1.02 * 0.98], rel=1e-15)


def test_the_reward_s_variance_damps():
    decisions = fold({**WIDE, "reward_rule": "variance", "reward_window": 2, "reward_alpha": 1.5}, rewards(1, 3, 3, 5))
    assert lrs(decisions) == [1.0, 1.0, 0.25, 1.0, 0.25]


def test_d3_13_kelly_is_a_factor_by_the_size_of_the_reward():
    decisions = fold({**WIDE, "reward_rule": "kelly"}, rewards(0.0, 1e9, -1e9, 1.0, 1.0))
    tanh = 0.7615941559557649
    assert lrs(decisions) == pytest.approx([1, 1, 1.2, 0.8, 1 + 0.2 * tanh, 1 + 0.2 * tanh], rel=1e-15)
    scaled = {**WIDE, "reward_rule": "kelly", "kelly_gain": 0.5, "kelly_temperature": 2.0}
    assert lrs(fold(scaled, rewards(2.0)))[1] == pytest.approx(1 + 0.5 * tanh, rel=1e-15)


# ---- momentum --------------------------------------------------------------------------------------------


def test_d3_7_inverse_rises_with_the_loss_unless_told_to_fall():
    for direction, values in (("rising", [0.0, 0.5, 0.75, 0.0]), ("falling", [0.984375, 0.5, 0.25, 0.984375])):
        config = {**WIDE, "momentum_rule": "inverse", "inverse_direction": direction}
        assert momenta(fold(config, [0.0, 1.0, 3.0, -3.0]))[1:] == values


def test_exp_saturates_with_the_loss():
    double = fold({**WIDE, "momentum_rule": "exp", "exp_a": 2.0}, [math.log(2) / 2, 0.0, -1.0])
    assert momenta(double) == [0.75, 0.5, 0, 0]
    assert momenta(fold({**WIDE, "momentum_rule": "exp"}, [math.log(2)]))[1] == 0.5


def test_d3_8_relative_goes_a_part_of_the_way_up_if_improving_and_down_if_not():
    config = {"min_momentum": 0.5, "max_momentum": 0.875, "momentum_rule": "relative", "relative_rate": 0.5}
    decisions = fold(config, [4.0, 3.0, 3.0, 5.0])
    assert momenta(decisions) == [0.75, 0.75, 0.8125, 0.65625, 0.578125]
    assert codes(decisions) == ["momentum_relative"] * 4
    assert momenta(fold({"momentum_rule": "relative"}, [4.0, 3.0]))[-1] == pytest.approx(0.75 + 0.05 * 0.2)


def test_d3_8_normalized_is_highest_at_no_loss_and_lowest_at_the_largest_so_far():
    config = {"min_momentum": 0.5, "max_momentum": 0.75, "momentum_rule": "normalized"}
    assert momenta(fold(config, [0.0, 4.0, 2.0, -8.0, 4.0, -2.0])) == [0.75, 0.75, 0.5, 0.625, 0.5, 0.625, 0.6875]
    assert momenta(fold(config, [2.0**-20, 2.0**-21])) == [0.75, 0.5, 0.625]
    smooth = fold({**config, "ema_loss_beta": 0.5}, [4.0, 8.0, 0.0])
    assert [one.fields["labs"] for one in smooth[1:]] == [4.0, 6.0, 6.0]
    assert momenta(smooth)[-1] == 0.625


@pytest.mark.parametrize("rule", MOMENTUM_RULES[1:])
def test_momentum_moves_only_where_the_optimizer_has_it(rule):
    groups = (
        Group("sgd", 1.0, 0.75), Group("off", 1.0, 0.0), Group("plain", 1.0), Group("adam", 1.0, None, (0.625, 0.999)),
    )  # fmt: skip
    config = {"momentum_rule": rule, "relative_rate": 0.5, "min_momentum": 0.25}
    for target, third in (("momentum", None), ("beta1", "moves")):
        one, two = fold({**config, "momentum_target": target}, [1.0, 0.5], groups)[1:]
        for decision in (one, two):
            assert decision.momentum[1:3] == (0.0, None)
            assert third or decision.momentum[3] == 0.625
        assert one.momentum[0] != two.momentum[0]
        assert (one.momentum[3] != two.momentum[3]) == bool(third)
    for nothing in (groups[1:3], groups[1:]):
        decisions = fold(config, [1.0, None], nothing)
        assert codes(decisions) == ["no_momentum"] * 2
        assert [one.momentum for one in decisions] == [None] * 3


def test_each_group_goes_its_own_way_under_relative_and_all_get_one_value_otherwise():
    groups = (Group("a", 1.0, 0.625), Group("b", 1.0, 0.75))
    bounds = {"min_momentum": 0.5, "max_momentum": 0.875}
    relative = fold({**bounds, "momentum_rule": "relative", "relative_rate": 0.5}, [4.0, 2.0], groups)
    assert [one.momentum for one in relative] == [(0.625, 0.75), (0.625, 0.75), (0.75, 0.8125)]
    assert fold({**bounds, "momentum_rule": "normalized"}, [4.0], groups)[-1].momentum == (0.5, 0.5)


def test_momentum_that_does_not_move_is_the_very_same_object():
    for groups in (ONE, (*ONE, Group("b", 1.0, 0.5))):
        for rule in MOMENTUM_RULES[1:]:
            decisions = fold({"momentum_rule": rule}, [1.0, None, math.nan], groups)
            assert decisions[1].momentum is decisions[2].momentum is decisions[3].momentum
        for rule in ("inverse", "exp", "normalized"):
            decisions = fold({"momentum_rule": rule}, [2.0, 2.0], groups)
            assert decisions[1].momentum is decisions[2].momentum
        first, second = fold({"momentum_rule": "relative", "max_momentum": 0.75}, [2.0], groups)
        assert first.momentum is second.momentum


def test_d3_12_the_reward_s_trend_moves_the_lr_only_unless_momentum_is_asked_for():
    seen = rewards(1.0, 2.0, 2.0)
    assert [one.momentum for one in fold({"reward_rule": "trend"}, seen)] == [None] * 4
    config = {"reward_momentum": True, "relative_rate": 0.5, "min_momentum": 0.5, "max_momentum": 0.875}
    decisions = fold({**config, "reward_rule": "trend"}, seen)
    assert momenta(decisions) == [0.75, 0.75, 0.8125, 0.65625]
    assert codes(decisions) == ["reward_first", "reward_up", "reward_down"]
    for other in ("scaling", "variance", "kelly"):
        assert [one.momentum for one in fold({**config, "reward_rule": other}, seen)] == [None] * 4
    assert [one.momentum for one in fold({**config, "reward_rule": "trend"}, seen, (Group("a", 1.0),))] == [None] * 4


def test_d3_12_a_momentum_rule_has_the_last_word_after_the_reward():
    bounds = {"reward_momentum": True, "relative_rate": 0.5, "min_momentum": 0.5, "max_momentum": 0.875}
    seen = [{"loss": 4.0, "reward": 1.0}, {"loss": 4.0, "reward": 2.0}]
    relative = fold({**bounds, "reward_rule": "trend", "momentum_rule": "relative"}, seen)
    assert momenta(relative) == [0.75, 0.75, (0.8125 + 0.5) / 2]
    assert momenta(fold({**bounds, "reward_rule": "trend", "momentum_rule": "normalized"}, seen))[-1] == 0.5
    off = {**bounds, "reward_momentum": False, "reward_rule": "trend", "momentum_rule": "relative"}
    assert momenta(fold(off, seen)) == [0.75, 0.75, 0.625]


# ---- groups ----------------------------------------------------------------------------------------------


def test_groups_keep_their_ratios_or_get_one_lr_and_a_frozen_group_stays_frozen():
    groups = (Group("frozen", 0.0, 0.75), Group("body", 1.0), Group("head", 4.0))
    config = {"lr_rule": "trend", "lr_up": 2}
    for mode, expected in (("ratio", (0, 2, 8)), ("same", (0, 2, 2))):
        assert fold({**config, "group_mode": mode}, [4.0, 2.0], groups)[-1].lr == expected
    bounded = fold({**config, "max_lr": 1.5, "min_lr": 0.5}, [4.0, 2.0], groups)[-1]
    assert bounded.lr == (0, 1.5, 6)


@pytest.mark.parametrize("bounds", [{}, {"min_lr": 0.5}, {"max_lr": 0.5}])
@pytest.mark.parametrize("rule", LR_RULES[1:])
def test_where_every_group_is_frozen_everything_stays_frozen(rule, bounds):
    frozen = (Group("a", 0.0), Group("b", 0.0))
    decisions = fold({"lr_rule": rule, "bad_limit": 1, **bounds}, [1.0, 2.0, math.nan, 0.5], frozen)
    assert {one.lr for one in decisions} == {(0.0, 0.0)}
    assert all(one.lr is decisions[0].lr for one in decisions)


def test_d3_10_the_bounds_follow_the_reference_group():
    groups = (Group("frozen", 0.0), Group("body", 0.25), Group("head", 1.0))
    up = fold({"lr_rule": "trend"}, [-float(i) for i in range(300)], groups)
    down = fold({"lr_rule": "trend"}, [float(i) for i in range(300)], groups)
    assert up[-1].lr == (0.0, 2.5, 10.0)
    assert down[-1].lr == (0.0, 0.005, 0.02)
    momentum = fold({"momentum_rule": "relative"}, [-float(i) for i in range(900)])
    assert momenta(momentum)[-1] == pytest.approx(0.95)
    assert momenta(fold({"momentum_rule": "relative"}, [float(i) for i in range(900)]))[-1] == pytest.approx(0.5)


# ---- whole states ----------------------------------------------------------------------------------------


def test_every_part_of_the_state_and_of_the_decision_is_as_stated():
    config = RULES.config(
        lr_rule="variance", variance_window=2, variance_alpha=0.125, reward_rule="variance", reward_window=2,
        reward_alpha=0.5, momentum_rule="normalized", min_momentum=0.5, max_momentum=0.75, momentum_target="beta1",
        ema_loss_beta=0.5, ema_reward_beta=0.5, ema_grad_beta=0.25, min_lr=2.0**-10, max_lr=2.0, bad_limit=2,
    )  # fmt: skip
    groups = (
        Group("frozen", 0.0, 0.75), Group("body", 1.0, 0.75), Group("head", 4.0), Group("adam", 0.5, None, (0.8, 0.9)),
    )  # fmt: skip
    plan = [2.0**-10, 2.0, 2.0**-10, [0.0, 1.0, 4.0, 0.5], [1, 1, 0, 1]]
    empty, start = [[], 0.0, 0.0, 0.0, 0.0, 0], [0.0, 1.0, 4.0, 0.5]
    first = [[4.0], 4.0, 0.0, 0.0, 0.0, 0], [[1.0], 1.0, 0.0, 0.0, 0.0, 0]
    full = [[4.0, 8.0], 4.0, 2.0, 8.0, 8.0, 1], [[1.0, 3.0], 1.0, 1.0, 2.0, 2.0, 1]
    quarter, eighth = ([part * one for one in start] for part in (0.25, 0.125))
    high, low, gone = [0.75, 0.75, None, 0.75], [0.5, 0.5, None, 0.5], [None] * 3
    names = ("loss_s", "reward_s", "grad_s", "improving", "var", "eta", "f_lr", "f_rw", "t_c", "T", "labs")
    both, silent = "variance+reward_variance+momentum_normalized", "no_loss+no_reward+momentum_no_loss"
    rows = [
        ((4.0, 1.0, 2.0), [1.0, 1.0, start, low, 4.0, 1.0, 2.0, *first, 1.0, 1.0, [0, 500], 4.0, 0, plan], both,
         dict(zip(names, (4.0, 1.0, 2.0, None, 0.0, 1.0, 1.0, 1.0, 0, 500, 4.0), strict=True))),
        ((8.0, 5.0, 6.0), [1.0, 0.25, quarter, low, 6.0, 3.0, 5.0, *full, 0.5, 0.5, [0, 500], 6.0, 0, plan], both,
         dict(zip(names, (6.0, 3.0, 5.0, False, 8.0, 1.0, 0.5, 0.5, 0, 500, 6.0), strict=True))),
        ((math.nan, 9.0, 9.0), [1.0, 0.25, quarter, low, 6.0, 3.0, 5.0, *full, 0.5, 0.5, [0, 500], 6.0, 1, plan],
         "nonfinite_hold", {"bad_run": 1}),
        ((math.inf, 9.0, 9.0), [0.5, 0.125, eighth, low, 6.0, 3.0, 5.0, *full, 0.5, 0.5, [0, 500], 6.0, 2, plan],
         "nonfinite_backoff", {"bad_run": 2, "old_lr": 0.25, "new_lr": 0.125, "eta": 0.5}),
        ((None, None, None), [0.5, 0.125, eighth, low, 6.0, 3.0, 5.0, *full, 0.5, 0.5, [0, 500], 6.0, 2, plan], silent,
         dict(zip(names, (None, None, None, None, None, 0.5, 0.5, 0.5, 0, 500, 6.0), strict=True))),
    ]  # fmt: skip
    state, decision = RULES.init(config, groups, 0)
    assert dump_state(state) == [1.0, 1.0, start, high, *gone, empty, empty, 1.0, 1.0, [0, 500], 0.0, 0, plan]
    assert decision == (tuple(start), tuple(high), None, "-", "initial", None, False, ())
    for step, (seen, expected, code, numbers) in enumerate(rows):
        state, decision = RULES.step(config, state, Observation(step, *seen))
        assert dump_state(state) == expected, step
        assert decision == (state.lrs, state.momentum, None, "-", code, numbers, False, ()), step


def test_every_part_of_the_state_of_a_cycle_is_as_stated():
    config = RULES.config(
        lr_rule="cyclical", cycle_length=2, cycle_mult=2, reward_rule="trend", reward_up=2.0, reward_down=0.5,
        reward_momentum=True, relative_rate=0.5, min_momentum=0.5, max_momentum=0.875, min_lr=0.25,
    )  # fmt: skip
    state, _ = RULES.init(config, (Group("a", 1.0, 0.75), Group("b", 1.0)), 0)
    empty, plan = [[], 0.0, 0.0, 0.0, 0.0, 0], [0.25, 10.0, 0.25, [1.0, 1.0], [1, 0]]
    rows = [
        ((None, 1.0), 1.0, 1.0, 0.75, 1.0, 1.0, [1, 2], "cyclical+reward_first"),
        ((3.0, 5.0), 2.0, 1.25, 0.8125, 5.0, 0.625, [0, 4], "cyclical_restart_next+reward_up"),
        ((2.0, 4.0), 1.0, 1.0, 0.65625, 4.0, 1.0, [1, 4], "cyclical+reward_down"),
    ]  # fmt: skip
    for step, (seen, eta, lr, mu, reward, factor, cycle, code) in enumerate(rows):
        loss, labs = seen[0], 3.0 if step else 0.0
        state, decision = RULES.step(config, state, Observation(step, *seen))
        numbers = [eta, lr, [lr, lr], [mu, None], loss, reward, None, empty, empty, factor, 1.0, cycle, labs, 0, plan]
        assert dump_state(state) == numbers, step
        assert decision[:5] == ((lr, lr), (mu, None), None, "-", code), step


def test_each_mark_is_said_in_a_whole_sentence():
    config = RULES.config(lr_rule="trend", reward_rule="kelly", momentum_rule="relative")
    state, decision = RULES.init(config, ONE, 0)
    assert RULES.explain(config, decision) == "Starting with the optimizer's own settings, within the bounds."
    for step, loss in enumerate((4.0, 3.0)):
        state, decision = RULES.step(config, state, Observation(step, loss, 0.0))
    assert RULES.explain(config, decision) == (
        "Loss 3 improved: learning rate x 1.02. Reward 0: factor 1 on the learning rate. "
        "Momentum goes 0.05 of its way to a bound: up if the loss improves, else down."
    )


# ---- what is said ----------------------------------------------------------------------------------------


def test_the_fields_are_the_numbers_that_a_decision_rests_on():
    seen = {"loss": 4.0, "reward": 0.5, "grad_norm": 2.0}
    config = {"lr_rule": "grad_norm", "grad_kappa": 0.25, "reward_rule": "scaling"}
    first, second = fold(config, [{"loss": -8.0}, seen])[1:]
    assert second.fields == {
        "loss_s": 4.0, "reward_s": 0.5, "grad_s": 2.0, "improving": False, "var": None, "eta": 1.0, "f_lr": 0.5,
        "f_rw": 1.5, "t_c": 0, "T": 500, "labs": 8.0,
    }  # fmt: skip
    assert [first.fields[key] for key in ("loss_s", "reward_s", "grad_s", "improving")] == [-8.0, None, None, None]
    assert list(second.fields) == ["loss_s", "reward_s", "grad_s", "improving", "var", "eta", "f_lr", "f_rw", "t_c", "T", "labs"]  # noqa: E501  # fmt: skip


def test_the_variance_in_the_fields_is_the_losses_or_else_the_rewards():
    both = {"lr_rule": "variance", "reward_rule": "variance"}
    seen = [{"loss": 0.0, "reward": 0.0}, {"loss": 4.0, "reward": 2.0}, {"reward": 1.0}, {}]
    assert [one.fields["var"] for one in fold(both, seen)[1:]] == [0.0, 8.0, 1.0, None]


def test_an_lr_that_does_not_move_is_the_very_same_object():
    decisions = fold({"lr_rule": "grad_norm", "momentum_rule": "relative"}, [{"grad_norm": 2.0}] * 3 + [math.nan, 1.0])
    assert len({id(one.lr) for one in decisions[1:]}) == 1


def everything(chance, n):
    wild = [None, math.nan, math.inf, -math.inf, 1e300, 1e100, -1e100, 0.0, 5e-324]
    for step in range(n):
        signals = [chance.choice(wild) if chance.random() < 0.4 else chance.gauss(0, 2) for _ in range(3)]
        yield Observation(step, *signals)


def test_every_mark_is_given_and_explained_and_no_other():
    given = set()
    for mixture in MIXTURES:
        config = RULES.config(**mixture, cycle_length=5)
        for groups in (ONE, (Group("a", 1.0),)):
            state, decision = RULES.init(config, groups, 0)
            for seen in everything(random.Random(1), 60):
                marks = decision.code.split("+")
                given.update(marks)
                text = RULES.explain(config, decision)
                assert "{" not in text
                assert text.endswith(".")
                assert text.count(". ") >= len(marks) - 1
                state, decision = RULES.step(config, state, seen)
    assert given == set(RULES.codes)


EXTREMES = (
    {"lr_up": 1e300, "lr_down": 1e-300, "reward_up": 1e300, "reward_down": 1e-300, "trend_tol": 1e300, "exp_a": 1e300},
    {"loss_decay_k": 1e300, "variance_alpha": 1e300, "reward_alpha": 1e300, "grad_kappa": 1e300, "reward_span": 5e-324},
    {"kelly_temperature": 5e-324, "kelly_gain": 1.0, "reward_center": 1e308, "min_lr": 5e-324, "max_lr": 1e308},
    {"cycle_length": 1, "cycle_mult": 1000.0, "min_lr": 1e-310, "max_lr": 1e-305, "min_momentum": 0.0},
    {"ema_loss_beta": BELOW_1, "ema_reward_beta": BELOW_1, "ema_grad_beta": BELOW_1, "bad_limit": 1},
    {"momentum_target": "beta1", "reward_momentum": True, "relative_rate": 1.0, "group_mode": "same"},
)
GROUPS = (
    Group("a", 1e-3, 0.9),
    Group("frozen", 0.0, 0.99),
    Group("b", 1e-1, None, (0.99, 0.999)),
    Group("c", 1e-5, 0.0),
)


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: "-".join(mixture.values()))
def test_lr_and_momentum_never_leave_their_bounds_and_a_saved_state_goes_on_alike(mixture):
    chance, inert = random.Random(str(mixture)), set(mixture.values()) == {"none"}
    for extreme in ({}, *EXTREMES):
        config = RULES.config(**mixture, **extreme)
        state, decision = RULES.init(config, GROUPS, 0)
        low, high = config.min_lr or 1e-3 / 50, config.max_lr or 10 * 1e-3
        for seen in everything(chance, 25):
            text = json.dumps(dump_state(state), allow_nan=False)
            _, other = RULES.step(config, load_state(RULES, json.loads(text)), seen)
            before = decision
            state, decision = RULES.step(config, state, seen)
            assert repr(other) == repr(decision)
            assert decision.lr is before.lr or decision.lr != before.lr
            assert decision.lr[1] == 0.0
            assert all(1e-300 <= lr <= 1e100 for i, lr in enumerate(decision.lr) if i != 1)
            if not inert:
                assert max(low, 1e-300) <= decision.lr[0] <= max(min(high, 1e100), 1e-300)
            if decision.momentum is not None:
                assert decision.momentum[3] == 0.0
                assert all(config.min_momentum <= mu <= config.max_momentum for mu in decision.momentum[:2])
            json.dumps(decision.fields, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    signals=st.lists(st.tuples(*[st.none() | st.floats()] * 3), max_size=40),
    mixture=st.sampled_from(MIXTURES),
    lr=st.floats(1e-290, 1e90),
)
def test_no_signals_break_any_mixture(signals, mixture, lr):
    seen = [dict(zip(("loss", "reward", "grad_norm"), one, strict=True)) for one in signals]
    for decision in fold(mixture, seen, (Group("all", lr, 0.9),)):
        assert 0 < decision.lr[0] < math.inf
        assert set(mixture.values()) == {"none"} or lr / 50 <= decision.lr[0] <= 10 * lr
        assert decision.momentum is None or 0.5 <= decision.momentum[0] <= 0.95
