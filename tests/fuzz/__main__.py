"""`make fuzz MINUTES=10 MESSAGES=10000`: wild messages over gRPC, then schemathesis over REST, at a real service."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz import rest, streams
from tests.fuzz.world import service


def main() -> int:
    """The exit code: 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as found:
        print(f"{asked.messages} messages over gRPC ...", flush=True)
        print(streams.fuzz(found, asked.messages, asked.seed), flush=True)
        print(f"schemathesis for {asked.minutes:g} minutes ...", flush=True)
        code, printed = rest.fuzz(found, Path(folder), seconds=int(asked.minutes * 60), examples=100, seed=asked.seed)
        print(printed)
        if "Traceback" in (log := found.log.read_text()):
            print(log[-5000:], file=sys.stderr)
            code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
