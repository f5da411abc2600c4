"""Goal: `adaptive` does what its specification and the published class do, in every recorded case.

Method: golden cases of both modes; an independent brute-force reading of the rule on random signals and parameters;
each stated decision, threshold and default alone.
"""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from tests.core.reference import unrolled

from flyball_server.core.policies.adaptive import POLICY as ADAPTIVE
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Group, Observation

TRACES = Path(__file__).parent.parent / "traces"
CASES = {
    f"{mode}/{name}": case
    for mode in ("default", "original")
    for name, case in json.loads((TRACES / "adaptive@1" / f"{mode}.json").read_text()).items()
}
ONE = (Group("all", 1e-3, 0.9),)
nan, inf = math.nan, math.inf


def observations(name):
    lines = (TRACES / f"{name}.jsonl").read_text().splitlines()
    return [Observation(**json.loads(line)) for line in lines]


def run(losses, groups=ONE, rewards=None, **parameters):
    """Every decision, the first one (before any observation) included."""
    return [decision for _, decision in fold(losses, groups, rewards, **parameters)]


def fold(losses, groups=ONE, rewards=None, **parameters):
    config = ADAPTIVE.config(**parameters)
    results = [ADAPTIVE.init(config, groups, 0)]
    rewards = [None] * len(losses) if rewards is None else rewards
    for step, (loss, reward) in enumerate(zip(losses, rewards, strict=True)):
        results.append(ADAPTIVE.step(config, results[-1][0], Observation(step, loss, reward)))
    return results


def codes(decisions):
    return [decision.code for decision in decisions[1:]]


@pytest.mark.parametrize("name", CASES)
def test_a_golden_case_is_met_at_every_step(name):
    case = CASES[name]
    original = case["mode"] == "original"
    config = ADAPTIVE.config(compat=case["mode"], **case["config"])
    lrs, momenta = case["groups"]["lrs"], case["groups"]["mom"] or [None] * len(case["groups"]["lrs"])
    groups = tuple(Group(str(i), lr, m) for i, (lr, m) in enumerate(zip(lrs, momenta, strict=True)))
    # The published class has no rule for unusable losses, so its cases end where one occurs.
    end = min(case["n"], case["comparable_until"], case.get("overflow_at") or case["n"]) if original else case["n"]
    rows = {key: unrolled(case[key], case["n"]) for key in ("lr", "momentum", "phase", "decision") if key in case}
    assert case["every"] == 1
    state, _ = ADAPTIVE.init(config, groups, 0)
    for step, seen in enumerate(observations(case["trace"])[:end]):
        state, decision = ADAPTIVE.step(config, state, seen)
        assert decision.lr == pytest.approx(rows["lr"][step], rel=1e-8), step
        momentum = momenta if decision.momentum is None else decision.momentum
        assert list(momentum) == [m if m is None else pytest.approx(m, rel=1e-8) for m in rows["momentum"][step]], step
        if not original:
            assert (decision.phase, decision.code) == (rows["phase"][step], rows["decision"][step]), step
    if end == case["n"]:
        assert decision.lr == pytest.approx(case["final"]["lr"], rel=1e-8)
        assert list(momentum) == [m if m is None else pytest.approx(m, rel=1e-8) for m in case["final"]["momentum"]]


# ---- the rule once more, in another style --------------------------------------------------------------------------

DEFAULTS = {
    "compat": "default", "loss_beta": 0.9, "reward_beta": 0.9, "var_window": 20, "up_factor": 1.05,
    "down_factor": 0.7, "min_rel_improve": 1e-4, "patience": 20, "big_drop": 0.5, "cooldown": 50,
    "var_damp_base": 1.0, "var_damp_scale": 1.0, "use_cosine": False, "T0": 200, "T_mult": 2.0,
    "eta_min_scale": 0.1, "lr_min": None, "lr_max": None, "use_reward": False, "reward_up": 1.03,
    "reward_down": 0.9, "momentum_up": 0.01, "momentum_down": 0.9, "momentum_min": None, "momentum_max": 0.999,
    "momentum_target": "momentum", "bad_limit": 3,
}  # fmt: skip
ORIGINAL = {"compat": "original", "lr_min": 1e-7, "lr_max": 10.0, "momentum_min": 0.0}


def clip(x, low, high):
    return min(max(x, low), high)


def unusable(x):
    return math.isnan(x) or abs(x) > 1e100


