"""Goal: the examples around Hugging Face's libraries and rewards run as they are, and show what they say.

Method: each is a process of its own, as a user would start it, in its small size; no network is needed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Importing TRL alone takes ten seconds of a core, which may be shared.
pytestmark = pytest.mark.timeout(300)


def output(example, *options):
    """What the example prints, warnings being errors."""
    command = [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", ROOT / "examples" / f"{example}.py"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "FLYBALL_SERVER": ""}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", ["reinforce", "trl_reward"])
def test_rewards_are_compared_under_a_reward_rule_and_the_usual_schedules(example):
    printed = output(example, "--quick")
    header = next(line for line in printed.splitlines() if line.endswith(" reward per step"))
    assert re.split(r"\s{2,}", header.strip()) == ["reward", "reward at the end", "variance", "KL", "reward per step"]
    rows = {line[:22].strip(): re.findall(r"(-?[\d.]+) ± ", line) for line in printed.splitlines() if " ± " in line}
    arms = {name: [float(cell) for cell in cells] for name, cells in rows.items() if len(cells) == 5}
    assert {"constant", "cosine", "one-cycle", "plateau", "rules, reward trend"} <= set(arms)
    assert all(cells[3] > 0 for cells in arms.values())  # everybody has left the start
    assert arms["rules, reward trend"] != arms["constant"] != arms["cosine"] != arms["one-cycle"]


def test_the_trainer_learns_and_logs_what_was_applied():
    printed = output("transformers_trainer", "--quick")
    losses = [float(loss) for loss in re.findall(r" loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    rates = {float(lr) for lr in re.findall(r"learning_rate ([\d.e-]+)", printed)}
    assert len(rates) > 2
    assert "20 optimizer steps, the newest decision: " in printed


def test_accelerates_loop_learns_under_its_schedule():
    printed = output("accelerate_loop", "--quick")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
    assert "87 optimizer steps" in printed
