"""The messages between a training job and the service, as tuples, and their JSON form.

Rule of this module: the names and meanings are those of steering.proto. JSON has no NaN: non-finite numbers
travel as the strings "NaN", "Infinity" and "-Infinity"; null means "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple


class Group(NamedTuple):
    """A parameter group with the settings it has when the job attaches."""

    name: str
    lr: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None


class Settings(NamedTuple):
    """Settings of every group, in the groups' order; None: nothing is said about it."""

    lr: tuple[float, ...]
    momentum: tuple[float | None, ...] | None = None
    noise_std: tuple[float, ...] | None = None


class Fork(NamedTuple):
    """The run that a new one leaves: its id, the attempt (None: the newest), the new run's first step; the row of the
    checkpoint token."""

    run: str
    attempt: int | None
    step: int
    seq: int = 0
    digest: str = ""


class Attach(NamedTuple):
    """A training job asks to be steered."""

    project: str
    run: str
    session: str
    labels: Mapping[str, str]
    groups: tuple[Group, ...]
    policy: Mapping[str, Any]
    base: Mapping[str, Any] | None
    guard: Mapping[str, Any]
    mode: str
    seed: int
    lag: int | None
    resume: bool
    from_step: int | None
    from_attempt: int | None
    seq: int
    digest: str
    client: str
    shadows: Mapping[str, Any] = MappingProxyType({})
    fork: Fork | None = None
    on_unknown: str = "refuse"


class Attached(NamedTuple):
    """The answer to Attach. `changes` ends with the settings to begin with; with a lag, what was decided before stands
    first.

    seed, guard: the run's own, as recorded; a service older than they are leaves them out.
    """

    run: str
    attempt: int
    from_step: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    policy: str
    changes: tuple[tuple[int, Settings], ...]
    phase: str
    code: str
    reason: str
    reference: tuple[float, ...]
    seed: int = 0
    guard: Mapping[str, Any] = MappingProxyType({})


class Receipt(NamedTuple):
    """What was really applied from optimizer step `step` on."""

    number: int
    step: int
    decided: int
    settings: Settings
    late: bool = False
    conflict: str = ""
    ranks: int = 1


class Answer(NamedTuple):
    """The answer to a directive: outcome is "done" or "declined"."""

    directive: str
    outcome: str
    note: str


class Report(NamedTuple):
    """What the driver saw and did. One list per signal, as long as `steps`; None = not measured."""

    run: str
    session: str
    attempt: int
    steps: Sequence[int]
    signals: Mapping[str, Sequence[float | None]]
    receipts: tuple[Receipt, ...]
    answers: tuple[Answer, ...]
    end: str


class Directive(NamedTuple):
    """Something the service asks for besides settings: checkpoint, restore, evaluate, stop."""

    id: str
    kind: str
    args: Mapping[str, Any]


class Advice(NamedTuple):
    """The answer to a report. `changes`: settings by the step whose observation decided them."""

    attempt: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    changes: tuple[tuple[int, Settings], ...]
    phase: str
    code: str
    reason: str
    directives: tuple[Directive, ...]


def attach_json(message: Attach) -> dict[str, Any]:
    """Attach as JSON values. What is not asked for is left out: a service older than it would refuse it."""
    data = {**message._asdict(), "groups": [group._asdict() for group in message.groups]}
    for name, default in Attach._field_defaults.items():
        if data[name] == default:
            del data[name]
    if message.fork is not None:
        data["fork"] = message.fork._asdict()
    return data


def report_json(message: Report) -> dict[str, Any]:
    """Report as JSON values; the run rides in the path."""
    return {
        "session": message.session,
        "attempt": message.attempt,
        "step": list(message.steps),
        "signals": {name: [_plain(v) for v in column] for name, column in message.signals.items()},
        "receipts": [_receipt_json(receipt) for receipt in message.receipts],
        "answers": [answer._asdict() for answer in message.answers],
        "end": message.end,
    }


def attached_of(data: Mapping[str, Any]) -> Attached:
    """Attached from JSON values. Raises KeyError, TypeError or ValueError where it is none."""
    fields = {name: data[name] for name in Attached._fields if name in data or name not in Attached._field_defaults}
    return Attached(**{**fields, "changes": _changes_of(data["changes"]), "reference": tuple(data["reference"])})


def advice_of(data: Mapping[str, Any]) -> Advice:
    """Advice from JSON values. Raises KeyError, TypeError or ValueError where it is none."""
    directives = tuple(Directive(d["id"], d["kind"], d.get("args", {})) for d in data["directives"])
    fields = {name: data[name] for name in Advice._fields}
    return Advice(**{**fields, "changes": _changes_of(data["changes"]), "directives": directives})


def _receipt_json(receipt: Receipt) -> dict[str, Any]:
    data = receipt._asdict()
    settings = data.pop("settings")
    for name, row in settings._asdict().items():
        data[name] = None if row is None else [_plain(value) for value in row]
    return data


def _changes_of(data: Mapping[str, Any]) -> tuple[tuple[int, Settings], ...]:
    decided, lr = data["decided"], data["lr"]
    momentum = data.get("momentum") or [None] * len(decided)
    noise = data.get("noise_std") or [None] * len(decided)
    return tuple(
        (step, Settings(tuple(row), None if m is None else tuple(m), None if n is None else tuple(n)))
        for step, row, m, n in zip(decided, lr, momentum, noise, strict=True)
    )


def _plain(value: float | None) -> float | str | None:
    if value is None or isfinite(value):
        return value
    if value != value:
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
