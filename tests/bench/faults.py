"""`python -m tests.bench.faults [--quick] [--only NAME,...] [--json FILE]`: what a step of training pays for a fault.

Rule of this module: real processes and real faults; the time is taken around what Flyball does on the training thread
(before the optimizer's step, after it, and in `governor.step`), waits included. One training at a time.

Method: a network on digits trains through calm and every fault in turn, over each transport, with `lag=None` and with
`lag=0` under the default budget. A fault's steps are those from its beginning until the service has everything again.
The base schedule moves at every step, so that held settings show.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from statistics import quantiles
from typing import NamedTuple

from tests.bench.table import about, load, number
from tests.e2e.processes import TRANSPORTS, Server, Trainer
from tests.e2e.proxy import Proxy

#: What the README promises: microseconds that a step typically pays without waits, and the longest wait with them.
TYPICAL_US = 10.0
WAIT_MS = 50.0
#: How much later than its time is over a waiting thread may be woken, on a machine with other things to do.
WAKE_MS = 10.0

TRAINING = """
import threading
from pathlib import Path
import flyball
from tests.e2e.training import *

model, optimizer, _ = digits_model()
table = digits_table()
x, y = table[:, :-1].float() / 16, table[:, -1].long()
base = {"type": "cosine", "T_max": 10_000_000}
governor = flyball.attach(optimizer, run=run_name, base=base, server=url, lag=lag)
spent = 0

def timed(call):
    def around(*args):
        global spent
        started = time.perf_counter_ns()
        call(*args)
        spent += time.perf_counter_ns() - started
    return around

governor.before_step, governor.after_step = timed(governor.before_step), timed(governor.after_step)
report = timed(governor.step)
over = threading.Event()
threading.Thread(target=lambda: (listen(), over.set()), daemon=True).start()
seen, i = [], 0
while not over.is_set():
    batch = torch.randint(len(x), (64,))
    loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    spent = 0
    optimizer.step()
    report(loss)
    status = governor.status
    started = time.perf_counter_ns()
    sum(range(500))
    bare = time.perf_counter_ns() - started
    seen.append((time.monotonic(), spent / 1000, bare / 1000, optimizer.param_groups[0]["lr"], status.missed))
    if i % 50 == 0:
        say(step=i, through=status.through)
    i += 1
