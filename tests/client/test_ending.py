"""Goal: a governor that nobody closes takes nothing with it: no memory, no thread, no reported step; and a job that is
started again needs one line, whether its run is known or not.

Method: real services and torch optimizers; what is alive is asked of weak references, what arrived of the service.
"""

import gc
import socket
import threading
import time
import weakref

import pytest
import torch

import flyball
import flyball_server


def until(done, seconds=10.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def ours():
    return {thread for thread in threading.enumerate() if thread.name.startswith("flyball-")}


class Sink:
    closed = 0

    def settings(self, step, at, values):
        pass

    def marker(self, step, at, marker):
        pass

    def close(self):
        Sink.closed += 1


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_governors_that_are_dropped_without_close_leave_nothing_behind(service, read, mode):
    before, Sink.closed = ours(), 0

    def train(run):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"mode": mode, "server": service.http, "report_to": [Sink()], "signals": ("grad_norm",)}
        governor = flyball.attach(optimizer, run=run, policy="windowed", **options)
        flyball.MemoryCheckpoint(governor, every=2, model=model, optimizer=optimizer)
        for _ in range(5):
            loss = model(torch.ones(1, 4)).sum()
            loss.backward()
            optimizer.step()
            governor.step(loss)
        return weakref.ref(optimizer), weakref.ref(model.weight), weakref.ref(governor)

    runs = [f"dropped-{mode}-{i}" for i in range(3)]
    held = [one for run in runs for one in train(run)]
    gc.collect()
    assert [one() for one in held] == [None] * 9
    until(lambda: ours() <= before)
    assert Sink.closed == 3
    for run in runs:
        told = read(run)
        assert (told["step"], told["status"] in ("finished", "failed")) == (4, False)


def test_a_dropped_governor_gives_up_in_time_where_the_service_is_away():
    before = ours()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    governor = flyball.attach(optimizer, run="away", server=address, start_wait_s=0.1, close_s=0.3)
    optimizer.step()
    governor.step(1.0)
    del governor, optimizer
    gc.collect()
    until(lambda: ours() <= before, 3)


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def train(optimizer, governor, steps):
    for _ in range(steps):
        optimizer.step()
        governor.step(1.0)


@pytest.mark.parametrize("skin", ["http", "grpc"])
def test_a_requeued_job_begins_its_run_or_goes_on_with_it_in_one_line(service, read, caplog, skin):
    for attempt in (1, 2, 3):
        optimizer = sgd()
        options = {"policy": "windowed", "server": getattr(service, skin), "resume": "auto"}
        governor = flyball.attach(optimizer, run=f"requeued-{skin}", **options)
        train(optimizer, governor, 10)
        assert governor.status.attempt == attempt
        governor.close("")
        assert read(f"requeued-{skin}")["step"] == 10 * attempt - 1
    assert caplog.text == ""


def test_whether_to_begin_is_decided_when_the_service_answers():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    optimizer = sgd()
    options = {"server": f"http://127.0.0.1:{port}", "resume": "auto", "start_wait_s": 0.1}
    governor = flyball.attach(optimizer, run="late", **options)
    train(optimizer, governor, 5)
    with flyball_server.running(http=f"127.0.0.1:{port}"):
        until(lambda: governor.status.state == "steering")
        governor.close("")
        assert (governor.status.through, governor.status.attempt) == (4, 1)
        other = sgd()
        governor = flyball.attach(other, run="late", **options)
        until(lambda: governor.status.state == "steering")
        assert (governor.status.step, governor.status.attempt) == (5, 2)
        governor.close("")


def test_no_token_yet_means_a_new_run(steered):
    assert steered(sgd(), resume=None).status.attempt == 1
    with pytest.raises(ValueError, match="resume is 'newest': give True, False, 'auto' or what state_dict"):
        steered(sgd(), resume="newest")
