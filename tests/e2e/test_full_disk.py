"""The server's disk is full.

Goal: the service says "not now", training goes on, and once there is room again everything arrives, also where the
server was killed and started meanwhile. Method: a limit on the size of the server's files, set and lifted from outside
while jobs run; and a real small file system that is filled.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up all that is left."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def test_a_server_killed_on_a_full_disk_goes_on_once_there_is_room(
    small_disk: Path, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYBALL_DISK_FREE_MIN", "0")  # to see what happens when nothing is left indeed
    server = Server(small_disk)
    server.log = small_disk.parent / "server.log"
    server.start()
    try:
        trainers = {t: trainer(FILLING, run_name=t, url=server.url(t)) for t in TRANSPORTS}
        for each in trainers.values():
            each.reach(200)
        filler = fill(small_disk)
        for each in trainers.values():
            assert "full" in each.hear("error", within_s=20)
        assert server.get("/v1/runs/grpc")["status"] == "active", "what can be read is told"
        server.kill()
        server.start()  # the file is there, and needs no room to be read
        nowhere = Server(small_disk)
        nowhere.file = small_disk / "another.db"
        refused = subprocess.run(
            [sys.executable, *nowhere.command], capture_output=True, text=True, timeout=30, check=False
        )
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1, refused.stderr
        assert f"{nowhere.file} cannot be opened now: " in refused.stderr
        filler.unlink()
        ended = {name: each.hear("steps", "status", within_s=30) for name, each in trainers.items()}
        for each in trainers.values():
            each.finish()
        assert server.stop() == 0, server.log.read_text()[-3000:]
        for name, (steps, status) in ended.items():
            assert status["dropped"] == 0
            story = story_of(server, name)
            assert story.steps == {1: list(range(steps))}
            assert story.problem == ""
    finally:
        server.end()
