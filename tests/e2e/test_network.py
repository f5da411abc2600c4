"""The network between trainer and server is slow, cut, dead or refusing.

Goal: a lockstep training is the undisturbed one bit for bit; one with a budget never waits beyond it; the journal gets
every step. Method: real trainings over both transports, each through a proxy of the test's own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.processes import SLACK_S, TRANSPORTS, Server, Trainer, story_of
from tests.e2e.proxy import Proxy

#: How many faults there are, and the steps between one and the next.
STORMS, STRETCH = 50, 16

pytestmark = pytest.mark.alone

LOCKSTEP = """
import flyball
from tests.e2e.training import *

optimizer, train = digits()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, lag=0, wait_s=None)
used = []
for i in range(steps):
    if i % stretch == 0:
        say(step=i)
        listen()
    loss = train(i)
    used.append(optimizer.param_groups[0]["lr"])
    governor.step(loss)
governor.close()
say(used=used, missed=governor.status.missed, waiting=governor.status.waiting)
"""


def storm(proxy: Proxy, chance: random.Random) -> None:
    """One fault of a random kind, over when this returns (but for a cut, which waits for its bytes)."""
    kind = chance.choice(("cut", "cut", "cut", "delay", "blackhole", "refuse"))
    if kind == "cut":
        proxy.cut(chance.choice((0, 1, chance.randrange(1, 60), chance.randrange(1, 1500))))
        return
    if kind == "delay":
        proxy.delay(chance.uniform(0.005, 0.04))
    else:
        {"blackhole": proxy.blackhole, "refuse": proxy.refuse}[kind]()
    time.sleep(chance.uniform(0.05, 0.25))
    proxy.calm()


def sail(one: Trainer, proxy: Proxy, seed: int) -> None:
    """One storm in each stretch of its training, at a random moment."""
    chance = random.Random(seed)
    for stretch in range(STORMS):
        one.reach(stretch * STRETCH)
        one.tell()
        time.sleep(chance.uniform(0, 0.03))
        storm(proxy, chance)


def test_lockstep_through_a_bad_network_is_the_undisturbed_training(
    server: Server, trainer: Callable[..., Trainer], proxy: Callable[[str], Proxy]
) -> None:
    server.start()
    size = {"steps": STORMS * STRETCH, "stretch": STRETCH}
    calm = trainer(LOCKSTEP, run_name="calm", url=server.url("http"), **size)
    proxies = {t: proxy(server.url(t)) for t in TRANSPORTS}
    trainers = {t: trainer(LOCKSTEP, run_name=t, url=proxies[t].url(t), **size) for t in TRANSPORTS}
    with ThreadPoolExecutor() as side_by_side:
        for _ in range(STORMS):
            calm.tell()
        list(side_by_side.map(sail, trainers.values(), proxies.values(), (1788, 1789)))
    undisturbed = calm.hear("used")
    calm.finish()
    assert len(set(undisturbed)) > 10
    for transport, each in trainers.items():
        used, missed, waiting = each.hear("used", "missed", "waiting")
        each.finish()
        assert used == undisturbed
        assert missed == waiting == 0
        assert proxies[transport].hits > STORMS / 3, "the faults hit somebody"
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text(), "a cut message is nothing that the service has not thought of"
    for transport in TRANSPORTS:
        story = story_of(server, transport)
        assert story.steps == {1: list(range(STORMS * STRETCH))}
        assert story.problem == ""


BUDGET = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
base = {"type": "cosine", "T_max": 100_000}
governor = flyball.attach(optimizer, run=run_name, base=base, server=url, lag=0)
i, seen = through_an_outage(governor, optimizer, train)
governor.close()
say(steps=i, waiting=governor.status.waiting, dropped=governor.status.dropped, **seen)
"""


def test_a_dead_network_costs_no_step_more_than_its_budget(
    server: Server, trainer: Callable[..., Trainer], proxy: Callable[[str], Proxy]
) -> None:
    """Stalled: the connection there was goes on in the end. Lost: a new one, made in the meantime, never does."""
    server.start()
    names = [f"{kind}-{t}" for kind in ("stalled", "lost") for t in TRANSPORTS]
    proxies = {name: proxy(server.url(name.partition("-")[2])) for name in names}
    trainers = {name: trainer(BUDGET, run_name=name, url=proxies[name].url(name.partition("-")[2])) for name in names}
    for each in trainers.values():
        each.reach(100)
    for name in names:
        proxies[name].blackhole()
        if name.startswith("lost"):
            proxies[name].refuse()
            proxies[name].calm()
            proxies[name].blackhole()
    for each in trainers.values():
        each.hear("missing")
    time.sleep(3)
    for each in proxies.values():
        each.calm()
    for name, one in trainers.items():
        keys = ("steps", "waiting", "dropped", "times", "used", "missed")
        steps, waiting, dropped, times, used, missed = one.hear(*keys, within_s=60)
        one.finish()
        assert max(times) < 0.05 + SLACK_S, "one step waited longer than its budget of 50 ms"
        assert 1 <= missed <= 10, "an open circuit waits no more"
        assert len(set(used[-200:])) > 150, "a step has its own value again"
        assert waiting == dropped == 0
        story = story_of(server, name)
        assert story.steps == {1: list(range(steps))}
        assert story.problem == ""
