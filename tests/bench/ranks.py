"""How much longer a step of about 20 ms takes on 4 ranks that share a steered run, everything included.

Method: torchrun with 4 gloo ranks, each step of which sleeps 20 ms and then averages a gradient over the ranks.
Sleeping stands for a device that computes: four ranks that really computed would fight for the cores of a small
machine, and what is measured would be that. Blocks of steered and of bare steps in turn within one job; the median of
the blocks' ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median, quantiles

import torch
import torch.distributed as dist
from tests.bench.processes import ROOT, service
from tests.bench.table import Row

import flyball

LONGER_MAX = 1.01
RANKS = 4
STEP_S = 0.02
STEPS = 40


def measure(quick: bool) -> list[Row]:
    """The ratio steered / bare."""
    blocks = 8 if quick else 24
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    with service() as server:
        command = [sys.executable, *torchrun, __file__, server.grpc, str(blocks)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-3000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    ratios = [steered / bare for steered, bare in seen["blocks"]]
    low, _, high = quantiles(ratios, n=4)
    return [
        Row(
            f"slow-down of a 20 ms step on {RANKS} gloo ranks, lag=None",
            median(steered for steered, _ in seen["blocks"]) * 1e3,
            "ms",
            median(bare for _, bare in seen["blocks"]) * 1e3,
            "ms not steered",
            median(ratios),
            LONGER_MAX,
            "ratio",
            note=f"ratio {median(ratios):.4f}, half of the {blocks} blocks between {low:.3f} and {high:.3f}; "
            f"governor.status says {seen['added_us']:.0f} us a step on rank 0; computing is sleeping",
        )
    ]


def job(server: str, blocks: int) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = {}
    for steered in (True, False):
        weight = torch.nn.Parameter(torch.zeros(100))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        governor = flyball.attach(optimizer, run="four", policy="windowed", server=server) if steered else None
        ways[steered] = (weight, optimizer, governor)
    seen = []
    for block in range(blocks + 1):
        # Which of the two goes first changes, so that a drift of the machine's speed cancels out.
        order = (True, False) if block % 2 else (False, True)
        taken = {steered: timed(*ways[steered]) for steered in order}
        if block:
            seen.append((taken[True], taken[False]))
    governor = ways[True][2]
    assert governor is not None
    status = governor.status
    governor.close()
    if dist.get_rank() == 0:
        assert status.state == "steering", status
        print(json.dumps({"blocks": seen, "added_us": status.added_us}))
    dist.destroy_process_group()


def timed(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, governor: flyball.Governor | None) -> float:
    """Seconds a step."""
    dist.barrier()
    started = time.perf_counter()
    for i in range(STEPS):
        time.sleep(STEP_S)
        gradient = torch.full((100,), 0.01)
        dist.all_reduce(gradient)
        weight.grad = gradient
        optimizer.step()
        if governor is not None:
            governor.step(1.0 / (1 + i), weight=32.0)
    return (time.perf_counter() - started) / STEPS


if __name__ == "__main__":
    job(sys.argv[1], int(sys.argv[2]))
