"""Goal: `cycle` does what its specification says, in every recorded case and at every threshold.

Method: golden cases; an independent brute-force reading of the rule on random losses and parameters; window means
beside exact sums; each stated decision alone, at thresholds that are powers of two, where equality is exact.
"""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.core.reference import unrolled

from flyball_server.core import rng
from flyball_server.core.policies import POLICIES
from flyball_server.core.state import dump_state
from flyball_server.core.types import Group, Observation

CYCLE = POLICIES["cycle"]
TRACES = Path(__file__).parent.parent / "traces"
CASES = json.loads((TRACES / "cycle@1" / "default.json").read_text())
ONE_GROUP = (Group("all", 2.0**-10),)
BASE = 2.0**-10
#: A window of four with thresholds that binary fractions hit exactly, and an LR that is at its target at once.
SMALL = {
    "window_size": 4, "improvement_threshold": 0.25, "plateau_threshold": 0.125, "divergence_threshold": 0.5,
    "smoothing": 0.0, "explore_noise": 0.0, "max_lr_factor": 16.0,
}  # fmt: skip


def run(losses, groups=ONE_GROUP, run_seed=0, **parameters):
    config = CYCLE.config(**parameters)
    state, decision = CYCLE.init(config, groups, run_seed)
    decisions = [decision]
    for step, loss in enumerate(losses):
        state, decision = CYCLE.step(config, state, Observation(step, loss))
        assert decision.momentum is None
        assert decision.noise_std is None
        assert CYCLE.explain(config, decision).endswith(".")
        decisions.append(decision)
    return decisions


def codes(losses, **parameters):
    return [decision.code for decision in run(losses, **parameters)[1:]]


@pytest.mark.parametrize("name", CASES)
def test_a_golden_case_is_met_at_every_listed_step(name):
    case = CASES[name]
    assert (case["mode"], case["groups"]) == ("default", None)
    config = CYCLE.config(**case["config"])
    state, _ = CYCLE.init(config, (Group("all", 1e-4),), 0)
    rows = {key: unrolled(case[key], case["n"]) for key in ("lr", "phase", "decision")}
    lines = (TRACES / f"{case['trace']}.jsonl").read_text().splitlines()[: case["n"]]
    assert len(lines) == case["n"]
    for step, line in enumerate(lines):
        state, decision = CYCLE.step(config, state, Observation(**json.loads(line)))
        if step % case["every"] == 0:
            assert decision.lr == pytest.approx(rows["lr"][step], rel=1e-8), step
            assert (decision.phase, decision.code) == (rows["phase"][step], rows["decision"][step]), step
    assert decision.lr == pytest.approx(case["final"]["lr"], rel=1e-8)


def brute_force(p, losses, base, seed):
    """The rule in one piece, after its prose: the whole history, plain lists, one variable per word of the text."""
    top, seen, bad_run = p["max_lr_factor"] * base, [], 0
    lr = out = base
    phase, stuck, left, refr = "exploit", 0, 0, 0
    ceiling = p["escape_multiplier"] * top if p["escape_ceiling"] == "multiplied" else top
    for step, loss in enumerate(losses):
        if loss is None:
            yield "no_loss", phase, out, None
            continue
        if math.isnan(loss) or abs(loss) > 1e100:
            bad_run += 1
            code = "nonfinite_hold"
            if bad_run % p["bad_limit"] == 0:
                code, phase, lr, out, left, stuck, refr = (
                    "nonfinite_backoff",
                    "exploit",
                    base,
                    base,
                    0,
                    0,
                    p["refractory"],
                )
            yield code, phase, out, None
            continue
        bad_run = 0
        seen.append(loss)
        window = seen[-p["window_size"] :]
        if len(window) < p["window_size"]:
            out = lr
            yield "filling_window", phase, out, None
            continue
        h = p["window_size"] // 2
        old, recent = math.fsum(window[:h]) / h, math.fsum(window[h:]) / len(window[h:])
        if p["compat"] == "original":
            imp = 0.0 if old == 0 else (old - recent) / old
        else:
            imp = (old - recent) / max(abs(old), 1e-12)

        def leave(where):
            nonlocal phase, left, stuck, refr
            phase, left, stuck, refr = where, 0, 0, p["refractory"]

        def enter():
            nonlocal phase, left, stuck
            phase, left, stuck = "escape", p["escape_steps"], 0

        if left > 0:
            left -= 1
            code = "escape_burst"
            if imp > p["improvement_threshold"]:
                code = "escape_success"
                leave("exploit")
            elif imp < -p["divergence_threshold"]:
                code = "diverging"
                leave("exploit")
            elif left == 0:
                code = "escape_over"
                leave("explore")
        else:
            refr = max(0, refr - 1)
            if imp > p["improvement_threshold"]:
                code, phase, stuck = "improving", "exploit", 0
            elif imp < -p["divergence_threshold"]:
                code, phase = "diverging", "exploit"
            elif imp <= p["plateau_threshold"]:
                stuck += 1
                if refr == 0 and imp < -p["plateau_threshold"] and p["escape_on"] in ("both", "increase"):
                    code = "loss_increasing"
                    enter()
                elif refr == 0 and stuck >= p["patience"] and p["escape_on"] in ("both", "patience"):
                    code = "patience"
                    enter()
                else:
                    phase, code = "explore", "increasing_wait" if imp < -p["plateau_threshold"] else "plateau"
            else:
                code = "hysteresis"
        target = {
            "exploit": base,
            "explore": base * (top / base) ** p["explore_level"],
            "escape": p["escape_multiplier"] * top,
        }[phase]
        lr = min(p["smoothing"] * lr + (1 - p["smoothing"]) * target, ceiling)
        out, u = lr, None
        if phase == "explore":
            u = rng.uniform(seed, 0x0001, step)
            out *= 1 + p["explore_noise"] * (2 * u - 1)
        out = min(max(out, base), ceiling)
        numbers = {"improvement": imp, "old_avg": old, "recent_avg": recent, "stuck": stuck, "left": left, "refr": refr}
        numbers |= {"target": target, "lr_before_noise": lr}
        yield code, phase, out, numbers if u is None else numbers | {"u": u}


