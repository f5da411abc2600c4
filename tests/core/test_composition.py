"""Goal: policies inside policies decide exactly what they would alone, and what holds them adds only what it says.

Method: each composition beside its parts, run by hand on the same observations; every threshold at its exact value;
around scripted policies, which say what they are told to and remember what they were asked, whole states and decisions.
"""

import math
import re
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from flyball_server.core.errors import Invalid
from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.gradient_aware import Config as Aware
from flyball_server.core.policies.gradient_aware import State as AwareState
from flyball_server.core.policies.gradient_aware import _judge
from flyball_server.core.policies.per_group import Config as PerGroup
from flyball_server.core.policies.per_group import Entry, entry_of
from flyball_server.core.policies.per_group import State as PerGroupState
from flyball_server.core.policies.sequence import Config as Sequence
from flyball_server.core.policies.sequence import Stage
from flyball_server.core.policies.sequence import State as SequenceState
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Decision, Group, Observation, Part, Policy
from flyball_server.policy_files import resolve

GROUPS = (Group("body", 1.0, 0.9), Group("head", 0.25), Group("lora_a", 2.0, None, (0.9, 0.999)), Group("frozen", 0.0))
SHORT = {"type": "windowed", "window_size": 4, "cooldown_steps": 0, "patience": 1}


def begin(spec, groups=GROUPS, seed=0):
    policy, config, _ = resolve(spec)
    state, decision = policy.init(config, groups, seed)
    return policy, config, state, decision


def run(spec, trace, groups=GROUPS):
    """Every decision, the first one included."""
    policy, config, state, decision = begin(spec, groups)
    decisions = [decision]
    for seen in trace:
        state, decision = policy.step(config, state, seen)
        assert policy.explain(config, decision).endswith(".")
        decisions.append(decision)
    return decisions


def losses(*values):
    return [Observation(step, value) for step, value in enumerate(values)]


class Script(NamedTuple):
    """says: the decisions, in order. reads: its signals. last: what it says at the end. most: the largest learning rate
    it can be begun with."""

    says: tuple[Decision, ...]
    reads: frozenset[str] = frozenset()
    last: Decision | None = None
    most: float = math.inf


class Memory(NamedTuple):
    """at: how many decisions were said. groups, seed: what it was begun with. seen: the last observation."""

    at: int
    groups: tuple[Group, ...]
    seed: int
    seen: Any


def _recite(script, groups, seed):
    if max(group.lr for group in groups) > script.most:
        raise ValueError(f"most: {script.most} is too little")
    return Memory(1, groups, seed, None), script.says[0]


SCRIPT = Policy(
    "script",
    3,
    Script,
    Memory,
    _recite,
    lambda script, state, seen: (state._replace(at=state.at + 1, seen=seen), script.says[state.at]),
    lambda script, decision: (
        f"{len(script.says)}/{len(decision.lr)}/{decision.phase}/{decision.code}/{decision.fields}."
    ),
    lambda script: script.reads,
    finish=lambda script, state: script.last,
)


def says(*decisions, **rest):
    """A policy inside another one that says these decisions."""
    return Part(SCRIPT, Script(decisions, **rest))


def said(*lr, momentum=None, noise=None, phase="p", code="c", fields=None, milestone=False):
    return Decision(lr, momentum, noise, phase, code, fields, milestone)


WAVES = losses(*(2 + math.sin(i / 3) + 1 / (1 + i) for i in range(200)))


# ---- warmup and sequence -------------------------------------------------------------------------------


def test_a_warmup_rises_in_equal_steps_to_the_learning_rates_as_attached():
    decisions = run({"type": "warmup", "steps": 4}, losses(1.0, None, math.nan, 1.0, 1.0, 1.0))
    assert [d.lr[0] for d in decisions] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [d.lr[1] for d in decisions] == [0.0625, 0.125, 0.1875, 0.25, 0.25, 0.25, 0.25]
    assert [d.code for d in decisions] == ["initial", "warmup", "warmup", "warmup_done", "keep", "keep", "keep"]
    assert {d.lr[3] for d in decisions} == {0.0}
    assert run({"type": "warmup", "steps": 1}, [])[0].lr == tuple(group.lr for group in GROUPS)
    assert resolve({"type": "warmup"}).config.steps == 100


def test_a_warmup_has_the_state_and_the_words_of_its_place():
    groups = (Group("body", 0.1), Group("frozen", 0.0))
    policy, config, state, decision = begin({"type": "warmup", "steps": 3}, groups)
    rows = [(dump_state(state), decision, policy.explain(config, decision))]
    for seen in losses(1.0, None, math.nan):
        state, decision = policy.step(config, state, seen)
        rows.append((dump_state(state), decision, policy.explain(config, decision)))
    third, full = (0.1 / 3, 0.0), (0.1, 0.0)  # 0.1 * 3 / 3 is not 0.1
    assert rows == [
        (
            [0, [*full], [*third]],
            said(*third, phase="warmup", code="initial"),
            "Starting at the first step of the warm-up.",
        ),
        (
            [1, [*full], [0.1 * 2 / 3, 0.0]],
            said(0.1 * 2 / 3, 0.0, phase="warmup", code="warmup", fields={"n": 1, "steps": 3}),
            "Warm-up: observation 1 of 3.",
        ),
        (
            [2, [*full], [*full]],
            said(*full, phase="done", code="warmup_done", fields={"n": 2, "steps": 3}),
            "Warm-up finished: full learning rate from here on.",
        ),
        (
            [3, [*full], [*full]],
            said(*full, phase="done", code="keep"),
            "The warm-up is over: the learning rate stays.",
        ),
    ]
    assert begin({"type": "warmup", "steps": 2}, groups)[3] == said(0.05, 0.0, phase="warmup", code="initial")
    assert begin({"type": "warmup", "steps": 1}, groups)[3] == said(0.1, 0.0, phase="done", code="initial")


