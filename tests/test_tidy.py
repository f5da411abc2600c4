"""The habits of this repository, kept by a test: who may import whom, sizes, names, and files made from others.

Rule of this module: every message names the file, the line and the way out. It reads sources and never imports them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"flyball": "client", "flyball_server": "server", "flyball_proto": "proto"}
STDLIB = set(sys.stdlib_module_names)
MAX_LINES = 400

#: What the core may take from the standard library: nothing here reads a clock, a file, chance or the environment.
CORE_ALLOWED = {
    "__future__",
    "bisect",
    "collections",
    "collections.abc",
    "dataclasses",
    "difflib",
    "fnmatch",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "math",
    "operator",
    "types",
    "typing",
}

#: Core modules that may import more: one each, for what their docstring says.
CORE_EXCEPTIONS = {"flyball_server.core.mersenne": {"random"}}

#: Client modules that may import something beyond the standard library: those named after it, and the two tools.
CLIENT_LIBRARIES = {
    "flyball.over_grpc": {"grpc", "flyball_proto"},
    "flyball.api": set(),
    "flyball.api_audit": set(),
    "flyball.api_commands": set(),
    "flyball.api_connection": {"httpx"},
    "flyball.cli": set(),
    "flyball.cli_audit": set(),
    "flyball.cli_branches": set(),
    "flyball.cli_commands": set(),
    "flyball.cli_fleet": set(),
    "flyball.cli_output": {"typer", "rich"},
    "flyball.adapters.flat": {"torch"},
    "flyball.adapters.from_device": {"torch"},
    "flyball.adapters.from_jax": {"jax", "numpy"},
    "flyball.cli_report": set(),
    "flyball.cli_values": set(),
    "flyball.cli_words": set(),
    "flyball.adapters.gradient_noise": {"torch"},
    "flyball.adapters.torch_groups": {"torch"},
    "flyball.adapters.signals": {"torch"},
    "flyball.adapters.torch_copies": {"torch"},
    "flyball.adapters.torch_memory": {"torch"},
    "flyball.adapters.keras_backend": {"keras", "numpy"},
    "flyball.adapters.keras_loss": {"keras"},
    "flyball.adapters.keras_optimizer": {"keras"},
    "flyball.adapters.lightning": {"torch"},
    "flyball.adapters.optax": {"jax", "numpy"},
    "flyball.adapters.optax_state": {"jax", "numpy"},
    "flyball.adapters.ranks": {"torch"},
    "flyball.adapters.meeting": {"torch"},
    "flyball.parquet": {"pyarrow"},
    "flyball.yaml": {"yaml"},
}

#: Where one layer of the server must not look, and what to do instead. The first matching importer decides.
SERVER_ARROWS = [
    (
        "flyball_server.storage",
        ("engine", "service", "auth", "grpc_api", "http_api", "settings", "app", "cli"),
        "storage knows the core only; what it needs is an argument of the Journal protocol",
    ),
    (
        "flyball_server.engine",
        ("service", "auth", "grpc_api", "http_api", "settings", "app", "cli"),
        "the engine is handed its collaborators by app.py",
    ),
    (
        "flyball_server.service",
        ("grpc_api", "http_api", "settings", "app", "cli"),
        "a use case knows no skin: return a value and let grpc_api or http_api shape it",
    ),
    ("flyball_server.grpc_api", ("http_api", "app", "cli"), "what both skins need belongs in service.py"),
    ("flyball_server.http_api", ("grpc_api", "app", "cli"), "what both skins need belongs in service.py"),
]

#: Only these build things; everybody else is handed what was built.
WIRING = {"flyball_server.app"}
WIRED_BY_APP = (
    "flyball_server.storage.sql",
    "flyball_server.storage.memory",
    "flyball_server.grpc_api",
    "flyball_server.http_api",
)

CLOCK_AND_CHANCE = {
    "time": "take the time as an argument (`now`)",
    "random": "use core/rng.py: chance is uniform(seed, stream, step)",
    "secrets": "take the id or token as an argument",
    "uuid": "take the id as an argument",
}
#: datetime itself is fine, turning a number into a date is pure: these calls are not.
CLOCK_CALLS = {f"{kind}.{call}" for kind in ("datetime", "date") for call in ("now", "utcnow", "today")}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}
MAY_READ_THE_WORLD = {
    "flyball",
    "flyball.adapters.torch_copies",
    "flyball.adapters.ranks",
    "flyball.adapters.meeting",
    "flyball.ranks",
    "flyball.api",
    "flyball.api_connection",
    "flyball.cli",
    "flyball.connect",
    "flyball.governor",
    "flyball.link",
    "flyball_server",
    "flyball_server.app",
    "flyball_server.cli",
    "flyball_server.engine",
    "flyball_server.settings",
}


class Source(NamedTuple):
    """One module of the three packages."""

    name: str
    path: Path
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


class Import(NamedTuple):
    """One imported name: `module` where it comes from, `full` with the name behind it."""

    line: int
    module: str
    full: str


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def read_sources() -> list[Source]:
    found = []
    for package, place in PLACES.items():
        base = ROOT / place
        for path in sorted((base / package).rglob("*.py")):
            if is_generated(path):
                continue
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return found


SOURCES = read_sources()


def imports(source: Source) -> Iterator[Import]:
    """Every import of a module, those inside functions and `if TYPE_CHECKING` included."""
    package = source.name if source.path.name == "__init__.py" else source.name.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                module = ".".join(parents[: len(parents) - node.level + 1] + ([module] if module else []))
            for alias in node.names:
                yield Import(node.lineno, module, f"{module}.{alias.name}")


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def fail_with(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(["", *problems]), pytrace=False)


def modules_in(package: str) -> list[Source]:
    found = [source for source in SOURCES if inside(source.name, package)]
    assert found, f"there is no module in {package}: this test would check nothing"
    return found


# Imports


def test_core_imports_only_the_allow_list_and_itself() -> None:
    problems = []
    for source in modules_in("flyball_server.core"):
        for item in imports(source):
            if item.module in CORE_ALLOWED or inside(item.module, "flyball_server.core"):
                continue
            if item.full == "flyball_server.core" or item.module in CORE_EXCEPTIONS.get(source.name, ()):
                continue
            way_out = CLOCK_AND_CHANCE.get(item.module, "pass the value in, or do the work in engine.py")
            problems.append(f"{source.at(item.line)}: the core must not import {item.module}: {way_out}")
    fail_with(problems)


def test_client_and_server_never_import_each_other() -> None:
    problems = []
    for mine, other in (("flyball", "flyball_server"), ("flyball_server", "flyball")):
        for source in modules_in(mine):
            problems += [
                f"{source.at(item.line)}: {mine} must not import {other}: what both need goes over the wire "
                "(steering.proto) or is generated into both (proto/generate.py)"
                for item in imports(source)
                if item.module.partition(".")[0] == other
            ]
    for source in modules_in("flyball_proto"):
        problems += [
            f"{source.at(item.line)}: flyball_proto imports neither side"
            for item in imports(source)
            if item.module.partition(".")[0] in ("flyball", "flyball_server")
        ]
    fail_with(problems)


def test_client_imports_only_the_standard_library_elsewhere() -> None:
    problems = []
    for source in modules_in("flyball"):
        allowed = STDLIB | {"flyball"} | CLIENT_LIBRARIES.get(source.name, set())
        parent, _, leaf = source.name.rpartition(".")
        if parent == "flyball.adapters":
            allowed |= {leaf}  # one adapter per file, named after the library it adapts
        problems += [
            f"{source.at(item.line)}: the client core is standard library only; move what needs {item.module} "
            "to the module named after it (over_grpc, api, cli, parquet, adapters/NAME)"
            for item in imports(source)
            if item.module.partition(".")[0] not in allowed
        ]
    fail_with(problems)


def test_client_core_does_not_pull_in_the_modules_with_libraries() -> None:
    """An import inside a function is fine: it runs when the user asks for that transport or adapter."""
    with_libraries = {*CLIENT_LIBRARIES, "flyball.adapters.torch"}
    problems = []
    for source in modules_in("flyball"):
        if source.name in with_libraries or inside(source.name, "flyball.adapters"):
            continue
        top = Source(source.name, source.path, ast.Module(list(top_level(source.tree)), []))
        problems += [
            f"{source.at(item.line)}: import {name} inside the function that needs it, so that `import flyball` "
            "stays free of third-party packages"
            for item in imports(top)
            for name in with_libraries
            if name in (item.module, item.full)
        ]
    fail_with(problems)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in tree.body:
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not type_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def test_arrows_of_the_server_point_towards_the_core() -> None:
    problems = []
    for layer, forbidden, way_out in SERVER_ARROWS:
        targets = [f"flyball_server.{name}" for name in forbidden]
        for source in SOURCES:
            if inside(source.name, layer):
                problems += [
                    f"{source.at(item.line)}: {source.name} must not import {item.full}: {way_out}"
                    for item in imports(source)
                    if any(inside(item.full, target) for target in targets)
                ]
    fail_with(problems)


def test_only_app_wires() -> None:
    problems = []
    for source in modules_in("flyball_server"):
        for item in imports(source):
            for part in WIRED_BY_APP:
                if source.name in WIRING or inside(source.name, home_of(part)) or not inside(item.full, part):
                    continue
                problems.append(
                    f"{source.at(item.line)}: only app.py builds {part}: take it as a constructor argument, "
                    "typed by its protocol (storage/journal.py), or call app.py"
                )
    fail_with(problems)


def home_of(part: str) -> str:
    """The package whose modules may use `part` freely: its own, or for a store the storage package."""
    parent = part.rpartition(".")[0]
    return part if parent == "flyball_server" else parent


def test_clock_chance_and_environment_are_read_in_few_places() -> None:
    problems = []
    for source in SOURCES:
        if source.name in MAY_READ_THE_WORLD:
            continue
        problems += [
            f"{source.at(item.line)}: {item.module} is read in app, engine, link, settings and cli only: "
            f"{CLOCK_AND_CHANCE[item.module]}"
            for item in imports(source)
            if item.module in CLOCK_AND_CHANCE and item.module not in CORE_EXCEPTIONS.get(source.name, ())
        ]
        problems += [
            f"{source.at(node.lineno)}: the clock is read in app, engine, link, settings and cli only: take the time "
            "as an argument (`now`)"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and ".".join(ast.unparse(node).split(".")[-2:]) in CLOCK_CALLS
        ]
        problems += [
            f"{source.at(node.lineno)}: the environment is read in app, settings, cli and attach only: take the value "
            "as an argument"
            for node in ast.walk(source.tree)
            if (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os")
            or (isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {a.name for a in node.names})
        ]
    fail_with(problems)


def test_import_flyball_loads_no_third_party_module() -> None:
    code = (
        "import sys; before = set(sys.modules); import flyball; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "client")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    foreign = set(done.stdout.split()) - STDLIB - {"flyball"}
    assert not foreign, f"`import flyball` loads {sorted(foreign)}: import them inside the function that needs them"


# Names, sizes, left-overs


@pytest.mark.parametrize("package", ["flyball", "flyball_server"])
def test_exported_names(package: str) -> None:
    source = next((source for source in SOURCES if source.name == package), None)
    assert source is not None, f"{PLACES[package]}/{package}/__init__.py is missing"
    exported = exported_names(source)
    assert exported is not None, f"{source.at(1)}: state the public names in __all__ = [...]"
    assert exported == sorted(exported), f"{source.at(1)}: __all__ in sorted() order is {sorted(exported)}"
    borrowed = {item.full.rpartition(".")[2] for item in imports(source) if not inside(item.module, package)}
    public = {name for name in bound_names(source.tree) if not name.startswith("_")} - borrowed
    stated = set(exported) - {"__version__"}
    assert stated == public, (
        f"{source.at(1)}: __all__ lacks {sorted(public - stated)}, and there is no {sorted(stated - public)}; "
        "what is not public gets a leading underscore"
    )


def exported_names(source: Source) -> list[str] | None:
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def bound_names(tree: ast.Module) -> Iterator[str]:
    """The names a module binds when imported, and those that it tells a type checker to load on demand."""
    lazy = [part for node in tree.body if isinstance(node, ast.If) for part in node.body]
    for node in [*tree.body, *lazy]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_modules_are_short_or_say_why_not() -> None:
    problems = []
    for source in SOURCES:
        lines = len(source.path.read_text(encoding="utf-8").splitlines())
        reason = f"Longer than {MAX_LINES} lines because"
        if lines > MAX_LINES and reason not in (ast.get_docstring(source.tree) or ""):
            problems.append(f"{source.at(1)}: {lines} lines; split it, or say '{reason} ...' in its docstring")
    fail_with(problems)


def test_modules_say_what_they_are() -> None:
    fail_with(
        [
            f"{source.at(1)}: no docstring: say what the module is, and the one rule it keeps"
            for source in SOURCES
            if source.tree.body and not ast.get_docstring(source.tree)
        ]
    )


def text_files() -> list[Path]:
    """Every file a person wrote: what git tracks or would, without the licence and generated code."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    else:  # an unpacked archive has no git
        paths = [path for place in (*PLACES.values(), "tests", "docs", "docker") for path in (ROOT / place).rglob("*")]
    endings = {".py", ".md", ".toml", ".proto", ".yaml", ".yml", ".txt", ".html", ".js", ".css", ".sql", ""}
    return [p for p in paths if p.is_file() and p.suffix in endings and p.name != "LICENSE" and not is_generated(p)]