def random_losses(chance, n):
    level, losses = chance.choice([3.0, 3.0, -3.0, 0.0]), []
    for i in range(n):
        if i % 60 == 0:
            drift, noise = chance.choice([-0.02, -0.004, 0.0, 0.0, 0.01, 0.06]), chance.choice([0.0, 0.005, 0.05, 1.0])
        level += drift
        wild = chance.random()
        if wild < 0.05:
            losses.append(chance.choice([None, math.nan, -math.inf, 1.1e100]))
        losses.append(math.nan if i % 200 in (150, 151, 152, 153) else level + noise * chance.gauss(0, 1))
    return losses


def random_parameters(chance):
    size = chance.choice([4, 5, 10, 21, 50])
    plateau = chance.choice([0.0, 0.005, 0.05])
    return {
        "compat": chance.choice(["default", "default", "original"]),
        "max_lr_factor": chance.choice([1.0, 3.0, 10.0]),
        "window_size": size,
        "patience": chance.choice([1, 7, 40]),
        "improvement_threshold": plateau + chance.choice([0.0, 0.005, 0.1]),
        "plateau_threshold": plateau,
        "smoothing": chance.choice([0.0, 0.5, 0.9, 0.99]),
        "escape_multiplier": chance.choice([1.0, 1.5, 4.0]),
        "explore_level": chance.choice([0.0, 0.3, 0.5, 1.0]),
        "explore_noise": chance.choice([0.0, 0.2, 1.0]),
        "escape_steps": chance.choice([1, 2, 15, size]),
        "refractory": chance.choice([0, 1, 20, size]),
        "escape_on": chance.choice(["patience", "increase", "both", "both"]),
        "divergence_threshold": chance.choice([0.0, 0.1, 0.5]),
        "escape_ceiling": chance.choice(["max_lr", "multiplied"]),
        "bad_limit": chance.choice([1, 2, 3]),
        "seed": chance.choice([-5, 0, 2**40]),
    }


def test_the_rule_agrees_with_a_brute_force_reading_of_it():
    met = set()
    for trial in range(120):
        chance = random.Random(trial)
        parameters, losses = random_parameters(chance), random_losses(chance, 500)
        given = dict(parameters)
        if parameters["compat"] == "original":  # absolute bounds there; these give the same range
            given |= {"base_lr": 1e-3, "max_lr": parameters["max_lr_factor"] * 1e-3}
        decisions = run(losses, (Group("all", 1e-3),), 99, **given)[1:]
        expected = list(brute_force(parameters, losses, 1e-3, parameters["seed"]))
        for decision, (code, phase, out, numbers) in zip(decisions, expected, strict=True):
            assert (decision.code, decision.phase) == (code, phase)
            assert math.isclose(decision.lr[0], out, rel_tol=1e-9)
            met.add(code)
            if numbers:
                assert list(decision.fields) == list(numbers)
                for name, number in numbers.items():
                    assert math.isclose(decision.fields[name], number, rel_tol=1e-9, abs_tol=1e-15), name
    assert met == set(CYCLE.codes) - {"initial"}


