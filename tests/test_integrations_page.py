"""docs/integrations.md is true: every script on it trains, and every test that it names exists.

Method: scripts are cut out of the page by their names, and run beside a service as a user would run them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import flyball_server

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)```", TEXT, re.DOTALL))
#: How a script is started, where that is not by Python alone.
STARTED = {"ddp.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flyball_server.Running]:
    store = tmp_path_factory.mktemp("integrations") / "f.db"
    with flyball_server.running(store=f"sqlite:///{store}") as running:
        yield running


def test_every_block_of_python_has_a_name() -> None:
    assert len(SCRIPTS) == TEXT.count("```python\n")
    assert len(SCRIPTS) >= 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_and_is_recorded(name: str, service: flyball_server.Running, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SCRIPTS[name])
    path = os.pathsep.join(str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    # Keras asks for a backend, and torch must not spin on the cores that the service needs.
    environment = {"KERAS_BACKEND": "torch", **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["FLYBALL_SERVER"] = service.http
    command = [sys.executable, *STARTED.get(name, []), name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = re.findall(r'run="([\w-]+)"', SCRIPTS[name])
    found = httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).json()
    assert found["status"] == "finished"
    assert found["observations"] >= 50


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) >= 40
    missing = [f"{path}::{test}" for path, test in named if not is_test(ROOT / path, test)]
    assert not missing, missing


def is_test(path: Path, test: str) -> bool:
    if not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return not test or any(isinstance(node, ast.FunctionDef) and node.name == test for node in tree.body)
