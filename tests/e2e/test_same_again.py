"""Lockstep is reproducible, and a lag is nothing but a shift.

Goal: `lag=0, wait_s=None` gives the same learning rates bit for bit whenever and however it runs; `lag=3` gives the
same ones three steps later. Method: several processes, one seed, one loss trace, both transports.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

SEVERAL = """
import flyball
from tests.e2e.training import *

sequences = {}
for name, lag in runs:
    optimizer, train = digits() if model == "digits" else tiny()
    with flyball.attach(optimizer, run=name, policy=POLICY, server=url, lag=lag, wait_s=None, seed=7) as governor:
        sequences[name] = run(governor, optimizer, train, 0, 400)
say(sequences=sequences)
"""


def test_training_twice_with_the_same_seed_gives_the_same_learning_rates(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    trainers = {
        t: trainer(SEVERAL, url=calm_server.url(t), model="digits", runs=[(f"twice-{t}-{n}", 0) for n in (1, 2)])
        for t in TRANSPORTS
    }
    sequences = [used for each in trainers.values() for used in each.hear("sequences").values()]
    assert len(sequences) == 4
    assert len(set(sequences[0])) > 5
    assert all(used == sequences[0] for used in sequences)


def test_a_lag_of_three_is_a_shift_by_three_steps(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    trainers = {
        t: trainer(SEVERAL, url=calm_server.url(t), model="tiny", runs=[(f"lag-{t}-{lag}", lag) for lag in (0, 3)])
        for t in TRANSPORTS
    }
    for transport, each in trainers.items():
        sequences = each.hear("sequences")
        zero, three = sequences[f"lag-{transport}-0"], sequences[f"lag-{transport}-3"]
        assert len(set(zero)) > 10
        assert three[3:] == zero[:-3]
        assert set(three[:3]) == {zero[0]}
        assert story_of(calm_server, f"lag-{transport}-3").steps == {1: list(range(400))}
