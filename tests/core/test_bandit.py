"""Goal: the bandit chooses and learns as its formulas say, draws as Python's generator does, and explores enough.

Method: small cases worked out by hand with exact numbers; the Mersenne functions against `random.Random`; statistics of
which arm wins.
"""

import json
import math
import random
from types import SimpleNamespace

import pytest

from flyball_server.core import bandit, mersenne, rng
from flyball_server.core.bandit import Arms, Chance


def rule(coef=1.0, discount=0.5, warmup_rounds=1, bonus_scale="none", control_mode="adaptive"):
    return SimpleNamespace(
        exploration_coef=coef,
        discount=discount,
        warmup_rounds=warmup_rounds,
        bonus_scale=bonus_scale,
        control_mode=control_mode,
    )


def chance(step, seed=0, stream=0x100, own=None):
    return Chance(seed, stream, step, own)


def known(counts, sums, squares=0.0):
    return Arms(tuple(counts), tuple(sums), (9,) * len(counts), 9, squares, None)


def test_an_update_fades_everything_and_then_adds():
    arms = bandit.begin(2, 0, None)
    assert arms == ((0.0, 0.0), (0.0, 0.0), (0, 0), 0, 0.0, None)
    arms = bandit.learn(rule(), arms, None, 1, 0.5)
    arms = bandit.learn(rule(), arms, None, 0, -2.0)
    assert arms == ((1.0, 0.5), (-2.0, 0.25), (1, 1), 2, 4.125, None)


def test_warm_up_plays_the_least_played_arms_first():
    ties, arms = [], bandit.begin(3, 0, None)
    for step in range(7):
        arms, choice = bandit.choose(rule(warmup_rounds=2), arms, None, chance(step))
        ties.append(len(choice.tie))
        assert choice.arm in choice.tie
        assert (choice.scores is None) == (step < 6)
        arms = bandit.learn(rule(), arms, None, choice.arm, 0.0)
    assert ties[:6] == [3, 2, 1, 3, 2, 1]
    assert bandit.choose(rule(warmup_rounds=0), bandit.begin(2, 0, None), None, chance(0))[1].scores == (0.0, 0.0)


def test_a_score_is_the_mean_reward_and_a_bonus_for_few_counts():
    n = 2.0 + 0.5
    expected = (1.5 / 2 + 3 * math.sqrt(math.log(n + 1) / 2), -0.25 / 0.5 + 3 * math.sqrt(math.log(n + 1) / 0.5))
    assert bandit.scores(rule(coef=3.0), known((2.0, 0.5), (1.5, -0.25))) == pytest.approx(expected, rel=1e-14)


def test_a_count_that_has_faded_away_is_at_least_1e_12():
    scores = bandit.scores(rule(), known((1.0, 0.0), (0.0, 1e-12)))
    assert scores[1] == pytest.approx(1 + math.sqrt(math.log(2) / 1e-12))
    assert all(map(math.isfinite, bandit.scores(rule(), known((1.0, 5e-324), (0.0, 5e-324)))))


def test_the_bonus_may_follow_the_spread_of_the_rewards():
    by_spread = rule(coef=2.0, bonus_scale="reward_std")
    arms = bandit.begin(1, 0, None)
    for reward in (3.0, -1.0):
        arms = bandit.learn(rule(discount=1.0), arms, None, 0, reward)
    bonus = math.sqrt(math.log(3) / 2)
    assert bandit.scores(by_spread, arms)[0] == pytest.approx(1.0 + 2 * 2.0 * bonus)
    alike = bandit.learn(rule(discount=1.0), bandit.begin(1, 0, None), None, 0, 0.5)
    assert bandit.scores(by_spread, alike)[0] == pytest.approx(0.5 + 2 * 1e-6 * math.sqrt(math.log(2)), rel=1e-12)
    assert bandit.scores(by_spread, bandit.begin(2, 0, None)) == (0.0, 0.0)
    rounded = known((1.0, 1.0), (0.1, 0.1), 0.0199)  # squares / n below mean^2: no negative root
    assert all(map(math.isfinite, bandit.scores(by_spread, rounded)))


