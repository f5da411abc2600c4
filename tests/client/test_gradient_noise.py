"""Goal: gradients get exactly the noise that the run's seed and step say, once, and a replay adds the same again.

Method: real optimizers on a real service in lockstep, under a policy that says what the test tells it; the noise is
computed a second time here, from the formula in docs/wire.md.
"""

import logging
from copy import deepcopy
from itertools import count

import httpx
import pytest
import torch

import flyball
import flyball_server

names = count()
WORD = 2**64


def u64(*words):
    z = 0x9E3779B97F4A7C15
    for word in words:
        z = ((z ^ word % WORD) + 0x9E3779B97F4A7C15) % WORD
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % WORD
        z ^= z >> 31
    return z


def noise(seed, step, a, b, like):
    generator = torch.Generator(like.device)
    generator.manual_seed(((u64(seed, 0x300, step, 0) >> 1) + 1009 * a + b) % 2**63)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"n{next(names)}", "lag": 0, "wait_s": 10.0, "server": service.grpc, "seed": 7}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield attach
    for governor in opened:
        governor.close("")


def gradients(optimizer):
    return [
        [None if p.grad is None else p.grad.to_dense().clone() for p in group["params"]]
        for group in optimizer.param_groups
    ]


class Spy:
    """The gradients that the optimizer really stepped with, and what the receipts say."""

    def __init__(self, optimizer, governor):
        self.used, self.told = [], []
        optimizer.register_step_pre_hook(lambda *_: self.used.append(gradients(optimizer)))
        receipt = governor._session.receipt
        governor._session.receipt = lambda step, decided, settings, *rest, **more: (
            self.told.append(settings.noise_std),
            receipt(step, decided, settings, *rest, **more),
        )


def of(value, *shape, dtype=torch.float32):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = None if value is None else torch.full(shape, value, dtype=dtype)
    return parameter


def step(optimizer, governor, n=1):
    for _ in range(n):
        optimizer.step()
        governor.step(1.0)


def test_the_noise_is_the_formulas_of_seed_step_group_and_parameter(service, scripted, steer):
    assert u64(-1, 0x300, 123456789, 3) == 0x734CC47C6B1EEDB4, "the formula of this file is the published one"
    for server, seed in ((service.http, 7), (service.grpc, -(2**53))):
        groups = [
            {"params": [of(1.0, 3, 2), of(None, 2), of(2.0, 5, dtype=torch.float64)]},
            {"params": [of(3.0, 4)]},
            {"params": [of(0.5, 2, dtype=torch.bfloat16), of(0.25)]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.0)
        std = [(0.1, 0.0, 0.2), (0.0, 0.0, 0.0), (0.3, 0.0, 0.0)]
        governor = steer(optimizer, policy=scripted(noise=std), seed=seed, server=server)
        spy, wanted = Spy(optimizer, governor), gradients(optimizer)
        chance = torch.get_rng_state()
        step(optimizer, governor, 6)
        assert torch.equal(torch.get_rng_state(), chance), "the job's own chance is left alone"
        for t in range(6):
            for a, row in enumerate(wanted):
                for b, grad in enumerate(row):
                    if grad is not None and std[t % 3][a]:
                        grad += noise(seed, t, a, b, grad) * std[t % 3][a]
                    found = spy.used[t][a][b]
                    assert found is grad is None or torch.equal(found, grad)
        assert spy.told == [std[0], None, std[2]] * 2


def test_a_resumed_run_draws_from_the_recorded_seed_at_the_runs_own_step(scripted, steer):
    first = torch.optim.SGD([of(0.0, 2)], lr=0.1)
    governor = steer(first, policy=scripted(noise=[(1.0,)]), seed=11)
    step(first, governor, 3)
    governor.close("")
    again = torch.optim.SGD([of(0.0, 2)], lr=0.1)
    governor = steer(again, run=governor.status.run, resume=True, seed=99)
    spy = Spy(again, governor)
    step(again, governor)
    assert torch.equal(spy.used[0][0][0], noise(11, 3, 0, 0, torch.zeros(2)))


def training(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam([{"params": layer.parameters()} for layer in (model[0], model[2])], lr=0.01)
    data = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))

    def train(governor, n):
        for _ in range(n):
            optimizer.zero_grad()
            loss = (model(data) ** 2).mean()
            loss.backward()
            optimizer.step()
            governor.step(loss)

    return model, optimizer, train


def restore(model, optimizer, point):
    for kind, state in zip((model, optimizer), deepcopy(point), strict=True):
        kind.load_state_dict(state)


