"""`python -m tests.bench` runs and prints its table. What the numbers are is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bench.fold import CASES

ROOT = Path(__file__).resolve().parents[2]


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *args], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.timeout(110)
def test_prints_a_table_with_verdicts(tmp_path: Path) -> None:
    """Two cheap families, one in process and one against a real service."""
    done = bench("--quick", "--only", "fold,steps", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    head, line, *rows = done.stdout.split("\n\n")[1].splitlines()
    assert [cell.strip() for cell in head.split("|")[:5]] == ["what", "measured", "floor", "ratio", "budget"]
    assert set(line) <= set("-+")
    assert all(row.rstrip().endswith(("met", "MISSED")) for row in rows)
    written = json.loads((tmp_path / "rows.json").read_text())
    of_fold = sum(1 + (base is None) for *_, base in CASES)
    assert len(written["rows"]) == len(rows) == of_fold + 4
    assert written["failed"] == []


def test_an_unknown_family_is_a_usage_error() -> None:
    done = bench("--only", "nothing")
    assert done.returncode == 2
    assert "'nothing' is not known" in done.stderr
