"""A training process forks: data loaders' workers, children of its own, processes of `multiprocessing`.

Goal: nobody hangs or crashes, the parent's steps are in the journal once each, and a child says nothing unless it
attaches itself. Method: real processes on both transports, with workers forked again and again while reports are on
their way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

LOADER = """
import flyball
from tests.e2e.training import *

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * batches
    def __getitem__(self, i):
        return float(i)

# One interpreter for all runs: a service's threads and connections of many runs are forked with the workers.
for name in names:
    optimizer, train = tiny()
    governor = flyball.attach(optimizer, run=name, policy=POLICY, server=url)
    i = 0
    for epoch in range(epochs):
        loader = torch.utils.data.DataLoader(
            Numbers(), batch_size=2, num_workers=workers, multiprocessing_context=method, persistent_workers=False
        )
        for batch in loader:
            train(i)
            governor.step(float(batch[0]))
            i += 1
    alive = len(torch.multiprocessing.active_children())
    say(name=name, settled=delivered(governor), steps=i, alive=alive)
    governor.close()
"""
RUNS, EPOCHS, BATCHES = 10, 2, 250


def test_ten_thousand_steps_with_four_forked_workers_in_twenty_runs(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    names = {transport: [f"workers-{transport}-{i}" for i in range(RUNS)] for transport in TRANSPORTS}
    jobs = {
        transport: trainer(
            LOADER, names=names[transport], url=calm_server.url(transport), epochs=EPOCHS, batches=BATCHES,
            workers=4, method="fork",
        )
        for transport in TRANSPORTS
    }  # fmt: skip
    for transport, job in jobs.items():
        for name in names[transport]:
            assert job.hear("name", "settled", "steps", "alive", within_s=90) == (name, True, EPOCHS * BATCHES, 0)
        job.finish()
        for name in names[transport]:
            story = story_of(calm_server, name)
            assert story.problem == ""
            assert story.steps == {1: list(range(EPOCHS * BATCHES))}
            # The loss of each step is what its batch said: nothing came twice, and nothing from elsewhere.
            assert story.signals[1]["loss"] == [float(2 * i) for i in range(BATCHES)] * EPOCHS


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_spawned_or_served_do_not_disturb(
    calm_server: Server, trainer: Callable[..., Trainer], method: str
) -> None:
    # Such workers import what they need: the dataset is torch's own.
    script = LOADER.replace("Numbers()", "torch.utils.data.TensorDataset(torch.arange(2.0 * batches))")
    script = script.replace("float(batch[0])", "float(batch[0][0])")
    jobs = {
        transport: trainer(
            script,
            names=[f"{method}-{transport}"],
            url=calm_server.url(transport),
            epochs=1,
            batches=100,
            workers=2,
            method=method,
        )
        for transport in TRANSPORTS
    }
    for transport, job in jobs.items():
        name = f"{method}-{transport}"
        assert job.hear("name", "settled", "steps", "alive", within_s=90)[:3] == (name, True, 100)
        job.finish()
        assert story_of(calm_server, name).steps == {1: list(range(100))}


CHILDREN = """
import os
import sys
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, lag=lag, wait_s=5.0)
saved = []
governor.on_checkpoint(lambda args: saved.append(os.getpid()))
governor.every(3, lambda: saved.append(os.getpid()))
i = 0

def go(steps):
    global i
    run(governor, optimizer, train, i, i + steps)
    i += steps

def inherited():
    "What a child might do with the governor it has inherited."
    before = len(saved)
    for _ in range(30):
        optimizer.step()
        governor.step(-1.0)
    governor.status, governor.should_stop, governor.control("x", 0.5, min=0, max=1)
    governor.load_state_dict(governor.state_dict())
    governor.step(-1.0)
    if leaves == "closed":
        governor.close()
    assert len(saved) == before, "a handler ran in the child"
    if leaves == "at once":
        os._exit(0)
    if leaves == "by an error":
        with governor:
            raise SystemExit(0)
    sys.exit(0)  # through every atexit handler

codes = []
for _ in range(rounds):
    go(5)
    child = os.fork()  # the report of the newest steps is on its way
    if child == 0:
        inherited()
    until = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
        go(1)
    codes.append(done[1])
