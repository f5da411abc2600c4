"""Goal: whatever a policy says, what leaves the guard is finite, not negative and inside the limits.

Method: property tests with any float as a decision, then each limit alone, driven by a decision of known factor; whole
states and settings, as literals, on both sides of every edge.
"""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball_server.core.errors import Invalid
from flyball_server.core.guard import (
    GroupLimits,
    GuardState,
    Limits,
    begin,
    held,
    is_free,
    is_quiet,
    settle,
    settle_free,
)
from flyball_server.core.types import Decision, Group, Settings
from flyball_server.guards import limits_of

GROUPS = (Group("a", 0.1, 0.9), Group("b", 0.01, None, (0.9, 0.999)), Group("frozen", 0.0))
REFERENCE = tuple(g.lr for g in GROUPS)

nasty = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1.0, 0.0, -0.0, 5e-324, 1e-300])
bound = st.none() | st.floats(0, 1e3)
ratio = st.none() | st.floats(1.001, 100)


def pair(draw):
    low, high = draw(bound), draw(bound)
    return (high, low) if None not in (low, high) and low > high else (low, high)


@st.composite
def limits(draw):
    min_lr, max_lr = pair(draw)
    min_factor, max_factor = pair(draw)
    own_min, own_max = pair(draw)
    own = GroupLimits(scale=draw(st.floats(1e-6, 1e6)), min_lr=own_min, max_lr=own_max)
    return Limits(
        min_lr=min_lr,
        max_lr=max_lr,
        min_factor=min_factor,
        max_factor=max_factor,
        max_change=draw(ratio),
        max_change_per_window=draw(ratio),
        window_steps=draw(st.integers(1, 9)),
        warmup_steps=draw(st.integers(0, 9)),
        cooldown_steps=draw(st.integers(0, 4)),
        keep_ratios=draw(st.booleans()),
        groups=draw(st.sampled_from([{}, {"b": own}])),
    )


def triples(values):
    return st.tuples(values, values, values)


bases = st.none() | triples(st.floats(0, 1e100))
decisions = st.builds(
    Decision,
    lr=triples(nasty),
    momentum=st.none() | triples(st.none() | nasty),
    noise_std=st.none() | triples(nasty),
    phase=st.just("p"),
    code=st.just("c"),
    fields=st.none(),
    asks=st.just(()),
)


def start(base=REFERENCE):
    return begin(GROUPS, on_base=base is not None)


def wanting(*factors):
    """A decision that wants the references times the factors."""
    factors = factors * 3 if len(factors) == 1 else factors
    return Decision(tuple(f * g for f, g in zip(factors, REFERENCE, strict=True)), None, None, "p", "c")


def driven(bounds, wanted, base=None, first=1.0):
    """The learning rates of the first group, and the guard's notes, while one decision after another comes in."""
    state, _ = settle(bounds, start(base), GROUPS, base, -1, wanting(first))
    lrs, notes = [], []
    for step, factor in enumerate(wanted):
        state, out = settle(bounds, state, GROUPS, base, step, wanting(factor))
        lrs.append(out.lr[0])
        notes.append(state.note)
    return lrs, notes


def range_of(bounds, group):
    """The upper bounds win where two limits contradict each other; a frozen group stays so, whatever they say."""
    if group.lr == 0:
        return 0.0, 0.0
    own = bounds.groups.get(group.name, GroupLimits())
    lows = [bounds.min_lr, own.min_lr] + [f * group.lr for f in [bounds.min_factor] if f is not None]
    highs = [bounds.max_lr, own.max_lr] + [f * group.lr for f in [bounds.max_factor] if f is not None]
    high = min((x for x in highs if x is not None), default=math.inf)
    return min(max((x for x in lows if x is not None), default=0.0), high), high


@settings(max_examples=400, deadline=None)
@given(bounds=limits(), wanted=st.lists(decisions, min_size=1, max_size=8), base=bases)
def test_every_setting_is_finite_not_negative_and_inside_the_limits(bounds, wanted, base):
    state = start(base)
    for step, decision in enumerate(wanted, -1):
        state, out = settle(bounds, state, GROUPS, base, step, decision)
        for lr, group in zip(out.lr, GROUPS, strict=True):
            low, high = range_of(bounds, group)
            assert math.isfinite(lr)
            assert low <= lr <= high or group.lr == lr == 0.0
        assert all(m is None or 0 <= m < 1 for m in out.momentum or ())
        assert all(math.isfinite(n) and n >= 0 for n in out.noise_std or ())
        for group, m in zip(GROUPS, out.momentum or (None,) * 3, strict=True):
            assert m is None or group.momentum is not None or group.betas is not None


