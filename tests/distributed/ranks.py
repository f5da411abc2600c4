"""What a torchrun process of these tests runs: the scenarios that its command line names, one after another.

Goal: a scenario reads like a user's script on every rank. Method: rank 0 starts, kills and starts the service again at
steps of its own training; what every rank saw goes into one JSON file for the tests to judge.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from tests.e2e.processes import Server, free_port
from tests.e2e.training import fixed_loss
from torch.distributed.algorithms.join import Join

import flyball
from flyball.adapters.gradient_noise import GradientNoise
from flyball.adapters.ranks import watch_gradients
from flyball.ranks import Ranks

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
POLICY = {"type": "windowed", "window_size": 8, "cooldown_steps": 3}
SCENARIOS: dict[str, Callable[[Server], Any]] = {}


def scenario(function: Callable[[Server], Any]) -> Callable[[Server], Any]:
    SCENARIOS[function.__name__] = function
    return function


def optimizer_of(lr: float = 0.1) -> torch.optim.Optimizer:
    """One number to train, with a gradient."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    return torch.optim.SGD([weight], lr=lr)


def used(optimizer: torch.optim.Optimizer) -> str:
    return float(optimizer.param_groups[0]["lr"]).hex()


def attach(optimizer: Any, server: Server, run: str, **options: Any) -> flyball.Governor:
    options = {"policy": POLICY, "server": server.url("grpc"), "ranks": Ranks(every=4), "start_wait_s": 10, **options}
    return flyball.attach(optimizer, run=run, **options)


def mine(i: int) -> tuple[float, float]:
    """This rank's loss of step i, and its weight."""
    return fixed_loss(i) * (1 + 0.1 * RANK), 1.0 + RANK


def train(governor: flyball.Governor, optimizer: Any, steps: range, at: Any = lambda i: None, pace_s: float = 0.002):
    """Train these steps; the learning rate that each of them used."""
    seen = []
    for i in steps:
        at(i)
        optimizer.step()
        seen.append(used(optimizer))
        loss, weight = mine(i)
        governor.step(loss, weight=weight)
        time.sleep(pace_s)
    return seen


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What Flyball logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flyball").addHandler(handler)
    yield lines
    logging.getLogger("flyball").removeHandler(handler)


@scenario
def killed(server: Server) -> Any:
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "killed")
    again = threading.Thread(target=server.start)

    def at(i: int) -> None:
        if RANK == 0 and i == 100:
            server.kill()
        if RANK == 0 and i == 200:
            again.start()

    lrs = train(governor, optimizer, range(600), at, 0.004)
    if RANK == 0:
        again.join()
    lrs += train(governor, optimizer, range(600, 900), pace_s=0.001)
    status = governor.status
    governor.close()
    return {"lrs": lrs, "losses": [mine(i) for i in range(900)], "state": status.state}


@scenario
def server_never_there(_: Server) -> Any:
    """The base schedule moves at every step, and rank 0's link is dead from the start."""
    optimizer = optimizer_of()
    nobody = f"grpc://127.0.0.1:{free_port()}"
    base = {"type": "cosine", "T_max": 60}
    governor = flyball.attach(
        optimizer, run="alone", base=base, on_outage="base", server=nobody, start_wait_s=0.5, close_s=0.2,
        ranks=Ranks(every=4),
    )  # fmt: skip
    lrs = train(governor, optimizer, range(60))
    governor.close()
    return lrs


@scenario
def unequal_batches(server: Server) -> Any:
    """Rank r has 40 + 7 r batches, and no collective of the job's own keeps ranks together."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "unequal")
    lrs = train(governor, optimizer, range(40 + 7 * RANK))
    governor.close()
    return lrs


@scenario
def joined(server: Server) -> Any:
    """DDP's Join, two epochs with 6 + 5 r batches each, of two micro-batches."""
    return {str(lag): joined_with(server, lag) for lag in (None, 0)}