def test_a_sequence_decides_as_its_stages_would_and_hands_over_at_the_step_it_names():
    first, second = {"type": "warmup", "steps": 10}, SHORT
    stages = [{"policy": first, "until": 10}, {"policy": second}]
    decisions = run({"type": "sequence", "stages": stages}, WAVES)
    alone = run(first, WAVES[:10]), run(second, WAVES[10:])
    assert [d.lr for d in decisions] == [d.lr for d in (*alone[0][:10], *alone[1])]
    assert [d.code for d in decisions] == [
        *(d.code for d in alone[0][:10]),
        "handover",
        *(d.code for d in alone[1][1:]),
    ]
    assert [d.phase for d in decisions[:2]] == ["1.warmup", "1.warmup"]
    assert {d.phase for d in decisions[10:]} == {"2.adaptive"}
    assert decisions[10].fields == {"stage": 2, "from": "warmup@1", "to": "windowed@1"}
    milestones = [d.milestone for d in decisions]
    assert milestones == [*(d.milestone for d in alone[0][:10]), True, *(d.milestone for d in alone[1][1:])]


def test_a_stage_begins_at_the_settings_the_one_before_had_come_to():
    up = {"type": "adaptive", "use_reward": True, "var_damp_scale": 0.0}
    falling = [Observation(i, 1.0 - i / 100, 1.0 + i) for i in range(50)]
    stages = [{"policy": up, "until": 30}, {"policy": "constant"}]
    decisions = run({"type": "sequence", "stages": stages}, falling)
    alone = run(up, falling)
    assert decisions[29].lr == alone[29].lr
    assert decisions[30].lr == alone[30].lr == decisions[-1].lr
    assert decisions[30].momentum == alone[30].momentum
    assert decisions[29].lr[0] > 1.0
    assert decisions[29].momentum[0] > 0.9


def test_a_gap_in_the_steps_may_skip_a_stage_and_the_edge_is_exact():
    stages = [{"policy": "constant", "until": 5}, {"policy": {"type": "warmup"}, "until": 7}, {"policy": SHORT}]
    spec = {"type": "sequence", "stages": stages}
    assert [d.phase[0] for d in run(spec, losses(*[1.0] * 8))] == ["1"] * 5 + ["2"] * 2 + ["3"] * 2
    short = [{"policy": "constant", "until": 5}, {"policy": SHORT, "until": 6}, {"policy": "constant"}]
    decisions = run({"type": "sequence", "stages": short}, losses(*[1.0] * 6))
    assert [d.phase[0] for d in decisions] == ["1"] * 5 + ["2", "3"]
    jump = run(spec, [Observation(3, 1.0), Observation(6, 1.0)])
    assert [d.phase[0] for d in jump] == ["1", "1", "3"]
    assert jump[-1].fields["stage"] == 3