@settings(max_examples=300, deadline=None)
@given(bounds=limits(), wanted=st.lists(decisions, min_size=1, max_size=8), base=bases)
def test_the_guards_memory_holds_finite_numbers_only(bounds, wanted, base):
    state = start(base)
    for step, decision in enumerate(wanted, -1):
        state, _ = settle(bounds, state, GROUPS, base, step, decision)
        json.dumps(state, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(bounds=limits(), decision=decisions, step=st.integers(-1, 20), gap=st.integers(1, 5))
def test_what_is_quiet_may_be_skipped(bounds, decision, step, gap):
    """The fold does not ask again where `is_quiet` says that nothing would come of it."""
    state, out = settle(bounds, start(None), GROUPS, None, step, decision)
    if is_quiet(bounds, step):
        again = settle(bounds, state, GROUPS, None, step + gap, decision)
        assert (again[0]._replace(note=""), again[1]) == (state._replace(note=""), out)


def test_after_an_unusable_decision_a_good_one_is_followed_again():
    for worst in (math.nan, math.inf, -1.0, 1e308):
        for base in (None, REFERENCE):
            bounds, state = Limits(max_lr=1.0, max_change=1e308), start(base)
            for step, decision in enumerate([wanting(2.0), wanting(2.0)._replace(lr=(worst,) * 3)], -1):
                state, out = settle(bounds, state, GROUPS, base, step, decision)
            assert out.lr[0] in (0.1, 0.2, 1.0)
            state, out = settle(bounds, state, GROUPS, base, 2, wanting(3.0))
            assert out.lr == pytest.approx((0.3, 0.03, 0.0))


def test_max_change_bounds_the_ratio_of_each_decision_and_the_rest_follows():
    lrs, notes = driven(Limits(max_change=2.0), [10.0] * 5)
    assert lrs == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])
    assert notes == ["guard_max_change"] * 3 + ["", ""]
    lrs, _ = driven(Limits(max_change=2.0), [0.1] * 5)
    assert lrs == pytest.approx([0.05, 0.025, 0.0125, 0.01, 0.01])


def test_a_change_is_counted_in_the_policys_factor_not_in_the_base_schedule():
    state = start()
    for step, b in enumerate((1.0, 0.01, 5.0)):
        base = tuple(b * lr for lr in REFERENCE)
        state, out = settle(Limits(max_change=1.5), state, GROUPS, base, step, wanting(1.0))
        assert out.lr == pytest.approx(base)
        assert state.note == ""


def test_per_window_the_whole_change_is_bounded_and_the_next_window_goes_on():
    lrs, _ = driven(Limits(max_change_per_window=2.0, window_steps=4), [10.0] * 12)
    # Step t is decided after step t - 1, so the second window begins with the decision after step 3.
    assert lrs == pytest.approx([0.2] * 3 + [0.4] * 4 + [0.8] * 4 + [1.0])


def test_the_first_decision_is_where_a_run_starts_not_a_change():
    lrs, _ = driven(Limits(max_change=1.1, max_change_per_window=1.2), [5.0] * 3, first=5.0)
    assert lrs == pytest.approx([0.5] * 3)


def test_in_a_cooldown_changes_wait_and_are_made_up_for_behind_it():
    lrs, notes = driven(Limits(cooldown_steps=3), [2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0])
    assert lrs == pytest.approx([0.2, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4])
    assert notes == ["", "guard_cooldown", "guard_cooldown", "", "guard_cooldown", "guard_cooldown", ""]


def test_warm_up_ramps_from_the_first_step_to_the_full_value():
    state, out = settle(Limits(warmup_steps=4), start(), GROUPS, REFERENCE, -1, wanting(1.0))
    seen = [out.lr[0]]
    for step in range(5):
        state, out = settle(Limits(warmup_steps=4), state, GROUPS, REFERENCE, step, wanting(1.0))
        seen.append(out.lr[0])
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@given(factor=st.floats(1e-3, 1e3), rate=st.floats(1.01, 3))
def test_the_ratio_between_groups_survives_everything_but_bounds(factor, rate):
    state, bounds = start(), Limits(max_change=rate, warmup_steps=2, cooldown_steps=1)
    for step in range(-1, 6):
        state, out = settle(bounds, state, GROUPS, REFERENCE, step, wanting(factor))
        assert out.lr[0] / out.lr[1] == pytest.approx(10.0)


