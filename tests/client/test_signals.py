"""Goal: what is measured around a step is what a plain computation of it gives, and costs the training thread no wait.

Method: a real optimizer on a real service; beside it, in a hook of the test, the same numbers from clones of all
parameters in float64. What arrived is read from the journal's series, and what a policy saw from the fold.
"""

import math
import os
import subprocess
import sys
import threading
from itertools import count

import httpx
import pytest
import torch

import flyball
import flyball_server
from flyball.columns import columns

names = count()
ALL = ("grad_norm", "update_norm", "distance", "inner_product")


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def read(service):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        yield lambda path: http.get(f"/v1/runs/{path}").raise_for_status().json()


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"s{next(names)}", "policy": "constant", "server": service.http, "signals": ALL}
        governor = flyball.attach(optimizer, **(defaults | options))
        opened.append(governor)
        return governor

    yield attach
    for governor in opened:
        governor.close("")


def told(governor, read, *wanted):
    """The series that arrived, after the end."""
    run = governor.status.run
    governor.close()
    assert (governor.status.waiting, governor.status.dropped) == (0, 0)
    series = read(f"{run}/series?signals={','.join(wanted)}")["series"]
    return {name: series.get(name, {"step": [], "value": []}) for name in wanted}


def wide(tensor):
    """As float64 numbers in one dimension."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().double().flatten().clone()


class Reference:
    """The four signals of each step, from clones."""

    def __init__(self, optimizer):
        self.found = {name: [] for name in ALL}
        self._optimizer = optimizer
        self._start = self._all()
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _parameters(self):
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _all(self):
        return torch.cat([wide(p) for p in self._parameters()])

    def _before(self, *_):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters()]
        scale = getattr(self._optimizer, "grad_scale", None)
        self._gradient = torch.cat([wide(g) for g in gradients]) / (1.0 if scale is None else float(scale))
        self._weights = self._all()

    def _after(self, *_):
        after = self._all()
        moved = after - self._weights
        numbers = (self._gradient.norm(), moved.norm(), (after - self._start).norm(), self._gradient @ moved)
        for name, number in zip(ALL, numbers, strict=True):
            self.found[name].append(float(number))


def train(model, optimizer, governor, steps=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(5, 4, generator=draw).to(dtype)) ** 2).sum()
        loss.backward()
        optimizer.step()
        governor.step(loss)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov, which may write into gradients": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_signals_are_those_of_a_plain_computation(steer, read, kind):
    model = network()
    head, body = list(model[2].parameters()), list(model[0].parameters())
    optimizer = OPTIMIZERS[kind]([{"params": body, "name": "body"}, {"params": head, "name": "head"}])
    reference = Reference(optimizer)
    governor = steer(optimizer)
    train(model, optimizer, governor)
    for name, series in told(governor, read, *ALL).items():
        assert series["step"] == [0, 1, 2, 3, 4, 5]
        assert series["value"] == pytest.approx(reference.found[name], rel=1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types_are_summed_wide_enough(steer, read, dtype):
    """10 000 equal bfloat16 numbers would add up to 256 of them where they are summed in bfloat16."""
    w = torch.nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=2.0**-4)
    reference = Reference(optimizer)
    governor = steer(optimizer)
    for _ in range(3):
        w.grad = torch.full_like(w, 0.5)
        optimizer.step()
        governor.step(1.0)
    precise = 1e-12 if dtype is torch.float64 else 1e-5
    for name, series in told(governor, read, *ALL).items():
        assert series["value"] == pytest.approx(reference.found[name], rel=precise), name


def test_parameters_of_several_types_missing_sparse_and_frozen_ones(steer, read):
    rows = torch.nn.Embedding(6, 3, sparse=True)
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    idle, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([*rows.parameters(), half, idle, frozen], lr=0.125)
    reference = Reference(optimizer)
    governor = steer(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        # A row that is asked for twice has two entries in the sparse gradient, which are one number.
        loss = rows(torch.tensor([1, 1, 4])).sum() + half.sum()
        loss.backward()
        optimizer.step()
        governor.step(loss)
    for name, series in told(governor, read, *ALL).items():
        assert series["value"] == pytest.approx(reference.found[name], rel=1e-5), name


def test_what_is_thawed_or_added_later_counts_from_where_it_stands_then(steer, read):
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}], lr=0.05)
    optimizer.add_param_group({"params": model[2].parameters()})
    late = torch.nn.Parameter(torch.full((3,), 7.0))
    start = torch.cat([wide(p) for p in (*model.parameters(), late)])
    governor = steer(optimizer)
    train(model, optimizer, governor, steps=2)
    for parameter in model[0].parameters():
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    for parameter in (*model.parameters(), late):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    governor.step(1.0)
    distance = told(governor, read, "distance")["distance"]["value"]
    moved = torch.cat([wide(p) for p in (*model.parameters(), late)]) - start
    assert distance[2] == pytest.approx(float(moved.norm()), rel=1e-6)
    assert distance[0] < distance[2] < 1.0, "7, its value, is no distance"


def test_a_closures_gradient_is_that_of_its_first_call(steer, read):
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=4)
    governor = steer(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum() / 2
        loss.backward()
        return loss

    before = w.detach().clone()
    governor.step(optimizer.step(closure))
    moved = w.detach() - before
    found = told(governor, read, *ALL)
    assert found["grad_norm"]["value"] == [5.0]
    assert found["update_norm"]["value"] == [pytest.approx(float(moved.norm()), rel=1e-6)]
    assert found["inner_product"]["value"] == [pytest.approx(float(before @ moved), rel=1e-6)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaled_gradient_is_measured_unscaled(steer, read, fused, unscaled):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    reference = Reference(optimizer)
    governor = steer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(torch.ones(5, 4)) ** 2).sum()
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        governor.step(loss)
    found = told(governor, read, *ALL)
    for name, series in found.items():
        assert series["value"] == pytest.approx(reference.found[name], rel=1e-5), name
    if unscaled:
        assert found["grad_norm"]["value"] == [pytest.approx(0.5, rel=1e-4)] * 3, "of what the optimizer gets"


def test_a_skipped_step_reports_nothing_and_non_finite_norms_arrive_as_such(steer, read):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    governor = steer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for times in (1.0, math.inf, 2.0):
        optimizer.zero_grad()
        scaler.scale((w * times).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        governor.step(0.0)
    for bad in (math.inf, math.nan):
        w.grad = torch.full((2,), bad)
        optimizer.step()
        governor.step(0.0)
    found = told(governor, read, "grad_norm", "loss")
    assert found["loss"]["step"] == [0, 1, 2, 3]
    assert found["grad_norm"]["step"] == [0, 1, 2, 3]
    first, second, third, fourth = found["grad_norm"]["value"]
    assert (first, second) == (pytest.approx(2**0.5), pytest.approx(8**0.5))
    assert (third, fourth) == ("Infinity", "NaN")


def test_every_nth_step_is_measured_and_a_step_that_is_not_reported_lends_nothing_to_the_next(steer, read):
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([w], lr=0.0)
    governor = steer(optimizer, signals=["grad_norm"], signals_every=3)
    for i in range(9):
        w.grad = torch.full((4,), float(i))
        optimizer.step()
        if i != 3:
            governor.step(1.0)
    found = told(governor, read, "grad_norm", "loss")
    assert found["grad_norm"] == {"step": [0, 6], "value": [0.0, 12.0]}
    assert found["loss"]["step"] == [0, 1, 2, 4, 5, 6, 7, 8]


def test_what_the_script_reports_itself_counts(steer, read):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    governor = steer(optimizer)
    for i in range(3):
        model(torch.ones(1, 4)).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        governor.step(1.0, grad_norm=norm, distance=float(i), mine=2.0)
    found = told(governor, read, "grad_norm", "distance", "mine", "update_norm")
    assert found["grad_norm"]["value"][0] > 0.2
    assert found["distance"]["value"] == [0.0, 1.0, 2.0]
    assert found["mine"]["value"] == [2.0] * 3
    assert found["update_norm"]["value"] == [pytest.approx(0.005, rel=1e-4)] * 3


def test_noise_is_added_to_what_was_measured(steer, read, scripted):
    w = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([w], lr=0.1)
    governor = steer(optimizer, policy=scripted(noise=((1.0,),)), lag=0, wait_s=10.0)
    for _ in range(3):
        w.grad = torch.zeros(4)
        optimizer.step()
        governor.step(1.0)
    found = told(governor, read, "grad_norm", "update_norm")
    assert found["grad_norm"]["value"] == [0.0] * 3
    assert all(value > 0 for value in found["update_norm"]["value"])


def test_a_policy_sees_them_by_their_names(steer, service):
    """`aees` scores an episode by the loss it won per update: an update_norm that it gets is in its audit."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    governor = steer(optimizer, policy={"type": "aees", "episode_length": 5}, lag=0, wait_s=10.0)
    train(model, optimizer, governor, steps=20)
    run = governor.status.run
    governor.close()
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        text = http.get(f"/v1/runs/{run}/decisions").raise_for_status().text
    assert '"mean_update_norm":0.' in text.replace(" ", "")


