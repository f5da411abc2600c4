"""Two processes want the same run.

Goal: one of them is told, nobody's training is harmed, their data is never mixed. Method: real trainings on one
server, then the attempts in the journal. The processes use different losses, so a step shows whose it is.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of, wait_until

FIRST = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, resume=resume)
say(attempt=governor.status.attempt)
i = first
while governor.status.state != "superseded" and i < first + 6_000:
    train(i)
    governor.step(mine)
    i += 1
    if i % 25 == 0:
        say(step=i)
    time.sleep(0.001)
train(i), train(i)
say(i=i, status=governor.status._asdict())
governor.close()
"""

SECOND = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
try:
    flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
except flyball.Refused as error:
    say(refused=str(error))
listen()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, resume=True)
first = governor.status.step
for i in range(300):
    train(i)
    governor.step(mine)
    time.sleep(0.001)
say(first=first, last=governor.status.step - 1)
governor.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_second_process_is_refused_and_supersedes_when_it_resumes(
    calm_server: Server, trainer: Callable[..., Trainer], transport: str
) -> None:
    name, url = f"two-{transport}", calm_server.url(transport)
    one = trainer(FIRST, run_name=name, url=url, resume=False, first=0, mine=1.0)
    one.reach(50)
    two = trainer(SECOND, run_name=name, url=url, mine=2.0)
    refused = two.hear("refused")
    assert name in refused
    assert "resume=True" in refused
    assert "another name" in refused
    one.reach(200)  # undisturbed
    two.tell()
    i, status = one.hear("i", "status")
    first, last = two.hear("first", "last")
    one.finish()
    two.finish()
    assert "another process" in status["last_error"]
    story = story_of(calm_server, name)
    assert story.problem == ""
    assert story.from_step == {1: 0, 2: first}
    assert story.steps == {1: list(range(first)), 2: list(range(first, last + 1))}
    assert set(story.signals[1]["loss"]) == {1.0}
    assert set(story.signals[2]["loss"]) == {2.0}
    assert i >= first


def test_a_process_superseded_while_it_was_away_does_not_take_the_run_back(
    server: Server, trainer: Callable[..., Trainer]
) -> None:
    server.start()
    url = server.url("http")
    zero = trainer(FIRST, run_name="back", url=url, resume=False, first=0, mine=1.0)
    zero.reach(50)
    one = trainer(FIRST, run_name="back", url=url, resume=True, first=0, mine=2.0)
    assert one.hear("attempt") == 2
    one.reach(50)
    # `one` is stopped, as a job is that its scheduler has suspended, and another process resumes the run.
    one.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: zero.process.poll() is not None, "the first process ends")
    two = trainer(FIRST, run_name="back", url=url, resume=True, first=0, mine=3.0)
    assert two.hear("attempt") == 3
    two.reach(100)
    server.kill()
    one.process.send_signal(signal.SIGCONT)
    server.start()
    status = one.hear("status")
    assert status["state"] == "superseded"
    two.reach(300)
    story = story_of(server, "back")
    assert sorted(story.steps) == [1, 2, 3]
    assert [set(s["loss"]) for s in story.signals.values()] == [{1.0}, {2.0}, {3.0}]
    assert story.problem == ""