def test_a_group_has_its_own_scale_and_bounds_on_top_of_the_runs():
    bounds = Limits(max_lr=0.3, groups={"b": GroupLimits(scale=0.1, max_lr=5e-3, min_lr=2e-3)})
    state, out = settle(bounds, start(), GROUPS, REFERENCE, -1, wanting(1.0))
    assert out.lr == pytest.approx((0.1, 2e-3, 0.0))
    state, out = settle(bounds, state, GROUPS, REFERENCE, 0, wanting(20.0))
    assert out.lr == pytest.approx((0.3, 5e-3, 0.0))
    assert state.note == "guard_max"


@pytest.mark.parametrize("bounds", [Limits(min_lr=1e-4), Limits(min_factor=0.1), Limits(groups={}), Limits()])
def test_a_frozen_group_stays_frozen(bounds):
    for step, factor in enumerate((1.0, 5.0, 0.0), -1):
        _, out = settle(bounds, start(), GROUPS, REFERENCE, step, wanting(factor))
        assert out.lr[2] == 0.0


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"max_lr": -1.0}, ["guard", "max_lr", "-1.0", "0 or more"]),
        ({"min_lr": math.nan}, ["min_lr", "nan", "finite"]),
        ({"max_lr": "0.1"}, ["guard.max_lr", "'0.1'"]),
        ({"max_lr": True}, ["guard.max_lr", "True"]),
        ({"min_lr": 2.0, "max_lr": 1.0}, ["min_lr", "2.0", "max_lr", "1.0", "swap"]),
        ({"max_change": 1.0}, ["max_change", "1.0", "greater than 1"]),
        ({"max_change_per_window": math.inf}, ["max_change_per_window", "inf", "ratio"]),
        ({"window_steps": 0}, ["window_steps", "0", "at least 1"]),
        ({"window_steps": 1.5}, ["guard.window_steps", "1.5"]),
        ({"warmup_steps": -1}, ["warmup_steps", "-1", "0 or more"]),
        ({"cooldown_steps": -3}, ["cooldown_steps", "-3", "0 or more"]),
        ({"maxlr": 1.0}, ["guard.maxlr", "no such limit", "max_lr"]),
        ({"keep_ratios": 1}, ["guard.keep_ratios", "1"]),
        ({"groups": {"b": {"scale": 0.0}}}, ["guard.groups.b", "scale", "0.0", "greater than 0"]),
        ({"groups": {"b": {"sclae": 1.0}}}, ["guard.groups.b.sclae", "no such limit", "scale"]),
        ({"groups": ["b"]}, ["guard.groups"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_limit_is_refused_with_field_value_and_remedy(guard, words):
    with pytest.raises(Invalid) as caught:
        limits_of(guard)
    for word in words:
        assert word in str(caught.value)
    assert "__" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    decided=st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=6),
    momenta=st.lists(st.none() | st.floats(), min_size=6, max_size=6),
    lrs=st.tuples(st.sampled_from([0.0, 0.1]), st.floats(1e-6, 10)),
)
def test_the_short_way_through_a_free_guard_is_the_long_one_to_the_bit(decided, momenta, lrs):
    groups = (Group("a", lrs[0], 0.9), Group("b", lrs[1]))
    free = long = begin(groups, on_base=False)
    for step, lr in enumerate(decided, -1):
        momentum = None if momenta[step] is None else (momenta[step], None)
        noise = (0.5, 0.5) if step % 3 == 2 else None
        decision = Decision(lr, momentum, noise, "p", "c")
        free, one = settle_free(free, groups, step, decision)
        long, other = settle(Limits(), long, groups, None, step, decision)
        assert repr((free, one)) == repr((long, other))


PAIR = (Group("a", 1.0, 0.9), Group("b", 0.25, None, (0.8, 0.99)), Group("frozen", 0.0))
ATTACHED = (1.0, 0.25, 0.0)
DOUBLE, SAME = (2.0, 0.5, 0.0), (1.0, 0.25, 0.0)


def wants(*lr, momentum=None, noise=None):
    return Decision(lr, momentum, noise, "p", "c")


def state_of(factors=ATTACHED, changed=None, window=0, window_factors=ATTACHED):
    return GuardState(factors, changed, window, window_factors, "before")