def test_wrong_options_are_refused_by_name(steer, service):
    def sgd():
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    for wrong in ({"signals": "grad_norm"}, {"signals": ("norm",)}, {"signals": 3}, {"signals_every": 0}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"^{name} is .*: give "):
            steer(sgd(), **wrong)
    from flyball.options import checked

    with pytest.raises(ValueError, match=r"signals is .* only a PyTorch optimizer's are measured: give governor\.step"):
        checked({"run": "r", "signals": ("grad_norm",)})


def test_a_failure_while_measuring_is_logged_once_and_harms_nothing(steer, read, caplog):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    governor = steer(optimizer)
    for i in range(4):
        w.grad = torch.ones(2)
        if i == 1:  # somebody puts other data behind a parameter
            w.data = torch.ones(3)
            w.grad = torch.ones(3)
        optimizer.step()
        governor.step(1.0)
        if i == 1:
            w.grad = None
            w.data = torch.ones(2)
    found = told(governor, read, "loss", "distance")
    assert found["loss"]["step"] == [0, 1, 2, 3]
    assert found["distance"]["step"] == [0, 2, 3]
    assert len([r for r in caplog.records if "could not be measured" in r.getMessage()]) == 1


def test_after_close_nothing_is_measured_any_more(steer):
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    before = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    governor = steer(optimizer)
    governor.close()
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == before


