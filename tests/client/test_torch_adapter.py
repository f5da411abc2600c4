"""Goal: what the service decides is what the optimizer really uses, whatever else happens around `optimizer.step()`.

Method: real torch optimizers on a real service, in lockstep (lag=0) so that every test is exact; what was applied is
read from the optimizer during the step and from the journal afterwards.
"""

import logging
import math
import time
from itertools import count

import httpx
import numpy as np
import pytest
import torch

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
def read(service):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        yield lambda path: http.get(f"/v1/runs/{path}").raise_for_status().json()


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"t{next(names)}", "policy": HALVING, "lag": 0, "wait_s": 10.0, "server": service.http}
        governor = flyball.attach(optimizer, **(defaults | options))
        opened.append(governor)
        return governor

    yield attach
    for governor in opened:
        governor.close("")


def run_of(governor):
    return governor.status.run


def weight(value=1.0):
    return torch.nn.Parameter(torch.full((2,), value))


def sgd(*, lr=0.1, **options):
    return torch.optim.SGD([weight()], lr=lr, **options)


def trained(optimizer, governor, losses=(1.0,), before=None):
    """Train one step per loss; the learning rates that the optimizer really used."""
    used = []
    spy = optimizer.register_step_pre_hook(lambda *_: used.append([float(g["lr"]) for g in optimizer.param_groups]))
    for loss in losses:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        if before is not None:
            before()
        optimizer.step()
        governor.step(loss)
    spy.remove()
    return used


def test_every_step_uses_what_was_decided_and_the_journal_has_it(steer, read):
    optimizer = sgd()
    governor = steer(optimizer)
    used = trained(optimizer, governor, [1.0] * 5)
    assert used == [[0.1], [0.1], [0.05], [0.025], [0.0125]]
    governor.close()
    found = read(f"{run_of(governor)}/series?signals=loss,lr:default")["series"]
    assert found["loss"] == {"step": [0, 1, 2, 3, 4], "value": [1.0] * 5}
    told = dict(zip(found["lr:default"]["step"], found["lr:default"]["value"], strict=True))
    assert {step: told[step] for step in (0, 2, 3, 4)} == {0: 0.1, 2: 0.05, 3: 0.025, 4: 0.0125}
    assert read(run_of(governor))["status"] == "finished"
    assert torch.allclose(optimizer.param_groups[0]["params"][0], torch.tensor(1 - 0.1 - 0.1 - 0.05 - 0.025 - 0.0125))


