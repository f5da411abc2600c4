"""How the commands of `flyball-server` fail: one line on stderr, exit code 1.

Rule of this module: what is the user's to mend ends in words, anything else in a traceback.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from flyball_server.core.errors import SteeringError


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Errors of the user's making end in one line on stderr, not in a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has enough: no error, typer ends quietly
    except (SteeringError, OSError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(_setting(e) for e in error.errors()))


def _setting(error: Any) -> str:
    name = "".join(f"{part}: " for part in error["loc"])
    if error["type"] == "value_error":
        return name + str(error["msg"]).removeprefix("Value error, ")
    setting = name.rstrip(": ")
    option = setting.replace("_", "-")
    return f"{name}{error['input']!r} is no good (option --{option}, or FLYBALL_{setting.upper()})"


def fail(message: str) -> None:
    """One line on stderr, and exit code 1."""
    print(f"flyball-server: {message}", file=sys.stderr)
    raise SystemExit(1)
