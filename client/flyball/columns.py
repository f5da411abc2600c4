"""The signals of single steps as the columns of a report.

Rule of this module: order is kept. A loss that is still on its device holds back itself and all that follows.
"""

from __future__ import annotations

from collections.abc import Mapping

from flyball.pending import Pending

#: loss, reward, grad_norm and all other signals of one step. A loss may be a `Pending` one.
Signals = tuple[float | Pending | None, float | None, float | None, Mapping[str, float] | None]


def columns(head: list[tuple[int, Signals]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """The oldest observations as columns, up to the first whose loss has not arrived."""
    steps: list[int] = []
    losses: list[float | None] = []
    rows: list[Signals] = []
    for step, row in head:
        loss = row[0]
        if loss is not None and not isinstance(loss, float):
            if not loss.ready():
                break
            loss = loss.value()
        steps.append(step)
        losses.append(loss)
        rows.append(row)
    known = {"loss": losses, "reward": [row[1] for row in rows], "grad_norm": [row[2] for row in rows]}
    columns = {name: column for name, column in known.items() if any(value is not None for value in column)}
    for name in dict.fromkeys(name for row in rows if row[3] for name in row[3]):
        columns[name] = [None if row[3] is None else row[3].get(name) for row in rows]
    return steps, columns
