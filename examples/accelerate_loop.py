"""A loop prepared by Accelerate, with gradient accumulation and a schedule, steered by Flyball on top of that schedule.

    python examples/accelerate_loop.py            # some 20 s; --quick: a few

On scikit-learn's digits. mode="multiplier" leaves the schedule in charge: what the service decides is a factor on it.
The service is FLYBALL_SERVER's, or started here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits

import flyball
import flyball_server


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print a line per epoch."""
    parser = argparse.ArgumentParser(description="Accelerate's loop on digits, with Flyball.")
    parser.add_argument("--run", default=f"digits-{secrets.token_hex(3)}")
    parser.add_argument("--policy", default="steady", help="a policy's name; see docs/policies.md")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    parser.add_argument("--server", help="default: FLYBALL_SERVER, or a service started here")
    options = parser.parse_args(arguments)
    epochs = 3 if options.quick else options.epochs
    torch.set_num_threads(1)
    torch.manual_seed(0)

    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    updates = epochs * -(-len(loader) // 2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    with (
        service(options.server) as server,
        flyball.attach(optimizer, run=options.run, policy=options.policy, mode="multiplier", server=server) as governor,
    ):
        for epoch in range(epochs):
            losses: list[torch.Tensor] = []
            epoch_losses = []
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
                if accelerator.sync_gradients:  # an optimizer step was made of these micro-batches
                    governor.step(torch.stack(losses).mean())
                    epoch_losses.append(torch.stack(losses).mean())
                    losses.clear()
            mean = torch.stack(epoch_losses).mean()
            print(f"epoch {epoch}  loss {mean:.4f}  the schedule's learning rate {schedule.get_last_lr()[0]:.4g}")
        status = governor.status
    print(f"\nrun {status.run}: {status.step} optimizer steps, the newest decision: {status.reason}")


@contextlib.contextmanager
def service(server: str | None) -> Iterator[str | None]:
    """The address of a service: the given one, FLYBALL_SERVER's (None), or that of one started here."""
    if server or os.environ.get("FLYBALL_SERVER"):
        yield server
    else:
        with flyball_server.running() as here:
            yield here.http


if __name__ == "__main__":
    main()