def test_the_spread_is_that_of_faded_counts_sums_and_squares():
    arms = known((1.5, 0.5), (1.0, -0.5), 2.5)  # mean 1/4, mean square 5/4: variance 19/16
    bonus = 0.5 * math.sqrt(19 / 16) * math.sqrt(math.log(3))
    expected = (1.0 / 1.5 + bonus / math.sqrt(1.5), -1.0 + bonus / math.sqrt(0.5))
    assert bandit.scores(rule(coef=0.5, bonus_scale="reward_std"), arms) == pytest.approx(expected, rel=1e-14)


def test_scores_within_1e_12_are_a_tie():
    for gap, tie in ((1e-12, (0, 1)), (1.1e-12, (1,))):
        arms = known((1.0, 1.0), (0.0, gap))
        assert bandit.choose(rule(coef=0.0), arms, None, chance(0))[1].tie == tie


def test_choosing_changes_nothing_but_a_generator_of_its_own():
    arms = Arms((1.0, 2.0), (0.5, 0.25), (3, 4), 7, 0.75, None)
    for r in (rule(), rule(warmup_rounds=9), rule(control_mode="random")):
        assert bandit.choose(r, arms, None, chance(0))[0] == arms
    for rounds in (0, 9):
        choice = bandit.choose(rule(control_mode="random", warmup_rounds=rounds), arms, None, chance(0))[1]
        assert (choice.tie, choice.scores) == ((0, 1), None)
    own = arms._replace(generator=mersenne.seeded(4))
    after, choice = bandit.choose(rule(warmup_rounds=9), own, None, chance(0))
    assert after == own._replace(generator=mersenne.below(1, own.generator)[1])
    assert choice == (0, None, (0,), None)
    learnt = bandit.learn(rule(), own, None, 1, -0.5)
    assert learnt == ((0.5, 2.0), (0.25, -0.375), (3, 5), 8, 0.625, own.generator)


def test_chance_decides_a_tie_by_the_counter_generator():
    picked = [bandit.choose(rule(), bandit.begin(3, 0, None), None, chance(step, 7, 0x201))[1] for step in range(50)]
    assert [choice.arm for choice in picked] == [rng.choice(3, 7, 0x201, step) for step in range(50)]
    assert [choice.u for choice in picked] == [rng.uniform(7, 0x201, step) for step in range(50)]
    arms = known((1.0, 1.0, 1.0), (0.0, 1.0, 1.0))
    arms, choice = bandit.choose(rule(), arms, None, chance(3, 7))
    assert (choice.tie, choice.arm) == ((1, 2), 1 + rng.choice(2, 7, 0x100, 3))


def test_a_random_controller_plays_every_arm_alike_and_learns_nothing():
    at_random = rule(control_mode="random")
    arms = bandit.begin(3, 0, None)
    assert bandit.learn(at_random, arms, None, 0, 1.0) is arms
    picked = [bandit.choose(at_random, arms, None, chance(step))[1] for step in range(3000)]
    assert [choice.arm for choice in picked] == [rng.choice(3, 0, 0x100, step) for step in range(3000)]
    assert {choice.tie for choice in picked} == {(0, 1, 2)}
    assert {choice.scores for choice in picked} == {None}


