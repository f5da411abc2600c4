"""Goal: training after going back to a checkpoint in memory is, bit for bit, what it was the first time; and what does
not fit, or is not there, is declined with the numbers.

Method: real torch trainings on scikit-learn's digits, steered by a real service in lockstep; a second life of the same
steps is compared with the first: losses, parameters, optimizer state and the next random numbers.
"""

import copy
import logging
import random
import re
from itertools import count

import httpx
import numpy as np
import pytest
import torch
from tests.e2e.training import digits_table

import flyball
import flyball_server

names = count()
#: Moves often, so that a policy that did not go back would show.
RESTLESS = {"type": "windowed", "window_size": 4, "cooldown_steps": 1}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def attach(service):
    opened = []

    def start(optimizer, **options):
        run = f"memory-{next(names)}"
        defaults = {"run": run, "policy": RESTLESS, "lag": 0, "wait_s": 20.0, "server": service.http}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield start
    for governor in opened:
        governor.close("")


@pytest.fixture
def ask(service):
    """Gives a run a command, and tells how it ended."""
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:

        def give(run, kind, **fields):
            body = {"kind": kind, "reason": "a test", **fields}
            return http.post(f"/v1/runs/{run}/commands", json=body).raise_for_status().json()["id"]

        def outcome(run, command):
            return http.get(f"/v1/runs/{run}/commands/{command}").raise_for_status().json()

        give.outcome = outcome
        give.run = lambda run: http.get(f"/v1/runs/{run}").raise_for_status().json()
        yield give


class Batches:
    """Batches of digits in a random order that can be gone back in."""

    def __init__(self, size=16):
        table = digits_table()
        self.x, self.y = table[:, :-1].float() / 16, table[:, -1].long()
        self.size, self.taken, self.generator = size, 0, torch.Generator().manual_seed(3)

    def next(self):
        self.taken += 1
        rows = torch.randint(len(self.x), (self.size,), generator=self.generator)
        return self.x[rows], self.y[rows]

    def skip(self, batches):
        for _ in range(batches):
            self.next()

    def state_dict(self):
        return {"taken": self.taken, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.taken = state["taken"]
        self.generator.set_state(state["generator"])


class Training:
    """A network with dropout, batch norm and a buffer that no state_dict has, and its training."""

    def __init__(self, make, *, scaler=None, compiled=False):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        nn = torch.nn
        self.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))
        self.model.register_buffer("calls", torch.zeros(()), persistent=False)
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.9)
        self.scaler, self.data, self.losses = scaler, Batches(), []
        self.loss_of = torch.compile(self._loss, backend="aot_eager") if compiled else self._loss

    def _loss(self, x, y):
        return torch.nn.functional.cross_entropy(self.model(x), y)

    @property
    def things(self):
        things = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "data": self.data}
        return things if self.scaler is None else {**things, "scaler": self.scaler}

    def step(self, governor):
        x, y = self.data.next()
        x = x * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        self.optimizer.zero_grad()
        loss = self.loss_of(x, y)
        self.model.calls += 1
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        governor.step(loss)
        self.losses.append(loss.item())

    def train(self, governor, steps):
        self.losses = []
        for _ in range(steps):
            self.step(governor)
        return self.picture()

    def picture(self):
        """Everything that a next step would depend on, and the next random numbers."""
        state = self.optimizer.state
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        chance = random.random(), np.random.rand(), torch.rand(3)
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        return copy.deepcopy(
            {
                "losses": self.losses,
                "tensors": [*self.model.parameters(), *self.model.buffers()],
                "state": [state.get(parameter) for parameter in self.model.parameters()],
                "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "data": self.data.state_dict(),
                "chance": chance,
            }
        )


