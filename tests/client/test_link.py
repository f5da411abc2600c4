"""Goal: the job's log says when the service is lost and when it is back, each once.

Method: a real session and link, and a service that a test starts late at an address known before.
"""

import logging
import socket
import time

import pytest
import torch

import flyball
import flyball_server


def until(done, seconds=20.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_log_says_once_that_the_service_is_lost_and_once_that_it_is_back(port, caplog):
    caplog.set_level(logging.WARNING, "flyball")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    governor = flyball.attach(optimizer, run="late", server=f"http://127.0.0.1:{port}", start_wait_s=0.5)
    with flyball_server.running(http=f"127.0.0.1:{port}"):
        until(lambda: governor.status.state == "steering")
        until(lambda: "is back" in caplog.text)
        governor.close()
    told = [r.getMessage() for r in caplog.records]
    assert [sum(words in line for line in told) for words in ("no link to the service", "the service is back")] == [
        1,
        1,
    ]


def test_a_service_that_is_there_from_the_start_is_not_called_back(caplog):
    caplog.set_level(logging.WARNING, "flyball")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with flyball_server.running() as service, flyball.attach(optimizer, run="there", server=service.http) as governor:
        until(lambda: governor.status.state == "steering")
    assert caplog.text == ""
