"""A plain PyTorch loop with everything that is usual around it: mixed precision with a GradScaler, gradients gathered
over several batches, clipping, two named parameter groups; and signals measured around the step.

    python examples/pytorch_loop.py [--steps 200]

Trains on scikit-learn's digits. Starts a service of its own, unless FLYBALL_SERVER names one. Only the lines with
`governor` in them are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits

import flyball
import flyball_server

#: Batches that make up one optimizer step.
GATHERED = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print how it went."""
    parser = argparse.ArgumentParser(description="A plain PyTorch loop, steered.")
    parser.add_argument("--run", default="pytorch-loop")
    parser.add_argument("--policy", default="greedy")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER") or stack.enter_context(flyball_server.running()).http
        train(server, options.run, options.policy, options.steps)


def train(server: str, run: str, policy: str, steps: int) -> None:
    """One run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    body = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    head = torch.nn.Linear(64, 10)
    model = torch.nn.Sequential(body, head)
    optimizer = torch.optim.AdamW(
        [
            {"name": "body", "params": body.parameters(), "lr": 2e-3},
            {"name": "head", "params": head.parameters(), "lr": 1e-3},
        ]
    )
    # In float16 gradients must be scaled; a step whose gradients overflow is skipped, and is no step for Flyball.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    measured = ("update_norm", "distance", "inner_product")
    governor = flyball.attach(optimizer, run=run, policy=policy, server=server, signals=measured)
    with governor:
        while governor.status.step < steps:
            total = torch.zeros(())
            for _ in range(GATHERED):
                batch = torch.randint(len(images), (32,))
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]) / GATHERED
                scaler.scale(loss).backward()
                total += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # Once per optimizer step, with tensors as they are: none is read here if it lives on a device.
            governor.step(total, grad_norm=norm)
    status = governor.status
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    used = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in optimizer.param_groups)
    print(f"{status.step} steps, {status.skipped} skipped; accuracy {accuracy:.3f}; learning rates at the end: {used}")
    print(f"Flyball added {status.added_us:.0f} us a step, {', '.join(measured)} included")
    print(f"not delivered: {status.waiting + status.dropped}")


if __name__ == "__main__":
    main()