say(dropped=governor.status.dropped)
Path(path).write_text(json.dumps(seen))
say(written=1)
governor.close()
"""


class Step(NamedTuple):
    """A step of the training: when it was, and in microseconds what Flyball took of it and what a bare loop took."""

    at: float
    added_us: float
    bare_us: float
    lr: float
    missed: int


class Seen(NamedTuple):
    """One training through one fault, times in microseconds: each step's, the bare loop's beside it, how many waited in
    vain, how many different learning rates were in force while it lasted, and the seconds from its end until everything
    was delivered."""

    steps: list[float]
    bare: list[float]
    missed: int
    settings: int
    delivered_s: float


class Fault(NamedTuple):
    """What happens to whom: `begin`, and after `lasts_s` `end`."""

    title: str
    lasts_s: float
    begin: Callable[[Server, Proxy], object]
    end: Callable[[Server, Proxy], object]


#: In the order of the table. A hung server counts as an outage after 5 s; the network's fault is as long.
FAULTS = {
    "calm": Fault("nothing", 4, lambda *_: None, lambda *_: None),
    "killed": Fault("the server is killed, and back after 3 s", 3, lambda s, _: s.kill(), lambda s, _: s.start()),
    "hung": Fault("the server hangs for 8 s", 8, lambda s, _: s.send(SIGSTOP), lambda s, _: s.send(SIGCONT)),
    "partition": Fault("the network is dead for 8 s", 8, lambda _, p: p.blackhole(), lambda _, p: p.calm()),
    "disk": Fault("the disk is full for 3 s", 3, lambda s, _: s.limit_files(4096), lambda s, _: s.limit_files(None)),
}
LAGS = (None, 0)


def measure(names: list[str], transports: list[str], quick: bool) -> dict[tuple[str, str, int | None], Seen]:
    """By fault, transport and lag."""
    out = {}
    for transport in transports:
        with tempfile.TemporaryDirectory(prefix="flyball-bench-") as folder, _served(Path(folder), transport) as pair:
            for lag in LAGS:
                print(f"{transport}, lag={lag} ...", file=sys.stderr, flush=True)
                for name, seen in _trained(Path(folder), pair, transport, lag, names, quick):
                    out[name, transport, lag] = seen
    return out


@contextmanager
def _served(folder: Path, transport: str) -> Iterator[tuple[Server, Proxy]]:
    server = Server(folder)
    server.start()
    proxy = Proxy(int(server.url(transport).rpartition(":")[2]))
    try:
        yield server, proxy
    finally:
        proxy.close()
        server.end()


def _trained(
    folder: Path, pair: tuple[Server, Proxy], transport: str, lag: int | None, names: list[str], quick: bool
) -> Iterator[tuple[str, Seen]]:
    """One training through all the faults; what was seen of each."""
    path, (server, proxy) = folder / f"{lag}.json", pair
    job = Trainer(TRAINING, run_name=f"{lag}", url=proxy.url(transport), lag=lag, path=str(path))
    try:
        job.reach(200)
        faults = [FAULTS[name] for name in names]
        spans = [_happened(fault, 1.0 if quick else fault.lasts_s, job, server, proxy) for fault in faults]
        job.tell()
        assert job.hear("dropped") == 0
        job.hear("written")
        job.finish()
    finally:
        job.end()
    steps = [Step(*each) for each in json.loads(path.read_text())]
    for name, (begun, ended, delivered) in zip(names, spans, strict=True):
        yield name, _seen(steps, begun, ended, delivered)


def _happened(fault: Fault, lasts_s: float, job: Trainer, server: Server, proxy: Proxy) -> tuple[float, float, float]:
    """Let it happen; when it began and ended, and when everything was delivered."""
    begun = time.monotonic()
    fault.begin(server, proxy)
    until = begun + lasts_s
    while time.monotonic() < until:  # what the job says meanwhile is old news afterwards
        job.hear("step")
    fault.end(server, proxy)
    ended = time.monotonic()
    step, through = job.hear("step", "through")
    while through < step:
        through = job.hear("through", within_s=60)
    delivered = time.monotonic()
    time.sleep(0.5)
    return begun, ended, delivered


def _seen(steps: list[Step], begun: float, ended: float, delivered: float) -> Seen:
    inside = [step for step in steps if begun <= step.at <= delivered]
    before = [step for step in steps if step.at < begun][-1]
    # The first moments belong to what was already under way.
    settings = {step.lr for step in inside if begun + min(0.5, (ended - begun) / 2) <= step.at <= ended}
    return Seen(
        [step.added_us for step in inside],
        [step.bare_us for step in inside],
        inside[-1].missed - before.missed,
        len(settings),
        max(0.0, delivered - ended),
    )


def rows(seen: dict[tuple[str, str, int | None], Seen]) -> list[dict[str, str]]:
    """A row for each fault and lag; cells hold one number per transport where they differ."""
    out = []
    for name, fault in FAULTS.items():
        for lag in LAGS:
            found = [seen[name, t, lag] for t in TRANSPORTS if (name, t, lag) in seen]
            if found:
                out.append(_row(fault, lag, found, calm=name == "calm"))
    return out


def _row(fault: Fault, lag: int | None, found: list[Seen], *, calm: bool) -> dict[str, str]:
    cuts = [quantiles(each.steps, n=100) for each in found]
    middle, high = [cut[49] for cut in cuts], [cut[98] for cut in cuts]
    worst = [max(each.steps) for each in found]
    if lag is None:
        kept = max(middle) <= TYPICAL_US and not any(each.missed for each in found)
        budget = f"{TYPICAL_US:g} us typical, no wait"
    else:
        kept = max(worst) <= (WAIT_MS + WAKE_MS) * 1000
        budget = f"{WAIT_MS:g} ms a wait"
    moved = ["new ones" if each.settings > 1 else "the last ones" for each in found]
    return {
        "what happens": fault.title,
        "lag": str(lag),
        "typical step": _times(middle),
        "p99": _times(high),
        "worst": _times(worst),
        "budget": budget,
        "": "kept" if kept else "MISSED",
        "steps that waited in vain": _each([f"{each.missed} of {len(each.steps):,}" for each in found]),
        "settings meanwhile": _each(moved),
        "everything delivered": "" if calm else _each([f"{each.delivered_s:.1f} s later" for each in found]),
    }


def _each(cells: list[str]) -> str:
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _times(microseconds: list[float]) -> str:
    unit, scale = ("us", 1.0) if max(microseconds) < 1000 else ("ms", 1000.0)
    return _each([number(value / scale) for value in microseconds]) + f" {unit}"


def bare(seen: Iterable[Seen]) -> str:
    """What the machine itself does to a loop of about that length, in the same steps."""
    times = [each for one in seen for each in one.bare]
    cuts = quantiles(times, n=100)
    return (
        f"A bare loop in the same steps: typically {number(cuts[49])} us, p99 {number(cuts[98])} us, "
        f"worst {number(max(times) / 1000)} ms. So much is the machine's own."
    )


def render(table: list[dict[str, str]]) -> str:
    """As Markdown, in columns for reading as it is."""
    lines = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in cells]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: list[str]) -> list[str]:
    """The names in a list, in the table's order."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := sorted(set(asked) - set(known)):
        parser.error(f"{option}: {unknown[0]!r} is not known; there are {', '.join(known)}")
    return [name for name in known if name in asked]


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.faults", description="What faults cost a step.")
    parser.add_argument("--quick", action="store_true", help="every fault for one second only")
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {', '.join(FAULTS)}")
    parser.add_argument("--over", default=",".join(TRANSPORTS), help=f"some of {', '.join(TRANSPORTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    names = _chosen(parser, "--only", args.only, list(FAULTS))
    transports = _chosen(parser, "--over", args.over, list(TRANSPORTS))
    where = about(load())
    seen = measure(names, transports, args.quick)
    table, note, both = rows(seen), bare(seen.values()), " / ".join(transports)
    print(f"{where}\n\nTime added to a step on the training thread, waits included; {both} where they differ.\n")
    print(f"{render(table)}\n\n{note}")
    if args.json:
        args.json.write_text(json.dumps({"about": where, "quick": args.quick, "rows": table, "note": note}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
