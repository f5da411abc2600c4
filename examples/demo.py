"""The whole of Flyball in about a minute: a real server, four real trainings at once, and the record they leave.

    make demo

Starts `flyball-server` as its own process on free ports with an SQLite file in a temporary folder, trains four small
networks on scikit-learn's digits (examples/train_digits.py) from learning rates that are too low, right and too high,
asks the service over REST what it did to them, and lets `flyball-server verify` fold every journal again.
Ends with exit code 0 only if all of that went well; no process outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import matplotlib as mpl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flyball import FlyballError
from flyball.api import Client

STEPS = 4000
RIGHT_LR = 0.05
#: How long the server may take to start, and a training to end.
START_S = 60
TRAIN_S = 170
#: Between two lines of progress.
PROGRESS_S = 2.0


class Job(NamedTuple):
    """One training: what it is made with, and over which transport it talks."""

    run: str
    lr: float
    policy: dict[str, Any]
    guard: dict[str, Any]
    network: str
    transport: str


JOBS = (
    Job(
        "too-low",
        RIGHT_LR / 100,
        {"type": "windowed", "window_size": 20, "cooldown_steps": 0, "increase_factor": 1.3, "lr_max": 0.1},
        {},
        "conv",
        "grpc",
    ),
    Job("right", RIGHT_LR, {"type": "cosine", "T_max": STEPS}, {}, "mlp", "http"),
    Job(
        "too-high",
        RIGHT_LR * 30,
        {"type": "plateau", "factor": 0.5, "patience": 40, "threshold": 0.02, "min_lr": 0.01},
        {"max_change": 3},
        "mlp",
        "grpc",
    ),
    Job("one-cycle", RIGHT_LR, {"type": "one_cycle", "total_steps": STEPS}, {}, "conv", "http"),
)


class Failed(Exception):
    """Something did not go as it should; the message says what, and where its log is."""


def main() -> None:
    """Run the demo."""
    signal.signal(signal.SIGTERM, _terminated)
    folder = Path(tempfile.mkdtemp(prefix="flyball-demo-"))
    started = time.monotonic()
    try:
        demo(folder)
    except (Failed, FlyballError) as error:
        sys.exit(f"demo: {error}\nEverything it made is in {folder}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is kept in {folder}")


def demo(folder: Path) -> None:
    """Serve, train, ask, stop, verify."""
    store = f"sqlite:///{folder / 'flyball.db'}"
    with server(folder, store) as (addresses, process):
        say(f"Serving on {addresses['http']} and {addresses['grpc']}, journal in {store}")
        with Client(addresses["http"]) as client:
            results = train(folder, addresses, client)
            lines = [summary(client, job, results[job.run]) for job in JOBS]
            draw(client, folder / "demo.png")
        process.terminate()
        if code := process.wait(timeout=START_S):
            raise Failed(f"the server ended with exit code {code}: see {folder / 'server.log'}")
    print_table(lines)
    say(f"Chart: {folder / 'demo.png'}")
    say("The server drained and ended with exit code 0. Folding every journal again ...")
    verify(folder, store)


# The processes


@contextlib.contextmanager
def server(folder: Path, store: str) -> Iterator[tuple[dict[str, str], subprocess.Popen[str]]]:
    """The service as its own process: its addresses, as it printed them, and the process."""
    words = ["-m", "flyball_server.cli", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    with started(folder, "server", [*words, "--store", store, "--json"]) as process:
        line = first_line(process, START_S)
        if not line:
            raise Failed(f"the server did not start: see {folder / 'server.log'}")
        yield json.loads(line), process


@contextlib.contextmanager
def started(folder: Path, name: str, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A Python process with one computing thread and its stderr in NAME.log, ended at the latest with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def first_line(process: subprocess.Popen[str], within_s: float) -> str:
    """The first line a process prints; "" where it ends without one, or takes too long."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    stream = process.stdout
    assert stream is not None
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        return lines.get(timeout=within_s)
    except queue.Empty:
        return ""


