"""The one background thread between a session and a transport.

Rule of this module: the training thread is never made to wait longer than it asked for, and nothing raised here
reaches it. The thread is a daemon, ends within a stated time on `close`, and does not survive a fork: in a forked
child the link is silent (a child that wants to be steered attaches itself).
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from flyball import limits
from flyball.errors import LinkError, Refused
from flyball.session import Session
from flyball.wire import Advice, Attach, Attached, Report

log = logging.getLogger("flyball")


class Transport(Protocol):
    """One connection. Every method may raise LinkError (try again) or Refused (do not)."""

    def attach(self, message: Attach) -> Attached:
        """Connect if need be, and open or resume the conversation."""

    def report(self, message: Report) -> Advice:
        """Send one report and wait for its answer."""

    def close(self) -> None:
        """Let go of the connection. May be called from any thread, to end a call that is under way, and twice."""


class Link:
    """Keeps one session connected. `connect` makes a transport without touching the network."""

    def __init__(self, session: Session, connect: Callable[[], Transport]) -> None:
        self._session = session
        self._connect = connect
        self._transport: Transport | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        #: Where nobody holds the governor any more: until when what waits may still be delivered, and what comes then.
        self._until: float | None = None
        self._then: Callable[[], None] = lambda: None
        #: Whether the log was told that the service cannot be reached.
        self._told_lost = False
        self._pid = os.getpid()
        self._wake = threading.Event()
        self._changed = threading.Condition()
        #: Called with each line about what people did to the run.
        self.on_notice: Callable[[str], None] = lambda line: None
        _links.add(self)

    def start(self) -> None:
        """Start the thread, if it is not running and this is the process that made the link."""
        if self._thread is None and not self._closing and os.getpid() == self._pid:
            self._thread = threading.Thread(target=self._main, name="flyball-link", daemon=True)
            self._thread.start()

    @property
    def is_ours(self) -> bool:
        """False in a forked child, where this link must stay silent."""
        return self._thread is not None and os.getpid() == self._pid

    def wake(self) -> None:
        """Something is to be sent."""
        self._wake.set()

    def wait(self, done: Callable[[], bool], budget_s: float | None, waiting_for: str) -> bool:
        """Wait until `done()`, at most `budget_s` seconds (None: as long as it takes, with a log line now and then).

        Returns what `done()` said last. Ends early where no answer can come any more.
        """
        started = time.monotonic()
        logged = started
        self._session.hurry()
        self.wake()
        while not done():
            now = time.monotonic()
            left = limits.WAIT_LOG_S if budget_s is None else started + budget_s - now
            if left <= 0 or not self.is_ours or self._session.state in ("refused", "superseded", "closed"):
                return False
            if budget_s is None and now - logged >= limits.WAIT_LOG_S:
                logged = now
                log.warning(
                    "flyball: has waited %.0f s for %s (%s)", now - started, waiting_for, self._session.last_error
                )
            with self._changed:
                if not done():
                    self._changed.wait(min(left, 0.05))
        return True

    def restart(self) -> None:
        """Begin the conversation anew, after the session's Attach has changed."""
        self._drop_transport()
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        self.start()
        self.wake()

    def close(self, within_s: float) -> bool:
        """Send what waits, then end the thread, all within the stated time. Returns whether everything was sent."""
        if not self.is_ours:
            return self._session.drained
        deadline = time.monotonic() + within_s
        done = self.wait(lambda: self._session.drained, within_s, "the last report")
        self._closing = True
        self._wake.set()
        self._drop_transport()
        if self._thread is not None:
            self._thread.join(max(0.1, deadline - time.monotonic()))
        self._session.close()
        return done

    def abandon(self, within_s: float, then: Callable[[], None]) -> None:
        """Nobody holds the governor any more: let the thread send what waits, end within the stated time, call `then`,
        and leave the run open. Called while garbage is collected, so it takes no lock and waits for nothing: the
        thread looks by itself."""
        self._then, self._until = then, time.monotonic() + within_s

    def join(self, within_s: float) -> None:
        """Give a thread that was abandoned that much time, at most."""
        if self.is_ours and self._thread is not None and self._until is not None:
            self._thread.join(within_s)

    @property
    def _over(self) -> bool:
        until = self._until
        return self._closing or (until is not None and (self._session.drained or time.monotonic() >= until))

    def _main(self) -> None:
        try:
            self._keep_connected()
        finally:
            if self._until is not None and not self._closing:
                self._session.close()
                self._then()

    def _keep_connected(self) -> None:
        pause = limits.BACKOFF_FIRST_S
        while not self._over:
            session = self._session
            attach = session.attach
            try:
                transport = self._transport = self._connect()
                attached = transport.attach(attach)
                session.on_attached(attached, attach, time.monotonic())
                self._tell()
                self._found()
                pause = limits.BACKOFF_FIRST_S
                self._talk(transport, attach)
                continue
            except Exception as error:
                if session.attach.session != attach.session:
                    continue  # the session was re-attached, and the connection cut under this call
                if isinstance(error, Refused) and session.begin_instead(error.code):
                    continue
                if self._is_final(error):
                    return
                pause = max(pause, getattr(error, "retry_after_s", 0.0))
            finally:
                self._drop_transport()
            # Jitter, so that a thousand jobs do not come back in the same moment.
            self._pause(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, limits.BACKOFF_LAST_S)

    def _is_final(self, error: Exception) -> bool:
        """Tell the session; whether trying again makes no sense. A bug here must never end the training job."""
        session = self._session
        if isinstance(error, Refused):
            session.on_refused(error.code, str(error), time.monotonic())
            log.error("flyball: the service refused run %r: %s", session.attach.run, error)
        else:
            self._lost(str(error) if isinstance(error, LinkError) else f"{type(error).__name__}: {error}")
        self._tell()
        return isinstance(error, Refused)

    def _talk(self, transport: Transport, attach: Attach) -> None:
        """Send reports until the connection fails, the session is re-attached, or the link closes."""
        session = self._session
        while not self._over and session.attach.session == attach.session:
            report = session.report(time.monotonic())
            if report is None:
                self._wake.wait(session.pause(time.monotonic()))
                self._wake.clear()
                continue
            try:
                advice = transport.report(report)
            except Refused as error:
                if error.code != "invalid":
                    if error.code == "not_found":
                        raise LinkError(f"the service does not know the run any more: {error}") from error
                    raise
                log.error("flyball: the service dropped a report of run %r: %s", attach.run, error)
                session.on_rejected(str(error))
                return  # a refusal ends a gRPC stream: on to a new one
            session.on_advice(advice, time.monotonic())
            for line in session.notices():
                log.warning("flyball: %s", line)
                self.on_notice(line)
            self._tell()

    def _lost(self, error: str) -> None:
        session = self._session
        if session.state == "steering" or not session.last_error:
            log.warning("flyball: no link to the service (%s); training goes on, and so do the attempts", error)
            self._told_lost = True
        session.on_lost(error, time.monotonic())

    def _found(self) -> None:
        if self._told_lost:
            self._told_lost = False
            log.warning("flyball: the service is back; what waited goes to it now")

    def _pause(self, seconds: float) -> None:
        """Sleep, but keep the outage clock ticking and end at once on close."""
        until = time.monotonic() + seconds
        while not self._over and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
            self._session.tick(time.monotonic())

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _drop_transport(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            try:
                transport.close()
            except Exception as error:
                log.debug("flyball: closing the connection failed: %s", error)

    def _after_fork(self) -> None:
        """In the child: forget the thread, which was not copied, and every lock it may have held. The connection is
        the parent's: it is neither used nor let go of (destroying a gRPC channel here can crash the child)."""
        _parents.append(self._transport)
        self._thread = None
        self._transport = None
        self._closing = True
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._session.after_fork()


#: In a forked child: the parent's connections.
_parents: list[Transport | None] = []
_links: weakref.WeakSet[Link] = weakref.WeakSet()


def join_abandoned(within_s: float) -> None:
    """Give links whose governors are gone a moment to deliver what waits."""
    until = time.monotonic() + within_s
    for link in list(_links):
        link.join(max(0.0, until - time.monotonic()))


def _silence_child() -> None:
    for link in list(_links):
        link._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silence_child)
