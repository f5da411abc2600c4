"""Goal: in multiplier mode a scheduler in the process sees its own values and nothing else, whatever happens in a step.

Method: real optimizers and torch's own schedulers on a real service in lockstep, beside a twin that nobody steers; what
the scheduler sees is compared to the last bit. Warnings are errors.
"""

import gc
import inspect
from itertools import count

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flyball
import flyball_server
from flyball.adapters.around import factor

names = count()
S = torch.optim.lr_scheduler
#: How each scheduler of torch is made; a new one fails `test_no_scheduler_of_torch_is_forgotten`.
SCHEDULES = {
    "StepLR": lambda o: S.StepLR(o, 3, gamma=0.3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.25, total_iters=5),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 17),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.95),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.3, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: S.OneCycleLR(o, [0.3, 0.1], total_steps=100),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1), S.ExponentialLR(o, 0.9)], [4]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1), S.ExponentialLR(o, 0.9)]),
}


def test_no_scheduler_of_torch_is_forgotten():
    kinds = {
        name
        for name, kind in vars(S).items()
        if inspect.isclass(kind) and issubclass(kind, S.LRScheduler | S.ChainedScheduler)
    }
    assert kinds - {"LRScheduler", "_LRScheduler"} == set(SCHEDULES)


def advance(schedule):
    """After one step; a loss that never gets better."""
    if isinstance(schedule, S.ReduceLROnPlateau):
        schedule.step(1.0)
    else:
        schedule.step()


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"m{next(names)}", "lag": 0, "wait_s": 10.0, "server": service.grpc, "mode": "multiplier"}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield attach
    for governor in opened:
        governor.close("")


def optimizer_of(lr=0.1, tensor=False, **options):
    rates = [torch.tensor(v, dtype=torch.float64) if tensor else v for v in (lr, lr / 7)]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": v} for v in rates]
    for group in groups:
        group["params"][0].grad = torch.ones(1)
    return torch.optim.Adam(groups, lr=rates[0], **options)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def spied(optimizer):
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(rates(optimizer)))
    return used


class Broken(Exception):
    pass


