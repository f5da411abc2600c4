"""A million steps through one run.

Goal: the memory of client and server stays flat. Method: one training as fast as it goes, resident memory of both
processes after a fifth of the steps and at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.processes import Server, Trainer, story_of

STEPS = 1_000_000

MILLION = """
import os
import psutil
import flyball
from flyball.govern import govern
from flyball.optimizer import plain_number
from flyball.wire import Group, Settings

def say(**what):
    print(json.dumps(what), flush=True)

class Optimizer:
    lr, changes = 0.1, 0

    def write(self, settings, reference, bounds, noise_seed):
        if settings is not None and settings.lr[0] != self.lr:
            self.lr = settings.lr[0]
            self.changes += 1
        return None

    def read_back(self):
        return Settings((self.lr,)), None

    def forget(self):
        pass

    def number(self, value):
        return plain_number(value)

    def detach(self):
        pass

optimizer = Optimizer()
governor = govern(
    optimizer,
    (Group("default", 0.1),),
    dict(
        run="million", policy={"type": "windowed", "window_size": 20}, base={"type": "cosine_restarts", "T_0": 1000},
        server=url, start_wait_s=5.0, close_s=10.0,
    ),
)
process = psutil.Process()
import math, time
for i in range(steps):
    governor.before_step()
    governor.after_step()
    governor.step(2 + math.sin(i * 0.001) + (i * 7919 % 1000) * 1e-4, grad_norm=1.0)
    if i % 1000 == 0:
        while governor.status.waiting > 5000:
            time.sleep(0.001)
    if i + 1 in (steps // 5, steps):
        while governor.status.waiting:
            time.sleep(0.01)
        say(rss=process.memory_info().rss, changes=optimizer.changes)
governor.close()
say(dropped=governor.status.dropped)
"""


@pytest.mark.timeout(180)
def test_a_million_steps_leave_memory_flat(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    one = trainer(MILLION, url=server.url("grpc"), steps=STEPS)
    client = [one.hear("rss", within_s=60)]
    service = [server.rss]
    rss, changes = one.hear("rss", "changes", within_s=120)
    client.append(rss)
    service.append(server.rss)
    assert one.hear("dropped") == 0
    one.finish()
    assert changes > 100, "it was steered all the time"
    assert client[1] - client[0] < 4 << 20
    assert service[1] - service[0] < 16 << 20
    assert story_of(server, "million", check=False).steps == {1: list(range(STEPS))}
