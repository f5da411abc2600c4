"""What policies ask of a job is carried out without a line of its script: spikes are gone back from, and a range test
leaves no trace.

Goal: a training that is ruined recovers, and one that was tested is, bit for bit, one that never was. Method: torch
jobs with dropout, momentum and a ready checkpoint in memory; the record is folded again at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

JOB = """
import hashlib
import math
import flyball
from tests.e2e.training import *

class Batches:
    def __init__(self):
        table = digits_table()
        self.x, self.y = table[:, :-1].float() / 16, table[:, -1].long()
        self.taken = 0
    def next(self):
        rows = torch.randint(len(self.x), (32,), generator=torch.Generator().manual_seed(self.taken))
        self.taken += 1
        return self.x[rows], self.y[rows]
    def skip(self, batches):
        self.taken += batches
    def state_dict(self):
        return {"taken": self.taken}
    def load_state_dict(self, state):
        self.taken = state["taken"]

torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
data = Batches()
governor = flyball.attach(optimizer, run=run_name, policy=policy, server=url, lag=0, wait_s=None)

def step():
    batch = data.taken
    x, y = data.next()
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if spoilt[0] <= batch < spoilt[1]:
        with torch.no_grad():
            next(model.parameters()).fill_(math.inf)
    governor.step(loss)
    return loss.item()

def digest():
    whole = hashlib.sha256()
    state = optimizer.state
    for one in model.parameters():
        whole.update(one.detach().numpy().tobytes())
        whole.update(state[one]["momentum_buffer"].numpy().tobytes())
    whole.update(torch.get_rng_state().numpy().tobytes())
    return whole.hexdigest()
"""
SPIKED = (
    JOB
    + """
checkpoint = flyball.MemoryCheckpoint(governor, every=20, model=model, optimizer=optimizer, data=data)
losses = []
while data.taken < 400 and not governor.should_stop:
    losses.append(step())
say(bad=sum(not math.isfinite(loss) for loss in losses), last=sum(losses[-20:]) / 20, steps=len(losses),
    stopped=governor.should_stop)
governor.close()
"""
)
SPIKES = {"type": "spike_guard", "policy": "constant", "min_samples": 20, "confirm": 2, "cooldown_steps": 5}
SPIKES |= {"memory_steps": 300, "skip_batches": 40, "rewarm_steps": 10, "max_cuts": 0, "max_rewarms": 0}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_ruined_training_recovers_without_a_handler_of_its_own(
    calm_server: Server, trainer: Callable[..., Trainer], transport: str
) -> None:
    name = f"recovers-{transport}"
    job = trainer(SPIKED, run_name=name, url=calm_server.url(transport), policy=SPIKES, spoilt=[90, 100])
    bad, last, steps, stopped = job.hear("bad", "last", "steps", "stopped")
    job.finish()
    story = story_of(calm_server, name)
    assert story.problem == ""
    marks = [mark for attempt in story.marks.values() for mark in attempt]
    assert [mark.code.rpartition("+spike_")[2] for mark in marks if "spike_" in mark.code] == ["restore", "returned"]
    # From the copy of step 80, and without the batches that spoilt it.
    assert story.from_step == {1: 0, 2: 80}
    assert (stopped, 0 < bad < 8, last < 0.6) == (False, True, True)
    assert steps < 400
    (restore,) = [one for one in calm_server.get(f"/v1/runs/{name}/commands")["commands"] if one["kind"] == "restore"]
    assert restore["status"] == "done"
    assert restore["history"][-1]["note"].endswith("to step 80; 40 batches are skipped")


TESTED = (
    JOB
    + """
if checkpoints:
    checkpoint = flyball.MemoryCheckpoint(governor, model=model, optimizer=optimizer, data=data)
made = 0
while governor.status.step < 60 or (governor.status.attempt or 1) < attempts:
    step()
    made += 1
say(digest=digest(), made=made)
governor.close()
"""
)
RANGE = {"type": "range_test", "min_lr": 1e-4, "max_lr": 10.0, "steps": 40, "after": "reference"}


def test_a_range_test_leaves_model_optimizer_and_chance_as_they_were(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    lives = {
        "never": {"policy": "constant", "checkpoints": False, "attempts": 1},
        "tested": {"policy": RANGE, "checkpoints": True, "attempts": 2},
        "unable": {"policy": RANGE, "checkpoints": False, "attempts": 1},
    }
    url = calm_server.url("grpc")
    jobs = {
        name: trainer(TESTED, run_name=f"range-{name}", url=url, spoilt=[0, 0], **life) for name, life in lives.items()
    }
    told = {name: job.hear("digest", "made") for name, job in jobs.items()}
    for job in jobs.values():
        job.finish()
    assert told["tested"][0] == told["unable"][0] == told["never"][0]
    assert told["tested"][1] > 75
    assert told["never"][1] == told["unable"][1] == 60
    story = story_of(calm_server, "range-tested")
    assert story.problem == ""
    assert len({settings.lr for settings in story.settings[1]}) > 20
    assert {settings.lr for settings in story.settings[2]} == {(0.05,)}
    found = next(mark.fields for mark in story.marks[1] if mark.code == "range_found")
    assert found is not None
    assert 1e-3 < found["lower"] < found["suggested"] <= found["upper"] < 5.0
    (over,) = [mark for mark in story.marks[2] if mark.code == "range_over"]
    assert over.fields is not None
    assert over.fields["suggested"] == found["suggested"]
    story = story_of(calm_server, "range-unable")
    (declined,) = [mark for mark in story.marks[1] if mark.code == "range_declined"]
    assert declined.fields is not None
    assert declined.fields["why"] == "this client has no handler for checkpoint"
    assert {settings.lr for settings in story.settings[1]} == {(0.05,)}
