"""A world: some jobs, one or two servers, one journal, and weather. Made from a seed, run to its end, judged.

Rule of this module: the weather ends. Whatever was broken works again, and then everything must arrive.
"""

import asyncio
import hashlib
from collections import Counter
from contextlib import contextmanager
from random import Random

from tests.simulation import judges
from tests.simulation.disk import Disk
from tests.simulation.jobs import Job
from tests.simulation.judges import Broken
from tests.simulation.loop import VirtualLoop, run
from tests.simulation.network import Network, Server
from tests.simulation.plans import plans
from tests.simulation.reference import Record

from flyball import limits as client_limits
from flyball.errors import LinkError, Refused
from flyball_server import limits as server_limits
from flyball_server.rules import rules_of

#: How long everything may take to arrive once the weather is over, in virtual seconds.
CALM_S = 200.0
#: How long a request may still be under way when everything has arrived.
LATE_S = 3.0


class World:
    """faults: whether there is any weather. history: (time, who, what) of what is worth telling; counts: of faults."""

    def __init__(self, seed, *, faults=True):
        self.seed = seed
        self.faults = faults
        self.chance = Random(f"world {seed}")
        self.loop = VirtualLoop(self.chance)
        self.disk = Disk(self)
        self.loop.slow = lambda: self.chance.random() * self.disk.slow_s
        self.network = Network(self)
        self.jobs = [Job(self, plan) for plan in plans(seed)]
        self.servers = []
        self.stories = {}
        self.side = {}
        self.counts = Counter()
        self.history = []
        self.open = True
        self.broken = None
        self._over = None
        self._ids = 0
        self._records = {}
        self._rules = {}

    def run(self):
        """Live through it. Raises Broken where a judge finds something."""
        with _limits(self):
            run(self.loop, self._main())

    def digest(self):
        """A hash of everything that happened and of all that was stored."""
        heads = [(job.plan.name, self.disk.journal.record(job.plan.name)) for job in self.jobs]
        return hashlib.sha256(repr((self.history, sorted(self.counts.items()), heads)).encode()).hexdigest()

    # -- for those who live in it --------------------------------------------------------------------

    def now_us(self):
        return 1_700_000_000_000_000 + int(self.loop.now * 1e6)

    def rules_of(self, spec):
        """What a specification means, found out once in a world: it costs more than all else that a restart does."""
        if spec.run not in self._rules:
            self._rules[spec.run] = rules_of(spec)
        return self._rules[spec.run]

    def new_id(self):
        self._ids += 1
        return f"s{self._ids}"

    def note(self, who, what):
        self.history.append((self.loop.now, who, what))

    def count(self, what, times=1):
        self.counts[what] += times
        self.history.append((self.loop.now, "", what))

    def fail(self, judge, text):
        """The first finding ends the world."""
        self.end(judge, text)
        raise self.broken

    def end(self, judge, text):
        """`fail` where nobody would catch it."""
        if self.broken is None:
            self.broken = Broken(judge, text)
            self.note("", f"BROKEN {self.broken}")
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    def answered(self, server, run, seq, digest):
        judges.persisted(self, run, seq, digest)

    def record(self, run):
        """The run's journal, folded; made once for each length it had."""
        stored = self.disk.journal.record(run)
        key = (run, stored.seq)
        if key not in self._records:
            self._records = {other: record for other, record in self._records.items() if other[0] != run}
            self._records[key] = record = Record(self.disk.journal, run, self.rules_of)
            record.run_status = stored.status
        return self._records[key]

    # -- leaves --------------------------------------------------------------------------------------

    async def _main(self):
        self._over = self.loop.create_future()
        for _ in range(self.chance.choice([1, 1, 2])):
            self.servers.append(Server(self))
            await self.servers[-1].start()
        weather = self.loop.create_task(self._weather())
        reporter = self.loop.create_task(self._reporter())
        work = self.loop.create_task(self._work())
        work.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait({work, self._over}, timeout=CALM_S, return_when=asyncio.FIRST_COMPLETED)
        weather.cancel()
        reporter.cancel()
        if self.broken is None and not work.done():
            self.fail("everything arrives", f"not after {CALM_S} s: {self._left()}")
        if work.done() and not work.cancelled() and self.broken is None:
            work.result()
        if self.broken is not None:
            raise self.broken
        self._clear()
        self.open = False
        await asyncio.sleep(LATE_S)
        if self.broken is not None:
            raise self.broken
        judges.judge(self)

    async def _work(self):
        jobs = [self.loop.create_task(job.run()) for job in self.jobs]
        await asyncio.gather(*jobs)

    def _left(self):
        return ", ".join(
            f"{job.plan.name} at step {job.process.model} of {job.plan.steps}, {job.process.session.state}, "
            f"waiting {len(job.process.session._observations)}, {job.process.session.last_error!r}"
            for job in self.jobs
            if job.process is not None
        )

    async def _reporter(self):
        """Another process that adds signals, to jobs that need not be repeated exactly."""
        jobs = [job.plan.name for job in self.jobs if not job.plan.exact]
        process = _Reporter()
        while jobs and self.chance.random() < 0.9:
            await asyncio.sleep(self.chance.random() * 0.4)
            run, name = self.chance.choice(jobs), self.chance.choice(["val_loss", "reward", "grad_norm", "accuracy"])
            value = self.chance.random()
            try:
                await self.network.signals(process, run, {name: value})
            except (LinkError, Refused):
                continue
            self.count("side signal")
            self.side.setdefault(run, set()).add((name, value))

    async def _weather(self):
        if not self.faults:
            return
        kinds = [
            self._part,
            self._part_all,
            self._lose,
            self._repeat,
            self._slow_network,
            self._fill,
            self._fail_disk,
            self._slow_disk,
            self._crash,
            self._crash,
            self._forget,
        ]
        until = self.loop.now + self.chance.choice([0.5, 2.0, 4.0])
        rough = self.chance.choice([0.1, 0.3])
        storms = set()
        while self.loop.now < until:
            await asyncio.sleep(self.chance.random() * rough)
            kind = self.chance.choice(kinds)
            storm = self.loop.create_task(self._storm(kind, self.chance.choice([0.02, 0.1, 0.5, 1.5])))
            storms.add(storm)
        await asyncio.wait(storms)
        self._clear()

    async def _storm(self, kind, for_s):
        try:
            await kind(for_s * self.chance.random())
        except Broken:
            pass  # the world is over
        except Exception as error:
            self.end("no surprise", f"the weather: {error!r}")

    def _clear(self):
        self.network.calm()
        self.disk.full, self.disk.failing, self.disk.slow_s = False, 0.0, 0.002

    async def _part(self, for_s):
        name = self.chance.choice(self.jobs).plan.name
        self.network.cut.add(name)
        await asyncio.sleep(for_s)
        self.network.cut.discard(name)

    async def _part_all(self, for_s):
        self.network.cut.update(job.plan.name for job in self.jobs)
        await asyncio.sleep(for_s)
        self.network.cut.clear()

    async def _lose(self, for_s):
        self.network.loss = 0.3
        await asyncio.sleep(for_s)
        self.network.loss = 0.0

    async def _repeat(self, for_s):
        self.network.twice, self.network.late = 0.4, 0.3
        await asyncio.sleep(for_s)
        self.network.twice = self.network.late = 0.0

    async def _slow_network(self, for_s):
        self.network.delay_s = 0.3
        await asyncio.sleep(for_s)
        self.network.delay_s = 0.003

    async def _fill(self, for_s):
        self.disk.full = True
        await asyncio.sleep(for_s)
        self.disk.full = False

    async def _fail_disk(self, for_s):
        self.disk.failing = 0.5
        await asyncio.sleep(for_s)
        self.disk.failing = 0.0

    async def _slow_disk(self, for_s):
        self.count("disk slow")
        self.disk.slow_s = 0.2
        await asyncio.sleep(for_s)
        self.disk.slow_s = 0.002

    async def _crash(self, for_s):
        up = [i for i, server in enumerate(self.servers) if server.up]
        if not up:
            return
        at = self.chance.choice(up)
        server = self.servers[at]
        if self.chance.random() < 0.5:  # with something under way
            server.door.expected = self.loop.create_future()
            await asyncio.wait({server.door.expected}, timeout=0.2)
            await asyncio.sleep(self.chance.random() * self.disk.slow_s)
            if not server.up:
                return
        self.count("server crashed")
        if self.chance.random() < 0.3:  # folding everything again takes its time
            judges.live_is_replay(self, server)
        server.crash()
        await asyncio.sleep(for_s)
        self.servers[at] = Server(self)
        await self.servers[at].start()

    async def _forget(self, _):
        self.count("snapshots deleted")
        self.disk.forget_snapshots()


class _Reporter:
    """Who speaks for the reporter, for the network."""

    name = "reporter"

    def __init__(self):
        self.requests = {}


@contextmanager
def _limits(world):
    """Limits that a small world reaches: the same names, smaller numbers."""
    chance = world.chance
    wanted = {
        (client_limits, "FLUSH_OBSERVATIONS"): chance.choice([4, 16, 64]),
        (client_limits, "BATCH_MAX"): chance.choice([5, 32, 1024]),
        (client_limits, "OUTAGE_AFTER_S"): 0.5,
        (client_limits, "BACKOFF_LAST_S"): 0.5,
        (server_limits, "SNAPSHOT_EVERY"): chance.choice([7, 20, 10_000]),
        (server_limits, "LIVE_RUNS_MAX"): chance.choice([1, 100, 100, 100]),
        (server_limits, "INBOX_MAX"): chance.choice([2, 64]),
    }
    before = {(module, name): getattr(module, name) for module, name in wanted}
    for (module, name), value in wanted.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
