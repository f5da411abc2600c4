"""The server's disk is full.

Goal: the service says "not now", training goes on, and once there is room again everything arrives. Method: a limit on
the size of the server's files, set and lifted from outside while jobs run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

FILLING = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
i, seen = 0, []
while not seen or governor.status.through < seen[-1] + 300:
    governor.step(train(i))
    if governor.status.state == "away":
        seen.append(i)
        if len(seen) == 1:
            say(error=governor.status.last_error)
    i += 1
    if i % 25 == 0:
        say(step=i)
    time.sleep(0.001)
governor.close()
say(steps=i, status=governor.status._asdict())
"""


def test_a_full_disk_loses_nothing(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    trainers = {t: trainer(FILLING, run_name=t, url=server.url(t)) for t in TRANSPORTS}
    for each in trainers.values():
        each.reach(200)
    server.limit_files(4096)
    errors = [each.hear("error", within_s=20) for each in trainers.values()]
    time.sleep(1)
    server.limit_files(None)
    ended = {name: each.hear("steps", "status", within_s=30) for name, each in trainers.items()}
    for each in trainers.values():
        each.finish()
    assert server.stop() == 0, server.log.read_text()[-3000:]
    for error in errors:
        assert "cannot" in error or "full" in error, errors
    for name, (steps, status) in ended.items():
        assert status["dropped"] == 0
        story = story_of(server, name)
        assert story.steps == {1: list(range(steps))}
        assert story.problem == ""
