"""What the optional signals cost a training step, beside `torch.nn.utils.clip_grad_norm_` on the same model.

Method: for each choice an optimizer of its own over the same parameters, whose own step does nothing, on a real
service; the difference to one that is steered without signals is theirs alone. All take turns step by step, medians
over all steps. The model is one of about 3 MB, on which memory counts more than calls.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

import torch
from tests.bench.processes import service
from tests.bench.steps import Idle
from tests.bench.table import Row

import flyball
from flyball.options import SIGNALS

#: clip_grad_norm_ reads the gradients once and writes them once; a copy of the parameters that is subtracted from and
#: summed is twice as much, and a second copy twice again.
TIMES_MAX = {"grad_norm": 1.0, "update_norm": 2.5, "distance": 2.5, "inner_product": 4.0}


def measure(quick: bool) -> list[Row]:
    """A row for each signal, and one for all of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    choices: list[tuple[str, ...]] = [(), *((name,) for name in SIGNALS), SIGNALS]
    with service() as server, ExitStack() as stack:
        ways = {"clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9)}
        for choice in choices:
            optimizer = Idle(parameters, lr=0.1)
            run = f"signals-{'-'.join(choice)}"
            options = {"run": run, "policy": "constant", "server": server.grpc, "signals": choice}
            governor = stack.enter_context(flyball.attach(optimizer, **options))

            def step(optimizer: Idle = optimizer, governor: flyball.Governor = governor) -> None:
                optimizer.step()
                governor.step(1.0)

            ways["+".join(choice)] = step
        taken: dict[str, list[int]] = {name: [] for name in ways}
        for turn in range(120 if quick else 500):
            for name, way in ways.items():
                started = time.perf_counter_ns()
                way()
                if turn >= 20:
                    taken[name].append(time.perf_counter_ns() - started)
    us = {name: median(times) / 1000 for name, times in taken.items()}
    rows = []
    for choice in choices[1:]:
        added = us["+".join(choice)] - us[""]
        allowed = TIMES_MAX[choice[0]] if len(choice) == 1 else None
        what = f"signal {choice[0]}" if len(choice) == 1 else "all four signals"
        rows.append(Row(what, added, "us", us["clip"], "us clip_grad_norm_", added / us["clip"], allowed, "ratio"))
    return rows
