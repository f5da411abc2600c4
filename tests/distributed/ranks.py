"""What a torchrun process of these tests runs: the scenarios that its command line names, one after another.

Goal: a scenario reads like a user's script on every rank. Method: rank 0 starts, kills and starts the service again at
steps of its own training; what every rank saw goes into one JSON file for the tests to judge.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.e2e.processes import Server, free_port
from tests.e2e.training import fixed_loss

import flyball
from flyball.ranks import Ranks

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
POLICY = {"type": "windowed", "window_size": 8, "cooldown_steps": 3}
SCENARIOS: dict[str, Callable[[Server], Any]] = {}


def scenario(function: Callable[[Server], Any]) -> Callable[[Server], Any]:
    SCENARIOS[function.__name__] = function
    return function


def optimizer_of(lr: float = 0.1) -> torch.optim.Optimizer:
    """One number to train, with a gradient."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    return torch.optim.SGD([weight], lr=lr)


def used(optimizer: torch.optim.Optimizer) -> str:
    return float(optimizer.param_groups[0]["lr"]).hex()


def attach(optimizer: Any, server: Server, run: str, **options: Any) -> flyball.Governor:
    options = {"policy": POLICY, "server": server.url("grpc"), "ranks": Ranks(every=4), "start_wait_s": 10, **options}
    return flyball.attach(optimizer, run=run, **options)


def mine(i: int) -> tuple[float, float]:
    """This rank's loss of step i, and its weight."""
    return fixed_loss(i) * (1 + 0.1 * RANK), 1.0 + RANK


def train(governor: flyball.Governor, optimizer: Any, steps: range, at: Any = lambda i: None, pace_s: float = 0.002):
    """Train these steps; the learning rate that each of them used."""
    seen = []
    for i in steps:
        at(i)
        optimizer.step()
        seen.append(used(optimizer))
        loss, weight = mine(i)
        governor.step(loss, weight=weight)
        time.sleep(pace_s)
    return seen


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What Flyball logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flyball").addHandler(handler)
    yield lines
    logging.getLogger("flyball").removeHandler(handler)


@scenario
def killed(server: Server) -> Any:
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "killed")
    again = threading.Thread(target=server.start)

    def at(i: int) -> None:
        if RANK == 0 and i == 100:
            server.kill()
        if RANK == 0 and i == 250:
            again.start()

    lrs = train(governor, optimizer, range(900), at, 0.004)
    status = governor.status
    governor.close()
    if RANK == 0:
        again.join()
    return {"lrs": lrs, "losses": [mine(i) for i in range(900)], "added_us": status.added_us, "state": status.state}


def main() -> None:
    where, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    server = Server(where)
    found: dict[str, Any] = {}
    if RANK == 0:
        server.start()
    try:
        for name in names:
            dist.barrier()
            started = time.monotonic()
            found[name] = SCENARIOS[name](server)
            if RANK == 0:
                print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        if RANK == 0:
            server.end()
    told: list[Any] = [None] * WORLD
    dist.all_gather_object(told, found)
    if RANK == 0:
        seen = {name: [rank[name] for rank in told] for name in names}
        (where / "found.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