class Reading:
    """The state as whole histories; every quantity is worked out anew from them."""

    def __init__(self, groups, parameters):
        self.p = p = DEFAULTS | (ORIGINAL if parameters.get("compat") == "original" else {}) | parameters
        self.original = p["compat"] == "original"
        self.bounds, self.lr, self.m, self.m_bounds = [], [], [], []
        for group in groups:
            low = p["lr_min"] or min(group.lr, max(1e-7, group.lr / 100))
            high = p["lr_max"] or max(group.lr, min(10, group.lr * 10))
            self.bounds.append((low, high) if group.lr else (0, 0))
            self.lr.append(clip(group.lr, *self.bounds[-1]))
            value, drive = group.momentum, group.momentum is not None and (group.momentum > 0 or self.original)
            if not drive and group.betas and (p["momentum_target"] == "beta1" or value is None):
                value, drive = group.betas[0], p["momentum_target"] == "beta1"
            low = value and 0.5 * value if p["momentum_min"] is None else p["momentum_min"]
            self.m.append(value)
            self.m_bounds.append((low, p["momentum_max"]) if drive else None)
        if self.original:
            self.shift_momentum(1, 0)
        self.steers = any(self.m_bounds) and (self.original or p["use_reward"])
        self.losses, self.ema, self.reward_ema = [], [], []
        self.ssi = self.cd = self.turn = self.bad_run = 0
        self.period, self.damp, self.cosf, self.out = max(1, p["T0"]), 1, 1, list(self.lr)
        self.code, self.phase = "initial", "track"
        if self.original:
            self.move(None, None)
            self.code = "initial"

    def shift_momentum(self, times, plus):
        for i, bounds in enumerate(self.m_bounds):
            if bounds:
                self.m[i] = clip(self.m[i] * times + plus, *bounds)

    def multiply(self, factor):
        self.lr = [lr * factor for lr in self.lr]

    def average(self, beta, past, value):
        return beta * past[-1] + (1 - beta) * value if past else value

    def observe(self, loss, reward):
        p = self.p
        if loss is None or not unusable(loss):
            self.bad_run = self.bad_run if loss is None else 0
            self.move(loss, None if reward is None or unusable(reward) else reward)
            return
        self.bad_run += 1
        self.code = "nonfinite_hold"
        if self.bad_run % p["bad_limit"] == 0:
            self.code = "nonfinite_backoff"
            self.multiply(p["big_drop"])
            self.finish()

    def move(self, loss, reward):
        p, original, marks, silent = self.p, self.original, [], loss is None
        past = self.ema[-1:]
        if silent:
            marks.append("no_loss")
            self.ema += past
        else:
            self.ema.append(self.average(p["loss_beta"], past, loss))
            self.losses.append(loss)
        if past and (original or not silent):
            rel = (past[0] - self.ema[-1]) / (abs(past[0]) + 1e-12)
            better, worse = rel > p["min_rel_improve"], rel < -p["min_rel_improve"]
            worse = not better if original else worse
            marks.append("up" if better else "down" if worse else "flat")
            self.multiply(p["up_factor"] if better else p["down_factor"] if worse else 1)
            self.ssi = 0 if better else self.ssi + 1
        elif not silent:
            marks.append("first")
        newest = self.losses[-p["var_window"] :]
        variance = statistics.variance(newest) if len(newest) > 1 else 0
        mean = statistics.fmean(newest) if newest else 0
        if original:
            self.damp = 1 / (p["var_damp_base"] + p["var_damp_scale"] * variance)
            self.multiply(self.damp)
        elif not silent:
            self.damp = 1 / (p["var_damp_base"] + p["var_damp_scale"] * variance / (mean**2 + 1e-12))
        if p["use_reward"]:
            marks += self.follow(reward)
        if original or not silent:
            if self.cd > 0:
                self.cd -= 1
            elif self.ssi >= p["patience"]:
                marks.append("big_drop")
                self.multiply(p["big_drop"])
                self.ssi, self.cd = 0, p["cooldown"]
        if p["use_cosine"]:
            marks += self.wave()
        self.finish()
        self.code, self.phase = "+".join(marks), "cooldown" if self.cd > 0 else "track"

    def follow(self, reward):
        p, past = self.p, self.reward_ema[-1:]
        if reward is not None:
            self.reward_ema.append(self.average(p["reward_beta"], past, reward))
        if not past or (reward is None and not self.original):
            return []
        if self.reward_ema[-1] > past[0]:
            self.multiply(p["reward_up"])
            self.shift_momentum(1, p["momentum_up"])
            return ["reward_up"]
        if self.reward_ema[-1] == past[0] and not self.original:
            return ["reward_equal"]
        self.multiply(p["reward_down"])
        self.shift_momentum(p["momentum_down"], 0)
        return ["reward_down"]

    def wave(self):
        q, half = self.p["eta_min_scale"], (1 + math.cos(math.pi * self.turn / self.period)) / 2
        self.cosf = q + (1 - q) * half
        if self.original:
            floors = [max(low, q * lr) for lr, (low, _) in zip(self.lr, self.bounds, strict=True)]
            self.lr = [floor + (lr - floor) * half for lr, floor in zip(self.lr, floors, strict=True)]
        self.turn += 1
        if self.turn < self.period:
            return []
        self.turn, self.period = 0, max(1, int(self.period * self.p["T_mult"]))
        return ["cosine_restart_next"]

    def finish(self):
        self.lr = [clip(lr, *bounds) for lr, bounds in zip(self.lr, self.bounds, strict=True)]
        weight = 1 if self.original else self.damp * self.cosf
        self.out = [clip(lr * weight, *bounds) for lr, bounds in zip(self.lr, self.bounds, strict=True)]


def random_parameters(chance):
    p = {
        "loss_beta": chance.choice([0.0, 0.5, 0.9]),
        "reward_beta": chance.choice([0.0, 0.9]),
        "var_window": chance.choice([1, 2, 7, 20]),
        "up_factor": chance.choice([1.0, 1.02, 1.3]),
        "down_factor": chance.choice([0.5, 0.96, 1.0]),
        "min_rel_improve": chance.choice([0.0, 1e-4, 0.05]),
        "patience": chance.choice([0, 1, 4, 20]),
        "big_drop": chance.choice([0.3, 0.5]),
        "cooldown": chance.choice([0, 3, 50]),
        "var_damp_base": chance.choice([0.7, 1.0, 2.0]),
        "var_damp_scale": chance.choice([0.0, 1.0, 3.0]),
        "use_cosine": chance.random() < 0.5,
        "T0": chance.choice([-3, 1, 10, 60]),
        "T_mult": chance.choice([0.5, 1.0, 1.5, 2.0]),
        "eta_min_scale": chance.choice([0.0, 0.1, 1.0]),
        "use_reward": chance.random() < 0.6,
        "momentum_target": chance.choice(["momentum", "beta1"]),
        "bad_limit": chance.choice([1, 2, 3]),
    }
    if chance.random() < 0.3:
        p |= {"lr_min": 1e-5, "lr_max": 5e-3, "momentum_min": 0.3, "momentum_max": 0.95}
    return p | ({"compat": "original"} if chance.random() < 0.5 else {})


def random_signals(chance, n):
    level, trend, noise, gain = chance.choice([3.0, -3.0, 0.2, 0.0]), 0.0, 0.0, 0.0
    for i in range(n):
        if i % 40 == 0:
            trend, noise, gain = chance.choice([-0.02, 0.0, 0.01]), chance.choice([0.0, 0.02, 1.0]), chance.gauss(0, 1)
        level += trend
        loss = level + noise * chance.gauss(0, 1)
        loss = chance.choice([None, None, nan, inf, 1e101]) if chance.random() < 0.08 else loss
        reward = chance.choice([gain, gain, chance.random(), None, nan])
        yield loss, reward


GROUPS = (
    Group("frozen", 0.0, 0.5), Group("body", 1e-3, 0.9), Group("head", 2e-2), Group("plain", 1e-2, 0.0),
    Group("adam", 1e-4, None, (0.8, 0.999)),
)  # fmt: skip


