"""What the commands of `flyball` share: options, tables, JSON, errors.

Rule of this module: tables are for terminals; piped output is plain, JSON is for programs.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Annotated, Any

from flyball.errors import FlyballError

try:
    import typer as typer  # the other modules of the command take it from here, so that this message comes first
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"flyball: {error.name or error} is not installed: pip install 'flyball[cli]'") from error

Server = Annotated[
    str | None, typer.Option(help="http://HOST:PORT; without it FLYBALL_SERVER, then http://127.0.0.1:1788.")
]
Token = Annotated[str | None, typer.Option(help="The bearer token; without it FLYBALL_TOKEN.")]
Force = Annotated[
    bool, typer.Option("--force", help="override: a value of lr also where the optimizer finds its own step size.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `flyball runs` shows it.")]


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """What the service or the address is to blame for ends in one line on stderr, not in a traceback."""
    try:
        yield
    except FlyballError as error:
        print(f"flyball: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


def print_json(value: Any) -> None:
    """JSON for programs."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """The SDK's answer as JSON can carry it: what is not finite as the words that the service uses."""
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table under a title; nothing where it has no rows."""
    if rows:
        print(f"\n{title}")
        table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; elsewhere plain columns, nothing cut off."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for title in header:
            grid.add_column(title, overflow="fold")
        for row in cells:
            grid.add_row(*row)
        Console(markup=False, highlight=False).print(grid)
        return
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for row in [list(header), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def short(value: float | None) -> str:
    """Six digits: for people."""
    return "-" if value is None else f"{value:.6g}"
