"""Files that are there whole or not at all.

Rule of this module: nothing is overwritten that nobody said may be, and nothing half-written is left behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flyball.errors import FlyballError


def check_free(path: Path, *, force: bool) -> None:
    """Raise FlyballError where the file is there already and may not be replaced."""
    if path.exists() and not force:
        raise FlyballError(f"{path} exists already: name another file, or replace it with --force")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file to write to, which gets its name when all of it is written. Raises FlyballError."""
    check_free(path, force=force)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            yield file
        check_free(path, force=force)
        part.replace(path)
    except OSError as error:
        raise FlyballError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