def breaks():
    raise Broken


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("made", ["before", "after", "both"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_scheduler_made_at_any_time_sees_its_own_values_also_behind_a_step_that_raises(
    scripted, steer, kind, made, tensor
):
    alone = optimizer_of(tensor=tensor, betas=(0.9, 0.99))
    its = SCHEDULES[kind](alone)
    optimizer = optimizer_of(tensor=tensor, betas=(0.9, 0.99))
    held = [group["lr"] for group in optimizer.param_groups]
    if made != "after":
        schedule = SCHEDULES[kind](optimizer)
    governor = steer(optimizer, policy=scripted(factor=[0.3, 7.0, 1.1]))
    if made == "after":
        schedule = SCHEDULES[kind](optimizer)
    if made == "both":
        S.ConstantLR(optimizer, 1.0)
    used = spied(optimizer)
    for t in range(12):
        with pytest.raises(Broken):
            optimizer.step(breaks)
        assert rates(optimizer) == rates(alone)
        optimizer.step()
        governor.step(1.0)
        assert rates(optimizer) == rates(alone)
        assert used.pop() == [lr * (0.3, 7.0, 1.1)[t % 3] for lr in rates(alone)]
        alone.step()
        advance(its)
        advance(schedule)
    if tensor:
        assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
    governor.close()
    assert rates(optimizer) == rates(alone)
    optimizer.step()
    advance(schedule)
    alone.step()
    advance(its)
    assert rates(optimizer) == rates(alone), "and goes on by itself after the end"


@pytest.mark.parametrize("tensor", [False, True])
def test_warm_restarts_by_fractions_of_an_epoch_see_their_own_values(scripted, steer, tensor):
    alone, optimizer = optimizer_of(tensor=tensor), optimizer_of(tensor=tensor)
    its, schedule = (S.CosineAnnealingWarmRestarts(one, 2) for one in (alone, optimizer))
    governor = steer(optimizer, policy=scripted(factor=[0.3, 7.0]))
    used = spied(optimizer)
    for t in range(10):
        optimizer.step()
        governor.step(1.0)
        assert used.pop() == [lr * (0.3, 7.0)[t % 2] for lr in rates(alone)]
        alone.step()
        for one in (its, schedule):
            one.step((t + 1) / 3)
        assert rates(optimizer) == rates(alone)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_thousand_multipliers_leave_no_trace(scripted, steer, tensor):
    generator = torch.Generator().manual_seed(1)
    factors = (torch.rand(1000, generator=generator, dtype=torch.float64) * 3 + 1e-3).tolist()
    optimizer = optimizer_of(0.123456789, tensor)
    before, used = rates(optimizer), spied(optimizer)
    governor = steer(optimizer, policy=scripted(factor=factors))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(rates(optimizer)))
    for _ in range(1000):
        optimizer.step()
        governor.step(1.0)
        assert rates(optimizer) == before
    assert len({row[0] for row in seen}) > 900, "they were applied"
    assert used == [before] * 1000, "a hook from before attach sees the base values as well"


def test_one_tensor_in_several_groups_is_multiplied_once_and_restored(scripted, steer):
    lr = torch.tensor(0.1)
    optimizer = optimizer_of()
    for group in optimizer.param_groups:
        group["lr"] = lr
    governor, used = steer(optimizer, policy=scripted(factor=[0.5])), spied(optimizer)
    before = lr.clone()
    optimizer.step()
    governor.step(1.0)
    assert used == [[float(before) / 2] * 2]
    assert torch.equal(lr, before)
    assert all(group["lr"] is lr for group in optimizer.param_groups)


def test_a_warm_up_from_zero_freezes_nothing(service, scripted, steer):
    optimizer = optimizer_of()
    schedule = S.LambdaLR(optimizer, lambda t: min(1.0, t / 4))
    assert rates(optimizer) == [0.0, 0.0]
    governor, used = steer(optimizer, policy=scripted(factor=[2.0])), spied(optimizer)
    for _ in range(6):
        optimizer.step()
        governor.step(1.0)
        schedule.step()
    assert [row[0] for row in used] == [2 * 0.1 * w for w in (0, 0.25, 0.5, 0.75, 1, 1)]
    found = httpx.get(f"{service.http}/v1/runs/{governor.status.run}", trust_env=False).json()
    assert found["settings"][0]["lr"] == 0.2


def test_a_resumed_run_multiplies_by_the_factor_of_the_recorded_reference(scripted, steer):
    optimizer = optimizer_of()
    governor = steer(optimizer, policy=scripted(factor=[0.5]))
    optimizer.step()
    governor.step(1.0)
    governor.close("")
    halved = optimizer_of(0.05)  # what its checkpoint brought back
    governor, used = steer(halved, run=governor.status.run, resume=True), spied(halved)
    halved.step()
    assert used == [[0.025, 0.05 / 7 / 2]]


def test_the_optimizer_is_its_own_again_after_the_end(scripted, steer):
    optimizer = optimizer_of()
    plain = type(optimizer).step
    for _ in range(3):
        steer(optimizer, policy=scripted(factor=[0.5])).close()
        assert "step" not in optimizer.__dict__
        assert optimizer.step.__func__ is plain
    S.StepLR(optimizer, 3)
    wrapped = optimizer.__dict__["step"]
    steer(optimizer, policy=scripted(factor=[0.5])).close()
    assert optimizer.__dict__["step"] is wrapped
    optimizer.step()
    gc.collect()


def test_grad_scaler_and_arguments_reach_the_step(scripted, steer):
    optimizer = optimizer_of()
    governor, used = steer(optimizer, policy=scripted(factor=[0.5])), spied(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    governor.step(1.0)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert used == [[0.05, 0.1 / 7 / 2]] * 2
    assert rates(optimizer) == [0.1, 0.1 / 7]


short = st.builds(lambda digits, places: float(f"{digits}e-{places}"), st.integers(1, 10**12 - 1), st.integers(0, 20))


@given(reference=st.floats(1e-12, 1e3), m=short | st.sampled_from([0.5, 1.0, 2.0, 1.1, 1 / 1024]))
def test_a_short_multiplier_comes_back_to_the_last_bit(reference, m):
    assert factor(reference * m, reference) == m
    assert factor(reference * m, 0.0) == 1.0


@given(reference=st.floats(1e-12, 1e3), m=st.floats(1e-6, 1e6))
def test_any_multiplier_comes_back_within_rounding(reference, m):
    assert factor(reference * m, reference) == pytest.approx(m, rel=4e-16)


@pytest.mark.parametrize("tensor", [False, True])
def test_absolute_bounds_hold_for_the_product_and_factor_bounds_for_the_multiplier(scripted, steer, tensor):
    """A schedule far above and below its start: min_lr and max_lr clip what is used, never the multiplier itself."""
    optimizer = optimizer_of(0.1, tensor)
    schedule = S.LambdaLR(optimizer, lambda t: [1.0, 10.0, 0.01, 0.0][min(t, 3)])
    guard = {"min_lr": 0.004, "max_lr": 0.5, "max_factor": 4.0, "groups": {"group1": {"max_lr": 0.1}}}
    governor, used = steer(optimizer, policy=scripted(factor=[2.0, 2.0, 2.0, 9.0]), guard=guard), spied(optimizer)
    for _ in range(4):
        before = rates(optimizer)
        optimizer.step()
        assert rates(optimizer) == before
        governor.step(1.0)
        schedule.step()
    assert [row[0] for row in used] == pytest.approx([0.2, 0.5, 0.004, 0.0])
    assert [row[1] for row in used] == pytest.approx([0.2 / 7, 0.1, 0.004, 0.0])


def test_bounds_hold_before_the_service_was_ever_heard(steer):
    optimizer = optimizer_of(0.1)
    steer(optimizer, server="http://127.0.0.1:9", guard={"max_lr": 0.05}, lag=None, start_wait_s=0.1)
    used = spied(optimizer)
    optimizer.step()
    assert used[0][0] == 0.05
    assert rates(optimizer)[0] == 0.1
