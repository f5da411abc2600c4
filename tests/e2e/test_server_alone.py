"""The machine under the server: two servers on one file, and a clock that jumps.

Goal: a second server leaves the first unharmed and says why; nothing but the times in the record follows the clock.
Method: real servers, one of them with its clock moved from outside, and trainings that go on meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

ON_DEMAND = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, lag=lag, wait_s=None)
i = 0
while (order := listen()) != "end":
    run(governor, optimizer, train, i, i + 60)
    i += 60
    say(settled=delivered(governor))
governor.close()
say(status=governor.status._asdict())
"""


def test_a_second_server_on_the_same_file_leaves_the_first_alone(
    server: Server, trainer: Callable[..., Trainer]
) -> None:
    server.start()
    one = trainer(ON_DEMAND, run_name="one", url=server.url("grpc"), lag=0)
    one.tell()
    assert one.hear("settled")
    command = [sys.executable, "-m", "flyball_server.cli", "serve", "--store", server.store]
    for _ in range(2):
        second = subprocess.run(
            [*command, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 1
        assert second.stdout == ""
        assert second.stderr.count("\n") == 1, second.stderr
        assert f"in use by another Flyball server (process {server.pid})" in second.stderr
        assert "stop that one first, or name another file" in second.stderr
    one.tell()
    assert one.hear("settled")
    one.tell("end")
    one.finish()
    story = story_of(server, "one")
    assert story.steps == {1: list(range(120))}
    assert story.problem == ""


#: Runs the server on a clock that is off by as many seconds as a file says, read anew at every look.
LAUNCHER = """
import sys, time
from pathlib import Path

offset = Path(sys.argv.pop(1))
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + float(offset.read_text())
time.time_ns = lambda: real_ns() + int(float(offset.read_text()) * 1e9)
from flyball_server.cli import main
main()
"""


class Drifting(Server):
    """A server whose clock the test sets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._offset, self._launcher = folder / "offset", folder / "launcher.py"
        self._launcher.write_text(LAUNCHER)
        self.set_clock(0)

    @property
    def command(self) -> list[str]:
        return [str(self._launcher), str(self._offset), *super().command[2:]]

    def set_clock(self, hours: float) -> None:
        """How far it is ahead of the true time."""
        new = self._offset.with_suffix(".new")
        new.write_text(str(hours * 3600))
        new.replace(self._offset)


@pytest.fixture
def drifting(tmp_path: Path):
    server = Drifting(tmp_path)
    server.start()
    yield server
    server.end()


def test_a_clock_that_jumps_changes_nothing_but_the_times(drifting: Drifting, trainer: Callable[..., Trainer]) -> None:
    trainers = {
        f"{t}-{lag}": trainer(ON_DEMAND, run_name=f"{t}-{lag}", url=drifting.url(t), lag=lag)
        for t in TRANSPORTS
        for lag in (None, 0)
    }
    jumps = (0, 30, -30, 5, -2000, 24 * 400, 0)
    for hours in jumps:
        drifting.set_clock(hours)
        for run in trainers if hours else ():  # before they say anything: a run may look stale, never ended
            if drifting.knows(run):
                shown = drifting.get(f"/v1/runs/{run}")
                assert shown["stale_s"] >= 0
                assert shown["status"] in ("active", "stale", "lost")
        for each in trainers.values():
            each.tell()
        for each in trainers.values():
            assert each.hear("settled")
        for run in trainers:
            shown = drifting.get(f"/v1/runs/{run}")
            assert shown["status"] == "active"
            assert 0 <= shown["stale_s"] < 60
        listed = drifting.get("/v1/runs", status="active", limit=2)
        rest = drifting.get("/v1/runs", status="active", limit=2, cursor=listed["cursor"])
        assert {run["run"] for run in listed["runs"] + rest["runs"]} == set(trainers)
        assert all(run["stale_s"] >= 0 for run in listed["runs"] + rest["runs"])
    for each in trainers.values():
        each.tell("end")
        assert each.hear("status")["dropped"] == 0
        each.finish()
    assert drifting.stop() == 0
    assert "Traceback" not in drifting.log.read_text()
    settings = [story_of(drifting, run).settings for run in trainers]
    for run in trainers:
        story = story_of(drifting, run)
        assert story.steps == {1: list(range(60 * len(jumps)))}
        assert story.problem == ""
    assert all(each == settings[0] for each in settings)
