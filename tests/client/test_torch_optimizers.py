"""Goal: every optimizer of torch, in each of its ways of working, uses what was decided and trains on as ever.

Method: the list is torch's own, so that a new one fails until it is thought of. Each trains beside a twin that nobody
steers but whose learning rate is set by hand to the same values: their weights must be equal to the last bit.
"""

import inspect

import pytest
import torch

ALL = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
#: What some of them need to be told, or given.
OPTIONS = {"LBFGS": {"max_iter": 3}, "SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5}}
ONE_GROUP = {"LBFGS"}
FACTORS = [1.0, 0.5, 2.0, 0.25]


def build(name, *, tensor=False, **options):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(2)]
    groups = weights if name in ONE_GROUP else [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.02}]
    lr = torch.tensor(0.1) if tensor else 0.1
    if tensor and name not in ONE_GROUP:
        groups[1]["lr"] = torch.tensor(0.02)
    return ALL[name](groups, lr=lr, **(OPTIONS.get(name, {}) | options)), weights


def train(optimizer, weights, sparse=False):
    """One step on a loss that every weight has a part in."""

    def closure():
        optimizer.zero_grad()
        loss = sum(((weight - 1) ** 2).sum() for weight in weights)
        loss.backward()
        if sparse:
            for weight in weights:
                weight.grad = weight.grad.to_sparse()
        return loss

    return optimizer.step(closure)


def compare(steered, scripted, name, **options):
    optimizer, weights = build(name, **options)
    twin, theirs = build(name, **options)
    governor = steered(optimizer, policy=scripted(factor=FACTORS))
    first = [float(group["lr"]) for group in twin.param_groups]
    for factor in FACTORS:
        for group, lr in zip(twin.param_groups, first, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor
        loss = train(optimizer, weights, sparse=name == "SparseAdam")
        assert loss == train(twin, theirs, sparse=name == "SparseAdam")
        governor.step(loss)
        assert [float(g["lr"]) for g in optimizer.param_groups] == [float(g["lr"]) for g in twin.param_groups]
    assert all(torch.equal(one, other) for one, other in zip(weights, theirs, strict=True))
    assert governor.status.step == len(FACTORS), "however often a closure was called"
    assert governor.status.conflicts == 0


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_trains_as_if_its_learning_rate_were_set_by_hand(steered, scripted, name):
    compare(steered, scripted, name)


def takes(option):
    return [name for name, kind in ALL.items() if option in inspect.signature(kind).parameters]


@pytest.mark.parametrize("name", takes("capturable"))
def test_a_tensor_learning_rate_is_the_same_object_for_ever_and_each_group_keeps_its_own(steered, scripted, name):
    optimizer, weights = build(name, tensor=True, foreach=False)
    held = [group["lr"] for group in optimizer.param_groups]
    governor = steered(optimizer, policy=scripted(factor=FACTORS))
    for factor in FACTORS:
        governor.step(train(optimizer, weights))
        assert [float(lr) for lr in held] == pytest.approx([0.1 * factor, 0.02 * factor])
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
    assert governor.status.conflicts == 0


@pytest.mark.parametrize("way", ["foreach", "fused", "maximize"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_every_way_of_working_trains_on(steered, scripted, name, way):
    compare(steered, scripted, name, **{way: True})


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_a_learning_rate_that_wants_a_gradient_itself_is_written_all_the_same(steered, scripted, mode):
    """As meta-learning has it: torch refuses to write such a leaf in place."""
    lr, used = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=lr, differentiable=True)
    governor = steered(optimizer, policy=scripted(factor=[0.5]), mode=mode)
    optimizer.register_step_pre_hook(lambda *_: used.append(float(lr.detach())))
    optimizer.step()
    governor.step(1.0)
    assert used == [0.05]
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("accumulate", [None, "mean"])
def test_a_fused_step_that_a_grad_scaler_lets_do_nothing_is_no_step(steered, read, accumulate):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    governor = steered(optimizer, accumulate=accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(6):
        optimizer.zero_grad()
        scaler.scale((weight * (torch.inf if i in (2, 3) else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        governor.step(float(i))
    assert governor.status.step == 4
    governor.close()
    found = read(f"{governor.status.run}/series?signals=loss")["series"]["loss"]["value"]
    assert found == ([0.0, 1.0, 4.0, 5.0] if accumulate is None else [0.0, 1.0, 3.0, 5.0])


class Counted:
    """How often a tensor's value is asked for."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counting(name, getattr(torch.Tensor, name)))

    def counting(self, name, asked):
        def call(tensor, *args, **kwargs):
            self.calls.append(name)
            return asked(tensor, *args, **kwargs)

        return call


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
@pytest.mark.parametrize("accumulate", [None, "mean"])
def test_a_step_asks_for_one_value_at_most_that_of_a_loss_in_memory(steered, monkeypatch, mode, accumulate):
    """On a device each question would be a wait. (A learning rate that is a tensor in memory is read besides.)"""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.02}], lr=0.1, momentum=0.9)
    governor = steered(optimizer, lag=None, mode=mode, accumulate=accumulate, policy="windowed")
    loss = torch.tensor(1.0)
    for weight in weights:
        weight.grad = torch.ones(3)
    counted = Counted(monkeypatch)
    for _ in range(50):
        optimizer.step()
        assert counted.calls == []
        governor.step(loss)
        assert len(counted.calls) <= 1
        counted.calls.clear()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is mostly written: two calls, and the real optimizer as `base_optimizer`."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=group["rho"] / float(p.grad.norm()))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def test_the_two_calls_of_an_optimizer_around_a_base_optimizer_are_one_step(steered, scripted):
    w = torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = SAM([w], torch.optim.SGD, lr=0.1)
    governor = steered(optimizer, policy=scripted(factor=[1.0, 0.5]))
    used = []
    optimizer.base_optimizer.register_step_pre_hook(lambda it, *_: used.append(it.param_groups[0]["lr"]))
    for _ in range(4):
        w.grad = (w - 1).detach()
        optimizer.first_step()
        w.grad = (w - 1).detach()
        optimizer.second_step()
        governor.step(1.0)
    assert used == [0.1, 0.05, 0.1, 0.05]
    assert (governor.status.step, governor.status.conflicts, governor.status.skipped) == (4, 0, 0)
