"""Goal: `aees` does what its specification and the published package do, in every recorded case.

Method: golden cases with the counter generator and with the package's; an independent brute-force reading of the rule
on random losses, configurations and receipts; each stated decision alone, each comparison exactly at its threshold.
"""

import json
import math
import random
import statistics
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from tests.core.reference import unrolled

from flyball_server.core import rng
from flyball_server.core.episodes import candidate_name, phase, reward, trend
from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.aees import episode_log
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import APPLIED, Group, Observation

AEES = POLICIES["aees"]
TRACES = Path(__file__).parent.parent / "traces"
CASES = {
    name: case
    for file in ("default", "trend_phase")
    for name, case in json.loads((TRACES / "aees@1" / f"{file}.json").read_text()).items()
}
ONE_GROUP = (Group("all", 1e-3),)
CLOSING = ("episode_closed", "episode_stale", "episode_aborted_nonfinite")


def config_of(**parameters):
    return AEES.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()})


def run(config, losses, groups=ONE_GROUP, seed=0):
    """All decisions, the first one included. A loss may be an Observation."""
    state, decision = AEES.init(config, groups, seed)
    decisions = [decision]
    for step, loss in enumerate(losses):
        state, decision = AEES.step(config, state, loss if isinstance(loss, Observation) else Observation(step, loss))
        decisions.append(decision)
    return state, decisions


def closings(decisions):
    return [decision.fields for decision in decisions if decision.code in CLOSING]


def codes(decisions):
    return [decision.code for decision in decisions[1:]]


@pytest.mark.parametrize("name", CASES)
def test_a_golden_case_is_met_at_every_step(name):
    case = CASES[name]
    assert case["every"] == 1
    # The package has no rule for unusable losses, so its cases end where one occurs.
    end = min(case["n"], case["comparable_until"]) if case["mode"] == "native" else case["n"]
    config = config_of(**case["config"])
    lines = (TRACES / f"{case['trace']}.jsonl").read_text().splitlines()[:end]
    state, decisions = run(config, [Observation(**json.loads(line)) for line in lines])
    candidates, expected = unrolled(case["candidate"], case["n"]), unrolled(case["decision"], case["n"])
    assert codes(decisions) == expected[:end]
    for step, (before, multiplier) in enumerate(zip(decisions[:-1], candidates, strict=False)):
        seen = before.fields
        assert [seen["lr_multiplier"], seen["noise_std"], seen["episode"]] == multiplier, step
        assert before.lr == (1e-3 * multiplier[0],)
        assert before.noise_std == (None if config.noise_candidates == (0.0,) else (multiplier[1],))
        assert (before.phase, before.momentum) == ("episode", None)
    last = AEES.finish(config, state)
    log = episode_log(closings([*decisions, last] if last else decisions))
    for key, values in case["episodes"].items():
        if isinstance(values[0], float):
            assert log[key] == pytest.approx(values, rel=1e-8, abs=1e-8), key
        else:
            assert log[key] == values, key
    assert len(log["episode_rewards"]) == len(case["episodes"]["episode_rewards"])


# The rule a second time, after the prose: whole lists, dictionaries, everything worked out anew each time.


class BruteForce:
    """Every episode as a record; a controller is the list of all its (bucket, arm, reward)."""

    def __init__(self, c, seed):
        self.c, self.seed = c, seed
        self.told = {}  # controller -> [(bucket, arm, reward)]
        self.born = {}  # (controller, bucket) -> how many had been told when the bucket was first used
        self.ends, self.candidates, self.records, self.codes = [], [], [], []
        self.bad = 0
        self.open(0)

    def knowledge(self, who, bucket):
        """Counts, reward sums, plays and sum of squares, from the whole history."""
        told = self.told.setdefault(who, [])
        if bucket is not None:
            born = self.born.setdefault((who, bucket), len(told))
            told = told[:born] + [one for one in told[born:] if one[0] == bucket]
        n = len(self.c.lr_candidates if who == "lr" else self.c.noise_candidates)
        weights = [self.c.discount ** (len(told) - 1 - i) for i in range(len(told))]
        counts = [sum(w for w, one in zip(weights, told, strict=True) if one[1] == a) for a in range(n)]
        sums = [sum(w * one[2] for w, one in zip(weights, told, strict=True) if one[1] == a) for a in range(n)]
        plays = [sum(one[1] == a for one in told) for a in range(n)]
        return counts, sums, plays, sum(w * one[2] ** 2 for w, one in zip(weights, told, strict=True))

    def select(self, who, n, stream, start, bucket, order):
        if n == 1:
            return 0
        if self.c.control_mode == "random":
            return rng.choice(n, self.seed, stream, start)
        counts, sums, plays, squares = self.knowledge(who, bucket)
        if bucket is not None:
            stream += (order.index(bucket) + 1) * 2**16
        if [p for p in plays if p < self.c.warmup_rounds]:
            tied = [a for a in range(n) if plays[a] == min(plays)]
        else:
            coef, total = self.c.exploration_coef, sum(counts)
            if self.c.bonus_scale == "reward_std":
                spread = math.sqrt(max(squares / total - (sum(sums) / total) ** 2, 0)) if total else 0
                coef *= max(spread, 1e-6)
            known = [max(count, 1e-12) for count in counts]
            score = [sums[a] / known[a] + coef * math.sqrt(math.log(total + 1) / known[a]) for a in range(n)]
            tied = [a for a in range(n) if abs(score[a] - max(score)) <= 1e-12]
        return tied[rng.choice(len(tied), self.seed, stream, start)]

    def context(self, start):
        trends = ["improving", "stable", "worsening"]
        if self.c.context_mode == "none":
            return None, []
        k, name = self.ends[-self.c.context_trend_window :], "stable"
        if len(k) >= 2:
            d = (k[-1] - k[0]) / (len(k) - 1)
            name = trends[0] if d < -self.c.context_trend_epsilon else name
            name = trends[2] if d > self.c.context_trend_epsilon else name
        if self.c.context_mode == "trend":
            return name, trends
        third = min(int(3 * min(start / self.c.total_training_steps, 1)), 2)
        phases = ["early", "middle", "late"]
        return f"{phases[third]}_{name}", [f"{p}_{t}" for p in phases for t in trends]

    def open(self, start):
        bucket, order = self.context(start)
        lrs, noises = self.c.lr_candidates, self.c.noise_candidates
        i = self.select("lr", len(lrs), 0x100, start, bucket, order)
        own = i if self.c.structured_control_mode == "conditional" and len(lrs) > 1 else 0
        j = self.select(("noise", own), len(noises), 0x200 + own, start, bucket, order)
        chosen, before = (lrs[i], noises[j]), self.candidates[-1] if self.candidates else None
        self.since = start - 1 if chosen != before else self.since
        self.now = {"bucket": bucket, "i": i, "j": j, "own": own, "start": start, "xs": [], "used": 0}
        self.candidates.append(chosen)

    def tell(self, value):
        for who, arm in (("lr", self.now["i"]), (("noise", self.now["own"]), self.now["j"])):
            self.told.setdefault(who, []).append((self.now["bucket"], arm, value))

    def reward(self):
        xs, eps = self.now["xs"], self.c.reward_epsilon
        a, n = self.c.ema_alpha, len(xs)
        end = (1 - a) ** (n - 1) * xs[0] + sum(a * (1 - a) ** (n - 1 - k) * xs[k] for k in range(1, n))
        if xs[0] + eps > 0 and end + eps > 0:
            base = math.log((xs[0] + eps) / (end + eps))
        else:
            base = 2 * (xs[0] - end) / (abs(xs[0]) + abs(end) + eps)
        spread = statistics.pvariance(xs) / (statistics.fmean(xs) ** 2 + eps)
        value = base - self.c.reward_instability_lambda * spread
        return sorted((self.c.reward_clip_min, value, self.c.reward_clip_max))[1]

    def observe(self, step, loss, applied):
        if loss is None:
            self.codes.append("no_loss")
        elif not abs(loss) <= 1e100:
            self.bad += 1
            if self.bad % self.c.bad_limit:
                self.codes.append("nonfinite_hold")
                return
            self.codes.append("episode_aborted_nonfinite")
            self.tell(self.c.reward_clip_min)
            self.open(step + 1)
        else:
            self.bad = 0
            self.now["xs"].append(loss)
            self.now["used"] += applied is None or applied >= self.since
            if len(self.now["xs"]) < self.c.episode_length:
                self.codes.append("in_episode")
                return
            enough = self.now["used"] >= math.ceil(round(self.c.applied_share * self.c.episode_length, 9))
            self.codes.append("episode_closed" if enough or not self.c.guard else "episode_stale")
            if self.codes[-1] == "episode_closed":
                self.records.append((self.now["i"], self.now["j"], self.now["bucket"], self.reward()))
                self.tell(self.reward())
            self.ends.append(loss)
            self.open(step + 1)


