"""The one table: what | measured | floor | ratio | budget | met or missed.

Rule of this module: a verdict follows from the numbers of its own row.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple


class Row(NamedTuple):
    """One measurement. floor: the same thing done barely, in the same run. ratio: measured / floor, by rounds.

    judged: what the budget is about, "value" or "ratio". budget: an upper limit, or where `at_least` a lower one;
    None: for information. note: what else was seen, printed below the table.
    """

    what: str
    value: float
    unit: str
    floor: float | None = None
    floor_name: str = ""
    ratio: float | None = None
    budget: float | None = None
    judged: str = "value"
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None where there is none."""
        if self.budget is None:
            return None
        seen = self.value if self.judged == "value" else self.ratio
        assert seen is not None, f"{self.what}: the budget is about a ratio, but there is none"
        return seen >= self.budget if self.at_least else seen <= self.budget


def number(value: float) -> str:
    """Three digits that matter, thousands apart."""
    if value != 0 and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def render(rows: Sequence[Row]) -> str:
    """The table, and the notes under it."""
    lines = [("what", "measured", "floor", "ratio", "budget", "")]
    notes = []
    for row in rows:
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f" [{len(notes)}]"
        lines.append(
            (
                row.what + mark,
                f"{number(row.value)} {row.unit}",
                "" if row.floor is None else f"{number(row.floor)} {row.floor_name}",
                "" if row.ratio is None else f"{number(row.ratio)}x",
                _budget(row),
                {True: "met", False: "MISSED", None: ""}[row.met],
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join([*text, "", *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _budget(row: Row) -> str:
    if row.budget is None:
        return ""
    unit = f" {row.unit}" if row.judged == "value" else "x"
    return f"{'>=' if row.at_least else '<='} {number(row.budget)}{unit}"


def load() -> str:
    """How busy the machine is: the load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"


def about(load_before: str) -> str:
    """Where this was measured, and how busy it was before: with a load near the cores, trust only ratios."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "numpy", "torch"))
    system = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    cores = f"{os.cpu_count()} cores (load before: {load_before})"
    return f"Python {platform.python_version()}, {system}, {cores}; {libraries}"
