"""Links and servers: requests that are delayed, lost, repeated, late or cut off, and processes that die and come back.

Rule of this module: what a request does at a server is the product's own doing, from the bytes that came to the bytes
that go. A request may be handled after its sender has given up; but no attach of a process that is gone.
"""

import asyncio

from tests.callers import caller
from tests.simulation.disk import Door
from tests.simulation.judges import Broken

from flyball import over_grpc
from flyball.errors import LinkError, Refused
from flyball_proto.v1 import steering_pb2 as pb
from flyball_server import grpc_api
from flyball_server.core.errors import Busy, SteeringError
from flyball_server.engine import Engine
from flyball_server.messages import SideReport
from flyball_server.service import Service

#: How long a link waits for one answer.
ANSWER_S = 0.6


class Server:
    """One process of the service. `None` is the answer of one that died."""

    def __init__(self, world):
        self.world = world
        self.door = Door(world.disk)
        self.engine = Engine(self.door, world.rules_of, world.now_us)
        self.service = Service(self.engine, self.door)
        #: Requests being handled; a dict keeps their order, which a set does not.
        self.tasks = {}
        self.up = False

    async def start(self):
        await self.engine.start()
        self.up = True

    def crash(self):
        self.up = False
        self.door.crash()
        for task in list(self.tasks):
            task.cancel()

    def handle(self, kind, data, delay_s):
        """Answer a request in a task: the bytes of the answer, or the error."""
        task = self.world.loop.create_task(self._handle(kind, data, delay_s))
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        return task

    async def _handle(self, kind, data, delay_s):
        await asyncio.sleep(delay_s)
        try:
            if kind == "report":
                report = grpc_api.read_report(pb.Report.FromString(data))
                advice = await self.service.report(report, caller("job"))
                self.world.answered(self, report.run, advice.seq, advice.digest)
                return grpc_api.write_advice(advice).SerializeToString()
            if kind == "attach":
                attach = grpc_api.read_attach(pb.Attach.FromString(data))
                attached = await self.service.attach(attach, caller("job"))
                self.world.answered(self, attached.run, attached.seq, attached.digest)
                return grpc_api.write_attached(attached).SerializeToString()
            await self.service.add_signals(kind, SideReport(data), caller("reporter"))
            return b""
        except SteeringError as error:
            return error
        except Broken:
            return Busy("the world is over")
        except Exception as error:
            self.world.end("no surprise", f"a request of {kind}: {error!r}")
            return Busy("the world is over")


class Network:
    """loss, twice, late: the share of requests that are; delay_s: the longest way; cut: the jobs that reach nobody."""

    def __init__(self, world):
        self.world = world
        self.calm()

    def calm(self):
        self.loss = self.twice = self.late = 0.0
        self.delay_s = 0.003
        self.cut = set()

    async def attach(self, process, message):
        data = over_grpc._attach(message).SerializeToString()
        return over_grpc._attached(pb.Attached.FromString(await self._exchange(process, "attach", data)))

    async def report(self, process, message):
        data = over_grpc._report(message).SerializeToString()
        return over_grpc._advice(pb.Advice.FromString(await self._exchange(process, "report", data)))

    async def signals(self, process, run, signals):
        await self._exchange(process, run, signals)

    async def _exchange(self, process, kind, data):
        """Send a request and wait for its answer. Raises LinkError and Refused as a transport does."""
        world, chance = self.world, self.world.chance
        await self._travel(process)
        up = [server for server in world.servers if server.up]
        if not up:
            world.count("no server")
            raise LinkError("cannot connect")
        late = chance.random() < self.late
        if late:
            world.count("request late")
        # A load balancer keeps most requests of a job with one server; the others show what a server has missed.
        server = up[0] if chance.random() < 0.85 else chance.choice(up)
        task = server.handle(kind, data, chance.random() * 2 * ANSWER_S if late else 0.0)
        process.requests[task] = None
        task.add_done_callback(process.requests.pop)
        task.kind = kind
        if chance.random() < (0.3 if kind == "attach" and world.faults else self.twice):
            task.add_done_callback(lambda done: self._repeat(server, kind, data, done))
        try:
            await asyncio.wait({task}, timeout=ANSWER_S)
        except asyncio.CancelledError:
            self._cut_off(task)
            raise
        if not task.done():
            world.count("answer timed out")
            self._cut_off(task)
            raise LinkError("no answer in time")
        if task.cancelled():
            raise LinkError("the connection was reset")
        answer = task.result()
        await self._travel(process)
        if isinstance(answer, SteeringError):
            if answer.code in ("busy", "internal"):
                raise LinkError(str(answer), getattr(answer, "retry_after_s", 0.0))
            raise Refused(answer.code, str(answer))
        return answer

    def _cut_off(self, task):
        """Nobody waits for the answer: the server is told or not, but an attach never comes true behind one's back."""
        if task.kind == "attach" or self.world.chance.random() < 0.5:
            self.world.count("request cut off")
            task.cancel()

    def _repeat(self, server, kind, data, done):
        """The same request once more, later; an attach only where the first was successful, see the module's rule."""
        useless = done.cancelled() or (kind == "attach" and isinstance(done.result(), SteeringError))
        if server.up and self.world.open and not useless:
            self.world.count("request twice")
            server.handle(kind, data, 2 * self.world.chance.random())

    async def _travel(self, process):
        world, chance = self.world, self.world.chance
        await asyncio.sleep(chance.random() * self.delay_s)
        cut = process.name in self.cut
        if cut or chance.random() < self.loss:
            world.count("partition" if cut else "message lost")
            # A reset is seen at once, a silence only after a while.
            await asyncio.sleep(0.0 if chance.random() < 0.5 else ANSWER_S)
            raise LinkError("the network lost it")
