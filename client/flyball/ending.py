"""How a governor ends that nobody closes: at the end of the process, or when nothing holds it any more.

Rule of this module: nothing that lives longer than a governor holds it. Its link's thread, its sinks' and what is
registered here know it weakly or not at all, so that it is collected with its optimizer and model.
"""

from __future__ import annotations

import atexit
import time
import weakref
from typing import TYPE_CHECKING

from flyball import limits
from flyball.link import join_abandoned

if TYPE_CHECKING:
    from flyball.governor import Governor


def watch(governor: Governor) -> None:
    """From now on its end is seen to, and it hears what people do to the run."""
    link, shown = governor._link, governor._shown
    held = weakref.ref(governor)

    def noticed(line: str) -> None:
        there = held()
        if there is not None:
            shown.noticed(there._next_step, time.time(), line)

    link.on_notice = noticed
    _governors.add(governor)
    # At the end of the process `_at_exit` closes it; this is for one that is collected before.
    weakref.finalize(governor, link.abandon, governor._close_s, shown.release).atexit = False


_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


def _at_exit() -> None:
    """A script that forgot to close: give the last reports a moment, and leave the run open."""
    for governor in list(_governors):
        if governor._link.is_ours:
            governor._close_s = min(governor._close_s, limits.EXIT_S)
            governor.close("")
    join_abandoned(limits.EXIT_S)


atexit.register(_at_exit)