def same(one, other):
    """Equal to the last bit, all the way down."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), foreach=False)


@pytest.mark.parametrize("first", [0, 7], ids=["before the first step", "in mid-training"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (sgd, {}),
        (adam, {}),
        (sgd, {"compiled": True}),
        (sgd, {"scaler": True}),
        (adam, {"mode": "multiplier", "policy": {"type": "constant"}}),
    ],
    ids=["momentum", "adam with a tensor lr", "compiled", "scaler", "multiplier"],
)
def test_training_after_going_back_is_bit_identical(attach, make, options, first):
    scaler = torch.amp.GradScaler("cpu", growth_interval=4) if options.pop("scaler", False) else None
    training = Training(make, scaler=scaler, compiled=options.pop("compiled", False))
    governor = attach(training.optimizer, **options)
    checkpoint = flyball.MemoryCheckpoint(governor, **training.things)
    training.train(governor, first)
    kept = checkpoint.save()
    before = training.picture()
    places = [one.data_ptr() for one in (*training.model.parameters(), *training.model.buffers())]
    rates = [group["lr"] for group in training.optimizer.param_groups]
    compiled = None
    for _ in range(2):
        once = training.train(governor, 15)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = graphs if compiled is None else compiled
        assert graphs == compiled
        checkpoint.restore(kept)
        training.losses = before["losses"]
        assert same(training.picture(), before)
        again = training.train(governor, 15)
        assert same(once, again)
        checkpoint.restore(kept)
    assert len(set(once["losses"])) == 15
    assert places == [one.data_ptr() for one in (*training.model.parameters(), *training.model.buffers())]
    if isinstance(rates[0], torch.Tensor):
        assert all(group["lr"] is lr for group, lr in zip(training.optimizer.param_groups, rates, strict=True))
    assert governor.status.attempt == 5
    assert governor.status.step == first


def wait_for(training, governor, ask, command):
    """Train on until the job has answered."""
    for _ in range(200):
        training.step(governor)
        told = ask.outcome(governor.status.run, command)
        if told["status"] in ("done", "declined"):
            return {**told, "note": told["history"][-1]["note"]}
    raise AssertionError(told)


def test_what_people_ask_for_is_carried_out_and_told_in_numbers(attach, ask):
    training = Training(sgd)
    governor = attach(training.optimizer)
    flyball.MemoryCheckpoint(governor, limit_mb=1, **training.things)
    run = governor.status.run
    told = wait_for(training, governor, ask, ask(run, "restore", args={}))
    assert (told["status"], told["note"]) == ("declined", "there is no checkpoint at all in memory; kept: none")
    told = wait_for(training, governor, ask, ask(run, "checkpoint", args={"tag": "best"}))
    assert told["status"] == "done"
    assert told["note"].startswith("step ")
    size, used = re.search(r"'best': (0\.0\d+) MB in memory, (0\.0\d+) of 1\.0 MB used by 1", told["note"]).groups()
    assert float(size) == float(used) > 0
    step, taken = int(told["note"].split()[1]), training.data.taken
    training.train(governor, 5)
    told = wait_for(training, governor, ask, ask(run, "restore", args={"tag": "best", "skip_batches": 3}))
    assert told["status"] == "done"
    assert told["note"].endswith(f"to step {step} 'best'; 3 batches are skipped")
    assert training.data.taken <= taken + 3 + 3
    told = wait_for(training, governor, ask, ask(run, "rewind", step=step - 1))
    assert told["note"] == f"there is no checkpoint at or before step {step - 1} in memory; kept: step {step} 'best'"
    told = wait_for(training, governor, ask, ask(run, "rewind", step=step + 1))
    assert (told["status"], ask.run(run)["attempt"]) == ("done", 3)


def test_a_spikes_own_checkpoint_is_passed_over(attach):
    training = Training(sgd)
    governor = attach(training.optimizer)
    checkpoint = flyball.MemoryCheckpoint(governor, every=4, keep=3, **training.things)
    training.train(governor, 17)
    assert [kept.step for kept in checkpoint.kept] == [8, 12, 16]
    # The loss of step 12 tells of what step 11 did, and the copy of step 12 has that, too.
    assert governor._handlers["restore"]({"before_step": 12}).startswith("back from step 17 to step 8; the data went")
    assert [kept.step for kept in checkpoint.kept] == [8]
    with pytest.raises(flyball.Declined, match="no checkpoint from before step 8 in memory; kept: step 8"):
        governor._handlers["restore"]({"before_step": 8})


def test_what_does_not_fit_is_declined_before_anything_is_copied_or_given_up(attach, caplog):
    model = torch.nn.Linear(250, 1000, bias=False)  # a megabyte
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = attach(optimizer)
    checkpoint = flyball.MemoryCheckpoint(governor, limit_mb=2.5, keep=5, model=model, optimizer=optimizer)
    first, second = checkpoint.save(), checkpoint.save()
    assert checkpoint.kept == (first, second)
    third = checkpoint.save()  # in the place of the oldest
    assert checkpoint.kept == (second, third)
    named = checkpoint.save("a")
    assert checkpoint.kept == (third, named)
    other = checkpoint.save("b")
    assert checkpoint.kept == (named, other)
    with pytest.raises(flyball.Declined, match=r"needs 1\.0 MB beside 2\.0 MB of step 0 'a', step 0 'b', and limit_mb"):
        checkpoint.save()
    assert checkpoint.kept == (named, other)
    again = checkpoint.save("a")
    assert checkpoint.kept == (other, again)
    small = flyball.MemoryCheckpoint(governor, limit_mb=0.5, every=1, model=model, optimizer=optimizer)
    with caplog.at_level(logging.WARNING, "flyball"):
        model(torch.ones(1, 250)).sum().backward()
        optimizer.step()
        governor.step(1.0)  # what is due is declined, and training goes on
    assert "needs 1.0 MB, and limit_mb allows 0.5 MB: raise it, or keep less" in caplog.text
    assert small.kept == ()
    small.forget()


def test_nothing_is_put_back_where_one_thing_does_not_fit(attach):
    training = Training(sgd)
    governor = attach(training.optimizer)
    checkpoint = flyball.MemoryCheckpoint(governor, **training.things)
    kept = checkpoint.save()
    training.train(governor, 3)
    training.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    before = training.picture()
    with pytest.raises(flyball.Declined, match="optimizer is not what it was at the checkpoint: it has 2 parameter gr"):
        checkpoint.restore(kept)
    assert same(training.picture(), before)
    assert governor.status.attempt == 1
    del training.optimizer.param_groups[1]
    training.model[4] = torch.nn.Linear(32, 11)
    with pytest.raises(flyball.Declined, match=r"4\.weight is torch\.float32 \(11, 32\), and was torch\.float32 \(10"):
        checkpoint.restore(kept)


def test_several_models_generators_and_hidden_state_are_kept(attach):
    class Counting(torch.nn.Linear):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    models = [torch.nn.Linear(2, 2), Counting(2, 2)]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in models]
    own = torch.Generator().manual_seed(5)
    governor = attach(optimizers[0])
    checkpoint = flyball.MemoryCheckpoint(governor, models=models, optimizers=tuple(optimizers), shuffling=own)
    kept = checkpoint.save()
    before, drawn = models[1].weight.detach().clone(), torch.rand(4, generator=own)
    models[1].calls = 7
    with torch.no_grad():
        models[1].weight.add_(1.0)
    checkpoint.restore(kept)
    assert torch.equal(models[1].weight, before)
    assert torch.equal(torch.rand(4, generator=own), drawn)
    assert models[1].calls == 0


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "there is nothing to keep"),
        ({"model": 3}, TypeError, "model is a int: give a module"),
        ({"models": [torch.nn.Linear(1, 1), "x"]}, TypeError, r"models\.1 is a str"),
        ({"limit_mb": 0}, ValueError, "limit_mb is 0: give megabytes, more than 0"),
        ({"keep": 0}, ValueError, "keep is 0: give a number of checkpoints"),
        ({"every": 0, "model": torch.nn.Linear(1, 1)}, ValueError, "steps is 0: give a number of optimizer steps"),
    ],
)
def test_what_cannot_be_kept_is_refused_when_it_is_named(attach, given, error, words):
    governor = attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(error, match=words):
        flyball.MemoryCheckpoint(governor, **given)


def test_a_checkpoint_that_never_fits_is_told_once_and_again_where_its_size_changes(attach, caplog):
    model = torch.nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = attach(optimizer)
    flyball.MemoryCheckpoint(governor, limit_mb=0.0002, every=1, model=model, optimizer=optimizer)
    with caplog.at_level(logging.WARNING, "flyball"):
        for step in range(10):
            if step == 5:
                model.register_buffer("more", torch.zeros(1000))
            model(torch.ones(1, 10)).sum().backward()
            optimizer.step()
            governor.step(1.0)
    assert len(caplog.messages) == 2
    assert re.search(r"needs 0\.00\d+ MB, and limit_mb allows 0\.0002 MB", caplog.messages[0])


SWEEP = {"type": "range_test", "min_lr": 1e-4, "max_lr": 1e-2, "steps": 50}


def test_a_job_that_ends_in_mid_sweep_is_told_so(attach, caplog):
    training = Training(sgd)
    governor = attach(training.optimizer, policy=SWEEP)
    flyball.MemoryCheckpoint(governor, **training.things)
    training.train(governor, 20)
    governor.close()
    assert [line for line in caplog.messages if "is closed while a range test is under way" in line]


def test_a_range_test_that_finds_no_checkpoint_to_go_back_to_says_that_it_is_off(attach, ask, caplog):
    training = Training(sgd)
    governor = attach(training.optimizer, policy=SWEEP)
    training.train(governor, 20)
    governor.close()
    told = [mark["reason"] for mark in ask.run(f"{governor.status.run}/decisions")["decisions"]]
    assert [reason for reason in told if reason.startswith("No range test: the job made no checkpoint to go back to")]
    lines = [line for line in caplog.messages if "the service asks for checkpoint, which is declined" in line]
    assert len(lines) == 1
    assert "flyball.MemoryCheckpoint is one. What needs it is off" in lines[0]
    assert "is closed while" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_copies_are_taken_and_put_back_without_waiting_for_it(attach):
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Dropout(0.5), torch.nn.Linear(512, 1)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True)
    governor = attach(optimizer, lag=None)
    checkpoint = flyball.MemoryCheckpoint(governor, model=model, optimizer=optimizer)
    data = torch.randn(64, 512, device="cuda")

    def train(steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            optimizer.step()
            governor.step(loss)
            losses.append(loss.detach())
        return torch.stack(losses)

    train(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = checkpoint.save()
        once = train(10)
        checkpoint.restore(kept)
        again = train(10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(once, again)
