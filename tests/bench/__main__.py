"""`python -m tests.bench [--quick] [--only NAME,...] [--json FILE]`: measure, then print one table.

Rule of this module: a missed budget is printed as missed and is no failure; the exit code is 1 only where a
measurement could not be made.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.bench.table import Row, about, load, render

#: In the order of the table. Each is a module here with `measure(quick) -> list[Row]`.
FAMILIES = ("steps", "slowdown", "signals", "fold", "lockstep", "batches", "storage", "memory", "series")
FAMILIES = ("steps", "slowdown", "fold", "lockstep", "batches", "storage", "memory", "series", "ranks")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the budgets against floors.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under two minutes, noisier")
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(FAMILIES)):
        parser.error(f"--only: {unknown[0]!r} is not known; there are {', '.join(FAMILIES)}")
    where = about(load())
    rows: list[Row] = []
    failed = []
    for name in names:
        started = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            # Imported here: torch alone takes seconds, and not every family needs it.
            measure: Callable[[bool], list[Row]] = import_module(f"tests.bench.{name}").measure
            rows += measure(args.quick)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{where}\n\n{render(rows)}")
    if failed:
        print(f"\ncould not be measured: {', '.join(failed)} (see above)")
    if args.json:
        data = {"about": where, "quick": args.quick, "rows": [row._asdict() for row in rows], "failed": failed}
        args.json.write_text(json.dumps(data, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