def test_momentum_and_noise_of_a_stage_that_has_ended_do_not_linger_as_unknown():
    noisy = {"type": "aees", "noise_candidates": [0.5, 0.25], "lr_candidates": [1.0], "episode_length": 2}
    stages = [{"policy": noisy, "until": 3}, {"policy": "constant"}]
    decisions = run({"type": "sequence", "stages": stages}, losses(1.0, 0.9, 0.8, 0.7))
    assert all(d.noise_std[0] > 0 for d in decisions[:3])
    assert decisions[3].noise_std == (0.0,) * 4


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "stages: is empty"),
        ([{"policy": "constant", "until": 9}], "stages.0.until: the last stage has no end"),
        ([{"policy": {"type": "windowed", "patiense": 3}}], "stages.0.policy.patiense: .*did you mean 'patience'"),
        ([{"policy": {"type": "windowed", "base": {"type": "cosine"}}}], "stages.0.policy.base: not allowed in here"),
        ([{"policy": {"type": "aees", "seed": 3}}], "stages.0.policy.seed: not allowed in here"),
        ([{"policy": "cosine"}], "stages.0.policy.type: 'cosine' is a base schedule"),
    ],
)
def test_a_sequence_that_cannot_be_is_refused_with_the_path(stages, words):
    with pytest.raises(Invalid, match=words):
        resolve({"type": "sequence", "stages": stages})


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([], "stages: is empty; give at least one, such as {policy: {type: windowed}}"),
        ([9], "stages.0.until: the last stage has no end; leave it out"),
        ([1, 9], "stages.1.until: the last stage has no end; leave it out"),
        (
            [None, None],
            "stages.0.until: None is not allowed; give the optimizer step, 1 or more, at which stage 1 takes over",
        ),
        (
            [1, 0, None],
            "stages.1.until: 0 is not allowed; give the optimizer step, 1 or more, at which stage 2 takes over",
        ),
        ([5, 5, None], "stages.1.until: 5 is not behind stages.0.until = 5; give steps that rise"),
        ([4, 5, 3, None], "stages.2.until: 3 is not behind stages.1.until = 5; give steps that rise"),
    ],
)
def test_stages_that_do_not_follow_each_other_are_refused(ends, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        Sequence(stages=tuple(Stage(policy=says(), until=end) for end in ends))
    assert Sequence(stages=tuple(Stage(policy=says(), until=end) for end in (1, 2, None)))


def test_a_later_stage_that_does_not_fit_the_groups_is_refused_at_the_start():
    bad = {"type": "plateau", "min_lr": [0.1, 0.1]}
    policy, config, _ = resolve({"type": "sequence", "stages": [{"policy": "constant", "until": 5}, {"policy": bad}]})
    with pytest.raises(ValueError, match=r"stages\.1\.policy\.min_lr: 2 values for 4 groups"):
        policy.init(config, GROUPS, 0)


THREE = (Group("a", 1.0, 0.9), Group("b", 2.0, None, (0.8, 0.99)), Group("c", 3.0))
#: What a sequence keeps of them: its state is what it was before groups said whether they are LR-free.
KEPT = tuple(group[:4] for group in THREE)


def test_a_sequence_passes_on_the_settings_and_says_who_takes_over():
    first = says(
        said(1.0, 2.0, 3.0),
        said(4.0, 5.0, 6.0, momentum=(0.5, 0.6, None), noise=(0.1,) * 3, phase="q", fields={"x": 1}, milestone=True),
        said(7.0, 8.0, 9.0, momentum=(0.3, 0.4, None), noise=(0.1,) * 3),
    )
    second = says(
        said(70.0, 80.0, 90.0, phase="s"),
        said(71.0, 81.0, 91.0, phase="s", code="d"),
        said(72.0, 82.0, 92.0, momentum=(None, 0.2, None)),
        last=said(1.0, 1.0, 1.0, phase="s", code="end", fields={"y": 2}, milestone=True),
    )
    third = says(said(5.0, 5.0, 5.0, momentum=(0.1, 0.2, None), noise=(0.5,) * 3), said(6.0, 6.0, 6.0, code="e"))
    config = Sequence(stages=(Stage(policy=first, until=2), Stage(policy=second, until=4), Stage(policy=third)))
    policy = POLICIES["sequence"]
    seen = losses(*[1.0] * 5)

    state, decision = policy.init(config, THREE, 11)
    assert state == SequenceState(0, Memory(1, THREE, 11, None), 11, KEPT)
    assert decision == said(1.0, 2.0, 3.0, phase="1.p")
    assert policy.finish(config, state) is None
    state, decision = policy.step(config, state, seen[0])
    assert state == SequenceState(0, Memory(2, THREE, 11, seen[0]), 11, KEPT)
    assert decision == first.config.says[1]._replace(phase="1.q")
    assert policy.explain(config, decision) == "3/3/q/c/{'x': 1}."
    assert policy.explain(config, decision._replace(phase="3.2.q")) == "2/3/2.q/c/{'x': 1}."  # a sequence in a sequence

    state, decision = policy.step(config, load_state(policy, dump_state(state)), seen[1])
    moved = (Group("a", 7.0, 0.3), Group("b", 8.0, None, (0.4, 0.99)), Group("c", 9.0))
    assert state == SequenceState(1, Memory(1, moved, 11, None), 11, KEPT)
    fields = {"stage": 2, "from": "script@3", "to": "script@3"}
    handed = said(70.0, 80.0, 90.0, momentum=(0.3, 0.4, None), noise=(0.0,) * 3, phase="2.s", code="handover")
    assert decision == handed._replace(fields=fields, milestone=True)
    assert decision.milestone is True
    sentence = "Stage 2 begins: script@3 takes over from script@3, at the settings it had come to."
    assert policy.explain(config, decision) == sentence
    assert policy.finish(config, state) == second.config.last._replace(phase="2.s")

    state, decision = policy.step(config, state, seen[2])
    assert (state.stage, decision) == (1, said(71.0, 81.0, 91.0, phase="2.s", code="d"))
    state, decision = policy.step(config, state, seen[3])
    moved = (Group("a", 72.0, 0.9), Group("b", 82.0, None, (0.2, 0.99)), Group("c", 92.0))
    assert state == SequenceState(2, Memory(1, moved, 11, None), 11, ())
    assert decision == third.config.says[0]._replace(
        phase="3.p", code="handover", fields=fields | {"stage": 3}, milestone=True
    )
    state, decision = policy.step(config, state, seen[4])
    assert state == SequenceState(2, Memory(2, moved, 11, seen[4]), 11, ())
    assert decision == said(6.0, 6.0, 6.0, phase="3.p", code="e")


def test_a_stage_that_asked_for_neither_momentum_nor_noise_passes_none_on():
    config = Sequence(stages=(Stage(policy=says(said(1.0), said(2.0)), until=1), Stage(policy=says(said(3.0)))))
    policy, groups = POLICIES["sequence"], THREE[:1]
    _, decision = policy.step(config, policy.init(config, groups, 0)[0], Observation(0))
    assert (decision.lr, decision.momentum, decision.noise_std) == ((3.0,), None, None)
    single = Sequence(stages=(Stage(policy=says(said(1.0), reads=frozenset({"x"}))),))
    assert policy.init(single, groups, 0)[0].groups == ()
    assert policy.reads(single) == {"x"}


def test_a_momentum_that_is_switched_off_or_absent_is_not_made_by_a_hand_over():
    """Betas move only where there is no momentum; a group with neither gets neither."""
    groups = (Group("both", 1.0, 0.5, (0.8, 0.99)), Group("neither", 1.0))
    first = says(said(1.0, 1.0), said(1.0, 1.0, momentum=(0.6, 0.7)))
    config = Sequence(stages=(Stage(policy=first, until=1), Stage(policy=says(said(2.0, 2.0)))))
    policy = POLICIES["sequence"]
    state, _ = policy.step(config, policy.init(config, groups, 0)[0], Observation(0))
    assert state.inner.groups == (Group("both", 1.0, 0.6, (0.8, 0.99)), Group("neither", 1.0))


def test_a_stage_that_does_not_fit_where_the_run_has_got_to_begins_as_attached():
    second = says(said(3.0), most=1.0)
    config = Sequence(stages=(Stage(policy=says(said(1.0), said(2.0)), until=1), Stage(policy=second)))
    policy, groups = POLICIES["sequence"], (Group("a", 1.0, 0.9, (0.9, 0.99)),)
    state, _ = policy.init(config, groups, 5)
    state, decision = policy.step(config, load_state(policy, dump_state(state)), Observation(0))
    assert state == SequenceState(1, Memory(1, groups, 5, None), 5, ())
    assert type(state.inner.groups[0]) is Group
    assert (decision.lr, decision.code) == ((3.0,), "handover")
    with pytest.raises(ValueError, match=r"^stages\.1\.policy\.most: 1\.0 is too little$"):
        policy.init(config, THREE, 5)


def test_every_stage_is_tried_with_the_seed_of_the_run():
    tried = []
    policy = SCRIPT._replace(
        init=lambda script, groups, seed: (tried.append((groups, seed)), _recite(script, groups, seed))[1]
    )
    second = Part(policy, Script((said(1.0, 1.0, 1.0),)))
    config = Sequence(stages=(Stage(policy=says(said(1.0, 1.0, 1.0)), until=5), Stage(policy=second)))
    POLICIES["sequence"].init(config, THREE, 11)
    assert tried == [(THREE, 11)]


# ---- per_group -------------------------------------------------------------------------------------------


def test_each_group_follows_its_own_policy_and_scale():
    spec = {
        "type": "per_group",
        "policy": {"type": "constant"},
        "groups": {"head": {"policy": SHORT}, "lora*": {"policy": "adaptive", "scale": 0.5}, "body": {"scale": 4.0}},
    }
    decisions = run(spec, WAVES)
    head = run(SHORT, WAVES, GROUPS[1:2])
    lora = run({"type": "adaptive"}, WAVES, GROUPS[2:3])
    for joined, one, other in zip(decisions, head, lora, strict=True):
        assert joined.lr == (4.0, one.lr[0], other.lr[0] * 0.5, 0.0)
        assert (
            joined.code
            == f"default: {'initial' if one is head[0] else 'keep'} | head: {one.code} | lora*: {other.code}"
        )
        assert joined.phase == f"default: constant | head: {one.phase} | lora*: {other.phase}"
        assert (joined.fields or {}).get("head") == (dict(one.fields) if one.fields else None)


def test_the_whole_name_wins_over_patterns_and_the_longer_pattern_over_the_shorter():
    groups = tuple(Group(name, 1.0) for name in ("lora_a", "lora_b", "lora_bb", "other"))
    entries = {"lora*": {"scale": 2.0}, "lora_b*": {"scale": 4.0}, "lora_b": {"scale": 8.0}}
    assert run({"type": "per_group", "policy": "constant", "groups": entries}, [], groups)[0].lr == (2.0, 8.0, 4.0, 1.0)


def test_a_single_controller_speaks_for_itself():
    spec = {"type": "per_group", "policy": SHORT, "groups": {"head": {"scale": 2.0}}}
    alone = run(SHORT, WAVES)
    for joined, one in zip(run(spec, WAVES), alone, strict=True):
        assert (joined.code, joined.phase, joined.fields) == (one.code, one.phase, one.fields)
        assert joined.lr == (one.lr[0], one.lr[1] * 2, one.lr[2], one.lr[3])


def test_momentum_is_joined_group_by_group():
    mover = {"type": "adaptive", "use_reward": True}
    spec = {"type": "per_group", "policy": "constant", "groups": {"body": {"policy": mover}}}
    seen = [Observation(i, 1.0, float(i)) for i in range(4)]
    last = run(spec, seen)[-1]
    assert last.momentum[0] > 0.9
    assert last.momentum[1:] == (None, 0.9, None)
    assert run({"type": "per_group", "policy": "constant"}, seen)[-1].momentum is None


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"haed": {"scale": 2.0}}, r"groups\.haed: there is no such group; did you mean 'head'"),
        ({"head": {"policy": {"type": "plateau", "min_lr": [1.0, 1.0]}}}, r"groups\.head\.policy\.min_lr: 2 values"),
    ],
)
def test_entries_that_do_not_fit_the_groups_are_refused(entries, words):
    policy, config, _ = resolve({"type": "per_group", "policy": "constant", "groups": entries})
    with pytest.raises(ValueError, match=words):
        policy.init(config, GROUPS, 0)
    unmatched = resolve({"type": "per_group", "policy": "constant", "groups": {"router*": {"scale": 2.0}}})
    assert unmatched.policy.init(unmatched.config, GROUPS, 0)[1].lr == tuple(g.lr for g in GROUPS)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"head": {"scale": 0}}, "groups.head.scale: 0.0 is not allowed"),
        ({"head": {"scael": 2}}, "groups.head.scael: .*did you mean 'scale'"),
        ({"default": {"scale": 2}}, "groups: 'default' is no good"),
        ({"a: b": {"scale": 2}}, "groups: 'a: b' is no good"),
        ({"head": {"policy": {"type": "per_group", "policy": "constant"}}}, "groups.head.policy.type: .*cannot hold"),
    ],
)
def test_entries_that_cannot_be_are_refused_with_the_path(entries, words):
    with pytest.raises(Invalid, match=words):
        resolve({"type": "per_group", "policy": "constant", "groups": entries})