def any_config(chance):
    return AEES.config(
        lr_candidates=chance.choice([(1.0,), (0.5, 2.0), (0.5, 1.0, 2.0)]),
        noise_candidates=chance.choice([(0.0,), (0.01,), (0.0, 0.01), (0.0, 0.005, 0.01)]),
        episode_length=chance.choice([1, 2, 5, 33]),
        control_mode=chance.choice(["adaptive", "adaptive", "adaptive", "random"]),
        structured_control_mode=chance.choice(["independent", "conditional"]),
        context_mode=chance.choice(["none", "trend", "trend_phase"]),
        total_training_steps=1000,
        context_trend_window=chance.choice([1, 2, 3, 5]),
        context_trend_epsilon=chance.choice([0.0, 1e-3, 0.1]),
        version=chance.choice(["0.1", "0.3"]),
        reward_clip_min=chance.choice([-1.0, -0.05]),
        reward_clip_max=chance.choice([1.0, 0.02]),
        ema_alpha=chance.choice([0.1, 0.5, 1.0]),
        exploration_coef=chance.choice([0.0, 0.1, 1.0]),
        bonus_scale=chance.choice(["none", "reward_std"]),
        discount=chance.choice([0.5, 0.95, 1.0]),
        warmup_rounds=chance.choice([0, 1, 2]),
        bad_limit=chance.choice([1, 3]),
        applied_share=chance.choice([0.0, 0.5, 0.8, 1.0]),
        guard=chance.choice([True, True, False]),
    )


@pytest.mark.parametrize("trial", range(60))
def test_the_rule_agrees_with_a_brute_force_reading_of_it(trial):
    chance = random.Random(trial)
    config, seed, step, level = any_config(chance), chance.choice([0, 7, -3]), 0, chance.choice([2.0, 0.05, -1.0])
    state, decision = AEES.init(config, ONE_GROUP, seed)
    expected, got, bad = BruteForce(config, seed), [], 0
    for _ in range(500):
        level *= math.exp(chance.gauss(-1e-3, 0.02))
        loss = level + abs(level) * chance.gauss(0, 0.1)
        bad = bad - 1 if bad else chance.randrange(1, 8) if chance.random() < 0.01 else 0
        loss = chance.choice([math.nan, math.inf, -1e101]) if bad else None if chance.random() < 0.02 else loss
        applied = chance.choice([None, step - 1, step - 1, step - 1, step - chance.randrange(1, 9)])
        state, decision = AEES.step(config, state, Observation(step, loss, applied=applied))
        expected.observe(step, loss, applied)
        assert decision.code == expected.codes[-1], step
        seen = decision.fields
        assert (seen["lr_multiplier"], seen["noise_std"]) == expected.candidates[-1], step
        assert seen.get("bucket") == expected.now["bucket"], step
        assert seen["episode"] == len(expected.candidates) - 1
        if decision.code in CLOSING:
            got.append(seen)
            audited = [value for key, value in sorted(seen.items()) if key in ("lr_counts", "lr_sums")]
            if audited and config.control_mode == "adaptive":
                counts, sums, _, _ = expected.knowledge("lr", seen.get("closed_bucket"))
                assert audited == [pytest.approx(counts, abs=1e-9), pytest.approx(sums, abs=1e-9)]
        step += chance.choice([1, 1, 1, 2, 5])
    log = episode_log(got)
    assert log["selected_lr_indices"] == [i for i, _, _, _ in expected.records]
    assert log["selected_noise_indices"] == [j for _, j, _, _ in expected.records]
    assert log["episode_rewards"] == pytest.approx([r for _, _, _, r in expected.records], rel=1e-9, abs=1e-9)
    if config.context_mode != "none" and expected.records:
        assert log["context_buckets"] == [bucket for _, _, bucket, _ in expected.records]


# Each decision and each edge alone.

THREE = {"lr_candidates": (0.5, 1.0, 2.0), "noise_candidates": (0.0, 0.25), "episode_length": 2}


