"""Events and outcomes as journal rows, and back.

Rule of this module: one canonical form. The same event and outcome always give the same bytes, and the bytes
give back equal values, bit for bit; that is what lets an auditor compare a stored row with a fold made today.

Layout of an Observed row (n observations, G groups, K changes):
    =step   q[n]    only where the steps are not consecutive
    NAME    f[n]|d[n] one per signal; float32 where every value survives the trip, which torch's losses do
    NAME?   I[m]    the indices at which NAME was not measured (its values there are 0)
    =at     I[K]    the observation that decided change k;   =lr d[K*G]   =momentum d[K*G]   =noise_std d[K*G]
    =at@S   and so on: the same of the shadow named S
    meta    {} or {"marks": [...], "shadow_marks": {S: [...]}}
A group without momentum has 0 in =momentum; which groups those are is in the run's specification.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple, cast

from flyball_server.core.commands import Control
from flyball_server.core.events import (
    Applied,
    Attached,
    Commanded,
    CommandMoved,
    Created,
    Declared,
    DirectiveAnswered,
    Ended,
    Event,
    Judged,
    Mark,
    Observed,
    Origin,
    Outcome,
    Proposed,
    Receipt,
    Reported,
    Spec,
)
from flyball_server.core.numbers import finite
from flyball_server.core.run import NOTHING
from flyball_server.core.types import Ask, Group, Settings
from flyball_server.storage.journal import Column, Row

if sys.byteorder != "little":  # pragma: no cover - no such machine trains models today
    raise ImportError("the journal's columns are little-endian: this machine is not supported")


NAN = float("nan")
AT_FIRST = Column("=at", "I", bytes(4))


class Entry(NamedTuple):
    """A row without what only the engine knows (sequence number, actor, time, hash)."""

    kind: str
    attempt: int
    first_step: int | None
    last_step: int | None
    meta: Mapping[str, Any]
    columns: tuple[Column, ...]


def to_entry(event: Event, outcome: Outcome, shadows: Iterable[str] = ()) -> Entry:
    """The canonical form of an event and what folding it brought. shadows: the names of the run's, in their order."""
    if isinstance(event, Observed):
        return _observed_entry(event, outcome, shadows)
    if isinstance(event, Applied):
        return _applied_entry(event)
    if isinstance(event, Created):
        created: dict[str, Any] = {"spec": _spec_json(event.spec)}
        if event.origin is not None:
            created["origin"] = event.origin._asdict()
        return Entry("created", 0, None, None, created, ())
    if isinstance(event, Reported):
        columns = [Column(name, "d", array("d", [event.signals[name]]).tobytes()) for name in sorted(event.signals)]
        return Entry(
            "reported", 0, event.step, event.step, _said(event, ("source", "number", "note", "key")), tuple(columns)
        )
    if isinstance(event, Declared):
        return Entry("declared", event.attempt, None, None, {"controls": [list(c) for c in event.controls]}, ())
    meta = event._asdict()
    attempt = meta.pop("attempt", 0)
    # As it was recorded before there was such a thing.
    if isinstance(event, Attached) and event.claimed is None:
        del meta["claimed"]
    if isinstance(event, DirectiveAnswered) and not event.step:
        del meta["step"]
    if isinstance(event, Judged) and not event.needed:
        del meta["needed"]
    # Marks: what the policy had to say at the end.
    return Entry(_KINDS[type(event)], attempt, None, None, meta | _marks_json(outcome, shadows), ())


def from_row(row: Row, groups: tuple[Group, ...]) -> tuple[Event, Outcome]:
    """The event and outcome that a row holds. `groups`: the run's (only Created can do without)."""
    if row.kind == "observed":
        return _observed(row, groups)
    if row.kind == "applied":
        return _applied(row, groups), NOTHING
    if row.kind == "created":
        return Created(spec_of(row), origin_of(row)), NOTHING
    if row.kind == "reported":
        assert row.first_step is not None
        return Reported(row.first_step, {c.name: _values(c)[0] for c in row.columns}, **row.meta), NOTHING
    if row.kind == "declared":
        return Declared(row.attempt, tuple(Control(*one) for one in row.meta["controls"])), NOTHING
    meta = dict(row.meta)
    meta.pop("shadow_marks", None)
    marks = tuple(_mark(m) for m in meta.pop("marks", ()))
    verdict = meta.pop("verdict", None) if row.kind == "commanded" else None  # of a judgement it is a field
    found = _CLASSES[row.kind]
    if "attempt" in found._fields:
        meta["attempt"] = row.attempt
    return found(**meta), Outcome((), marks, verdict=verdict) if marks or verdict else NOTHING


def spec_of(row: Row) -> Spec:
    """The specification in a run's first row."""
    spec = dict(row.meta["spec"])
    groups = (Group(n, lr, m, None if b is None else (b[0], b[1]), *free) for n, lr, m, b, *free in spec["groups"])
    return Spec(**{**spec, "groups": tuple(groups)})


