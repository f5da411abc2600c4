"""Goal: on every backend of Keras the next step uses what was decided, and the record has what each step really cost.

Method: one process per backend trains (keras_training.py) against a service here; its record is read afterwards.
TensorFlow is tried where it is installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

import flyball_server

BACKENDS = ["jax", "torch", *(["tensorflow"] if importlib.util.find_spec("tensorflow") else [])]


@pytest.fixture(scope="module", params=BACKENDS)
def done(request):
    """What the process printed, and a way to read its runs."""
    with flyball_server.running() as service, httpx.Client(base_url=service.http, trust_env=False) as http:
        script = Path(__file__).with_name("keras_training.py")
        env = {**os.environ, "KERAS_BACKEND": request.param, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        job = subprocess.run(
            [sys.executable, str(script), service.http], env=env, capture_output=True, text=True, timeout=110
        )
        assert job.returncode == 0, job.stderr[-4000:]
        said = json.loads(job.stdout.strip().splitlines()[-1])
        yield said, lambda path: http.get(f"/v1/runs/{path}").raise_for_status().json(), job.stderr


def series(read, run, *names):
    return read(f"{run}/series?signals={','.join(names)}")["series"]


def f32(*values):
    return [float(np.float32(value)) for value in values]


def test_every_change_is_used_by_the_very_next_step_and_compiles_nothing(done):
    said, read, _ = done
    used = said["every_step"]["used"]
    told = series(read, "every", "lr:default")["lr:default"]
    assert len(set(used)) == 40
    assert used == f32(*told["value"][:40])
    # PyTorch runs the step each time; the others trace it once, and TensorFlow may once more to know its shape.
    assert said["every_step"]["traced"] in (1, 2, 40)


def test_the_record_has_the_loss_of_every_batch_and_not_the_mean_that_keras_logs(done):
    said, read, _ = done
    found = series(read, "raw", "loss", "val_loss")
    assert found["loss"]["value"] == pytest.approx(said["raw_losses"]["means"], rel=1e-6)
    assert found["loss"]["step"] == list(range(12))
    assert found["val_loss"]["step"] == [5, 11], "what validation found stands at the last step of its epoch"
    assert found["val_loss"]["value"] == pytest.approx(said["raw_losses"]["val"])
    mean = np.average(said["raw_losses"]["means"][:6], weights=[4] * 5 + [1])
    assert said["raw_losses"]["logged"][0] == pytest.approx(mean)


def test_whoever_else_writes_is_overwritten_and_named(done):
    said, _, log = done
    assert said["others"]["used"] == f32(*[0.1] * 12)
    assert said["others"]["conflicts"] == 2
    assert "ReduceLROnPlateau" in log


def test_a_factor_multiplies_what_a_scheduler_set_and_leaves_it_as_it_was(done):
    said, read, _ = done
    assert said["multiplied"]["behind"] == f32(0.1, 0.1, 0.1, 0.01, 0.01, 0.01)
    assert said["multiplied"]["seen"] == f32(0.1, 0.1)
    applied = read("multiplied")["settings"][0]["applied_lr"]
    assert applied == pytest.approx(0.01 * 0.5**4, rel=1e-6), "the last step's factor times the scheduler's value"


def test_micro_batches_are_no_steps(done):
    said, read, _ = done
    assert said["accumulated"] == 3
    found = series(read, "accumulated", "loss")["loss"]
    assert (found["step"], found["value"]) == ([0, 1, 2], [2.5, 4.75, 3.5])


def test_a_schedule_inside_the_optimizer_is_refused_with_the_remedy(done):
    said, _, _ = done
    assert "CosineDecay" in said["schedule"]
    assert "base={'type': 'cosine'" in said["schedule"]


def test_batches_that_are_run_at_once_are_one_step(done):
    said, _, _ = done
    assert said["several_at_once"] == 3


def test_a_job_that_is_started_again_goes_on_from_its_backup(done):
    said, read, _ = done
    first, second = said["killed_and_restored"]
    whole = [0.1 * 0.5 ** max(i - 1, 0) for i in range(12)]
    assert first == pytest.approx(whole[:7], rel=1e-6)
    assert second == pytest.approx(whole[6:], rel=1e-6), "from the second epoch's end on"
    assert read("restored")["attempt"] == 2


def test_a_second_fit_goes_on_and_leaves_the_model_as_it_was(done):
    said, read, _ = done
    assert said["fitted_twice"]["used"] == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.0125], rel=1e-6)
    assert not said["fitted_twice"]["wrapped"]
    assert read("twice")["status"] == "finished"


def test_after_a_fit_that_was_broken_off_only_the_callback_of_the_new_one_steers(done):
    said, read, _ = done
    found = said["after_a_broken_fit"]
    assert found["alone"] == f32(1e-4)[0], "a fit without the callback and train_on_batch are left alone"
    assert found["new"] == pytest.approx([0.01, 0.01, 0.005], rel=1e-6)
    assert found["old"] == read("broken")["step"] + 1 == 3
    assert read("broken")["status"] == "active"
    assert read("unbroken")["observations"] == 3


def test_a_run_never_goes_on_at_its_old_rate_under_an_optimizer_with_another(done):
    said, _, log = done
    assert "two FlyballCallbacks in one fit" in said["refusals"]["two"]
    assert "learning rate 1e-05 in the place of 0.05 or 0.1" in said["refusals"]["other"]
    assert "a new FlyballCallback with another run name" in said["refusals"]["other"]
    assert said["refusals"]["same"] == pytest.approx([0.025, 0.0125], rel=1e-6)
    assert "run 'recompiled' goes on with it" in log


def test_a_training_function_that_is_made_anew_is_still_steered(done):
    said, _, _ = done
    assert said["made_anew"]["step"] == 6
    assert said["made_anew"]["used"] == pytest.approx([0.1, *(0.1 * 0.5**i for i in range(5))], rel=1e-6)
