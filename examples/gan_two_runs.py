"""A generative adversarial network: two optimizers, each steered as a run of its own.

    python examples/gan_two_runs.py [--steps 600]

A generator learns to draw points on a circle. Two calls of `attach` make two runs, which may have different policies
and are steered, held and compared apart from each other; a label says that they belong together. The generator follows
a schedule; the discriminator warms up and then keeps its learning rate, until somebody overrides it. (A rule that waits
for a loss to fall is of no use to either: here a loss falls while the other one loses.) Starts a service of its own,
unless FLYBALL_SERVER names one. Only the lines with `steer` or `governor` in them are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence

import torch

import flyball
import flyball_server


def main(argv: Sequence[str] | None = None) -> None:
    """Train both, and print how it went."""
    parser = argparse.ArgumentParser(description="A GAN as two steered runs.")
    parser.add_argument("--name", default="gan", help="what the runs' names begin with")
    parser.add_argument("--steps", type=int, default=600, help="steps of each optimizer")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER") or stack.enter_context(flyball_server.running()).http
        train(server, options.name, options.steps)


def network(inputs: int, outputs: int) -> torch.nn.Module:
    """A small multilayer perceptron."""
    nn = torch.nn
    inside = nn.Linear(inputs, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2)
    return nn.Sequential(*inside, nn.Linear(48, outputs))


def circle(n: int) -> torch.Tensor:
    """n points near the unit circle, [n, 2]."""
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.02 * torch.randn(n, 2)


def off_circle(generator: torch.nn.Module) -> float:
    """How far from the circle the drawn points are, on average."""
    with torch.no_grad():
        return (generator(torch.randn(1000, 4)).norm(dim=1) - 1).abs().mean().item()


def train(server: str, name: str, steps: int) -> None:
    """Two runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator, discriminator = network(4, 2), network(2, 1)
    draws = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    judges = torch.optim.Adam(discriminator.parameters(), lr=5e-3, betas=(0.5, 0.99))
    steer = {"server": server, "labels": {"gan": name}, "signals": ("grad_norm", "update_norm")}
    schedule = {"type": "cosine", "T_max": steps, "eta_min": 2e-4}
    first = flyball.attach(draws, run=f"{name}-generator", policy="constant", base=schedule, **steer)
    second = flyball.attach(
        judges, run=f"{name}-discriminator", policy={"type": "warmup", "steps": 50}, guard={"max_lr": 1e-2}, **steer
    )
    began = off_circle(generator)
    right, wrong = torch.ones(64, 1), torch.zeros(64, 1)
    judge = torch.nn.functional.binary_cross_entropy_with_logits
    with first as generator_governor, second as discriminator_governor:
        for _ in range(steps):
            fake = generator(torch.randn(64, 4))
            judges.zero_grad()
            loss = judge(discriminator(circle(64)), right) + judge(discriminator(fake.detach()), wrong)
            loss.backward()
            judges.step()
            discriminator_governor.step(loss)

            draws.zero_grad()
            loss = judge(discriminator(fake), right)
            loss.backward()
            draws.step()
            generator_governor.step(loss)
    print(f"points drawn are off the circle by {began:.3f} at first, and by {off_circle(generator):.3f} at the end")
    for governor, optimizer in ((first, draws), (second, judges)):
        status = governor.status
        print(
            f"{status.run}: {status.step} steps, learning rate {optimizer.param_groups[0]['lr']:.3g} at the end, "
            f"not delivered {status.waiting + status.dropped}"
        )


if __name__ == "__main__":
    main()