SHARDED = """
import sys, torch, flyball
from torch.distributed.fsdp import fully_shard
torch.distributed.init_process_group("gloo")
model = torch.nn.Linear(4, 2)
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    flyball.attach(optimizer, run="sharded", server="http://127.0.0.1:1", signals=("grad_norm",), start_wait_s=0)
except ValueError as error:
    assert "sharded over several processes" in str(error), error
else:
    sys.exit("was not refused")
torch.distributed.destroy_process_group()
"""


@pytest.mark.timeout(60)
def test_what_is_sharded_over_processes_is_refused_and_within_one_it_is_measured(steer, read, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        plain = [p.detach().clone() for p in model.parameters()]
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        governor = steer(optimizer)
        train(model, optimizer, governor, steps=3)
        moved = [p.full_tensor() - before for p, before in zip(model.parameters(), plain, strict=True)]
        distance = told(governor, read, "distance")["distance"]["value"]
        assert distance[2] == pytest.approx(float(torch.cat([wide(m) for m in moved]).norm()), rel=1e-6)
    finally:
        torch.distributed.destroy_process_group()


READS = ("item", "tolist", "numpy", "__float__", "__bool__", "__int__", "__index__", "cpu")


@pytest.fixture
def reads_here(monkeypatch):
    """How often this thread reads a number out of a tensor."""
    me, seen = threading.get_ident(), []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def reading(self, *args, _original=original, _name=name, **kwargs):
            if threading.get_ident() == me:
                seen.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reading)
    return seen


def test_the_training_thread_reads_one_number_per_value_it_is_handed_and_none_of_what_is_measured(steer, reads_here):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # itself reads none
    for measured, handed in ((ALL, ("loss",)), ((), ("loss", "grad_norm", "mine")), (ALL, ())):
        governor = steer(optimizer, signals=measured)
        for _ in range(12):
            optimizer.zero_grad()
            loss = (model(torch.ones(5, 4)) ** 2).sum()
            loss.backward()
            reads_here.clear()
            optimizer.step()
            governor.step(**{name: loss.detach() for name in handed})
            assert reads_here == ["item"] * len(handed)
        governor.close()


class Unfinished:
    """A number on its way."""

    def __init__(self, value):
        self.here, self._value = False, value

    def ready(self):
        return self.here

    def value(self):
        assert self.here, "nobody may wait for it"
        return self._value


def test_a_number_on_its_way_holds_back_its_step_and_all_that_follow_whatever_its_name():
    norm, mine = Unfinished(2.0), Unfinished(3.0)
    head = [
        (0, (1.0, None, None, None)),
        (1, (1.5, None, norm, {"side": 7.0})),
        (2, (2.0, None, None, {"mine": mine})),
        (3, (2.5, None, None, None)),
    ]
    assert columns(head) == ([0], {"loss": [1.0]})
    mine.here = True
    assert columns(head) == ([0], {"loss": [1.0]})
    norm.here, mine.here = True, False
    assert columns(head) == ([0, 1], {"loss": [1.0, 1.5], "grad_norm": [None, 2.0], "side": [None, 7.0]})
    mine.here = True
    steps, found = columns(head)
    assert steps == [0, 1, 2, 3]
    assert found["mine"] == [None, None, 3.0, None]
    assert columns([]) == ([], {})
