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
BROKEN = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE", "DATA_LOSS")
#: How long one conversation may take.
ANSWER_S = 20.0


def fuzz(found: Service, messages: int, seed: int = 1) -> dict[str, int]:
    """Send so many messages; how often each status came. Raises where one came too late, or the service broke."""
    chance, counts, sent, said = random.Random(seed), dict[str, int](), 0, list[Any]()
    metadata = (("authorization", f"Bearer {found.token}"),)
    with grpc.insecure_channel(found.grpc.removeprefix("grpc://")) as channel:
        stub = pb_grpc.SteeringStub(channel)
        raw = channel.stream_stream("/flyball.v1.Steering/Steer")
        while sent < messages:
            size = chance.randint(1, 8)
            sent += size
            if chance.random() < 0.5:
                said = [_mutated(chance) for _ in range(size)]
                calls = raw(iter(said), metadata=metadata, timeout=ANSWER_S)
            elif chance.random() < 0.8:
                said = [_message(chance) for _ in range(size)]
                calls = stub.Steer(iter(said), metadata=metadata, timeout=ANSWER_S)
            else:
                calls = _unary(stub, chance, metadata)
            status = _status(calls)
            counts[status] = counts.get(status, 0) + 1
            assert status not in BROKEN, f"{status} for one of {said}"
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
    """A message of a job, any part of which may be wild."""
    wild = chance.choice([0.0, 0.02, 0.3])

    def word(*known: str) -> str:
        return chance.choice(WORDS) if chance.random() < wild else chance.choice(known)

    def number(low: int = 0, high: int = 40) -> int:
        return chance.choice(NUMBERS) if chance.random() < wild else chance.randint(low, high)

    def value() -> float:
        return chance.choice(FLOATS) if chance.random() < max(wild, 0.1) else chance.uniform(0.0, 2.0)

    def values(n: int) -> list[float]:
        return [value() for _ in range(n if chance.random() >= wild else chance.randint(0, 3))]

    run = word("active", "ended", f"new{chance.randint(0, 50)}")
    if chance.random() < 0.4:
        groups = [pb.Group(name=word("body"), lr=value(), betas=values(0)), pb.Group(name=word("head"), lr=value())]
        return pb.ClientMessage(attach=pb.Attach(
            project=word("", "default", "fuzz"), run=run, session=word("s-active", "s2"), groups=groups,
            policy_json=word("", '{"type": "windowed"}'), guard_json=word("", '{"max_lr": 1}'),
            mode=word("", "multiplier"), seed=number(), lag=number(0, 3), resume=chance.random() < 0.5,
            seq=number() if chance.random() < wild else 0, digest=word(""),
        ))  # fmt: skip
    first = chance.randint(0, 60)
    steps = [first + i if chance.random() >= wild else number() for i in range(chance.randint(0, 5))]
    receipt = pb.Receipt(
        number=number(1), step=number(), decided=number(), lr=values(2), ranks=number(1, 4), confirms=number(),
        controls={word("kl"): value()}, wanted_lr=values(2),
    )  # fmt: skip
    missing = [number(0, 0) % 2**32] if chance.random() < wild else []
    return pb.ClientMessage(report=pb.Report(
        run=run, session=word("s-active", "s2"), attempt=number(1, 2), step=steps,
        signals=[pb.Column(name=word("loss", "other"), value=values(len(steps)), missing=missing)],
        receipts=[receipt], answers=[pb.DirectiveAnswer(directive=word("c4"), outcome=word("done"), step=number())],
        end=word("", "", "finished"), controls=[pb.Control(name=word("kl"), value=value(), min=0.0, max=2.0)],
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