def joined_with(server: Server, lag: int | None) -> Any:
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = attach(optimizer, server, f"joined-{lag}", lag=lag, wait_s=None)
    seen, epochs = {}, []
    for _ in range(2):
        with Join([model, governor.joinable]):
            for _ in range(6 + 5 * RANK):
                for _ in range(2):
                    loss = model(torch.full((1, 4), 1.0 + RANK)).square().mean()
                    loss.backward()
                step = governor.status.step
                optimizer.step()
                optimizer.zero_grad()
                seen[step] = used(optimizer)
                governor.step(loss)
        epochs.append(governor.status.step)
    governor.close()
    return {"lrs": seen, "epochs": epochs}


@scenario
def one_rank_skips(server: Server) -> Any:
    """A gradient scaler skips steps on rank 1 alone, more often than there are steps between two exchanges."""
    return {str(lag): skipping(server, lag) for lag in (None, 0)}


def skipping(server: Server, lag: int | None) -> Any:
    optimizer = optimizer_of()
    governor = attach(optimizer, server, f"skips-{lag}", lag=lag, wait_s=None)
    seen, steps = {}, []
    for i in range(80):
        step = governor.status.step
        if not (RANK == 1 and i > 10 and i % 7 == 0):
            optimizer.step()
            seen[governor.status.step - 1] = used(optimizer)  # it may have caught up in this very step
        steps.append(step)
        governor.step(fixed_loss(i))
        dist.barrier()  # as DDP's all-reduce would: no rank can get ahead of another
    governor.close()
    return {"lrs": seen, "steps": steps}


@scenario
def skips_in_a_row(server: Server) -> Any:
    """Rank 1 skips 30 steps in a row, and later all ranks skip 10: far more than lie between two exchanges."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "row")
    number = governor._optimizer.number
    governor._optimizer.number = lambda value: value if isinstance(value, Late) else number(value)  # type: ignore[method-assign]
    seen, steps = {}, []
    for i in range(90):
        step = governor.status.step
        if not ((RANK == 1 and 6 <= i < 36) or 50 <= i < 60):
            optimizer.step()
            seen[governor.status.step - 1] = used(optimizer)  # it may have caught up in this very step
        steps.append(step)
        governor.step(fixed_loss(i), weight=Late(float("nan") if RANK == 3 else 1.0 + RANK))
        dist.barrier()
        time.sleep(0.01)
    governor.close()
    return {"lrs": seen, "steps": steps, "bad": governor.status.bad_values}


class Late:
    """A weight whose number comes from a device."""

    def __init__(self, number: float) -> None:
        self.number, self.asked = number, 0

    def ready(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def value(self) -> float:
        return self.number


@scenario
def handler_on_rank_0(server: Server) -> Any:
    """Only rank 0 could go back, so no rank does."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "handler")
    called: list[Any] = []
    if RANK == 0:
        governor.on("checkpoint", called.append)
    url = f"{server.url('http')}/v1/runs/handler/commands"
    asked = ""
    for i in range(80):
        if RANK == 0 and i == 20:
            asked = httpx.post(url, json={"reason": "to see", "kind": "checkpoint"}, timeout=20).json()["id"]
        train(governor, optimizer, range(i, i + 1))
        dist.barrier()
    governor.close()
    told = httpx.get(f"{url}/{asked}", params={"wait_s": 10}, timeout=20).json() if RANK == 0 else None
    return {"called": called, "told": told}