@pytest.mark.parametrize("trial", range(60))
def test_the_rule_agrees_with_a_brute_force_reading_of_it(trial):
    chance = random.Random(trial)
    parameters = random_parameters(chance)
    config, reading = ADAPTIVE.config(**parameters), Reading(GROUPS, parameters)
    state, decision = ADAPTIVE.init(config, GROUPS, 0)
    for step, (loss, reward) in enumerate([(None, None), *random_signals(chance, 200)]):
        if step:
            reading.observe(loss, reward)
            state, decision = ADAPTIVE.step(config, state, Observation(step, loss, reward))
        assert (decision.code, decision.phase) == (reading.code, reading.phase), step
        assert decision.lr == pytest.approx(reading.out, rel=1e-9), step
        assert state.lr == pytest.approx(reading.lr, rel=1e-9), step
        if reading.steers:
            assert decision.momentum == tuple(m if m is None else pytest.approx(m, rel=1e-9) for m in reading.m), step
        else:
            assert decision.momentum is None
        fields = decision.fields
        if fields and "bad_run" not in fields:
            assert fields["damp"] == pytest.approx(reading.damp, rel=1e-9)
            assert [fields[key] for key in ("ssi", "cd", "T_cur", "T_i")] == [
                reading.ssi, reading.cd, reading.turn, reading.period,
            ]  # fmt: skip
            assert fields["cosf"] == pytest.approx(reading.cosf, rel=1e-9)


# ---- parameters ----------------------------------------------------------------------------------------------------


def values(config):
    return {name: getattr(config, name) for name in DEFAULTS}


def test_the_defaults_are_these():
    assert values(ADAPTIVE.config()) == DEFAULTS
    for name in ("original", "seed"):
        original = ADAPTIVE.config(compat=name)
        assert values(original) == DEFAULTS | ORIGINAL
        assert ADAPTIVE.config(**values(original)) == original
    assert ADAPTIVE.config(**values(ADAPTIVE.config())) == ADAPTIVE.config()
    given = {"lr_min": 1e-3, "lr_max": 1e-2, "momentum_min": 0.1, "momentum_max": 0.2}
    assert values(ADAPTIVE.config(compat="seed", **given)) == DEFAULTS | {"compat": "original"} | given


LIMITS = [
    ("loss_beta", [0.0, 0.99], [-0.1, 1.0]), ("reward_beta", [0.0, 0.99], [-0.1, 1.0]),
    ("var_window", [1, 10_000], [0, 10_001]), ("up_factor", [1.0, 1e300], [0.99]),
    ("down_factor", [1e-9, 1.0], [0.0, 1.01]), ("min_rel_improve", [0.0], [-1e-9]), ("patience", [0], [-1]),
    ("big_drop", [1e-9, 1.0], [0.0, 1.01]), ("cooldown", [0], [-1]), ("var_damp_base", [1e-100], [0.0, 9e-101]),
    ("var_damp_scale", [0.0], [-0.1]), ("T0", [-5, 0], [1.5]), ("T_mult", [0.0, 1e6], [-0.1, 1.01e6]),
    ("eta_min_scale", [0.0, 1.0], [-0.1, 1.1]), ("lr_min", [1e-320], [0.0]), ("lr_max", [1e-320], [0.0]),
    ("reward_up", [1.0], [0.99]), ("reward_down", [1e-9, 1.0], [0.0, 1.01]), ("momentum_up", [0.0], [-0.1]),
    ("momentum_down", [1e-9, 1.0], [0.0, 1.01]), ("momentum_min", [0.0, 0.99], [-0.1, 1.0]),
    ("momentum_max", [0.0, 0.99], [-0.1, 1.0]), ("bad_limit", [1], [0]), ("momentum_target", ["beta1"], ["beta2"]),
    ("compat", ["seed"], ["published"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "allowed", "refused"), LIMITS, ids=[name for name, *_ in LIMITS])
def test_a_parameter_is_taken_up_to_its_limits_and_refused_beyond(name, allowed, refused):
    for value in allowed:
        ADAPTIVE.config(**{name: value})
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name}: {value!r} is (not allowed|out of range)"):
            ADAPTIVE.config(**{name: value})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lr_min": 1e-2, "lr_max": 1e-3}, r"^lr_min: 0\.01 is above lr_max = 0\.001; give both"),
        ({"compat": "seed", "lr_min": 20.0}, r"^lr_min: 20\.0 is above lr_max = 10\.0; give both"),
        ({"momentum_min": 0.5, "momentum_max": 0.4}, r"^momentum_min: 0\.5 is above momentum_max = 0\.4; give both"),
        ({"momentum_min": 0.9999}, r"^momentum_min: 0\.9999 is above momentum_max = 0\.999; give both"),
    ],
)
def test_inverted_bounds_are_refused_at_once_where_both_are_known(parameters, words):
    with pytest.raises(ValueError, match=words):
        ADAPTIVE.config(**parameters)


def test_bounds_that_leave_nothing_for_these_groups_are_refused_at_attach():
    for parameters, words in [
        ({"lr_min": 0.5}, r"lr_min: 0\.5 is above lr_max = 0\.01; give both"),
        ({"lr_max": 1e-6}, r"lr_min: 1e-05 is above lr_max = 1e-06; give both"),
        ({"use_reward": True, "momentum_max": 0.3}, r"momentum_min: 0\.45 is above momentum_max = 0\.3; give both"),
    ]:
        with pytest.raises(ValueError, match=words):
            ADAPTIVE.init(ADAPTIVE.config(**parameters), ONE, 0)
    ADAPTIVE.init(ADAPTIVE.config(lr_min=1e-3, lr_max=1e-3, momentum_max=0.3), ONE, 0)
    ADAPTIVE.init(ADAPTIVE.config(lr_min=0.5), (Group("frozen", 0.0),), 0)


# ---- bounds and groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "low", "high"),
    [
        (1e-3, 1e-5, 1e-2), (1e-6, 1e-7, 1e-5), (1e-7, 1e-7, 1e-6), (1e-9, 1e-9, 1e-8), (0.5, 5e-3, 5.0),
        (5.0, 0.05, 10.0), (10.0, 0.1, 10.0), (20.0, 0.2, 20.0), (1e200, 1e98, 1e100), (1e-310, 1e-300, 1e-299),
    ],
)  # fmt: skip
def test_derived_bounds_follow_the_group_and_hold_its_own_lr(base, low, high):
    groups = (Group("all", base),)
    first, *_, last = run([2.0**-i for i in range(40)], groups, up_factor=3.0, var_damp_scale=0.0)
    assert first.lr == (pytest.approx(min(max(base, 1e-300), 1e100)),)
    assert last.lr == (pytest.approx(high),)
    assert run([2.0**i for i in range(40)], groups, down_factor=0.3, var_damp_scale=0.0)[-1].lr == (pytest.approx(low),)


def test_given_bounds_are_absolute_and_the_same_for_every_group():
    groups = (Group("a", 1e-4), Group("b", 1e-2), Group("c", 1.0))
    decisions = run([2.0**i for i in range(40)], groups, lr_min=1e-3, lr_max=0.1)
    assert decisions[0].lr == (1e-3, 1e-2, 0.1)
    assert decisions[-1].lr == (1e-3, 1e-3, 1e-3)
    assert run([2.0**-i for i in range(200)], groups, lr_min=1e-3, lr_max=2e-3)[-1].fields["lr_ctrl"] == 2e-3
    assert run([], lr_min=1e-320, lr_max=1e-310)[-1].lr == (1e-300,)