# ---- the window -------------------------------------------------------------------------------------------


def halves(losses, size):
    for end in range(size, len(losses) + 1):
        part = losses[end - size : end]
        half = size // 2
        yield math.fsum(part[:half]) / half, math.fsum(part[half:]) / (size - half)


def hard_losses(kind, n):
    chance = random.Random(kind)
    for i in range(n):
        yield {
            "ordinary": lambda i=i: 3 * math.exp(-i / 200) + 0.1 * chance.random(),
            "around zero": lambda: chance.gauss(0, 1),
            "spikes": lambda i=i: {60: 1e99, 61: 3e82, 62: -7e60, 63: 1e40, 300: -1e20}.get(i, 1 + chance.random()),
            "opposite spikes": lambda i=i: chance.choice([1e30, -1e30]) if i % 90 < 3 else chance.random(),
            "falling far": lambda i=i: 1e60 * 0.5**i * (1 + chance.random()),
            "falling very far": lambda i=i: 1e90 * 1e-3**i * (1 + chance.random()),
            "rising far": lambda i=i: 1e-60 * 1.5**i * (1 + chance.random()),
            "alternating": lambda i=i: (-1.0) ** i * (1 + chance.random() * (i % 100 < 50)),
        }[kind]()


@pytest.mark.parametrize("size", [4, 7, 20, 151])
@pytest.mark.parametrize(
    "kind",
    [
        "ordinary",
        "around zero",
        "spikes",
        "opposite spikes",
        "falling far",
        "falling very far",
        "rising far",
        "alternating",
    ],
)
def test_the_means_are_those_of_the_exact_window_to_the_last_bit(kind, size):
    losses = list(hard_losses(kind, 550))
    judged = [decision.fields for decision in run(losses, window_size=size)[size:]]
    assert [(fields["old_avg"], fields["recent_avg"]) for fields in judged] == list(halves(losses, size))


def sums_made(losses, **parameters):
    """How many good losses ago the sums were made, after each loss."""
    config = CYCLE.config(**parameters)
    state, _ = CYCLE.init(config, ONE_GROUP, 0)
    ages = []
    for step, loss in enumerate(losses):
        state, _ = CYCLE.step(config, state, Observation(step, loss))
        ages.append(len(state.since))
    return ages


def test_the_sums_are_made_anew_once_per_window_length_and_where_one_falls_below_a_millionth():
    chance = random.Random(0)
    ordinary = sums_made([2 + chance.gauss(0, 1) for _ in range(70)], window_size=20)
    assert ordinary == [*range(1, 20), 0] + [*range(1, 20), 0] * 2 + [*range(1, 11)]
    big = 2.0**19  # a half of two such losses has the sum 2^20, and a later sum of 1 is 2^-20 of it
    for sign in (1.0, -1.0):
        for newest, age in (([0.5, 0.5, 0.5], 1), ([0.5, 0.5, 0.25], 0)):
            assert sums_made([sign * x for x in [big, big, *newest]], window_size=4)[-1] == age
        for newest, age in (([0.5, 0.5, 1.0, 1.0], 2), ([0.5, 0.25, 1.0, 1.0], 0)):
            assert sums_made([sign * x for x in [big, big, *newest]], window_size=4)[-1] == age
        spike = sign * 2.0**21  # the largest size is that of either sum
        for losses in ([sign] * 4 + [spike], [sign, sign, spike, -spike, spike + sign]):
            assert sums_made(losses, window_size=4)[-1] == 0
    assert sums_made([0.0] * 7, window_size=4) == [1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-9, 0.0, 7.3e12, 1e99])
@pytest.mark.parametrize("size", [4, 20, 150])
def test_a_constant_window_has_an_improvement_of_exactly_zero_whatever_came_before(value, size):
    chance = random.Random(size)
    before = [value * (1 + chance.gauss(0, 1)) + chance.random() for _ in range(size + 17)]
    for decision in run([*before, *[value] * 3 * size], window_size=size)[len(before) + size :]:
        assert decision.fields["improvement"] == 0.0