@scenario
def slow_rank(server: Server) -> Any:
    """Rank 2 takes ten times as long now and then, with nothing of the job's own to hold the others back."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "slow")
    lrs = train(governor, optimizer, range(120), lambda i: time.sleep(0.05 if RANK == 2 and i % 10 == 0 else 0))
    governor.close()
    return lrs


@scenario
def asked_to_stop(server: Server) -> Any:
    """Somebody asks for a checkpoint, sets a control, and then stops the run."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "asked")
    kl = governor.control("kl", 0.5, min=0, max=1)
    saved: list[Any] = []

    def checkpoint(args: Any) -> str:
        saved.append(governor.status.step)
        if RANK == 2 and args["name"] == "second":
            raise OSError("disk full")
        return "kept"

    governor.on("checkpoint", checkpoint)
    url = f"{server.url('http')}/v1/runs/asked/commands"
    given: dict[int, Any] = {
        60: {"kind": "checkpoint", "args": {"name": "first"}},
        100: {"kind": "checkpoint", "args": {"name": "second"}},
        140: {"kind": "override", "setting": "kl", "value": 0.25},
        180: {"kind": "stop"},
    }
    ids, controls, step = [], [], 0
    while not governor.should_stop and step < 2000:
        if RANK == 0 and step in given:
            answer = httpx.post(url, json={"reason": "to see", **given[step]}, timeout=20)
            ids.append(answer.json()["id"] if answer.status_code == 201 else answer.text)
        train(governor, optimizer, range(step, step + 1))
        controls.append(kl.value)
        step += 1
    status = governor.status
    governor.close()
    commands = [httpx.get(f"{url}/{one}", params={"wait_s": 10}, timeout=20).json() for one in ids] if RANK == 0 else []
    return {"steps": step, "saved": saved, "controls": controls, "why": status.stop_reason, "commands": commands}


@scenario
def meddled_with(server: Server) -> Any:
    """Rank 2 alone writes a learning rate of its own at step 30, from a hook behind ours."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "meddled", policy="constant")
    count = [0]

    def other(*_: Any) -> None:
        count[0] += 1
        if RANK == 2 and count[0] == 31:
            optimizer.param_groups[0]["lr"] = 0.01

    optimizer.register_step_pre_hook(other)
    train(governor, optimizer, range(60))
    governor.close()
    return count[0]


@scenario
def post_local(server: Server) -> Any:
    """A torch optimizer that steps through the one it holds, and is none itself."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    optimizer = optimizer_of()
    whole = PostLocalSGDOptimizer(optim=optimizer, averager=PeriodicModelAverager(period=4, warmup_steps=0))
    governor = attach(whole, server, "post-local")
    lrs = train(governor, whole.optim, range(60), pace_s=0.01)
    governor.close()
    return lrs


@scenario
def raises(server: Server) -> Any:
    """The end of the job: rank 1 raises, and its process has to exit although all others wait for it."""
    optimizer = optimizer_of()
    with attach(optimizer, server, "raises") as governor:
        for i in range(40):
            dist.barrier()
            train(governor, optimizer, range(i, i + 1))
            if RANK == 1 and i == 20:
                raise RuntimeError("boom")


@scenario
def gone(server: Server) -> Any:
    """Rank 1 gives up in the middle of it; the others go on."""
    optimizer = optimizer_of()
    ranks = Ranks(every=4, timeout_s=2)
    governor = attach(optimizer, server, "gone", ranks=ranks, close_s=0.3)
    with warnings() as lines:
        lrs = train(governor, optimizer, range(40))
        if RANK == 1:
            governor.close("failed")
        else:
            lrs += train(governor, optimizer, range(40, 80), pace_s=0.02)
            governor.close()
    return {"lrs": lrs, "lines": lines, "step": governor.status.step}


@scenario
def attach_refused(server: Server) -> Any:
    """What one rank is refused for, all are."""
    return [
        refusal(lambda: attach(optimizer_of(), server, "refused", policy="no-such-policy")),
        refusal(lambda: attach(optimizer_of(0.1 * (1 + (RANK == 1))), server, "refused")),
        refusal(lambda: attach(optimizer_of(), server, "refused", lag=RANK if RANK == 1 else 0)),
        refusal(lambda: attach(optimizer_of(), server, "refused", base={"type": "no-such"})),
        refusal(lambda: attach(optimizer_of(), server, "refused", **({"laag": 0} if RANK == 1 else {}))),
        refusal(lambda: attach("nothing" if RANK == 2 else optimizer_of(), server, "refused")),
        refusal(lambda: RANK and attach(optimizer_of(), server, "refused", ranks=Ranks(timeout_s=1))),
    ]


