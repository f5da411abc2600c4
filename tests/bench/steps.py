"""What a training step costs more on the training thread, `lag=None`: the hooks and `governor.step`.

Method: a real governor on a real service. The optimizer's own step does nothing, so that the difference to the
same loop without a governor is ours alone; between the timed parts a matrix product of about 0.2 ms stands for the
model, so that caches are cold and the reporting thread has its turns, as in training. torch's own schedulers
are measured in the same loop. Blocks in turn, medians over blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tests.bench.processes import service
from tests.bench.table import Row

import flyball

US_MAX = 10.0


class Idle(torch.optim.SGD):
    """An optimizer whose step does nothing but run its hooks."""

    def step(self, closure: Any = None) -> None:
        """Nothing."""


def optimizer(groups: int) -> Idle:
    """Parameter groups of one number each."""
    return Idle(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "name": f"g{i}", "lr": 0.1 / (i + 1)} for i in range(groups)],
        lr=0.1,
        momentum=0.9,
    )


def measure(quick: bool) -> list[Row]:
    """Microseconds added to a step."""
    torch.set_num_threads(1)
    blocks, steps = (7, 150) if quick else (21, 300)
    rows = []
    with service() as server:
        for groups in (1, 8):
            for as_tensor in (True, False):
                rows.append(_row(server.grpc, groups, as_tensor, blocks, steps))
    return rows


def _row(server: str, groups: int, as_tensor: bool, blocks: int, steps: int) -> Row:
    loss: Any = torch.tensor(1.5) if as_tensor else 1.5
    bare, steered = optimizer(groups), optimizer(groups)
    kind = "tensor" if as_tensor else "float"
    with flyball.attach(steered, run=f"steps-{groups}-{kind}", policy="windowed", server=server) as governor:
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer(groups), patience=10**9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(groups), T_max=10**6)

        def governed() -> None:
            steered.step()
            governor.step(loss)

        ways: dict[str, Callable[[], Any]] = {
            "bare": bare.step,
            "steered": governed,
            "plateau": lambda: plateau.step(loss),
            "cosine": cosine.step,
        }
        cosine.optimizer.step()  # torch warns where the scheduler steps first
        means, middles = _interleaved(ways, blocks, steps)
        status = governor.status
    assert status.state == "steering", status
    added = [a - b for a, b in zip(means["steered"], means["bare"], strict=True)]
    plateau_us, cosine_us = median(means["plateau"]), median(means["cosine"])
    return Row(
        f"added to a step, {groups} group{'s' * (groups > 1)}, loss as {kind}",
        median(added),
        "us",
        plateau_us,
        "us ReduceLROnPlateau",
        median(added) / plateau_us,
        US_MAX,
        note=f"CosineAnnealingLR.step {cosine_us:.1f} us: {median(added) / cosine_us:.2g}x; the median step "
        f"{middles['steered'] - middles['bare']:.1f} us; governor.status says {status.added_us:.1f} us",
    )


def _interleaved(
    ways: dict[str, Callable[[], Any]], blocks: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Each way's mean time in each block, and the median of all its times, in microseconds."""
    work = torch.randn(160, 160)
    means: dict[str, list[float]] = {name: [] for name in ways}
    times: dict[str, list[int]] = {name: [] for name in ways}
    clock = time.perf_counter_ns
    for block in range(blocks + 1):
        for name, call in ways.items():
            taken = []
            for _ in range(steps):
                torch.mm(work, work)
                started = clock()
                call()
                taken.append(clock() - started)
            if block:  # the first one warms up
                means[name].append(sum(taken) / steps / 1000)
                times[name] += taken
    return means, {name: median(taken) / 1000 for name, taken in times.items()}