def test_a_loss_that_is_missing_or_unusable_leaves_the_window_alone():
    losses = [1.0, math.nan, 2.0, None, 3.0, math.inf, 5.0, -1e101, 8.0]
    decisions = run(losses, **SMALL)
    assert [one.code for one in decisions[1:]] == [
        "filling_window", "nonfinite_hold", "filling_window", "no_loss", "filling_window", "nonfinite_hold",
        "diverging", "nonfinite_hold", "diverging",
    ]  # fmt: skip
    assert (decisions[7].fields["old_avg"], decisions[7].fields["recent_avg"]) == (1.5, 4.0)
    assert (decisions[9].fields["old_avg"], decisions[9].fields["recent_avg"]) == (2.5, 6.5)
    assert codes([1.0, 1e100, -1e100], **SMALL) == ["filling_window"] * 3  # the largest that is usable


def test_the_middle_loss_of_an_odd_window_belongs_to_the_newer_half():
    fields = run([1.0, 3.0, 8.0, 8.0, 2.0], **SMALL | {"window_size": 5})[-1].fields
    assert (fields["old_avg"], fields["recent_avg"]) == (2.0, 6.0)


# ---- the improvement --------------------------------------------------------------------------------------


def test_a_falling_negative_loss_is_an_improvement_except_in_the_original_mode():
    losses = [-1.0, -1.0, -2.0, -2.0]
    assert run(losses, **SMALL)[-1].fields["improvement"] == 1.0
    for name in ("original", "seed"):
        assert run(losses, compat=name, **SMALL)[-1].fields["improvement"] == -1.0


def test_an_older_mean_of_zero_is_divided_by_eps_or_gives_zero_in_the_original_mode():
    tiny = 2.0**-41
    assert run([0.0, 0.0, -1.0, -1.0], **SMALL)[-1].fields["improvement"] == 1 / 1e-12
    assert run([tiny, tiny, 0.0, 0.0], **SMALL)[-1].fields["improvement"] == tiny / 1e-12
    assert run([-tiny, -tiny, 0.0, 0.0], **SMALL)[-1].fields["improvement"] == -tiny / 1e-12
    assert run([0.0, 0.0, -1.0, -1.0], compat="original", **SMALL)[-1].fields["improvement"] == 0.0
    assert run([tiny, tiny, 0.0, 0.0], compat="original", **SMALL)[-1].fields["improvement"] == 1.0


def test_a_raw_division_that_overflows_still_gives_a_finite_number():
    for old, improvement in ((1e-300, -1e100), (-1e-300, 1e100)):
        decision = run([old, old, 1e99, 1e99], compat="original", **SMALL)[-1]
        assert decision.fields["improvement"] == improvement


@pytest.mark.parametrize(
    ("newer", "code", "phase"),
    [
        (0.5, "improving", "exploit"),
        (0.75 - 2**-20, "improving", "exploit"),
        (0.75, "hysteresis", "exploit"),  # exactly improvement_threshold
        (0.875 - 2**-20, "hysteresis", "exploit"),
        (0.875, "plateau", "explore"),  # exactly plateau_threshold
        (1.125, "plateau", "explore"),  # exactly -plateau_threshold
        (1.125 + 2**-20, "loss_increasing", "escape"),
        (1.5, "loss_increasing", "escape"),  # exactly -divergence_threshold
        (1.5 + 2**-20, "diverging", "exploit"),
    ],
)
def test_every_threshold_is_met_exactly_outside_a_burst(newer, code, phase):
    decision = run([1.0, 1.0, newer, newer], **SMALL)[-1]
    assert (decision.code, decision.phase) == (code, phase)


@pytest.mark.parametrize(
    ("newest", "code", "phase", "refr"),
    [
        (0.5 - 2**-20, "escape_success", "exploit", 7),
        (0.5, "escape_burst", "escape", 0),  # exactly improvement_threshold
        (2.0, "escape_burst", "escape", 0),  # exactly -divergence_threshold
        (2.0 + 2**-20, "diverging", "exploit", 7),
    ],
)
def test_every_threshold_is_met_exactly_within_a_burst(newest, code, phase, refr):
    parameters = SMALL | {"patience": 1, "refractory": 7}
    decision = run([1.0, 1.0, 1.0, 1.0, newest], **parameters)[-1]
    assert (decision.code, decision.phase, decision.fields["refr"]) == (code, phase, refr)


# ---- phases -----------------------------------------------------------------------------------------------


