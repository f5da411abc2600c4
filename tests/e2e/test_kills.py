"""kill -9 at random moments, dozens of times in one training: of the server, of the trainer, of both.

Goal: with `lag=0, wait_s=None` the learning rates that training applied, step by step and attempt after attempt, are
those of the undisturbed one, bit for bit; with the default budget and with no waits at all, the journal's decisions for
the same losses are. Method: trainings that save and load real checkpoint files, a log that they write through to the
disk, and the journal.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.e2e.processes import SLACK_S, TRANSPORTS, Server, Story, Trainer, story_of
from tests.e2e.warm import Warm, WarmServer

pytestmark = pytest.mark.alone

#: torch imports most of itself at the first step, and at the first file.
IMPORTS = """
import io, torch, flyball.adapters.torch, flyball.over_grpc, flyball.over_http
from tests.e2e.training import *
model, optimizer, train = digits_model()
train(0)
torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
file.seek(0)
optimizer.load_state_dict(torch.load(file)[1])
"""
KILLS, STRETCH, SAVE_EVERY = 50, 9, 16
STEPS = (KILLS + 1) * STRETCH

RESUMING = """
import os
from pathlib import Path
import flyball
from tests.e2e.training import *

model, optimizer, train = digits_model()
checkpoint, first, resume = Path(folder) / "checkpoint.json", 0, False
if checkpoint.exists():
    first, resume, weights = json.loads(checkpoint.read_text())
    saved = torch.load(weights)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])

options = {"policy": POLICY, "lag": 0, "wait_s": None, "seed": 7}
governor = flyball.attach(optimizer, run=run_name, server=url, resume=resume, **options)

def save_weights(step):
    path = f"{folder}/{step}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + ".new")
    os.replace(path + ".new", path)
    return path

def save(step, weights):
    checkpoint.with_suffix(".new").write_text(json.dumps([step, governor.state_dict(), weights]))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)
    if die_at == step:
        os.kill(os.getpid(), 9)

if not checkpoint.exists():
    save(0, save_weights(0))
say(step=first - 1)
log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
gate = Path(folder) / "gate"
for i in range(first, steps):
    while gate.exists() and i >= int(gate.read_text() or 0):
        time.sleep(0.001)
    loss = train(i)
    lr = optimizer.param_groups[0]["lr"]
    os.write(log, f"{i} {lr.hex()} {loss.item().hex()}\\n".encode())
    say(step=i)
    weights = save_weights(i + 1) if (i + 1) % save_every == 0 else ""
    governor.step(loss)
    if weights:  # the moment at which the service knows least of what the token stands for
        save(i + 1, weights)
    time.sleep(pace_s)
governor.close()
say(done=1)
"""


class Job:
    """A training that is killed and started again until it is done."""

    def __init__(self, warm: Warm, folder: Path, run: str, url: str, **values: Any) -> None:
        self._warm = warm
        self._folder = folder / run
        self._folder.mkdir()
        self._values = {"folder": str(self._folder), "run_name": run, "url": url, "pace_s": 0.002, "die_at": -1}
        self._values |= {"steps": STEPS, "save_every": SAVE_EVERY} | values

    def start(self, **values: Any) -> None:
        """From its newest checkpoint, or from the beginning."""
        self._warm.start(RESUMING, **(self._values | values))

    def go(self, step: int) -> None:
        """Let it train up to this step, and wait there."""
        (self._folder / "gate").write_text(str(step))

    def kill(self) -> None:
        """kill -9."""
        self._warm.kill()

    def died(self) -> None:
        """Wait for the end that it gave itself."""
        assert self._warm.ended() == -9, self._warm.parent.errors()

    def reach(self, step: int) -> None:
        """Wait until it trains a step as far as this."""
        self._warm.parent.reach(step)

    def finish(self) -> None:
        """Wait until it has trained all its steps."""
        self._warm.parent.hear("done", within_s=60)
        assert self._warm.ended() == 0, self._warm.parent.errors()

    def used(self) -> dict[int, set[str]]:
        """By step: the different learning rates and losses that it was ever trained with."""
        out: dict[int, set[str]] = {}
        for line in (self._folder / "log").read_text().splitlines():
            step, _, rest = line.partition(" ")
            out.setdefault(int(step), set()).add(rest)
        return out


def check_attempts(story: Story, steps: int) -> None:
    """Each attempt is one unbroken line from where it began, and the last one reaches the end."""
    assert story.problem == ""
    for attempt, first in story.from_step.items():
        assert story.steps[attempt] == list(range(first, first + len(story.steps[attempt])))
    newest = max(story.from_step)
    assert story.from_step[newest] + len(story.steps[newest]) == steps


def test_a_job_killed_right_after_saving_goes_on_exactly_there(
    calm_server: Server, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    """At its checkpoint a job has just reported a step, which the service may not have yet."""
    steps = 8 * SAVE_EVERY
    jobs = {}
    for transport in TRANSPORTS:
        warm, url = Warm(trainer, IMPORTS), calm_server.url(transport)
        straight, job = (
            Job(warm, tmp_path, f"{name}-{transport}", url, steps=steps, pace_s=0) for name in ("straight", "dying")
        )
        straight.start()
        straight.finish()
        for at in range(0, steps, SAVE_EVERY):
            job.start(die_at=at)
            job.died()
        job.start()
        jobs[f"dying-{transport}"] = (job, straight)
    for name, (job, straight) in jobs.items():
        job.finish()
        assert job.used() == straight.used()
        story = story_of(calm_server, name)
        check_attempts(story, steps)
        assert list(story.from_step.values()) == [0, *range(0, steps, SAVE_EVERY)]


FREE = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, lag=lag)
times = []
listen()
for i in range(1500):
    started = time.perf_counter()
    governor.step(train(i))
    times.append(time.perf_counter() - started)
    say(step=i)
    time.sleep(pace_s)
governor.close()
status = governor.status
say(worst_s=max(times), missed=status.missed, waiting=status.waiting, dropped=status.dropped)
"""


