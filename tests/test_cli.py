"""The command `flyball`, as its own process, on a run that a real training left in a real service."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tests.command_line import client_command

import flyball
import flyball_server

STEPS = 400


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A service that has steered one run in a project, and one that never saw a step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    with flyball_server.running() as service:
        with flyball.attach(
            optimizer,
            project="p",
            run="full",
            policy={"type": "windowed", "window_size": 10, "cooldown_steps": 0},
            labels={"team": "vision"},
            guard={"max_lr": 0.12},
            server=service.grpc,
        ) as governor:
            for i in range(STEPS):
                optimizer.step()
                governor.step(math.nan if i == 3 else 2 * math.exp(-i / 100), grad_norm=1.0 if i % 2 else None)
        with flyball.attach(optimizer, run="empty", server=service.http):
            pass
        yield service.http


def flyball_command(*words: str, server: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command's exit code and what it said."""
    return client_command(*words, **({} if server is None else {"FLYBALL_SERVER": server}), **environment)


def said(*words: str, server: str) -> str:
    """What the command prints where all is well."""
    done = flyball_command(*words, server=server)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_runs_lists_the_newest_first(server: str) -> None:
    header, first, second = said("runs", server=server).splitlines()
    assert header.split() == ["run", "status", "policy", "attempt", "step", "last", "news", "labels"]
    assert first.split()[:5] == ["empty", "finished", "constant@1", "1", "-"]
    assert second.split()[:5] == ["p:full", "finished", "windowed@1", "1", str(STEPS - 1)]
    assert second.endswith("team=vision")


def test_runs_filters_and_limits(server: str) -> None:
    words = ["--project", "p", "--status", "finished", "--policy", "windowed", "--label", "team=vision", "--json"]
    (only,) = json.loads(said("runs", *words, server=server))
    assert only["run"] == "p:full"
    assert json.loads(said("runs", "--label", "team=other", "--json", server=server)) == []
    done = flyball_command("runs", "--limit", "1", server=server)
    assert len(done.stdout.splitlines()) == 2
    assert "more than 1" in done.stderr


def test_show_tells_where_a_run_stands(server: str) -> None:
    text = said("show", "p:full", server=server)
    for words in (
        "run      p:full team=vision\nstatus   finished, last news ",
        f"step     {STEPS - 1} ({STEPS} observations)\npolicy   windowed@1, absolute mode, lag none\n",
        'guard    {"max_lr": 0.12}\n',
        "default  0.12        0.12        0.1           0.9       0\n",
        "grad_norm  1\n",
        "increase_threshold=0.02",
    ):
        assert words in text
    detail = json.loads(said("show", "p:full", "--json", server=server))
    steps = [one["step"] for one in detail["newest_decisions"]]
    assert steps == sorted(steps, reverse=True)
    assert len(steps) == 5
    assert detail["settings"][0]["lr"] == 0.12


def test_show_of_a_run_without_steps(server: str) -> None:
    text = said("show", "empty", server=server)
    assert "step     - (0 observations)" in text
    assert "\ndefault  0.12        -           0.12 " in text, "the settings that the run before left behind"
    assert "decisions" not in text


def test_csv_has_a_column_a_signal_and_empty_cells(server: str) -> None:
    text = said("series", "p:full", "--signals", "loss, grad_norm,lr:default", "--csv", server=server)
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["step", "loss", "grad_norm", "lr:default"]
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert [row["loss"] for row in rows[2:5]] == [repr(2 * math.exp(-0.02)), "NaN", repr(2 * math.exp(-0.04))]
    assert [row["grad_norm"] for row in rows[:4]] == ["", "1.0", "", "1.0"]
    assert rows[0]["lr:default"] == "0.1"
    assert rows[-1]["lr:default"] == "0.12"
    assert any(row["lr:default"] == "" for row in rows)


def test_series_as_json_and_as_columns(server: str) -> None:
    words = ["series", "p:full", "--from", "2", "--to", "4", "--points", "10", "--attempt", "1"]
    found = json.loads(said(*words, "--json", server=server))
    assert found["attempt"] == 1
    assert found["series"]["loss"]["step"] == [2, 3, 4]
    assert found["series"]["loss"]["value"][1] == "NaN"
    lines = said(*words, server=server).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "2", "3", "4"]
    assert said("series", "empty", "--csv", server=server) == "step,loss\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show", "nobody"], "run 'nobody' is not known: `flyball runs` lists those that are"),
        (["series", "p:full", "--signals", "lr:other"], "no group 'other'; it has default"),
        (["series", "p:full", "--attempt", "7"], "attempt 7 is not known"),
        (["runs", "--server", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        (["runs", "--server", "grpc://host:1789"], "need the service's REST address, http://host:1788"),
        (["runs", "--server", "nonsense"], "give http://HOST:PORT"),
    ],
)
def test_an_error_is_one_line_with_the_remedy(server: str, words: list[str], told: str) -> None:
    done = flyball_command(*words, server=server)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("flyball: ")
    assert told in line


@pytest.mark.parametrize(
    "words",
    [["runs", "--label", "team"], ["runs", "--status", "gone"], ["series", "x", "--csv", "--json"], ["show"]],
)
def test_a_wrong_command_line_is_2(words: list[str]) -> None:
    done = flyball_command(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_reader_who_has_enough_is_no_error(server: str) -> None:
    command = [sys.executable, "-m", "flyball.cli", "series", "p:full", "--json", "--server", server]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.stderr == ""


def test_without_the_extra_the_pip_command_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import flyball.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "flyball: typer is not installed: pip install 'flyball[cli]'\n"