def test_a_group_with_lr_0_stays_at_exactly_0_and_is_not_the_reference():
    groups = (Group("frozen", 0.0), Group("body", 1e-3))
    for compat in ("default", "original"):
        wild = {"up_factor": 1e308, "reward_up": 1e308, "use_reward": True, "use_cosine": True, "compat": compat}
        for decision in run([8.0, 4.0, nan, nan, nan, 2.0, 1.0], groups, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], **wild):
            assert decision.lr[0] == 0.0
            assert 1e-7 <= decision.lr[1] <= 10.0
            assert decision.fields is None or decision.fields["lr_ctrl"] > 0
    assert run([1.0], (Group("frozen", 0.0),))[-1].fields["lr_ctrl"] == 0.0
    assert run([1.0], (Group("a", 0.25), Group("b", 0.5)))[-1].fields["lr_ctrl"] == 0.25


# ---- trend ---------------------------------------------------------------------------------------------------------

#: Without memory the average is the loss; beside 2^20 the eps in the denominator does not show.
EXACT = {"loss_beta": 0.0, "min_rel_improve": 2.0**-4, "var_damp_scale": 0.0}
LARGE, STEP, BIT = 2.0**20, 2.0**16, 2.0**-20


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_dead_band_ends_exactly_at_min_rel_improve(sign):
    level = sign * LARGE
    for change, code, original in [
        (-STEP - BIT, "up", "up"), (-STEP, "flat", "down"), (0.0, "flat", "down"), (STEP, "flat", "down"),
        (STEP + BIT, "down", "down"),
    ]:  # fmt: skip
        assert run([level, level + change], **EXACT)[-1].code == code
        assert run([level, level + change], compat="original", **EXACT)[-1].code == original


def test_a_trend_multiplies_every_group_by_its_factor():
    groups = (Group("a", 2.0**-10), Group("b", 2.0**-7))
    for losses, factor in (([4.0, 2.0], 1.05), ([4.0, 6.0], 0.7), ([4.0, 4.0], 1.0)):
        decision = run(losses, groups, var_damp_scale=0.0)[-1]
        assert decision.lr == pytest.approx((factor * 2.0**-10, factor * 2.0**-7), rel=1e-12)
    moved, flat = fold([4.0, 4.0, 4.0], groups)[-2:]
    assert flat[1].lr is moved[1].lr


def test_the_trend_is_that_of_the_smoothed_loss():
    fields = run([4.0, 2.0, 3.0], loss_beta=0.75)[-1].fields
    assert (fields["prev_loss"], fields["loss_ema"]) == (3.5, 3.375)
    assert fields["rel"] == pytest.approx(0.125 / 3.5, rel=1e-9)


def test_a_constant_loss_is_flat_whatever_rounding_does_to_its_average():
    levels = [x for i in range(1, 400) if 0.9 * (x := i / 37) + (1 - 0.9) * x != x]
    assert levels
    for level in (*levels, 0.0, -1.0):
        assert codes(run([level] * 4)) == ["first", "flat", "flat", "flat"]
    for level in (0.5, 0.0, -1.0):
        rewarded = run([None] * 3, rewards=[level] * 3, use_reward=True)
        assert codes(rewarded) == ["no_loss", "no_loss+reward_equal", "no_loss+reward_equal"]


def test_a_loss_around_zero_divides_by_no_less_than_eps():
    fields = run([0.0, 1e-6], loss_beta=0.0)[-1].fields
    assert fields["rel"] == pytest.approx(-1e6)
    assert fields["cv2"] == pytest.approx(5e-13 / (2.5e-13 + 1e-12))


# ---- spread --------------------------------------------------------------------------------------------------------


def test_the_spread_scales_what_leaves_and_never_the_controller():
    quiet = {"up_factor": 1.0, "down_factor": 1.0, "patience": 99}
    decisions = run([1.0, 3.0, None, 3.0, 3.0, 4.0], var_window=2, var_damp_base=0.5, var_damp_scale=2.0, **quiet)
    assert [d.fields["variance"] for d in decisions[1:]] == [0.0, 2.0, 2.0, 0.0, 0.0, 0.5]
    expected = [2.0, 1 / 1.5, 1 / 1.5, 2.0, 2.0, 1 / (0.5 + 2 * 0.5 / 3.5**2)]
    assert [d.lr[0] for d in decisions[1:]] == pytest.approx([1e-3 * damp for damp in expected], rel=1e-9)
    assert {d.fields["lr_ctrl"] for d in decisions[1:]} == {1e-3}
    assert decisions[3].lr is decisions[2].lr


def test_a_damping_before_the_first_loss_is_1():
    assert run([None], var_damp_base=4.0)[-1].fields["damp"] == 1.0
    assert run([5.0], var_damp_base=4.0)[-1].fields["damp"] == 0.25


# ---- patience ------------------------------------------------------------------------------------------------------


def test_patience_ends_in_a_big_drop_and_goes_on_counting_in_the_cooldown():
    decisions = run([1.0] * 11, patience=3, cooldown=2)
    assert codes(decisions) == [
        "first", "flat", "flat", "flat+big_drop", "flat", "flat", "flat+big_drop", "flat", "flat", "flat+big_drop",
        "flat",
    ]  # fmt: skip
    assert [d.phase for d in decisions[1:]] == ["track"] * 3 + ["cooldown", "cooldown", "track"] * 2 + ["cooldown"] * 2
    assert [d.lr[0] for d in decisions[3:8]] == [1e-3, 5e-4, 5e-4, 5e-4, 2.5e-4]
    assert [d.fields["ssi"] for d in decisions[1:8]] == [0, 1, 2, 0, 1, 2, 0]
    assert [d.fields["cd"] for d in decisions[1:8]] == [0, 0, 0, 2, 1, 0, 2]


def test_an_improvement_starts_the_patience_anew():
    improving = run([8.0, 8.0, 8.0, 4.0, 4.0, 4.0, 4.0], patience=3, loss_beta=0.0)
    assert codes(improving) == ["first", "flat", "flat", "up", "flat", "flat", "flat+big_drop"]
    worsening = run([1.0, 2.0, 4.0, 8.0], patience=3, loss_beta=0.0)
    assert codes(worsening) == ["first", "down", "down", "down+big_drop"]


