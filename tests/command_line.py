"""The two commands, called inside the test's own process: the same code behind the same words, without two seconds of
imports each. That they start as processes of their own is shown by tests/test_readme.py and tests/e2e.

Rule of this module: whatever a command changes of the process (arguments, environment, folder) is put back.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from flyball import cli as client
from flyball_server import cli as server


def client_command(*words: str, **environment: str) -> CompletedProcess[str]:
    """`flyball WORDS`."""
    return _called(client, "flyball", words, environment, Path.cwd())


def server_command(*words: str, folder: Path | None = None) -> CompletedProcess[str]:
    """`flyball-server WORDS`, in a folder."""
    return _called(server, "flyball-server", words, {}, folder or Path.cwd())


def _called(module, name: str, words, environment: dict[str, str], folder: Path) -> CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLYBALL_")}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", [name, *words]),
        patch.dict(os.environ, {**kept, **environment}, clear=True),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            module.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return CompletedProcess([name, *words], code, out.getvalue(), err.getvalue())
