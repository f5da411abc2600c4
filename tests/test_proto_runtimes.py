"""The committed protobuf code on the oldest and the newest runtime that pyproject.toml admits.

Rule of this module: each runtime is installed alone and used by a process of its own, never the one of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALL_S = 200

#: grpcio 1.60 has no wheels for Python 3.13 and later.
OLDEST_GRPC = "grpcio==1.60.1" if sys.version_info < (3, 13) else "grpcio==1.66.2"
RUNTIMES = {"oldest": ["protobuf==4.25.3", OLDEST_GRPC], "newest": ["protobuf<8", "grpcio"]}

ROUND_TRIP = """
import math, sys
import google.protobuf
from flyball_proto.v1 import steering_pb2 as pb, steering_pb2_grpc

assert steering_pb2_grpc.SteeringStub
values = [0.1, math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]
report = pb.Report(run="r", step=range(len(values)), signals=[pb.Column(name="loss", value=values, missing=[3])])
sent = pb.ClientMessage(report=report).SerializeToString()
got = pb.ClientMessage.FromString(sent)
assert got.WhichOneof("kind") == "report"
column = got.report.signals[0]
assert list(got.report.step) == list(range(len(values)))
assert [x.hex() for x in column.value] == [x.hex() for x in values], list(column.value)
assert list(column.missing) == [3]

with_momentum, without = pb.Group.FromString(pb.Group(momentum=0.0).SerializeToString()), pb.Group.FromString(b"")
assert with_momentum.HasField("momentum") and not without.HasField("momentum")
print(google.protobuf.__version__)
"""


@pytest.mark.timeout(INSTALL_S + 60)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_generated_code_loads_and_keeps_every_value(runtime: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(tmp_path)]
    installed = subprocess.run([*pip, *RUNTIMES[runtime]], capture_output=True, text=True, timeout=INSTALL_S)
    assert installed.returncode == 0, f"this test installs {RUNTIMES[runtime]}:\n{installed.stderr}"
    # -S: no site-packages, so that the environment of the tests cannot lend its runtime.
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'proto'}"}
    command = [sys.executable, "-S", "-W", "error", "-c", ROUND_TRIP]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    version = done.stdout.strip()
    assert version.startswith("4.25.3") if runtime == "oldest" else version >= "5", version
