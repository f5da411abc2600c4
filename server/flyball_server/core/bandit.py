"""A discounted upper-confidence-bound bandit, alone or one per context.

Rule of this module: pure functions. A controller is a tuple that goes in and comes out; chance is a number of
`rng.py`, or of a Mersenne generator that is a part of the controller.

Formulas: discounted UCB after Garivier & Moulines (2011), in the form of pulseopt's `DiscountedUCBController`:
score = s/c + exploration_coef * sqrt(ln(sum of c + 1) / c), over counts c and reward sums s that fade by `discount`.
In a context every bucket has arms of its own that begin as a copy of the prior, which learns from all of them.
"""

from __future__ import annotations

from math import fsum, log, sqrt
from typing import Any, NamedTuple, Protocol

from flyball_server.core import mersenne, rng

#: Counts fade towards 0; a score divides by at least this. Scores this close to the best are as good as it.
SMALLEST_COUNT = TIE = 1e-12
#: The bonus scaled by the spread of the rewards never vanishes altogether.
SMALLEST_SPREAD = 1e-6


class Rule(Protocol):
    """The parameters: the weight of the bonus, how fast everything fades, how often each arm is played before scores
    decide, "reward_std" to scale the bonus by the spread of the rewards, "random" to learn nothing."""

    @property
    def exploration_coef(self) -> float: ...
    @property
    def discount(self) -> float: ...
    @property
    def warmup_rounds(self) -> int: ...
    @property
    def bonus_scale(self) -> str: ...
    @property
    def control_mode(self) -> str: ...


class Chance(NamedTuple):
    """Which random number a choice uses: of the counter generator, or where `own` is the seed of a Mersenne
    generator, the next of that."""

    seed: int
    stream: int
    step: int
    own: int | None


class Arms(NamedTuple):
    """Faded counts, reward sums and sum of squared rewards; plays per arm and in all; the Mersenne state, if any."""

    counts: tuple[float, ...]
    sums: tuple[float, ...]
    plays: tuple[int, ...]
    total: int
    squares: float
    generator: tuple[int, ...] | None


class Context(NamedTuple):
    """The prior; per bucket its arms (None before its first use), updates, reward sum, and the arms it chose."""

    prior: Any
    buckets: tuple[Any, ...]
    visits: tuple[int, ...]
    rewards: tuple[float, ...]
    chosen: tuple[tuple[int, ...], ...]


class Choice(NamedTuple):
    """arm: the chosen one. scores: per arm; None while warming up or at random. tie: the arms that chance decided
    between; u: the number in [0, 1) it used, None where a Mersenne generator drew."""

    arm: int
    scores: tuple[float, ...] | None
    tie: tuple[int, ...]
    u: float | None


def begin(n: int, buckets: int, own: int | None) -> tuple[Any, ...]:
    """A controller of `n` arms that knows nothing. buckets: number of contexts, 0 for none. own: the seed of its
    Mersenne generator, None for the counter generator."""
    if buckets:
        return Context(begin(n, 0, None), (None,) * buckets, (0,) * buckets, (0.0,) * buckets, ((),) * buckets)
    generator = None if own is None else mersenne.seeded(own)
    return Arms((0.0,) * n, (0.0,) * n, (0,) * n, 0, 0.0, generator)


def choose(
    rule: Rule, controller: tuple[Any, ...], bucket: int | None, chance: Chance
) -> tuple[tuple[Any, ...], Choice]:
    """The next arm, and the controller after it. bucket: the context, 0-based; None for a controller without."""
    if bucket is None:
        return _select(rule, controller, chance)
    prior, buckets, visits, rewards, chosen = controller
    arms = buckets[bucket]
    if arms is None:
        arms = (*prior[:5], None if chance.own is None else mersenne.seeded(chance.own + 1000 + bucket))
    arms, choice = _select(rule, arms, chance._replace(stream=chance.stream + ((bucket + 1) << 16)))
    if choice.arm not in chosen[bucket]:
        chosen = put(chosen, bucket, (*chosen[bucket], choice.arm))
    return Context(prior, put(buckets, bucket, arms), visits, rewards, chosen), choice


