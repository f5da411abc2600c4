"""Fixtures of the end-to-end tests: servers and training processes that never outlive their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.processes import Server, Trainer
from tests.e2e.proxy import Proxy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own, not started: to be killed, stopped and started again."""
    server = Server(tmp_path)
    yield server
    server.end()


@pytest.fixture(scope="session")
def calm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests that leave it in peace; each uses run names of its own."""
    server = Server(tmp_path_factory.mktemp("calm"))
    server.start()
    yield server
    assert server.stop() == 0, server.log.read_text()[-3000:]


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    """Starts training processes."""
    started: list[Trainer] = []

    def start(script: str, **values: object) -> Trainer:
        started.append(Trainer(script, **values))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def proxy() -> Iterator[Callable[[str], Proxy]]:
    """Puts a proxy in front of an address such as http://127.0.0.1:1788."""
    started: list[Proxy] = []

    def start(url: str) -> Proxy:
        started.append(Proxy(int(url.rpartition(":")[2])))
        return started[-1]

    yield start
    for each in started:
        each.close()
