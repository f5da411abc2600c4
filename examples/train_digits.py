"""Train a small network on scikit-learn's digits, steered by a Flyball service. Copy what you need.

    flyball-server serve &
    python examples/train_digits.py --run digits-1 --policy windowed --lr 0.05

Prints one line of JSON at the end. Only the lines with `governor` in them are Flyball's.
"""

from __future__ import annotations

import argparse
import json

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flyball


def digits() -> list[torch.Tensor]:
    """Training images, test images, training labels, test labels; images are 8 x 8, from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in parts[:2])
    y_train, y_test = (torch.tensor(part) for part in parts[2:])
    return [x_train, x_test, y_train, y_test]


def network(kind: str) -> torch.nn.Module:
    """A multilayer perceptron ("mlp") or a convolutional network ("conv")."""
    nn = torch.nn
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def as_policy(text: str) -> str | dict[str, object]:
    """A policy's name, or a JSON mapping {"type": NAME, ...}."""
    return json.loads(text) if text.startswith("{") else text


def main() -> None:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description="Train a small network on digits, steered by a Flyball service.")
    parser.add_argument("--run", required=True, help="the run's name")
    parser.add_argument("--project", default="default")
    parser.add_argument("--policy", type=as_policy, default="constant", help="a name, or '{\"type\": NAME, ...}'")
    parser.add_argument("--guard", type=json.loads, default={}, help="limits, such as '{\"max_lr\": 0.5}'")
    parser.add_argument("--lr", type=float, required=True, help="the learning rate that the optimizer is made with")
    parser.add_argument("--server", help="grpc://HOST:PORT or http://HOST:PORT")
    parser.add_argument("--network", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x_train, x_test, y_train, y_test = digits()
    model = network(options.network)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)

    governor = flyball.attach(
        optimizer,
        run=options.run,
        project=options.project,
        policy=options.policy,
        guard=options.guard,
        server=options.server,
        labels={"network": options.network},
    )
    losses = []
    with governor:
        for _ in range(options.steps):
            batch = torch.randint(len(x_train), (64,))
            loss = torch.nn.functional.cross_entropy(model(x_train[batch]), y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
            optimizer.step()
            governor.step(loss, grad_norm=torch.stack(norms).norm())
            losses.append(loss.item())

    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
    status = governor.status
    result = {
        "run": status.run,
        "steps": options.steps,
        "first_loss": sum(losses[:20]) / len(losses[:20]),
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy": accuracy,
        "added_us": status.added_us,
        "undelivered": status.waiting + status.dropped,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
