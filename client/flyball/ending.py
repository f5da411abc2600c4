"""How a governor ends that nobody closes: at the end of the process, or when nothing holds it any more.

Rule of this module: nothing that lives longer than a governor holds it. Its link's thread, its sinks' and what is
registered here know it weakly or not at all, so that it is collected with its optimizer and model.
"""

from __future__ import annotations

import atexit
import re
import weakref
from typing import TYPE_CHECKING

from flyball import limits
from flyball.link import join_abandoned

if TYPE_CHECKING:
    from flyball.governor import Governor
    from flyball.sides import Side


def watch(governor: Governor) -> None:
    """From now on its end is seen to, and it hears what people do to the run."""
    link, shown = governor._link, governor._shown
    held = weakref.ref(governor)

    def noticed(line: str) -> None:
        there = held()
        if there is not None:
            there._noticed(line)

    link.on_notice = noticed
    _governors.add(governor)
    # At the end of the process `_at_exit` closes it; this is for one that is collected before.
    weakref.finalize(governor, link.abandon, governor._close_s, shown.release).atexit = False


def midway(session: Side) -> str:
    """What a range test leaves behind if the job ends now; "" where none is under way."""
    _, code, _ = session.told()
    if not _UNDER_WAY.search(code):
        return ""
    return "a range test is under way, and the job has not gone back: the model is as the sweep has left it"


#: The codes of a sweep, and of one that is over where the job has yet to go back.
_UNDER_WAY = re.compile(r"\brange_(begun|sweep|found|nothing|returning)\b")

_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


def _at_exit() -> None:
    """A script that forgot to close: give the last reports a moment, and leave the run open."""
    for governor in list(_governors):
        if governor._link.is_ours:
            governor._close_s = min(governor._close_s, limits.EXIT_S)
            governor.close("")
    join_abandoned(limits.EXIT_S)


atexit.register(_at_exit)