def test_the_defaults_are_those_of_the_package():
    assert {entry.name: getattr(AEES.config(), entry.name) for entry in fields(AEES.config)} == {
        "lr_candidates": (1.0,), "noise_candidates": (0.0,), "episode_length": 100, "control_mode": "adaptive",
        "structured_control_mode": "independent", "context_mode": "none", "total_training_steps": None,
        "context_trend_window": 3, "context_trend_epsilon": 1e-3, "version": "0.1", "reward_instability_lambda": 0.1,
        "reward_epsilon": 1e-8, "reward_clip_min": -1.0, "reward_clip_max": 1.0, "ema_alpha": 0.1,
        "exploration_coef": 1.0, "bonus_scale": "none", "discount": 0.95, "warmup_rounds": 1, "rng": "counter",
        "seed": None, "bad_limit": 3, "applied_share": 0.8, "guard": True,
    }  # fmt: skip
    assert AEES.config(version="0.3").reward_instability_lambda == 0.0
    assert AEES.config(version="0.3", reward_instability_lambda=0.2).reward_instability_lambda == 0.2
    assert AEES.config(rng="native").rng == "pulseopt"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lr_candidates": ()}, "^lr_candidates: 0 values are no choice; give 1 to 100$"),
        ({"noise_candidates": ()}, "^noise_candidates: 0 values are no choice; give 1 to 100$"),
        ({"lr_candidates": tuple(map(float, range(1, 102)))}, "lr_candidates: 101 values .* give 1 to 100"),
        ({"lr_candidates": (1.0, 0.0)}, r"^lr_candidates: \(1.0, 0.0\) is out of range; give factors greater than 0$"),
        ({"lr_candidates": (1.0, 2.0, 1)}, r"^lr_candidates: \(1.0, 2.0, 1\) holds a value twice; give each once$"),
        ({"noise_candidates": (0.0, 0.0)}, "noise_candidates: .* twice"),
        ({"noise_candidates": (0.0, -0.1)}, "noise_candidates: .* at least 0"),
        ({"episode_length": 0}, "episode_length: 0 .* at least 1"),
        ({"episode_length": 10_001}, "episode_length: 10001 .* at most 10000"),
        (
            {"context_mode": "trend_phase"},
            "^total_training_steps: None is not enough for context_mode='trend_phase'; give the length of the run$",
        ),
        ({"total_training_steps": 0}, "total_training_steps: 0 .* at least 1"),
        ({"context_trend_window": 0}, "context_trend_window: 0 .* at least 1"),
        ({"context_trend_window": 10_001}, "context_trend_window: 10001 .* at most 10000"),
        ({"context_trend_epsilon": -1e-9}, "context_trend_epsilon: .* at least 0"),
        ({"reward_instability_lambda": -1.0}, "reward_instability_lambda: .* at least 0"),
        ({"reward_instability_lambda": 2e6}, "reward_instability_lambda: .* at most 1"),
        ({"reward_epsilon": 0.0}, "reward_epsilon: 0.0 .* greater than 0"),
        (
            {"reward_clip_min": 0.5, "reward_clip_max": 0.25},
            "^reward_clip_min: 0.5 is above reward_clip_max = 0.25; give reward_clip_min <= reward_clip_max$",
        ),
        ({"reward_clip_min": -2e6}, "reward_clip_min: .* at least -1"),
        ({"reward_clip_max": 2e6}, "reward_clip_max: .* at most 1"),
        ({"ema_alpha": 0.0}, "ema_alpha: 0.0 .* greater than 0"),
        ({"ema_alpha": 1.1}, "ema_alpha: 1.1 .* at most 1"),
        ({"exploration_coef": -1.0}, "exploration_coef: .* at least 0"),
        ({"discount": 0.0}, "discount: 0.0 .* greater than 0"),
        ({"discount": 1.1}, "discount: 1.1 .* at most 1"),
        ({"warmup_rounds": -1}, "warmup_rounds: -1 .* at least 0"),
        ({"bad_limit": 0}, "bad_limit: 0 .* at least 1"),
        ({"applied_share": 1.5}, "applied_share: 1.5 .* at most 1"),
        ({"applied_share": -0.5}, "applied_share: -0.5 .* at least 0"),
        ({"rng": "mersenne"}, "rng: 'mersenne'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_the_remedy(parameters, words):
    with pytest.raises(ValueError, match=words):
        AEES.config(**parameters)


def test_limits_themselves_are_allowed():
    AEES.config(lr_candidates=tuple(map(float, range(1, 101))), episode_length=10_000, context_trend_window=10_000)
    AEES.config(reward_clip_min=0.5, reward_clip_max=0.5, ema_alpha=1.0, discount=1.0, applied_share=1.0)
    AEES.config(noise_candidates=(0.0,), exploration_coef=0.0, warmup_rounds=0, applied_share=0.0, bad_limit=1)
    assert len(run(AEES.config(), [])[1]) == 1


def test_a_candidate_multiplies_the_rate_of_every_group_and_a_frozen_group_stays_frozen():
    groups = (Group("body", 1e-3, 0.9), Group("frozen", 0.0), Group("head", 3e-2, None, (0.9, 0.999)))
    for decision in run(AEES.config(**THREE), [1.0] * 40, groups)[1]:
        m = decision.fields["lr_multiplier"]
        assert decision.lr == (1e-3 * m, 0.0, 3e-2 * m)
        assert decision.noise_std == (decision.fields["noise_std"],) * 3
        assert decision.momentum is None
    huge = run(AEES.config(lr_candidates=(1e300,)), [], (Group("all", 1e50), Group("frozen", 0.0)))[1][0]
    assert huge.lr == (1e100, 0.0)


def test_noise_is_left_alone_only_where_the_one_candidate_is_zero():
    assert run(AEES.config(), [])[1][0].noise_std is None
    assert run(AEES.config(noise_candidates=(0.25,)), [])[1][0].noise_std == (0.25,)
    assert run(AEES.config(noise_candidates=(0.0, 0.25), seed=0), [])[1][0].noise_std in ((0.0,), (0.25,))


#: Everything at once; a reward of exact parts but for the logarithm.
FULL = {
    "lr_candidates": (0.5, 2.0), "noise_candidates": (0.0, 0.25), "episode_length": 2, "context_mode": "trend",
    "structured_control_mode": "conditional", "bad_limit": 2, "ema_alpha": 0.5, "reward_epsilon": 0.5,
    "context_trend_window": 2, "discount": 0.5,
}  # fmt: skip
SEEN = (
    Observation(0, 4.0, update_norm=2.0, applied=-1), Observation(1, 2.0, update_norm=3.0, applied=0),
    Observation(3, 2.0, update_norm=1.0, applied=2), Observation(4, math.nan), Observation(5, math.inf),
    Observation(6, 2.0, applied=5), Observation(7, 2.0, applied=4), Observation(8, -1.0, applied=5),
)  # fmt: skip
NOTHING = [[0.0, 0.0], [0.0, 0.0], [0, 0], 0, 0.0, None]


def context(arms, visits=0, total=0.0, chosen=(), opened=True):
    """A controller that only ever was in the second of three contexts, where it learnt all it knows."""
    return [arms, [None, arms if opened else None, None], [0, visits, 0], [0.0, total, 0.0], [[], list(chosen), []]]


def test_a_run_through_every_code_has_these_states_and_sentences():
    r = math.log(4.5) - math.log(3.5) - 0.1 * (1.0 / 9.5)
    blank = context(NOTHING, opened=False)
    once = [[0.0, 1.0], [0.0, r], [0, 1], 1, r * r, None]
    clean = [[1.0, 0.0], [r, 0.0], [1, 0], 1, r * r, None]
    twice = [[1.0, 0.5], [-1.0, r / 2], [1, 1], 2, r * r / 2 + 1, None]
    worst = [[0.0, 1.0], [0.0, -1.0], [0, 1], 1, 1.0, None]
    start = [context(NOTHING, chosen=[1]), blank, context(NOTHING, chosen=[0])]
    later = [context(once, 1, r, [1, 0]), context(NOTHING, chosen=[1]), context(clean, 1, r, [0])]
    last = [context(twice, 2, r - 1, [1, 0]), context(worst, 1, -1.0, [1]), context(clean, 1, r, [0, 1])]
    low, high = [[0.5, 2.0], [0.25, 0.25]], [[2.0, 8.0], [0.25, 0.25]]
    first, second = [0, 1, 0, 2.0, 0.0, "lr2_n0", "stable", 0, -1], [1, 0, 1, 0.5, 0.25, "lr0p5_n0p25", "stable", 2, 1]
    third, fourth = ([n, 1, 1, 2.0, 0.25, "lr2_n0p25", "stable", at, 5] for n, at in ((2, 6), (3, 8)))
    bad = "The loss is not a usable number (1 in a row): nothing counts, the episode goes on."
    table = (
        ([[], [4.0], 1, 2.0, 1, 1, 0, 0, [2.0, 8.0], [0.0, 0.0], first], start, [], "in_episode", False,
         "Episode 0 goes on with lr2_n0."),
        ([[], [], 2, 0.0, 0, 0, 1, 0, *low, second], later, [2.0], "episode_closed", True,
         "Episode 0 (lr2_n0) took the loss from 4 to 3 (smoothed): reward 0.2408. "
         "From here on lr0p5_n0p25: learning rate x 0.5, noise 0.25."),
        ([[], [2.0], 1, 1.0, 1, 1, 3, 0, *low, second], later, [2.0], "in_episode", False,
         "Episode 1 goes on with lr0p5_n0p25."),
        ([[], [2.0], 1, 1.0, 1, 1, 3, 1, *low, second], later, [2.0], "nonfinite_hold", False, bad),
        ([[], [], 2, 0.0, 0, 0, 3, 2, *high, third], last, [2.0], "episode_aborted_nonfinite", True,
         "Episode 1 (lr0p5_n0p25) ends at 2 unusable losses in a row: reward -1. "
         "From here on lr2_n0p25: learning rate x 2, noise 0.25."),
        ([[], [2.0], 1, 0.0, 0, 1, 6, 0, *high, third], last, [2.0], "in_episode", False,
         "Episode 2 goes on with lr2_n0p25."),
        ([[], [], 2, 0.0, 0, 0, 7, 0, *high, fourth], last, [2.0, 2.0], "episode_stale", True,
         "Episode 2 (lr2_n0p25) counts for nothing: only 1 of its 2 steps ran with its candidate. "
         "From here on lr2_n0p25: learning rate x 2, noise 0.25."),
        ([[], [-1.0], 1, 0.0, 0, 1, 8, 0, *high, fourth], last, [2.0, 2.0], "in_episode", False,
         "Episode 3 goes on with lr2_n0p25."),
    )  # fmt: skip
    config, base = AEES.config(**FULL), [1.0, 4.0]
    state, decision = AEES.init(config, (Group("a", 1.0), Group("b", 4.0)), 5)
    assert dump_state(state) == [
        [], [], 2, 0.0, 0, 0, -1, 0, [2.0, 8.0], [0.0, 0.0], first, [5, base, [], start]
    ]  # fmt: skip
    assert AEES.explain(config, decision) == "Episode 0 begins. From here on lr2_n0: learning rate x 2, noise 0."
    assert (decision.phase, decision.milestone) == ("episode", False)
    for seen, (expected, controllers, ends, code, milestone, text) in zip(SEEN, table, strict=True):
        state, decision = AEES.step(config, state, seen)
        *plain, memory = dump_state(state)
        assert plain == expected, seen
        assert memory[:3] == [5, base, ends]
        assert rounded(memory[3]) == rounded(controllers), seen
        assert decision[:5] == (state.lr, None, state.noise, "episode", code)
        assert decision.milestone is milestone
        assert AEES.explain(config, decision) == text
    ended = AEES.finish(config, state)
    assert ended[:5] == (state.lr, None, state.noise, "episode", "episode_closed")
    assert AEES.explain(config, ended) == "Episode 3 (lr2_n0p25) took the loss from -1 to -1 (smoothed): reward 0."


def rounded(value):
    """Nested lists with every float to twelve places."""
    return [rounded(one) for one in value] if isinstance(value, list) else round(value, 12) if value else value


def test_in_any_state_an_unusable_loss_adds_one_to_its_row_and_touches_nothing_else():
    config = AEES.config(**FULL | {"bad_limit": 9})
    state, _ = AEES.init(config, ONE_GROUP, 5)
    for seen in (one for one in SEEN if math.isfinite(one.loss)):
        state, before = AEES.step(config, state, seen)
        after, decision = AEES.step(config, state, Observation(99, math.nan, update_norm=1.0, applied=98))
        assert after == state._replace(bad_run=1)
        assert decision[:5] == (before.lr, None, before.noise_std, "episode", "nonfinite_hold")
        assert set(decision.fields) == {*("episode", "lr_index", "noise_index", "lr_multiplier"), "noise_std",
                                        "candidate", "bucket", "bad_run"}  # fmt: skip
        after, decision = AEES.step(config, after, Observation(99, None))
        assert after.bad_run == 1
        assert decision[:5] == (before.lr, None, before.noise_std, "episode", "no_loss")
        assert decision.fields["episode"] == before.fields["episode"]
        assert AEES.explain(config, decision) == "No loss was measured: nothing counts."


def test_a_closing_decision_tells_all_of_the_episode_and_what_is_known_by_then():
    config = AEES.config(**FULL)
    decisions = run(config, SEEN, seed=5)[1]
    closed, aborted, stale = closings(decisions)
    r = closed["reward"]
    assert r == pytest.approx(math.log(4.5 / 3.5) - 0.1 / 9.5, rel=1e-14)
    known = {
        "closed_episode": 1, "closed_lr_index": 0, "closed_noise_index": 1, "closed_lr_multiplier": 0.5,
        "closed_noise_std": 0.25, "closed_candidate": "lr0p5_n0p25", "closed_bucket": "stable", "start_step": 2,
        "end_step": 2, "last_step": 3, "losses": 1, "used": 1, "start_loss": 2.0, "end_loss": 2.0,
        "mean_update_norm": 1.0, "outcome": "aborted", "bad_run": 2, "reward": -1.0,
        "lr_updates": 2, "lr_counts": [1.0, 0.5], "lr_sums": [-1.0, r / 2], "lr_prior_counts": [1.0, 0.5],
        "lr_prior_sums": [-1.0, r / 2], "lr_bucket_visits": [0, 2, 0], "lr_bucket_reward_sums": [0.0, r - 1, 0.0],
        "lr_bucket_distinct_arms": [0, 2, 0], "noise_updates": 1, "noise_counts": [0.0, 1.0],
        "noise_sums": [0.0, -1.0], "noise_prior_counts": [0.0, 1.0], "noise_prior_sums": [0.0, -1.0],
        "noise_bucket_visits": [0, 1, 0], "noise_bucket_reward_sums": [0.0, -1.0, 0.0],
        "noise_bucket_distinct_arms": [0, 1, 0],
    }  # fmt: skip
    opened = {
        "episode": 2, "lr_index": 1, "noise_index": 1, "lr_multiplier": 2.0, "noise_std": 0.25,
        "candidate": "lr2_n0p25", "bucket": "stable", "lr_tie": [1], "lr_u": rng.uniform(5, 0x100 + 2 * 65536, 6),
        "noise_scores": None, "noise_tie": [1], "noise_u": rng.uniform(5, 0x201 + 2 * 65536, 6),
    }  # fmt: skip
    scores = aborted.pop("lr_scores")
    assert scores == pytest.approx(
        [-1 + math.sqrt(math.log(2.5)), r + math.sqrt(math.log(2.5) / 0.5)], rel=1e-12
    )  # fmt: skip
    assert aborted == known | opened
    assert (closed["mean_update_norm"], closed["used"], stale["used"], stale["reward"]) == (2.5, 2, 1, 0.0)
    assert list(closed)[-6:] == ["lr_scores", "lr_tie", "lr_u", "noise_scores", "noise_tie", "noise_u"]
    assert episode_log(closings(decisions)) == {
        "selected_lr_indices": [1], "selected_noise_indices": [0], "selected_lr_values": [2.0],
        "selected_noise_values": [0.0], "selected_combined_names": ["lr2_n0"], "episode_rewards": [r],
        "episode_start_steps": [0], "episode_end_steps": [1], "episode_start_losses": [4.0],
        "episode_end_losses": [2.0], "episode_ema_loss_starts": [4.0], "episode_ema_loss_ends": [3.0],
        "reward_base": [closed["reward_base"]], "reward_instability": [pytest.approx(1 / 9.5, rel=1e-14)],
        "reward_penalty": [pytest.approx(0.1 / 9.5, rel=1e-14)], "reward_final_unclipped": [r],
        "reward_final_clipped": [r], "mean_update_norms": [2.5], "context_buckets": ["stable"],
        "context_bucket_ids": ["stable"], "context_bucket_names": ["stable"], "context_trends": ["stable"],
        "context_phases": [None],
    }  # fmt: skip


def test_at_random_a_controller_has_no_contexts_and_without_a_choice_there_is_none():
    random_one = AEES.config(**FULL | {"control_mode": "random"})
    assert dump_state(AEES.init(random_one, ONE_GROUP, 5)[0])[-1][3] == [NOTHING] * 3
    assert AEES.init(AEES.config(lr_candidates=(0.5, 2.0)), ONE_GROUP, 5)[0].memory[3][1] is None
    assert AEES.init(AEES.config(noise_candidates=(0.0, 1.0)), ONE_GROUP, 5)[0].memory[3][0] is None
    negative = AEES.init(AEES.config(), (Group("a", -1.0), Group("b", 1.0)), 5)[1]
    assert negative.lr == (0.0, 1.0)


def test_what_did_not_change_is_the_same_object():
    decisions = run(AEES.config(**THREE), [1.0 + i % 3 for i in range(400)])[1]
    pairs = list(pairwise(decisions))
    for before, after in pairs:
        assert (after.lr is before.lr) == (after.lr == before.lr)
        assert (after.noise_std is before.noise_std) == (after.noise_std == before.noise_std)
    assert any(a.lr is b.lr and a.noise_std is not b.noise_std for a, b in pairs)
    assert any(a.lr is not b.lr and a.noise_std is b.noise_std for a, b in pairs)


def test_the_answer_to_the_last_loss_of_an_episode_carries_the_next_candidate():
    decisions = run(AEES.config(**THREE), [4.0, 2.0, 2.0])[1]
    assert codes(decisions) == ["in_episode", "episode_closed", "in_episode"]
    assert [d.fields["episode"] for d in decisions] == [0, 0, 1, 1]
    assert [d.milestone for d in decisions] == [False, False, True, False]
    first, closed = decisions[0], decisions[2].fields
    assert (first.code, first.phase) == ("episode_open", "episode")
    assert set(decisions[1].fields) == {
        "episode", "lr_index", "noise_index", "lr_multiplier", "noise_std", "candidate",
    }  # fmt: skip
    for key in ("episode", "lr_index", "noise_index", "lr_multiplier", "noise_std", "candidate"):
        assert closed[f"closed_{key}"] == first.fields[key], key
    assert (closed["start_step"], closed["end_step"], closed["last_step"], closed["losses"]) == (0, 1, 1, 2)
    assert (closed["start_loss"], closed["end_loss"], closed["ema_loss_start"]) == (4.0, 2.0, 4.0)
    assert closed["ema_loss_end"] == pytest.approx(3.8)
    assert closed["reward_base"] == pytest.approx(math.log(4 / 3.8))
    assert closed["reward_instability"] == pytest.approx(1 / 9)
    assert closed["reward_penalty"] == pytest.approx(0.1 / 9)
    assert closed["reward"] == closed["reward_final_clipped"] == closed["reward_final_unclipped"]
    assert closed["reward"] == pytest.approx(math.log(4 / 3.8) - 0.1 / 9)
    assert (closed["reward_fallback"], closed["outcome"], closed["mean_update_norm"]) == (False, "closed", None)
    arm = [0.0, 0.0, 0.0]
    arm[closed["closed_lr_index"]] = 1.0
    assert (closed["lr_counts"], closed["lr_updates"]) == (arm, 1)
    assert closed["lr_sums"] == [count * closed["reward"] for count in arm]
    assert closed["lr_tie"] == [a for a in range(3) if not arm[a]]
    assert closed["lr_scores"] is None
    assert closed["lr_u"] == rng.uniform(0, 0x100, 2)
    assert closed["noise_u"] == rng.uniform(0, 0x200, 2)


def test_once_warm_the_scores_are_told():
    decisions = run(AEES.config(lr_candidates=(0.5, 2.0), episode_length=1), [1.0, 1.0])[1]
    scores = decisions[-1].fields["lr_scores"]
    bonus = [math.sqrt(math.log(2.95) / count) for count in decisions[-1].fields["lr_counts"]]
    assert scores == pytest.approx(bonus)
    assert decisions[-1].fields["lr_tie"] == [scores.index(max(scores))]


def test_steps_with_gaps_are_counted_by_losses_and_the_true_last_step_is_told():
    seen = [Observation(step, None if step == 17 else 1.0) for step in (10, 17, 20, 31, 40)]
    decisions = run(AEES.config(**THREE), seen)[1]
    first, second = closings(decisions)
    assert codes(decisions)[1] == "no_loss"
    assert [first[key] for key in ("start_step", "end_step", "last_step")] == [0, 1, 20]
    assert [second[key] for key in ("start_step", "end_step", "last_step")] == [21, 22, 40]
    assert first["lr_u"] == rng.uniform(0, 0x100, 21)


def test_the_seed_is_the_run_s_unless_one_is_given():
    def arms(own, of_run):
        decisions = run(AEES.config(**THREE, seed=own), [1.0] * 200, seed=of_run)[1]
        return [fields["lr_index"] for fields in closings(decisions)]

    assert arms(None, 3) == arms(3, 8) != arms(None, 8)


def test_update_norms_are_averaged_over_the_usable_ones_of_the_episode():
    norms = [2.0, math.nan, None, 5.0, 1e101, 3.0, None, None, None, None]
    seen = [Observation(i, 1.0, update_norm=norm) for i, norm in enumerate(norms)]
    seen[3] = Observation(3, None, update_norm=5.0)  # without a loss nothing counts
    config = AEES.config(episode_length=4)
    state, decisions = run(config, seen)
    assert [fields["mean_update_norm"] for fields in closings(decisions)] == [2.0, 3.0]
    assert AEES.finish(config, state).fields["mean_update_norm"] is None


def test_update_norms_are_usable_up_to_1e100():
    config = AEES.config(episode_length=2)
    seen = [Observation(i, 1.0, update_norm=norm) for i, norm in enumerate((1e100, 1.1e100, -1e100, -1.1e100))]
    assert [fields["mean_update_norm"] for fields in closings(run(config, seen)[1])] == [1e100, -1e100]


def test_a_missing_loss_moves_nothing_and_does_not_end_a_row_of_unusable_ones():
    config = AEES.config(**THREE)
    state, _ = run(config, [1.0, math.nan])
    after, decision = AEES.step(config, state, Observation(2, None, 1.0, 1.0, 1.0))
    assert after is state
    assert decision.code == "no_loss"
    assert codes(run(config, [math.nan, None, math.inf, None, -math.inf])[1])[-1] == "episode_aborted_nonfinite"


def test_every_third_unusable_loss_in_a_row_drops_the_episode_at_the_worst_reward():
    config = AEES.config(**THREE, reward_clip_min=-0.5, context_mode="trend")
    bad = math.nan
    state, decisions = run(config, [1.0, 1.0, 1.0, bad, 1e101, -1e101, bad, 1.0, bad, bad, 1.0, 1.0])
    assert codes(decisions) == [
        "in_episode", "episode_closed", "in_episode", "nonfinite_hold", "nonfinite_hold", "episode_aborted_nonfinite",
        "nonfinite_hold", "in_episode", "nonfinite_hold", "nonfinite_hold", "episode_closed", "in_episode",
    ]  # fmt: skip
    assert [d.fields["bad_run"] for d in decisions if "bad_run" in d.fields] == [1, 2, 3, 4, 1, 2]
    assert not decisions[4].milestone
    aborted = decisions[6]
    assert aborted.milestone
    fields = aborted.fields
    assert (fields["outcome"], fields["reward"], fields["losses"]) == ("aborted", -0.5, 1)
    assert (fields["episode"], fields["closed_episode"], fields["start_step"]) == (2, 1, 2)
    assert fields["lr_sums"][fields["closed_lr_index"]] == pytest.approx(-0.5)
    assert fields["noise_sums"][fields["closed_noise_index"]] == pytest.approx(-0.5)
    assert len(episode_log(closings(decisions))["episode_rewards"]) == 2
    json.dumps(dump_state(state), allow_nan=False)
    at_once = run(AEES.config(**THREE, bad_limit=1), [bad] * 3)[1]
    assert codes(at_once) == ["episode_aborted_nonfinite"] * 3
    keys = ("losses", "start_loss", "end_loss", "last_step")
    assert [at_once[1].fields[key] for key in keys] == [0, None, None, None]
    assert [d.fields["episode"] for d in at_once] == [0, 1, 2, 3]
    assert codes(run(AEES.config(**THREE, guard=False), [bad] * 3)[1])[-1] == "episode_aborted_nonfinite"


def test_the_largest_usable_loss_is_1e100():
    config = AEES.config(**THREE)
    assert codes(run(config, [1e100, -1e100, 1.0000001e100, -1.0000001e100])[1]) == [
        "in_episode", "episode_closed", "nonfinite_hold", "nonfinite_hold",
    ]  # fmt: skip


def test_an_aborted_episode_is_not_in_the_trend_but_a_stale_one_is():
    config = AEES.config(lr_candidates=(0.5, 2.0), episode_length=2, context_mode="trend", bad_limit=1)
    decisions = run(config, [4.0, 4.0, 1.0, math.nan])[1]
    assert decisions[-1].fields["bucket"] == "stable"
    seen = [Observation(i, loss, applied=i - 1) for i, loss in enumerate([4.0, 4.0, 1.0, 1.0])]
    late = [*seen[:2], *[one._replace(applied=-1) for one in seen[2:]]]
    decisions = run(config, late)[1]
    assert decisions[-1].code == "episode_stale"
    assert decisions[-1].fields["bucket"] == "improving"


def stale_run(applied, **parameters):
    """Two arms, so that warm-up makes the second episode differ from the first; `applied` is the second's."""
    n = len(applied)
    config = AEES.config(lr_candidates=(0.5, 2.0), episode_length=n, **parameters)
    seen = [Observation(i, 2.0 ** -(i % n)) for i in range(n)]
    seen += [Observation(n + i, 2.0 ** -(i % n), applied=step) for i, step in enumerate(applied)]
    return config, run(config, seen)[1]


def test_an_episode_whose_steps_ran_with_something_else_teaches_nothing():
    config, decisions = stale_run([8, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    assert AEES.reads(config) == frozenset({APPLIED})
    first, second = closings(decisions)
    assert (first["used"], second["used"], second["losses"]) == (10, 8, 10)
    assert decisions[-1].code == "episode_closed"  # eight of ten, exactly the share
    _, decisions = stale_run([8, 8, 8, 10, 11, 12, 13, 14, 15, 16])
    last = decisions[-1]
    assert (last.code, last.milestone, last.fields["outcome"]) == ("episode_stale", True, "stale")
    assert last.fields["used"] == 7
    assert last.fields["lr_counts"] == closings(decisions)[0]["lr_counts"]
    assert last.fields["lr_updates"] == 1
    assert last.fields["lr_index"] == last.fields["closed_lr_index"]  # still in warm-up: it is due again
    assert len(episode_log(closings(decisions))["episode_rewards"]) == 1


def test_unknown_receipts_count_and_without_the_guard_everything_does():
    assert stale_run([None] * 8 + [0, 0])[1][-1].code == "episode_closed"
    config, decisions = stale_run([0] * 10, guard=False)
    assert AEES.reads(config) == frozenset()
    assert (decisions[-1].code, decisions[-1].fields["used"]) == ("episode_closed", 0)
    assert stale_run([0, 0, 3, 3], applied_share=0.5)[1][-1].code == "episode_closed"
    assert stale_run([0, 0, 2, 3], applied_share=0.5)[1][-1].code == "episode_stale"


def test_the_share_is_met_exactly_whatever_the_length():
    for n in (5, 15, 35, 70, 95, 1000):
        enough = n * 4 // 5
        for used, code in ((enough, "episode_closed"), (enough - 1, "episode_stale")):
            assert stale_run([n - 1] * used + [n - 2] * (n - used))[1][-1].code == code, n


def test_a_candidate_that_stays_was_decided_when_it_came():
    config = AEES.config(episode_length=2)  # a single candidate: whatever was applied, it was this
    seen = [Observation(i, 1.0, applied=-1) for i in range(8)]
    assert set(codes(run(config, seen)[1])) == {"in_episode", "episode_closed"}
    two = AEES.config(lr_candidates=(0.5, 2.0), episode_length=1, applied_share=1.0)
    seen = [Observation(0, 1.0), Observation(1, 1.0, applied=-1), Observation(2, 1.0, applied=0)]
    stale, closed = run(two, seen)[1][2:]
    assert (stale.code, stale.fields["episode"], stale.lr) == ("episode_stale", 2, run(two, seen)[1][1].lr)
    assert closed.code == "episode_closed"


def test_a_run_that_ends_within_an_episode_is_told_of_it_and_learns_nothing():
    config = AEES.config(**THREE, context_mode="trend")
    state, decisions = run(config, [4.0, 2.0])
    assert AEES.finish(config, state) is None
    state, decisions = run(config, [4.0, 2.0, 3.0])
    before = dump_state(state)
    last = AEES.finish(config, load_state(AEES, json.loads(json.dumps(before))))
    assert (last.code, last.fields["final"], last.fields["outcome"]) == ("episode_closed", True, "closed")
    assert last.lr == decisions[-1].lr
    assert last.milestone
    assert [last.fields[key] for key in ("start_step", "end_step", "losses", "reward_base")] == [2, 2, 1, 0.0]
    assert last.fields["episode"] == last.fields["closed_episode"] == 1
    assert last.fields["lr_updates"] == 1
    assert "lr_tie" not in last.fields
    assert dump_state(state) == before
    assert AEES.explain(config, last).endswith("reward 0.")
    full = AEES.config(episode_length=40)
    assert AEES.finish(full, run(full, [1.0] * 32)[0]).fields["losses"] == 32


def test_a_run_that_ends_within_a_stale_episode_is_told_so():
    config, _ = stale_run([8] * 10)
    state, _ = run(config, [Observation(i, 1.0, applied=i - 1 if i < 10 else 0) for i in range(12)])
    assert AEES.finish(config, state).code == "episode_stale"


def test_with_a_context_bandits_learn_apart_and_together():
    losses = [8.0, 7.0, 6.0, 5.0, 5.0, 5.0, 5.0, 9.0, 9.5, 12.0]
    config = AEES.config(lr_candidates=(0.5, 2.0), episode_length=1, context_mode="trend")
    rows = closings(run(config, losses)[1])
    assert [row["closed_bucket"] for row in rows] == [
        "stable", "stable", "improving", "improving", "improving", "improving", "stable", "stable", "worsening",
        "worsening",
    ]  # fmt: skip
    assert rows[-1]["lr_bucket_visits"] == [4, 4, 2]
    assert rows[-1]["lr_bucket_reward_sums"] == [0.0] * 3
    assert rows[1]["lr_bucket_distinct_arms"] == [0, 2, 0]
    assert sum(rows[-1]["lr_prior_counts"]) == pytest.approx(sum(0.95**k for k in range(10)))
    assert sum(rows[-1]["lr_counts"]) == pytest.approx(sum(0.95**k for k in range(10)))  # 8 of the prior, 2 own
    assert sum(rows[5]["lr_counts"]) == pytest.approx(sum(0.95**k for k in range(6)))
    assert len(rows[5]["lr_prior_sums"]) == 2


def test_a_context_needs_no_choice_to_be_told():
    for parameters in ({}, {"lr_candidates": (0.5, 2.0), "control_mode": "random"}):
        rows = closings(run(AEES.config(episode_length=1, context_mode="trend", **parameters), [3.0, 2.0, 1.0])[1])
        assert [row["bucket"] for row in rows] == ["stable", "improving", "improving"]
        assert "lr_counts" not in rows[0] or not rows[0]["lr_updates"]


def test_the_log_names_contexts_as_both_versions_of_the_package_do():
    config = AEES.config(episode_length=1, context_mode="trend_phase", total_training_steps=4)
    log = episode_log(closings(run(config, [3.0, 2.0, 1.0])[1]))
    assert log["context_phases"] == ["early", "early", "middle"]
    assert log["context_trends"] == ["stable", "stable", "improving"]
    assert log["context_buckets"] == log["context_bucket_ids"] == log["context_bucket_names"]
    assert log["context_buckets"] == ["early_stable", "early_stable", "middle_improving"]
    log = episode_log(closings(run(AEES.config(episode_length=1, context_mode="trend"), [3.0])[1]))
    assert (log["context_phases"], log["context_trends"]) == ([None], ["stable"])
    assert len(episode_log([])) == 18


def test_the_package_s_generators_travel_with_the_state():
    config = AEES.config(**THREE, rng="pulseopt", context_mode="trend", structured_control_mode="conditional", seed=5)
    losses = [Observation(i, 2.0 + math.sin(i)) for i in range(60)]
    _, whole = run(config, losses)
    state, decision = AEES.init(config, ONE_GROUP, 0)
    for seen, expected in zip(losses, whole[1:], strict=True):
        state = load_state(AEES, json.loads(json.dumps(dump_state(state))))
        state, decision = AEES.step(config, state, seen)
        assert decision == expected
    assert decision.fields["lr_u"] is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((2.0,), (2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, False)),
        ((-2.0, -4.0), (-2.0, -3.0, 0.4, 1 / 9, 0.0, 0.4, 0.4, True)),
        ((3.0, -7.0), (3.0, -2.0, 2.0, 6.25, 0.0, 2.0, 1.0, True)),
        ((-3.0, 7.0), (-3.0, 2.0, -2.0, 6.25, 0.0, -2.0, -1.0, True)),
    ],
)
def test_losses_that_are_not_positive_are_compared_by_their_difference(losses, expected):
    assert reward(losses, 0.5, 0.0, 1e-12, (-1.0, 1.0)) == pytest.approx(expected)


def test_a_reward_has_these_parts_where_epsilon_counts():
    unstable = (8 / 3) / (16.0 + 0.5)
    losses = (6.0, 4.0, 2.0)  # smoothed: 6, 5, 3.5; mean 4, variance 8/3
    base = math.log(6.5) - math.log(4.0)
    parts = (6.0, 3.5, base, unstable, unstable / 4, base - unstable / 4, base - unstable / 4, False)
    assert reward(losses, 0.5, 0.25, 0.5, (-9.0, 9.0)) == pytest.approx(parts, rel=1e-14)
    assert reward(losses, 0.5, 0.25, 0.5, (-9.0, 0.125)).reward_final_clipped == 0.125
    assert reward(losses, 0.5, 0.25, 0.5, (0.5, 9.0)).reward_final_clipped == 0.5
    fallen = reward((-2.0, -4.0), 0.5, 0.25, 0.5, (-9.0, 9.0))
    assert fallen == pytest.approx((-2.0, -3.0, 2 / 5.5, 1 / 9.5, 0.25 / 9.5, *[2 / 5.5 - 0.25 / 9.5] * 2, True))
    assert reward((0.0, 1.0), 0.25, 0.0, 0.5, (-9.0, 9.0))[2] == pytest.approx(math.log(0.5) - math.log(0.75))


def test_a_small_spread_far_from_zero_is_not_lost():
    losses = (1e15, 1e15 + 7, 1e15 + 50)  # about their mean, 1e15 + 19: squares of 19, 12 and 31
    variance, mean = 1466 / 3, 1e15 + 19
    assert reward(losses, 0.5, 0.25, 0.5, (-9.0, 9.0)).reward_instability == variance / (mean * mean + 0.5)


def test_the_logarithm_is_taken_wherever_it_exists():
    assert reward((-0.5, 1.0), 1.0, 0.0, 0.5, (-9.0, 9.0)).reward_fallback  # start + epsilon is 0
    assert reward((1.0, -0.5), 1.0, 0.0, 0.5, (-9.0, 9.0)).reward_fallback
    above = reward((-0.5, 1.0), 1.0, 0.0, 0.75, (-9.0, 9.0))
    assert (above.reward_fallback, above.reward_base) == (False, pytest.approx(math.log(0.25 / 1.75)))
    assert reward((0.0, 0.0), 1.0, 0.0, 0.5, (-9.0, 9.0)).reward_base == 0.0


def test_a_reward_stays_a_number_whatever_the_losses():
    for losses in ((1e100, -1e100), (1e100, 1e-300), (0.0, 0.0), (-1e100, 1e100), (5e-324, 1e100)):
        parts = reward(losses, 0.5, 1e6, 5e-324, (-1.0, 1.0))
        assert all(map(math.isfinite, parts))
    assert reward((1e100, -1e100), 0.5, 1.0, 1e-8, (-1.0, 1.0)).reward_instability == 1e100


@pytest.mark.parametrize(
    ("ends", "window", "name"),
    [
        ((), 3, "stable"),
        ((9.0,), 3, "stable"),
        ((9.0, 1.0), 1, "stable"),
        ((2.0, 1.5), 3, "stable"),
        ((2.0, 1.25), 3, "improving"),
        ((1.5, 2.0), 3, "stable"),
        ((1.25, 2.0), 3, "worsening"),
        ((9.0, 2.0, 2.0, 1.0), 3, "stable"),
        ((9.0, 2.0, 2.0, 0.75), 3, "improving"),
        ((0.0, 2.0, 9.0, 3.25), 3, "worsening"),
    ],
)
def test_a_trend_is_the_mean_change_beyond_epsilon(ends, window, name):
    assert trend(ends, window, 0.5) == name


def test_a_run_has_three_phases_and_the_last_has_no_end():
    assert [phase(step, 3) for step in range(5)] == ["early", "middle", "late", "late", "late"]
    assert [phase(step, 300) for step in (0, 99, 100, 199, 200, 10**6)] == [
        "early", "early", "middle", "middle", "late", "late",
    ]  # fmt: skip


def test_candidates_have_the_package_s_names():
    assert candidate_name(0.5, 0.005) == "lr0p5_n0p005"
    assert candidate_name(2.0, 1e-7) == "lr2_n1em07"
    assert candidate_name(1 / 3, 0.0) == "lr0p333333333333_n0"


def test_a_doubtful_configuration_is_named_at_the_start_and_only_there():
    def first(**parameters):
        config = AEES.config(**parameters)
        return AEES.explain(config, run(config, [])[1][0])

    begins = "Episode 0 begins. From here on lr1_n0: learning rate x 1, noise 0."
    ignored = " total_training_steps is ignored: only context_mode='trend_phase' reads it."
    assert first() == begins
    assert "Warning" not in first(lr_candidates=(0.5, 1.0, 2.0))
    assert first(lr_candidates=(0.49, 1.0, 10.0)).endswith(
        ". Warning: 0.49, 10 beyond [0.5, 2] may ruin a run: each is played in full."
    )
    assert first(total_training_steps=5, context_mode="trend") == begins + ignored
    assert "ignored" not in first(total_training_steps=5, context_mode="trend_phase")
    config = AEES.config(lr_candidates=(9.0,), episode_length=1, bad_limit=2)
    decisions = run(config, [4.0, None, math.nan, math.nan])[1]
    assert [AEES.explain(config, decision) for decision in decisions[1:]] == [
        "Episode 0 (lr9_n0) took the loss from 4 to 4 (smoothed): reward 0. "
        "From here on lr9_n0: learning rate x 9, noise 0.",
        "No loss was measured: nothing counts.",
        "The loss is not a usable number (1 in a row): nothing counts, the episode goes on.",
        "Episode 1 (lr9_n0) ends at 2 unusable losses in a row: reward -1. "
        "From here on lr9_n0: learning rate x 9, noise 0.",
    ]