def test_a_burst_lasts_its_steps_and_the_refractory_counts_from_its_end():
    parameters = SMALL | {"patience": 2, "escape_steps": 3, "refractory": 3}
    decisions = run([1.0] * 13, **parameters)[4:]
    assert [one.code for one in decisions] == [
        "plateau", "patience", "escape_burst", "escape_burst", "escape_over", "plateau", "plateau", "patience",
        "escape_burst", "escape_burst",
    ]  # fmt: skip
    assert [one.fields["left"] for one in decisions] == [0, 3, 2, 1, 0, 0, 0, 3, 2, 1]
    assert [one.fields["stuck"] for one in decisions] == [1, 0, 0, 0, 0, 1, 2, 0, 0, 0]
    assert [one.fields["refr"] for one in decisions] == [0, 0, 0, 0, 3, 2, 1, 0, 0, 0]
    assert [one.phase for one in decisions[3:6]] == ["escape", "explore", "explore"]


def test_a_steep_rise_keeps_the_count_of_losses_without_improvement_and_a_fall_clears_it():
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0]
    decisions = run(losses, **SMALL)
    assert [one.fields["stuck"] for one in decisions[4:]] == [1, 2, 2, 2]
    assert [one.code for one in decisions[6:]] == ["diverging", "diverging"]
    assert run([*losses[:5], 0.0], **SMALL)[-1].fields["stuck"] == 0


def test_between_the_thresholds_the_phase_stays_as_it_is():
    decisions = run([1.0, 1.0, 1.0, 1.0, 0.625, 1.0], **SMALL)
    assert [(one.code, one.phase) for one in decisions[4:6]] == [("plateau", "explore"), ("hysteresis", "explore")]
    assert decisions[5].fields["stuck"] == 1


def test_what_starts_a_burst_can_be_chosen():
    rising = [1.0, 1.0, 1.25, 1.25]
    assert codes(rising, **SMALL)[-1] == "loss_increasing"
    assert codes(rising, **SMALL, escape_on="increase")[-1] == "loss_increasing"
    assert codes(rising, **SMALL, escape_on="patience")[-1] == "increasing_wait"
    assert codes(rising, **SMALL, escape_on="patience", patience=1)[-1] == "patience"
    assert codes([1.0] * 4, **SMALL, patience=1)[-1] == "patience"
    assert codes([1.0] * 4, **SMALL, escape_on="increase", patience=1)[-1] == "plateau"


def test_a_rise_during_the_refractory_waits():
    losses = [1.0] * 5 + [1.75]
    assert codes(losses, **SMALL, patience=1, escape_steps=1, refractory=2)[3:] == [
        "patience", "escape_over", "increasing_wait",
    ]  # fmt: skip
    assert codes(losses, **SMALL, patience=1, escape_steps=1, refractory=1)[3:] == [
        "patience", "escape_over", "loss_increasing",
    ]  # fmt: skip


def test_the_whole_state_from_the_start_to_a_second_burst_without_a_refractory():
    config = CYCLE.config(**SMALL | {"patience": 1, "escape_steps": 2, "refractory": 0, "bad_limit": 2})
    plan, zero, sums = [BASE, 16 * BASE, 4 * BASE, 24 * BASE, [1.0], 7], [0.0] * 5, [2.0, 0.0, 2.0, 0.0, 2.0]
    low, high, ones = [BASE, BASE, [BASE]], [16 * BASE, 16 * BASE, [16 * BASE]], [1.0] * 4
    state, decision = CYCLE.init(config, ONE_GROUP, 7)
    assert decision == ((BASE,), None, None, "exploit", "initial", None, False, ())
    assert dump_state(state) == [*low, "exploit", 0, 0, 0, 0, [], [], zero, plan]
    for loss, code, *expected in (
        (1.0, "filling_window", *low, "exploit", 0, 0, 0, 0, [], [1.0], zero),
        (math.nan, "nonfinite_hold", *low, "exploit", 0, 0, 0, 1, [], [1.0], zero),
        (None, "no_loss", *low, "exploit", 0, 0, 0, 1, [], [1.0], zero),
        (1.0, "filling_window", *low, "exploit", 0, 0, 0, 0, [], [1.0] * 2, zero),
        (1.0, "filling_window", *low, "exploit", 0, 0, 0, 0, [], [1.0] * 3, zero),
        (1.0, "patience", *high, "escape", 0, 2, 0, 0, ones, [], sums),
        (1.0, "escape_burst", *high, "escape", 0, 1, 0, 0, ones, [1.0], sums),
        (math.nan, "nonfinite_hold", *high, "escape", 0, 1, 0, 1, ones, [1.0], sums),
        (math.nan, "nonfinite_backoff", *low, "exploit", 0, 0, 0, 2, ones, [1.0], sums),
        (math.nan, "nonfinite_hold", *low, "exploit", 0, 0, 0, 3, ones, [1.0], sums),
        (1.0, "patience", *high, "escape", 0, 2, 0, 0, ones, [1.0] * 2, sums),
    ):
        state, decision = CYCLE.step(config, state, Observation(0, loss))
        assert (decision.code, decision.phase, decision.lr) == (code, state.phase, state.lrs)
        assert not decision.milestone
        assert dump_state(state) == [*expected, plan]


