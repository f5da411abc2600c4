"""Goal: whatever is wrong about attach's options is said there, by name, and leaves no run behind; what is right about
them holds from the first step, service or not. Method: a real service, a real optimizer, an address without a listener.
"""

import logging
from itertools import count

import httpx
import pytest
import torch

import flyball
import flyball_server

NOBODY = "http://127.0.0.1:9"
names = (f"a{i}" for i in count())


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def stepped(optimizer):
    """The learning rate that one optimizer step really used."""
    used = []
    hook = optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(1)
    optimizer.step()
    hook.remove()
    return used[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("policy", 5),
        ("policy", {"type": "windowed", "lr_max": float("nan")}),
        ("base", "cosine"),
        ("base", {"type": "cosin"}),
        ("guard", [1]),
        ("guard", {"max_lr": float("nan")}),
        ("guard", {"max_lr": "0.1"}),
        ("guard", {"groups": {"default": 1}}),
        ("labels", ["a"]),
        ("server", 5),
        ("seed", True),
        ("lag", -1),
        ("lag", 0.5),
        ("wait_s", "x"),
        ("wait_s", -1),
        ("start_wait_s", float("nan")),
        ("close_s", None),
        ("on_outage", "wait"),
        ("mode", "relative"),
        ("resume", "token"),
        ("resume", {"run": "another", "step": 3}),
        ("resume", {"run": "r", "project": "another", "step": 3}),
        ("resume", {"run": "r", "step": True}),
        ("server", "http://127.0.0.1:port"),
        ("server", "http://127.0.0.1:70000"),
        ("fork", {"run": "another"}),
        ("fork", "another"),
        ("shadows", ["windowed"]),
        ("on_unknown", "ignore"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_leaves_no_run(service, optimizer, option, value):
    run = next(names)
    with pytest.raises((ValueError, flyball.FlyballError), match=option if option != "resume" else "resume|token"):
        flyball.attach(optimizer, **{"run": run, "server": service.http, option: value})
    assert httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).status_code == 404
    flyball.attach(optimizer, run=run, server=service.http).close()  # and the optimizer is free


def test_one_optimizer_has_one_governor(service, optimizer):
    with (
        flyball.attach(optimizer, run=next(names), server=service.http),
        pytest.raises(ValueError, match="another governor"),
    ):
        flyball.attach(optimizer, run=next(names), server=service.http)
    flyball.attach(optimizer, run=next(names), server=service.http).close()


@pytest.mark.parametrize("on_outage", ["hold", "stop"])
@pytest.mark.parametrize(("guard", "used"), [({"max_lr": 0.08}, 0.08), ({"max_factor": 0.5}, 0.05), ({}, 0.1)])
def test_the_guard_holds_before_the_service_was_ever_reached(optimizer, guard, used, on_outage):
    governor = flyball.attach(
        optimizer, run="r", server=NOBODY, guard=guard, on_outage=on_outage, start_wait_s=0.1, close_s=0.1
    )
    assert stepped(optimizer) == used
    governor.close()


def test_a_resumed_run_goes_on_under_its_own_policy_where_none_is_given(service, optimizer):
    run, policy = next(names), {"type": "windowed", "window_size": 7}
    flyball.attach(optimizer, run=run, server=service.http, policy=policy, guard={"max_lr": 1.0}).close()
    with flyball.attach(optimizer, run=run, server=service.http, resume=True) as governor:
        assert governor.status.attempt == 2
    found = httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).json()
    assert (found["policy"], found["policy_config"]["window_size"], found["guard"]) == (
        "windowed@1",
        7,
        {"max_lr": 1.0},
    )


def test_a_resume_with_another_policy_names_only_what_differs(service, optimizer, caplog):
    caplog.set_level(logging.CRITICAL)
    run, policy = next(names), {"type": "windowed", "window_size": 7}
    flyball.attach(optimizer, run=run, server=service.http, policy=policy).close()
    with pytest.raises(flyball.Refused) as refused:
        flyball.attach(optimizer, run=run, server=service.http, policy={**policy, "window_size": 8}, resume=True)
    assert "window_size is recorded as 7, this process asks for 8" in str(refused.value)
    assert "patience" not in str(refused.value)
