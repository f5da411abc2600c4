"""Goal: a loop prepared by Accelerate is steered as a plain one is: its wrapped optimizer, scheduler and accumulation.

Method: Accelerate's own wrappers on a real service in lockstep; what was applied is read in the optimizer's step.
"""

from itertools import count

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

import flyball
import flyball_server

names = count()
#: Cuts by half at every step whose loss is no better than the best.
HALVING = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"a{next(names)}", "policy": HALVING, "lag": 0, "wait_s": 10.0, "server": service.http}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield attach
    for governor in opened:
        governor.close("")


def parts():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    used = []
    return model, optimizer, used


def watch(optimizer, used):
    """After `attach`, so that what is seen is what Flyball wrote."""
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))


def test_micro_batches_are_no_steps_and_the_last_ones_of_an_epoch_are_one(steer):
    model, optimizer, used = parts()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = torch.utils.data.DataLoader(torch.ones(5, 1))
    model, wrapped, data = accelerator.prepare(model, optimizer, data)
    governor = steer(wrapped)
    watch(optimizer, used)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())
            wrapped.step()
            wrapped.zero_grad()
        if accelerator.sync_gradients:
            governor.step(1.0)
    assert used == [0.1, 0.1, 0.05]
    assert governor.status.skipped == 0


@pytest.mark.parametrize("times", [1, 2])
def test_a_prepared_schedulers_value_is_multiplied_however_often_it_steps(steer, times):
    """On n processes Accelerate steps a scheduler n times after every update."""
    model, optimizer, used = parts()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    accelerator = Accelerator(cpu=True)
    model, wrapped, scheduler = accelerator.prepare(model, optimizer, schedule)
    assert type(scheduler) is AcceleratedScheduler
    governor = steer(wrapped, mode="multiplier")
    watch(optimizer, used)
    for _ in range(4):
        accelerator.backward(model(torch.ones(1, 1)).mean())
        wrapped.step()
        for _ in range(times):
            scheduler.step()
        wrapped.zero_grad()
        governor.step(1.0)
    assert used == pytest.approx([0.1 * (1 - i * times / 10) * 0.5 ** max(i - 1, 0) for i in range(4)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - 4 * times / 10))
    assert governor.status.conflicts == 0


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_a_step_that_was_skipped_is_no_step(steer, mode):
    model, optimizer, used = parts()
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    governor = steer(wrapped, mode=mode)
    watch(optimizer, used)
    skipped = []
    for value in (1.0, float("inf"), 1.0, 1.0):
        scaler.scale(model(torch.full((1, 1), value)).mean()).backward()
        wrapped.step()
        wrapped.zero_grad()
        skipped.append(wrapped.step_was_skipped)
        governor.step(value)
    assert skipped == [False, True, False, False]
    assert used == [0.1, 0.1, 0.05]
    assert governor.status.skipped == 1


def test_a_wrapper_and_what_it_holds_are_one_optimizer(steer):
    model, optimizer, _ = parts()
    _, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    steer(wrapped)
    with pytest.raises(ValueError, match="steered by another governor"):
        steer(optimizer)
