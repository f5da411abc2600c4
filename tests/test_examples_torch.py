"""The examples for PyTorch run as they are, train, deliver everything, and leave what they say in the service."""

import importlib.util
import re
from pathlib import Path

import httpx
import pytest

import flyball_server

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def service(monkeypatch):
    with flyball_server.running() as service:
        monkeypatch.setenv("FLYBALL_SERVER", service.http)
        yield service


def read(service, path):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        return http.get(f"/v1/runs/{path}").raise_for_status().json()


def test_the_plain_loop_trains_and_its_signals_arrive(service, capsys):
    load("pytorch_loop").main(["--steps", "150", "--run", "loop"])
    said = capsys.readouterr().out
    assert said.startswith("150 steps, ")
    assert float(re.search(r"accuracy ([\d.]+)", said)[1]) > 0.8
    assert "not delivered: 0" in said
    run = read(service, "loop")
    assert [group["group"] for group in run["settings"]] == ["body", "head"]
    names = ("loss", "grad_norm", "update_norm", "distance", "inner_product")
    series = read(service, f"loop/series?signals={','.join(names)}")["series"]
    assert {name: len(series[name]["value"]) for name in names} == dict.fromkeys(names, 150)
    assert sum(series["inner_product"]["value"]) < 0, "steps go downhill"


def test_a_gan_is_two_runs_each_under_its_own_policy(monkeypatch, capsys):
    monkeypatch.delenv("FLYBALL_SERVER", raising=False)
    load("gan_two_runs").main(["--steps", "300"])  # on a service of its own
    off, *runs = capsys.readouterr().out.splitlines()
    began, ended = map(float, re.findall(r"by ([\d.]+)", off))
    assert ended < began / 2
    assert [line.split(":")[0] for line in runs] == ["gan-generator", "gan-discriminator"]
    assert all("300 steps" in line and line.endswith("not delivered 0") for line in runs)
    at_end = [float(re.search(r"learning rate ([\d.e-]+)", line)[1]) for line in runs]
    assert at_end == [pytest.approx(2e-4, rel=0.2), 5e-3], "a schedule that ended, and a warm-up"