def test_no_patience_drops_whenever_there_is_no_cooldown():
    assert codes(run([4.0, 2.0, 1.0], patience=0, cooldown=1)) == ["first+big_drop", "up", "up+big_drop"]


# ---- signals that are not there ------------------------------------------------------------------------------------


def test_a_missing_loss_moves_nothing():
    for (before, old), (after, new) in zip(
        fold([3.0, 3.5, 2.0] * 3, patience=2), fold([3.0, 3.5, 2.0] * 3 + [None], patience=2)[1:], strict=True
    ):
        assert before is not after
        if new.code == "no_loss":
            assert before == after
            assert (new.lr, new.phase) == (old.lr, "cooldown")
    silent = run([None] * 100, patience=1)
    assert set(codes(silent)) == {"no_loss"}
    assert all(d.lr is silent[0].lr for d in silent)
    assert codes(run([4.0, None, 2.0], loss_beta=0.0)) == ["first", "no_loss", "up"]


@pytest.mark.parametrize("missing", [None, nan, inf, -inf, 1.1e100])
def test_a_missing_reward_moves_nothing(missing):
    state, decision = fold([None] * 3, rewards=[0.5, 1.0, missing], use_reward=True)[-1]
    before, old = fold([None] * 2, rewards=[0.5, 1.0], use_reward=True)[-1]
    assert (state, decision.code) == (before, "no_loss")
    assert (decision.lr, decision.momentum) == (old.lr, old.momentum)


def test_rewards_alone_steer():
    decisions = run([None] * 4, rewards=[0.5, 1.0, 0.5, 0.5], use_reward=True, reward_beta=0.0)
    assert codes(decisions) == ["no_loss", "no_loss+reward_up", "no_loss+reward_down", "no_loss+reward_equal"]
    assert [d.lr[0] for d in decisions[1:]] == pytest.approx([1e-3, 1.03e-3, 9.27e-4, 9.27e-4], rel=1e-12)
    assert [d.momentum[0] for d in decisions[1:]] == pytest.approx([0.9, 0.91, 0.819, 0.819], rel=1e-12)
    assert decisions[4].lr is decisions[3].lr
    assert decisions[4].momentum is decisions[3].momentum
    assert decisions[3].fields["reward_ema"] == 0.5
    assert decisions[1].fields["loss_ema"] is None


def test_a_reward_is_ignored_unless_asked_for():
    decisions = run([4.0, 4.0, 4.0], rewards=[0.0, 1.0, 2.0])
    assert codes(decisions) == ["first", "flat", "flat"]
    assert all(d.momentum is None and (d.fields or {}).get("reward_ema") is None for d in decisions)


def test_all_marks_stand_in_the_order_of_the_rules():
    decisions = run(
        [1.0, 1.0, 1.0, None], rewards=[1.0, 2.0, 1.0, 2.0], use_reward=True, use_cosine=True, T0=1, patience=2
    )
    assert codes(decisions) == [
        "first+cosine_restart_next", "flat+reward_up",
        "flat+reward_down+big_drop+cosine_restart_next", "no_loss+reward_up",
    ]  # fmt: skip


# ---- momentum ------------------------------------------------------------------------------------------------------


def test_momentum_stays_within_its_bounds_at_every_step():
    up, down = [float(i) for i in range(60)], [-float(i) for i in range(60)]
    for rewards, bounds, end in [(up, {}, 0.999), (down, {}, 0.45), (down, {"momentum_min": 0.2}, 0.2),
                                 (up, {"momentum_max": 0.95}, 0.95)]:  # fmt: skip
        decisions = run([None] * 60, rewards=rewards, use_reward=True, **bounds)
        assert decisions[-1].momentum == (pytest.approx(end, rel=1e-12),)
    assert run([None] * 2, rewards=[0.0, 1.0], use_reward=True, momentum_min=0.0, momentum_max=0.0)[-1].momentum == (
        0.0,
    )
    turned = run([None] * 62, rewards=[*up, -9.0, -99.0], use_reward=True, reward_beta=0.0)[-1]
    assert turned.momentum == (pytest.approx(0.999 * 0.81),)


def test_momentum_is_driven_only_where_the_optimizer_has_it():
    rewards, groups = [0.0, 1.0], GROUPS
    driven = run([None] * 2, groups, rewards, use_reward=True)
    assert driven[0].momentum == (0.5, 0.9, None, 0.0, 0.8)
    assert driven[-1].momentum == (pytest.approx(0.51), pytest.approx(0.91), None, 0.0, 0.8)
    beta1 = run([None] * 2, groups, rewards, use_reward=True, momentum_target="beta1")[-1]
    assert beta1.momentum == (pytest.approx(0.51), pytest.approx(0.91), None, 0.0, pytest.approx(0.81))
    nobody = run([None] * 2, groups[2:], rewards, use_reward=True)
    assert all(d.momentum is None for d in nobody)
    assert nobody[-1].code == "no_loss+reward_up"


def test_the_original_mode_drives_momentum_even_at_0():
    original = run([1.0, 1.0], GROUPS, [0.0, 1.0], use_reward=True, compat="original")
    assert original[0].momentum == (0.5, 0.9, None, 0.0, 0.8)
    assert original[-1].momentum == (pytest.approx(0.51), pytest.approx(0.91), None, pytest.approx(0.01), 0.8)
    assert run([], GROUPS, compat="original")[0].momentum == (0.5, 0.9, None, 0.0, 0.8)
    assert run([], GROUPS, compat="original", momentum_min=0.6)[0].momentum == (0.6, 0.9, None, 0.6, 0.8)
    assert run([], GROUPS, compat="original", momentum_max=0.7)[0].momentum == (0.5, 0.7, None, 0.0, 0.8)
    assert run([1.0], GROUPS[4:], compat="original")[-1].momentum is None
    falling = run([None] * 3, rewards=[2.0, 1.0, 0.0], use_reward=True, compat="original", momentum_down=1e-9)
    assert falling[-1].momentum == (pytest.approx(9e-19),)


# ---- cosine --------------------------------------------------------------------------------------------------------


def test_the_cosine_is_an_overlay_with_restarts_that_runs_without_losses():
    decisions = run([None] * 8, use_cosine=True, T0=2, eta_min_scale=0.2)
    cosines = [1.0, 0.6, 1.0, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4, 1.0]
    assert [d.lr[0] / 1e-3 for d in decisions[1:8]] == pytest.approx(cosines, rel=1e-12)
    assert [d.fields["cosf"] for d in decisions[1:8]] == pytest.approx(cosines, rel=1e-12)
    marked = [i for i, code in enumerate(codes(decisions)) if code == "no_loss+cosine_restart_next"]
    assert marked == [1, 5]
    assert [(d.fields["T_cur"], d.fields["T_i"]) for d in decisions[1:8]] == [
        (1, 2), (0, 4), (1, 4), (2, 4), (3, 4), (0, 8), (1, 8),
    ]  # fmt: skip
    assert {d.fields["lr_ctrl"] for d in decisions[1:]} == {1e-3}