# ---- learning rates ---------------------------------------------------------------------------------------


def test_each_phase_has_its_target():
    plateau = run([1.0] * 4, **SMALL)[-1]
    assert (plateau.fields["target"], plateau.lr) == (4 * BASE, (4 * BASE,))
    assert run([1.0] * 4, **SMALL, explore_level=0.25)[-1].lr == (2 * BASE,)
    assert run([1.0] * 4, **SMALL, explore_level=0.0)[-1].lr == (BASE,)
    assert run([1.0] * 4, **SMALL, explore_level=1.0)[-1].lr == (16 * BASE,)
    burst = run([1.0] * 4, **SMALL, patience=1)[-1]
    assert (burst.fields["target"], burst.fields["lr_before_noise"], burst.lr) == (24 * BASE, 16 * BASE, (16 * BASE,))
    higher = run([1.0] * 4, **SMALL, patience=1, escape_ceiling="multiplied", escape_multiplier=2.0)[-1]
    assert (higher.fields["target"], higher.lr) == (32 * BASE, (32 * BASE,))


def test_a_step_keeps_the_smoothing_part_of_the_lr():
    decisions = run([1.0] * 6, **SMALL | {"smoothing": 0.75})
    assert [one.lr for one in decisions[3:6]] == [(BASE,), (1.75 * BASE,), (2.3125 * BASE,)]


def test_a_burst_from_base_reaches_the_ceiling_before_it_ends():
    decisions = run([1.0] * 300, window_size=4, patience=1, escape_steps=150)[4:]
    first = next(i for i, one in enumerate(decisions, 1) if one.lr[0] == pytest.approx(10 * BASE, rel=1e-12))
    assert first == 103
    assert max(one.lr[0] for one in decisions) == 10 * BASE


def test_the_noise_is_drawn_per_step_from_the_seed_and_never_fed_back():
    parameters = SMALL | {"explore_noise": 0.5, "smoothing": 0.75}
    quiet, noisy = run([1.0] * 12, **SMALL | {"smoothing": 0.75}), run([1.0] * 12, run_seed=3, **parameters)
    for step, (calm, wild) in enumerate(zip(quiet[5:], noisy[5:], strict=True), 4):
        u = rng.uniform(3, 1, step)
        assert wild.fields["u"] == u
        assert wild.fields["lr_before_noise"] == calm.fields["lr_before_noise"]
        expected = calm.lr[0] * (1 + 0.5 * (2 * u - 1))
        assert wild.lr == pytest.approx((max(expected, BASE),), rel=1e-15)
    three = run([1.0] * 9, run_seed=3, **parameters)
    assert three == run([1.0] * 9, run_seed=4, seed=3, **parameters)
    assert three != run([1.0] * 9, run_seed=4, **parameters)
    assert run([1.0] * 9, run_seed=3, seed=0, **parameters) == run([1.0] * 9, run_seed=0, **parameters)


def test_the_noise_crosses_neither_bound():
    parameters = SMALL | {"explore_noise": 1.0}
    low = {one.lr[0] for one in run([1.0] * 200, **parameters | {"explore_level": 0.0})[4:]}
    high = {one.lr[0] for one in run([1.0] * 200, **parameters | {"explore_level": 1.0})[4:]}
    assert (min(low), max(high)) == (BASE, 16 * BASE)
    assert len(low) > 50
    assert len(high) > 50


def test_no_number_is_drawn_outside_the_phase_explore():
    for losses in ([2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.75, 1.75], [1.0, 1.0, 1.25, 1.25], [1.0, 1.0, 0.75, 0.75]):
        assert "u" not in run(losses, **SMALL | {"explore_noise": 0.5})[-1].fields


def test_an_lr_at_base_stays_the_very_same_object_while_the_loss_falls():
    decisions = run([10 * 0.9**i for i in range(300)], window_size=20)
    assert {one.code for one in decisions} == {"initial", "filling_window", "improving"}
    assert all(one.lr is decisions[0].lr for one in decisions)


