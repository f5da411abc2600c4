"""Which changes of a policy would no test notice? Runs mutmut over the core's rules, one module after the other.

Method: the packages and the tests of one module in a folder of their own, mutmut's every change of a function there,
each judged by that module's tests. What survives must stand in `equivalent/MODULE.txt` with the reason why it changes
nothing; anything else is printed, and the exit code is 1. mutmut changes functions only: what stands in class bodies
(defaults and limits of parameters) is asserted by value in the tests themselves.

    python -m tests.mutants [MODULE ...]      # cycle, guard ...; all without one
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The modules, and the tests that judge each.
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "guard": ("core/guard.py", ("test_guard.py",)),
    "moments": ("core/moments.py", ("test_moments.py",)),
    "momentum": ("core/momentum.py", ("test_momentum.py",)),
    "bandit": ("core/bandit.py", ("test_bandit.py",)),
    "episodes": ("core/episodes.py", ("test_aees.py",)),
    "adaptive": ("core/policies/adaptive.py", ("test_adaptive.py",)),
    "aees": ("core/policies/aees.py", ("test_aees.py",)),
    "constant": ("core/policies/constant.py", ("test_constant.py",)),
    "cycle": ("core/policies/cycle.py", ("test_cycle.py",)),
    "gradient_aware": ("core/policies/gradient_aware.py", ("test_composition.py",)),
    "greedy": ("core/policies/greedy.py", ("test_greedy.py",)),
    "per_group": ("core/policies/per_group.py", ("test_composition.py",)),
    "plateau": ("core/policies/plateau.py", ("test_plateau.py",)),
    "rules": ("core/policies/rules.py", ("test_rules.py",)),
    "sequence": ("core/policies/sequence.py", ("test_composition.py",)),
    "spike_guard": ("core/policies/spike_guard.py", ("test_spike_guard.py",)),
    "warmup": ("core/policies/warmup.py", ("test_composition.py",)),
    "windowed": ("core/policies/windowed.py", ("test_windowed.py",)),
}
CONFIG = """
[tool.pytest.ini_options]
pythonpath = ["."]
addopts = ["--import-mode=importlib", "-p", "no:cacheprovider"]
filterwarnings = ["error"]
[tool.mutmut]
paths_to_mutate = ["flyball_server/{module}"]
tests_dir = [{tests}]
also_copy = ["flyball_server", "flyball", "flyball_proto", "tests", "examples"]
"""


def survivors(name: str) -> list[str]:
    """The changes of a module that its tests did not notice: each as `- old` and `+ new` lines, joined by newlines."""
    module, tests = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix=f"mutants-{name}-") as place:
        folder = Path(place)
        for source in ("server/flyball_server", "client/flyball", "proto/flyball_proto", "tests", "examples"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, folder / Path(source).name, ignore=ignored)
        quoted = ", ".join(f'"tests/core/{test}"' for test in tests)
        (folder / "pyproject.toml").write_text(CONFIG.format(module=module, tests=quoted))
        run = subprocess.run([mutmut(), "run"], cwd=folder, capture_output=True, text=True, check=False)
        found = subprocess.run([mutmut(), "results"], cwd=folder, capture_output=True, text=True, check=True).stdout
        alive = re.findall(r"(\S+): (?:survived|no tests|suspicious)", found)
        counts = re.findall(r"(\d+)/(\d+)  ", run.stdout)
        if not counts or counts[-1][0] != counts[-1][1]:
            raise SystemExit(f"{name}: mutmut did not finish:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
        print(f"{name}: {counts[-1][1]} changes tried, {len(alive)} not noticed", flush=True)
        return [_change(folder, one) for one in alive]


def mutmut() -> str:
    """The command, beside this Python."""
    return str(Path(sys.executable).with_name("mutmut"))


def _change(folder: Path, mutant: str) -> str:
    shown = subprocess.run([mutmut(), "show", mutant], cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "\n".join(re.sub(r"\s+", " ", line[0] + " " + line[1:].strip()) for line in lines)


def explained(name: str) -> set[str]:
    """The changes that `equivalent/NAME.txt` explains: blocks of changes, a `# reason` above those it is for."""
    path = Path(__file__).parent / "equivalent" / f"{name}.txt"
    blocks = re.split(r"\n\s*\n", path.read_text()) if path.exists() else []
    return {"\n".join(line for line in block.splitlines() if line and line[0] != "#") for block in blocks}


def main() -> int:
    """Run the modules named on the command line, or all."""
    names = sys.argv[1:] or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"unknown: {', '.join(unknown)}; known are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    left = 0
    for name in names:
        known = explained(name)
        for change in survivors(name):
            if change not in known:
                left += 1
                print(f"{change}\n", flush=True)
    print(f"{left} changes that nothing explains" if left else "every change is noticed, or explained")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
