"""How every adapter's `attach` ends: options checked, a session connected or shared with other ranks, a governor made.

Rule of this module: everything that can be refused is refused here, before training has begun.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flyball.connect import connect
from flyball.governor import Governor
from flyball.optimizer import Optimizer
from flyball.options import checked
from flyball.ranks import across, refusing
from flyball.sides import Line, Side
from flyball.sinks import Shown
from flyball.wire import Group

log = logging.getLogger("flyball")


def govern(optimizer: Optimizer, groups: tuple[Group, ...], options: Mapping[str, Any]) -> Governor:
    """What every adapter's `attach` ends with: a governor of its optimizer, whose groups are declared as given.

    options: see `flyball.options.Options`. Raises what `attach` says it raises.
    """
    with refusing(options):
        whole = checked(options)
    exchange = across(whole["ranks"])
    session: Side
    link: Line
    if exchange is None:
        session, link = connect(groups, whole)
    else:
        from flyball.sharing.attach import share

        session, link = share(exchange, groups, whole)
    # What the run has recorded counts, where the service has answered.
    if whole["mode"] == "absolute" and not any(session.reference):
        log.warning(
            "flyball: the learning rate of every group is 0, and so is any factor of it: nothing will train. Give the "
            "optimizer its learning rate before attach"
        )
    return Governor(
        optimizer,
        session,
        link,
        wait_s=whole["wait_s"],
        close_s=whole["close_s"],
        accumulate=whole["accumulate"],
        shown=Shown(whole["report_to"], session, [group.name for group in groups]),
    )


@contextmanager
def closing(governor: Governor) -> Iterator[None]:
    """What fails here, before `attach` returns, leaves no run behind that counts as running."""
    try:
        yield
    except BaseException:
        governor.close("failed")
        raise
