"""What `flyball.link` does between a session and a transport, as a coroutine in virtual time.

Rule of this module: it calls the session as the real link does, in the same order, and knows no more than that.
"""

import asyncio

from tests.simulation.judges import Broken

from flyball import limits
from flyball.errors import LinkError, Refused


class Link:
    """Keeps one session connected. `process` is who speaks, for the network; it is told of acknowledgements."""

    def __init__(self, world, session, process):
        self._world = world
        self._session = session
        self._process = process
        self._wake = asyncio.Event()
        self._told = []
        self._task = None
        #: Answers that came, whatever they said.
        self.answers = 0

    def start(self):
        if self._task is None or self._task.done():
            self._task = self._world.loop.create_task(self._guarded())

    def restart(self):
        """The connection is cut; an answer that is on its way may still come in between."""
        if self._world.chance.random() < 0.5:
            self.stop()
        self.start()
        self._wake.set()

    def stop(self):
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def wake(self):
        self._wake.set()

    async def wait(self, done, budget_s):
        """As the real one: wait until `done()`, at most `budget_s`; what `done()` said last."""
        loop, session = self._world.loop, self._session
        until = None if budget_s is None else loop.now + budget_s
        session.hurry()
        self.wake()
        while not done():
            left = 10.0 if until is None else until - loop.now
            if left <= 1e-9 or session.state in ("refused", "superseded", "closed"):
                return False
            told = loop.create_future()
            self._told.append(told)
            timer = loop.call_later(left, _set, told)
            try:
                await told
            finally:
                timer.cancel()
        return True

    async def _guarded(self):
        try:
            await self._main()
        except Broken:
            pass  # the world is over
        except Exception as error:
            self._world.end("no surprise", f"the link of {self._process.name}: {error!r}")

    async def _main(self):
        session, world = self._session, self._world
        pause = limits.BACKOFF_FIRST_S
        while True:
            attach = session.attach
            try:
                attached = await world.network.attach(self._process, attach)
                session.on_attached(attached, attach, world.loop.now)
                self.answers += 1
                self._tell()
                pause = limits.BACKOFF_FIRST_S
                await self._talk(attach)
                continue
            except (LinkError, Refused) as error:
                if session.attach.session != attach.session:
                    continue
                if isinstance(error, Refused):
                    session.on_refused(error.code, str(error), world.loop.now)
                    world.note(self._process.name, f"{session.state}: {error}")
                    self._tell()
                    return
                session.on_lost(str(error), world.loop.now)
                world.note(self._process.name, f"lost: {error}")
                self._tell()
                pause = max(pause, error.retry_after_s)
            await self._pause(pause * world.chance.uniform(0.5, 1.0))
            pause = min(2 * pause, limits.BACKOFF_LAST_S)

    async def _talk(self, attach):
        session, loop = self._session, self._world.loop
        while session.attach.session == attach.session:
            report = session.report(loop.now)
            if report is None:
                await self._sleep(session.pause(loop.now))
                continue
            try:
                advice = await self._world.network.report(self._process, report)
            except Refused as error:
                if error.code != "invalid":
                    if error.code == "not_found":
                        raise LinkError("the service does not know the run any more") from error
                    raise
                session.on_rejected(str(error))
                self._process.rejected(report, error)
                return
            session.on_advice(advice, loop.now)
            self.answers += 1
            self._process.acknowledged(report, advice)
            self._tell()

    async def _sleep(self, seconds):
        """Until woken, at most so long."""
        if not self._wake.is_set():
            timer = self._world.loop.call_later(seconds, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
        self._wake.clear()

    async def _pause(self, seconds):
        until = self._world.loop.now + seconds
        while (left := until - self._world.loop.now) > 1e-9:
            await asyncio.sleep(min(left, 0.1))
            self._session.tick(self._world.loop.now)

    def _tell(self):
        told, self._told = self._told, []
        for future in told:
            _set(future)


def _set(future):
    if not future.done():
        future.set_result(None)
