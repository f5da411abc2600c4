"""Real processes for the end-to-end tests: the service, training scripts, and a look into the journal they leave.

Goal: a test says only what happens to whom. Method: the server is the installed command on free loopback ports; a
training script is Python text in its own interpreter that talks JSON lines with the test (see `training.py`).
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from flyball_server import records
from flyball_server.core.events import Applied, Attached, Mark, Observed, Receipt
from flyball_server.core.types import Settings
from flyball_server.storage import open_journal
from flyball_server.verify import verify

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 30.0
#: How long anything that a test waits for may take, unless it says otherwise.
PATIENCE_S = 45.0
TRANSPORTS = ("grpc", "http")
#: How late a thread may be woken on a busy machine; a wait is judged by its budget and this.
SLACK_S = 0.15


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_until(done: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """What `done` says, once it is true."""
    until = time.monotonic() + within_s
    while not (found := done()):
        assert time.monotonic() < until, f"{what}: not within {within_s:g} s"
        time.sleep(0.01)
    return found


class Server:
    """`flyball-server serve` as its own process; every start is on the same ports and the same file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "f.db"
        self.log = folder / "server.log"
        self._ports = {"http": free_port(), "grpc": free_port()}
        self._process: subprocess.Popen[str] | None = None

    def url(self, transport: str) -> str:
        """Where clients find it: "http" or "grpc"."""
        return f"{transport}://127.0.0.1:{self._ports[transport]}"

    def start(self) -> Server:
        """Start, and return once it serves."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self.command], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = _line_within(self._process.stdout, START_S)
        assert line, f"the server did not start:\n{self.log.read_text()[-3000:]}"
        assert json.loads(line)["http"] == self.url("http")
        return self

    @property
    def store(self) -> str:
        """The file as an address."""
        return f"sqlite:///{self.file}"

    @property
    def command(self) -> list[str]:
        """What Python is given to run it."""
        ports = [part for name, port in self._ports.items() for part in (f"--{name}", f"127.0.0.1:{port}")]
        return ["-m", "flyball_server.cli", "serve", "--store", self.store, "--json", *ports]

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    @property
    def rss(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        self._gone(10)

    def stop(self, within_s: float = 20.0) -> int:
        """SIGTERM; the exit code."""
        self.send(signal.SIGTERM)
        return self._gone(within_s)

    def end(self) -> None:
        """Whatever state it is in: leave no process behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._gone(10)

    def limit_files(self, size: int | None) -> None:
        """No file of the server may grow beyond `size` bytes (None: no limit); as good as a full disk."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def get(self, path: str, **params: Any) -> Any:
        """GET from REST; the JSON answer."""
        answer = httpx.get(self.url("http") + path, params=params, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def knows(self, run: str) -> bool:
        """Whether the run exists."""
        return httpx.get(f"{self.url('http')}/v1/runs/{run}", timeout=20).status_code == 200

    def _gone(self, within_s: float) -> int:
        assert self._process is not None
        code = self._process.wait(within_s)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


class Trainer:
    """A training script in its own process. It talks with `say` and `listen` of `training.py`."""

    def __init__(self, script: str, *, interpreter: tuple[str, ...] = (), **values: Any) -> None:
        """`values` are the script's variables (JSON values)."""
        prelude = f"import json\nglobals().update(json.loads({json.dumps(values)!r}))\n"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        # No pipe for stderr: a child of the script that outlives it would keep the pipe open.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            [sys.executable, *interpreter, "-c", prelude + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hear(self, *keys: str, within_s: float = PATIENCE_S) -> Any:
        """The value (with several keys: the values) of the next line that has the keys; others are passed over."""
        until = time.monotonic() + within_s
        while True:
            try:
                line = self._said.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {keys} within {within_s:g} s; stderr:\n{self.errors()}") from None
            assert line is not None, f"the script ended without {keys}; stderr:\n{self.errors()}"
            if line.startswith("{") and all(key in (said := json.loads(line)) for key in keys):
                return said[keys[0]] if len(keys) == 1 else tuple(said[key] for key in keys)

    def reach(self, step: int) -> None:
        """Wait until it has trained so many steps."""
        while self.hear("step") < step:
            pass

    def tell(self, line: str = "go") -> None:
        """Let `listen` in the script return."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def finish(self, within_s: float = PATIENCE_S) -> None:
        """Wait for its end, which must be a normal one."""
        code = self.process.wait(within_s)
        errors = self.errors()
        self.end()
        assert code == 0, errors

    def errors(self) -> str:
        """What it wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def end(self) -> None:
        """Whatever state it is in: leave no process behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put(None)


class Story(NamedTuple):
    """What the journal says of a run, by attempt: where each began, its steps in journal order, its signals, the
    settings that each step decided, the decisions with their reasons, and the receipts."""

    from_step: dict[int, int]
    steps: dict[int, list[int]]
    signals: dict[int, dict[str, list[float | None]]]
    settings: dict[int, list[Settings]]
    marks: dict[int, list[Mark]]
    receipts: dict[int, list[Receipt]]
    problem: str


def story_of(server: Server, run: str, *, check: bool = True) -> Story:
    """Read a run's journal, and verify it (`check`). The server may be up: a copy of its file is read."""
    with _copied(server.file) as copy:
        journal = open_journal(f"sqlite:///{copy}")
        journal.start(lambda _: None)
        try:
            rows = list(journal.rows(run))
            assert rows, f"the journal has no run {run!r}"
            groups = records.spec_of(rows[0]).groups
            story = Story({}, {}, {}, {}, {}, {}, verify(journal, run).problem if check else "")
        finally:
            journal.close()
    for row in rows:
        event, outcome = records.from_row(row, groups)
        if isinstance(event, Attached):
            story.from_step[row.attempt] = event.from_step
            story.steps[row.attempt], story.signals[row.attempt] = [], {}
            story.settings[row.attempt], story.marks[row.attempt] = [], []
            story.receipts[row.attempt] = []
        elif isinstance(event, Applied):
            story.receipts[row.attempt] += event.receipts
        elif isinstance(event, Observed):
            before = len(story.steps[row.attempt])
            story.steps[row.attempt] += event.steps
            changes = dict(outcome.changes)
            for step in event.steps:
                story.settings[row.attempt].append(changes.get(step) or story.settings[row.attempt][-1])
            story.marks[row.attempt] += outcome.marks
            columns = story.signals[row.attempt]
            for name in {*columns, *event.signals}:
                column = columns.setdefault(name, [None] * before)
                column += event.signals.get(name) or [None] * len(event.steps)
    return story


@contextmanager
def _copied(file: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        yield copy


def _line_within(stream: Any, seconds: float) -> str:
    """The stream's next line; "" at its end or when the time is over."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return ""
