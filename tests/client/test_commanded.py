"""Goal: what people ask of a run over REST is what the optimizer does, and "applied at step k" is the very step.

Method: real optimizers on a real service; what each step used is read during the step.
"""

import time
from itertools import count

import httpx
import pytest
import torch

import flyball
import flyball_server
from flyball import limits

names = count()


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


class Job:
    """A steered optimizer, the learning rates its steps used, and the service's REST routes for its run."""

    def __init__(self, http, server, **options):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        self.optimizer, self.http, self.used = torch.optim.SGD([weight], lr=0.1), http, []
        defaults = {"run": f"c{next(names)}", "lag": 0, "wait_s": 10.0, "policy": "constant", "server": server}
        self.governor = flyball.attach(self.optimizer, **(defaults | options))
        self.optimizer.register_step_post_hook(lambda *_: self.used.append(self.optimizer.param_groups[0]["lr"]))
        self.url = f"/v1/runs/{self.governor.status.run}"

    def train(self, n=1):
        for _ in range(n):
            self.optimizer.step()
            self.governor.step(1.0)

    def command(self, kind, **fields):
        answer = self.http.post(f"{self.url}/commands", json={"kind": kind, "reason": "a test", **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def until(self, done, step=True):
        """Train (or only wait) until that is so."""
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline
            if step:
                self.train()
            time.sleep(0.01)

    def get(self, command):
        return self.http.get(f"{self.url}/commands/{command}").json()

    def applied(self, command):
        """At which step it was applied, once the service knows."""
        self.until(lambda: self.get(command)["applied"] is not None)
        return self.get(command)["applied"]["step"]


@pytest.fixture
def job(service):
    opened = []
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:

        def start(over="http", **options):
            opened.append(Job(http, getattr(service, over), **options))
            return opened[-1]

        yield start
        for each in opened:
            each.governor.close("")


@pytest.mark.parametrize("over", ["http", "grpc"])
@pytest.mark.parametrize("lag", [None, 0, 2])
def test_an_override_is_applied_at_the_step_that_the_service_names(job, over, lag):
    one = job(over, lag=lag)
    one.train(3)
    command = one.command("override", setting="lr", value=0.025)
    step = one.applied(command)
    assert step == one.used.index(0.025)
    assert step >= 3
    same = one.command("override", setting="lr", value=0.025)
    assert one.applied(same) > step, "nothing changes, and it is confirmed all the same"
    assert set(one.used[step:]) == {0.025}


def test_limits_are_widened_and_narrowed_in_the_client_too(job):
    one = job(guard={"max_lr": 0.2})
    one.train(2)
    for most in (0.5, 0.3):
        bounds = one.command("bounds", guard={"max_lr": most})
        one.applied(bounds)
        one.applied(one.command("override", setting="lr", value=most))
        assert one.used[-1] == most
        assert one.governor._session.bounds == ((0.0, most),)


@pytest.mark.parametrize("lag", [None, 1])
def test_a_control_is_overridden_confirmed_and_kept(job, lag):
    one = job(lag=lag)
    clip = one.governor.control("grad_clip", 1.0, min=0.1, max=5.0)
    one.train(2)
    one.until(lambda: one.governor._session.controls.values != {})
    command = one.command("override", setting="grad_clip", value=0.5)
    one.applied(command)
    assert clip.value == 0.5
    one.train(3)
    assert clip.value == 0.5


def test_a_job_in_a_long_step_hears_of_a_stop_and_of_settings(job, monkeypatch, caplog):
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.05)
    one = job(lag=None)
    one.train()
    one.until(lambda: one.governor.status.waiting == 0, step=False)
    one.command("override", setting="lr", value=0.01)
    stop = one.command("stop")
    one.until(lambda: one.governor.should_stop and one.get(stop)["over"], step=False)
    assert one.get(stop)["status"] == "done"
    assert one.governor.status.settings.lr == (0.01,)
    assert "override" in caplog.text


def test_a_rewind_that_a_handler_carries_out_is_answered_from_the_new_attempt(job):
    one = job()
    one.train(2)
    tokens = {2: one.governor.state_dict()}
    one.governor.on("rewind", lambda args: one.governor.load_state_dict(tokens[args["step"]]))
    one.train(3)
    command = one.command("rewind", step=2)
    one.until(lambda: one.get(command)["over"])
    assert one.get(command)["status"] == "done"
    assert one.governor.status.attempt == 2
    declined = one.command("evaluate")
    one.until(lambda: one.get(declined)["over"])
    assert one.get(declined)["status"] == "declined"


def test_who_else_writes_is_in_the_journal(job):
    one = job()
    one.train(2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.5)
    for _ in range(4):
        one.train()
        schedule.step()
    one.governor.close()
    text = one.http.get(one.url).text
    assert "ExponentialLR writes the learning rate of group default" in text