def test_groups_are_known_by_name_else_by_place(steer, read):
    for groups, wanted in (
        ([{}], ["default"]),
        ([{"name": "head"}], ["head"]),
        ([{"name": "body"}, {}], ["body", "group1"]),
        ([{}, {}, {"name": "x"}], ["group0", "group1", "x"]),
    ):
        optimizer = torch.optim.SGD([{"params": [weight()], **g} for g in groups], lr=0.1)
        governor = steer(optimizer)
        assert [g["group"] for g in read(run_of(governor))["settings"]] == wanted
    with pytest.raises(ValueError, match="each its own"):
        steer(torch.optim.SGD([{"params": [weight()], "name": "a"}, {"params": [weight()], "name": "a"}], lr=0.1))
    with pytest.raises(TypeError, match="optimizer"):
        steer(object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_learning_rate_is_filled_in_place(steer, dtype, read):
    lr = torch.tensor(0.1, dtype=dtype)
    optimizer = torch.optim.Adam([weight()], lr=lr, capturable=False)
    governor = steer(optimizer)
    used = trained(optimizer, governor, [1.0] * 4)
    assert optimizer.param_groups[0]["lr"] is lr
    assert [u[0] for u in used] == pytest.approx([0.1, 0.1, 0.05, 0.025])
    assert governor.status.conflicts == 0, "what float32 rounds is no foreign writer"


def test_momentum_and_betas_follow_a_one_cycle_base_and_other_groups_are_left_alone(steer, service):
    base = {"type": "one_cycle", "max_lr": 0.1, "total_steps": 20}
    for server in (service.http, service.grpc):
        one = torch.optim.SGD(
            [{"params": [weight()], "momentum": 0.9}, {"params": [weight()], "momentum": 0.0}], lr=0.01
        )
        two = torch.optim.AdamW([weight()], lr=0.01, betas=(0.9, 0.99))
        torch_s = torch.optim.SGD([weight()], lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(torch_s, max_lr=0.1, total_steps=20)
        governors = [steer(o, policy="constant", base=base, server=server) for o in (one, two)]
        for _ in range(10):
            wanted = torch_s.param_groups[0]["momentum"]
            torch_s.step()
            schedule.step()
            for optimizer, governor in zip((one, two), governors, strict=True):
                trained(optimizer, governor)
            assert one.param_groups[0]["momentum"] == pytest.approx(wanted, abs=1e-12)
            assert one.param_groups[1]["momentum"] == 0.0
            assert two.param_groups[0]["betas"] == (pytest.approx(wanted, abs=1e-12), 0.99)


def test_momentum_that_something_else_resets_is_written_again_though_nothing_new_was_decided(steer):
    optimizer = torch.optim.SGD([weight()], lr=0.01, momentum=0.9)
    base = {"type": "one_cycle", "max_lr": 0.1, "total_steps": 2}
    governor = steer(optimizer, policy="constant", base=base, lag=None)
    for _ in range(60):  # long past the cycle's end: the settings do not change any more
        trained(optimizer, governor)
        time.sleep(0.005)
    wanted = optimizer.param_groups[0]["momentum"]
    optimizer.param_groups[0]["momentum"] = 0.1
    trained(optimizer, governor)
    assert optimizer.param_groups[0]["momentum"] == wanted != 0.1


def journalled(governor):
    """The momenta in every receipt from here on."""
    told, receipt = [], governor._session.receipt
    governor._session.receipt = lambda step, decided, settings, *rest, **more: (
        told.append(settings.momentum),
        receipt(step, decided, settings, *rest, **more),
    )
    return told


def test_a_momentum_of_zero_is_declared_and_neither_touched_nor_told(steer, read, scripted):
    optimizer = sgd()
    governor = steer(optimizer)
    told, held = journalled(governor), optimizer.param_groups[0]["momentum"]
    trained(optimizer, governor, [1.0] * 4)
    assert governor._session.attach.groups[0].momentum == 0.0
    assert told == [None] * 3
    assert optimizer.param_groups[0]["momentum"] is held
    groups = [{"params": [weight()], "momentum": 0.9}, {"params": [weight()]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    governor = steer(optimizer, policy=scripted())
    told = journalled(governor)
    trained(optimizer, governor)
    assert told == [(0.9, 0.0)]


def test_none_is_declared_for_an_optimizer_without_momentum(steer):
    governor = steer(torch.optim.Adagrad([weight()], lr=0.1))
    assert governor._session.attach.groups[0].momentum is None


def test_a_momentum_that_a_policy_switches_on_is_written_where_the_optimizer_can_follow(steer, scripted):
    for kind, wanted in ((torch.optim.SGD, 0.5), (torch.optim.RMSprop, 0)):
        optimizer = kind([weight()], lr=0.1)
        governor = steer(optimizer, policy="constant")
        trained(optimizer, governor)
        governor.close()
        governor = steer(optimizer, policy=scripted(momentum=0.5))
        told = journalled(governor)
        trained(optimizer, governor, [1.0] * 3)
        assert optimizer.param_groups[0]["momentum"] == wanted
        assert told == [(wanted,) if wanted else None]


def test_a_momentum_that_a_policy_switches_off_is_told(steer, scripted):
    optimizer = sgd(momentum=0.9)
    governor = steer(optimizer, policy=scripted(momentum=0.0))
    told = journalled(governor)
    trained(optimizer, governor)
    assert optimizer.param_groups[0]["momentum"] == 0.0
    assert told == [(0.0,)]


def test_a_scheduler_that_writes_in_between_loses_and_is_named_once(steer, read, caplog):
    optimizer = sgd()
    governor = steer(optimizer, policy="constant")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.3)
    with caplog.at_level(logging.WARNING, "flyball"):
        used = []
        for _ in range(5):
            used += trained(optimizer, governor)
            schedule.step()
        trained(optimizer, governor)
    assert used == [[0.1]] * 5, "the late write wins"
    assert governor.status.conflicts == 5
    named = [r.getMessage() for r in caplog.records if "default" in r.getMessage()]
    assert len(named) == 1
    governor.close()
    assert read(run_of(governor))["settings"][0]["applied_lr"] == 0.1


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", ["lambda", "exponential", "cosine"])
def test_multiplier_mode_multiplies_what_a_scheduler_sets_and_restores_it_exactly(steer, kind, tensor):
    def build():
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizer = torch.optim.Adam([{"params": [weight()]}, {"params": [weight()], "lr": 0.02}], lr=lr)
        schedule = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
            "exponential": lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        }[kind]()
        return optimizer, schedule

    alone, its = build()
    optimizer, schedule = build()
    kept = optimizer.param_groups[0]["lr"]
    governor = steer(optimizer, mode="multiplier")
    for step in range(8):
        used = trained(optimizer, governor)
        factor = 0.5 ** max(0, step - 1)
        assert used[0] == pytest.approx([float(g["lr"]) * factor for g in alone.param_groups], rel=1e-12)
        now, wanted = ([float(g["lr"]) for g in o.param_groups] for o in (optimizer, alone))
        assert now == wanted, "between two steps the scheduler sees its own values, to the last bit"
        alone.step()
        its.step()
        schedule.step()
    if tensor:
        assert optimizer.param_groups[0]["lr"] is kept
    assert governor.status.conflicts == 0


def test_multiplier_mode_survives_a_step_that_fails(steer):
    optimizer = sgd()
    governor = steer(optimizer, mode="multiplier")
    trained(optimizer, governor, [1.0] * 4)

    def fails():
        raise RuntimeError("out of memory")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fails)
    assert trained(optimizer, governor) == [[0.1 * 0.5**3]], "the factor is applied once"
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_a_grad_scaler_skips_is_no_step(steer, read):
    optimizer = sgd()
    governor = steer(optimizer, policy="constant")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(6):
        optimizer.zero_grad()
        loss = (optimizer.param_groups[0]["params"][0] * (math.inf if i in (2, 3) else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        governor.step(float(i))
    assert governor.status.step == 4
    assert governor.status.skipped == 2
    governor.close()
    found = read(f"{run_of(governor)}/series?signals=loss")["series"]["loss"]
    assert found == {"step": [0, 1, 2, 3], "value": [0.0, 1.0, 4.0, 5.0]}


def test_a_group_added_later_follows_the_first_ones_factor(steer):
    optimizer = sgd()
    governor = steer(optimizer)
    trained(optimizer, governor, [1.0] * 3)
    optimizer.add_param_group({"params": [weight()], "lr": 0.01})
    used = trained(optimizer, governor, [1.0] * 2)
    assert used == [[0.025, pytest.approx(0.0025)], [0.0125, pytest.approx(0.00125)]]
    governor.close()
    assert governor.status.waiting == 0


def test_a_closure_is_one_step_however_often_it_is_called(steer, read):
    w = weight()
    optimizer = torch.optim.LBFGS([w], lr=0.1, max_iter=4)
    governor = steer(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for _ in range(3):
        governor.step(optimizer.step(closure))
    assert len(calls) > 3
    governor.close()
    assert read(run_of(governor))["step"] == 2


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def test_a_closed_governor_leaves_the_optimizer_to_itself(steer, read):
    optimizer = sgd()
    before = hooks(optimizer)
    with steer(optimizer) as governor:
        assert hooks(optimizer) > before
        trained(optimizer, governor, [1.0] * 3)
    assert hooks(optimizer) == before
    assert read(run_of(governor))["status"] == "finished"
    optimizer.param_groups[0]["lr"] = 7.0
    assert trained(optimizer, governor) == [[7.0]], "a step reported after close is harmless"
    governor.close()
    other = sgd()
    governor = steer(other)
    with pytest.raises(KeyError), governor:
        raise KeyError("mine")
    assert read(run_of(governor))["status"] == "failed"


LOSSES = {
    "float": 0.5,
    "int": 2,
    "float32": torch.tensor(0.5),
    "float64": torch.tensor(0.1, dtype=torch.float64),
    "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "float16": torch.tensor(0.5, dtype=torch.float16),
    "one element": torch.tensor([0.5]),
    "one in two dimensions": torch.tensor([[0.5]]),
    "with a gradient": torch.tensor(0.5, requires_grad=True) * 2,
    "integer tensor": torch.tensor(3),
    "numpy float32": np.float32(0.25),
    "numpy float64": np.float64(0.1),
    "numpy int": np.int64(4),
    "numpy 0-d": np.array(0.5),
    "callable": lambda: torch.tensor(0.75),
    "nan": math.nan,
    "infinite tensor": torch.tensor(math.inf),
}


@pytest.mark.parametrize("how", ["first", "later"])
def test_a_loss_is_any_kind_of_number(steer, read, how):
    optimizer = sgd()
    governor = steer(optimizer, policy="constant")
    if how == "first":
        for value in LOSSES.values():
            one = sgd()
            trained(one, steer(one, policy="constant"), [value])
    trained(optimizer, governor, list(LOSSES.values()))
    governor.close()
    assert governor.status.bad_values == 0
    found = read(f"{run_of(governor)}/series?signals=loss")["series"]["loss"]["value"]
    told = [v() if callable(v) else v for v in LOSSES.values()]
    told = [float(v.detach() if isinstance(v, torch.Tensor) else v) for v in told]
    assert repr([float(v) for v in found]) == repr(told)


BAD = ["0.5", b"1", True, torch.tensor([0.1, 0.2]), torch.tensor(1j), [0.5], {"loss": 1.0}, torch.tensor([])]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b)[:20])
def test_what_is_no_number_is_refused_by_the_first_call_and_only_recorded_later(steer, read, bad):
    optimizer = sgd()
    governor = steer(optimizer, policy="constant")
    trained(optimizer, governor, [])
    optimizer.step()
    with pytest.raises(TypeError, match=r"loss is .*give a float"):
        governor.step(bad)
    governor.step(1.0)
    trained(optimizer, governor, [bad, 2.0])
    optimizer.step()
    governor.step(3.0, reward=bad, grad_norm=bad, mine=bad)
    governor.close()
    assert governor.status.bad_values == 4
    found = read(f"{run_of(governor)}/series?signals=loss,reward,mine")["series"]
    assert found["loss"] == {"step": [0, 2, 3], "value": [1.0, 2.0, 3.0]}
    assert found["reward"]["step"] == found["mine"]["step"] == []


def test_a_callable_that_fails_later_never_reaches_the_training_loop(steer):
    optimizer = sgd()
    governor = steer(optimizer, policy="constant")

    def fails():
        raise ZeroDivisionError

    trained(optimizer, governor, [1.0, fails, 2.0])
    governor.close()
    assert governor.status.bad_values == 1


def test_a_signal_whose_name_the_service_refuses_costs_that_signal_and_not_the_loss(steer, read):
    """acc@1 is what people call it."""
    optimizer = sgd()
    governor = steer(optimizer, policy="constant", lag=None)
    for step in range(3):
        trained(optimizer, governor, [])
        optimizer.step()
        governor.step(float(step), **{"acc@1": 0.5})
    governor.close()
    assert read(f"{run_of(governor)}/series?signals=loss")["series"]["loss"]["value"] == [0.0, 1.0, 2.0]


def test_a_checkpoint_brings_back_the_settings_of_its_step(steer, read):
    optimizer = sgd()
    governor = steer(optimizer)
    trained(optimizer, governor, [1.0] * 3)
    token = governor.state_dict()
    used = trained(optimizer, governor, [1.0] * 4)
    governor.load_state_dict(token)
    again = trained(optimizer, governor, [1.0] * 4)
    assert again == used
    assert governor.status.attempt == 2
    governor.close()
    found = read(f"{run_of(governor)}/series?signals=loss")["series"]["loss"]
    assert found["step"] == list(range(7))
    with pytest.raises(ValueError, match="no checkpoint token"):
        governor.load_state_dict({"step": "x"})


def test_a_checkpoint_of_a_job_that_waits_holds_no_step_that_the_journal_does_not(steer):
    """A process killed right after saving it would take such a step to the grave."""
    free, bound = steer(sgd(), lag=None), steer(sgd(), lag=3)
    for governor in (free, bound):
        trained(governor._optimizer._optimizer, governor, [1.0] * 3)
        assert governor.state_dict()["step"] == 3
    assert bound.status.waiting == 0
    assert free.status.waiting > 0, "where no step waits, no checkpoint does"


def test_a_checkpoint_waits_no_longer_than_a_step(steer):
    optimizer = sgd()
    governor = steer(optimizer, server="http://127.0.0.1:9", wait_s=0.05, start_wait_s=0)
    governor._session.circuit_open = False
    started = time.monotonic()
    governor.step(1.0)
    optimizer.step()
    for _ in range(100):
        governor.state_dict()
    assert time.monotonic() - started < 2
    assert governor.status.missed == 1


def test_a_second_job_of_the_same_name_is_refused(steer):
    one = steer(sgd(), run="taken")
    with pytest.raises(flyball.Refused, match="exists already"):
        steer(sgd(), run="taken")
    assert one.status.state == "steering"
