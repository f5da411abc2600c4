"""The server is killed, stopped or frozen in mid-training, and comes back on the same file and ports.

Goal: training never notices beyond its budget, nothing acknowledged is lost, nothing is recorded twice. Method: real
trainings over both transports, signals to the server's process, then the journal itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from tests.e2e.processes import SLACK_S, TRANSPORTS, Server, Trainer, story_of, wait_until

pytestmark = pytest.mark.alone

FREE_RUNNING = """
import flyball
from tests.e2e.training import *

optimizer, train = digits()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
back = None
for i in range(100_000):
    loss = train(i)
    governor.step(loss)
    if i % 25 == 0:
        say(step=i)
    away = away or governor.status.state == "away"
    if away and back is None and governor.status.state == "steering":
        back = i
        say(back=i)
    if back is not None and i >= back + 300:
        break
    time.sleep(0.0005)
governor.close()
say(steps=i + 1)
"""


def test_a_killed_server_leaves_training_alone_and_the_journal_has_every_step_once(
    server: Server, trainer: Callable[..., Trainer]
) -> None:
    server.start()
    trainers = {t: trainer(FREE_RUNNING, run_name=t, url=server.url(t), away=False) for t in TRANSPORTS}
    for each in trainers.values():
        each.reach(300)
    server.kill()
    time.sleep(1)
    server.start()
    ended = {}
    for transport, each in trainers.items():
        each.hear("back", within_s=20)
        ended[transport] = each.hear("steps")
        each.finish()
    assert server.stop() == 0
    for transport, steps in ended.items():
        story = story_of(server, transport)
        assert story.steps == {1: list(range(steps))}
        assert story.problem == ""
    command = [sys.executable, "-m", "flyball_server.cli", "verify", "--store", server.store]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("matches bit for bit") == len(TRANSPORTS)


def test_settings_are_held_while_the_server_is_dead(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    script = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run="held", policy=POLICY, server=url, close_s=0.5)
steered = run(governor, optimizer, train, 0, 400, 0.001)
say(steered=steered)
listen()
while governor.status.state == "steering":
    time.sleep(0.01)
say(held=run(governor, optimizer, train, 400, 800, 0.001), status=governor.status._asdict())
governor.close()
"""
    each = trainer(script, url=server.url("grpc"))
    steered = each.hear("steered")
    server.kill()
    each.tell()
    held = each.hear("held")
    assert len(set(steered)) > 5
    assert len(set(held)) == 1
    each.finish()


BUSY = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
back = None
for i in range(1_000_000):
    governor.step(train(i))
    if i % 25 == 0:
        say(step=i)
    state = governor.status.state
    away = away or state == "away"
    if away and back is None and state == "steering":
        back = i
    if back is not None and i >= back + 500:
        break
    time.sleep(0.0002)
governor.close()
say(steps=i + 1, last=governor.status.through)
"""


def test_sigterm_under_load_exits_0_soon_and_loses_nothing(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    trainers = {
        f"{t}{n}": trainer(BUSY, run_name=f"{t}{n}", url=server.url(t), away=False) for t in TRANSPORTS for n in (1, 2)
    }
    for each in trainers.values():
        each.reach(500)
    started = time.monotonic()
    assert server.stop() == 0, server.log.read_text()[-3000:]
    assert time.monotonic() - started < 5
    acknowledged = {name: len(story_of(server, name).steps[1]) for name in trainers}
    server.start()
    for name, each in trainers.items():
        steps = each.hear("steps")
        each.finish()
        story = story_of(server, name)
        assert story.steps == {1: list(range(steps))}
        assert story.steps[1][: acknowledged[name]] == list(range(acknowledged[name]))
        assert acknowledged[name] > 300
        assert story.problem == ""


FROZEN = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
base = {"type": "cosine", "T_max": 100_000}
governor = flyball.attach(optimizer, run=run_name, base=base, server=url, lag=0, close_s=2)
i, seen = through_an_outage(governor, optimizer, train)
say(**seen)
listen()
run(governor, optimizer, train, i, i + 100)
started = time.monotonic()
governor.close()
say(closed_s=time.monotonic() - started)
"""


def test_a_frozen_server_costs_no_step_more_than_its_budget(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    trainers = {t: trainer(FROZEN, run_name=t, url=server.url(t)) for t in TRANSPORTS}
    for each in trainers.values():
        each.reach(200)
    server.send(signal.SIGSTOP)
    for each in trainers.values():
        each.hear("missing")
    time.sleep(10)
    server.send(signal.SIGCONT)
    for each in trainers.values():
        times, missed, used = each.hear("times", "missed", "used", within_s=30)
        assert max(times) < 0.05 + SLACK_S, "one step waited longer than its budget of 50 ms"
        assert 1 <= missed <= 10, "an open circuit waits no more"
        assert len(set(used[-200:])) > 150, "a step has its own value again"
    server.send(signal.SIGSTOP)
    for each in trainers.values():
        each.tell()
    closed_s = [each.hear("closed_s") for each in trainers.values()]
    server.send(signal.SIGCONT)
    assert max(closed_s) < 2.5, "close keeps within close_s"
    for transport, each in trainers.items():
        each.finish()
        steps = story_of(server, transport).steps[1]
        assert steps == list(range(len(steps)))


OUTAGE = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, server=url, on_outage="stop", close_s=0.5)
i = 0
stopped = None
listen()
frozen = time.monotonic()
while stopped is None and time.monotonic() < frozen + 15:
    governor.step(train(i))
    i += 1
    time.sleep(0.002)
    if governor.should_stop:
        stopped = time.monotonic() - frozen
say(stopped=stopped, status=governor.status._asdict())
"""


def test_a_frozen_server_is_an_outage_after_five_seconds(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    trainers = [trainer(OUTAGE, run_name=t, url=server.url(t)) for t in TRANSPORTS]
    for transport in TRANSPORTS:
        wait_until(lambda name=transport: server.knows(name), "attached")
    server.send(signal.SIGSTOP)
    for each in trainers:
        each.tell()
    for each in trainers:
        stopped, status = each.hear("stopped", "status")
        assert stopped is not None, status
        assert 4 < stopped < 7
    server.send(signal.SIGCONT)
