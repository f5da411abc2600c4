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
    """A parameter group with the settings it has when the job attaches. lr_free: the optimizer finds its own step size,
    and lr multiplies that."""

    name: str
    lr: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    lr_free: bool = False


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

    seed, guard: the run's own, as recorded; controls: the values of its declared ones; confirm: see Advice. A service
    older than they are leaves them out.
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
    controls: Mapping[str, float] = MappingProxyType({})
    confirm: int = 0


class Receipt(NamedTuple):
    """What was really applied from optimizer step `step` on.

    confirms: the newest `confirm` whose settings are in force at this step. controls: the values of the declared
    controls. wanted_lr: what was written, where something else was read back. of_ranks: 0 says `ranks`.
    """

    number: int
    step: int
    decided: int
    settings: Settings
    late: bool = False
    conflict: str = ""
    ranks: int = 1
    confirms: int = 0
    controls: Mapping[str, float] = MappingProxyType({})
    wanted_lr: tuple[float, ...] | None = None
    of_ranks: int = 0


class Answer(NamedTuple):
    """The answer to a directive: outcome is "done" or "declined"; step: the next optimizer step then."""

    directive: str
    outcome: str
    note: str
    step: int = 0


class Control(NamedTuple):
    """Any other scalar of the job that is steered; value: what the job begins with."""

    name: str
    value: float
    min: float
    max: float


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
    controls: tuple[Control, ...] = ()


class Directive(NamedTuple):
    """Something the service asks for besides settings: checkpoint, restore, rewind, evaluate, stop."""

    id: str
    kind: str
    args: Mapping[str, Any]


class Advice(NamedTuple):
    """The answer to a report. `changes`: settings by the step whose observation decided them.

    confirm: a command up to this journal row awaits a receipt. guard: the run's limits, where a command changed them;
    empty: as before. notices: what people did, for the job's log. A service older than they are leaves them out.
    """

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
    confirm: int = 0
    controls: Mapping[str, float] = MappingProxyType({})
    guard: Mapping[str, Any] = MappingProxyType({})
    notices: tuple[str, ...] = ()


def attach_json(message: Attach) -> dict[str, Any]:
    """Attach as JSON values. What is not asked for is left out: a service older than it would refuse it."""
    data = {**_asked(message), "groups": [_group_json(group) for group in message.groups]}
    if message.fork is not None:
        data["fork"] = message.fork._asdict()
    return data


#: Fields that a service which never asks for confirming does not know, and would refuse.
_NEWER = ("confirms", "controls", "wanted_lr", "of_ranks")


def report_json(message: Report, *, older: bool = False) -> dict[str, Any]:
    """Report as JSON values; the run rides in the path. What has nothing to say is left out, as in `attach_json`.

    older: for a service whose Attached says nothing about `confirm`; what such a one does not know is left out as well.
    """
    if older:
        defaults = {name: Receipt._field_defaults[name] for name in _NEWER}
        receipts = tuple(receipt._replace(**defaults) for receipt in message.receipts)
        answers = tuple(answer._replace(step=0) for answer in message.answers)
        message = message._replace(receipts=receipts, answers=answers, controls=())
    data: dict[str, Any] = {
        "session": message.session,
        "attempt": message.attempt,
        "step": list(message.steps),
        "signals": {name: [_plain(v) for v in column] for name, column in message.signals.items()},
        "receipts": [_receipt_json(receipt) for receipt in message.receipts],
        "answers": [_asked(answer) for answer in message.answers],
        "end": message.end,
    }
    if message.controls:
        data["controls"] = [control._asdict() for control in message.controls]
    return data


def attached_of(data: Mapping[str, Any]) -> Attached:
    """Attached from JSON values. Raises KeyError, TypeError or ValueError where it is none."""
    fields = _told(data, Attached)
    return Attached(**{**fields, "changes": _changes_of(data["changes"]), "reference": tuple(data["reference"])})


def advice_of(data: Mapping[str, Any]) -> Advice:
    """Advice from JSON values. Raises KeyError, TypeError or ValueError where it is none."""
    directives = tuple(Directive(d["id"], d["kind"], d.get("args", {})) for d in data["directives"])
    fields = {**_told(data, Advice), "notices": tuple(data.get("notices", ()))}
    return Advice(**{**fields, "changes": _changes_of(data["changes"]), "directives": directives})


def _group_json(group: Group) -> dict[str, Any]:
    data = group._asdict()
    if not group.lr_free:  # a service older than it would refuse it
        del data["lr_free"]
    return data


def _asked(message: Any) -> dict[str, Any]:
    """A message's fields without those that are at their default."""
    defaults = message._field_defaults
    return {name: value for name, value in message._asdict().items() if name not in defaults or value != defaults[name]}


def _told(data: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """The fields of `kind` in `data`; only those with a default may be missing, or null."""
    defaults = kind._field_defaults
    return {name: data[name] for name in kind._fields if name not in defaults or data.get(name) is not None}


def _receipt_json(receipt: Receipt) -> dict[str, Any]:
    data = _asked(receipt)
    settings = data.pop("settings")
    if receipt.wanted_lr is not None:
        data["wanted_lr"] = [_plain(value) for value in receipt.wanted_lr]
    if receipt.controls:
        data["controls"] = {name: _plain(value) for name, value in receipt.controls.items()}
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