def test_groups_keep_their_ratios_and_a_frozen_group_stays_frozen():
    groups = (Group("frozen", 0.0), Group("body", BASE, 0.9), Group("head", 8 * BASE))
    assert run([1.0] * 4, groups, **SMALL)[-1].lr == (0.0, 4 * BASE, 32 * BASE)
    assert run([1.0] * 4, groups, **SMALL, group_mode="same")[-1].lr == (0.0, 4 * BASE, 4 * BASE)
    assert run([1.0] * 4, groups, **SMALL, base_lr=2 * BASE)[0].lr == (0.0, 2 * BASE, 16 * BASE)
    frozen = run([1.0] * 9, (Group("a", 0.0), Group("b", 0.0)), **SMALL | {"explore_noise": 0.5})
    assert {one.lr for one in frozen} == {(0.0, 0.0)}
    assert all(one.lr is frozen[0].lr for one in frozen)


def test_extreme_bounds_give_finite_settings():
    groups = (Group("all", 1e-300),)
    for level in (0.0, 0.5, 1.0):
        decisions = run([1.0] * 20, groups, max_lr=1e100, explore_level=level, escape_multiplier=1e300, window_size=4)
        json.dumps([dict(one.fields or {}) for one in decisions], allow_nan=False)
        assert all(1e-300 <= one.lr[0] <= 1e100 for one in decisions)


# ---- unusable and missing losses --------------------------------------------------------------------------


def test_every_third_unusable_loss_in_a_row_leads_back_to_base_and_keeps_the_window():
    parameters = SMALL | {"patience": 2, "escape_steps": 9, "refractory": 2}
    nan = math.nan
    losses = [1.0] * 6 + [nan, nan, None, nan, nan, nan, nan, 1.0, 1.0, 1.0, 1.0, nan, nan, 1.0, nan]
    decisions = run(losses, **parameters)[6:]
    assert [one.code for one in decisions] == [
        "escape_burst", "nonfinite_hold", "nonfinite_hold", "no_loss", "nonfinite_backoff", "nonfinite_hold",
        "nonfinite_hold", "nonfinite_backoff", "plateau", "patience", "escape_burst", "escape_burst",
        "nonfinite_hold", "nonfinite_hold", "escape_burst", "nonfinite_hold",
    ]  # fmt: skip
    assert [one.phase for one in decisions[:6]] == ["escape"] * 4 + ["exploit"] * 2
    assert [one.lr for one in decisions[:6]] == [(16 * BASE,)] * 4 + [(BASE,)] * 2
    assert decisions[4].fields == {"bad_run": 3, "old_lr": 16 * BASE, "new_lr": BASE}
    assert decisions[7].lr is decisions[4].lr
    again = decisions[8].fields
    assert (again["stuck"], again["left"], again["refr"], again["old_avg"]) == (1, 0, 1, 1.0)
    assert (decisions[1].fields, decisions[2].fields) == ({"bad_run": 1}, {"bad_run": 2})


def test_the_backoff_forgets_the_smoothed_lr_too():
    parameters = SMALL | {"smoothing": 0.75, "bad_limit": 1}
    decisions = run([1.0] * 9 + [math.nan, 1.0], **parameters)
    assert [one.lr for one in decisions[-2:]] == [(BASE,), (1.75 * BASE,)]


def test_an_observation_without_a_loss_changes_nothing_at_all():
    config = CYCLE.config()
    state, decision = CYCLE.init(config, ONE_GROUP, 0)
    after, other = CYCLE.step(config, state, Observation(0, None, 1.0, 1.0, 1.0, 1.0, {"x": 1.0}))
    assert after is state
    assert (other.code, other.phase, other.fields) == ("no_loss", "exploit", None)
    assert other.lr is decision.lr


# ---- parameters -------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_specification():
    assert CYCLE.tag == "cycle@1"
    assert asdict(CYCLE.config()) == {
        "compat": "default", "base_lr": None, "max_lr": None, "max_lr_factor": 10.0, "window_size": 150,
        "patience": 600, "improvement_threshold": 0.01, "plateau_threshold": 0.005, "smoothing": 0.99,
        "escape_multiplier": 1.5, "explore_level": 0.5, "explore_noise": 0.2, "escape_steps": 150, "refractory": 150,
        "escape_on": "both", "divergence_threshold": 0.5, "escape_ceiling": "max_lr", "group_mode": "ratio",
        "bad_limit": 3, "seed": None,
    }  # fmt: skip


