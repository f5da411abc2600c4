"""What runs and signals may be called.

Rule of this module: a name that is let in here can stand in a path, in a query and in a row without being quoted.
"""

from __future__ import annotations

import re
from functools import lru_cache

from flyball_server import limits
from flyball_server.core.errors import Invalid

#: A project's, a run's or a session's name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SIGNAL = re.compile(r"[A-Za-z_][A-Za-z0-9_./@%+-]*")


def run_id(project: str, name: str) -> str:
    """The run's id in paths and on the command line: its name, with `PROJECT:` before it unless that is "default"."""
    return name if project == "default" else f"{project}:{name}"


def project_of(run: str) -> str:
    """The project that a run of this id belongs to, whether or not there is such a run."""
    project, sep, _ = run.partition(":")
    return project if sep else "default"


@lru_cache(4096)
def is_run_id(run: str) -> bool:
    """Whether a run can have this id; what is kept beside runs has names that none can have."""
    names = run.split(":", 1)
    return all(len(name) <= limits.NAME_MAX and NAME.fullmatch(name) is not None for name in names)


@lru_cache(4096)
def is_signal_name(name: str) -> bool:
    """Whether a signal can have this name (`=` and `?` mark a row's own columns)."""
    return len(name) <= limits.NAME_MAX and _SIGNAL.fullmatch(name) is not None


def check_signal_name(name: str) -> None:
    """Raise Invalid where a signal cannot have this name."""
    if not is_signal_name(name):
        raise Invalid(f"signals: {name!r} is no signal name; use letters, digits and any of _ . / @ % + -")
