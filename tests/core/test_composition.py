"""Goal: policies inside policies decide exactly what they would alone, and what holds them adds only what it says.

Method: each composition beside its parts, run by hand on the same observations; every threshold at its exact value.
"""

import math
from itertools import pairwise

import pytest

from flyball_server.core.errors import Invalid
from flyball_server.core.policies.gradient_aware import Config as Aware
from flyball_server.core.types import Group, Observation
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
        ([{"policy": "constant"}, {"policy": "constant"}], "stages.0.until: None is not allowed"),
        ([{"policy": "constant", "until": 0}, {"policy": "constant"}], "stages.0.until: 0 is not allowed"),
        (
            [{"policy": "constant", "until": 5}, {"policy": "constant", "until": 5}, {"policy": "constant"}],
            "stages.1.until: 5 is not behind stages.0.until = 5",
        ),
        ([{"policy": {"type": "windowed", "patiense": 3}}], "stages.0.policy.patiense: .*did you mean 'patience'"),
        ([{"policy": {"type": "windowed", "base": {"type": "cosine"}}}], "stages.0.policy.base: not allowed in here"),
        ([{"policy": {"type": "aees", "seed": 3}}], "stages.0.policy.seed: not allowed in here"),
        ([{"policy": "cosine"}], "stages.0.policy.type: 'cosine' is no policy"),
    ],
)
def test_a_sequence_that_cannot_be_is_refused_with_the_path(stages, words):
    with pytest.raises(Invalid, match=words):
        resolve({"type": "sequence", "stages": stages})


def test_a_later_stage_that_does_not_fit_the_groups_is_refused_at_the_start():
    bad = {"type": "plateau", "min_lr": [0.1, 0.1]}
    policy, config, _ = resolve({"type": "sequence", "stages": [{"policy": "constant", "until": 5}, {"policy": bad}]})
    with pytest.raises(ValueError, match=r"stages\.1\.policy\.min_lr: 2 values for 4 groups"):
        policy.init(config, GROUPS, 0)


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


def test_the_defaults_of_the_correction_are_those_of_its_description():
    config = Aware(policy=None)
    assert (config.explode_ratio, config.vanish_ratio, config.vanish_patience) == (4.0, 0.1, 20)
    assert (config.cut_factor, config.raise_factor, config.recovery) == (0.5, 1.1, 1.02)
    assert (config.min_factor, config.max_factor, config.beta, config.min_samples) == (0.1, 2.0, 0.98, 20)
