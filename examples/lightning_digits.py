"""Classify scikit-learn's digits with Lightning, steered by a Flyball service. Copy what you need.

    python examples/lightning_digits.py --run digits-1 --policy windowed --lr 0.2

Starts a service of its own unless FLYBALL_SERVER says where one is. Only the lines with `steered` are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import uuid
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import flyball_server
from flyball.adapters.lightning import FlyballCallback


class Digits(pl.LightningModule):
    """A network of one hidden layer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """The loss of one batch."""
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        """Logs what the service is told as well: val_loss, val_accuracy."""
        images, labels = batch
        found = self.network(images)
        self.log("val_loss", torch.nn.functional.cross_entropy(found, labels))
        self.log("val_accuracy", (found.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer with one group."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description="Train a small network on digits with Lightning, steered by Flyball.")
    parser.add_argument("--run", default=f"lightning-digits-{uuid.uuid4().hex[:6]}")
    parser.add_argument("--policy", default="windowed")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(argv)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels)
    train, held_out = (torch.utils.data.Subset(data, range(*ends)) for ends in ((0, 1500), (1500, len(data))))

    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER") or stack.enter_context(flyball_server.running()).http
        steered = FlyballCallback(run=options.run, policy=options.policy, server=server)
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[steered],
        )
        trainer.fit(Digits(options.lr), DataLoader(train, 64, shuffle=True), DataLoader(held_out, 297))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = {"run": options.run, "steps": trainer.global_step, **found}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
