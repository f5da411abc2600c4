"""Goal: the page of policies shows a picture of each, and the traces it rests on can be made and used by anybody.

Method: the files beside the page; the command run as a user would, its output simulated. (That the page itself is up to
date is for test_tidy to say.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from examples.traces import KINDS, lines, trace

from flyball_server.core.policies import POLICIES
from flyball_server.simulate import simulate

ROOT = Path(__file__).resolve().parent.parent
PLOTS = ROOT / "docs" / "plots"
LARGEST_PLOT = 200_000


def test_every_policy_has_a_plot_and_every_plot_a_policy():
    page = (ROOT / "docs" / "policies.md").read_text()
    assert {path.name for path in PLOTS.iterdir()} == {f"{name}.png" for name in POLICIES}
    assert all(f"](plots/{name}.png)" in page for name in POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_no_plot_is_large(name):
    picture = (PLOTS / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 5_000 < len(picture) <= LARGEST_PLOT


def test_the_command_prints_a_trace_that_simulate_takes():
    command = [sys.executable, str(ROOT / "examples" / "traces.py"), "spike", "--steps", "60", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ))
    assert done.stdout.splitlines() == list(lines("spike", 60, 3))
    assert len(list(simulate({"type": "cycle"}, done.stdout.splitlines()))) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_what_its_name_says(kind):
    rows = [row for _, row in trace(kind, 300)]
    losses = [row.get("loss") for row in rows]
    usable = [loss for loss in losses if loss is not None and loss == loss]
    assert [json.loads(line)["step"] for line in lines(kind, 300)] == list(range(300))
    if kind == "reward":
        assert {name for row in rows for name in row} == {"reward"}
        return
    assert {"loss", "grad_norm", "update_norm"} <= rows[0].keys()
    assert (sum(usable[-30:]) < 0.8 * sum(usable[:30])) == (kind not in ("divergence", "noise"))
    assert (losses[-1] == float("inf")) == (kind == "divergence")
    assert ("nan" in map(str, losses)) == (kind == "nan_blips")
    assert (None in losses) == (kind == "sparse")
    assert (losses[-1] == 0.0) == (kind == "zero")
    assert (min(usable) < 0) == (kind == "negative")
    assert any(row.get("reward") is not None for row in rows) == (kind in ("dense_reward", "sparse"))


def test_a_trace_depends_on_its_seed_and_on_nothing_else():
    assert list(lines("noise", 50)) == list(lines("noise", 50))
    assert list(lines("noise", 50)) != list(lines("noise", 50, seed=1))