def test_a_period_is_a_whole_number_and_at_least_1():
    def periods(**parameters):
        return [d.fields["T_i"] for d in run([None] * 5, use_cosine=True, **parameters)[1:]]

    assert periods(T0=0) == [2, 2, 4, 4, 4]
    assert periods(T0=-7, T_mult=0.0) == [1] * 5
    assert periods(T0=2, T_mult=0.3) == [2, 1, 1, 1, 1]
    assert periods(T0=2, T_mult=1.9) == [2, 3, 3, 3, 5]


def test_without_the_cosine_nothing_of_it_moves():
    fields = run([1.0] * 3, T0=1)[-1].fields
    assert (fields["T_cur"], fields["T_i"], fields["cosf"]) == (0, 1, 1.0)


# ---- unusable losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["default", "original"])
def test_every_third_unusable_loss_in_a_row_drops_once(compat):
    losses = [4.0, nan, None, inf, -inf, 1.1e100, -1.1e100, nan, 4.0, nan, nan, nan]
    results = fold(losses, compat=compat, use_cosine=True, use_reward=True, rewards=[float(i) for i in range(12)])
    marked = codes([decision for _, decision in results])
    assert [code.split("+")[0] for code in marked] == [
        "first", "nonfinite_hold", "no_loss", "nonfinite_hold", "nonfinite_backoff", "nonfinite_hold",
        "nonfinite_hold", "nonfinite_backoff", marked[8].split("+")[0], "nonfinite_hold", "nonfinite_hold",
        "nonfinite_backoff",
    ]  # fmt: skip
    for i in (5, 8, 12):
        (before, old), (after, new) = results[i - 1 : i + 1]
        assert after == before._replace(lr=after.lr, out=after.out, bad_run=after.bad_run)
        assert after.lr[0] == pytest.approx(0.5 * before.lr[0])
        assert new.lr[0] == pytest.approx(0.5 * old.lr[0])
        assert new.fields == {"bad_run": after.bad_run, "lr_ctrl": after.lr[0]}
    for i in (2, 4, 6, 7, 10, 11):
        (before, old), (after, new) = results[i - 1 : i + 1]
        assert after == before._replace(bad_run=before.bad_run + 1)
        assert new.lr is old.lr
        assert new.momentum is old.momentum
        assert new.fields == {"bad_run": after.bad_run, "lr_ctrl": after.lr[0]}


def test_a_drop_on_unusable_losses_stays_within_the_bounds_and_keeps_damping_and_cosine():
    decisions = run([1.0, 3.0, nan], bad_limit=1, use_cosine=True, T0=2, var_damp_scale=2.0)
    scale = decisions[2].fields["damp"] * decisions[2].fields["cosf"]
    assert decisions[3].lr == (pytest.approx(0.7e-3 * 0.5 * scale),)
    floored = run([1.0] + [nan] * 10, bad_limit=1, lr_min=6e-4)
    assert floored[-1].lr == (6e-4,)
    assert floored[-1].lr is floored[-2].lr
    assert run([1.0] * 3 + [nan], patience=2)[-1].phase == "cooldown"
    assert run([1.0] * 3 + [nan], patience=2, cooldown=0)[-1].phase == "track"


@pytest.mark.parametrize("edge", [1e100, -1e100])
def test_a_loss_is_usable_up_to_the_largest_signal(edge):
    beyond = math.nextafter(edge, 2 * edge)
    assert codes(run([edge, beyond, 1.0])) == ["first", "nonfinite_hold", "up" if edge > 0 else "down"]
    rewards = [0.0, edge, beyond]
    signs = ["no_loss", "no_loss+reward_" + ("up" if edge > 0 else "down"), "no_loss"]
    assert codes(run([None] * 3, rewards=rewards, use_reward=True)) == signs


@pytest.mark.parametrize("compat", ["default", "original"])
def test_no_parameters_and_no_losses_give_an_lr_that_is_not_finite(compat):
    chance = random.Random(5)
    extreme = [1e100, -1e100, 1e-300, 0.0, 1.0, -1.0, nan, inf, None]
    for trial in range(40):
        parameters = {
            "up_factor": chance.choice([1.0, 1e308]), "down_factor": chance.choice([5e-324, 1.0]),
            "big_drop": chance.choice([5e-324, 0.5]), "var_damp_base": chance.choice([1e-100, 1e308]),
            "var_damp_scale": chance.choice([0.0, 1e308]), "reward_up": chance.choice([1.0, 1e308]),
            "reward_down": chance.choice([5e-324, 1.0]), "momentum_up": chance.choice([0.0, 1e308]),
            "lr_min": chance.choice([None, 5e-324]), "lr_max": chance.choice([None, 1e308]), "patience": trial % 3,
            "use_cosine": trial % 2 == 0, "T0": 1 + trial % 4, "T_mult": 1e6,
            "eta_min_scale": chance.choice([0.0, 1.0]),
        }  # fmt: skip
        losses, rewards = [[chance.choice(extreme) for _ in range(60)] for _ in range(2)]
        for state, decision in fold(losses, GROUPS, rewards, compat=compat, use_reward=True, **parameters):
            assert decision.lr[0] == 0
            assert all(1e-300 <= lr <= 1e100 for lr in decision.lr[1:])
            assert all(m is None or 0 <= m < 1 for m in decision.momentum)
            json.dumps([dump_state(state), decision.fields], allow_nan=False)


# ---- compat="original" ---------------------------------------------------------------------------------------------


def test_the_original_mode_performs_one_empty_step_at_registration():
    assert run([], compat="original", var_damp_base=4.0)[0].lr == (2.5e-4,)
    assert run([], compat="original", patience=0)[0][:1] == ((5e-4,),)
    assert run([], compat="original", patience=0)[0].phase == "cooldown"
    state, decision = fold([], compat="original", use_cosine=True, T0=2)[0]
    assert (decision.lr, state.turn, state.period, decision.code) == ((1e-3,), 1, 2, "initial")
    assert decision.fields is None
    assert run([], var_damp_base=4.0, patience=0)[0].lr == (1e-3,)
    assert fold([], use_cosine=True, T0=2)[0][0].turn == 0


