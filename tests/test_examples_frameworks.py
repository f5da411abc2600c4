"""Goal: the examples of Lightning, Keras, Optax and plain HTTP run as they are, learn, and leave a whole record.

Method: each as its own process, in a small size, against a real service; the record is read afterwards.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import flyball_server

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


def ran(service, *command, **environment):
    """What the example's last line says."""
    env = {**os.environ, "FLYBALL_SERVER": service.http, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def recorded(service, run):
    """The run, and its losses by step."""
    found = httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).json()
    series = httpx.get(f"{service.http}/v1/runs/{run}/series?signals=loss,val_loss", trust_env=False).json()["series"]
    return found, series


@pytest.mark.parametrize(
    ("example", "size", "environment"),
    [
        ("optax_digits", ("--steps", "120"), {}),
        ("lightning_digits", ("--epochs", "5"), {}),
        ("keras_digits", ("--epochs", "5"), {"KERAS_BACKEND": "jax"}),
        ("keras_digits", ("--epochs", "5"), {"KERAS_BACKEND": "torch"}),
    ],
)
def test_an_example_learns_and_its_record_is_whole(service, example, size, environment):
    run = f"{example}-{len(environment) and environment['KERAS_BACKEND']}"
    said = ran(service, sys.executable, str(EXAMPLES / f"{example}.py"), "--run", run, *size, **environment)
    assert max(said.get("accuracy", 0), said.get("val_accuracy", 0)) > 0.8, said
    found, series = recorded(service, run)
    assert found["status"] == "finished"
    assert series["loss"]["step"] == list(range(120))
    if "val_loss" in said:
        assert series["val_loss"]["value"][-1] < series["val_loss"]["value"][0]


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js")
def test_a_loop_in_another_language_is_steered_with_nothing_but_http(service):
    said = ran(service, "node", str(EXAMPLES / "plain_http.mjs"), "--run", "mjs", "--steps", "120")
    assert said["last_loss"] < 1e-6
    assert said["undelivered"] == 0
    found, series = recorded(service, "mjs")
    assert (found["status"], series["loss"]["step"]) == ("finished", list(range(120)))
    assert said["lr"] < 1.9, "a learning rate that was far too high was brought down"
    assert found["settings"][0]["applied_lr"] < 1.9


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js")
def test_a_loop_in_another_language_goes_on_without_the_service():
    """It is killed in mid-training; what it did not take is told by the loop itself."""
    script = (
        "import flyball_server, os, signal, subprocess, sys\n"
        "with flyball_server.running() as service:\n"
        "    env = {**os.environ, 'FLYBALL_SERVER': service.http}\n"
        "    job = subprocess.Popen(sys.argv[1:], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)\n"
        "    import time, httpx\n"
        "    while True:\n"
        "        found = httpx.get(service.http + '/v1/runs/mjs', trust_env=False)\n"
        "        if found.status_code == 200 and found.json()['observations'] > 20: break\n"
        "        time.sleep(0.005)\n"
        "out, err = job.communicate(timeout=90)\n"
        "print(err.count('training goes on') > 0, file=sys.stderr)\n"
        "print(out)\n"
        "sys.exit(job.returncode)\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "node",
        str(EXAMPLES / "plain_http.mjs"),
        "--run",
        "mjs",
        "--steps",
        "3000",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["steps"] == 3000
    assert said["undelivered"] > 0
    assert "True" in done.stderr
