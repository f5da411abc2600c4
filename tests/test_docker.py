"""docker/ without Docker: the very commands of the Dockerfile, run by a non-root user in clean places.

Rule of this module: nothing is typed here a second time. Commands, ports and paths are read from docker/, and only
absolute paths and ports are replaced, by temporary ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
NOBODY = 65534
INSTALL_S = 300
START_S = 60


class Line(NamedTuple):
    """One instruction of the Dockerfile, with the number of the stage it belongs to."""

    stage: int
    word: str
    rest: str


def read_dockerfile() -> list[Line]:
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text(encoding="utf-8"))
    found: list[Line] = []
    stage = -1
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        stage += word == "FROM"
        found.append(Line(stage, word, rest.strip()))
    return found


LINES = read_dockerfile()
FINAL = LINES[-1].stage


def rest_of(word: str, stage: int | None = None) -> list[str]:
    return [line.rest for line in LINES if line.word == word and stage in (None, line.stage)]


def command() -> list[str]:
    (rest,) = rest_of("CMD")
    return [str(word) for word in json.loads(rest)]


def health_check() -> list[str]:
    (rest,) = rest_of("HEALTHCHECK")
    return [str(word) for word in json.loads(rest.partition("CMD ")[2])]


def service() -> dict[str, object]:
    (only,) = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"].values()
    return dict(only)


def ports() -> list[int]:
    return [int(port) for port in rest_of("EXPOSE")[0].split()]


# What the files say, held against each other


def test_two_stages_and_a_user_who_is_not_root() -> None:
    stages = rest_of("FROM")
    assert len(stages) == 2
    assert all(re.fullmatch(r"python:3\.1[1-9]-slim( AS build)?", stage) for stage in stages)
    (user,) = rest_of("USER", FINAL)
    assert f"useradd --uid 1788 --create-home {user}" in " ".join(rest_of("RUN", FINAL))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for rest in rest_of("COPY", 0) for word in rest.split()[:-1]}
    assert copied == allowed
    assert not [name for name in copied if not (ROOT / name).exists()]


def test_ports_and_paths_agree() -> None:
    words = command()
    store = words[words.index("--store") + 1]
    (volume,) = rest_of("VOLUME")
    assert {int(words[words.index(name) + 1].rpartition(":")[2]) for name in ("--http", "--grpc")} == set(ports())
    assert store.startswith(f"sqlite:///{volume}/")
    assert str(ports()[0]) in health_check()[-1]
    assert f"--owner flyball {volume}" in " ".join(rest_of("RUN", FINAL))


def test_compose_publishes_on_loopback_and_mounts_the_volume() -> None:
    spec = service()
    assert spec["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports()]
    (volume,) = rest_of("VOLUME")
    named = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    assert spec["volumes"] == [f"{name}:{volume}" for name in named]
    build = dict(spec["build"])  # type: ignore[call-overload]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
    assert spec["restart"] == "unless-stopped"


# The commands, run


def person_prefix() -> list[str]:
    """What to put before a command so that a person who is not root runs it, able to run this Python."""
    if os.geteuid() != 0:
        return []
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # Python may live where only root can read (a root-owned pyenv): then the person may read, yet not write, all.
    read_all = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    # Through a shell: setpriv itself still finds the interpreter with the rights it is about to drop.
    probe = ["/bin/sh", "-c", '"$0" -c "import venv"', real_python()]
    for prefix in (drop, [*drop, *read_all]):
        done = subprocess.run([*prefix, *probe], cwd="/", capture_output=True)
        if done.returncode == 0:
            return prefix
    pytest.fail(f"as root this test needs setpriv and a Python that user {NOBODY} can run", pytrace=False)


def real_python() -> str:
    """The interpreter behind the virtual environment of the tests."""
    return os.path.realpath(sys.executable)


class Person:
    """Somebody without rights, at home in an empty directory: runs the Dockerfile's words with paths moved there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.prefix = person_prefix()
        self.source = home / "src"
        self.paths = {"/venv": str(home / "venv"), "/data": str(home / "data"), "/src": str(self.source)}

    def moved(self, text: str) -> str:
        for path, replacement in self.paths.items():
            text = re.sub(rf"(?<![\w.]){path}\b", replacement, text)
        return text

    def environment(self) -> dict[str, str]:
        """What the image would give, and of our own only what pip needs to reach its index."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG"))}
        kept |= {name: os.environ[name] for name in ("HTTPS_PROXY", "https_proxy") if name in os.environ}
        path = f"{self.home / 'bin'}:/usr/bin:/bin"
        for setting in (word for rest in rest_of("ENV", FINAL) for word in shlex.split(rest)):
            name, _, value = setting.partition("=")
            kept[name] = self.moved(value).replace("$PATH", path)
        return {**kept, "HOME": str(self.home), "TMPDIR": str(self.home / "tmp")}

    def start(self, words: list[str], cwd: Path) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        everything = [*self.prefix, *words]
        return subprocess.Popen(everything, cwd=cwd, env=self.environment(), stdout=pipe, stderr=pipe, text=True)

    def run(self, words: list[str], cwd: Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        with self.start(words, cwd) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="module")
def person() -> Iterator[Person]:
    """A person in whose home the build stage has run."""
    with tempfile.TemporaryDirectory(prefix="flyball-docker-") as name:
        somebody = Person(Path(name))
        for place in ("src", "data", "tmp", "bin"):
            (somebody.home / place).mkdir()
        # The base image's `python`. No link: a virtual environment made through one would look for its library here.
        (somebody.home / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(real_python())} "$@"\n')
        (somebody.home / "bin" / "python").chmod(0o755)
        copy_sources(somebody.source)
        if os.geteuid() == 0:
            for path in (somebody.home, *somebody.home.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        for words in rest_of("RUN", 0):
            done = somebody.run(shlex.split(somebody.moved(words)), somebody.source, INSTALL_S)
            assert done.returncode == 0, f"RUN {words}\n{done.stdout}\n{done.stderr}"
        yield somebody


def copy_sources(source: Path) -> None:
    """The COPY lines of the build stage."""
    for rest in rest_of("COPY", 0):
        *names, target = rest.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / target)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(INSTALL_S + 60)
def test_the_image_holds_what_it_needs_and_no_more(person: Person) -> None:
    done = person.run(["python", "-c", "import os, sys; print(os.geteuid(), sys.prefix)"], person.home)
    user, prefix = done.stdout.split()
    assert int(user) != 0
    assert Path(prefix) == person.home / "venv"
    code = "import flyball_server, flyball_proto.v1.steering_pb2_grpc, importlib.util as u; print(u.find_spec('torch'))"
    done = person.run(["python", "-c", code], person.home)
    assert done.stdout.strip() == "None", done.stderr
    inside = [str(path) for path in (person.home / "venv").rglob("*.proto") if "flyball_proto" in str(path)]
    assert inside, "the .proto file is not in the installed package"


@pytest.mark.timeout(INSTALL_S + 60)
def test_every_option_exists(person: Person) -> None:
    program, verb, *options = command()
    done = person.run([program, verb, "--help"], person.home)
    assert done.returncode == 0, done.stderr
    for option in (word for word in options if word.startswith("--")):
        assert re.search(rf"{option}\b", done.stdout), f"{program} {verb} has no {option}"


@pytest.mark.timeout(INSTALL_S + 120)
def test_the_service_starts_is_healthy_and_ends_well(person: Person) -> None:
    moved_ports = {str(port): str(free_port()) for port in ports()}

    def moved(words: list[str]) -> list[str]:
        return [re.sub("|".join(moved_ports), lambda m: moved_ports[m[0]], person.moved(word)) for word in words]

    assert person.run(moved(health_check()), person.home).returncode != 0, "healthy before it was started"
    with person.start(moved(command()), person.home / "data") as server:
        try:
            wait_until_healthy(person, moved(health_check()), server)
            server.send_signal(signal.SIGTERM)
            _, log = server.communicate(timeout=30)
        finally:
            server.kill()
    assert server.returncode == 0, log
    assert [path.name for path in (person.home / "data").glob("*.db")] == ["flyball.db"]
    owner = (person.home / "data" / "flyball.db").stat().st_uid
    assert owner != 0


def wait_until_healthy(person: Person, words: list[str], server: subprocess.Popen[str]) -> None:
    until = time.monotonic() + START_S
    while person.run(words, person.home).returncode != 0:
        if server.poll() is not None or time.monotonic() > until:
            server.kill()
            pytest.fail("the service did not become healthy:\n" + "\n".join(server.communicate()), pytrace=False)
        time.sleep(0.2)
