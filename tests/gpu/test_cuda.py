"""Goal: on a CUDA device no step waits for it: what is there is written in place, what is reported arrives later.

Method: torch is told to raise at every synchronisation, around whole steps; what was applied and what the losses were
is looked at afterwards, from outside and in the journal.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx
import pytest
import torch

import flyball
import flyball_server
from flyball.api import Client

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
names = count()
PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}


@pytest.fixture(scope="module")
def service() -> Iterator[flyball_server.Running]:
    with flyball_server.running() as service:
        yield service


class NoWaiting:
    """What is done inside may not synchronise the device."""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def job(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model on the device, and a capturable Adam whose groups have tensors as learning rates."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).cuda()
    groups = [
        {"params": model[0].parameters(), "name": "body", "lr": torch.tensor(0.01, device="cuda")},
        {"params": model[2].parameters(), "name": "head", "lr": torch.tensor(0.001, device="cuda")},
    ]
    return model, torch.optim.Adam(groups, capturable=True, **options)


def losses_of(service: flyball_server.Running, run: str) -> list[float]:
    url = f"{service.http}/v1/runs/{run}/series?signals=loss"
    found = httpx.get(url, trust_env=False, timeout=20).json()["series"]["loss"]["value"]
    return [float(value) for value in found]


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_no_step_waits_for_the_device(service: flyball_server.Running, mode: str, micros: int, fused: bool) -> None:
    model, optimizer = job(fused=True) if fused else job(foreach=True)
    held = [group["lr"] for group in optimizer.param_groups]
    x, y = torch.randn(16, 32, device="cuda"), torch.randn(16, 1, device="cuda")
    run = f"cuda{next(names)}"
    governor = flyball.attach(
        optimizer, run=run, policy="constant", server=service.grpc, mode=mode,
        accumulate="mean" if micros > 1 else None, guard={"min_lr": 1e-6, "max_lr": 0.5},
    )  # fmt: skip
    seen: list[torch.Tensor] = []

    def step() -> None:
        total = torch.zeros((), device="cuda")
        optimizer.zero_grad()
        for micro in range(micros):
            loss = torch.nn.functional.mse_loss(model(x), y)
            (loss / micros).backward()
            total += loss.detach() / micros
            if micro + 1 == micros:
                optimizer.step()
            governor.step(loss)
        seen.append(total)

    with Client(service.http) as client:
        client.override(run, setting="noise_std", value=1e-6, reason="noise draws on the device as well")
    while governor.status.settings is None or governor.status.settings.noise_std is None:
        step()
    for _ in range(3):  # the first ones make buffers and generators, and may wait
        step()
    with NoWaiting():
        for _ in range(200):
            step()
    governor.close()
    assert governor.status.step == len(seen) > 200
    assert governor.status.conflicts == governor.status.bad_values == 0
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
    assert losses_of(service, run) == pytest.approx([float(one) for one in seen], rel=1e-4)


def test_what_was_decided_is_what_the_device_uses(service: flyball_server.Running) -> None:
    model, optimizer = job()
    run = f"cuda{next(names)}"
    governor = flyball.attach(optimizer, run=run, policy=PLATEAU, server=service.grpc, lag=0, wait_s=20.0)
    used = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(5):
        optimizer.step()
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        governor.step(torch.ones((), device="cuda"))
    governor.close()
    body = [0.01, 0.01, 0.005, 0.0025, 0.00125]
    assert used == [pytest.approx([lr, lr / 10], rel=1e-6) for lr in body]


def test_a_group_that_comes_later_is_steered_without_a_wait(service: flyball_server.Running) -> None:
    model, optimizer = job()
    governor = flyball.attach(
        optimizer, run=f"cuda{next(names)}", policy=PLATEAU, server=service.grpc, lag=0, wait_s=20.0
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
        governor.step(1.0)
    later = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    later.grad = torch.zeros_like(later)
    optimizer.add_param_group({"params": [later], "lr": torch.tensor(0.1, device="cuda")})
    optimizer.step()  # makes the new group's state
    governor.step(1.0)
    with NoWaiting():
        optimizer.step()
        governor.step(1.0)
    governor.close()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.0025, 0.00025, 0.025])


def test_a_loss_that_is_not_finite_arrives_as_it_is(service: flyball_server.Running) -> None:
    _, optimizer = job()
    run = f"cuda{next(names)}"
    governor = flyball.attach(optimizer, run=run, policy="constant", server=service.grpc, accumulate="mean")
    for micros in ((1.0, float("nan")), (1.0, 3.0)):
        governor.step(torch.tensor(micros[0], device="cuda"), torch.tensor(2, device="cuda"))
        optimizer.step()
        governor.step(torch.tensor(micros[1], device="cuda"), 2)
    governor.close()
    found = losses_of(service, run)
    assert found[0] != found[0]
    assert found[1] == 2.0
