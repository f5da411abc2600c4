"""A real training that blows up is brought back by the playbook, or stopped.

Goal: from a loss that is no number to a network that learns again, with the job's own checkpoints and its own data.
Method: torch jobs whose data hold batches that ruin the network, with a handler that goes back and skips; the record is
folded again at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.processes import Server, Trainer, story_of

SPOILT = """
import copy
import math
import flyball
from tests.e2e.training import *

model, optimizer, train = digits_model()
governor = flyball.attach(optimizer, run=run_name, policy=policy, server=url, lag=0, wait_s=None)
saved, batch, losses = {}, 0, []

def keep():
    saved.update(token=governor.state_dict(), batch=batch, model=copy.deepcopy(model.state_dict()),
                 optimizer=copy.deepcopy(optimizer.state_dict()))

def restore(args):
    global batch
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    governor.load_state_dict(saved["token"])
    batch = saved["batch"] + args["skip_batches"]
    return f"skipped to batch {batch}, spike at step {args['before_step']}"

if handles:
    governor.on("restore", restore)
while len(losses) < 400 and not governor.should_stop:
    if batch == 60:
        keep()
    loss = train(batch)
    if spoilt[0] <= batch < spoilt[1]:
        with torch.no_grad():
            next(model.parameters()).fill_(math.inf)
    governor.step(loss)
    losses.append(float(loss))
    batch += 1
governor.close()
say(bad=sum(not math.isfinite(loss) for loss in losses), last=losses[-1], steps=len(losses),
    stopped=governor.should_stop)
"""
POLICY = {"type": "spike_guard", "policy": "constant", "min_samples": 20, "confirm": 2, "cooldown_steps": 5}
POLICY |= {"memory_steps": 300, "skip_batches": 40, "rewarm_steps": 10}


@pytest.mark.parametrize(
    ("handles", "spoilt", "rungs"),
    [
        (True, (80, 90), ["cut", "rewarm", "restore", "returned"]),
        (True, (80, 10**9), ["cut", "rewarm", "restore", "returned", "restore", "returned", "stop"]),
        (False, (80, 90), ["cut", "rewarm", "restore", "restore", "stop"]),
    ],
    ids=["cured", "incurable", "declined"],
)
def test_a_training_that_blows_up_is_brought_back_or_stopped(
    calm_server: Server, trainer: Callable[..., Trainer], handles: bool, spoilt: tuple[int, int], rungs: list[str]
) -> None:
    name = f"spikes-{handles}-{spoilt[1]}"
    job = trainer(
        SPOILT, run_name=name, url=calm_server.url("grpc"), policy=POLICY, handles=handles, spoilt=list(spoilt)
    )
    bad, last, steps, stopped = job.hear("bad", "last", "steps", "stopped")
    job.finish()
    story = story_of(calm_server, name)
    assert story.problem == ""
    marks = [mark for attempt in story.marks.values() for mark in attempt]
    found = [mark.code.rpartition("+spike_")[2] for mark in marks if "spike_" in mark.code]
    assert found == rungs
    assert story.from_step == dict.fromkeys(range(2, rungs.count("returned") + 2), 60) | {1: 0}
    assert stopped == (rungs[-1] == "stop")
    if rungs[-1] == "returned":  # it went back to batch 60, skipped the spoilt ones, and learnt on
        assert (steps, bad < 20, last < 1.0) == (400, True, True)
