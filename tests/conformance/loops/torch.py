"""A plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tests.conformance.loop import AFTER_CLOSE_LR, Trained

import flyball


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(
        [
            {"name": "body", "params": body.parameters(), "lr": 0.1},
            {"name": "head", "params": head.parameters(), "lr": 0.01},
        ]
    )
    used: list[tuple[float, ...]] = []
    governor = flyball.attach(optimizer, **options)
    optimizer.register_step_post_hook(lambda *_: used.append(tuple(g["lr"] for g in optimizer.param_groups)))
    for i, value in enumerate(trace):
        before(i)
        if i == meddle_at:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        loss = 0 * head(body(torch.ones(1, 2))).sum() + value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss)
    token, status = governor.state_dict(), governor.status
    governor.close()
    for group in optimizer.param_groups:
        group["lr"] = AFTER_CLOSE_LR
    optimizer.step()
    return Trained(used[:-1], token, status, used[-1])
