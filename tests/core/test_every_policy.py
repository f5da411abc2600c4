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
from tests.core.specs import SPECS

from flyball_server.core import run as fold
from flyball_server.core.events import Attached, Observed, Spec
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Decision, Group, Observation
from flyball_server.policy_files import resolve
from flyball_server.rules import rules_of

GROUPS = (Group("body", 1e-3, 0.9), Group("head", 1e-2), Group("frozen", 0.0, None, (0.9, 0.999)))
#: A policy's LR must stay within this factor of where it started, or be explained by its bounds.
LARGEST_GROWTH = 1e4
#: Published classes have absolute bounds of their own; no policy goes higher from a small LR.
LARGEST_DEFAULT = 1e-2
CASES = [pytest.param(*resolve(spec)[:2], id=name) for name, spec in SPECS.items()]
every_policy = pytest.mark.parametrize(("policy", "config"), CASES)
every_tag = pytest.mark.parametrize("policy", ALL.values(), ids=lambda policy: policy.tag)


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


def begin(policy, config, seed=0):
    return policy.init(config, GROUPS, seed)


def check(decision, groups=GROUPS):
    assert isinstance(decision, Decision)
    for lr, group in zip(decision.lr, groups, strict=True):
        assert math.isfinite(lr)
        assert 0 < lr <= LARGEST_GROWTH * max(group.lr, LARGEST_DEFAULT) if group.lr else lr == 0
    for i, value in enumerate(decision.momentum or ()):
        without = groups[i].momentum is None and groups[i].betas is None
        assert value is None if without else 0 <= value < 1
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
def test_no_losses_give_a_setting_that_is_not_finite_or_unbounded(policy, config, kind):
    state, decision = begin(policy, config)
    check(decision)
    for seen in observations(kind, 1500):
        state, decision = policy.step(config, state, seen)
        check(decision)
        assert is_plain(state)


@every_policy
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.none() | st.floats(), max_size=120), lr=st.floats(1e-12, 1e3))
def test_no_sequence_of_floats_breaks_a_policy(policy, config, values, lr):
    groups = tuple(group._replace(lr=group.lr * lr) for group in GROUPS)
    try:
        state, decision = policy.init(config, groups, 0)
    except ValueError:  # absolute bounds that leave nothing between them and these LRs
        return
    for step, value in enumerate(values):
        state, decision = policy.step(config, state, Observation(step, value, value, value, value, value))
        check(decision, groups)


@every_policy
@pytest.mark.parametrize("kind", ["falling", "noisy", "wild"])
def test_a_state_saved_as_json_at_any_step_continues_bit_for_bit(policy, config, kind):
    trace = list(observations(kind, 400))
    state, _ = begin(policy, config)
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
def test_a_step_alters_neither_its_state_nor_its_observation_and_repeats_exactly(policy, config):
    state, _ = begin(policy, config)
    for seen in observations("wild", 300):
        before = json.dumps(dump_state(state))
        first, second = policy.step(config, state, seen), policy.step(config, state, seen)
        assert json.dumps(dump_state(state)) == before
        assert repr(first) == repr(second)
        state = first[0]


@every_policy
def test_the_lr_tuple_is_the_same_object_while_nothing_moves(policy, config):
    state, decision = begin(policy, config)
    for seen in observations("noisy", 600):
        before = decision.lr
        state, decision = policy.step(config, state, seen)
        # Where another policy takes over, its own objects take over as well.
        assert decision.lr is before or decision.lr != before or decision.code == "handover"


@every_policy
@pytest.mark.parametrize("kind", ["noisy", "wild", "constant"])
def test_the_state_stays_small_after_ten_thousand_steps(policy, config, kind):
    state, _ = begin(policy, config)
    for seen in observations(kind, 10_000):
        state, _ = policy.step(config, state, seen)
    assert len(json.dumps(dump_state(state))) < 16384


@every_policy
def test_every_code_has_a_sentence(policy, config):
    sentences = {}
    for kind in KINDS + HOSTILE:
        state, decision = begin(policy, config)
        sentences[decision.code] = policy.explain(config, decision)
        for seen in observations(kind, 3000):
            state, decision = policy.step(config, state, seen)
            if decision.code not in sentences:
                sentences[decision.code] = policy.explain(config, decision)
    for code, sentence in sentences.items():
        assert sentence.endswith("."), code
        assert len(sentence) > 10, code
        assert "{" not in sentence, code