say(codes=codes, settled=delivered(governor), steps=i, attempt=governor.status.attempt)
governor.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    # The end of an interpreter that has loaded torch takes seconds, with or without Flyball.
    ("leaves", "lag", "rounds"),
    [("at once", None, 12), ("closed", 0, 2), ("normally", None, 2), ("by an error", 0, 2)],
)
def test_a_child_that_uses_what_it_inherited_does_no_harm(
    calm_server: Server, trainer: Callable[..., Trainer], transport: str, leaves: str, lag: int | None, rounds: int
) -> None:
    name = f"child-{leaves.replace(' ', '-')}-{transport}"
    job = trainer(CHILDREN, run_name=name, url=calm_server.url(transport), leaves=leaves, lag=lag, rounds=rounds)
    codes, settled, steps, attempt = job.hear("codes", "settled", "steps", "attempt", within_s=60)
    job.finish()
    assert (codes, settled, attempt) == ([0] * rounds, True, 1)
    story = story_of(calm_server, name)
    assert story.problem == ""
    assert story.steps == {1: list(range(steps))}
    assert -1.0 not in story.signals[1]["loss"]


OWN = """
import multiprocessing
import os
import sys
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
i = 0

def work(number):
    "A child that attaches itself, to a run of its own, while its parent goes on."
    other, own_train = tiny()
    with flyball.attach(other, run=f"{run_name}-{number}", policy=POLICY, server=own_url, lag=0, wait_s=None) as own:
        for j in range(100):
            own_train(j)
            own.step(1000.0 + number)
        assert own.status.waiting <= 1, own.status

processes = []
context = multiprocessing.get_context("fork")
for number in range(4):
    run(governor, optimizer, train, i, i + 10)
    i += 10
    if number % 2:
        child = os.fork()
        if child == 0:
            work(number)
            sys.exit(0)
        processes.append(child)
    else:
        one = context.Process(target=work, args=(number,))
        one.start()
        processes.append(one)
codes = []
until = time.monotonic() + 40
while len(codes) < 4 and time.monotonic() < until:
    run(governor, optimizer, train, i, i + 5)
    i += 5
    for one in list(processes):
        if isinstance(one, int):
            done = os.waitpid(one, os.WNOHANG)
            code = None if done == (0, 0) else done[1]
        else:
            code = one.exitcode
        if code is not None:
            processes.remove(one)
            codes.append(code)
say(codes=codes, settled=delivered(governor), steps=i)
governor.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_child_that_attaches_itself_is_steered_while_its_parent_goes_on(
    calm_server: Server, trainer: Callable[..., Trainer], transport: str
) -> None:
    name = f"own-{transport}"
    # A forked child can only be steered over HTTP, whatever its parent uses.
    job = trainer(OWN, run_name=name, url=calm_server.url(transport), own_url=calm_server.url("http"))
    codes, settled, steps = job.hear("codes", "settled", "steps", within_s=60)
    job.finish()
    assert (codes, settled) == ([0] * 4, True)
    story = story_of(calm_server, name)
    assert story.steps == {1: list(range(steps))}
    assert max(loss for loss in story.signals[1]["loss"] if loss is not None) < 1000.0
    for number in range(4):
        own = story_of(calm_server, f"{name}-{number}")
        assert own.problem == ""
        assert own.steps == {1: list(range(100))}
        assert set(own.signals[1]["loss"]) == {1000.0 + number}


FORKED_GRPC = """
import multiprocessing
import os
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
run(governor, optimizer, train, 0, 10)
said = []
for _ in range(rounds):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        began = time.monotonic()
        try:
            flyball.attach(tiny()[0], run=f"{run_name}-child", policy=POLICY, server=url)
        except flyball.FlyballError as error:
            os.write(theirs, f"{time.monotonic() - began < 1.0} {error}".encode())
        os._exit(0)
    os.close(theirs)
    until = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.01)
    said.append(os.read(ours, 4096).decode())
    os.close(ours)
say(said=said, settled=delivered(governor))
governor.close()
"""


def test_a_forked_child_of_a_process_that_uses_grpc_is_refused_a_channel_at_once(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    job = trainer(FORKED_GRPC, run_name="forked-grpc", url=calm_server.url("grpc"), rounds=3)
    said, settled = job.hear("said", "settled", within_s=60)
    job.finish()
    assert settled
    assert all(one.startswith("True ") for one in said), said
    assert all("does not survive a fork: use the service's http:// address" in one for one in said)


SPAWNED = """
import multiprocessing
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
with flyball.attach(optimizer, run=run_name, policy=POLICY, server=url) as governor:
    run(governor, optimizer, train, 0, 10)
    child = multiprocessing.get_context("spawn").Process(target=steered_alone, args=(f"{run_name}-child", url))
    child.start()
    child.join(40)
    say(code=child.exitcode)
"""


def test_a_spawned_child_of_a_process_that_uses_grpc_is_steered_over_grpc(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    job = trainer(SPAWNED, run_name="spawned-grpc", url=calm_server.url("grpc"))
    assert job.hear("code", within_s=60) == 0
    job.finish()
    assert story_of(calm_server, "spawned-grpc-child").steps == {1: list(range(20))}