def train(folder: Path, addresses: dict[str, str], client: Client) -> dict[str, dict[str, Any]]:
    """Train all jobs at once, with progress from REST; what each printed at its end."""
    script = str(Path(__file__).with_name("train_digits.py"))
    with contextlib.ExitStack() as stack:
        running = {}
        for job in JOBS:
            words = [script, "--project", "demo", "--run", job.run, "--lr", str(job.lr), "--steps", str(STEPS)]
            words += ["--policy", json.dumps(job.policy), "--guard", json.dumps(job.guard), "--network", job.network]
            words += ["--server", addresses[job.transport]]
            running[job.run] = stack.enter_context(started(folder, job.run, words))
        say(f"Training {', '.join(running)}: {STEPS} steps each (the first seconds are the libraries loading)")
        print("\n  " + "".join(f"{job.run:<25}" for job in JOBS) + "\n  " + f"{'step  loss  at LR':<25}" * len(JOBS))
        until = time.monotonic() + TRAIN_S
        while any(process.poll() is None for process in running.values()):
            if time.monotonic() > until:
                raise Failed(f"the trainings took longer than {TRAIN_S} s")
            time.sleep(PROGRESS_S)
            print_progress(client)
        return {run: result_of(process, folder / f"{run}.log") for run, process in running.items()}


def result_of(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The line of JSON that a training printed."""
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        raise Failed(f"a training ended with exit code {process.returncode}: see {log}")
    result: dict[str, Any] = json.loads(text)
    if result["undelivered"]:
        raise Failed(f"{result['undelivered']} observations of {result['run']} did not arrive: see {log}")
    return result


def verify(folder: Path, store: str) -> None:
    """Let `flyball-server verify` fold the journals; what it says is printed."""
    words = ["-m", "flyball_server.cli", "verify", "--store", store]
    with started(folder, "verify", words) as process:
        said, _ = process.communicate(timeout=TRAIN_S)
    print(said, end="")
    matches = said.count("matches bit for bit")
    if process.returncode or matches != len(JOBS):
        raise Failed(f"verify ended with exit code {process.returncode}: see {folder / 'verify.log'}")
    say(f"All {matches} journals match bit for bit: the same observations give the same decisions again.")


# What is asked of the service


def print_progress(client: Client) -> None:
    """One line: step, loss and applied learning rate of every run that has begun."""
    known = {run["name"] for run in client.runs(project="demo")}
    if len(known) == len(JOBS):
        found = [client.run(f"demo:{job.run}") for job in JOBS]
        print("  " + "".join(f"{progress_of(run):<25}" for run in found).rstrip(), flush=True)


def progress_of(run: dict[str, Any]) -> str:
    """Where a run is."""
    lr, loss = run["settings"][0]["applied_lr"], run["signals"].get("loss")
    return f"{run['observations']:>4}" + ("" if lr is None or loss is None else f" {loss:.2g} at {lr:.2g}")


def summary(client: Client, job: Job, result: dict[str, Any]) -> list[str]:
    """One row of the table, from REST and from what the training printed."""
    run = client.run(f"demo:{job.run}")
    if run["status"] != "finished" or run["observations"] != STEPS:
        raise Failed(f"{run['run']} is {run['status']} with {run['observations']} of {STEPS} observations")
    lr = client.series(run["run"], ["lr:default"])["series"]["lr:default"]["value"]
    policy = run["policy"].partition("@")[0]
    return [
        job.run,
        policy if run["base"] is None else f"base {run['base']['type']}",
        job.transport,
        f"{lr[0]:.3g} -> {lr[-1]:.3g}",
        str(sum(1 for _ in client.decisions(run["run"]))),
        f"{result['first_loss']:.3g} -> {result['last_loss']:.3g}",
        f"{result['accuracy']:.1%}",
        f"{result['added_us']:.0f}",
    ]


def print_table(rows: list[list[str]]) -> None:
    """The four runs, side by side."""
    table = Table(title="Four runs, as the service recorded them", title_justify="left", box=SIMPLE_HEAD)
    titles = ("run", "policy", "over", "LR first -> last", "decisions", "loss first -> last", "accuracy", "added us")
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print()
    Console(width=max(120, Console().width), highlight=False).print(table)
    print("  Losses are means of 20 steps. A base schedule moves at every step, which is no decision of a policy.")
    print(f"  Added us: microseconds a step, by the clock, with {len(JOBS) + 1} processes on {os.cpu_count()} cores.")


def draw(client: Client, file: Path) -> None:
    """Loss and applied learning rate of all runs, as the service has them."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(2, 1, figsize=(10, 8), sharex=True, layout="constrained")
    for job in JOBS:
        found = client.series(f"demo:{job.run}", ["loss", "lr:default"], points=1000)["series"]
        losses.plot(found["loss"]["step"], found["loss"]["value"], linewidth=0.8, label=job.run)
        rates.step(found["lr:default"]["step"], found["lr:default"]["value"], where="post", label=job.run)
    losses.set(yscale="log", ylabel="loss", title="Four trainings, steered")
    rates.set(yscale="log", ylabel="learning rate, as applied", xlabel="optimizer step")
    losses.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def say(text: str) -> None:
    """Tell the reader something, now."""
    print(f"\n{text}", flush=True)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
