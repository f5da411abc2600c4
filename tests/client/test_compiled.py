"""Goal: a compiled optimizer step is compiled once, however often the learning rate changes.

Method: torch's own counters, over a thousand changes. The eager backend counts compilations as inductor does, which
would take a minute of its own.
"""

import logging
import warnings

import pytest
import torch

pytestmark = pytest.mark.filterwarnings(
    # torch._dynamo loads parts of torch and of Python that call themselves deprecated.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


@pytest.fixture(autouse=True)
def _from_nothing():
    """Each test begins with nothing compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def adam(tensor=True):
    groups = [{"params": [torch.nn.Parameter(torch.ones(4))]} for _ in range(2)]
    groups[1]["lr"] = torch.tensor(0.02) if tensor else 0.02
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.1) if tensor else 0.1)
    for group in groups:
        group["params"][0].grad = torch.ones(4)
    return optimizer


def frames():
    counters = torch._dynamo.utils.counters
    return dict(counters["frames"]), counters["stats"]["unique_graphs"]


def compiled(optimizer, how, backend="eager"):
    if how == "the step":
        return torch.compile(optimizer.step, backend=backend)

    def update():
        optimizer.step()

    return torch.compile(update, backend=backend)


@pytest.mark.parametrize("how", ["the step", "a function around it"])
def test_a_thousand_learning_rates_compile_nothing_anew(steered, scripted, how):
    optimizer = adam()
    governor = steered(optimizer, policy=scripted(factor=[1 + t / 1000 for t in range(1010)]))
    step, used = compiled(optimizer, how), set()
    for t in range(1010):
        if t == 10:
            before = frames()
            assert before[1] >= 1, "it is compiled"
        step()
        governor.step(1.0)
        used.add(float(optimizer.param_groups[0]["lr"]))
    assert frames() == before
    assert len(used) == 1010


def test_every_learning_rate_of_a_compiled_step_is_applied(steered, scripted):
    optimizer, factors = adam(), [1.0, 0.5, 0.25, 2.0]
    governor = steered(optimizer, policy=scripted(factor=factors))
    step = compiled(optimizer, "the step")
    twin = adam()
    for factor in factors * 2:
        for group, lr in zip(twin.param_groups, (0.1, 0.02), strict=True):
            group["lr"].fill_(lr * factor)
        step()
        governor.step(1.0)
        twin.step()
    for one, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert torch.allclose(one["params"][0], other["params"][0], rtol=1e-3)
    assert governor.status.conflicts == 0
    assert governor.status.step == 8


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_a_scheduler_on_a_compiled_step_is_multiplied_without_compiling_anew(steered, scripted, mode):
    optimizer = adam()
    governor = steered(optimizer, policy=scripted(factor=[0.5, 0.25, 2.0]), mode=mode)
    step = compiled(optimizer, "a function around it")
    for t in range(60):
        if t == 10:
            before = frames()
        step()
        governor.step(1.0)
        if mode == "multiplier":
            optimizer.param_groups[0]["lr"].mul_(0.99)  # a chainable scheduler, without its own warnings
    assert frames() == before


def test_a_momentum_that_is_steered_on_a_compiled_step_is_warned_of_once(steered, scripted, caplog):
    base = {"type": "one_cycle", "max_lr": 0.1, "total_steps": 40}
    for how in (None, "the step"):
        optimizer = adam()
        governor = steered(optimizer, policy="constant", base=base)
        step = optimizer.step if how is None else compiled(optimizer, how)
        with caplog.at_level(logging.WARNING, "flyball"), warnings.catch_warnings(action="ignore"):
            for _ in range(5):
                step()
                governor.step(1.0)
        told = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
        assert len(told) == (how is not None)
    assert "cycle_momentum=False" in told[0]
