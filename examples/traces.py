"""Synthetic training traces of 14 kinds, to try a policy on before a real job meets it.

    python examples/traces.py spike --steps 500 | flyball-server simulate --policy policy.yaml --trace -

Rule of this module: a trace is a function of (kind, steps, seed) alone, the same on every platform and Python. Chance
comes from `flyball_server.core.rng`, and every number is rounded to 9 significant digits, so that the last bit of a
platform's exp and sin does not show. The shapes scale with the length; the noise is per step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from math import exp, fsum, inf, nan, pi, sin, sqrt
from typing import Any, NamedTuple

from flyball_server.core.rng import uniform
from flyball_server.core.types import ANSWERS, Answered, Decision, Observation, Policy

#: How many steps a trace has unless somebody asks for another number.
STEPS = 1000
LONG_STEPS = 20_000
#: The stream of chance that the traces draw from; no policy uses it.
STREAM = 0x7ACE
#: Losses of an untrained classifier of ten classes, and of a trained one.
FIRST, LAST = 2.3, 0.1

Row = dict[str, float | None]


class At(NamedTuple):
    """One place in a trace: its step, the part of the trace that lies before it (0 to 1), and its chance."""

    step: int
    part: float
    seed: int

    def chance(self, draw: int) -> float:
        """A number in [0, 1)."""
        return uniform(self.seed, STREAM, self.step, draw)

    def noise(self, draw: int) -> float:
        """A number of mean 0 and standard deviation 1, nearly normal, within ±3.5 (a sum of four uniform ones)."""
        return (fsum(self.chance(4 * draw + i) for i in range(4)) - 2.0) * sqrt(3.0)


def falling(part: float, first: float = FIRST, last: float = LAST, speed: float = 5.0) -> float:
    """A smooth learning curve from `first` towards `last`."""
    return last + (first - last) * exp(-speed * part)


def measured(at: At, loss: float, size: float = 1.0) -> Row:
    """The loss with the norms that go with it. size: of the gradient, against what is usual at such a loss."""
    norm = size * (0.3 + 0.5 * abs(loss)) * exp(0.2 * at.noise(1))
    return {"loss": loss, "grad_norm": norm, "update_norm": 1e-3 * norm * (1.0 + 0.05 * at.noise(2))}


def healthy(at: At) -> Row:
    """A training that goes well: 2.3 falling to 0.1, with a little noise."""
    return measured(at, falling(at.part) * (1.0 + 0.03 * at.noise(0)))


def plateau(at: At) -> Row:
    """Falls for a third of the time, then hardly any more."""
    return measured(at, falling(min(at.part, 0.3), last=0.8, speed=15.0) * (1.0 + 0.01 * at.noise(0)))


def spike(at: At) -> Row:
    """Healthy, with a short high spike at 40 % and a higher one at 70 %, in loss and gradient."""
    row, size = healthy(at), 0.0
    for where, height in ((0.4, 3.0), (0.7, 8.0)):
        since = (at.part - where) * 60.0
        size += height * exp(-since) if since >= 0 else 0.0
    return {name: (value or 0.0) * (1.0 + size) for name, value in row.items()}


def divergence(at: At) -> Row:
    """Healthy for the first half, then growing without bound; infinite from 90 % on, with gradients that are NaN."""
    if at.part >= 0.9:
        return {"loss": inf, "grad_norm": nan, "update_norm": nan}
    blow_up = 10.0 ** (14.0 * max(0.0, at.part - 0.5))
    return measured(at, falling(at.part) * blow_up * (1.0 + 0.03 * at.noise(0)))


def nan_blips(at: At) -> Row:
    """Healthy, with single unusable losses and runs of up to eight."""
    row, place = healthy(at), at.step % 100
    if place in (25, 60, 61) or (70 <= place < 78 and at.step // 100 % 3 == 1):
        row["loss"] = inf if place == 60 else nan
    if place in (25, 40):
        row["grad_norm"] = nan
    return row


def oscillation(at: At) -> Row:
    """Swings of a steady size around a level that sinks slowly: a learning rate at the edge of stability."""
    level, swing = falling(at.part, first=1.6, last=0.9, speed=3.0), sin(2.0 * pi * at.step / 40.0)
    return measured(at, level * (1.0 + 0.35 * swing + 0.02 * at.noise(0)), 1.0 + 0.6 * swing)


def noise(at: At) -> Row:
    """Nothing but noise around 1.5: small batches, and nothing learnt."""
    return measured(at, 1.5 * exp(0.35 * at.noise(0)))


def negative(at: At) -> Row:
    """A negative log-likelihood of a density, 0.5 falling to -3.5."""
    return measured(at, falling(at.part, first=0.5, last=-3.5, speed=4.0) + 0.08 * at.noise(0))


def zero(at: At) -> Row:
    """A task that is solved: falls in a straight line to exactly 0 at a quarter of the time, and stays."""
    loss = FIRST * (1.0 - 4.0 * at.part) * (1.0 + 0.03 * at.noise(0))
    return measured(at, loss) if loss > 0 else dict.fromkeys(("loss", "grad_norm", "update_norm"), 0.0)


def step_change(at: At) -> Row:
    """Falls, jumps up at one half, where other data begin, and falls again."""
    loss = falling(at.part) if at.part < 0.5 else falling(at.part - 0.5, first=2.0, last=0.6)
    return measured(at, loss * (1.0 + 0.03 * at.noise(0)))


def reward(at: At) -> Row:
    """Reinforcement learning without a loss worth the name: a noisy reward from -1 to 1, with a setback at 60 %."""
    setback = 0.8 * exp(-(((at.part - 0.6) * 25.0) ** 2))
    return {"reward": 1.0 - 2.0 * exp(-3.0 * at.part) - setback + 0.25 * at.noise(0)}


def dense_reward(at: At) -> Row:
    """Loss and reward at every step."""
    return {**healthy(at), "reward": 1.0 - falling(at.part, first=2.0, last=0.0, speed=3.0) + 0.1 * at.noise(3)}


def sparse(at: At) -> Row:
    """Healthy, but with a loss at two steps of three, norms at every fourth, and a little reward and validation."""
    row: Row = healthy(at)
    if at.chance(40) > 0.66:
        row["loss"] = None
    if at.step % 4:
        row["grad_norm"] = row["update_norm"] = None
    row["reward"] = 0.5 + 0.1 * at.noise(3) if at.chance(41) < 0.1 else None
    row["val_loss"] = falling(at.part, last=0.3) * (1.0 + 0.01 * at.noise(4)) if at.step % 100 == 99 else None
    return row


#: Every kind, with what makes one of its rows.
KINDS: dict[str, Callable[[At], Row]] = {
    "healthy": healthy,
    "plateau": plateau,
    "spike": spike,
    "divergence": divergence,
    "nan_blips": nan_blips,
    "oscillation": oscillation,
    "noise": noise,
    "negative": negative,
    "zero": zero,
    "step_change": step_change,
    "reward": reward,
    "dense_reward": dense_reward,
    "sparse": sparse,
    "long": healthy,
}


def trace(kind: str, steps: int | None = None, seed: int = 0) -> Iterator[tuple[int, Row]]:
    """(step, signals by name) for every step; None: not measured. steps: null for 1 000 (`long`: 20 000).

    Raises KeyError for a kind that there is not.
    """
    make = KINDS[kind]
    total = steps or (LONG_STEPS if kind == "long" else STEPS)
    for step in range(total):
        row = make(At(step, step / total, seed))
        yield step, {name: None if value is None else float(f"{value:.9g}") for name, value in row.items()}


def lines(kind: str, steps: int | None = None, seed: int = 0) -> Iterator[str]:
    """The trace as JSON lines, as `flyball-server simulate --trace` takes them."""
    for step, row in trace(kind, steps, seed):
        yield json.dumps({"step": step, **row})


def decisions(policy: Policy, config: Any, state: Any, trace: Iterable[Observation]) -> Iterator[Decision]:
    """What the policy decides after every observation, in a job that does what it is asked to by a policy that reads
    the answers: it makes a checkpoint, and goes back to it, and then its losses go on as if nothing had been."""
    reads = ANSWERS in policy.reads(config)
    answers: list[Answered] = []
    decision: Decision | None = None
    kept = state
    for seen in trace:
        for ask in decision.asks if reads and decision is not None else ():
            kept, state = (state, state) if ask.kind == "checkpoint" else (kept, kept)
            outcome = "done" if ask.kind == "checkpoint" else "returned"
            answers.append(Answered(ask.kind, str(ask.args.get("tag", "")), outcome, "", ask.args))
        state, decision = policy.step(config, state, seen._replace(answers=tuple(answers)) if answers else seen)
        yield decision


def main() -> None:
    """Print one trace."""
    parser = argparse.ArgumentParser(description="Print a synthetic training trace as JSON lines.")
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, help=f"its length (default {STEPS}; long: {LONG_STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of its noise (default 0)")
    given = parser.parse_args()
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps: {given.steps} is not allowed; give 1 or more")
    try:
        for line in lines(given.kind, given.steps, given.seed):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; nor shall Python flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
