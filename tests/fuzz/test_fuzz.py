"""Goal: whatever is sent to the service, it answers with what its own description says, and goes on.

Method: a short round of `make fuzz`, which goes on for longer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz import rest, streams
from tests.fuzz.world import service


@pytest.mark.timeout(300)
def test_wild_requests_get_documented_answers_and_wild_messages_a_status(tmp_path: Path) -> None:
    with service(tmp_path) as found:
        counts = streams.fuzz(found, 1_000)
        assert {"OK", "ABORTED", "NOT_FOUND"} <= counts.keys(), counts
        assert counts.get("INVALID_ARGUMENT", 0) > 10, counts
        code, printed = rest.fuzz(found, tmp_path, seconds=None, examples=2)
        assert code == 0, printed
        assert "Traceback" not in found.log.read_text()