FOUR = (*THREE, Group("frozen", 0.0))


def test_controllers_get_their_own_groups_and_are_joined_in_the_order_of_the_run():
    default = says(
        said(1.0, 3.0, 0.0),
        said(10.0, 30.0, 0.0, phase="q", code="d", fields={"x": 1}),
        said(10.0, 30.0, 0.0, momentum=(0.1, None, None)),
        reads=frozenset({"x"}),
    )
    other = says(
        said(2.0),
        said(20.0, momentum=(0.6,), noise=(0.3,), code="e", milestone=True),
        said(20.0, fields={"y": 2}),
        reads=frozenset({"y"}),
        last=said(20.0, phase="s", code="end", fields={"n": 2}),
    )
    unused = says(reads=frozenset({"z"}))
    config = PerGroup(
        policy=default,
        groups={"b": Entry(policy=other, scale=0.5), "[cf]*": Entry(scale=2.0), "z?": Entry(policy=unused)},
    )
    policy, seen = POLICIES["per_group"], losses(1.0, 2.0)
    assert policy.reads(config) == {"x", "y", "z"}

    state, decision = policy.init(config, FOUR, 11)
    mine, theirs = (FOUR[0], FOUR[2], FOUR[3]), (FOUR[1],)
    inner = (Memory(1, mine, 11, None), Memory(1, theirs, 11, None))
    whole = (("default", "b"), (0, 1, 0, 0), (1.0, 0.5, 2.0, 2.0)), (0.9, 0.8, None, None)
    assert state == PerGroupState(*whole[0], inner, whole[1], (1.0, 1.0, 6.0, 0.0))
    assert decision == said(1.0, 1.0, 6.0, 0.0, phase="default: p | b: p", code="default: c | b: c")
    assert policy.explain(config, decision) == "default: 3/4/p/c/None. b: 3/4/p/c/None."

    state, decision = policy.step(config, state, seen[0])
    inner = (Memory(2, mine, 11, seen[0]), Memory(2, theirs, 11, seen[0]))
    assert state == PerGroupState(*whole[0], inner, whole[1], (10.0, 10.0, 60.0, 0.0))
    assert decision == said(
        *(10.0, 10.0, 60.0, 0.0),
        momentum=(0.9, 0.6, None, None),
        noise=(0.0, 0.3, 0.0, 0.0),
        phase="default: q | b: p",
        code="default: d | b: e",
        fields={"default": {"x": 1}},
        milestone=True,
    )
    assert policy.explain(config, decision) == "default: 3/4/q/d/{'x': 1}. b: 3/4/p/e/None."

    before = decision.lr
    state, decision = policy.step(config, load_state(policy, dump_state(state))._replace(out=before), seen[1])
    assert decision.lr is before is state.out
    assert decision[1:] == (
        (0.1, 0.8, None, None), None, "default: p | b: p", "default: c | b: c", {"b": {"y": 2}}, False, (),
    )  # fmt: skip
    assert policy.finish(config, state) == said(
        10.0, 10.0, 60.0, 0.0, phase="b: s", code="b: end", fields={"b": {"n": 2}}
    )