def test_the_guard_begins_at_the_references():
    assert begin(PAIR, on_base=True) == GuardState((1.0, 1.0, 1.0), None, 0, (1.0, 1.0, 1.0), "")
    assert begin(PAIR, on_base=False) == GuardState(ATTACHED, None, 0, ATTACHED, "")


def relative(lrs):
    """As factors on the references, which of a frozen group is 1."""
    return tuple(lr / group.lr if group.lr else 1.0 for lr, group in zip(lrs, PAIR, strict=True))


@pytest.mark.parametrize(
    ("limits", "settled", "expected"),
    [
        (Limits(), -1, True),
        (Limits(warmup_steps=4), 2, True),
        (Limits(warmup_steps=4), 1, False),
        (Limits(cooldown_steps=1), 9, False),
        (Limits(max_change=2.0), 9, False),
        (Limits(max_change_per_window=2.0), 9, False),
        (Limits(max_lr=1.0, min_factor=0.5), 9, True),
    ],
)
def test_it_is_quiet_where_nothing_depends_on_the_step(limits, settled, expected):
    assert is_quiet(limits, settled) is expected


def test_it_is_free_only_without_any_limit():
    assert is_free(Limits()) is True
    assert is_free(Limits(max_lr=1.0)) is is_free(Limits(warmup_steps=1)) is False


WINDOW = Limits(max_change_per_window=2.0, window_steps=4)
WAITS = Limits(cooldown_steps=3)


@pytest.mark.parametrize(
    ("limits", "state", "step", "lr", "factors", "changed", "window", "window_factors", "note"),
    [
        (Limits(), state_of(), -1, DOUBLE, DOUBLE, None, 0, DOUBLE, ""),
        (Limits(), state_of(), 0, DOUBLE, DOUBLE, 0, 0, ATTACHED, ""),
        (Limits(), state_of(), 9, SAME, SAME, None, 0, ATTACHED, ""),
        (Limits(), state_of(changed=2), 9, SAME, SAME, 2, 0, ATTACHED, ""),
        (Limits(window_steps=4), state_of(), 9, DOUBLE, DOUBLE, 9, 0, ATTACHED, ""),
        # a window begins with the decision of its first step, at the factors in force
        (WINDOW, state_of(DOUBLE, 1), 2, (8.0, 2.0, 0.0), DOUBLE, 1, 0, ATTACHED, "guard_max_change"),
        (WINDOW, state_of(DOUBLE, 1), 3, (8.0, 2.0, 0.0), (4.0, 1.0, 0.0), 3, 4, DOUBLE, "guard_max_change"),
        (WINDOW, state_of(DOUBLE, 1, 2, SAME), 4, DOUBLE, DOUBLE, 1, 2, SAME, ""),
        (WINDOW, state_of(DOUBLE, 1, 2, SAME), 5, DOUBLE, DOUBLE, 1, 6, DOUBLE, ""),
        (WINDOW, state_of(), 1, (0.25, 0.125, 0.0), (0.5, 0.125, 0.0), 1, 0, ATTACHED, "guard_max_change"),
        (WINDOW, state_of(), 1, (0.5, 0.5, 0.0), (0.5, 0.5, 0.0), 1, 0, ATTACHED, ""),
        # in a cooldown
        (WAITS, state_of(changed=2), 4, DOUBLE, SAME, 2, 0, ATTACHED, "guard_cooldown"),
        (WAITS, state_of(changed=2), 5, DOUBLE, DOUBLE, 5, 0, ATTACHED, ""),
        (WAITS, state_of(changed=0), 2, DOUBLE, SAME, 0, 0, ATTACHED, "guard_cooldown"),
        (WAITS, state_of(), 0, DOUBLE, DOUBLE, 0, 0, ATTACHED, ""),
        # one decision
        (Limits(max_change=4.0), state_of(), 0, (8.0, 2.0, 0.0), (4.0, 1.0, 0.0), 0, 0, ATTACHED, "guard_max_change"),
        (Limits(max_change=4.0), state_of(), 0, (0.1, 1.0, 0.0), (0.25, 1.0, 0.0), 0, 0, ATTACHED, "guard_max_change"),
        (Limits(max_change=4.0), state_of(), 0, (4.0, 0.0625, 0.0), (4.0, 0.0625, 0.0), 0, 0, ATTACHED, ""),
        (Limits(max_change=4.0), state_of(), -1, (8.0, 2.0, 0.0), (8.0, 2.0, 0.0), None, 0, (8.0, 2.0, 0.0), ""),
        # unusable numbers
        (Limits(), state_of(), 0, (0.0, 0.25, 0.0), (0.0, 0.25, 0.0), 0, 0, ATTACHED, ""),
        (Limits(), state_of(DOUBLE, 1), 4, (math.inf, 0.25, 0.0), DOUBLE, 1, 0, ATTACHED, "guard_nonfinite"),
        (Limits(), state_of(DOUBLE, 1), 4, (1.0, -1e-9, 0.0), DOUBLE, 1, 0, ATTACHED, "guard_nonfinite"),
        (Limits(), state_of(DOUBLE, 1), 4, (1.0, 0.25, math.nan), DOUBLE, 1, 0, ATTACHED, "guard_nonfinite"),
        (Limits(), state_of(), 0, (2.0, 0.5, 7.0), DOUBLE, 0, 0, ATTACHED, ""),
    ],
)  # fmt: skip
def test_the_factors_and_what_is_remembered_of_them(
    limits, state, step, lr, factors, changed, window, window_factors, note
):
    settled = settle(limits, state, PAIR, None, step, wants(*lr))
    assert settled == (GuardState(factors, changed, window, window_factors, note), Settings(factors))
    if is_free(limits):
        assert settle_free(state, PAIR, step, wants(*lr)) == settled
    if note != "guard_nonfinite":  # the same in factors, under a base schedule of three times the references
        before = GuardState(relative(state.factors), state.changed, state.window, relative(state.window_factors), "")
        after, out = settle(limits, before, PAIR, (3.0, 0.75, 0.0), step, wants(*lr))
        assert after == GuardState(relative(factors), changed, window, relative(window_factors), note)
        assert out == Settings(tuple(3 * f for f in factors))


