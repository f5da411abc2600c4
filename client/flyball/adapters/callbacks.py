"""What the callbacks of trainers have in common: options that are checked early, checkpoints that are gone on from.

Rule of this module: no library is needed, and what the user said comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flyball.errors import Refused
from flyball.options import Options, checked, measured


def check(options: Options) -> None:
    """Raise what `attach` to a torch optimizer would raise for these options, long before there is one."""
    checked(measured(options)[2])


def going_on(options: Mapping[str, Any], token: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an attempt that goes on from a checkpoint which nobody asked for by `resume`.

    A training that began, or that goes on, without its service must not end there: unless the user says otherwise, a
    token that the service never heard of is imported.
    """
    whole = {"on_unknown": "import", **options, "resume": token, "fork": None}
    if token.get("attempt") is None and whole.get("policy") is None:
        whole["policy"] = "constant"  # what the run would have begun under: an import has nothing to take it from
    return whole


@contextmanager
def refusals() -> Iterator[None]:
    """Around `attach`: a run that exists already is refused in words of a callback."""
    try:
        yield
    except Refused as error:
        if "resume=True" not in str(error):
            raise
        raise Refused(error.code, f"{error}; for this callback that is FlyballCallback(..., resume=True)") from error
