"""The ecosystems, and what is run for each.

Rule of this module: the oldest supported versions stand in NAME.txt, exactly; the newest are the same libraries without
a version. torch is in neither: one base environment has it, as constraints.txt names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: What every test needs: torch, the service, and pytest.
BASE = ("torch", "psutil", "pytest", "pytest-timeout", "scikit-learn")


class Ecosystem(NamedTuple):
    """adapters: loops of the conformance suite. tests: further test files. Each entry of `under` is a run of its own,
    under those environment variables."""

    name: str
    adapters: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    under: tuple[dict[str, str], ...] = ({},)

    @property
    def oldest(self) -> list[str]:
        """Requirements: the oldest supported versions."""
        lines = (HERE / f"{self.name}.txt").read_text(encoding="utf-8").splitlines()
        return [line.partition("#")[0].strip() for line in lines if line and not line.startswith("#")]

    @property
    def newest(self) -> list[str]:
        """Requirements: whatever is newest today, without what only the old ones need ("# then" behind it)."""
        lines = (HERE / f"{self.name}.txt").read_text(encoding="utf-8").splitlines()
        return [line.partition("==")[0] for line in lines if "==" in line and not line.endswith("# then")]


ECOSYSTEMS = (
    Ecosystem("hf", ("transformers", "accelerate")),
    Ecosystem("lightning", ("lightning",)),
    Ecosystem("keras", ("keras",), under=tuple({"KERAS_BACKEND": name} for name in ("torch", "jax", "tensorflow"))),
    Ecosystem("optax", ("optax",)),
    Ecosystem("lrfree", tests=("tests/client/test_lr_free.py",)),
    Ecosystem("sinks", tests=("tests/client/test_bridges.py",)),
    Ecosystem("deepspeed", tests=("tests/client/test_deepspeed_adapter.py",)),
)
