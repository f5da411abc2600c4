"""The floor of every exchange: a bare grpc.aio server on uvloop that answers each message with a fixed one.

Rule of this module: the service's own wire messages, and no work at all between reading and answering.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc

from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc

ATTACHED = pb.ServerMessage(attached=pb.Attached(run="echo", attempt=1))
ADVICE = pb.ServerMessage(
    advice=pb.Advice(
        attempt=1,
        through=1000,
        seq=1000,
        digest="0" * 64,
        changes=pb.Changes(decided=[1000], lr=[0.1]),
        phase="adaptive",
        code="filling_window",
    )
)


class Echo(pb_grpc.SteeringServicer):
    """Answers, and does nothing else."""

    async def Steer(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Attach is answered by Attached, everything else by Advice."""
        async for message in request_iterator:
            yield ADVICE if message.HasField("report") else ATTACHED


async def main() -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server()
    pb_grpc.add_SteeringServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"grpc": f"grpc://127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