def origin_of(row: Row) -> Origin | None:
    """Where a run comes from, as its first row says; None: it began at step 0."""
    origin = row.meta.get("origin")
    return None if origin is None else Origin(**origin)


_KINDS: dict[type[Any], str] = {
    Attached: "attached",
    Commanded: "commanded",
    CommandMoved: "command_moved",
    DirectiveAnswered: "directive_answered",
    Ended: "ended",
    Judged: "judged",
    Proposed: "proposed",
}
_CLASSES: dict[str, type[Any]] = {kind: cls for cls, kind in _KINDS.items()}


def _said(event: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of an event's fields that say anything."""
    return {name: getattr(event, name) for name in names if getattr(event, name)}


def _spec_json(spec: Spec) -> dict[str, Any]:
    # What is free of a learning rate says so; all others as it was recorded before there was such a thing.
    data = {**spec._asdict(), "groups": [list(g) if g.lr_free else list(g[:4]) for g in spec.groups]}
    if not data["shadows"]:
        del data["shadows"]
    if data["asked_guard"] is None:
        del data["asked_guard"]
    return data


def _observed_entry(event: Observed, outcome: Outcome, shadows: Iterable[str]) -> Entry:
    steps = event.steps
    first, last, n = steps[0], steps[-1], len(steps)
    columns = []
    if last - first + 1 != n:
        columns.append(Column("=step", "q", array("q", steps).tobytes()))
    for name in sorted(event.signals):
        columns += _signal(name, event.signals[name])
    changes = outcome.changes
    if len(changes) == 1:  # always the batch's first step
        columns.append(AT_FIRST)
    else:
        columns.append(Column("=at", "I", _places(steps, changes).tobytes()))
    columns += _settings("=", [settings for _, settings in outcome.changes])
    for name, beside in zip(shadows, outcome.shadows, strict=True):
        columns.append(Column("=at@" + name, "I", _places(steps, beside.changes).tobytes()))
        own = _settings("=", [settings for _, settings in beside.changes])
        columns += [column._replace(name=f"{column.name}@{name}") for column in own]
    meta = _marks_json(outcome, shadows) if outcome.marks or outcome.shadows else {}
    if outcome.asks:
        meta["asks"] = [[ask.kind, finite(ask.args), ask.reason] for ask in outcome.asks]
    return Entry("observed", event.attempt, first, last, meta, tuple(columns))


def _marks_json(outcome: Outcome, shadows: Iterable[str]) -> dict[str, Any]:
    """The marks, and what became of a command, as a row's meta has them; nothing where there is none."""
    meta: dict[str, Any] = {"marks": [_mark_json(mark) for mark in outcome.marks]} if outcome.marks else {}
    if outcome.verdict is not None:
        meta["verdict"] = outcome.verdict
    beside = zip(shadows, outcome.shadows, strict=False)
    marks = {name: [_mark_json(mark) for mark in one.marks] for name, one in beside if one.marks}
    return meta | {"shadow_marks": marks} if marks else meta


def _places(steps: Sequence[int], changes: Sequence[tuple[int, Settings]]) -> array[int]:
    """Where among the steps each change was decided."""
    if steps[-1] - steps[0] + 1 == len(steps):
        return array("I", [step - steps[0] for step, _ in changes])
    place = {step: i for i, step in enumerate(steps)}
    return array("I", [place[step] for step, _ in changes])


def _observed(row: Row, groups: tuple[Group, ...]) -> tuple[Event, Outcome]:
    columns = {c.name: _values(c) for c in row.columns}
    assert row.first_step is not None and row.last_step is not None
    steps = columns.pop("=step", None) or list(range(row.first_step, row.last_step + 1))
    at = columns.pop("=at")
    settings = _read_settings("=", columns, groups, len(at))
    marks = tuple(_mark(m) for m in row.meta.get("marks", ()))
    signals: dict[str, list[float | None]] = {}
    for name, values in columns.items():
        if name.endswith("?"):
            column = signals[name[:-1]]
            for index in values:
                column[index] = None
        elif not name.startswith("="):
            signals[name] = values
    changes = tuple((steps[i], s) for i, s in zip(at, settings, strict=True))
    asks = tuple(Ask(*ask) for ask in row.meta.get("asks", ()))
    return Observed(row.attempt, steps, signals), Outcome(changes, marks, asks=asks)


def _applied_entry(event: Applied) -> Entry:
    receipts = event.receipts
    columns = [
        Column(name, "q", array("q", [getattr(r, name) for r in receipts]).tobytes())
        for name in ("number", "step", "decided", "ranks")
    ]
    columns += _settings("", [r.settings for r in receipts])
    late = [i for i, r in enumerate(receipts) if r.late]
    if late:
        columns.append(Column("late", "I", array("I", late).tobytes()))
    conflicts = {str(i): r.conflict for i, r in enumerate(receipts) if r.conflict}
    meta: dict[str, Any] = {"conflicts": conflicts} if conflicts else {}
    # What most receipts do not say takes no room.
    for name in ("confirms", "of_ranks"):
        if any(getattr(r, name) for r in receipts):
            columns.append(Column(name, "q", array("q", [getattr(r, name) for r in receipts]).tobytes()))
    for name in ("controls", "wanted"):
        said = {str(i): getattr(r, name) for i, r in enumerate(receipts) if getattr(r, name)}
        if said:
            meta[name] = {i: _carried(value) for i, value in said.items()}
    return Entry("applied", event.attempt, receipts[0].step, receipts[-1].step, meta, tuple(columns))


def _applied(row: Row, groups: tuple[Group, ...]) -> Applied:
    columns = {c.name: _values(c) for c in row.columns}
    late = set(columns.pop("late", ()))
    conflicts = row.meta.get("conflicts", {})
    numbers, steps, decided, ranks = (columns[name] for name in ("number", "step", "decided", "ranks"))
    confirms, of_ranks = (columns.pop(name, [0] * len(numbers)) for name in ("confirms", "of_ranks"))
    controls, wanted = (
        {i: _uncarried(value) for i, value in row.meta.get(name, {}).items()} for name in ("controls", "wanted")
    )
    settings = _read_settings("", columns, groups, len(numbers))
    return Applied(
        row.attempt,
        tuple(
            Receipt(
                number,
                steps[i],
                decided[i],
                settings[i],
                i in late,
                conflicts.get(str(i), ""),
                ranks[i],
                confirms[i],
                controls.get(str(i), {}),
                wanted.get(str(i)),
                of_ranks[i],
            )
            for i, number in enumerate(numbers)
        ),
    )


def _carried(value: Any) -> Any:
    """Numbers that a job read back, which may be NaN, as text."""
    if isinstance(value, Mapping):
        return {name: repr(one) for name, one in value.items()}
    return [repr(one) for one in value]


def _uncarried(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: float(one) for name, one in value.items()}
    return tuple([float(one) for one in value])


def _signal(name: str, column: Sequence[float | None]) -> list[Column]:
    """One signal's column, float32 where nothing is lost, and where it is missing."""
    columns = []
    values = [0.0 if v is None else v for v in column] if None in column else cast("list[float]", column)
    if values is not column:
        missing = array("I", [i for i, v in enumerate(column) if v is None])
        columns.append(Column(name + "?", "I", missing.tobytes()))
    narrow = array("f", values)
    # Lists compare by value, so columns with a NaN stay wide; -0.0 keeps its sign in either width.
    if narrow.tolist() == values:
        return [Column(name, "f", narrow.tobytes()), *columns]
    return [Column(name, "d", array("d", values).tobytes()), *columns]


def _settings(prefix: str, settings: Sequence[Settings]) -> list[Column]:
    if len(settings) == 1 and settings[0].momentum is None and settings[0].noise_std is None:
        return [Column(prefix + "lr", "d", array("d", settings[0].lr).tobytes())]
    columns = [Column(prefix + "lr", "d", array("d", chain.from_iterable(s.lr for s in settings)).tobytes())]
    for name in ("momentum", "noise_std"):
        if any(getattr(s, name) is not None for s in settings):
            groups = len(settings[0].lr)
            # A change without a value among changes with one cannot be told from 0 in a packed column, so it
            # is stored as NaN, which no valid setting is.
            rows = ([NAN] * groups if (v := getattr(s, name)) is None else v for s in settings)
            flat = [0.0 if v is None else v for v in chain.from_iterable(rows)]
            columns.append(Column(prefix + name, "d", array("d", flat).tobytes()))
    return columns


def _read_settings(
    prefix: str, columns: Mapping[str, list[Any]], groups: tuple[Group, ...], count: int
) -> list[Settings]:
    g = len(groups)
    lr = columns[prefix + "lr"]
    momentum, noise = columns.get(prefix + "momentum"), columns.get(prefix + "noise_std")
    has = [group.momentum is not None or group.betas is not None for group in groups]
    out = []
    for k in range(count):
        part = slice(k * g, (k + 1) * g)
        m = None if momentum is None or momentum[k * g] != momentum[k * g] else momentum[part]
        s = None if noise is None or noise[k * g] != noise[k * g] else noise[part]
        out.append(
            Settings(
                tuple(lr[part]),
                None if m is None else tuple(v if h else None for v, h in zip(m, has, strict=True)),
                None if s is None else tuple(s),
            )
        )
    return out


def _values(column: Column) -> list[Any]:
    values = array(column.type)
    values.frombytes(column.data)
    return values.tolist()


def _mark_json(mark: Mark) -> list[Any]:
    return [mark.step, mark.phase, mark.code, mark.note, list(mark.before), list(mark.after), finite(mark.fields)]


def _mark(data: Sequence[Any]) -> Mark:
    step, phase, code, note, before, after, fields = data
    return Mark(step, phase, code, note, tuple(before), tuple(after), fields)


def utc(at: int) -> str:
    """A journal time (microseconds since 1970) for people and JSON: ISO 8601, UTC."""
    return (_EPOCH + timedelta(microseconds=at)).isoformat().replace("+00:00", "Z")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