def test_a_bucket_begins_as_a_copy_of_the_prior_and_then_learns_alone():
    context, r = bandit.begin(2, 3, None), rule()
    assert context == (bandit.begin(2, 0, None), (None,) * 3, (0, 0, 0), (0.0, 0.0, 0.0), ((), (), ()))
    chosen = []
    for bucket, arm, reward in ((1, 0, 1.0), (1, 1, 0.5)):
        context, choice = bandit.choose(r, context, bucket, chance(0))
        chosen.append(choice.arm)
        context = bandit.learn(r, context, bucket, arm, reward)
    context, choice = bandit.choose(r, context, 2, chance(5))
    assert choice.scores is not None  # the warm-up of the prior is not repeated
    assert context[1][2] == context[0] == context[1][1]
    assert context[1][0] is None
    context = bandit.learn(r, context, 2, 0, -1.0)
    assert context[1][2] == context[0] != context[1][1]
    assert context[0][:2] == ((1.25, 0.5), (-0.75, 0.25))
    assert context[1][1][:2] == ((0.5, 1.0), (0.5, 0.5))
    assert (context[2], context[3]) == ((0, 2, 1), (0.0, 1.5, -1.0))
    assert bandit.audit(context[1][1], None) == {"counts": [0.5, 1.0], "sums": [0.5, 0.5], "updates": 2}
    assert bandit.audit(context, 1) == {
        "counts": [0.5, 1.0], "sums": [0.5, 0.5], "updates": 2, "prior_counts": [1.25, 0.5],
        "prior_sums": [-0.75, 0.25], "bucket_visits": [0, 2, 1], "bucket_reward_sums": [0.0, 1.5, -1.0],
        "bucket_distinct_arms": [0, len(set(chosen)), 1],
    }  # fmt: skip
    assert context[4] == ((), tuple(dict.fromkeys(chosen)), (choice.arm,))


def test_a_bucket_remembers_each_arm_it_chose_once_in_their_order_and_forgets_none():
    context, r, chosen = bandit.begin(4, 2, None), rule(control_mode="random"), []
    for step in range(30):
        context, choice = bandit.choose(r, context, 1, chance(step))
        chosen.append(choice.arm)
        assert context[4] == ((), tuple(dict.fromkeys(chosen)))
    assert len(context[4][1]) == 4
    assert (context[0], context[1][0], context[2:4]) == (bandit.begin(4, 0, None), None, ((0, 0), (0.0, 0.0)))


def test_every_bucket_has_a_stream_of_its_own():
    for bucket in range(3):
        picked = [bandit.choose(rule(), bandit.begin(5, 3, None), bucket, chance(step))[1].arm for step in range(20)]
        assert picked == [rng.choice(5, 0, 0x100 + (bucket + 1) * 65536, step) for step in range(20)]


def test_the_mersenne_functions_draw_what_pythons_generator_draws():
    for seed in (0, 1, -5, 2**63, 101):
        generator, state = random.Random(seed), mersenne.seeded(seed)
        for n in [1, 2, 3, 1, 1, 7, 100] * 20:
            drawn, state = mersenne.below(n, tuple(json.loads(json.dumps(state))))
            assert drawn == generator.choice(range(n))
        assert generator.getstate()[1] == state
    with pytest.raises(ValueError, match="state"):
        mersenne.below(2, (1, 2, 3))


def test_a_generator_of_its_own_draws_even_where_there_is_no_tie_and_per_bucket():
    expected, arms, r = random.Random(9), bandit.begin(2, 0, 9), rule()
    for step in range(40):
        arms, choice = bandit.choose(r, arms, None, chance(step, own=9))
        assert choice.arm == expected.choice(choice.tie)
        assert choice.u is None
        arms = bandit.learn(r, arms, None, choice.arm, float(choice.arm))
    context, expected = bandit.begin(4, 3, 9), random.Random(9 + 1000 + 2)
    assert context[0][5] is None  # the prior never draws
    for step in range(40):
        context, choice = bandit.choose(r, context, 2, chance(step, own=9))
        assert choice.arm == expected.choice(choice.tie)
        context = bandit.learn(r, context, 2, choice.arm, 0.0)


@pytest.mark.parametrize("bonus_scale", ["none", "reward_std"])
def test_a_better_arm_is_played_more_and_the_scaled_bonus_finds_small_differences(bonus_scale):
    source, r, plays = random.Random(1), rule(discount=0.95, bonus_scale=bonus_scale), [0, 0, 0]
    arms = bandit.begin(3, 0, None)
    for step in range(2000):
        arms, choice = bandit.choose(r, arms, None, chance(step))
        plays[choice.arm] += 1
        arms = bandit.learn(r, arms, None, choice.arm, 0.02 * choice.arm + 0.005 * source.gauss(0, 1))
    assert plays[0] < plays[2]
    assert (plays[2] > 1000) == (bonus_scale == "reward_std")
