"""A value that is still on its way from a device.

Rule of this module: asking never waits. An adapter makes these so that no training thread synchronises a device.
"""

from __future__ import annotations

from typing import Protocol


class Pending(Protocol):
    """A number that was asked for and has not arrived yet."""

    def ready(self) -> bool:
        """Whether the value has arrived."""

    def value(self) -> float:
        """The value; only called once it is ready."""