def test_nothing_is_left_for_later() -> None:
    # Put together here, so that this file does not find itself.
    markers = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")
    problems = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := markers.search(line):
                problems.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}: do it, or open an issue")
    fail_with(problems)


# Files made from others, and words that must match the code


def test_generated_code_is_up_to_date() -> None:
    """The tools have an environment of their own: they need a protobuf older than the one the tests run on."""
    python = ROOT / ".venv-proto" / "bin" / "python"
    if not python.exists():
        pytest.fail(".venv-proto is missing: run `make check` or `make test`, which build it", pytrace=False)
    is_up_to_date(python, "proto/generate.py")


def test_the_page_of_policies_is_up_to_date() -> None:
    is_up_to_date(Path(sys.executable), "docs/generate.py")


def is_up_to_date(python: Path, script: str) -> None:
    """Fail with what the script says about the files it would write."""
    done = subprocess.run([str(python), str(ROOT / script), "--check"], capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.fail(done.stderr, pytrace=False)


def test_modules_named_in_the_architecture_exist() -> None:
    page = ROOT / "ARCHITECTURE.md"
    assert page.is_file(), "ARCHITECTURE.md is missing: one page on what is where, and why"
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./*-]*\w\.(?:py|proto)\b", text))
    assert named, "ARCHITECTURE.md names no module: it should say what is where"
    here = ["/" + str(path.relative_to(ROOT)) for path in text_files()]
    gone = sorted(name for name in named if not any(path.endswith("/" + name.lstrip("./")) for path in here))
    assert not gone, f"ARCHITECTURE.md names files that do not exist: {gone}"
    known = {source.name for source in SOURCES}
    dotted = set(re.findall(r"\bflyball(?:_server|_proto)?(?:\.[a-z_0-9]+)+\b", text)) - named
    lost = sorted(
        name for name in dotted if name not in known and not name.endswith((".py", ".db")) and not is_attribute(name)
    )
    assert not lost, f"ARCHITECTURE.md names modules that do not exist: {lost}"


def is_attribute(dotted: str) -> bool:
    """Whether `package.module.name` is a name that module binds."""
    module, _, name = dotted.rpartition(".")
    return any(source.name == module and name in set(bound_names(source.tree)) for source in SOURCES)


def test_variables_named_for_users_exist() -> None:
    pages = [path for path in text_files() if path.suffix == ".md" or path.parent == ROOT / "docker"]
    assert ROOT / "README.md" in pages, "README.md is missing"
    known = known_variables()
    problems = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        problems += [
            f"{page.relative_to(ROOT)}: {name} is read nowhere; the code knows {sorted(known)}"
            for name in sorted(set(re.findall(r"\bFLYBALL_[A-Z_]*[A-Z]\b", text)) - known)
        ]
    fail_with(problems)


def known_variables() -> set[str]:
    """Every variable a source names, and one per field of a settings class that states the prefix."""
    known: set[str] = set()
    for source in SOURCES:
        text = source.path.read_text(encoding="utf-8")
        known |= set(re.findall(r"\bFLYBALL_[A-Z_]*[A-Z]\b", text))
        if re.search(r"env_prefix\s*=\s*[\"']FLYBALL_[\"']", text):
            for node in ast.walk(source.tree):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    known.add(f"FLYBALL_{node.target.id.upper()}")
    return known
