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
    """adapters: loops of the conformance suite. tests: further test files. Each entry of `under` is a run of the
    conformance suite of its own, under those environment variables; the further tests are run with the first,
    and only on the newest versions where there is an adapter."""

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


def _own(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/client/test_{name}.py" for name in names)


_BACKENDS = tuple({"KERAS_BACKEND": name} for name in ("torch", "jax", "tensorflow"))
ECOSYSTEMS = (
    Ecosystem("hf", ("transformers", "accelerate"), _own("transformers_adapter", "accelerate")),
    Ecosystem("trl", tests=_own("trl")),
    Ecosystem("lightning", ("lightning",), _own("lightning_adapter")),
    Ecosystem("keras", ("keras",), _own("keras_adapter"), _BACKENDS),
    Ecosystem("optax", ("optax",), _own("optax_adapter")),
    Ecosystem("lrfree", tests=_own("lr_free")),
    Ecosystem("sinks", tests=_own("bridges")),
    Ecosystem("deepspeed", tests=_own("deepspeed_adapter")),
)