@every_tag
def test_every_parameter_is_described(policy):
    assert policy.config.__doc__
    for entry in fields(policy.config):
        assert entry.metadata["description"], entry.name
    assert policy.config.__pydantic_config__["extra"] == "forbid"


@every_policy
def test_a_state_of_another_shape_is_refused(policy, config):
    state, _ = begin(policy, config)
    with pytest.raises(ValueError, match=policy.tag):
        load_state(policy, [*dump_state(state), 1])


def test_the_table_by_name_holds_the_newest_versions():
    assert all(tag == policy.tag for tag, policy in ALL.items())
    for name, policy in POLICIES.items():
        assert policy.version == max(one.version for one in ALL.values() if one.name == name)


@every_policy
@pytest.mark.parametrize("kind", ["falling", "wild"])
def test_any_batching_gives_the_decisions_of_one_by_one(policy, config, kind):
    """Through the fold, with a guard that has a memory of its own."""
    spec = next(spec for name, spec in SPECS.items() if resolve(spec)[:2] == (policy, config))
    guard = {"max_change": 1.5, "max_factor": 5, "cooldown_steps": 3}
    rules = rules_of(Spec("r", "p", "r", {}, GROUPS, resolve(spec).spec(), None, guard, "absolute", 7))
    trace, runs = list(observations(kind, 300)), []
    for sizes in ([1] * 300, [300], [7, 64, 1, 100, 128]):
        run, _ = fold.apply(rules, fold.create(rules), Attached(1, 0, 0, "s", "c", None, None))
        changes, marks, start = [], [], 0
        for size in sizes:
            part = trace[start : start + size]
            names = ("loss", "reward", "grad_norm", "update_norm", "val_loss")
            event = Observed(1, [o.step for o in part], {n: [getattr(o, n) for o in part] for n in names})
            run, outcome = fold.apply(rules, run, event)
            # The first entry of a batch says what was in force before; only the others are changes.
            changes += (
                outcome.changes if outcome.changes[0][1] != (changes or [(0, None)])[-1][1] else outcome.changes[1:]
            )
            marks += outcome.marks
            start += size
        # What a policy asked for is called after its row, and how many steps ride in a row is what differs here.
        asks = tuple(command._replace(id="", seq=0) for command in run.steering.commands)
        run = run._replace(seq=0, steering=run.steering._replace(commands=asks))
        runs.append((repr(run), repr(changes), repr(marks)))
    assert runs[0] == runs[1] == runs[2]


@every_policy
def test_a_specification_in_full_resolves_to_itself(policy, config):
    for spec in SPECS.values():
        whole = resolve(spec).spec()
        assert resolve(json.loads(json.dumps(whole, sort_keys=True))).spec() == whole


def floor(n):
    """Seconds a step for the least a fold can do: build one state and one decision."""
    state, lr = (1.0, 2, 3, 4, 5), (1e-3,)
    begun = time.process_time()
    for _ in range(n):
        state = (*state[:4], 5)
        Decision(lr, None, None, "phase", "code", {"a": 1.0, "b": 2.0})
    return (time.process_time() - begun) / n


ALONE = [{"type": name} for name, policy in POLICIES.items() if not policy.parts]
WATCHING = [{"type": name, "policy": "constant"} for name in ("gradient_aware", "spike_guard")]


@pytest.mark.parametrize("spec", ALONE + WATCHING, ids=lambda spec: spec["type"])
def test_a_step_costs_no_more_than_a_few_floors(spec):
    policy, config, _ = resolve(spec)
    trace, ratios = list(observations("noisy", 2000)), []
    for _ in range(7):  # the floor is measured beside every round, so that a busy machine slows both
        state, _ = begin(policy, config)
        begun = time.process_time()
        for seen in trace:
            state, _ = policy.step(config, state, seen)
        ratios.append((time.process_time() - begun) / len(trace) / floor(2000))
    assert median(ratios) < 12
