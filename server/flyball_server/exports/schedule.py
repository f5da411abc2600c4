"""The learning rates that a run really had, as a schedule that needs no service.

Rule of this module: receipts only. What was decided and not applied is in no schedule.
"""

from __future__ import annotations

from typing import Any

from flyball_server.core.errors import Invalid
from flyball_server.core.events import Spec
from flyball_server.core.run import Run
from flyball_server.exports.table import Receipts, line
from flyball_server.queries import plain
from flyball_server.storage.journal import Journal


def schedule(journal: Journal, spec: Spec, run: Run, attempt: int | None) -> dict[str, Any]:
    """{"run", "attempt", "steps", "groups": {name: {"reference_lr", "from_step", "lr"}}} of an attempt's line.

    lr[i] holds from from_step[i] until from_step[i + 1]; before the first of them the group has reference_lr. A group
    whose momentum was steered has "momentum" beside "lr". Raises Invalid where nothing was applied, NotFound for an
    attempt that is not known.
    """
    found = line(journal, spec, run, attempt)
    if not found.receipts.steps:
        raise Invalid(f"run {spec.run}: nothing was applied in attempt {found.attempt} yet, so there is no schedule")
    groups = {}
    for i, group in enumerate(spec.groups):
        own = group.betas[0] if group.betas is not None else group.momentum
        steered = own is not None and any(
            found.receipts.value(("momentum", i), at) not in (None, own) for at in range(len(found.receipts.steps))
        )
        groups[group.name] = {"reference_lr": group.lr, **_changes(found.receipts, i, momentum=steered)}
    steps = max(found.steps, found.receipts.steps[-1] + 1)
    return {"run": spec.run, "attempt": found.attempt, "steps": steps, "groups": groups}


def _changes(receipts: Receipts, group: int, *, momentum: bool) -> dict[str, list[Any]]:
    """The steps from which a group's settings were others, and these."""
    kinds = ("lr", "momentum") if momentum else ("lr",)
    out: dict[str, list[Any]] = {"from_step": [], **{kind: [] for kind in kinds}}
    newest: list[Any] | None = None
    for at, step in enumerate(receipts.steps):
        if at + 1 < len(receipts.steps) and receipts.steps[at + 1] == step:
            continue  # the newest receipt of a step holds
        values = [None if (v := receipts.value((kind, group), at)) is None else plain(v) for kind in kinds]
        if values != newest:
            newest = values
            out["from_step"].append(step)
            for kind, value in zip(kinds, values, strict=True):
                out[kind].append(value)
    return out