def test_a_code_and_a_phase_may_hold_a_colon_themselves():
    config = PerGroup(
        policy=says(said(1.0, 1.0)), groups={"b": Entry(policy=says(said(1.0, phase="s: t", code="d: e")))}
    )
    decision = POLICIES["per_group"].init(config, THREE, 0)[1]
    assert POLICIES["per_group"].explain(config, decision) == "default: 1/3/p/c/None. b: 1/3/s: t/d: e/None."


def test_what_controllers_have_to_say_at_the_end_is_joined():
    policy, ends = POLICIES["per_group"], said(5.0, phase="s", code="end")
    for default, other, expected in (
        (None, None, None),
        (ends, None, said(1.0, 2.0, phase="default: s", code="default: end", fields={"default": {}})),
        (
            ends,
            ends._replace(fields={"n": 1}),
            said(
                1.0, 2.0, phase="default: s | b: s", code="default: end | b: end", fields={"default": {}, "b": {"n": 1}}
            ),
        ),
    ):
        entries = {"b": Entry(policy=says(said(2.0), last=other))}
        config = PerGroup(policy=says(said(1.0), last=default), groups=entries)
        assert policy.finish(config, policy.init(config, THREE[:2], 0)[0]) == expected
    alone = PerGroup(policy=says(said(1.0, 2.0), last=ends))
    assert policy.finish(alone, policy.init(alone, THREE[:2], 0)[0]) == ends


