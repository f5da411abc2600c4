"""Goal: what DESIGN promises of every policy holds for every policy in the table, without naming any.

Method: one suite over `ALL`: hostile and ordinary losses, a JSON round trip at any step, bounded state, an explanation
for every code, and a cost measured against a floor in the same process.
"""

import json
import math
import random
import time
from dataclasses import fields
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Decision, Group, Observation

GROUPS = (Group("body", 1e-3, 0.9), Group("head", 1e-2), Group("frozen", 0.0, None, (0.9, 0.999)))
#: A policy's LR must stay within this factor of where it started, or be explained by its bounds.
LARGEST_GROWTH = 1e4
every_policy = pytest.mark.parametrize("policy", ALL.values(), ids=lambda policy: policy.tag)


def losses(kind, n):
    chance = random.Random(kind)
    wild = [math.nan, math.inf, -math.inf, 1e300, -1e300, 1e100, 0.0, -1.0, 1e-300, None, 2.0]
    for i in range(n):
        yield {
            "falling": lambda i=i: 3.0 * math.exp(-i / 300) + 0.01 * chance.random(),
            "noisy": lambda: 2.0 + chance.gauss(0, 1),
            "rising": lambda i=i: 1.0 + i / 100,
            "constant": lambda: 0.7,
            "zero": lambda: 0.0,
            "negative": lambda i=i: -1.0 - i / 50,
            "nan": lambda: math.nan,
            "infinite": lambda i=i: math.inf if i % 2 else -math.inf,
            "huge": lambda: 1e300,
            "large": lambda i=i: 1e99 if i % 2 else -1e99,
            "missing": lambda: None,
            "wild": lambda: chance.choice(wild),
        }[kind]()


KINDS = ["falling", "noisy", "rising", "constant", "zero", "negative"]
HOSTILE = ["nan", "infinite", "huge", "large", "missing", "wild"]


def observations(kind, n):
    """The losses as observations, with every other signal present, absent or unusable in turn."""
    for step, loss in enumerate(losses(kind, n)):
        other = [None, 0.5, math.nan, math.inf][step % 4] if kind in HOSTILE else 0.5 + step % 7 / 10
        yield Observation(step, loss, other, other, other, other)


def begin(policy, seed=0):
    return policy.init(policy.config(), GROUPS, seed)


def check(decision, groups=GROUPS):
    assert isinstance(decision, Decision)
    for lr, group in zip(decision.lr, groups, strict=True):
        assert math.isfinite(lr)
        assert 0 < lr <= LARGEST_GROWTH * group.lr if group.lr else lr == 0
    for i, value in enumerate(decision.momentum or ()):
        assert value is None if groups[i].momentum is None else 0 <= value < 1
    assert all(math.isfinite(std) and std >= 0 for std in decision.noise_std or ())
    json.dumps(dict(decision.fields or {}), allow_nan=False)


def is_plain(value):
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str) or math.isfinite(value)


def same(one, other):
    """Equal down to the type and the last bit of every number."""
    return repr(dump_state(one)) == repr(dump_state(other))


@every_policy
@pytest.mark.parametrize("kind", KINDS + HOSTILE)
def test_no_losses_give_a_setting_that_is_not_finite_or_unbounded(policy, kind):
    config = policy.config()
    state, decision = begin(policy)
    check(decision)
    for seen in observations(kind, 1500):
        state, decision = policy.step(config, state, seen)
        check(decision)
        assert is_plain(state)


@every_policy
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.none() | st.floats(), max_size=120), lr=st.floats(1e-12, 1e3))
def test_no_sequence_of_floats_breaks_a_policy(policy, values, lr):
    config = policy.config()
    groups = (Group("all", lr),)
    state, decision = policy.init(config, groups, 0)
    for step, value in enumerate(values):
        state, decision = policy.step(config, state, Observation(step, value, value, value, value, value))
        check(decision, groups)


