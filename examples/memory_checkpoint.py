"""A checkpoint in memory that does what the service asks for: a spike is gone back from, and a learning rate range test
leaves no trace. Copy what you need.

    python examples/memory_checkpoint.py

Trains a small network on scikit-learn's digits, twice, and prints what happened. Starts a service of its own, unless
FLYBALL_SERVER names one. Only the lines with `governor` or `checkpoint` in them are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import uuid
from typing import Any

import torch
from sklearn.datasets import load_digits

import flyball
import flyball.api


class Batches:
    """Batches in an order that can be gone back in. `load_state_dict` decides which comes next."""

    def __init__(self, size: int) -> None:
        images, labels = load_digits(return_X_y=True)
        self.x = torch.tensor(images / 16.0, dtype=torch.float32)
        self.y = torch.tensor(labels)
        self.size, self.number = size, 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch, which depends on its number alone."""
        rows = torch.randint(len(self.x), (self.size,), generator=torch.Generator().manual_seed(self.number))
        self.number += 1
        return self.x[rows], self.y[rows]

    def skip(self, batches: int) -> None:
        """Pass over some."""
        self.number += batches

    def state_dict(self) -> dict[str, int]:
        """Where the data is."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go back there."""
        self.number = state["number"]


def train(run: str, policy: dict[str, Any], batches: int, *, server: str, spoilt: range = range(0)) -> list[float]:
    """A training until the given batch; the batches of `spoilt` ruin the network. The losses of all steps made."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data, losses = Batches(32), []
    # lag=0: each step waits for the decision of the one before, so that the story is the same every time.
    with flyball.attach(optimizer, run=run, policy=policy, server=server, lag=0, wait_s=10.0) as governor:
        flyball.MemoryCheckpoint(governor, every=25, limit_mb=64, model=model, optimizer=optimizer, data=data)
        while data.number < batches and not governor.should_stop:
            broken = data.number in spoilt
            x, y = data.next()
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            (loss * math.inf if broken else loss).backward()
            optimizer.step()
            governor.step(loss)
            losses.append(loss.item())
    return losses


def tell(client: flyball.api.Client, run: str, losses: list[float], batches: int) -> None:
    """What the record says."""
    bad = sum(not math.isfinite(loss) for loss in losses)
    print(f"{run}: {len(losses)} steps for {batches} batches, {bad} losses that were no numbers")
    print(f"  mean loss of the last 20 steps: {sum(losses[-20:]) / 20:.3f}")
    for command in client.commands(run):
        print(f"  asked for {command['kind']} ({command['status']}): {command['history'][-1].get('note', '')}")
    for decision in client.decisions(run):
        if decision["decision"].startswith("range_") or "spike_" in decision["decision"]:
            print(f"  {decision['reason']}")


def main(argv: list[str] | None = None) -> None:
    """Both trainings."""
    parser = argparse.ArgumentParser(description="A spike that is gone back from, and a range test without a trace.")
    parser.add_argument("--batches", type=int, default=400, help="of each training (default 400)")
    parser.add_argument("--levels", type=int, default=60, help="of the range test (default 60)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    spikes = {"type": "spike_guard", "policy": "constant", "min_samples": 20, "confirm": 2}
    spikes |= {"max_cuts": 0, "max_rewarms": 0, "skip_batches": 30}
    tested = {"type": "range_test", "min_lr": 1e-4, "max_lr": 10.0, "steps": given.levels}
    name, half = uuid.uuid4().hex[:6], given.batches // 2
    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER")
        if server is None:
            import flyball_server

            server = stack.enter_context(flyball_server.running()).http
        client = stack.enter_context(flyball.api.Client(server))
        run = f"spiked-{name}"
        tell(client, run, train(run, spikes, given.batches, server=server, spoilt=range(half, half + 3)), given.batches)
        run = f"tested-{name}"
        tell(client, run, train(run, tested, given.batches, server=server), given.batches)


if __name__ == "__main__":
    main()
