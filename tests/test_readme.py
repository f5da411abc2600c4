"""README.md is true: its example trains, its commands run, its files and outputs are those of the code.

Method: everything is cut out of the page itself. What cannot be run here (make, docker) is checked to exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import flyball.options
import flyball_server

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True) for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line
]
MODULES = {"flyball": "flyball.cli", "flyball-server": "flyball_server.cli"}
OURS = [words for words in COMMANDS if words[0] in MODULES]
#: This never ends by itself; the others run beside the service.
ALONE = [words for words in OURS if words[1] == "serve"]


def run(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands, or Python."""
    command = [sys.executable, *(["-m", MODULES[words[0]], *words[1:]] if words[0] in MODULES else words)]
    # No proper terminal: help is then as wide as it needs to be.
    settings = {**os.environ, "PYTHONPATH": path_of_the_packages(), "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=100, check=False)


def path_of_the_packages() -> str:
    """PYTHONPATH with every entry absolute: these commands run in another folder."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(str(Path(entry).resolve()) for entry in given.split(os.pathsep) if entry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page shows."""
    place = tmp_path_factory.mktemp("readme")
    shown = re.findall(r"`([a-z]+\.\w+)`[^\n]*:\n\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert sorted(name for name, _ in shown) == [
        "groups.yaml",
        "policy.yaml",
        "profiles.yaml",
        "projects.yaml",
        "staged.yaml",
        "trace.jsonl",
    ]
    for name, text in shown:
        (place / name).write_text(text)
    (place / "example.py").write_text(next(text for kind, text in BLOCKS if kind == "python"))
    return place


def test_the_example_of_the_page_about_attempts_runs(trained: str, folder: Path) -> None:
    text = (ROOT / "docs" / "attempts.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    (folder / "attempts.py").write_text(code)
    done = run(["attempts.py"], folder, FLYBALL_SERVER=trained)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (["lineage", "bolder"], ["what-if", "first", "--policy", "exploratory"], ["fork", "first", "again"]):
        done = run(["flyball", *words], folder, FLYBALL_SERVER=trained)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[flyball_server.Running]:
    """A service on the file that the page names."""
    with flyball_server.running(store=f"sqlite:///{folder / 'flyball.db'}") as service:
        yield service


@pytest.fixture(scope="module")
def trained(service: flyball_server.Running, folder: Path) -> str:
    """The address of a service in which the page's example has trained."""
    done = run(["example.py"], folder, FLYBALL_SERVER=service.http)
    assert (done.returncode, done.stderr) == (0, "")
    return service.http


def test_the_page_shows_commands() -> None:
    assert {words[0] for words in COMMANDS} == {"make", "docker", *MODULES}


@pytest.mark.parametrize("words", ALONE, ids=" ".join)
def test_every_command_and_option_exists(words: list[str], folder: Path) -> None:
    done = run([*words[:2], "--help"], folder)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words[2:] if word.startswith("--")):
        assert re.search(rf"(?<!\S){option}(?!\S)", done.stdout), f"{words[0]} {words[1]} has no {option}"


def test_the_example_is_steered_and_recorded(trained: str, folder: Path) -> None:
    done = run(["flyball", "show", "first", "--json"], folder, FLYBALL_SERVER=trained)
    found = json.loads(done.stdout)
    assert (found["status"], found["observations"]) == ("finished", 1000)
    assert found["policy"] == "windowed@1"
    assert set(found["signals"]) == {"loss", "grad_norm"}


@pytest.mark.parametrize("words", [words for words in OURS if words not in ALONE], ids=" ".join)
def test_every_command_runs(words: list[str], trained: str, folder: Path) -> None:
    done = run(words, folder, FLYBALL_SERVER=trained)
    assert done.returncode == 0, done.stderr
    assert (folder / words[words.index("-o") + 1]).stat().st_size > 100 if "-o" in words else done.stdout


def test_the_cutoffs_simulate_is_what_simulate_prints(folder: Path) -> None:
    (shown,) = (text for kind, text in BLOCKS if kind == "json" and '"settings"' in text)
    words = next(words for words in OURS if "simulate" in words)
    assert run(words, folder).stdout.splitlines()[1] == shown.strip()


def test_every_make_target_and_file_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for words in COMMANDS if words[0] == "make"} | set(re.findall(r"`make (\w+)`", TEXT))
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    named = set(re.findall(r"`([\w/]+/[\w./]+\.\w+)`", TEXT)) | set(re.findall(r"\]\(([\w./]+)\)", TEXT))
    named |= {words[words.index("-f") + 1] for words in COMMANDS if words[0] == "docker"}
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_option_of_attach_exists_and_none_is_left_out() -> None:
    table = TEXT.partition("## Options of `attach`")[2].partition("\n\n`governor.step")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    documented = {name.partition("=")[0] for name in re.findall(r"`([^`]+)`", cells)} | {"wait_s"}
    real = set(flyball.options.Options.__annotations__) - {"run"}
    assert documented == real


def test_every_route_exists(trained: str) -> None:
    import httpx

    routes = httpx.get(f"{trained}/openapi.json", trust_env=False).json()["paths"]
    for method, path in re.findall(r"`(GET|POST) (/\S+)`", TEXT):
        assert method.lower() in routes[path.replace("RUN", "{run}")]


def test_every_extra_exists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"flyball\[(\w+)\]", TEXT)) <= set(extras)


def test_the_policy_that_holds_others_is_one(folder: Path) -> None:
    from flyball_server.policy_files import load_policy, resolve

    assert resolve(load_policy(folder / "staged.yaml")).policy.name == "sequence"


def test_the_schedules_are_counted_right() -> None:
    from flyball_server.core.base import SCHEDULES
    from flyball_server.core.policies import POLICIES

    assert "Eleven base schedules equal those of torch and transformers" in TEXT
    assert len(SCHEDULES) == 11
    for name in POLICIES:
        assert f"`{name}`" in TEXT


def test_the_service_in_compose_is_the_one_described() -> None:
    (service,) = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].values()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_verify_says_that_the_example_matches(trained: str, service: flyball_server.Running, folder: Path) -> None:
    (words,) = (words for words in OURS if "verify" in words and "--store" in words)
    done = run(words, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^first: 1000 observations, \d+ decisions: matches bit for bit$", done.stdout, re.MULTILINE)