def test_a_scale_of_one_is_no_rounding_and_others_stay_within_what_may_be_emitted():
    groups, tiny = (Group("a", 1.0), Group("b", 1.0), Group("c", 1.0)), 1e-301
    config = PerGroup(policy=says(said(tiny, tiny, 1e100)), groups={"b": Entry(scale=2.0), "c": Entry(scale=3.0)})
    assert POLICIES["per_group"].init(config, groups, 0)[1].lr == (tiny, 1e-300, 1e100)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("b[", "b["),
        ("bb", "b?"),
        ("bcd", "b*"),
        ("ax", "[ay]x"),
        ("yx", "[ay]x"),
        ("a*x", "a*x"),
        ("abx", "a*x"),
        ("B", None),
    ],
)
def test_a_group_belongs_to_the_entry_its_name_fits(name, label):
    entries = {one: Entry() for one in ("b[", "b?", "b*", "[ay]x", "a*x", "*x", "d")}
    assert entry_of(PerGroup(policy=says(), groups=entries), name) == label


def test_the_default_stands_first_and_the_others_in_the_order_of_their_names():
    parts = {label: Entry(policy=says(said(1.0))) for label in ("c", "b", "a")}
    config = PerGroup(policy=says(said(0.0)), groups=parts)
    state, _ = POLICIES["per_group"].init(config, (*THREE[::-1], FOUR[3]), 0)
    assert (state.labels, state.members) == (("default", "a", "b", "c"), (3, 2, 1, 0))
    everyone = PerGroup(policy=says(), groups={"?*": Entry(policy=says(said(1.0, 1.0, 1.0)))})
    state, decision = POLICIES["per_group"].init(everyone, THREE, 0)
    assert (state.labels, state.members, decision.code) == (("?*",), (0, 0, 0), "?*: c")


def test_a_controller_that_does_not_fit_is_refused_with_its_place():
    policy, small = POLICIES["per_group"], says(said(1.0), most=0.5)
    with pytest.raises(ValueError, match=r"^policy\.most: 0\.5 is too little$"):
        policy.init(PerGroup(policy=small), THREE, 0)
    with pytest.raises(ValueError, match=r"^groups\.b\.policy\.most: 0\.5 is too little$"):
        policy.init(PerGroup(policy=says(said(1.0, 1.0)), groups={"b": Entry(policy=small)}), THREE, 0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^scale: {scale!r} is not allowed; give a finite number above 0$"):
            Entry(scale=scale)
    for label in ("", "default", "a|b", "a: b"):
        words = f"groups: {label!r} is no good as a name here; give a group's name, or a pattern such as 'lora*'"
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            PerGroup(policy=says(), groups={label: Entry()})


# ---- gradient_aware --------------------------------------------------------------------------------------


def norms(*values, loss=1.0):
    return [Observation(step, loss, grad_norm=value) for step, value in enumerate(values)]


def aware(trace, **parameters):
    spec = {"type": "gradient_aware", "policy": "constant", "min_samples": 2, "beta": 0.0, **parameters}
    return run(spec, trace, GROUPS[:1])[1:]


def test_an_exploding_gradient_cuts_at_once_and_the_cut_fades():
    decisions = aware(norms(1, 1, 1, 5, 1, 1, 1), beta=0.5, recovery=2.0)
    assert [d.lr[0] for d in decisions] == [1, 1, 1, 0.5, 1.0, 1.0, 1.0]
    assert decisions[3].code == "keep+grad_exploding"
    assert decisions[3].fields["grad_norm"] == 5
    assert decisions[3].fields["running_norm"] == 1.0
    assert decisions[3].fields["grad_factor"] == 0.5
    assert {d.code for d in decisions[:3]} == {"keep"}


def test_the_edges_of_exploding_and_vanishing_are_exact():
    # log(4) - log(1) is exactly log(4): at the ratio itself nothing happens, a breath above it does.
    assert aware(norms(1, 1, 4.0))[-1].code == "keep"
    assert aware(norms(1, 1, math.nextafter(4.0, 9) + 1e-12))[-1].code == "keep+grad_exploding"
    assert aware(norms(1, 1, 0.1))[-1].code == "keep"
    assert aware(norms(1, 1, 0.0999999))[-1].code == "keep+grad_low"


def test_a_vanished_gradient_raises_only_when_it_lasts():
    low = [1, 1] + [0.01] * 6
    decisions = aware(norms(*low), beta=0.999999, vanish_patience=3, raise_factor=1.5)
    assert [d.code for d in decisions[2:]] == ["keep+grad_low", "keep+grad_low", "keep+grad_vanishing"] * 2
    assert [d.lr[0] for d in decisions[2:]] == [1, 1, 1.5, 1.5, 1.5, 2.0]  # max_factor
    back = aware(norms(*low, 1, 1, 1), beta=0.999999, vanish_patience=3, raise_factor=1.5, recovery=1.25)
    assert [d.lr[0] for d in back[-3:]] == [1.6, pytest.approx(1.28), pytest.approx(1.024)]
    broken = aware(norms(1, 1, 0.01, 0.01, 1, 0.01, 0.01, 1), beta=0.999999, vanish_patience=3)
    assert {d.lr[0] for d in broken} == {1.0}


def test_the_correction_stays_within_its_bounds_and_acts_only_after_min_samples():
    assert min(d.lr[0] for d in aware(norms(1, 1, *[10.0**i for i in range(1, 20)]))) == 0.1
    assert [d.code for d in aware(norms(1, 100, 1e4, 1e6), min_samples=3)] == ["keep"] * 3 + ["keep+grad_exploding"]


def test_one_wild_gradient_moves_the_running_norm_no_further_than_the_ratio():
    """The clipped update of a log average: after a gradient of e^100 the norm is 1 * 4^(1 - beta)."""
    decisions = aware(norms(1, 1, math.exp(100), 100), beta=0.5)
    assert decisions[3].fields["running_norm"] == pytest.approx(2.0, rel=1e-12)
    decisions = aware(norms(1, 1, 0.0, 0.0), beta=0.5)
    assert decisions[3].fields["running_norm"] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0, 1e101])