def test_null_parameters_are_derived_once_and_stay():
    bounds = {
        (): (None, None), (("base_lr", 0.5),): (0.5, 5.0), (("base_lr", 0.5), ("max_lr_factor", 3.0)): (0.5, 1.5),
        (("max_lr", 0.5),): (None, 0.5), (("compat", "seed"),): (1e-4, 1e-3),
        (("compat", "original"), ("base_lr", 5e-4)): (5e-4, 1e-3),
        (("compat", "original"), ("max_lr", 5e-4)): (1e-4, 5e-4),
    }  # fmt: skip
    for given, expected in bounds.items():
        config = CYCLE.config(**dict(given))
        assert (config.base_lr, config.max_lr) == expected
        assert CYCLE.config(**asdict(config)) == config
        assert config.compat == ("original" if "compat" in dict(given) else "default")
    small = CYCLE.config(window_size=20, refractory=0)
    assert (small.escape_steps, small.refractory) == (20, 0)
    assert CYCLE.config(window_size=20).refractory == 20
    assert run([], compat="original")[0].lr == (1e-4,)
    assert run([], base_lr=0.5)[0].lr == (0.5,)
    assert run([1.0] * 4, **SMALL, max_lr=64 * BASE)[-1].lr == (8 * BASE,)
    assert run([1.0] * 4, **SMALL | {"max_lr_factor": 4.0})[-1].lr == (2 * BASE,)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"base_lr": 1e-2, "max_lr": 1e-3}, r"base_lr: 0\.01 is above max_lr = 0\.001; give both"),
        ({"compat": "original", "base_lr": 1e-2}, r"base_lr: 0\.01 is above max_lr = 0\.001"),
        ({"plateau_threshold": 0.02}, r"plateau_threshold: 0\.02 is above improvement_threshold = 0\.01"),
        ({"base_lr": 0.0}, "base_lr: 0.0 .* greater than 0"),
        ({"base_lr": 1e101}, "base_lr: 1e.101 .* at most"),
        ({"max_lr": 0.0}, "max_lr: 0.0 .* greater than 0"),
        ({"max_lr": 1e101}, "max_lr: 1e.101 .* at most"),
        ({"max_lr_factor": 0.9}, "max_lr_factor: 0.9 .* at least 1"),
        ({"window_size": 3}, "window_size: 3 .* at least 4"),
        ({"window_size": 10_001}, "window_size: 10001 .* at most 10000"),
        ({"patience": 0}, "patience: 0 .* at least 1"),
        ({"improvement_threshold": -0.1}, "improvement_threshold: -0.1 .* at least 0"),
        ({"plateau_threshold": -0.1}, "plateau_threshold: -0.1 .* at least 0"),
        ({"smoothing": 1.0}, "smoothing: 1.0 .* less than 1"),
        ({"smoothing": -0.1}, "smoothing: -0.1 .* at least 0"),
        ({"escape_multiplier": 0.9}, "escape_multiplier: 0.9 .* at least 1"),
        ({"explore_level": 1.1}, "explore_level: 1.1 .* at most 1"),
        ({"explore_level": -0.1}, "explore_level: -0.1 .* at least 0"),
        ({"explore_noise": 1.1}, "explore_noise: 1.1 .* at most 1"),
        ({"explore_noise": -0.1}, "explore_noise: -0.1 .* at least 0"),
        ({"escape_steps": 0}, "escape_steps: 0 .* at least 1"),
        ({"refractory": -1}, "refractory: -1 .* at least 0"),
        ({"divergence_threshold": -0.1}, "divergence_threshold: -0.1 .* at least 0"),
        ({"bad_limit": 0}, "bad_limit: 0 .* at least 1"),
        ({"escape_on": "never"}, "escape_on: 'never'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_the_remedy(parameters, words):
    with pytest.raises(ValueError, match=words.replace("1e.101", r"1e\+101")):
        CYCLE.config(**parameters)


def test_equal_bounds_and_equal_thresholds_are_allowed():
    assert CYCLE.config(base_lr=1e-3, max_lr=1e-3, window_size=4).max_lr == 1e-3
    assert CYCLE.config(plateau_threshold=0.01, window_size=10_000, max_lr_factor=1.0).plateau_threshold == 0.01


def test_a_highest_lr_below_the_optimizer_s_is_refused_at_attach():
    with pytest.raises(ValueError, match=r"base_lr: 0\.0009765625 is above max_lr = 1e-05"):
        CYCLE.init(CYCLE.config(max_lr=1e-5), ONE_GROUP, 0)