def test_training_twice_from_a_checkpoint_gives_the_same_parameters_bit_for_bit(scripted, steer):
    policy = scripted(noise=[(0.1, 0.2), (0.0, 0.5), (0.3, 0.0)], factor=[1.0, 0.7])
    model, optimizer, train = training()
    governor = steer(optimizer, policy=policy)
    train(governor, 5)
    # Copies, as torch goes on with the very tensors that it is given.
    point, token = deepcopy((model.state_dict(), optimizer.state_dict())), governor.state_dict()
    train(governor, 8)
    wanted = [p.clone() for p in model.parameters()]

    restore(model, optimizer, point)
    governor.load_state_dict(token)
    train(governor, 8)
    assert all(map(torch.equal, wanted, model.parameters()))
    governor.close("")

    other, optimizer, train = training(5)
    restore(other, optimizer, point)
    train(steer(optimizer, run=governor.status.run, resume=token, seed=3), 8)
    assert all(map(torch.equal, wanted, other.parameters()))

    quiet, optimizer, train = training()
    train(steer(optimizer, policy=scripted(factor=[1.0, 0.7])), 13)
    assert not any(map(torch.equal, wanted, quiet.parameters())), "the noise does something"


def test_the_noise_has_the_standard_deviation_it_is_told(scripted, steer):
    optimizer = torch.optim.SGD([of(5.0, 1000, 1000)], lr=0.0)
    governor = steer(optimizer, policy=scripted(noise=[(0.02,)]))
    step(optimizer, governor)
    grad = optimizer.param_groups[0]["params"][0].grad
    assert float(grad.std()) == pytest.approx(0.02, rel=0.005)
    assert float(grad.mean()) == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize("rows", [[], [(0.0,)]])
def test_without_noise_a_gradient_keeps_every_bit(scripted, steer, rows):
    parameter = of(0.0, 4)
    parameter.grad = torch.tensor([0.1, -0.0, float("nan"), float("-inf")])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=rows))
    spy = Spy(optimizer, governor)
    before = parameter.grad.clone().view(torch.int32)
    step(optimizer, governor, 3)
    assert all(torch.equal(used[0][0].view(torch.int32), before) for used in spy.used)
    assert spy.told == [None]


def test_what_cannot_take_noise_goes_without_it_and_is_named_once(scripted, steer, caplog):
    table, dense = torch.nn.Embedding(4, 2, sparse=True), of(1.0, 2)
    optimizer = torch.optim.SGD([{"params": [table.weight]}, {"params": [dense]}], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=[(0.5, 0.5)]))
    spy = Spy(optimizer, governor)
    with caplog.at_level(logging.WARNING, "flyball"):
        for _ in range(3):
            optimizer.zero_grad()
            (table(torch.tensor([1])).sum() + dense.sum()).backward()
            step(optimizer, governor)
    for t, used in enumerate(spy.used):
        assert torch.equal(used[0][0], torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        assert torch.equal(used[1][0], torch.ones(2) + noise(7, t, 1, 0, dense) * 0.5)
    assert spy.told == [(0.0, 0.5)]
    assert len([r for r in caplog.records if "sparse" in r.getMessage()]) == 1


def test_a_failure_while_noise_is_added_leaves_the_step_to_itself(scripted, steer, monkeypatch):
    optimizer = torch.optim.SGD([of(1.0, 2)], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=[(0.5,)]))
    spy = Spy(optimizer, governor)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "randn", fails)
    step(optimizer, governor, 2)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2) * -0.1 * 3)
    assert spy.told == [None]


def test_gradients_that_are_still_scaled_get_scaled_noise(scripted, steer):
    after = []
    for fused in (False, True):
        w = torch.nn.Parameter(torch.ones(64))
        optimizer = torch.optim.SGD([w], lr=0.1, fused=fused)
        governor = steer(optimizer, policy=scripted(noise=[(0.5,)]))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=fused)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale((w**2).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            governor.step(1.0)
        assert governor.status.step == 3
        after.append(w.detach())
    assert torch.allclose(*after, rtol=1e-5, atol=1e-6)
    assert float((after[0] - after[0].mean()).std()) > 0.05


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_makes_the_gradients_and_the_noise_comes_behind_it(scripted, steer, named):
    w = of(None, 3)
    optimizer = torch.optim.SGD([w], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=[(0.5,)]))

    def closure():
        optimizer.zero_grad()
        (w * 2.0).sum().backward()
        return 4.0

    for t in range(3):
        found = optimizer.step(closure=closure) if named else optimizer.step(closure)
        governor.step(found)
        assert found == 4.0
        assert torch.equal(w.grad, torch.full((3,), 2.0) + noise(7, t, 0, 0, w.grad) * 0.5)

    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(fails)


def test_the_journal_says_what_was_added(service, scripted, steer):
    optimizer = torch.optim.SGD([of(1.0, 2)], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=[(0.5,)]))
    step(optimizer, governor, 2)
    governor.close()
    with httpx.Client(base_url=service.http, trust_env=False) as http:
        found = http.get(f"/v1/runs/{governor.status.run}").raise_for_status().json()
    assert found["settings"][0]["noise_std"] == 0.5
