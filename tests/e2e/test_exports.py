"""A run leaves one service as a file and goes on at another; its steps leave as tables.

Goal: what `flyball export` writes is complete, verifies without any service, and lives on elsewhere. Method: two real
servers, the installed commands as processes of their own, and a training that resumes with its old token.
"""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tests.e2e.processes import Server, Trainer, story_of

from flyball import api

LEAVE = """
import flyball
from tests.e2e.training import *

def train_run(name):
    optimizer, train = tiny()
    governor = flyball.attach(optimizer, run=name, policy=POLICY, server=url, lag=0, wait_s=None)
    used = run(governor, optimizer, train, 0, 60)
    token = governor.state_dict()
    used += run(governor, optimizer, train, 60, 120 if name == "straight" else 80)
    governor.close()
    return used, token

say(straight=train_run("straight")[0], token=train_run("moved")[1])
"""

RESUME = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(
    optimizer, run=token["run"], policy=POLICY, server=url, lag=0, wait_s=None, resume=token
)
status = governor.status._asdict()
say(resumed=run(governor, optimizer, train, token["step"], 120), status=status)
governor.close()
"""


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Server]:
    """Another service, with a key of its own."""
    folder = tmp_path / "there"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.end()


def command(module: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """One of the two commands, in a folder."""
    line = [sys.executable, "-m", f"{module}.cli", *map(str, words)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def done(module: str, *words: object, folder: Path) -> str:
    """What it prints where all is well."""
    answer = command(module, *words, folder=folder)
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


def test_a_run_goes_on_at_another_service_with_its_old_token(
    server: Server, there: Server, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    server.start()
    one = trainer(LEAVE, url=server.url("grpc"))
    there.start()
    straight, token = one.hear("straight", "token")
    one.finish()
    done("flyball", "export", "moved", "-o", "moved.flyball", "--server", server.url("http"), folder=tmp_path)
    before = story_of(server, "moved")
    server.stop()

    key = done("flyball_server", "key", "--store", server.store, folder=tmp_path)
    (tmp_path / "key.pem").write_text(key)
    fingerprint = key.splitlines()[-1]
    said = done("flyball_server", "verify", "moved.flyball", folder=tmp_path)
    assert said.startswith("moved: 80 observations, ")
    assert f"matches bit for bit, signed by {fingerprint} (only a fingerprint you know" in said
    data = bytearray((tmp_path / "moved.flyball").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "bad.flyball").write_bytes(data)
    words = ["moved.flyball", "bad.flyball", "--public-key", "key.pem"]
    answer = command("flyball_server", "verify", *words, folder=tmp_path)
    assert answer.returncode == 1
    good, bad = answer.stdout.splitlines()
    assert good.endswith(f"signed by {fingerprint} (the key given)")
    assert bad.startswith("bad.flyball: part 2 (rows 1 to ")

    url = there.url("http")
    answer = command("flyball", "import", "bad.flyball", "--server", url, folder=tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "the export is not right: part 2 (rows 1 to" in answer.stderr
    assert "moved: imported, " in done("flyball", "import", "moved.flyball", "--server", url, folder=tmp_path)
    assert story_of(there, "moved") == before
    two = trainer(RESUME, url=there.url("grpc"), token=token)
    resumed, status = two.hear("resumed", "status")
    two.finish()
    assert (status["attempt"], status["step"]) == (2, 60)
    assert resumed == straight[60:]
    story = story_of(there, "moved")
    assert story.steps == {1: before.steps[1], 2: list(range(60, 120))}
    assert story.problem == ""


def report(client: api.Client, attempt: int, steps: list[int], receipts: list[tuple[int, float, float]]) -> None:
    losses = [None if s % 7 == 5 else "NaN" if s % 13 == 12 else "Infinity" if s == 9 else 2 + s / 10 for s in steps]
    body = {
        "session": f"s{attempt}",
        "attempt": attempt,
        "step": steps,
        "signals": {"loss": losses, **({"grad_norm": [0.5] * len(steps)} if attempt == 1 else {})},
        "receipts": [
            {"number": n, "step": s, "decided": s - 1, "lr": [lr, lr / 10], "momentum": [momentum, None]}
            for n, (s, lr, momentum) in enumerate(receipts, 1 + steps[0])
        ],
    }
    client._answer("POST", "/v1/runs/p:t/report", body=body)


@pytest.fixture(scope="module")
def run_url(calm_server: Server) -> str:
    """A service with the run p:t: gaps, missing and non-finite losses, side signals, receipts before, at and between
    the steps, and a rewind."""
    attach = {
        "project": "p", "run": "t", "groups": [{"name": "a", "lr": 0.1, "momentum": 0.9}, {"name": "b", "lr": 0.01}],
        "policy": {"type": "plateau", "patience": 0, "factor": 0.9},
    }  # fmt: skip
    with api.Client(calm_server.url("http")) as client:
        client._answer("POST", "/v1/attach", body={**attach, "session": "s1"})
        for first in range(0, 40, 8):
            steps = list(range(first, first + 8))
            report(client, 1, steps, [(s, 0.1 / (1 + s), 0.9 - s / 100) for s in steps[::3]])
        client.report("p:t", val_loss=math.nan, other=1.0)
        report(client, 1, [50, 60, 70], [(45, 0.5, 0.3), (60, 0.6, 0.2)])
        client.report("p:t", val_loss=0.25)
        client._answer("POST", "/v1/attach", body={**attach, "session": "s2", "resume": True, "from_step": 33})
        report(client, 2, list(range(33, 45)), [(33, 0.07, 0.8), (36, 0.08, 0.8)])
        client.report("p:t", val_loss=0.5)
    return calm_server.url("http")


@pytest.mark.parametrize("attempt", [None, 1])
def test_the_tables_agree_with_each_other_and_with_the_series(
    run_url: str, tmp_path: Path, attempt: int | None
) -> None:
    options = ["--server", run_url, *([] if attempt is None else ["--attempt", attempt])]
    lines = done("flyball", "export", "p:t", "--format", "jsonl", "-o", "-", *options, folder=tmp_path).splitlines()
    rows = [json.loads(line) for line in lines]
    done("flyball", "export", "p:t", "--format", "csv", "-o", "t.csv", *options, folder=tmp_path)
    done("flyball", "export", "p:t", "--format", "parquet", "-o", "t.parquet", *options, folder=tmp_path)
    with (tmp_path / "t.csv").open() as file:
        cells = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    packed = table.to_pylist()
    assert table.schema.metadata[b"flyball.attempt"] == str(attempt or 2).encode()
    assert list(rows[0]) == list(cells[0]) == table.column_names
    assert [[_text(v) for v in row.values()] for row in rows] == [list(row.values()) for row in cells]
    assert [[_text(v) for v in row.values()] for row in packed] == [
        [_text(_number(v)) for v in r.values()] for r in rows
    ]
    assert {str(table.schema.field(name).type) for name in table.column_names[2:]} == {"double"}

    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert {row["attempt"] for row in rows if row["step"] <= 32} == {1}
    assert {row["attempt"] for row in rows if 33 <= row["step"] < 45} == {attempt or 2}
    assert (45 in steps) == (attempt == 1), "a receipt between the steps has a line of its own"
    settings = [name for name in rows[0] if ":" in name and not name.startswith("side:")]
    assert set(settings) == {"lr:a", "lr:b", "momentum:a", "decided_lr:a", "decided_lr:b"}
    with api.Client(run_url) as client:
        asked = ["loss", "grad_norm", "val_loss", "other", *settings]
        series = client.series("p:t", asked, points=20_000, attempt=attempt)["series"]
    for name in ("loss", "grad_norm", "side:val_loss", "side:other"):
        column = {row["step"]: _number(row[name]) for row in rows if row[name] is not None}
        expected = dict(zip(*(series[name.removeprefix("side:")][k] for k in ("step", "value")), strict=True))
        assert str(column) == str(expected)
    for name in settings:
        points = list(zip(series[name]["step"], series[name]["value"], strict=True))
        for row in rows:
            assert row[name] == ([value for step, value in points if step <= row["step"]] or [None])[-1]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    return "" if value is None else str(value).replace("nan", "NaN").replace("inf", "Infinity")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["p:t", "-o", "there.csv", "--format", "csv"], 1, "there.csv exists already: name another file, or .*--force"),
        (["nobody", "-o", "new.flyball"], 1, "run 'nobody' is not known"),
        (["p:t", "-o", "new.csv", "--format", "csv", "--attempt", "7"], 1, "attempt 7 is not known"),
        (["p:t", "-o", "no/new.flyball"], 1, "no/new.flyball cannot be written: No such file"),
        (["p:t"], 2, "--format flyball is no text: name a file with -o"),
        (["p:t", "--format", "parquet", "-o", "-"], 2, "--format parquet is no text"),
        (["p:t", "--format", "schedule", "-o", "x.py"], 2, "ends with .json"),
        (["p:t", "-o", "x.flyball", "--attempt", "1"], 2, "holds all attempts"),
    ],
)
def test_an_export_that_cannot_be_leaves_nothing(
    run_url: str, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    (tmp_path / "there.csv").write_text("kept")
    answer = command("flyball", "export", *words, "--server", run_url, folder=tmp_path)
    assert answer.returncode == code
    pattern = " ".join(answer.stderr.replace("│", " ").split())
    assert re.search(told, pattern), answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
    assert (tmp_path / "there.csv").read_text() == "kept"
    done(
        "flyball",
        "export",
        "p:t",
        "-o",
        "there.csv",
        "--format",
        "csv",
        "--force",
        "--server",
        run_url,
        folder=tmp_path,
    )
    assert (tmp_path / "there.csv").read_text().startswith("step,attempt,")


def test_a_schedule_goes_to_stdout_without_its_module(run_url: str, tmp_path: Path) -> None:
    found = json.loads(done("flyball", "export", "p:t", "--format", "schedule", "--server", run_url, folder=tmp_path))
    group = found["groups"]["a"]
    assert (found["attempt"], found["steps"]) == (2, 45)
    assert group["from_step"][-2:] == [33, 36]
    assert group["lr"][-2:] == [0.07, 0.08]
    assert group["momentum"][-2:] == [0.8, 0.8]
    assert "momentum" not in found["groups"]["b"]
    assert not list(tmp_path.iterdir())


def test_without_pyarrow_the_pip_command_is_named(run_url: str, tmp_path: Path) -> None:
    words = ["flyball", "export", "p:t", "--format", "parquet", "-o", "t.parquet", "--server", run_url]
    code = f"import sys; sys.modules['pyarrow'] = None; sys.argv = {words!r}; import flyball.cli; flyball.cli.main()"
    line = [sys.executable, "-c", code]
    answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1
    assert "pip install 'flyball[parquet]'" in answer.stderr
    assert not list(tmp_path.iterdir())


STEPS = 200_000
AT_A_TIME = 4000
#: What a service may take more while a run of STEPS leaves or comes in: some parts, and no run.
MORE_BYTES = 48 << 20


def test_a_long_run_leaves_and_comes_in_bounded_memory(server: Server, there: Server, tmp_path: Path) -> None:
    server.start()
    there.start()
    with api.Client(server.url("http")) as client:
        attach = {"run": "long", "session": "s", "groups": [{"name": "g", "lr": 0.1}], "policy": {"type": "windowed"}}
        client._answer("POST", "/v1/attach", body=attach)
        for first in range(0, STEPS, AT_A_TIME):
            steps = list(range(first, first + AT_A_TIME))
            signals = {name: [2 + math.sin(s * s + i) for s in steps] for i, name in enumerate(("loss", "grad_norm"))}
            body = {"session": "s", "attempt": 1, "step": steps, "signals": signals}
            client._answer("POST", "/v1/runs/long/report", body=body)
        with (tmp_path / "long.flyball").open("wb") as file, _at_most(server) as taken:
            client.export("long", file)
        assert taken() < MORE_BYTES
        digest = client.run("long")["digest"]
    with api.Client(there.url("http")) as client:
        with (tmp_path / "long.flyball").open("rb") as file, _at_most(there) as taken:
            assert client.import_run(file)["status"] == "imported"
        assert taken() < MORE_BYTES
        assert client.run("long")["digest"] == digest
        assert client.run("long")["step"] == STEPS - 1


class _at_most:  # noqa: N801 - reads like a function
    """How many bytes more a server took at most in between."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._most = server.rss
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> Callable[[], int]:
        self._watch.start()
        return lambda: self._most - self._before

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, self._server.rss)
