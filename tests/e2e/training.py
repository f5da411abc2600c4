"""What the training scripts of the end-to-end tests share; imported inside their processes.

Goal: a script reads like a user's. Method: real torch models on scikit-learn's digits, a fixed loss trace where a test
compares decisions, and JSON lines to and from the test.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

#: Decides every few steps, so that a lost, doubled or late decision shows.
POLICY = {"type": "windowed", "window_size": 8, "cooldown_steps": 3}


def say(**what: Any) -> None:
    """Tell the test something."""
    print(json.dumps(what), flush=True)


def listen() -> str:
    """Wait for the test to say something."""
    return sys.stdin.readline().strip()


def digits(lr: float = 0.05) -> tuple[torch.optim.Optimizer, Callable[[int], torch.Tensor]]:
    """An optimizer, and a function that trains step i of a small network on digits and returns its loss."""
    return digits_model(lr)[1:]


def digits_model(
    lr: float = 0.05,
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[int], torch.Tensor]]:
    """`digits`, with the network itself in front, to be saved and loaded."""
    torch.manual_seed(0)
    table = digits_table()
    x, y = table[:, :-1].float() / 16, table[:, -1].long()
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def train(i: int) -> torch.Tensor:
        batch = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(i))
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, train


@functools.cache
def digits_table() -> torch.Tensor:
    """scikit-learn's digits (pixels, digit) without its import, which takes longer than most of these trainings."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as lines:
        return torch.tensor([[float(cell) for cell in line.split(",")] for line in lines])


def tiny(lr: float = 0.1) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """An optimizer of one number, and a function that steps it and returns a loss that depends on i alone."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=lr)

    def train(i: int) -> float:
        optimizer.step()
        return fixed_loss(i)

    return optimizer, train


def fixed_loss(i: int) -> float:
    """A loss trace that falls, wobbles and jumps, so that every kind of decision comes up."""
    return 2 * math.exp(-i / 150) + 0.1 * math.sin(i) + (1.5 if i % 97 == 60 else 0.0)


def run(governor: Any, optimizer: Any, train: Callable[[int], Any], first: int, last: int, pace_s: float = 0) -> Any:
    """Train steps first to last - 1; the learning rate that each of them used. Says every 25th step."""
    used = []
    for i in range(first, last):
        loss = train(i)
        used.append(optimizer.param_groups[0]["lr"])
        governor.step(loss)
        if i % 25 == 0:
            say(step=i)
        if pace_s:
            time.sleep(pace_s)
    return used


def through_an_outage(governor: Any, optimizer: Any, train: Callable[[int], Any]) -> tuple[int, dict[str, Any]]:
    """Train with the default budget until a step has missed its decision (which is said), and on until 300 steps after
    the service has caught up again. How many steps; each one's time and learning rate, and how many missed theirs."""
    times, used, i = [], [], 0
    missed = caught_up = None
    was_open = False
    while caught_up is None or i < caught_up + 300:
        started = time.perf_counter()
        governor.step(train(i))
        times.append(time.perf_counter() - started)
        used.append(optimizer.param_groups[0]["lr"])
        status = governor.status
        # Four interpreters that start at once may cost one a decision: that is no outage, and is over by step 100.
        if i > 100 and status.circuit_open and not was_open:
            missed = i
            say(missing=i)
        was_open = status.circuit_open
        if i % 25 == 0:
            say(step=i)
        if missed and i > missed + 500 and not status.circuit_open and status.through >= i - 1:
            caught_up = caught_up or i
        i += 1
        time.sleep(0.002)
    status = governor.status
    return i, {"times": times, "used": used, "missed": status.missed}


def delivered(governor: Any, within_s: float = 30) -> bool:
    """Wait until the service has acknowledged everything."""
    until = time.monotonic() + within_s
    while governor.status.waiting and time.monotonic() < until:
        time.sleep(0.01)
    return governor.status.waiting == 0


def steered_alone(run_name: str, server: str, steps: int = 20) -> None:
    """A whole training, for a process of its own."""
    import flyball

    optimizer, train = tiny()
    with flyball.attach(optimizer, run=run_name, policy=POLICY, server=server, lag=0, wait_s=None) as governor:
        for i in range(steps):
            governor.step(train(i))
