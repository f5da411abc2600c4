"""Which loops there are, which of them are to be tried here, and what the pure core says that they must do.

Rule of this module: a loop is left out only where its library is not installed, and may be missing: the libraries of
the `test` extra may not, and neither may those that FLYBALL_ADAPTERS names.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flyball_server.core import run
from flyball_server.core.guard import Limits
from flyball_server.core.run import Rules
from flyball_server.core.types import Group
from flyball_server.policy_files import resolve
from flyball_server.simulate import simulate

ROOT = Path(__file__).resolve().parent.parent.parent
ALL = sorted(path.stem for path in (Path(__file__).parent / "loops").glob("*.py") if path.stem != "__init__")
#: What `make test-integrations` asks for in one of its environments.
ASKED = [name for name in os.environ.get("FLYBALL_ADAPTERS", "").split(",") if name]
#: Moves every few steps, so that a lost, doubled or late decision shows; and one that moves at every step.
POLICIES: dict[str, dict[str, Any]] = {
    "windowed": {"type": "windowed", "window_size": 5, "cooldown_steps": 2},
    "adaptive": {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96},
}
GROUPS = (("body", 0.1), ("head", 0.01))


def loop_of(name: str) -> Any:
    """A loop's module; skips where its library may be missing and is."""
    try:
        return importlib.import_module(f"tests.conformance.loops.{name}")
    except ImportError:
        if name in ASKED or name in required():
            raise
    pytest.skip(f"{name} is not installed")


def required() -> set[str]:
    """The libraries of the `test` extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {re.split(r"[^\w.-]", line)[0] for line in (*extras["test"], *extras["torch"])}


def losses(count: int) -> list[float]:
    """A recorded trace's first losses as float32 numbers, falling with noise, and a jump that has to be reacted to."""
    with (ROOT / "tests" / "traces" / "healthy_decay.jsonl").open(encoding="utf-8") as lines:
        recorded = [json.loads(line)["loss"] for line, _ in zip(lines, range(count), strict=False)]
    return [as_float32(value * (3.0 if 30 <= i < 34 else 1.0)) for i, value in enumerate(recorded)]


def as_float32(value: float) -> float:
    """The nearest float32 number."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def expected(policy: Mapping[str, Any], trace: Sequence[float], like: Any, groups: int) -> list[tuple[float, ...]]:
    """What lockstep training on the trace must use at each step: the core, folded here, as the loop `like` holds it."""
    single = getattr(like, "HOLDS", "float64") == "float32"
    declared = [(name, as_float32(lr) if single else lr) for name, lr in GROUPS[:groups]]
    rules = Rules(*resolve(policy), Limits(), tuple(Group(name, lr) for name, lr in declared), 0)
    lines = [json.dumps({"step": i, "loss": value}) for i, value in enumerate(trace[:-1])]
    answers = simulate(policy, lines, [{"name": name, "lr": lr} for name, lr in declared])
    used = [run.create(rules).settings.lr, *(tuple(row["lr"] for row in one["settings"]) for one in answers)]
    return [tuple(as_float32(lr) for lr in row) for row in used] if single else used