def refusal(do: Callable[[], Any]) -> list[str]:
    try:
        do()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["none"]


@scenario
def fully_sharded(server: Server) -> Any:
    """FSDP2 with gradient noise: each rank draws for its own shard; what is not sharded gets the same everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    plain = torch.nn.Parameter(torch.zeros(8))
    plain.grad = torch.zeros(8)
    optimizer = torch.optim.SGD([*model.parameters(), plain], lr=0.1)
    governor = attach(optimizer, server, "sharded", policy={"type": "windowed", "window_size": 4}, base=None)
    noise = GradientNoise(optimizer)
    lrs = []
    for i in range(40):
        loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(i * WORLD + RANK))).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        lrs.append(used(optimizer))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        governor.step(loss, grad_norm=norm)
    governor.close()
    optimizer.zero_grad(set_to_none=False)
    added = noise.add(optimizer.param_groups, (1.0,), 5)
    shards = [p.grad.to_local().flatten().tolist() for p in model.parameters()]
    return {"lrs": lrs, "added": added, "shards": shards, "plain": plain.grad.tolist()}


@scenario
def flat_parameters(server: Server) -> Any:
    """FSDP1, whose ranks hold pieces of one flat parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    seen = {}
    for original in (False, True):
        inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        governor = attach(optimizer, server, f"flat-{original}")
        lrs = []
        for i in range(20):
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lrs.append(used(optimizer))
            governor.step(loss)
        governor.close()
        added = GradientNoise(optimizer).add(optimizer.param_groups, (1.0,), 5)
        grads = [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None and p.grad.numel()]
        seen[str(original)] = {"lrs": lrs, "added": added, "grads": grads}
    return seen


@scenario
def lockstep(server: Server) -> Any:
    """lag=0 on all ranks; and afterwards one process alone with the very losses that they had together."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "lockstep", lag=0, wait_s=None)
    together = train(governor, optimizer, range(80), pace_s=0)
    governor.close()
    if RANK:
        return {"together": together}
    optimizer, alone = optimizer_of(), []
    with attach(optimizer, server, "single", lag=0, wait_s=None, ranks=None) as governor:
        for i in range(80):
            optimizer.step()
            alone.append(used(optimizer))
            total = weights = 0.0
            for rank in range(WORLD):
                weight = 1.0 + rank
                total += fixed_loss(i) * (1 + 0.1 * rank) * weight
                weights += weight
            governor.step(total / weights)
    return {"together": together, "alone": alone}


@scenario
def goes_back(server: Server) -> Any:
    """All ranks go back to a checkpoint in mid-training, and then go on."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "back", lag=1, wait_s=None)
    lrs = train(governor, optimizer, range(50), pace_s=0)
    token = governor.state_dict()
    lrs += train(governor, optimizer, range(50, 70), pace_s=0)
    wrong = refusal(lambda: governor.load_state_dict({"step": 3, "run": "another"}))
    governor.load_state_dict({} if RANK else token)
    again = train(governor, optimizer, range(50, 70), pace_s=0)
    token = governor.state_dict()
    governor.close("")
    if RANK == 0:
        (Path(sys.argv[1]) / "token.json").write_text(json.dumps(token))
    return {"lrs": lrs, "again": again, "wrong": wrong, "token": token, "status": governor.status.attempt}


@scenario
def resumed(server: Server) -> Any:
    """Fewer ranks go on from the checkpoint that more of them left."""
    token = json.loads((Path(sys.argv[1]) / "token.json").read_text())
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "back", resume=token, lag=1, wait_s=None)
    first = governor.status.step
    lrs = train(governor, optimizer, range(70, 90), pace_s=0)
    governor.close()
    return {"lrs": lrs, "attempt": governor.status.attempt, "first": first}


