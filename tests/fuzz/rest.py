"""schemathesis over the OpenAPI document of a real service: no 5xx, no undocumented status, no answer of another form.

Rule of this module: the document is the service's own, and schemathesis its reader; nothing is left out of it but what
would end the fuzz itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fuzz.world import Service

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def fuzz(found: Service, folder: Path, *, seconds: int | None, examples: int, seed: int = 1) -> tuple[int, str]:
    """The exit code and what was printed. seconds: for how long it is repeated; None: each phase once."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{found.http}/openapi.json",
        "--header", f"Authorization: Bearer {found.token}", "--checks", CHECKS, "--seed", str(seed),
        "--max-examples", str(examples), "--suppress-health-check", "all", "--request-timeout", "30",
        "--generation-database", ":memory:", "--warnings", "off", "--continue-on-failure", "--no-color",
        # Tokens that are revoked at random end with the fuzz's own; freezes and thaws are tried elsewhere.
        "--exclude-method", "DELETE", *(("--max-time", str(seconds)) if seconds else ("--phases", "coverage,fuzzing")),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    return done.returncode, done.stdout[-12_000:] + done.stderr[-2_000:]