def test_the_original_mode_lets_a_silent_step_worsen_everything():
    decisions = run([4.0, None, None], rewards=[1.0, None, None], compat="original", use_reward=True)
    assert codes(decisions) == ["first", "no_loss+down+reward_down", "no_loss+down+reward_down"]
    assert decisions[-1].lr == (pytest.approx(1e-3 * 0.63**2),)
    assert decisions[-1].momentum == (pytest.approx(0.9 * 0.81),)
    patient = run([4.0] + [None] * 4, compat="original", patience=3, cooldown=1)
    assert codes(patient) == ["first", *["no_loss+down"] * 2, "no_loss+down+big_drop", "no_loss+down"]
    assert [d.phase for d in patient] == ["track"] * 4 + ["cooldown", "track"]
    assert codes(run([None] * 2, rewards=[None, 1.0], compat="original", use_reward=True)) == ["no_loss"] * 2


def test_the_original_mode_compounds_damping_and_cosine_into_the_lr():
    quiet = {"compat": "original", "up_factor": 1.0, "down_factor": 1.0}
    damped = run([1.0, 3.0, None], var_damp_base=0.5, **quiet)
    assert [d.lr[0] for d in damped] == pytest.approx([2e-3, 4e-3, 1.6e-3, 0.64e-3])
    waved = run([None] * 3, use_cosine=True, T0=2, eta_min_scale=0.2, **quiet)
    assert [d.lr[0] for d in waved] == pytest.approx([1e-3, 6e-4, 6e-4, 6e-4 * (0.2 + 0.8 * (2 + 2**0.5) / 4)])
    floored = run([None], use_cosine=True, T0=2, eta_min_scale=0.2, lr_min=5e-4, **quiet)
    assert floored[-1].lr == (pytest.approx(7.5e-4),)


def test_the_original_mode_has_absolute_bounds():
    groups = (Group("a", 1e-3), Group("b", 100.0))
    rising, undamped = [2.0**i for i in range(300)], {"compat": "original", "var_damp_scale": 0.0}
    assert run(rising[::-1], groups, **undamped)[-1].lr == (10.0, 10.0)
    assert run(rising, groups, **undamped)[-1].lr == (1e-7, 1e-7)


# ---- whole states ---------------------------------------------------------------------------------------------------

STATED = {
    "loss_beta": 0.5, "reward_beta": 0.5, "var_window": 2, "var_damp_base": 0.5, "var_damp_scale": 0.0,
    "up_factor": 2.0, "down_factor": 0.5, "patience": 1, "cooldown": 2, "big_drop": 0.25, "use_cosine": True, "T0": 2,
    "T_mult": 2.0, "eta_min_scale": 0.5, "use_reward": True, "reward_up": 1.5, "reward_down": 0.25,
    "momentum_up": 0.0625, "momentum_down": 0.5, "momentum_target": "beta1", "bad_limit": 2, "lr_min": 2.0**-6,
    "lr_max": 8.0,
}  # fmt: skip
STATED_GROUPS = (
    Group("frozen", 0.0, 0.75), Group("body", 1.0, 0.75), Group("head", 2.0), Group("adam", 0.5, None, (0.875, 0.999)),
)  # fmt: skip
BOUNDS = [[0.0, 0.0], *[[2.0**-6, 8.0]] * 3]
NAMES = (
    "loss_ema", "prev_loss", "rel", "variance", "cv2", "damp", "reward_ema", "ssi", "cd", "T_cur", "T_i", "cosf",
    "lr_ctrl",
)  # fmt: skip
EMPTY_WINDOW, ONE_LOSS = [[], 0.0, 0.0, 0.0, 0.0, 0], [[4.0], 4.0, 0.0, 0.0, 0.0, 0]
TWO_LOSSES, NEXT_LOSSES = [[4.0, 2.0], 4.0, -1.0, 2.0, 2.0, 1], [[2.0, 5.0], 3.5, 0.0, 4.5, 4.5, 0]


def times(factor):
    return [0.0, factor, 2 * factor, factor / 2]


def met(parameters, rows, first):
    """Whether the state and the decision are exactly as stated, at the start and after every observation."""
    config = ADAPTIVE.config(**STATED, **parameters)
    state, decision = ADAPTIVE.init(config, STATED_GROUPS, 0)
    assert dump_state(state) == first
    assert decision == (state.out, state.momentum, None, "track", "initial", None, False, ())
    for step, (loss, reward, expected, phase, code, numbers) in enumerate(rows):
        state, decision = ADAPTIVE.step(config, state, Observation(step, loss, reward))
        assert dump_state(state) == [*expected, first[-1]], step
        assert decision == (state.out, state.momentum, None, phase, code, numbers, False, ()), step


def named(*numbers):
    return dict(zip(NAMES, numbers, strict=True))


def test_every_part_of_the_state_and_of_the_decision_is_as_stated():
    own, up, down = [0.75, 0.75, None, 0.875], [0.8125, 0.8125, None, 0.9375], [0.40625, 0.40625, None, 0.46875]
    plan = [BOUNDS, [[0.375, 0.999], [0.375, 0.999], None, [0.4375, 0.999]], 1]
    rel, cv2 = (4.0 - 3.0) / (4.0 + 1e-12), [2.0 / (9.0 + 1e-12), 4.5 / (12.25 + 1e-12)]
    fell = (3.0 - 4.0) / (3.0 + 1e-12)
    met({}, [
        (4.0, 1.0, [times(1.0), times(2.0), own, 4.0, 1.0, ONE_LOSS, 0, 0, 1, 2, 2.0, 1.0, 0],
         "track", "first", named(4.0, None, None, 0.0, 0.0, 2.0, 1.0, 0, 0, 1, 2, 1.0, 1.0)),
        (2.0, 5.0, [times(3.0), [0.0, 4.5, 8.0, 2.25], up, 3.0, 3.0, TWO_LOSSES, 0, 0, 0, 4, 2.0, 0.75, 0],
         "track", "up+reward_up+cosine_restart_next",
         named(3.0, 4.0, rel, 2.0, cv2[0], 2.0, 3.0, 0, 0, 0, 4, 0.75, 3.0)),
        (5.0, 1.0, [times(0.09375), times(0.1875), down, 4.0, 2.0, NEXT_LOSSES, 0, 2, 1, 4, 2.0, 1.0, 0],
         "cooldown", "down+reward_down+big_drop",
         named(4.0, 3.0, fell, 4.5, cv2[1], 2.0, 2.0, 0, 2, 1, 4, 1.0, 0.09375)),
        (nan, 9.0, [times(0.09375), times(0.1875), down, 4.0, 2.0, NEXT_LOSSES, 0, 2, 1, 4, 2.0, 1.0, 1],
         "cooldown", "nonfinite_hold", {"bad_run": 1, "lr_ctrl": 0.09375}),
        (inf, 9.0, [[0.0, 0.0234375, 0.046875, 2.0**-6], [0.0, 0.046875, 0.09375, 2.0**-5], down, 4.0, 2.0,
                    NEXT_LOSSES, 0, 2, 1, 4, 2.0, 1.0, 2],
         "cooldown", "nonfinite_backoff", {"bad_run": 2, "lr_ctrl": 0.0234375}),
    ], [times(1.0), times(1.0), own, None, None, EMPTY_WINDOW, 0, 0, 0, 2, 1.0, 1.0, 0, plan])  # fmt: skip