def test_a_quotient_too_large_for_a_number_is_unusable_under_a_base_schedule():
    groups = (Group("tiny", 1e-300), Group("b", 1.0))
    state, out = settle(Limits(), state_of((1.0, 1.0)), groups, (0.5, 0.5), 3, wants(1e100, 2.0))
    assert state == GuardState((1.0, 1.0), None, 0, ATTACHED, "guard_nonfinite")
    assert out.lr == (0.5, 0.5)


@pytest.mark.parametrize(
    ("limits", "step", "lr", "expected", "note"),
    [
        (Limits(warmup_steps=4), -1, DOUBLE, (0.5, 0.125, 0.0), ""),
        (Limits(warmup_steps=4), 1, DOUBLE, (1.5, 0.375, 0.0), ""),
        (Limits(warmup_steps=4), 2, DOUBLE, DOUBLE, ""),
        (Limits(warmup_steps=4), 3, DOUBLE, DOUBLE, ""),
        (Limits(max_lr=2.0, min_lr=0.5), 9, DOUBLE, DOUBLE, ""),
        (Limits(max_lr=1.5), 9, DOUBLE, (1.5, 0.5, 0.0), "guard_max"),
        (Limits(min_lr=0.75), 9, DOUBLE, (2.0, 0.75, 0.0), "guard_min"),
        (Limits(max_lr=1.5, min_lr=0.75), 9, DOUBLE, (1.5, 0.75, 0.0), "guard_max"),
        (Limits(max_lr=1.5, min_lr=0.75), 9, (0.5, 2.0, 0.0), (0.75, 1.5, 0.0), "guard_min"),
        (Limits(max_factor=1.5), 9, DOUBLE, (1.5, 0.375, 0.0), "guard_max"),
        (Limits(min_factor=3.0), 9, DOUBLE, (3.0, 0.75, 0.0), "guard_min"),
        (Limits(max_factor=1.5, max_lr=1.0), 9, DOUBLE, (1.0, 0.375, 0.0), "guard_max"),
        (Limits(min_factor=3.0, min_lr=1.0), 9, DOUBLE, (3.0, 1.0, 0.0), "guard_min"),
        (Limits(min_factor=3.0, max_lr=1.0), 9, DOUBLE, (1.0, 0.75, 0.0), "guard_min"),  # upper bounds win
        (Limits(max_factor=1.5, min_lr=0.4375), 9, DOUBLE, (1.5, 0.375, 0.0), "guard_max"),
        (Limits(groups={"b": GroupLimits(scale=0.5)}), 9, DOUBLE, (2.0, 0.25, 0.0), ""),
        (Limits(groups={"b": GroupLimits(scale=0.5)}, warmup_steps=4), 0, DOUBLE, (1.0, 0.125, 0.0), ""),
        (Limits(groups={"b": GroupLimits(min_lr=0.75)}), 9, DOUBLE, (2.0, 0.75, 0.0), "guard_min"),
        (Limits(groups={"b": GroupLimits(max_lr=0.375)}), 9, DOUBLE, (2.0, 0.375, 0.0), "guard_max"),
        (Limits(groups={"b": GroupLimits(min_lr=0.75)}, min_lr=1.0), 9, DOUBLE, (2.0, 1.0, 0.0), "guard_min"),
        (Limits(groups={"b": GroupLimits(max_lr=0.375)}, max_lr=0.25), 9, DOUBLE, (0.25, 0.25, 0.0), "guard_max"),
        (Limits(groups={"b": GroupLimits(), "frozen": GroupLimits(min_lr=1.0)}), 9, DOUBLE, DOUBLE, ""),
        (Limits(groups={"a": GroupLimits(scale=1e300)}), 9, (1e100, 0.5, 0.0), (1.0, 0.5, 0.0), "guard_nonfinite"),
        (
            Limits(groups={"a": GroupLimits(scale=1e300)}, max_lr=0.75),
            9,
            (1e100, 2.0, 0.0),
            (0.75, 0.75, 0.0),
            "guard_nonfinite",
        ),
        (
            Limits(groups={"a": GroupLimits(scale=1e300)}, min_lr=1.5),
            9,
            (1e100, 1.0, 0.0),
            (1.5, 1.5, 0.0),
            "guard_nonfinite",
        ),
    ],
)
def test_every_bound_holds_at_its_edge_and_what_it_did_is_noted(limits, step, lr, expected, note):
    state, out = settle(limits, state_of(), PAIR, None, step, wants(*lr))
    assert (out, state.note) == (Settings(expected), note)
    assert held(limits, state, PAIR, None, step) == expected
    assert held(limits, state_of(relative(lr)), PAIR, ATTACHED, step) == expected


