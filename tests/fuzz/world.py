"""A real service of its own process with runs in several states, for whoever throws things at it.

Goal: what is asked for in the fuzz exists often enough that its answers go deep. Rule of this module: the service asks
for tokens, as it would in earnest, and lies in a folder of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

GROUPS = [{"name": "body", "lr": 0.1, "momentum": 0.9}, {"name": "head", "lr": 0.01}]


class Service(NamedTuple):
    """Where it listens, and the secret of a token that may do anything."""

    http: str
    grpc: str
    token: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """The service with its runs; ended whatever happens."""
    store, log = f"sqlite:///{folder / 'f.db'}", folder / "log"
    cli = [sys.executable, "-m", "flyball_server.cli"]
    made = subprocess.run(
        [*cli, "token", "create", "--name", "fuzz", "--role", "admin", "--store", store, "--json"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    token = json.loads(made.stdout)["secret"]
    command = [*cli, "serve", "--store", store, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--auth", "--json"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        found = Service(told["http"], told["grpc"], token, process, log)
        with httpx.Client(base_url=found.http, headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
            _fill(http)
        yield found
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def _fill(http: httpx.Client) -> None:
    """Runs that are active, ended, commanded, proposed for, gone back and deleted."""
    for name in ("active", "ended", "gone"):
        body = {"run": name, "session": f"s-{name}", "groups": GROUPS, "policy": {"type": "plateau", "patience": 0}}
        assert http.post("/v1/attach", json=body).status_code == 200
        report = {
            "session": f"s-{name}", "attempt": 1, "step": list(range(20)), "signals": {"loss": [1.0] * 20},
            "controls": [{"name": "kl", "value": 0.1, "min": 0, "max": 1}],
            "end": "" if name == "active" else "finished",
        }  # fmt: skip
        assert http.post(f"/v1/runs/{name}/report", json=report).status_code == 200
    for command in ({"kind": "override", "value": 0.01}, {"kind": "checkpoint"}, {"kind": "note"}):
        asked = http.post("/v1/runs/active/commands", json={"reason": "to have one", **command})
        assert asked.status_code == 201, asked.text
    assert http.delete("/v1/runs/gone", params={"reason": "to have one"}).status_code == 200
