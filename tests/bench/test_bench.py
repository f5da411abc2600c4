"""`python -m tests.bench` and `tests.bench.faults` print their tables. What the numbers are is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bench.fold import CASES

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]


def bench(*args: str, module: str = "tests.bench") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
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


@pytest.mark.timeout(110)
def test_faults_are_a_table_for_the_readme(tmp_path: Path) -> None:
    where = ("--json", str(tmp_path / "rows.json"))
    done = bench("--quick", "--only", "killed", "--over", "http", *where, module="tests.bench.faults")
    assert done.returncode == 0, done.stderr
    head, line, *rows = done.stdout.split("\n\n")[2].splitlines()
    assert [cell.strip() for cell in head.split("|")[1:6]] == ["what happens", "lag", "typical step", "p99", "worst"]
    assert set(line) == {"|", "-"}
    assert [row.split("|")[2].strip() for row in rows] == ["None", "0"]
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for row, lag in zip(written, ("None", "0"), strict=True):
        assert row["lag"] == lag
        assert row[""] in ("kept", "MISSED")
        assert row["everything delivered"].endswith(" later")
    assert written[0]["steps that waited in vain"].startswith("0 of ")