def test_a_gradient_norm_that_is_no_measurement_changes_nothing(value):
    with_it, without = aware(norms(1, 1, value, 9)), aware(norms(1, 1, None, 9))
    assert [(d.lr, d.code) for d in with_it] == [(d.lr, d.code) for d in without]
    assert with_it[2].code == "keep"
    assert with_it[3].code == "keep+grad_exploding"


def test_the_inner_policy_does_not_notice():
    spec = {"type": "gradient_aware", "policy": SHORT, "min_samples": 1}
    trace = [seen._replace(grad_norm=100.0 if seen.step % 17 == 16 else 1.0) for seen in WAVES]
    both, alone = run(spec, trace), run(SHORT, trace)
    assert [d.code.partition("+")[0] for d in both] == [d.code for d in alone]
    factors = [b.lr[0] / a.lr[0] for b, a in zip(both, alone, strict=True)]
    assert min(factors) < 0.51
    assert max(factors) == 1.0
    for one, (before, after) in zip(both[1:], pairwise(factors), strict=True):
        assert ("grad_exploding" in one.code) == (after < before)


def test_the_correction_is_a_factor_on_what_the_inner_policy_says():
    """beta 0.5, ratios 4 and 1/10, min_samples 2, vanish_patience 2: the running norm is 2 ** 0.5 when 16 comes."""
    last = said(9.0, 0.0, code="end")
    quiet = said(2.0, 0.0, momentum=(0.5, None), noise=(0.1, 0.0), phase="q", code="d", fields={"x": 1}, milestone=True)
    inner = says(said(1.0, 0.0), said(1.0, 0.0), said(2.0, 0.0), *[quiet] * 9, reads=frozenset({"x"}), last=last)
    config = Aware(policy=inner, beta=0.5, min_samples=2, vanish_patience=2, recovery=1.25)
    policy, groups = POLICIES["gradient_aware"], (Group("a", 1.0, 0.9), Group("frozen", 0.0))
    assert policy.reads(config) == {"x"}
    state, decision = policy.init(config, groups, 11)
    assert state == AwareState(Memory(1, groups, 11, None), (1.0, 0.0), (1.0, 0.0), 1.0, 0.0, 0, 0)
    assert decision == said(1.0, 0.0)
    assert policy.explain(config, decision) == "12/2/p/c/None."
    assert policy.finish(config, state) == last

    two = math.log(2)
    rows = [
        # grad_norm, learning rate, factor, running log norm, samples, low, mark
        (1.0, 1.0, 1.0, 0.0, 1, 0, ""),
        (2.0, 2.0, 1.0, two / 2, 2, 0, ""),
        (16.0, 1.0, 0.5, two * 1.5, 3, 0, "grad_exploding"),
        (None, 1.0, 0.5, two * 1.5, 3, 0, ""),
        (0.01, 1.0, 0.5, two / 2, 4, 1, "grad_low"),
        (0.01, 1.1, 0.55, -two / 2, 5, 0, "grad_vanishing"),
        (0.01, 1.1, 0.55, -two * 1.5, 6, 1, "grad_low"),
        (1.0, 1.375, 0.6875, -two * 0.75, 7, 0, ""),
        (-1.0, 1.375, 0.6875, -two * 0.75, 7, 0, ""),
        (1e101, 1.375, 0.6875, -two * 0.75, 7, 0, ""),
    ]
    for step, (grad, lr, factor, norm, samples, low, mark) in enumerate(rows):
        seen, before, old = Observation(step, 1.0, grad_norm=grad), state.norm, decision
        state, decision = policy.step(config, state, seen)
        told = inner.config.says[step + 1]
        near = pytest.approx((norm, factor), rel=1e-12, abs=1e-15)
        assert state == AwareState(
            Memory(step + 2, groups, 11, seen), told.lr, decision.lr, state.factor, state.norm, samples, low
        )
        assert (state.norm, state.factor) == near, step
        assert decision.lr == (pytest.approx(lr, rel=1e-12), 0.0)
        if mark:
            fields = {"grad_norm": grad, "running_norm": math.exp(before), "grad_factor": state.factor}
            told = told._replace(code=f"{told.code}+{mark}", fields={**told.fields, **fields})
        assert decision == told._replace(lr=decision.lr), step
        assert (decision.lr is old.lr) == (decision.lr == old.lr)
    sentence = "Gradient norm 16 exploded against its running 1.414: learning rate corrected by 0.5."
    exploded = quiet._replace(
        code="d+grad_exploding", fields={"x": 1, "grad_norm": 16.0, "running_norm": 2**0.5, "grad_factor": 0.5}
    )
    assert policy.explain(config, exploded) == f"12/2/q/d/{exploded.fields}. {sentence}"
    twice = exploded._replace(code="d+up+grad_exploding")
    assert policy.explain(config, twice) == f"12/2/q/d+up/{exploded.fields}. {sentence}"
    assert policy.explain(config, quiet._replace(code="flat+reward_up")) == "12/2/q/flat+reward_up/{'x': 1}."


