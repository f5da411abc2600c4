"""The one journal of a world behind a disk that delays, refuses, fills up, and loses what was under way in a crash.

Rule of this module: it keeps the journal's contract. What it says was written is in the journal, what it calls Busy or
Conflict is not; only of what was under way when a server died nobody is told.
"""

from collections import deque

from flyball_server.core.errors import Busy
from flyball_server.storage.memory import MemoryJournal

#: Appends that may wait at one door.
WAITING_MAX = 32


class Disk:
    """What all servers of a world share. slow_s: the longest a commit takes; full: whether every append is refused;
    failing: the share of commits that fail."""

    def __init__(self, world):
        self.world = world
        self.journal = MemoryJournal()
        self.slow_s = 0.002
        self.full = False
        self.failing = 0.0
        self._results = []
        self.journal.start(self._results.extend)

    def commit(self, append):
        """Write one append now; its error, or None."""
        self.journal.append(append)
        ((_, error),) = self._results
        self._results.clear()
        return error

    def forget_snapshots(self):
        """Snapshots are a cache: all of them may go at any time."""
        self.journal._snapshots.clear()


class Door:
    """One server's connection to the disk: a `Journal`."""

    def __init__(self, disk: Disk):
        self._disk = disk
        self._world = disk.world
        self._deliver = None
        self._waiting = deque()
        self._free_at = 0.0
        self._told_at = 0.0
        self._open = False
        #: Done with the next append: who waits for it wants to crash just then.
        self.expected = None

    def __getattr__(self, name):
        return getattr(self._disk.journal, name)

    def start(self, deliver):
        self._deliver = deliver
        self._open = True

    def close(self):
        self._open = False

    def append(self, append):
        if not self._open or len(self._waiting) >= WAITING_MAX:
            raise Busy("too many appends wait")
        self._waiting.append(append)
        if self.expected is not None and not self.expected.done():
            self.expected.set_result(None)
        loop, chance = self._world.loop, self._world.chance
        self._free_at = max(loop.now, self._free_at) + chance.random() * self._disk.slow_s
        loop.call_at(self._free_at, self._commit)

    def crash(self):
        """The process dies: of the appends under way, in order, the first few were written, and nobody is told."""
        self._open = False
        while self._waiting:
            if self._world.chance.random() < 0.5:
                self._world.count("append lost in a crash", len(self._waiting))
                self._waiting.clear()
                return
            self._world.count("append written, but never told")
            self._disk.commit(self._waiting.popleft())

    def _commit(self):
        if not self._waiting or not self._open:
            return
        world, append = self._world, self._waiting.popleft()
        if self._disk.full:
            world.count("disk full")
            error = Busy("the disk is full", 0.1)
        elif world.chance.random() < self._disk.failing:
            world.count("disk failed")
            error = Busy("the disk failed", 0.1)
        else:
            error = self._disk.commit(append)
            if error is not None:
                world.count("append came second")
        self._told_at = max(world.loop.now, self._told_at) + world.chance.random() * self._disk.slow_s
        world.loop.call_at(self._told_at, self._tell, append, error)

    def _tell(self, append, error):
        if self._open:
            self._deliver([(append, error)])
