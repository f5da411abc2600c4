"""Messages over gRPC that no client would send: mutated bytes, wrong orders, wild values.

Rule of this module: each answer is a message or a status, in time; after all of them an honest job is steered as ever.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import grpc
from tests.fuzz.world import Service

from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc

WORDS = ["", "active", "ended", "gone", "a:b", "é", "\x00", "x" * 300, "../..", '{"type": "windowed"}', "[", "NaN"]
NUMBERS = [0, 1, -1, 2**31, 2**53, 2**62, -(2**63), 2**63 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf]
#: How long one conversation may take.
ANSWER_S = 20.0


def fuzz(found: Service, messages: int, seed: int = 1) -> dict[str, int]:
    """Send so many messages; how often each status came. Raises where one came too late, or the service broke."""
    chance, counts, sent = random.Random(seed), dict[str, int](), 0
    metadata = (("authorization", f"Bearer {found.token}"),)
    with grpc.insecure_channel(found.grpc.removeprefix("grpc://")) as channel:
        stub = pb_grpc.SteeringStub(channel)
        raw = channel.stream_stream("/flyball.v1.Steering/Steer")
        while sent < messages:
            size = chance.randint(1, 8)
            sent += size
            if chance.random() < 0.5:
                calls = raw(iter([_mutated(chance) for _ in range(size)]), metadata=metadata, timeout=ANSWER_S)
            elif chance.random() < 0.8:
                calls = stub.Steer(iter([_message(chance) for _ in range(size)]), metadata=metadata, timeout=ANSWER_S)
            else:
                calls = _unary(stub, chance, metadata)
            status = _status(calls)
            counts[status] = counts.get(status, 0) + 1
            assert status not in ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE", "DATA_LOSS"), status
        _honest(stub, metadata)
    assert found.process.poll() is None, "the service is gone"
    return counts


def _status(calls: Any) -> str:
    try:
        for _ in calls:
            pass
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _unary(stub: Any, chance: random.Random, metadata: Any) -> Iterator[Any]:
    words = [chance.choice(WORDS) for _ in range(3)]
    number = chance.choice(NUMBERS)
    asked = [
        lambda: stub.GetRun(pb.GetRunRequest(run=words[0]), metadata=metadata, timeout=ANSWER_S),
        lambda: stub.ListRuns(
            pb.ListRunsRequest(project=words[0], status=words[1], cursor=words[2], limit=number % 2**31),
            metadata=metadata, timeout=ANSWER_S,
        ),
        lambda: stub.AddSignals(
            pb.AddSignalsRequest(
                run=words[0], signals={words[1]: chance.choice(FLOATS)}, source=words[2], number=number
            ),
            metadata=metadata, timeout=ANSWER_S,
        ),
    ]  # fmt: skip
    yield chance.choice(asked)()


def _mutated(chance: random.Random) -> bytes:
    """A message's bytes with some of them other ones, cut, or doubled."""
    data = bytearray(_message(chance).SerializeToString())
    for _ in range(chance.randint(0, 4)):
        if data:
            place = chance.randrange(len(data))
            data[place] = chance.randrange(256)
    if chance.random() < 0.2:
        del data[chance.randint(0, len(data)) :]
    return bytes(data)


def _message(chance: random.Random) -> pb.ClientMessage:
    def word() -> str:
        return (
            chance.choice(WORDS)
            if chance.random() < 0.5
            else chance.choice(["active", "ended", f"new{chance.random()}"])
        )

    def number() -> int:
        return chance.choice(NUMBERS) if chance.random() < 0.3 else chance.randint(0, 40)

    def floats(n: int) -> list[float]:
        return [chance.choice(FLOATS) for _ in range(n)]

    if chance.random() < 0.4:
        groups = [pb.Group(name=word(), lr=chance.choice(FLOATS), betas=floats(chance.randint(0, 3)))]
        return pb.ClientMessage(attach=pb.Attach(
            project=chance.choice(["", "default", word()]), run=word(), session=word(), groups=groups *
            chance.randint(0, 3), policy_json=word(), guard_json=word(), mode=chance.choice(["", "multiplier", "x"]),
            seed=number(), lag=number(), resume=chance.random() < 0.5, from_step=number(), seq=number(), digest=word(),
        ))  # fmt: skip
    steps = [number() for _ in range(chance.randint(0, 5))]
    receipt = pb.Receipt(
        number=number(), step=number(), decided=number(), lr=floats(chance.randint(0, 3)), ranks=number(),
        confirms=number(), controls={word(): chance.choice(FLOATS)}, wanted_lr=floats(chance.randint(0, 3)),
    )  # fmt: skip
    return pb.ClientMessage(report=pb.Report(
        run=word(), session=chance.choice(["s-active", word()]), attempt=chance.choice([1, number()]), step=steps,
        signals=[pb.Column(name=chance.choice(["loss", word()]), value=floats(len(steps)), missing=[number() % 2**32])],
        receipts=[receipt], answers=[pb.DirectiveAnswer(directive=word(), outcome=word(), step=number())],
        end=chance.choice(["", "", "finished", word()]),
        controls=[pb.Control(name=word(), value=chance.choice(FLOATS), min=chance.choice(FLOATS), max=1.0)],
    ))  # fmt: skip


def _honest(stub: Any, metadata: Any) -> None:
    """A job as any other begins, reports and ends."""
    attach = pb.Attach(run="honest", session="honest", groups=[pb.Group(name="a", lr=0.1)])
    report = pb.Report(
        run="honest", session="honest", attempt=1, step=[0, 1], signals=[pb.Column(name="loss", value=[1.0, 2.0])],
        end="finished",
    )  # fmt: skip
    said = [pb.ClientMessage(attach=attach), pb.ClientMessage(report=report)]
    answers = list(stub.Steer(iter(said), metadata=metadata, timeout=ANSWER_S))
    assert answers[-1].advice.through == 1