def test_every_part_of_the_original_mode_s_state_is_as_stated():
    own, up = [0.75, 0.75, None, 0.875], [0.8125, 0.8125, None, 0.9375]
    plan = [BOUNDS, [[0.0, 0.999], [0.0, 0.999], None, [0.0, 0.999]], 1]
    rel, cv2 = (4.0 - 3.0) / (4.0 + 1e-12), 2.0 / (9.0 + 1e-12)
    met({"compat": "original"}, [
        (4.0, 1.0, [times(3.0), times(3.0), own, 4.0, 1.0, ONE_LOSS, 0, 0, 0, 4, 2.0, 0.75, 0],
         "track", "first+cosine_restart_next", named(4.0, None, None, 0.0, 0.0, 2.0, 1.0, 0, 0, 0, 4, 0.75, 3.0)),
        (2.0, 5.0, [[0.0, 8.0, 8.0, 8.0], [0.0, 8.0, 8.0, 8.0], up, 3.0, 3.0, TWO_LOSSES, 0, 0, 1, 4, 2.0, 1.0, 0],
         "track", "up+reward_up", named(3.0, 4.0, rel, 2.0, cv2, 2.0, 3.0, 0, 0, 1, 4, 1.0, 8.0)),
        (nan, 9.0, [[0.0, 8.0, 8.0, 8.0], [0.0, 8.0, 8.0, 8.0], up, 3.0, 3.0, TWO_LOSSES, 0, 0, 1, 4, 2.0, 1.0, 1],
         "track", "nonfinite_hold", {"bad_run": 1, "lr_ctrl": 8.0}),
        (-inf, 9.0, [[0.0, 2.0, 2.0, 2.0], [0.0, 2.0, 2.0, 2.0], up, 3.0, 3.0, TWO_LOSSES, 0, 0, 1, 4, 2.0, 1.0, 2],
         "track", "nonfinite_backoff", {"bad_run": 2, "lr_ctrl": 2.0}),
    ], [times(2.0), times(2.0), own, None, None, EMPTY_WINDOW, 0, 0, 1, 2, 2.0, 1.0, 0, plan])  # fmt: skip


# ---- records -------------------------------------------------------------------------------------------------------


def test_the_numbers_behind_a_decision_are_recorded():
    decision = run([4.0, 2.0], rewards=[1.0, 2.0], loss_beta=0.5, reward_beta=0.5, use_reward=True)[-1]
    assert decision.fields == {
        "loss_ema": 3.0, "prev_loss": 4.0, "rel": pytest.approx(0.25), "variance": 2.0, "cv2": pytest.approx(2 / 9),
        "damp": pytest.approx(9 / 11), "reward_ema": 1.5, "ssi": 0, "cd": 0, "T_cur": 0, "T_i": 200, "cosf": 1.0,
        "lr_ctrl": pytest.approx(1e-3 * 1.05 * 1.03),
    }  # fmt: skip
    assert not decision.milestone
    first = run([4.0])
    assert first[0].fields is None
    assert (first[1].fields["prev_loss"], first[1].fields["rel"], first[1].fields["reward_ema"]) == (None, None, None)


SENTENCES = {
    "up+cosine_restart_next": "The smoothed loss fell from 4 to 3, by 0.25 of itself (> 0.0001): learning rate x 1.05. "
    "The cosine starts anew at the next step, with a period of 4 steps.",
    "down+reward_down": "The smoothed loss went from 3 to 3.5, which counts as worse (improvement -0.167): learning "
    "rate x 0.7. The smoothed reward did not rise, 1.5: learning rate x 0.9.",
    "nonfinite_backoff": "3 unusable losses in a row: learning rate x 0.5, within its bounds.",
}


def test_every_code_ever_given_is_explained_from_its_numbers():
    losses = [4.0, 2.0, 4.0, 3.5, 3.5, 3.5, None, nan, nan, nan]
    rewards = [1.0, 2.0, 1.5, 1.5, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0]
    parameters = {"loss_beta": 0.5, "reward_beta": 0.0, "use_cosine": True, "T0": 2, "patience": 3}
    texts = {}
    for compat, use_reward in [("default", True), ("default", False), ("original", True)]:
        config = ADAPTIVE.config(compat=compat, use_reward=use_reward, **parameters)
        for decision in run(losses, rewards=rewards, compat=compat, use_reward=use_reward, **parameters):
            if compat == "default":
                texts[decision.code] = ADAPTIVE.explain(config, decision)
            assert "{" not in (text := ADAPTIVE.explain(config, decision))
            assert text.endswith(".")
    assert {part for code in texts for part in code.split("+")} == set(ADAPTIVE.codes)
    assert {code: texts[code] for code in SENTENCES} == SENTENCES


@pytest.mark.parametrize("compat", ["default", "original"])
def test_a_state_saved_as_json_at_any_step_goes_on_bit_for_bit(compat):
    config = ADAPTIVE.config(compat=compat, use_reward=True, use_cosine=True, T0=7, patience=4, cooldown=3)
    state, _ = ADAPTIVE.init(config, GROUPS, 0)
    carried = state
    for step, (loss, reward) in enumerate(random_signals(random.Random(2), 300)):
        seen = Observation(step, loss, reward)
        carried = load_state(ADAPTIVE, json.loads(json.dumps(dump_state(carried), allow_nan=False)))
        (state, one), (carried, other) = ADAPTIVE.step(config, state, seen), ADAPTIVE.step(config, carried, seen)
        assert repr(one) == repr(other)
        assert repr(dump_state(state)) == repr(dump_state(carried))


def test_it_is_in_the_table():
    from flyball_server.core.policies import POLICIES

    assert POLICIES["adaptive"].tag == "adaptive@1"
