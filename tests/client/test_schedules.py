"""Goal: what a run's learning rates were can be had again without any service, in torch, optax and Keras.

Method: a real torch training is steered and its learning rates noted; each framework then trains with the module that
`flyball export --format schedule` wrote, in a process in which Flyball cannot be imported.
"""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch

import flyball
import flyball_server
from flyball import api
from flyball.errors import FlyballError, Refused
from flyball.exporting import Format, export_run
from flyball.schedules import module_beside

STEPS = 40
PARTS = ("backbone", "head")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with schedule.json and schedule.py of a run, and the learning rates of its steps."""
    folder = tmp_path_factory.mktemp("schedule")
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in PARTS]
    for weight in weights:
        weight.grad = torch.zeros(1)
    groups = [{"params": [w], "lr": lr, "name": n} for w, lr, n in zip(weights, (0.1, 0.003), PARTS, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    applied = {name: [] for name in PARTS}
    with flyball_server.running() as service:
        policy = {"type": "plateau", "patience": 2, "factor": 0.7}
        base = {"type": "one_cycle", "max_lr": 0.2, "total_steps": STEPS}
        with flyball.attach(
            optimizer, run="steered", policy=policy, base=base, lag=0, wait_s=None, server=service.http
        ) as governor:
            for step in range(STEPS):
                optimizer.step()
                for group in optimizer.param_groups:
                    applied[group["name"]].append((group["lr"], group["momentum"]))
                governor.step(1.0 + step % 3)
        with api.Client(service.http) as client:
            export_run(client, "steered", Format.SCHEDULE, folder / "schedule.json")
            with pytest.raises(FlyballError, match=r"schedule\.py exists already.*--force"):
                export_run(client, "steered", Format.SCHEDULE, folder / "schedule.json")
            client._answer("POST", "/v1/attach", body={"run": "x", "session": "s", "groups": [{"name": "g", "lr": 1}]})
            with pytest.raises(Refused, match="nothing was applied in attempt 1 yet"):
                export_run(client, "x", Format.SCHEDULE, folder / "x.json")
    assert sorted(path.name for path in folder.iterdir()) == ["schedule.json", "schedule.py"]
    return folder, applied


def answers(folder, code, **environment):
    """What the code says when it runs beside the schedule, without Flyball."""
    code = "import sys\nsys.modules['flyball'] = sys.modules['flyball_server'] = None\nimport json, schedule\n" + code
    settings = {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def single(value):
    """The value as float32 has it."""
    return struct.unpack("f", struct.pack("f", value))[0]


def test_the_schedule_is_what_was_applied(exported):
    folder, applied = exported
    found = json.loads((folder / "schedule.json").read_text())
    assert (found["run"], found["attempt"], found["steps"]) == ("steered", 1, STEPS)
    said = "[[[schedule.lr(s, g), schedule.momentum(s, g)] for s in range(60)] for g in schedule.GROUPS]"
    code = f"print(json.dumps({said}))"
    for name, values in zip(PARTS, answers(folder, code), strict=True):
        assert [tuple(value) for value in values[:STEPS]] == applied[name]
        assert values[STEPS:] == [list(applied[name][-1])] * (60 - STEPS)
        assert found["groups"][name]["reference_lr"] in (0.1, 0.003)
    assert len({lr for lr, _ in applied["head"]}) > 20


TORCH = """
import torch

def train(names, **told):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
    groups = [{"params": [w], **({"name": n} if told["named"] else {})} for w, n in zip(weights, names)]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.1)
    scheduler = schedule.torch_scheduler(optimizer)
    for step in range(40):
        (weights[0] + weights[1]).sum().backward()
        schedule.torch_momentum(optimizer, step)
        yield [[group["lr"], group["momentum"]] for group in optimizer.param_groups]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

print(json.dumps([list(train(PARTS, named=False)), list(train(PARTS[::-1], named=True))]))
"""


def test_torch_trains_with_it(exported):
    folder, applied = exported
    in_order, by_name = answers(folder, f"PARTS = {PARTS!r}\n{TORCH}")
    for names, used in ((PARTS, in_order), (PARTS[::-1], by_name)):
        for name, values in zip(names, zip(*used, strict=True), strict=True):
            assert [tuple(value) for value in values] == applied[name]


OPTAX = """
import jax, jax.numpy as jnp, optax
used = []
for name in schedule.GROUPS:
    optimizer = optax.sgd(learning_rate=schedule.optax_schedule(name))
    weight = jnp.zeros(())
    state = optimizer.init(weight)

    @jax.jit
    def train(weight, state):
        update, state = optimizer.update(jax.grad(lambda w: w)(weight), state)
        return optax.apply_updates(weight, update), state, update

    used.append([])
    for step in range(40):
        weight, state, update = train(weight, state)
        used[-1].append(-float(update))
print(json.dumps(used))
"""


def test_optax_trains_with_it_under_jit(exported):
    folder, applied = exported
    for name, used in zip(PARTS, answers(folder, OPTAX), strict=True):
        assert used == [single(lr) for lr, _ in applied[name]]


KERAS = """
import keras, numpy
used = []
for name in schedule.GROUPS:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    optimizer = keras.optimizers.SGD(schedule.keras_schedule(name))
    model.compile(optimizer=optimizer, loss=lambda truth, said: keras.ops.mean(said))
    used.append([])
    for step in range(40):
        lr = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        before = float(model.get_weights()[0][0, 0])
        model.train_on_batch(numpy.ones((4, 1), "float32"), numpy.ones((4, 1), "float32"))
        used[-1].append([lr, before - float(model.get_weights()[0][0, 0])])
print(json.dumps(used))
"""


def test_keras_trains_with_it(exported):
    folder, applied = exported
    for name, used in zip(PARTS, answers(folder, KERAS, KERAS_BACKEND="jax"), strict=True):
        assert [lr for lr, _ in used] == [single(lr) for lr, _ in applied[name]]
        moved = [lr for lr, _ in applied[name]]
        assert [step for _, step in used] == pytest.approx(moved, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "module"), [("run.json", "run.py"), ("a run-2.json", "a_run_2.py"), ("3x.json", "_3x.py")]
)
def test_the_module_can_be_imported_whatever_the_file_is_called(tmp_path, name, module):
    assert module_beside(tmp_path / name) == tmp_path / module
