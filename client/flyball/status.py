"""What a governor tells about itself."""

from __future__ import annotations

from typing import NamedTuple

from flyball.wire import Settings


class Status(NamedTuple):
    """What `governor.status` tells.

    state: connecting, steering, away, refused, superseded or closed. attempt, step: where the job is; `step` is the
    next optimizer step. through: the newest step in the service's journal (-1: none). waiting: observations not
    acknowledged yet. dropped: observations and receipts lost to the buffers' limits or refused as invalid.
    should_stop, stop_reason: whether training should end here, and why ("" where not).
    outage: whether `on_outage` is in force. circuit_open: whether steps have stopped waiting (lag=k). stale_s:
    seconds since the service last answered (None: it never did). settings: the newest ones received.
    bad_values: values that were no numbers and were recorded as not measured. skipped: calls of `step` without an
    optimizer step. missed: steps whose decision was not there within the budget. conflicts: how often somebody else
    had written a learning rate. added_us: mean time a step spends in Flyball on the training thread, without
    waiting; waited_s: time spent waiting for decisions, in all. unshown: entries that the sinks of `report_to` were too
    slow for, or failed on.
    """

    run: str
    state: str
    attempt: int | None
    step: int
    through: int
    waiting: int
    dropped: int
    outage: bool
    circuit_open: bool
    stale_s: float | None
    settings: Settings | None
    decision: str
    reason: str
    last_error: str
    bad_values: int
    skipped: int
    missed: int
    conflicts: int
    should_stop: bool
    stop_reason: str
    added_us: float
    waited_s: float
    unshown: int = 0
