"""What `flyball export` does: one format after the other, into a file or to stdout.

Rule of this module: a file that is there is complete.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING

from flyball.files import check_free, whole_file
from flyball.schedules import module_beside, module_text
from flyball.tables import worded, write_csv, write_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flyball.api import Client


class Format(StrEnum):
    """What an export can be."""

    FLYBALL = "flyball"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    SCHEDULE = "schedule"


#: What may go to a terminal or into a pipe.
TEXT_FORMATS = (Format.JSONL, Format.CSV, Format.SCHEDULE)


def export_run(
    client: Client, run: str, format_: Format, path: Path | None, *, attempt: int | None = None, force: bool = False
) -> None:
    """Write the run to `path` (None: stdout, for TEXT_FORMATS). attempt: whose line; None: the newest.

    Raises FlyballError where the file exists and `force` is not given, where it cannot be written, and what the client
    raises; then nothing is left of it.
    """
    if format_ is Format.SCHEDULE:
        _export_schedule(client, run, path, attempt, force=force)
    elif format_ is Format.FLYBALL:
        assert path is not None
        with whole_file(path, force=force) as file:
            client.export(run, file)
    elif format_ is Format.PARQUET:
        from flyball.parquet import check_pyarrow, write_parquet

        check_pyarrow()
        assert path is not None
        with whole_file(path, force=force) as file, client.table(run, attempt=attempt) as table:
            write_parquet(table, file)
    else:
        write = write_csv if format_ is Format.CSV else write_jsonl
        with _text(path, force=force) as text, client.table(run, attempt=attempt) as table:
            write(table, text)


def _export_schedule(client: Client, run: str, path: Path | None, attempt: int | None, *, force: bool) -> None:
    if path is not None:
        check_free(module_beside(path), force=force)
    found = client.schedule(run, attempt=attempt)
    # NaN has no place in a schedule's JSON either; the module reads the words that the service uses.
    for group in found["groups"].values():
        for kind in group.keys() & {"lr", "momentum"}:
            group[kind] = [worded(value) for value in group[kind]]
    with _text(path, force=force) as text:
        text.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if path is not None:
        with _text(module_beside(path), force=force) as text:
            text.write(module_text(path, found["run"], found["steps"]))


@contextmanager
def _text(path: Path | None, *, force: bool) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    with whole_file(path, force=force) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.detach()
