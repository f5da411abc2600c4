"""The commands of `flyball-server` about what a store holds: verify, replay, compact, key.

Rule of this module: a store is only opened where it exists, and only read where reading will do.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from flyball_server.audit.heads_check import check_files, check_store, read_heads
from flyball_server.branches import otherwise
from flyball_server.cli_output import errors, fail
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.core.numbers import finite
from flyball_server.exports.check import check
from flyball_server.loading import load
from flyball_server.messages import WhatIfRequest
from flyball_server.policy_files import load_policy
from flyball_server.rules import rules_of
from flyball_server.settings import Settings
from flyball_server.signing import fingerprint, open_signer, pem, read_public_key
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE, Journal
from flyball_server.verify import names as verify_names
from flyball_server.verify import verify, verify_store
from flyball_server.what_if import Asked, beside, summary, what_if

#: Endings of files that people have of runs, and that prove nothing.
_OTHER_FILES = (".csv", ".json", ".jsonl", ".parquet", ".db", ".pem")


def add(cli: typer.Typer) -> None:
    """Add the commands to `flyball-server`."""
    cli.command(name="verify")(verify_command)
    cli.command()(replay)
    cli.command()(compact)
    cli.command()(key)


def key(
    store: Annotated[str | None, typer.Option(help="The service's store: its key lies beside the file.")] = None,
    signing_key: Annotated[str | None, typer.Option(help="The key file, where the service was given one.")] = None,
) -> None:
    """Print the public key that exports are signed with (PEM), and its fingerprint."""
    given: dict[str, Any] = {"store": store, "signing_key": signing_key}
    with errors():
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        path = Path(settings.signing_key) if settings.signing_key else settings.own_key
        if path is None:
            raise Invalid(f"store is {settings.store!r}, which keeps no key: name the file of a service")
        if not path.exists():
            raise Invalid(f"{path} does not exist: `flyball-server serve` makes the key when it is first started")
        public = open_signer(path, make=False).public
        print(f"{pem(public)}{fingerprint(public)}")


def verify_command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Run ids, or export files (*.flyball); without any, all runs."),
    ] = None,
    store: Annotated[str, typer.Option(help="sqlite:///FILE; the service may be running.")] = "sqlite:///flyball.db",
    public_key: Annotated[
        Path | None, typer.Option(help="File of the public key (PEM) that must have signed the export files.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="File of signed heads: the store, or the runs or files named, must hold them."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON line per run, and one of the store's own problems.")
    ] = False,
) -> None:
    """Check the hash chain of runs and fold their journals again, comparing every decision bit for bit; and their
    records, their snapshots, and what of the store is no single run's.

    Exit code 1 where anything differs. Of an export file its checksums and its signature are checked, too; it needs
    no store. With --heads only this is checked: whether every row that was signed is still there, as it was signed.
    """
    with errors():
        files = [Path(name) for name in runs or () if _is_export(name)]
    if files and len(files) < len(runs or ()):
        raise typer.BadParameter("give run ids or export files, not both")
    if heads is not None:
        if public_key is None:
            raise typer.BadParameter("--heads needs --public-key: what `flyball-server key` prints, kept elsewhere")
        with errors():
            _verify_heads(heads, read_public_key(public_key), files or runs or [], store, json_output)
        return
    if files:
        with errors():
            _verify_files(files, None if public_key is None else read_public_key(public_key), json_output)
        return
    if public_key is not None:
        raise typer.BadParameter("--public-key is for export files and --heads; name one (*.flyball)")
    wrong = False
    with errors(), _opened(store, read_only=True) as journal:
        for name in runs or verify_names(journal):
            verdict = verify(journal, name)
            wrong = wrong or bool(verdict.problem)
            if json_output:
                print(json.dumps(verdict._asdict()), flush=True)
            else:
                result = verdict.problem or "matches bit for bit"
                print(
                    f"{name}: {verdict.observations} observations, {verdict.decisions} decisions: {result}", flush=True
                )
        problems = [] if runs else verify_store(journal)
        if problems and json_output:
            print(json.dumps({"store": store, "problems": problems}))
        elif problems:
            print(f"the store {store}: {'; '.join(problems)}")
    if wrong or problems:
        raise typer.Exit(1)


def _is_export(name: str) -> bool:
    """Whether an export file is meant, and not a run. Raises Invalid for other files, which no run is named after."""
    path = Path(name)
    if path.suffix == ".flyball":
        if not path.is_file():
            raise Invalid(f"{name} does not exist, or is no file: name an export file as `flyball export` wrote it")
        return True
    if path.suffix in _OTHER_FILES or "/" in name or "\\" in name:
        there = "is no export file" if path.is_file() else "does not exist, and an export file is named otherwise"
        raise Invalid(f"{name} {there}: what can be verified are runs and their exports, *.flyball")
    return False


def _verify_heads(heads: Path, key: bytes, of: list[Path] | list[str], store: str, json_output: bool) -> None:
    """of: export files, instead of the store; or runs of the store, none: all."""
    signed, failed = read_heads(heads, key), False
    files, runs = [one for one in of if isinstance(one, Path)], [one for one in of if isinstance(one, str)]
    with contextlib.ExitStack() as stack:
        if files:
            checks = check_files(files, signed)
        else:
            checks = check_store(stack.enter_context(_opened(store, read_only=True)), signed, runs)
        for found in checks:
            failed = failed or bool(found.problem)
            if json_output:
                print(json.dumps(found._asdict()), flush=True)
            else:
                name = "the store's journal" if found.run == STORE else found.run
                result = found.problem or found.note or "as signed"
                print(f"{name}: {found.heads} signed heads: {result}", flush=True)
    if failed:
        raise typer.Exit(1)


def _verify_files(files: Iterable[Path], key: bytes | None, json_output: bool) -> None:
    failed = False
    for path in files:
        verdict, signer, _, _ = check(path, key)
        failed = failed or bool(verdict.problem)
        if json_output:
            print(json.dumps({**verdict._asdict(), "file": str(path), "signer": signer}))
        elif verdict.problem:
            print(f"{path}: {verdict.problem}")
        else:
            known = "the key given" if key is not None else "only a fingerprint you know proves who signed"
            print(
                f"{verdict.run}: {verdict.observations} observations, {verdict.decisions} decisions: matches bit for "
                f"bit, signed by {signer} ({known})"
            )
    if failed:
        raise typer.Exit(1)


def replay(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    policy: Annotated[Path, typer.Option(help="Policy file: JSON, YAML or TOML with `type: NAME` and parameters.")],
    store: Annotated[str, typer.Option(help="sqlite:///FILE; the service may be running.")] = "sqlite:///flyball.db",
    attempt: Annotated[int | None, typer.Option(help="Whose line of steps; the newest attempt's without it.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="So many lines where the two streams part, from the first.")] = 20,
    json_output: Annotated[
        bool, typer.Option("--json", help="A JSON line per step at which one of them changes; a summary at the end.")
    ] = False,
) -> None:
    """What another policy would have decided on the signals that a run recorded, beside what was decided.

    A policy without a base of its own stands on the run's.
    """
    with errors(), _opened(store, read_only=True) as journal:
        _replay(journal, WhatIfRequest(run, load_policy(policy), None, {}, None, attempt), limit, json_output)


def _replay(journal: Journal, request: WhatIfRequest, limit: int, json_output: bool) -> None:
    found = load(journal, rules_of, request.run)
    spec, own = otherwise(request, found.spec, found.origin, {})
    asked = Asked(found.spec, found.origin, found.run, rules_of(spec), own)
    streams = what_if(journal, asked, request.attempt)
    summed = summary(streams, spec.groups)
    if json_output:
        for line in beside(streams, asked.rules):
            print(json.dumps(finite(line), allow_nan=False))
        print(json.dumps({"run": request.run, "policy": asked.rules.policy.tag, "summary": summed}, allow_nan=False))
        return
    print(f"{request.run}: {summed['observations']} observations, steps {summed['from_step']} to {summed['to_step']}")
    apart = (line for line in beside(streams, asked.rules) if line["real"] != line["what_if"])
    for line in islice(apart, limit):
        for group, lr in line["real"]["lr"].items():
            print(
                f"  step {line['step']:<8} {group}: {lr:.6g} really, {line['what_if']['lr'][group]:.6g} under", end=" "
            )
            print(f"{asked.rules.policy.tag}  {line['reason']}".rstrip())
    if summed["first_difference"] is None:
        print("the settings would have been the same at every step")
    else:
        print(f"first difference decided at step {summed['first_difference']}; {summed['steps_apart']} steps apart")


def compact(
    runs: Annotated[list[str] | None, typer.Argument(help="Run ids; all runs of the store without one.")] = None,
    store: Annotated[str, typer.Option(help="sqlite:///FILE of a stopped service.")] = "sqlite:///flyball.db",
) -> None:
    """Merge what runs have not merged yet, and give the space of deleted and merged rows back to the disk.

    The disk needs room for the file a second time meanwhile. A damaged run is left as it is, with exit code 1.
    """
    damaged = []
    with errors(), _opened(store) as journal:
        before = journal.usage().bytes
        size_before = _size(store)
        for name in runs or journal.names():
            try:
                journal.compact(name)
            except Damaged as error:
                damaged.append(str(error))
        journal.shrink()
        print(f"{store}: {before} bytes in use before, {journal.usage().bytes} after; the file: ", end="")
        print(f"{size_before} before, {_size(store)} after")
    if damaged:
        fail("; ".join(damaged))


@contextlib.contextmanager
def _opened(store: str, *, read_only: bool = False) -> Iterator[Journal]:
    """An existing store. Opening would create it, and "nothing wrong" is no good news about a mistyped name."""
    journal = open_journal(store, read_only=read_only)
    if store == "memory:":
        raise Invalid("store is 'memory:', where nothing is kept: name the file the service was started with")
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise Invalid(f"{store} does not exist: name the file the service was started with")
    journal.start(lambda _: None)
    try:
        yield journal
    finally:
        journal.close()


def _size(store: str) -> int:
    path = Path(store.removeprefix("sqlite:///"))
    log = Path(f"{path}-wal")
    return path.stat().st_size + (log.stat().st_size if log.exists() else 0)
