"""The real service, and the bare echo it is measured against, each as a process of its own.

Rule of this module: a server is started the way users start it, and is gone when its `with` ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
#: Starting a server takes about 1.5 s; a busy machine may need a while longer. Stopping drains first.
STOP_S = 30.0


class Server(NamedTuple):
    """A running server: its addresses, its process, and the file it stores runs in (the echo has none)."""

    http: str
    grpc: str
    process: psutil.Process
    store: Path

    @property
    def target(self) -> str:
        """HOST:PORT of gRPC."""
        return self.grpc.removeprefix("grpc://")

    def cpu_s(self) -> float:
        """User and system seconds of all its threads so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss_kib(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss) / 1024


@contextmanager
def service() -> Iterator[Server]:
    """`flyball-server serve` on free ports with an SQLite file that outlives the process inside the `with`."""
    with tempfile.TemporaryDirectory(prefix="flyball-bench-") as folder:
        store = Path(folder, "f.db")
        command = ["flyball_server.cli", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--json"]
        # One load generator stands for many callers.
        command += ["--requests-per-s", "1e9"]
        with _running([*command, "--store", f"sqlite:///{store}"], store) as server:
            yield server


@contextmanager
def echo() -> Iterator[Server]:
    """The floor: see tests/bench/echo.py."""
    with _running(["tests.bench.echo"], Path()) as server:
        yield server


def stop(server: Server) -> None:
    """End the process and wait until it is gone, so that its file can be looked at."""
    if server.process.is_running():
        server.process.terminate()
        server.process.wait(STOP_S)


@contextmanager
def _running(command: list[str], store: Path) -> Iterator[Server]:
    # Its log is of interest only where it does not start.
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                code = process.wait()
                log.seek(0)
                raise RuntimeError(f"{command[0]} did not start (exit code {code}): {log.read()}")
            addresses = json.loads(line)
            server = Server(addresses.get("http", ""), addresses["grpc"], psutil.Process(process.pid), store)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
