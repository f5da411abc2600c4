"""Where else a run is shown: TensorBoard, W&B, MLflow, Aim or any `Sink` gets the settings that were applied and
markers of what moved them.

Rule of this module: a sink may block or fail, and training does not notice. Each has a daemon thread and a bounded
queue of its own; what it is too slow for is dropped oldest first, and counted.

The training thread only puts what changed into the queues. Settings are told as a step changes them, at both of its
ends, and once in AGAIN_STEPS, so that a chart that joins the points is right. A streak of moves under one and the same
code is marked once, where it begins. In a forked child nothing is shown.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flyball import limits
from flyball.wire import Settings

if TYPE_CHECKING:
    pass

log = logging.getLogger("flyball")


class Marker(NamedTuple):
    """Something to be marked on a chart. kind: "decision", "conflict" or "command"; code: the decision's, for machines;
    text: for people."""

    kind: str
    code: str
    text: str


class Sink(Protocol):
    """What shows a run elsewhere. All calls come from one thread, in order; they may block and may raise.

    step: the run's own count of optimizer steps. at: when that was, in seconds since 1970.
    """

    def settings(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """What optimizer step `step` used, by name: "lr/GROUP", "momentum/GROUP", "noise_std/GROUP", "control/NAME".
        Only what changed, or is told again."""

    def marker(self, step: int, at: float, marker: Marker) -> None:
        """A marker at a step."""

    def close(self) -> None:
        """The last call: deliver what waits, and let go of what this sink opened itself."""


class Counted(Protocol):
    """What is asked of the session: see `session.Session`."""

    def number(self, step: int) -> int | None: ...
    def told(self) -> tuple[int, str, str]: ...


class Applied(NamedTuple):
    """What one optimizer step used."""

    used: Settings
    controls: Mapping[str, float]


class Shown:
    """All sinks of one governor: the training thread's part. Steps are the job's own count here."""

    def __init__(self, sinks: Sequence[Sink], session: Counted, groups: Sequence[str]) -> None:
        self._session = session
        self._feeds = [Feed(sink, groups) for sink in sinks]
        self._moved: Settings | None = None
        self._moved_at = -1
        self._code = ""
        self._last: Applied | None = None
        #: The step at which what is in force is told again.
        self.again_at = 0 if sinks else inf

    def applied(
        self,
        step: int,
        at: float,
        used: Settings,
        wanted: Settings | None,
        controls: Mapping[str, float],
        conflict: str,
    ) -> None:
        """What optimizer step `step` used; called where that changed, and at `again_at`."""
        if not self._feeds:
            return
        number = self._session.number(step)
        if number is None:
            self.again_at = step + 1
            return
        self.again_at = step + limits.SINK_AGAIN_STEPS
        self._last = Applied(used, controls)
        self._put(number, at, self._last)
        if wanted is not None and wanted != self._moved:
            self._decided(number, at, wanted)
        if conflict:
            self._put(number, at, Marker("conflict", "conflict", conflict))

    def noticed(self, step: int, at: float, line: str) -> None:
        """What people did to the run. From the link's thread."""
        number = self._session.number(step)
        if number is not None:
            self._put(number, at, Marker("command", "command", line))

    def end(self, step: int, at: float) -> None:
        """`step` was the last one: tell what it used, and let the feeds finish what waits."""
        number = self._session.number(step)
        if number is not None and self._last is not None:
            self._put(number, at, self._last)
        self.release()

    def release(self) -> None:
        """Let the feeds finish what waits, and end."""
        for feed in self._feeds:
            feed.end()

    def wait(self, within_s: float) -> None:
        """Give the feeds that much time, at most; whoever is not done then is left behind."""
        share = within_s / max(1, len(self._feeds))
        for feed in self._feeds:
            if not feed.wait(share):
                log.warning("flyball: %s was left behind with %d entries", feed.name, feed.waiting)

    @property
    def lost(self) -> int:
        """How many entries were dropped or failed, over all sinks."""
        return sum(feed.lost for feed in self._feeds)

    def _decided(self, step: int, at: float, wanted: Settings) -> None:
        """Mark a move, unless it goes on with a streak: under the same code as the answer before."""
        began = self._moved is None
        answers, code, reason = self._session.told()
        streak = answers - self._moved_at <= 1 and code == self._code
        self._moved, self._moved_at, self._code = wanted, answers, code
        if not (streak or began):
            self._put(step, at, Marker("decision", code, reason or code))

    def _put(self, step: int, at: float, what: Applied | Marker) -> None:
        for feed in self._feeds:
            feed.put((step, at, what))


class Feed:
    """One sink with its thread, which starts with the first entry."""

    def __init__(self, sink: Sink, groups: Sequence[str]) -> None:
        self.name = type(sink).__name__
        self.lost = 0
        self._sink = sink
        self._groups = tuple(groups)
        self._queue: deque[tuple[int, float, Applied | Marker]] = deque()
        self._wake = threading.Event()
        self._ending = False
        self._failed = False
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        #: What the sink was told last, and for which step.
        self._values: dict[str, float] = {}
        self._step = -1

    @property
    def waiting(self) -> int:
        """Entries that the sink has not taken yet."""
        return len(self._queue)

    def put(self, entry: tuple[int, float, Applied | Marker]) -> None:
        """Never waits."""
        if self._ending or os.getpid() != self._pid:
            return
        if len(self._queue) >= limits.SINK_QUEUE_MAX:
            self._drop()
        self._queue.append(entry)
        self._start()

    def end(self) -> None:
        """Finish what waits, then close the sink."""
        if os.getpid() != self._pid or self._ending:
            return
        self._ending = True
        self._start()

    def wait(self, within_s: float) -> bool:
        """Whether it is done within the time."""
        if os.getpid() != self._pid or self._thread is None:
            return True
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"flyball-{self.name}", daemon=True)
            self._thread.start()
        self._wake.set()

    def _drop(self) -> None:
        try:
            self._queue.popleft()
            self.lost += 1
        except IndexError:  # the sink was faster
            pass

    def _main(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending  # asked before the queue is emptied: nothing comes after it
            while True:
                try:
                    step, at, what = self._queue.popleft()
                except IndexError:
                    break
                self._safely(self._show, step, at, what)
            if ending:
                self._safely(self._sink.close)
                return

    def _show(self, step: int, at: float, what: Applied | Marker) -> None:
        if isinstance(what, Marker):
            self._sink.marker(step, at, what)
            return
        if step < self._step:  # the job went back to a checkpoint
            self._values = {}
        told, last = self._values, self._step
        values = named(what.used, self._groups, what.controls)
        changed = {name: value for name, value in values.items() if told.get(name) != value}
        before = {name: told[name] for name in changed if name in told}
        self._values, self._step = {**told, **values}, step
        if before and last < step - 1:
            self._sink.settings(step - 1, at, before)
        if changed or values:
            self._sink.settings(step, at, changed or values)

    def _safely(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # whatever a sink's library does must not end its feed, let alone the job
            self.lost += 1
            if not self._failed:
                self._failed = True
                log.warning("flyball: %s failed, and is tried on: %s: %s", self.name, type(error).__name__, error)


def named(used: Settings, groups: Sequence[str], controls: Mapping[str, float]) -> dict[str, float]:
    """Settings by name; what could not be read (a device's, say) is left out."""
    values = {
        f"{kind}/{group}": value
        for kind, row in used._asdict().items()
        if row is not None
        for group, value in zip(groups, row, strict=False)
        if value is not None
    }
    values |= {f"control/{name}": value for name, value in controls.items()}
    return {name: value for name, value in values.items() if isfinite(value)}
