"""Goal: what was applied, and what moved it, reaches every sink as it was, and no sink reaches the training.

Method: real training against a real service; the sinks are recorders, and one that blocks or fails the way a
tracking service in trouble does.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

import flyball
import flyball_server
from flyball import limits
from flyball.sinks import Marker


class Recorder:
    """A sink that keeps what it is told, and may be held up or made to fail."""

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.markers: list[tuple[int, Marker]] = []
        self.times: list[float] = []
        self.closed = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.fails = False

    def settings(self, step, at, values):
        self.may_go.wait(30)
        if self.fails:
            raise ConnectionError("the tracking server is away")
        self.times.append(at)
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def marker(self, step, at, marker):
        self.markers.append((step, marker))

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("sinks") / "f.db"
    with flyball_server.running(store=f"sqlite:///{store}") as running:
        yield running


def optimizer_of(momentum=0.0):
    body, head = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    body.grad = head.grad = torch.zeros(1)
    groups = [{"name": "body", "params": [body], "lr": 0.1}, {"name": "head", "params": [head], "lr": 0.01}]
    return torch.optim.SGD(groups, momentum=momentum)


def train(optimizer, governor, losses):
    """The learning rates of group body, one per step."""
    used = []
    for loss in losses:
        optimizer.step()
        used.append(optimizer.param_groups[0]["lr"])
        governor.step(loss)
    return used


def joined(points, steps):
    """The values that a chart which joins the points shows, step by step."""
    values, known = [], dict(points)
    ordered = sorted(known)
    for step in range(steps):
        low = max(s for s in ordered if s <= step)
        high = min(s for s in ordered if s >= step)
        share = 0 if high == low else (step - low) / (high - low)
        values.append(known[low] + share * (known[high] - known[low]))
    return values


SHORT = {"type": "windowed", "window_size": 5, "cooldown_steps": 2}


def lockstep(service, run, *sinks, **more):
    return {"run": run, "server": service.http, "policy": SHORT, "lag": 0, "wait_s": None, "report_to": sinks, **more}


def test_a_chart_that_joins_the_points_shows_what_every_step_used(service):
    optimizer, sink = optimizer_of(momentum=0.9), Recorder()
    began = time.time()
    options = lockstep(service, "joined", sink)
    with flyball.attach(optimizer, **options) as governor:
        used = train(optimizer, governor, [2.0 * 0.99**i for i in range(250)])
    assert len(set(used)) > 5
    assert joined(sink.curves["lr/body"], 250) == used
    assert joined(sink.curves["lr/head"], 250) == pytest.approx([lr / 10 for lr in used])
    assert joined(sink.curves["momentum/body"], 250) == [0.9] * 250
    # Where nothing changes it is told again now and then, and at the end.
    assert [step for step, _ in sink.curves["momentum/head"]][-1] == 249
    assert len(sink.curves["lr/body"]) < 150
    assert began <= min(sink.times) <= max(sink.times) <= time.time()
    assert sink.closed == 1
    assert governor.status.unshown == 0


def test_what_moved_the_settings_is_marked_with_its_reason(service):
    optimizer, sink = optimizer_of(), Recorder()
    options = lockstep(service, "marked", sink)
    with flyball.attach(optimizer, **options) as governor:
        used = train(optimizer, governor, [2.0 * 0.99**i for i in range(60)])
    moves = [i for i in range(1, 60) if used[i] != used[i - 1]]
    assert len(moves) >= 3
    assert [step for step, _ in sink.markers] == moves
    increases = [(step, marker) for step, marker in sink.markers if marker.code == "increase"]
    assert increases
    for step, marker in increases:
        assert used[step] > used[step - 1]
        assert marker.kind == "decision"
        assert len(marker.text.split()) > 3


def test_a_policy_that_moves_at_every_step_is_marked_where_its_kind_changes(service):
    optimizer, sink = optimizer_of(), Recorder()
    base = {"type": "cosine", "T_max": 300}
    options = lockstep(service, "streak", sink, base=base, policy="constant")
    with flyball.attach(optimizer, **options) as governor:
        used = train(optimizer, governor, [1.0] * 200)
    assert len(set(used)) == 200
    assert joined(sink.curves["lr/body"], 200) == used
    assert len(sink.markers) <= 2


def test_another_writer_and_a_command_are_marked(service):
    optimizer, sink = optimizer_of(), Recorder()
    options = lockstep(service, "meddled", sink)
    with flyball.attach(optimizer, **options) as governor:
        train(optimizer, governor, [1.0] * 10)
        optimizer.param_groups[0]["lr"] = 0.5
        train(optimizer, governor, [1.0] * 3)
        given = {"kind": "override", "setting": "lr", "value": 0.05, "groups": ["body"], "reason": "a look by hand"}
        answer = httpx.post(f"{service.http}/v1/runs/meddled/commands", json=given, trust_env=False)
        assert answer.status_code == 201, answer.text
        train(optimizer, governor, [1.0] * 10)
    conflicts = [(step, marker.text) for step, marker in sink.markers if marker.kind == "conflict"]
    assert [step for step, _ in conflicts] == [10]
    assert "0.5" in conflicts[0][1]
    commands = [marker.text for _, marker in sink.markers if marker.kind == "command"]
    assert any("a look by hand" in text for text in commands)
    assert sink.curves["lr/body"][-1] == (22, 0.05)


def test_a_sink_that_blocks_delays_no_step_and_no_other_sink(service, monkeypatch):
    monkeypatch.setattr(limits, "SINK_QUEUE_MAX", 50)
    optimizer, stuck, sink = optimizer_of(), Recorder(), Recorder()
    stuck.may_go.clear()
    base = {"type": "cosine", "T_max": 1000}
    options = lockstep(service, "stuck", stuck, sink, base=base, policy="constant", close_s=0.5)
    with flyball.attach(optimizer, **options) as governor:
        train(optimizer, governor, [1.0] * 300)
        assert governor.status.added_us < 1000
        started = time.monotonic()
    assert time.monotonic() - started < 2
    assert sink.closed == 1
    assert stuck.closed == 0
    assert governor.status.unshown >= 200
    stuck.may_go.set()


def test_a_sink_that_fails_is_said_once_and_tried_on(service, caplog):
    optimizer, sink = optimizer_of(), Recorder()
    options = lockstep(service, "failing", sink)
    sink.fails = True
    with flyball.attach(optimizer, **options) as governor:
        used = train(optimizer, governor, [2.0 * 0.99**i for i in range(40)])
        sink.fails = False
        used += train(optimizer, governor, [2.0 * 0.99**i for i in range(40, 80)])
    assert sum("the tracking server is away" in record.getMessage() for record in caplog.records) == 1
    assert governor.status.unshown >= 1
    assert sink.curves["lr/body"][-1] == (79, used[-1])


def test_after_going_back_to_a_checkpoint_the_curve_begins_anew_there(service):
    optimizer, sink = optimizer_of(), Recorder()
    options = lockstep(service, "back", sink)
    with flyball.attach(optimizer, **options) as governor:
        first = train(optimizer, governor, [2.0 * 0.99**i for i in range(30)])
        token = governor.state_dict()
        train(optimizer, governor, [2.0 * 0.99**i for i in range(30, 50)])
        governor.load_state_dict(token)
        again = train(optimizer, governor, [3.0] * 20)
    steps = [step for step, _ in sink.curves["lr/body"]]
    turn = next(i for i in range(1, len(steps)) if steps[i] < steps[i - 1])
    assert steps[turn] == 30
    line = [point for point in sink.curves["lr/body"][:turn] if point[0] < 30] + sink.curves["lr/body"][turn:]
    assert joined(line, 50) == first + again


# JAX says so at every fork of a process that another test loaded it into.
@pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning")
def test_a_forked_child_shows_nothing(service, tmp_path: Path):
    class File(Recorder):
        def settings(self, step, at, values):
            with (tmp_path / "told").open("a") as out:
                out.write(f"{os.getpid()}\n")

    optimizer = optimizer_of()
    options = lockstep(service, "forked", File(), policy="constant", base={"type": "cosine", "T_max": 100})
    with flyball.attach(optimizer, **options) as governor:
        train(optimizer, governor, [1.0] * 5)
        child = os.fork()
        if child == 0:
            try:
                train(optimizer, governor, [1.0] * 5)
                governor.close()
                time.sleep(0.2)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        train(optimizer, governor, [1.0] * 5)
    assert set((tmp_path / "told").read_text().split()) == {str(os.getpid())}


def test_what_is_no_sink_is_refused_by_name(service):
    with pytest.raises(ValueError, match="report_to holds 'runs/1'"):
        flyball.attach(optimizer_of(), run="no", server=service.http, report_to=["runs/1"])