def learn(rule: Rule, controller: tuple[Any, ...], bucket: int | None, arm: int, reward: float) -> tuple[Any, ...]:
    """The controller after `arm` brought `reward` (in a context: in `bucket`, which has chosen before)."""
    if rule.control_mode == "random":
        return controller
    if bucket is None:
        return _update(rule, controller, arm, reward)
    prior, buckets, visits, rewards, chosen = controller
    return Context(
        _update(rule, prior, arm, reward),
        put(buckets, bucket, _update(rule, buckets[bucket], arm, reward)),
        put(visits, bucket, visits[bucket] + 1),
        put(rewards, bucket, rewards[bucket] + reward),
        chosen,
    )


def audit(controller: tuple[Any, ...], bucket: int | None) -> dict[str, Any]:
    """What the controller knows, as lists of numbers: of the arms in charge, and in a context of prior and buckets."""
    if bucket is None:
        return {"counts": list(controller[0]), "sums": list(controller[1]), "updates": controller[3]}
    prior, buckets, visits, rewards, chosen = controller
    return audit(buckets[bucket], None) | {
        "prior_counts": list(prior[0]),
        "prior_sums": list(prior[1]),
        "bucket_visits": list(visits),
        "bucket_reward_sums": list(rewards),
        "bucket_distinct_arms": [len(arms) for arms in chosen],
    }


def scores(rule: Rule, arms: tuple[Any, ...]) -> tuple[float, ...]:
    """Per arm its mean reward and the bonus for being uncertain."""
    counts, sums, _, _, squares, _ = arms
    n, coef = fsum(counts), rule.exploration_coef
    if n and rule.bonus_scale == "reward_std":  # without counts there is no bonus to scale
        mean = fsum(sums) / n
        coef *= max(sqrt(max(squares / n - mean * mean, 0.0)), SMALLEST_SPREAD)
    span = log(n + 1.0)
    known = [max(count, SMALLEST_COUNT) for count in counts]
    return tuple([total / count + coef * sqrt(span / count) for total, count in zip(sums, known, strict=True)])


def _update(rule: Rule, arms: tuple[Any, ...], arm: int, reward: float) -> Arms:
    """Everything fades by `discount`, then `arm` counts one more with `reward`."""
    counts, sums, plays, total, squares, generator = arms
    gamma = rule.discount
    counts = [count * gamma for count in counts]
    sums = [one * gamma for one in sums]
    counts[arm] += 1.0
    sums[arm] += reward
    plays = put(plays, arm, plays[arm] + 1)
    return Arms(tuple(counts), tuple(sums), plays, total + 1, squares * gamma + reward * reward, generator)


def _select(rule: Rule, arms: tuple[Any, ...], chance: Chance) -> tuple[Arms, Choice]:
    """The least played arm while any lacks its warm-up rounds, then the best score; chance decides ties."""
    counts, sums, plays, total, squares, generator = arms
    least, values = min(plays), None
    if rule.control_mode == "random":
        tie = tuple(range(len(plays)))
    elif least < rule.warmup_rounds:
        tie = tuple([arm for arm, played in enumerate(plays) if played == least])
    else:
        values = scores(rule, arms)
        best = max(values)
        tie = tuple([arm for arm, score in enumerate(values) if best - score <= TIE])
    u = None if generator is not None else rng.uniform(chance.seed, chance.stream, chance.step)
    if u is None:
        place, generator = mersenne.below(len(tie), generator)
    else:
        place = int(u * len(tie))
    return Arms(counts, sums, plays, total, squares, generator), Choice(tie[place], values, tie, u)


def put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    """`values` with `value` at `place`."""
    return (*values[:place], value, *values[place + 1 :])
