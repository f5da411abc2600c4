"""The server's arithmetic: one observation through policy, base schedule and guard, and a policy alone.

Method: `core.run.apply` on batches of 64 losses that fall and jitter, one group; interleaved rounds, medians. The
floor is the least a pure step can be: a tuple of three numbers in, a new one out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

from tests.bench.load import values
from tests.bench.table import Row

from flyball_server.core import run as fold
from flyball_server.core.events import Attached, Observed, Spec
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Group, Observation
from flyball_server.rules import rules_of

BATCH = 64
FOLD_US_MAX = 5.0
#: A policy that keeps windows and statistics, and one that does not.
POLICY_US_MAX = 3.0
PLAIN_US_MAX = 1.0
COSINE = {"type": "cosine", "T_max": 1_000_000}
#: What is folded: a name, the policy, its base schedule.
CASES: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any] | None], ...] = (
    ("constant", {"type": "constant"}, None),
    ("windowed", {"type": "windowed"}, None),
    ("plateau", {"type": "plateau"}, None),
    ("greedy", {"type": "greedy"}, None),
    ("cycle", {"type": "cycle"}, None),
    ("adaptive", {"type": "adaptive"}, None),
    ("rules: trend", {"type": "rules", "lr_rule": "trend"}, None),
    ("rules: variance, normalized", {"type": "rules", "lr_rule": "variance", "momentum_rule": "normalized"}, None),
    ("aees", {"type": "aees", "lr_candidates": [0.5, 1, 2], "noise_candidates": [0, 0.01]}, None),
    ("windowed x cosine", {"type": "windowed"}, COSINE),
)
PLAIN = ("constant", "plateau", "aees")


class Ema(NamedTuple):
    """The state of the floor."""

    count: int
    mean: float
    best: float


def measure(quick: bool) -> list[Row]:
    """Microseconds an observation."""
    batches = 60 if quick else 400
    rounds = 5 if quick else 9
    losses = values(BATCH * batches, 1)[0].tolist()
    work: dict[str, Callable[[], None]] = {"floor": lambda: _bare(losses)}
    for name, policy, base in CASES:
        rules, run = _begin(policy, base)
        work[f"policy + guard fold: {name}"] = lambda rules=rules, run=run: _folded(rules, run, losses)
        if base is None:
            work[f"policy alone: {name}"] = lambda rules=rules: _alone(rules, losses)
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - started) / len(losses) * 1e6)
    floor = taken.pop("floor")
    return [
        Row(
            f"{name}, 1 group",
            median(us),
            "us/obs",
            median(floor),
            "us bare step",
            median(a / b for a, b in zip(us, floor, strict=True)),
            FOLD_US_MAX if "fold" in name else PLAIN_US_MAX if name.endswith(PLAIN) else POLICY_US_MAX,
        )
        for name, us in taken.items()
    ]


def _begin(policy: Mapping[str, Any], base: Mapping[str, Any] | None) -> tuple[Rules, Run]:
    groups = (Group("default", 0.1, 0.9),)
    rules = rules_of(Spec("r", "default", "r", {}, groups, policy, base, {}, "absolute", 0))
    run, _ = fold.apply(rules, fold.create(rules), Attached(1, 0, 0, "s", "bench", None, None))
    return rules, run


def _folded(rules: Rules, run: Run, losses: list[float]) -> None:
    for start in range(0, len(losses), BATCH):
        steps = list(range(start, start + BATCH))
        run, _ = fold.apply(rules, run, Observed(1, steps, {"loss": losses[start : start + BATCH]}))
    assert run.observations == len(losses)


def _alone(rules: Rules, losses: list[float]) -> None:
    step, config = rules.policy.step, rules.config
    state, _ = rules.policy.init(config, rules.groups, 0)
    for number, loss in enumerate(losses):
        state, _ = step(config, state, Observation(number, loss))


def _bare_step(state: Ema, loss: float) -> tuple[Ema, float]:
    count, mean, best = state
    mean += 0.1 * (loss - mean)
    return Ema(count + 1, mean, loss if loss < best else best), mean


def _bare(losses: list[float]) -> None:
    state = Ema(0, 0.0, 1e9)
    for loss in losses:
        state, _ = _bare_step(state, loss)
