"""A plain loop prepared by Accelerate: every optimizer step is accumulated from two micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tests.conformance.loop import AFTER_CLOSE_LR, Trained

import flyball


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`. Both micro-batches have the step's loss, so that their mean is it."""
    body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    model = torch.nn.Sequential(body, head)
    optimizer = torch.optim.SGD(
        [
            {"name": "body", "params": body.parameters(), "lr": 0.1},
            {"name": "head", "params": head.parameters(), "lr": 0.01},
        ]
    )
    batches = [torch.full((1,), value) for value in trace for _ in range(2)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, wrapped, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    used: list[tuple[float, ...]] = []
    governor = flyball.attach(wrapped, **options)
    optimizer.register_step_pre_hook(lambda *_: used.append(tuple(g["lr"] for g in optimizer.param_groups)))
    losses: list[torch.Tensor] = []
    for micro, value in enumerate(loader):
        i = micro // 2
        if micro % 2 == 0:
            before(i)
            if i == meddle_at:
                for group in wrapped.param_groups:
                    group["lr"] *= 0.5
        with accelerator.accumulate(model):
            loss = 0 * model(torch.ones(1, 2)).sum() + value.sum()
            accelerator.backward(loss)
            wrapped.step()
            wrapped.zero_grad()
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            governor.step(torch.stack(losses).mean())
            losses.clear()
    token, status = governor.state_dict(), governor.status
    governor.close()
    for group in wrapped.param_groups:
        group["lr"] = AFTER_CLOSE_LR
    wrapped.step()
    return Trained(used[:-1], token, status, used[-1])