@every_policy
@pytest.mark.parametrize("kind", ["falling", "noisy", "wild"])
def test_a_state_saved_as_json_at_any_step_continues_bit_for_bit(policy, kind):
    config, trace = policy.config(), list(observations(kind, 400))
    state, _ = begin(policy)
    carried = state
    for seen in trace:  # one fold never leaves memory, the other goes through text at every step
        text = json.dumps(dump_state(carried), allow_nan=False)
        data = json.loads(text)
        carried, other = policy.step(config, load_state(policy, data), seen)
        assert json.dumps(data) == text
        state, decision = policy.step(config, state, seen)
        assert repr(decision) == repr(other)
        assert same(state, carried)


@every_policy
def test_a_step_alters_neither_its_state_nor_its_observation_and_repeats_exactly(policy):
    config = policy.config()
    state, _ = begin(policy)
    for seen in observations("wild", 300):
        before = json.dumps(dump_state(state))
        first, second = policy.step(config, state, seen), policy.step(config, state, seen)
        assert json.dumps(dump_state(state)) == before
        assert repr(first) == repr(second)
        state = first[0]


@every_policy
def test_the_lr_tuple_is_the_same_object_while_nothing_moves(policy):
    config = policy.config()
    state, decision = begin(policy)
    for seen in observations("noisy", 600):
        before = decision.lr
        state, decision = policy.step(config, state, seen)
        assert decision.lr is before or decision.lr != before


@every_policy
@pytest.mark.parametrize("kind", ["noisy", "wild", "constant"])
def test_the_state_stays_small_after_ten_thousand_steps(policy, kind):
    config = policy.config()
    state, _ = begin(policy)
    for seen in observations(kind, 10_000):
        state, _ = policy.step(config, state, seen)
    assert len(json.dumps(dump_state(state))) < 8192


@every_policy
def test_every_code_has_a_sentence(policy):
    config, sentences = policy.config(), {}
    for kind in KINDS + HOSTILE:
        state, decision = begin(policy)
        sentences[decision.code] = policy.explain(config, decision)
        for seen in observations(kind, 3000):
            state, decision = policy.step(config, state, seen)
            if decision.code not in sentences:
                sentences[decision.code] = policy.explain(config, decision)
    for code, sentence in sentences.items():
        assert sentence.endswith("."), code
        assert len(sentence) > 10, code
        assert "{" not in sentence, code


@every_policy
def test_the_defaults_are_valid_and_every_parameter_is_described(policy):
    assert policy.config() == policy.config()
    assert policy.config.__doc__
    for entry in fields(policy.config):
        assert entry.metadata["description"], entry.name
    assert policy.config.__pydantic_config__["extra"] == "forbid"


@every_policy
def test_a_state_of_another_shape_is_refused(policy):
    state, _ = begin(policy)
    with pytest.raises(ValueError, match=policy.tag):
        load_state(policy, [*dump_state(state), 1])


def test_the_table_by_name_holds_the_newest_versions():
    assert all(tag == policy.tag for tag, policy in ALL.items())
    for name, policy in POLICIES.items():
        assert policy.version == max(one.version for one in ALL.values() if one.name == name)


def floor(n):
    """Seconds a step for the least a fold can do: build one state and one decision."""
    state, lr = (1.0, 2, 3, 4, 5), (1e-3,)
    begun = time.perf_counter()
    for _ in range(n):
        state = (*state[:4], 5)
        Decision(lr, None, None, "phase", "code", {"a": 1.0, "b": 2.0})
    return (time.perf_counter() - begun) / n


@every_policy
def test_a_step_costs_no_more_than_a_few_floors(policy):
    config, trace, ratios = policy.config(), list(observations("noisy", 2000)), []
    for _ in range(7):  # the floor is measured beside every round, so that a busy machine slows both
        state, _ = begin(policy)
        begun = time.perf_counter()
        for seen in trace:
            state, _ = policy.step(config, state, seen)
        ratios.append((time.perf_counter() - begun) / len(trace) / floor(2000))
    assert median(ratios) < 12
