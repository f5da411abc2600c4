"""Hugging Face's Trainer, with its own scheduler left in place (`FlyballCallback` neutralises or multiplies it)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tests.conformance.loop import AFTER_CLOSE_LR, Trained
from transformers import Trainer, TrainerCallback, TrainingArguments

from flyball.adapters.transformers import FlyballCallback


class Model(torch.nn.Module):
    """A model whose loss is what its batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

    def forward(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, as the Trainer wants it."""
        return {"loss": 0 * self.head(self.body(torch.ones(1, 2))).sum() + value.sum()}


class Trace(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """One example per loss, in order."""

    def __init__(self, trace: Sequence[float]) -> None:
        self.trace = trace

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for value in self.trace:
            yield {"value": torch.tensor(value)}


class Around(TrainerCallback):
    """What is done and seen around the steps."""

    def __init__(self, flyball: FlyballCallback, before: Callable[[int], None], meddle_at: int | None) -> None:
        self.flyball, self.before, self.meddle_at = flyball, before, meddle_at
        self.used: list[tuple[float, ...]] = []
        self.last: tuple[Any, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After FlyballCallback's, so that the hook sees what is used."""
        steps = kwargs["optimizer"].optimizer
        steps.register_step_pre_hook(lambda *_: self.used.append(tuple(g["lr"] for g in steps.param_groups)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meddle as another callback would."""
        self.before(state.global_step)
        if state.global_step == self.meddle_at:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= 0.5

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is reported, and the governor still open."""
        if state.global_step == state.max_steps and self.flyball.governor is not None:
            self.last = self.flyball.governor.state_dict(), self.flyball.governor.status


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    model = Model()
    optimizer = torch.optim.SGD(
        [
            {"name": "body", "params": model.body.parameters(), "lr": 0.1},
            {"name": "head", "params": model.head.parameters(), "lr": 0.01},
        ]
    )
    callback = FlyballCallback(**options)
    around = Around(callback, before, meddle_at)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=len(trace),
            per_device_train_batch_size=1,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=args,
            train_dataset=Trace(trace),
            optimizers=(optimizer, None),
            callbacks=[callback, around],
        ).train()
    for group in optimizer.param_groups:
        group["lr"] = AFTER_CLOSE_LR
    optimizer.step()
    return Trained(around.used[:-1], *around.last, around.used[-1])