@pytest.mark.parametrize(
    ("factor", "samples", "low", "value", "expected"),
    [
        (1.0, 0, 1, 5.0, (1.0, 5.0, 0, "")),  # the first norm is the running one
        (0.5, 1, 1, 9.0, (0.5, 0.5 * math.log(4), 0, "")),  # too few to judge
        (0.5, 2, 1, math.log(4), (0.625, 0.5 * math.log(4), 0, "")),
        (0.5, 2, 1, 9.0, (0.25, 0.5 * math.log(4), 0, "grad_exploding")),
        (0.15, 2, 1, 9.0, (0.1, 0.5 * math.log(4), 0, "grad_exploding")),
        (1.0, 2, 1, math.log(0.1), (1.0, -0.5 * math.log(4), 0, "")),
        (1.0, 2, 0, -9.0, (1.0, -0.5 * math.log(4), 1, "grad_low")),
        (1.0, 2, 1, -9.0, (1.1, -0.5 * math.log(4), 0, "grad_vanishing")),
        (1.9, 2, 1, -9.0, (2.0, -0.5 * math.log(4), 0, "grad_vanishing")),
        (0.9, 2, 1, 0.0, (1.0, 0.0, 0, "")),
        (1.2, 2, 1, 0.0, (1.0, 0.0, 0, "")),
        (1.5, 2, 1, 0.0, (1.2, 0.0, 0, "")),
    ],
)
def test_the_judgement_of_one_gradient_norm_is_exact(factor, samples, low, value, expected):
    config = Aware(policy={}, beta=0.5, min_samples=2, vanish_patience=2, recovery=1.25)
    assert _judge(config, factor, 0.0, samples, low, value) == expected


def test_a_correction_keeps_to_what_may_be_emitted_and_one_of_1_is_no_rounding():
    policy, groups = POLICIES["gradient_aware"], (Group("a", 1.0),)
    config = Aware(policy=says(said(1.0), said(1e-301), said(1e-301)), beta=0.5, min_samples=1)
    state, _ = policy.init(config, groups, 0)
    for grad, lr in ((1.0, 1e-301), (100.0, 1e-300)):
        state, decision = policy.step(config, state, Observation(0, 1.0, grad_norm=grad))
        assert decision.lr == (lr,)


@pytest.mark.parametrize("holder", [Aware, PerGroup, Stage])
def test_no_policy_at_all_is_refused(holder):
    with pytest.raises(ValueError, match=r"^policy: null is not allowed; give \{type: NAME, parameters \.\.\.\}$"):
        holder(policy=None)


def test_an_inner_policy_that_does_not_fit_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"^policy\.most: 0\.5 is too little$"):
        POLICIES["gradient_aware"].init(Aware(policy=says(said(1.0), most=0.5)), THREE, 0)


def test_the_defaults_of_the_correction_are_those_of_its_description():
    config = Aware(policy={})
    assert (config.explode_ratio, config.vanish_ratio, config.vanish_patience) == (4.0, 0.1, 20)
    assert (config.cut_factor, config.raise_factor, config.recovery) == (0.5, 1.1, 1.02)
    assert (config.min_factor, config.max_factor, config.beta, config.min_samples) == (0.1, 2.0, 0.98, 20)
