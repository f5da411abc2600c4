"""The arms of a canary side by side: what became of the loss in each run since the switch, and what went wrong there.

Rule of this module: it describes and does not judge. Runs got into an arm by chance, so the arms differ by nothing but
the switch and that chance; how large that chance is, only the number of runs can tell, and every number comes with it.

**Smoothed loss**: the median of CANARY_WINDOW observations; before: the last ones up to the switch, now: the newest.
**Spike**: a loss that is not finite, or above the median of the CANARY_WINDOW observations before it by more than
SPIKE_SPREADS of their scaled median absolute deviations and by SPIKE_SHARE of that median; several in a row count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyball_server import limits, queries
from flyball_server.core.events import Spec
from flyball_server.core.run import Run
from flyball_server.storage.journal import Reading

Floats = NDArray[np.float64]
#: How far from the median a spike is, in median absolute deviations scaled to a normal's standard deviation; and as a
#: share of the median.
SPIKE_SPREADS, SPIKE_SHARE = 6.0, 0.1
_SCALE = 1.4826
#: Fewer losses than this before the switch or since say nothing about a change.
_FEWEST = limits.CANARY_WINDOW // 4
#: With fewer runs in an arm, chance alone easily puts one arm's quartiles beside the other's.
ENOUGH = 8


class Measured(NamedTuple):
    """One run since the switch. change: of the smoothed loss, relative; None: too few losses, or it was 0."""

    run: str
    status: str
    steps: int
    change: float | None
    spikes: int
    guard: int
    conflicts: int


def measured(journal: Reading, spec: Spec, run: Run, seq: int, step: int) -> Measured:
    """A run since its row `seq` and its step `step`."""
    guard = conflicts = 0
    for row in journal.rows(spec.run, after=seq):
        conflicts += len(row.meta.get("conflicts", ()))
        guard += sum(1 for _, _, code, note, *_ in row.meta.get("marks", ()) if note and not code.startswith("command"))
    steps, losses = queries.signal(journal, spec, run, "loss")
    cut = int(np.searchsorted(steps, step, "right"))
    since = losses[max(cut, len(losses) - limits.CANARY_LOSSES_MAX) :]
    context = losses[: len(losses) - len(since)][-limits.CANARY_WINDOW :]
    return Measured(
        run=spec.run,
        status=run.status,
        steps=run.through - step,
        change=_change(losses[:cut], losses[cut:]),
        spikes=spikes(context, since),
        guard=guard,
        conflicts=conflicts,
    )


def _change(before: Floats, since: Floats) -> float | None:
    old, new = (part[-limits.CANARY_WINDOW :] for part in (before, since))
    old, new = old[np.isfinite(old)], new[np.isfinite(new)]
    if min(len(old), len(new)) < _FEWEST:
        return None
    was, now = float(np.median(old)), float(np.median(new))
    return None if was == 0 else (now - was) / abs(was)


def spikes(context: Floats, since: Floats) -> int:
    """How many spikes there are in `since`, behind `context`."""
    window = limits.CANARY_WINDOW
    every = np.concatenate([context, since])
    usable = np.isfinite(every)
    # What is no number is left out of what a number is compared with: the one before stands in.
    place = np.maximum.accumulate(np.where(usable, np.arange(len(every)), 0))
    filled = np.where(usable[place], every[place], 0.0) if len(every) else every
    jumps = ~usable
    if len(every) > window:
        before = np.lib.stride_tricks.sliding_window_view(filled, window)[:-1]
        middle = np.median(before, axis=1)
        spread = np.median(np.abs(before - middle[:, None]), axis=1) * _SCALE
        far = np.maximum(SPIKE_SPREADS * spread, SPIKE_SHARE * np.abs(middle))
        jumps[window:] |= filled[window:] > middle + far
    jumps = jumps[len(context) :]
    return int(np.count_nonzero(jumps & ~np.concatenate([[False], jumps[:-1]]))) if len(jumps) else 0


def arm(found: Sequence[Measured], runs: int) -> dict[str, Any]:
    """What there is to say of an arm of so many runs, of which `found` were measured."""
    changes = np.array([one.change for one in found if one.change is not None])
    quartiles = np.quantile(changes, (0.25, 0.5, 0.75)).tolist() if len(changes) else (None, None, None)
    return {
        "runs": runs,
        "measured": len(found),
        "status": dict(sorted(Counter(one.status for one in found).items())),
        "steps": float(np.median([one.steps for one in found])) if found else None,
        "loss_change": dict(zip(("q1", "median", "q3"), quartiles, strict=True)) | {"n": len(changes)},
        "spikes": sum(one.spikes for one in found),
        "guard": sum(one.guard for one in found),
        "conflicts": sum(one.conflicts for one in found),
    }


def words(members: dict[str, Any], controls: dict[str, Any]) -> list[str]:
    """What the comparison can and cannot say, in sentences."""
    n, m = members["loss_change"]["n"], controls["loss_change"]["n"]
    out = ["Which run is in which arm was decided by a hash of its name, and by nothing about the run."]
    if not n or not m:
        out.append("No comparison of the loss yet: an arm has no run with enough losses before the switch and since.")
        return out
    if min(n, m) < ENOUGH:
        out.append(f"With {n} and {m} runs this shows gross harm at most: give each arm {ENOUGH} or more.")
    apart = (
        members["loss_change"]["q3"] < controls["loss_change"]["q1"]
        or members["loss_change"]["q1"] > controls["loss_change"]["q3"]
    )
    middle = "lie apart" if apart else "overlap"
    out.append(f"The middle halves of the two arms' loss changes {middle}. This is a description, not a test.")
    out.append("Losses of different tasks are compared by their relative change only; steps since then may differ.")
    return out