@scenario
def kept_in_memory(server: Server) -> Any:
    """Every rank keeps a checkpoint of its own, and somebody asks for one, and to go back. Later the newest does not
    fit on rank 1, then rank 1 alone cannot load, then rank 1's optimizer has changed."""
    optimizer = optimizer_of()
    weight = optimizer.param_groups[0]["params"][0]
    governor = attach(optimizer, server, "memory", lag=0, wait_s=None)
    own = Loads()
    checkpoint = flyball.MemoryCheckpoint(governor, limit_mb=1, optimizer=optimizer, weights=Held(weight), own=own)
    url = f"{server.url('http')}/v1/runs/memory/commands"
    told: list[Any] = []

    def ask(kind: str, **args: Any) -> None:
        if RANK == 0:
            body = {"kind": kind, "args": args, "reason": "to see"}
            given = httpx.post(url, json=body, timeout=20).json()["id"]
        until = governor.status.step + 30
        lrs = train(governor, optimizer, range(30))
        told.append([kind, float(weight.detach()), governor.status.step - until, governor.status.attempt, len(lrs)])
        if RANK == 0:
            done = httpx.get(f"{url}/{given}", params={"wait_s": 10}, timeout=20).json()
            told[-1].append([done["status"], done["history"][-1]["note"]])
        dist.barrier()

    train(governor, optimizer, range(20))
    ask("checkpoint", tag="a")
    ask("restore", tag="a")
    checkpoint._limit = 1 if RANK == 1 else checkpoint._limit
    ask("checkpoint", tag="b")
    ask("restore", tag="b")
    checkpoint._limit = 10**6
    own.fails = RANK == 1
    ask("restore", tag="a")
    own.fails = False
    if RANK == 1:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    ask("restore", tag="a")
    governor.close()
    return told


class Loads:
    """Something of the script's own, whose load may fail."""

    fails = False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, _: Any) -> None:
        if self.fails:
            raise OSError("rank 1's own")


class Held(torch.nn.Module):
    """One parameter as a module."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@scenario
def long_pause(server: Server) -> Any:
    """The service is frozen for twice as long as the ranks' group ever waits."""
    optimizer = optimizer_of()
    governor = attach(optimizer, server, "paused", lag=0, wait_s=None, ranks=Ranks(timeout_s=5))
    went_on = threading.Timer(10, lambda: server.send(signal.SIGCONT))

    def at(i: int) -> None:
        if RANK == 0 and i == 20:
            server.send(signal.SIGSTOP)
            went_on.start()

    started = time.monotonic()
    with warnings() as lines:
        lrs = train(governor, optimizer, range(40), at, 0)
    took, missed = time.monotonic() - started, governor.status.missed
    governor.close()
    return {"lrs": lrs, "took": took, "lines": lines, "missed": missed}


@scenario
def noise_scale(server: Server) -> Any:
    """The gradient of sample x is x: mean 1, variance 9, so the noise scale is 9 samples."""
    model = torch.nn.Linear(1, 1, bias=False)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    squares = watch_gradients(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-9)
    governor = attach(optimizer, server, "noise-scale", policy="constant")
    generator = torch.Generator().manual_seed(RANK)
    for _ in range(400):
        batch = 1 + 3 * torch.randn(8, 1, generator=generator)
        loss = ddp(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss, weight=8.0, **squares())
    governor.close()
    return None


def main() -> None:
    where, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    server = Server(where)
    logging.getLogger("flyball").addHandler(logging.NullHandler())
    found: dict[str, Any] = {}
    if RANK == 0:
        server.start()
    try:
        for name in names:
            dist.barrier()
            started = time.monotonic()
            try:
                found[name] = SCENARIOS[name](server)
            except Exception:
                if name == "raises":
                    (where / f"raised-{RANK}").write_text(traceback.format_exc())
                    raise
                found[name] = {"error": traceback.format_exc()}
                print(found[name]["error"], flush=True)
            if RANK == 0:
                print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        if RANK == 0:
            server.end()
    told: list[Any] = [None] * WORLD
    dist.all_gather_object(told, found)
    if RANK == 0:
        seen = {name: [rank[name] for rank in told] for name in names}
        (where / f"found-{WORLD}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
