"""Processes that start warm: a parent imports everything once, and each start is a fork of it.

Goal: dozens of real kills in one test, which cost as many seconds of imports otherwise. Rule of this module: a child
runs what a process started cold would run, but for the imports; it is a process of its own, and kill -9 is real.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.processes import Server, Trainer

#: Reads orders [script, values] and runs each in a fork. Without gRPC's own fork handlers: the parent never uses it.
_PARENT = """
import ctypes, os, sys
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
exec(imports)
script = None
for line in sys.stdin:
    script, values = json.loads(line)
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, 9)  # killed when the parent ends
        sys.stdin = open(os.devnull)
        break
    print(json.dumps({"pid": pid}), flush=True)
    status = os.waitpid(pid, 0)[1]
    print("\\n" + json.dumps({"exited": os.waitstatus_to_exitcode(status)}), flush=True)
else:
    sys.exit()
exec(compile(script, "<script>", "exec"), {"__name__": "__main__", **values})
"""

_SERVE = """
import os, sys
from flyball_server.cli import main
os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
sys.argv = command
main()
"""


class Warm:
    """One place for a process: started, killed and started again."""

    def __init__(self, trainer: Callable[..., Trainer], imports: str) -> None:
        """`trainer`: the fixture, which ends the parent, and its child with it."""
        self.parent = trainer(_PARENT, imports=imports)
        self.pid = 0

    def start(self, script: str, **values: Any) -> None:
        """Fork, and run the script in the child."""
        self.parent.tell(json.dumps([script, values]))
        self.pid = int(self.parent.hear("pid"))

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL, f"it had ended before:\n{self.parent.errors()}"

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return int(self.parent.hear("exited"))


class WarmServer(Server):
    """`flyball-server serve`, started warm. What it logs is in `log`, as ever."""

    def __init__(self, folder: Path, trainer: Callable[..., Trainer]) -> None:
        super().__init__(folder)
        self._warm = Warm(trainer, "import alembic.command, flyball_server.storage.migrations, flyball_server.cli")

    @property
    def pid(self) -> int:
        return self._warm.pid

    def start(self) -> Server:
        self.log.touch()
        self._warm.start(_SERVE, log=str(self.log), command=self.command[1:])
        assert self._warm.parent.hear("http") == self.url("http")
        return self

    def _gone(self, within_s: float) -> int:
        return self._warm.ended()

    def end(self) -> None:
        """The fixture that started the parent ends both."""
