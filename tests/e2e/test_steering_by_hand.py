"""People steer real trainings: what they ask for is applied at a step that the optimizer itself confirms, or declined.

Goal: from the request to the value read back in the optimizer, over both transports, the service killed in between.
Method: real torch jobs that run until they are told to stop, by a command; the record is folded again at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of, wait_until

LIVE = """
import copy
import logging
import flyball
from tests.e2e.training import *

logging.basicConfig(level=logging.INFO)
model, optimizer, train = digits_model()
governor = flyball.attach(optimizer, run=run_name, policy=policy, server=url, lag=lag, guard={"max_factor": 4.0},
                          wait_s=None if lag is not None else 0.05)
kl = governor.control("kl_coef", 0.1, min=0, max=1)
saved = {}

def checkpoint(args):
    saved.update(step=i + 1, token=governor.state_dict(), model=copy.deepcopy(model.state_dict()),
                 optimizer=copy.deepcopy(optimizer.state_dict()))
    return f"kept {args['name']}"

def restore(args):
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    governor.load_state_dict(saved["token"])
    return "went back"

governor.on("checkpoint", checkpoint)
governor.on("restore", restore)
i, used, controls = 0, [], []
while not governor.should_stop:
    loss = train(i)
    used.append(optimizer.param_groups[0]["lr"])
    controls.append(kl.value)
    governor.step(loss)
    i += 1
    if i % 25 == 0:
        say(step=i)
    time.sleep(0.001)
governor.close()
say(used=used, controls=controls, why=governor.status._asdict())
"""


class Operator:
    """Somebody with a command line."""

    def __init__(self, server: Server, run: str) -> None:
        self._base = f"{server.url('http')}/v1/runs/{run}"

    def give(self, kind: str, **fields: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self._base}/commands", json={"kind": kind, "reason": "to see", **fields}, timeout=30)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def settled(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.get(f"{self._base}/commands/{command['id']}", params={"wait_s": 40}, timeout=60)
        found: dict[str, Any] = answer.json()
        return found

    def show(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self._base, timeout=30).json()
        return found


@pytest.mark.parametrize(("transport", "lag"), [("grpc", None), ("http", 0), ("grpc", 2)])
def test_commands_reach_the_optimizer_and_come_back_confirmed(
    server: Server, trainer: Callable[..., Trainer], transport: str, lag: int | None
) -> None:
    server.start()
    policy = {"type": "constant"}
    job = trainer(LIVE, run_name="live", url=server.url(transport), policy=policy, lag=lag)
    job.reach(50)
    operator = Operator(server, "live")
    halved = operator.settled(operator.give("override", factor=0.5))
    assert (halved["status"], halved["applied"]["ranks"], halved["applied"]["of_ranks"]) == ("applied", 1, 1)
    assert operator.show()["settings"][0]["applied_lr"] == 0.025
    clamped = operator.give("override", factor=10)
    assert (clamped["status"], clamped["verdict"]["lr"]) == ("clamped", [0.2])
    server.kill()  # the command stands in the journal: it is told again
    time.sleep(0.3)
    server.start()
    clamped = operator.settled(clamped)
    assert clamped["status"] == "applied"
    control = operator.settled(operator.give("override", setting="kl_coef", value=0.7))
    released = operator.settled(operator.give("release"))
    assert (control["status"], released["status"]) == ("applied", "applied")
    kept = operator.settled(operator.give("checkpoint", args={"name": "a"}))
    assert (kept["status"], kept["history"][-1]["note"]) == ("done", "kept a")
    back = operator.settled(operator.give("restore"))
    assert (back["status"], back["history"][-1]["note"]) == ("done", "went back")
    declined = operator.settled(operator.give("evaluate"))
    assert declined["status"] == "declined"
    stopped = operator.settled(operator.give("stop"))
    assert stopped["status"] == "done"
    used, controls, status = job.hear("used", "controls", "why")
    log = job.errors()
    job.finish()
    # The steps named in the answers are the run's own; up to the restore they are the job's count, too.
    assert used[halved["applied"]["step"]] == 0.025
    assert used[halved["applied"]["step"] - 2 - (lag or 0)] == 0.05
    assert used[clamped["applied"]["step"]] == 0.2
    assert controls[control["applied"]["step"]] == 0.7
    assert used[released["applied"]["step"]] == 0.05
    assert set(used) == {0.05, 0.025, 0.2}
    assert set(controls) == {0.1, 0.7}
    assert "to see" in status["last_error"] or status["should_stop"]
    assert log.count(f"override {clamped['id']} by") == 1, "told once"
    assert server.stop() == 0
    story = story_of(server, "live")
    assert story.problem == ""
    assert len(story.steps) == 2, "the restore opened an attempt"


@pytest.mark.parametrize("scheduler", ["StepLR(optimizer, 3)", "CosineAnnealingLR(optimizer, 50)"])
def test_a_scheduler_left_running_is_named_within_ten_steps(
    calm_server: Server, trainer: Callable[..., Trainer], scheduler: str
) -> None:
    script = """
import logging
import flyball
from tests.e2e.training import *

logging.basicConfig(level=logging.WARNING)
optimizer, train = digits()
scheduler = eval("torch.optim.lr_scheduler." + scheduler_text)
governor = flyball.attach(optimizer, run=run_name, policy="constant", server=url)
for i in range(300):
    governor.step(train(i))
    scheduler.step()
    time.sleep(0.001)
governor.close()
say(conflicts=governor.status.conflicts)
"""
    name = scheduler.partition("(")[0]
    job = trainer(script, run_name=name, scheduler_text=scheduler, url=calm_server.url("grpc"))
    assert job.hear("conflicts") > 5
    log = job.errors()
    job.finish()
    found = calm_server.get(f"/v1/runs/{name}")["conflicts"]
    assert name in found[0]["words"]
    assert found[0]["step"] < 10
    assert log.count(f"{name} writes") == 1, "a warning per cause, not per step"


def test_a_job_between_two_long_steps_is_not_stale(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    script = """
import flyball
from flyball import limits
limits.HEARTBEAT_S = 0.2
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, server=url)
governor.step(train(0))
say(waiting=True)
listen()
optimizer.step()
say(lr=optimizer.param_groups[0]["lr"])
governor.close("")
"""
    for transport in TRANSPORTS:
        job = trainer(script, run_name=f"slow-{transport}", url=calm_server.url(transport))
        job.hear("waiting")
        operator = Operator(calm_server, f"slow-{transport}")
        wait_until(lambda operator=operator: operator.show()["step"] == 0, "the first step")
        time.sleep(0.8)
        assert operator.show()["stale_s"] < 0.6, "it says that it lives"
        operator.give("override", value=0.03)
        time.sleep(0.5)
        job.tell()
        assert job.hear("lr") == 0.03, "what was asked for between two steps holds from the very next one"
        job.finish()
