"""`make test-integrations`: builds an environment per ecosystem and age below .venv-integrations, runs the conformance
suite and the ecosystem's own tests in each, and prints one table.

Rule of this module: nothing may be skipped here. An environment is kept until what it is made from changes; torch and
the service's libraries are in one base environment, which the others look into behind their own packages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tests.integrations.ecosystems import BASE, ECOSYSTEMS, ROOT, Ecosystem

PLACE = ROOT / ".venv-integrations"
#: Installs, and then test runs, at a time.
AT_ONCE = 2
RUN_S = 400
AGES = ("oldest", "newest")


class Task(NamedTuple):
    """One environment."""

    ecosystem: Ecosystem
    age: str

    @property
    def folder(self) -> Path:
        return PLACE / f"{self.ecosystem.name}-{self.age}"

    @property
    def requirements(self) -> list[str]:
        return self.ecosystem.oldest if self.age == "oldest" else self.ecosystem.newest


class Row(NamedTuple):
    """One line of the table."""

    name: str
    versions: str
    passed: int
    wrong: list[str]
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="make test-integrations", description=__doc__)
    parser.add_argument("--results", type=Path, help="a folder for the results as JUnit XML")
    parser.add_argument("ecosystems", nargs="*", metavar="ECOSYSTEM", help=", ".join(e.name for e in ECOSYSTEMS))
    asked = parser.parse_args(argv)
    if unknown := set(asked.ecosystems) - {e.name for e in ECOSYSTEMS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    results = (asked.results or PLACE / "results").resolve()
    results.mkdir(parents=True, exist_ok=True)
    tasks = [Task(e, age) for e in ECOSYSTEMS if not asked.ecosystems or e.name in asked.ecosystems for age in AGES]
    started = time.monotonic()
    base = make_base()
    made = list(zip(tasks, at_once(lambda task: make(task, base), tasks), strict=True))
    say(f"environments stand after {time.monotonic() - started:.0f} s")
    ready = [(task, under) for task, error in made if not error for under in task.ecosystem.under]
    rows = at_once(lambda one: try_out(*one, results), ready)
    rows += [Row(task.folder.name, error, 0, ["not installed"], 0.0) for task, error in made if error]
    print_table(rows)
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(row.wrong for row in rows) or not rows)


def at_once(work: Callable[[Any], Any], things: Iterable[Any]) -> list[Any]:
    """`work` on all of them, AT_ONCE at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, things))


def say(line: str) -> None:
    print(line, flush=True)


# Environments


def make_base() -> Path:
    """The base environment; everything there is as constraints.txt names it."""
    folder = PLACE / "base"
    words = [f"{ROOT}[grpc,server]", *BASE]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    stamp = stamp_of([*words, *extras["grpc"], *extras["server"]], pins)
    if is_made(folder, stamp):
        return folder
    say("base: installing torch and the service")
    fresh(folder)
    options = ["--constraint", str(ROOT / "constraints.txt")]
    error = install(folder, [*options, *words[1:], "--editable", words[0]])
    if error:
        sys.exit(f"the base environment cannot be made:\n{error}")
    (folder / "made-from").write_text(stamp)
    return folder


def make(task: Task, base: Path) -> str:
    """The environment of a task; what went wrong, or ""."""
    stamp = stamp_of(task.requirements, (base / "made-from").read_text())
    if is_made(task.folder, stamp):
        return ""
    started = time.monotonic()
    fresh(task.folder, beside=base)
    # torch as it is in the base: no library may pull another one.
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    error = install(task.folder, [torch, *task.requirements])
    if not error:
        (task.folder / "made-from").write_text(stamp)
    took = f"{time.monotonic() - started:.0f} s"
    say(
        f"{task.folder.name}: cannot be installed, {took}\n{error}"
        if error
        else f"{task.folder.name}: installed, {took}"
    )
    return error


def stamp_of(words: list[str], more: str) -> str:
    return hashlib.sha256("\n".join([sys.version, *words, more]).encode()).hexdigest()


def is_made(folder: Path, stamp: str) -> bool:
    mark = folder / "made-from"
    return mark.is_file() and mark.read_text() == stamp


def fresh(folder: Path, beside: Path | None = None) -> None:
    """An empty environment; beside: one whose packages are found behind its own, pip among them."""
    shutil.rmtree(folder, ignore_errors=True)
    options = [] if beside is None else ["--without-pip"]
    subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=True)
    if beside is not None:
        (packages(folder) / "base.pth").write_text(f"import site; site.addsitedir({str(packages(beside))!r})\n")


def packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def install(folder: Path, words: list[str]) -> str:
    """What went wrong, or ""."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "is ignored: it is neither" not in line]
    return ("\n".join(lines)[-2000:] or "pip failed") if done.returncode else ""


# Tests


def try_out(task: Task, under: dict[str, str], results: Path) -> Row:
    """Run an ecosystem's tests in its environment."""
    ecosystem, started = task.ecosystem, time.monotonic()
    name = "-".join([task.folder.name, *under.values()])
    file = results / f"{name}.xml"
    file.unlink(missing_ok=True)
    conformance = ["tests/conformance"] if ecosystem.adapters else []
    # Where there is an adapter, its own tests speak of the newest versions; the suite holds for all.
    own = ecosystem.tests if under == ecosystem.under[0] and (task.age == "newest" or not conformance) else ()
    # Warnings of other people's libraries, at versions of any age, decide nothing here.
    options = [
        "-q",
        "--disable-warnings",
        "--junitxml",
        str(file),
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
    ]
    command = [str(task.folder / "bin" / "python"), "-m", "pytest", *options, *conformance, *own]
    environment = {
        **os.environ,
        "FLYBALL_ADAPTERS": ",".join(ecosystem.adapters),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **under,
    }
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = f"not done within {RUN_S} s: {error.stdout!r:.2000}"
    passed, wrong = read(file)
    if wrong:
        print(f"--- {name}\n{output[-6000:]}", file=sys.stderr, flush=True)
    row = Row(name, versions(task), passed, wrong, time.monotonic() - started)
    say(f"{name}: {passed} passed, {len(wrong)} failed, {row.seconds:.0f} s")
    return row


def read(file: Path) -> tuple[int, list[str]]:
    """How many tests passed, and which did not, the skipped ones included."""
    if not file.is_file():
        return 0, ["no results"]
    cases = list(ElementTree.parse(file).iter("testcase"))
    wrong = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if any(case.find(what) is not None for what in ("failure", "error", "skipped"))
    ]
    return len(cases) - len(wrong), wrong or ([] if cases else ["no tests"])


def versions(task: Task) -> str:
    """What stands in the environment, of what was asked for."""
    names = task.ecosystem.newest
    code = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names!r}), sep=', ')"
    command = [str(task.folder / "bin" / "python"), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def print_table(rows: list[Row]) -> None:
    """One line an environment, and under it what failed."""
    wide = max([len(row.name) for row in rows], default=0)
    print(f"\n{'ecosystem':{wide}}  passed  failed   time  versions")
    for row in sorted(rows):
        said = row.versions if row.passed else row.versions.splitlines()[-1] if row.versions else ""
        print(f"{row.name:{wide}}  {row.passed:6d}  {len(row.wrong):6d}  {row.seconds:4.0f} s  {said}")
        for name in row.wrong:
            print(f"{'':{wide}}  {name}")


if __name__ == "__main__":
    sys.exit(main())
