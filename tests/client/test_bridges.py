"""Goal: TensorBoard, MLflow, W&B and Aim show what was applied and what moved it, as their own readers read it.

Method: one real training with every writer attached that is installed; then each library's own reader. W&B runs
offline, and its file is read by its record type (the frame around records is LevelDB's log).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import flyball
import flyball_server
from flyball.adapters.aim import AimWriter
from flyball.adapters.mlflow import MlflowWriter
from flyball.adapters.tensorboard import TensorBoardWriter
from flyball.adapters.wandb import WandbWriter

STEPS = 60


def needs(name: str) -> pytest.MarkDecorator:
    """For a library that is no part of the `test` extra."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


class Story(NamedTuple):
    """used: the learning rates of group body, by step. moves: the steps whose settings were others than before."""

    used: list[float]
    moves: list[int]


def steered(*sinks: Any, run: str) -> Story:
    """A short training in lockstep."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([{"name": "body", "params": [weight], "lr": 0.1}])
    policy = {"type": "windowed", "window_size": 5, "cooldown_steps": 2}
    used = []
    with (
        flyball_server.running(store="memory:") as service,
        flyball.attach(
            optimizer, run=run, policy=policy, server=service.http, lag=0, wait_s=None, report_to=sinks, close_s=30
        ) as governor,
    ):
        for i in range(STEPS):
            optimizer.step()
            used.append(optimizer.param_groups[0]["lr"])
            governor.step(2.0 * 0.99**i)
            if i == 40:
                optimizer.param_groups[0]["lr"] = 0.5
    assert governor.status.unshown == 0
    moves = [i for i in range(1, STEPS) if used[i] != used[i - 1]]
    assert len(moves) >= 3
    return Story(used, moves)


def shown(points: dict[int, float], story: Story) -> None:
    """Every point is what its step used, and both ends of every move are there."""
    assert all(value == pytest.approx(story.used[step], rel=1e-6) for step, value in points.items())
    assert {0, STEPS - 1, *story.moves, *(step - 1 for step in story.moves)} <= set(points)


@pytest.mark.parametrize("own", [True, False], ids=["a folder", "a SummaryWriter of the script's"])
def test_tensorboard_shows_curves_and_words(tmp_path: Path, own: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with contextlib.ExitStack() as stack:
        where: Any = tmp_path
        if not own:
            from torch.utils.tensorboard import SummaryWriter

            where = stack.enter_context(SummaryWriter(str(tmp_path)))
        story = steered(TensorBoardWriter(where), run="tb")
        if not own:
            where.add_scalar("mine", 1.0, 0)  # it is still the script's
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    shown({event.step: event.value for event in found.Scalars("flyball/lr/body")}, story)
    decisions = found.Tensors("flyball/decision/text_summary")
    assert [event.step for event in decisions] == story.moves
    assert b"`increase`" in decisions[0].tensor_proto.string_val[0]
    (conflict,) = found.Tensors("flyball/conflict/text_summary")
    assert conflict.step == 41
    assert b"0.5" in conflict.tensor_proto.string_val[0]
    assert decisions[0].wall_time < conflict.wall_time


# MLflow's own tables, on an SQLAlchemy newer than they are.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_shows_metrics_tags_and_a_file_of_markers(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'm.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("training", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    story = steered(MlflowWriter(run, uri), run="ml")
    shown({one.step: one.value for one in client.get_metric_history(run, "flyball/lr/body")}, story)
    tags = client.get_run(run).data.tags
    assert tags["flyball.decision"].startswith(f"step {story.moves[-1]}: ")
    assert tags["flyball.conflict"].startswith("step 41: ")
    path = client.download_artifacts(run, "flyball/markers.jsonl", str(tmp_path))
    markers = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [one["step"] for one in markers if one["kind"] == "decision"] == story.moves


@needs("wandb")
def test_wandb_shows_values_beside_the_scripts_own_and_never_moves_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="p", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off"))
    story = steered(WandbWriter(run), run="wb")
    assert run.step == 0
    run.log({"loss": 1.0}, step=3)
    run.log({"loss": 0.5}, step=4)
    run.finish()
    wandb.teardown()  # only then everything is in the file
    (file,) = tmp_path.glob("wandb/offline-run*/*.wandb")
    rows = [row for row in wandb_rows(file) if row]
    assert all(row["flyball/lr/body"] == story.used[row["flyball/step"]] for row in rows if "flyball/lr/body" in row)
    assert any("flyball/lr/body" in row for row in rows)
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]
    (table,) = tmp_path.glob("wandb/offline-run*/files/media/table/flyball/*.json")
    history = json.loads(table.read_text())["data"]
    shown({step: value for step, _, name, value, _ in history if name == "lr/body"}, story)
    assert [step for step, _, name, _, _ in history if name == "decision"] == story.moves


def wandb_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The history of an offline run."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            items = record.history.item
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@needs("aim")
def test_aim_shows_metrics_by_group_and_texts(tmp_path: Path) -> None:
    import aim
    from aim.storage.context import Context

    run = aim.Run(repo=str(tmp_path), system_tracking_interval=None, capture_terminal_logs=False)
    story = steered(AimWriter(run), run="ai")
    (found,) = run.metrics()
    assert (found.name, found.context.to_dict()) == ("flyball.lr", {"group": "body"})
    steps, columns = found.data.items_list()
    shown(dict(zip(steps, columns[0], strict=True)), story)
    steps, columns = run.get_text_sequence("flyball.decision", Context({})).data.items_list()
    assert list(steps) == story.moves
    assert "increase" in columns[0][0].data
    run.close()


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("wandb", lambda: WandbWriter(object())),
        ("aim", lambda: AimWriter(object())),
    ],
)
def test_a_writer_whose_library_is_missing_says_what_to_install(library: str, make: Any, monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(flyball.FlyballError, match=f"pip install {library}"):
        make()
