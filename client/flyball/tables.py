"""A run's table as a file: JSON lines or CSV. (Parquet is in `parquet.py`.)

Rule of this module: every digit. What is not a finite number is written as the words NaN, Infinity and -Infinity; null
or an empty cell means that there was nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from math import isfinite
from typing import IO, NamedTuple


class Table(NamedTuple):
    """Full-resolution rows of a run: `rows` has one list per step, as long as `columns`; it can be read once."""

    run: str
    attempt: int
    columns: tuple[str, ...]
    rows: Iterator[list[float | None]]


def write_jsonl(table: Table, file: IO[str]) -> None:
    """One JSON object per step."""
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    for row in table.rows:
        file.write(encode(dict(zip(table.columns, map(worded, row), strict=True))) + "\n")


def write_csv(table: Table, file: IO[str]) -> None:
    """A header, then one line per step."""
    out = csv.writer(file, lineterminator="\n")
    out.writerow(table.columns)
    out.writerows(map(worded, row) for row in table.rows)


def worded(value: float | None) -> float | str | None:
    """A number that JSON can carry, or the word for it."""
    if value is None or isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