KEEP = {"keep_ratios": True}


@pytest.mark.parametrize(
    ("limits", "lr", "expected", "note"),
    [
        (Limits(max_lr=1.5, **KEEP), (3.0, 0.75, 0.0), (1.5, 0.375, 0.0), "guard_max"),
        (Limits(min_lr=0.5, **KEEP), (1.0, 0.25, 0.0), (2.0, 0.5, 0.0), "guard_min"),
        (Limits(max_lr=1.5, min_lr=0.25, **KEEP), (3.0, 0.75, 0.0), (1.5, 0.375, 0.0), "guard_max"),
        (Limits(groups={"b": GroupLimits(max_lr=0.25)}, **KEEP), DOUBLE, (1.0, 0.25, 0.0), "guard_max"),
        (Limits(groups={"b": GroupLimits(scale=0.5)}, max_lr=1.0, **KEEP), DOUBLE, (1.0, 0.125, 0.0), "guard_max"),
        (Limits(max_factor=1.5, **KEEP), DOUBLE, (1.5, 0.375, 0.0), "guard_max"),
        (Limits(max_factor=4.0, **KEEP), DOUBLE, DOUBLE, ""),
        (Limits(min_lr=0.0, **KEEP), (2.0, 0.0, 0.0), (2.0, 0.0, 0.0), ""),
        # There is no common scale: the limits win, and where they contradict each other the upper ones.
        (Limits(max_lr=1.5, min_lr=0.75, **KEEP), DOUBLE, (1.5, 0.75, 0.0), "guard_max"),
        (Limits(max_lr=0.5, min_factor=1.0, **KEEP), DOUBLE, (0.5, 0.5, 0.0), "guard_max"),
        # 0 has no ratio to anything, but a bound is a bound.
        (Limits(min_lr=0.5, max_lr=1.0, **KEEP), (2.0, 0.0, 0.0), (1.0, 0.5, 0.0), "guard_max"),
    ],
)
def test_with_ratios_kept_a_bound_scales_all_groups_alike(limits, lr, expected, note):
    for base, wanted in ((None, lr), (ATTACHED, lr)):
        start = state_of(wanted if base is None else relative(wanted))
        state, out = settle(limits, start, PAIR, base, 9, wants(*wanted))
        assert out.lr == pytest.approx(expected, rel=1e-15)
        assert state.note == note


