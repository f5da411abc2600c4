"""A network that misbehaves on demand: a TCP proxy of the test's own, between a trainer and the server.

Goal: a test says when the network is slow, cut, dead or refusing, and to whom. Method: one thread forwards bytes
between pairs of loopback sockets; what a test asks for is done on that thread before the call returns.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

#: Bytes under way in one direction; more stay with their sender, as on a real network.
UNDER_WAY_MAX = 1 << 18
CONNECTIONS_MAX = 64
_CHUNK = 1 << 14
_DONE_S = 10.0


class _Order(NamedTuple):
    """Something to be done on the proxy's thread."""

    work: Callable[[], None]
    done: threading.Event


class _Way:
    """One direction of a connection: bytes with the time from which they may go on."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.under_way: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.ended = False


class _Pair:
    """A connection through the proxy. lost: it was opened into a black hole, and never leads anywhere."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client, self.server = client, server
        self.lost = server is None
        self.ways = [] if server is None else [_Way(client, server), _Way(server, client)]

    def close(self) -> None:
        """Both sides at once. Nobody is told that more was to come."""
        for each in (self.client, self.server):
            if each is not None:
                # A reset, as from a host that went away; a plain end of stream could pass for a goodbye.
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()


class Proxy:
    """Forwards a loopback port to another one. Begins calm; every method is one kind of weather."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[_Pair] = []
        self._delay_s = 0.0
        self._cut_after: int | None = None
        self._stalled = False
        #: How many connections were cut, or opened into a black hole: a fault that hit nobody proves nothing.
        self.hits = 0
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._bell, self._ear = socket.socketpair()
        self._open = True
        self._thread = threading.Thread(target=self._main, name="proxy", daemon=True)
        self._thread.start()

    def url(self, transport: str) -> str:
        """Where clients find it."""
        return f"{transport}://127.0.0.1:{self.port}"

    def calm(self) -> None:
        """Everything passes again; what was held up goes on. Connections lost in a black hole stay lost."""

        def work() -> None:
            self._delay_s, self._cut_after, self._stalled = 0.0, None, False
            if self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", self.port))

        self._do(work)

    def delay(self, seconds: float) -> None:
        """Each byte arrives so much later."""
        self._do(lambda: setattr(self, "_delay_s", seconds))

    def cut(self, after: int) -> None:
        """Once `after` more bytes have passed, in whichever direction, that connection is gone: in mid-message."""
        self._do(lambda: setattr(self, "_cut_after", after))

    def blackhole(self) -> None:
        """Nothing passes and nothing is said: open connections stall, new ones are accepted and swallowed for good."""
        self._do(lambda: setattr(self, "_stalled", True))

    def refuse(self) -> None:
        """Every connection is reset, and new ones are refused."""

        def work() -> None:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            self._drop(self._pairs)

        self._do(work)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._open:
            self._do(lambda: setattr(self, "_open", False))
            self._thread.join(_DONE_S)

    def _do(self, work: Callable[[], None]) -> None:
        order = _Order(work, threading.Event())
        self._orders.put(order)
        self._bell.send(b"!")
        assert order.done.wait(_DONE_S), "the proxy's thread does not answer"

    # -- the thread ------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._open:
                self._turn()
        finally:
            for pair in self._pairs:
                pair.close()
            for each in (self._listener, self._bell, self._ear):
                if each is not None:
                    each.close()

    def _turn(self) -> None:
        ways = [] if self._stalled else [way for pair in self._pairs for way in pair.ways]
        now = time.monotonic()
        listening = [self._listener] if self._listener and len(self._pairs) < CONNECTIONS_MAX else []
        lost = [pair.client for pair in self._pairs if pair.lost]
        reading = [way.source for way in ways if not way.ended and way.size < UNDER_WAY_MAX]
        writing = [way.target for way in ways if way.under_way and way.under_way[0][0] <= now]
        later = [way.under_way[0][0] - now for way in ways if way.under_way and way.under_way[0][0] > now]
        readable, writable, _ = select.select(
            [self._ear, *listening, *lost, *reading], writing, [], min(later, default=None)
        )
        if self._ear in readable:
            self._ear.recv(_CHUNK)
            while not self._orders.empty():
                order = self._orders.get()
                order.work()
                order.done.set()
            return  # what was selected may be closed by now
        if self._listener in readable:
            self._accept()
        for pair in list(self._pairs):
            try:
                self._forward(pair, readable, writable)
            except OSError:
                self._drop([pair])

    def _accept(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        if self._stalled:
            self.hits += 1
            self._pairs.append(_Pair(client, None))
            return
        try:
            server = socket.create_connection(self._target, timeout=_DONE_S)
        except OSError:  # the server is down: so is this connection
            _Pair(client, None).close()
            return
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append(_Pair(client, server))

    def _forward(self, pair: _Pair, readable: list[socket.socket], writable: list[socket.socket]) -> None:
        if pair.lost and pair.client in readable and not pair.client.recv(_CHUNK):
            raise OSError("the client gave up")
        for way in pair.ways:
            if way.source in readable:
                data = way.source.recv(_CHUNK)
                way.ended = not data
                way.size += len(data)
                if data:
                    way.under_way.append((time.monotonic() + self._delay_s, data))
            if way.target in writable:
                self._write(way)
            if way.ended and not way.under_way:
                raise OSError("one side closed, and everything it said was passed on")

    def _write(self, way: _Way) -> None:
        due, data = way.under_way.popleft()
        if self._cut_after is not None:
            data = data[: self._cut_after]
        sent = way.target.send(data) if data else 0
        way.size -= sent
        if self._cut_after is not None:
            self._cut_after -= sent
            if self._cut_after <= 0:
                self._cut_after = None
                self.hits += 1
                raise OSError("cut")
        if sent < len(data):
            way.under_way.appendleft((due, data[sent:]))

    def _drop(self, pairs: list[_Pair]) -> None:
        for pair in list(pairs):
            pair.close()
            self._pairs.remove(pair)
