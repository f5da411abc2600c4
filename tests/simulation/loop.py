"""An asyncio event loop without clock, sockets and threads: time jumps to whatever is due next.

Rule of this module: callbacks run in an order that depends on nothing but what was asked for, and when.
"""

import asyncio
from asyncio.base_events import BaseEventLoop
from random import Random


class Stuck(Exception):
    """Nothing is due any more, and somebody still waits."""


class _Idle:
    """In place of the selector: waiting for sockets is letting the time pass."""

    def __init__(self, loop):
        self._loop = loop

    def select(self, timeout):
        if timeout is None:
            raise Stuck("nothing is due any more, and somebody still waits")
        self._loop.now += timeout
        return []


class VirtualLoop(BaseEventLoop):
    """`now` is the time in seconds. Work for other threads is done here, `slow()` seconds after it was asked for."""

    def __init__(self, chance: Random):
        super().__init__()
        self.now = 1000.0
        self._selector = _Idle(self)
        self._chance = chance
        self.slow = lambda: 0.0

    def time(self):
        return self.now

    def run_in_executor(self, executor, func, *args):
        """What `asyncio.to_thread` calls. The work is done at once or when its time is over: both can happen."""
        future = self.create_future()
        early, delay_s = self._chance.random() < 0.5, self.slow()
        outcome = _tried(func, args) if early else None

        def finish():
            if not future.cancelled():
                value, error = outcome or _tried(func, args)
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)

        self.call_later(delay_s, finish)
        return future

    def _process_events(self, event_list):
        pass

    def _write_to_self(self):
        pass


def _tried(func, args):
    try:
        return func(*args), None
    except Exception as error:
        return None, error


def run(loop: VirtualLoop, work):
    """Run `work` to its end and leave nothing behind; its result."""
    try:
        return loop.run_until_complete(work)
    finally:
        try:
            loop.run_until_complete(_end(loop))
        finally:
            loop.close()


async def _end(loop):
    """Whoever is still at something stops."""
    left = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