class Undisturbed(NamedTuple):
    """What comes of the same trainings where nothing happens."""

    used: dict[int, set[str]]
    free: Story


def undisturbed(server: Server, warm: Warm, folder: Path) -> Undisturbed:
    job = Job(warm, folder, "undisturbed", server.url("http"), pace_s=0)
    job.start()
    job.finish()
    warm.start(FREE, run_name="undisturbed-free", url=server.url("grpc"), lag=None, pace_s=0)
    assert warm.ended() == 0
    return Undisturbed(job.used(), story_of(server, "undisturbed-free"))


@pytest.mark.timeout(300)  # under a minute where nothing else runs
def test_fifty_kills_of_server_and_trainer_change_nothing(
    calm_server: Server, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    server = WarmServer(tmp_path, trainer)
    server.start()
    warm = {t: Warm(trainer, IMPORTS) for t in TRANSPORTS}
    jobs = {t: Job(warm[t], tmp_path, t, server.url(t)) for t in TRANSPORTS}
    free = {
        f"{t}-{lag}": trainer(FREE, run_name=f"{t}-{lag}", url=server.url(t), lag=lag, pace_s=0.015)
        for t, lag in (("grpc", None), ("http", 0))
    }
    calm = undisturbed(calm_server, warm["http"], tmp_path)
    for job in jobs.values():
        job.go(0)
        job.start()
    for each in free.values():
        each.tell()
    chance = random.Random(1788)
    killed = 0
    for kill in range(KILLS):
        for job in jobs.values():
            job.reach(kill * STRETCH - 1)
            job.go((kill + 1) * STRETCH)
        time.sleep(chance.uniform(0, 0.02))
        who = chance.choice(("server", "server", "trainers", "both"))
        if who in ("trainers", "both"):
            killed += 1
            for job in jobs.values():
                job.kill()
        if who in ("server", "both"):
            server.kill()
        if who in ("trainers", "both"):
            for job in jobs.values():
                job.start()
        time.sleep(chance.choice((0, 0, chance.uniform(0, 0.2))))
        if who in ("server", "both"):
            server.start()
    assert 10 < killed < KILLS
    for job in jobs.values():
        job.go(STEPS)
        job.finish()
    assert {len(values) for values in calm.used.values()} == {1}
    assert len({value.split()[0] for values in calm.used.values() for value in values}) > 10
    seen = {name: each.hear("worst_s", "missed", "waiting", "dropped", within_s=60) for name, each in free.items()}
    for each in free.values():
        each.finish()
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    for transport, job in jobs.items():
        assert job.used() == calm.used, "every attempt trained each step with the same learning rate"
        story = story_of(server, transport)
        check_attempts(story, STEPS)
        assert len(story.from_step) >= killed / 2, "the attempts are in the record"
    for name, (worst_s, missed, waiting, dropped) in seen.items():
        assert worst_s < (0.05 if name.endswith("0") else 0) + SLACK_S
        assert waiting == dropped == 0
        assert missed > 0 or name.endswith("None")
        story = story_of(server, name)
        assert story.problem == ""
        assert story.steps == calm.free.steps
        assert story.settings == calm.free.settings
        assert story.marks == calm.free.marks