@pytest.mark.parametrize(
    ("limits", "lr", "expected"),
    [
        (Limits(max_change=2.0, **KEEP), (8.0, 2.0, 0.0), (2.0, 0.5, 0.0)),
        (Limits(max_change=2.0, **KEEP), (0.1, 0.025, 0.0), (0.5, 0.125, 0.0)),
        (Limits(max_change=2.0, **KEEP), (3.0, 0.25, 0.0), (2.0, 0.25 * 2 / 3, 0.0)),
        (Limits(max_change_per_window=3.0, max_change=9.0, **KEEP), (6.0, 0.5, 0.0), (3.0, 0.25, 0.0)),
        (Limits(max_change=2.0, **KEEP), (1.0, 0.25, 0.0), SAME),
        # Groups drift apart faster than one decision may: each goes as far as it can.
        (Limits(max_change=2.0, **KEEP), (10.0, 0.25, 0.0), (2.0, 0.25, 0.0)),
    ],
)
def test_with_ratios_kept_a_rate_limit_slows_all_groups_alike(limits, lr, expected):
    state, out = settle(limits, state_of(), PAIR, None, 3, wants(*lr))
    assert out.lr == pytest.approx(expected, rel=1e-15)
    assert state.note == ("" if expected is SAME else "guard_max_change")
    on_base = GuardState((1.0, 1.0, 1.0), None, 0, (1.0, 1.0, 1.0), "")
    state, out = settle(limits, on_base, PAIR, ATTACHED, 3, wants(*lr))
    assert out.lr == pytest.approx(expected, rel=1e-15)
    assert state.factors[2] == 1.0


@settings(max_examples=300, deadline=None)
@given(
    top=st.floats(1e-3, 1e3),
    own=st.none() | st.floats(1e-3, 1e3),
    rate=st.none() | st.floats(1.01, 10),
    wanted=st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=6),
)
def test_ratios_once_kept_survive_every_upper_limit(top, own, rate, wanted):
    limits = Limits(max_lr=top, max_change=rate, groups={"b": GroupLimits(max_lr=own)}, keep_ratios=True)
    state = begin(PAIR, on_base=False)
    for step, factor in enumerate(wanted, -1):
        state, out = settle(limits, state, PAIR, None, step, wants(factor, 0.25 * factor, 0.0))
        assert out.lr[1] / out.lr[0] == pytest.approx(0.25, rel=1e-12)
        assert out.lr[0] <= top
        assert own is None or out.lr[1] <= own


def test_frozen_groups_may_stand_anywhere_and_all_may_be_frozen():
    state, out = settle(Limits(max_lr=1.5), begin(PAIR[::-1], on_base=False), PAIR[::-1], None, 3, wants(7.0, 0.5, 2.0))
    assert (out.lr, state.factors, state.note) == ((0.0, 0.5, 1.5), (0.0, 0.5, 2.0), "guard_max")
    frozen = PAIR[2:]
    state, out = settle_free(begin(frozen, on_base=False), frozen, 3, wants(7.0))
    assert (out.lr, state.factors) == ((0.0,), (0.0,))


@pytest.mark.parametrize("lr", [(1.0,), (1.0, 0.25, 1.0)])
def test_a_decision_for_another_number_of_groups_is_an_error_of_the_policy(lr):
    groups, state = PAIR[:2], begin(PAIR[:2], on_base=False)
    for base in (None, (1.0, 1.0)):
        with pytest.raises(ValueError, match="zip"):
            settle(Limits(), state, groups, base, 3, wants(*lr))
    with pytest.raises(ValueError, match="zip"):
        settle_free(state, groups, 3, wants(*lr))
    with pytest.raises(ValueError, match="zip"):
        settle(Limits(), state, groups, None, 3, wants(1.0, 0.25, momentum=(0.5,) * len(lr)))


