"""A LightningModule fitted by a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from tests.conformance.loop import AFTER_CLOSE_LR, Trained

from flyball.adapters.lightning import FlyballCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    model, watcher, kept = Model(), Watcher(before, meddle_at), Keep()
    steered = kept.steered = FlyballCallback(**options)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watcher, steered, kept],
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.tensor(trace, dtype=torch.float32)))
    optimizer = model.configured
    for group in optimizer.param_groups:
        group["lr"] = AFTER_CLOSE_LR
    optimizer.step()
    return Trained(model.used[:-1], kept.token, kept.status, model.used[-1])


class Model(pl.LightningModule):
    """The batch is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        self.used: list[tuple[float, ...]] = []
        self.configured: Any = None

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """The loss of one batch."""
        return 0 * self.head(self.body(torch.ones(1, 2))).sum() + batch.sum()

    def configure_optimizers(self) -> Any:
        """Two groups by name."""
        self.configured = torch.optim.SGD(
            [
                {"name": "body", "params": self.body.parameters(), "lr": 0.1},
                {"name": "head", "params": self.head.parameters(), "lr": 0.01},
            ]
        )
        look = lambda optimizer, *_: self.used.append(tuple(g["lr"] for g in optimizer.param_groups))  # noqa: E731
        self.configured.register_step_post_hook(look)
        return self.configured


class Watcher(pl.Callback):
    """Goes before each step, and is the other writer."""

    def __init__(self, before: Callable[[int], None], meddle_at: int | None) -> None:
        self._before, self._meddle_at = before, meddle_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the step."""
        self._before(batch_idx)
        if batch_idx == self._meddle_at:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= 0.5


class Keep(pl.Callback):
    """Keeps what the governor says at the end."""

    token: dict[str, Any]
    status: Any
    steered: FlyballCallback

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Behind the last step."""
        self.token, self.status = self.steered.governor.state_dict(), self.steered.governor.status
