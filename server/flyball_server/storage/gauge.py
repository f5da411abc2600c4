"""How full a store is: the bytes it takes, the bytes it may take, and what is left of the disk.

Rule of this module: it is asked before every commit, so it asks for nothing that the limits do not need; a measure
costs some microseconds.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from typing import Any

from flyball_server import limits
from flyball_server.storage.journal import Usage

_log = logging.getLogger(__name__)


class Gauge:
    """The limits of one SQLite file. The writer's thread uses it, but for `usage`."""

    def __init__(self, path: str, bytes_max: int | None, disk_free_min: int) -> None:
        self._path = path
        self._folder = os.path.dirname(os.path.abspath(path))
        self._bytes_max = bytes_max
        self._disk_free_min = disk_free_min
        self._state = "ok"
        self._log_left = 0

    def full(self, connection: Any) -> str:
        """Why nothing may be appended now, "" where it may. A change is logged once. connection: the driver's own."""
        if self._bytes_max is None and self._disk_free() >= limits.DISK_NEARLY_FULL * self._disk_free_min:
            usage = None
        else:
            usage = self.measure(connection)
            if self._must_cut_back(usage):
                # What the log holds stands in the file, too, once it is written there.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._log_left = self._log()
                usage = self.measure(connection)
        state = "ok" if usage is None else usage.state
        if state != self._state:
            self._state = state
            if usage is None or state == "ok":
                _log.info("%s has room again", self._path)
            else:
                _log.warning("%s: %s", self._path, usage.words)
        return usage.words if usage is not None and state == "full" else ""

    def usage(self, connection: Any) -> Usage:
        """What the file takes now, for people, from any thread. It is not full while there is a log to cut back."""
        usage = self.measure(connection)
        if usage.state == "full" and self._state != "full" and self._log() > self._log_left:
            return usage._replace(state="nearly_full")
        return usage

    def measure(self, connection: Any) -> Usage:
        """What the file takes now, and what that means."""
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        used, disk_free = (pages - free) * size + self._log(), self._disk_free()
        # Free pages inside the file are room on the disk, as long as the log has some, too.
        room = disk_free + free * size if disk_free > self._disk_free_min // 4 else disk_free
        state, words = self._judged(used, room, disk_free)
        return Usage(used, self._bytes_max, disk_free, self._disk_free_min, state, words)

    def _must_cut_back(self, usage: Usage) -> bool:
        log = self._log()
        if log <= self._log_left:  # a reader held it, and nothing was written since
            return False
        return usage.state == "full" or log >= limits.ROOM_AGAIN * (self._bytes_max or math.inf)

    def _log(self) -> int:
        try:
            return os.stat(self._path + "-wal").st_size
        except OSError:  # there is none where nothing was written
            return 0

    def _disk_free(self) -> int:
        return shutil.disk_usage(self._folder).free

    def _judged(self, used: int, room: int, disk_free: int) -> tuple[str, str]:
        most, least = self._bytes_max, self._disk_free_min
        remedy = "delete runs (`flyball delete`), or stop the service for `flyball-server compact`"
        for state, share, times in (("full", 1.0, 1.0), ("nearly_full", limits.NEARLY_FULL, limits.DISK_NEARLY_FULL)):
            what = "is full" if state == "full" else "is nearly full"
            if state == self._state == "nearly_full":
                share, times = share - limits.ROOM_AGAIN, times * (1 + limits.ROOM_AGAIN)
            if most is not None and used >= share * most:
                return state, f"the store {what}: {used} of {most} bytes; {remedy}, or raise --store-bytes-max"
            if room < times * least:
                return state, (
                    f"the store's disk {what}: {disk_free} bytes are free, where {least} are kept free; "
                    f"make room on it, {remedy}"
                )
        return "ok", ""
