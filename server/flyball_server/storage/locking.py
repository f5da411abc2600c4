"""One owner of a file: a lock beside it that ends with the process.

Rule of this module: whoever is refused is told who holds it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from flyball_server.core.errors import Busy, Invalid

try:
    import fcntl
except ImportError:  # Windows: SQLite's own locks remain, which keep the file whole but not to one process
    fcntl = None  # type: ignore[assignment]


def hold(path: str) -> IO[str]:
    """Hold PATH.lock for as long as the file is open."""
    try:
        lock = Path(path + ".lock").open("a+")  # noqa: SIM115 - held until close
    except OSError as error:
        raise Invalid(f"{path} cannot be created or opened: {error.strerror}") from error
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise Busy(
                f"{path} is in use by another Flyball server (process {owner or 'unknown'}): stop that one first, or "
                "name another file"
            ) from error
    try:
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    except OSError as error:
        with suppress(OSError):  # closing tries to write once more
            lock.close()
        raise Busy(f"{path} cannot be opened now: {error.strerror} (writing {path}.lock)") from error
    return lock