@pytest.mark.parametrize(
    ("momentum", "noise", "limits", "expected", "note"),
    [
        (None, None, Limits(), (None, None), ""),
        ((0.5, 0.0, None), (0.0, 0.5, 0.25), Limits(), ((0.5, 0.0, None), (0.0, 0.5, 0.25)), ""),
        ((1.0, 0.5, None), None, Limits(), ((0.9, None, None), None), "guard_nonfinite"),
        ((0.5, -1e-9, None), None, Limits(), ((0.9, None, None), None), "guard_nonfinite"),
        ((math.nan, 0.5, None), None, Limits(), ((0.9, None, None), None), "guard_nonfinite"),
        ((0.5, 0.5, 0.5), None, Limits(), ((0.9, None, None), None), "guard_no_momentum"),
        ((0.5, 0.5, 2.0), None, Limits(), ((0.9, None, None), None), "guard_nonfinite"),
        (None, (0.1, -1e-9, 0.0), Limits(), (None, None), "guard_nonfinite"),
        (None, (0.1, math.inf, 0.0), Limits(), (None, None), "guard_nonfinite"),
        # the first of factors, noise, bounds and momentum that has something to say is noted
        ((0.5, 0.5, 0.5), (0.0, 0.0, -1.0), Limits(), ((0.9, None, None), None), "guard_nonfinite"),
        ((0.5, 0.5, 0.5), None, Limits(max_lr=1.5), ((0.9, None, None), None), "guard_max"),
        (None, (0.0, 0.0, math.nan), Limits(max_lr=1.5), (None, None), "guard_nonfinite"),
        ((0.5, 0.5, 0.5), None, Limits(max_lr=1.25, max_change=1.5), ((0.9, None, None), None), "guard_max_change"),
    ],
)
def test_momentum_and_noise_are_usable_or_left_alone(momentum, noise, limits, expected, note):
    state, out = settle(limits, state_of(), PAIR, None, 3, wants(*DOUBLE, momentum=momentum, noise=noise))
    assert ((out.momentum, out.noise_std), state.note) == (expected, note)
    if is_free(limits):
        assert settle_free(state_of(), PAIR, 3, wants(*DOUBLE, momentum=momentum, noise=noise)) == (state, out)
        free = settle_free(state_of(), PAIR[:2], 3, wants(*DOUBLE[:2], momentum=momentum and momentum[:2]))
        assert free == settle(
            limits, state_of(), PAIR[:2], None, 3, wants(*DOUBLE[:2], momentum=momentum and momentum[:2])
        )


@pytest.mark.parametrize(
    ("kind", "parameters", "words"),
    [
        (Limits, {"min_lr": -1.0}, "min_lr is -1.0: give a finite number, 0 or more"),
        (Limits, {"max_lr": math.inf}, "max_lr is inf: give a finite number, 0 or more"),
        (Limits, {"min_factor": -0.5}, "min_factor is -0.5: give a finite number, 0 or more"),
        (Limits, {"max_factor": math.nan}, "max_factor is nan: give a finite number, 0 or more"),
        (Limits, {"min_lr": 2.0, "max_lr": 1.0}, "min_lr is 2.0, greater than max_lr = 1.0: swap or correct them"),
        (
            Limits,
            {"min_factor": 2.0, "max_factor": 1.0},
            "min_factor is 2.0, greater than max_factor = 1.0: swap or correct them",
        ),
        (Limits, {"max_change": 1.0}, "max_change is 1.0: give a ratio greater than 1, or leave it out"),
        (Limits, {"max_change": math.nan}, "max_change is nan: give a ratio greater than 1, or leave it out"),
        (
            Limits,
            {"max_change_per_window": math.inf},
            "max_change_per_window is inf: give a ratio greater than 1, or leave it out",
        ),
        (Limits, {"window_steps": 0}, "window_steps is 0: give at least 1"),
        (Limits, {"warmup_steps": -1}, "warmup_steps is -1: give 0 or more"),
        (Limits, {"cooldown_steps": -1}, "cooldown_steps is -1: give 0 or more"),
        (GroupLimits, {"scale": 0.0}, "scale is 0.0: give a finite number greater than 0"),
        (GroupLimits, {"scale": math.inf}, "scale is inf: give a finite number greater than 0"),
        (GroupLimits, {"min_lr": -1.0}, "min_lr is -1.0: give a finite number, 0 or more"),
        (GroupLimits, {"max_lr": math.nan}, "max_lr is nan: give a finite number, 0 or more"),
        (GroupLimits, {"min_lr": 2.0, "max_lr": 1.0}, "min_lr is 2.0, greater than max_lr = 1.0: swap or correct them"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_in_these_words(kind, parameters, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        kind(**parameters)


def test_limits_may_stand_at_their_edge():
    assert Limits(min_lr=0.0, max_lr=0.0, min_factor=1.0, max_factor=1.0, max_change=1.001, window_steps=1)
    assert Limits(max_change_per_window=1.001, warmup_steps=0, cooldown_steps=0)
    assert GroupLimits(min_lr=0.5, max_lr=0.5, scale=1e-300)
