"""Reading a run back: series for charts, decisions for people.

Rule of this module: it only reads, and reads packed columns, never a Python object per observation.

Names of series: a signal by its name (loss, grad_norm ...); lr:GROUP, momentum:GROUP and noise_std:GROUP as
they were applied (from the receipts); decided_lr:GROUP and so on as they were decided, at the step that
decided them; shadow:NAME:lr:GROUP as the run's shadow NAME decided.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from flyball_server import limits, records
from flyball_server.core import commands
from flyball_server.core import run as fold
from flyball_server.core.errors import Invalid, NotFound
from flyball_server.core.events import Spec
from flyball_server.core.policies.aees import episode_log
from flyball_server.core.run import Rules, Run
from flyball_server.core.types import Decision
from flyball_server.names import check_signal_name
from flyball_server.storage.journal import Block, Reading, Row

P = ParamSpec("P")
T = TypeVar("T")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class SeriesRequest(NamedTuple):
    """Which series, over which steps (both ends included; None = open), of which attempt's line (None = newest)."""

    names: Sequence[str]
    points: int = 2000
    from_step: int | None = None
    to_step: int | None = None
    attempt: int | None = None


class _Wanted(NamedTuple):
    """Where a series is stored: which kinds of rows, which column, which of its `width` values per entry."""

    kinds: tuple[str, ...]
    column: str
    position: int
    width: int
    at: str = "=at"


async def in_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a read outside the event loop."""
    return await asyncio.to_thread(work, *args, **kwargs)


def row(journal: Reading, run: str, seq: int) -> Row | None:
    """One row of a run, None where there is none."""
    return next(journal.rows(run, after=seq - 1, until=seq), None) if seq > 0 else None


def series(journal: Reading, spec: Spec, run: Run, request: SeriesRequest) -> dict[str, Any]:
    """The asked-for series as {"run", "attempt", "series": {name: {"step": [...], "value": [...]}}}.

    Each has at most `points` points: the steps are cut into points / 2 equal ranges and the smallest and the
    largest value of each are kept where they stand (and one non-finite value, where there is any).
    Raises Invalid for a name, range or number of points that cannot be, NotFound for an unknown attempt.
    """
    if not 2 <= request.points <= limits.POINTS_MAX:
        raise Invalid(f"points is {request.points}: give 2 to {limits.POINTS_MAX}")
    if not 1 <= len(request.names) <= limits.SERIES_MAX:
        raise Invalid(f"signals: {len(request.names)} names; give 1 to {limits.SERIES_MAX}")
    attempt = checked_attempt(spec, run, request.attempt)
    wanted = {name: _wanted(name, spec) for name in request.names}
    until = cutoffs(run, attempt)
    found: dict[str, list[tuple[Ints, Floats]]] = {name: [] for name in wanted}
    columns = {"step", "=step", "=at"}
    columns |= {name for w in wanted.values() for name in (w.column, w.column + "?", w.at)}
    for block in journal.blocks(spec.run, columns):
        cutoff = until.get(block.attempt)
        if block.kind not in ("observed", "applied", "reported") or cutoff is None:
            continue
        steps = steps_of(block)
        for name, want in wanted.items():
            if block.kind in want.kinds and want.column in block.arrays:
                s, v = _values(block, want, steps)
                keep = s < cutoff
                found[name].append((s[keep], v[keep]))
    return {
        "run": spec.run,
        "attempt": attempt,
        "series": {
            name: _thinned(parts, request, run.through if ":" in name else None) for name, parts in found.items()
        },
    }


def signal(journal: Reading, spec: Spec, run: Run, name: str) -> tuple[Ints, Floats]:
    """Steps and values of a signal of the driver on the newest attempt's line, none left out."""
    want, until = _wanted(name, spec), cutoffs(run, run.attempt)
    found: list[tuple[Ints, Floats]] = [(np.empty(0, np.int64), np.empty(0))]
    for block in journal.blocks(spec.run, {"=step", name, name + "?"}):
        if block.kind == "observed" and block.attempt in until and name in block.arrays:
            steps, values = _values(block, want, steps_of(block))
            keep = steps < until[block.attempt]
            found.append((steps[keep], values[keep]))
    return np.concatenate([s for s, _ in found]), np.concatenate([v for _, v in found])


class Marked(NamedTuple):
    """Whose decisions are asked for: the run's own (shadow: "") or a shadow's, and the rules that explain them."""

    spec: Spec
    rules: Rules
    shadow: str
    run: Run

    def rules_at(self, seq: int) -> Rules:
        """The rules that a row was decided under."""
        return self.rules if self.shadow else fold.ruling(self.rules, self.run, seq)

    def of(self, row: Row) -> Sequence[Any]:
        """The marks that a row holds of it."""
        found: Sequence[Any] = (
            row.meta.get("shadow_marks", {}).get(self.shadow, ()) if self.shadow else row.meta.get("marks", ())
        )
        return found


def marked(spec: Spec, rules: Rules, run: Run, shadow: str) -> Marked:
    """Raises NotFound where the run has no such shadow."""
    if not shadow:
        return Marked(spec, rules, "", run)
    _check_shadow(spec, shadow)
    return Marked(spec, rules.shadows[[*spec.shadows].index(shadow)], shadow, run)


def _check_shadow(spec: Spec, shadow: str) -> None:
    if shadow not in spec.shadows:
        known = ", ".join(spec.shadows) or "none"
        raise NotFound(f"run {spec.run} has no shadow {shadow!r:.60}; it has {known}")


def decisions(journal: Reading, marked: Marked, after: int, limit: int) -> dict[str, Any]:
    """The decisions that moved something, in journal order, behind the row `after`.

    `next` is the value of `after` for the page behind this one, None at the end. A page ends with a whole row.
    Raises Invalid for a limit out of range.
    """
    _check_limit(limit)
    out: list[dict[str, Any]] = []
    run = marked.spec.run
    for row in journal.rows(run, after=after):
        if marked.of(row):
            if len(out) >= limit:
                return {"run": run, "decisions": out, "next": after}
            after = row.seq
            out += _decisions(row, marked)
    return {"run": run, "decisions": out, "next": None}


def newest_decisions(journal: Reading, marked: Marked, limit: int) -> dict[str, Any]:
    """The newest decisions that moved something, oldest of them first. Raises Invalid for a limit out of range."""
    _check_limit(limit)
    rows = deque((row for row in journal.rows(marked.spec.run) if marked.of(row)), limit)
    out = [decision for row in rows for decision in _decisions(row, marked)]
    return {"run": marked.spec.run, "decisions": out[-limit:], "next": None}


def episodes(journal: Reading, spec: Spec) -> dict[str, Any]:
    """The log lists of a run that learns in episodes (the policy `aees`): one entry per closed episode in each."""
    marks = (mark for row in journal.rows(spec.run) for mark in row.meta.get("marks", ()))
    closed = (fields for *_, fields in marks if fields and "closed_episode" in fields)
    return {"run": spec.run, "episodes": episode_log(closed)}


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= limits.DECISIONS_MAX:
        raise Invalid(f"limit is {limit}: give 1 to {limits.DECISIONS_MAX}")


def _decisions(row: Row, marked: Marked) -> list[dict[str, Any]]:
    names, rules = [g.name for g in marked.spec.groups], marked.rules_at(row.seq)
    return [
        {
            "seq": row.seq,
            "attempt": row.attempt,
            "step": step,
            "at": records.utc(row.at),
            "phase": phase,
            "decision": code,
            "guard": note,
            "reason": _reason(rules, Decision(tuple(now), None, None, phase, code, fields)),
            "lr_before": dict(zip(names, before, strict=True)),
            "lr_after": dict(zip(names, now, strict=True)),
            "fields": fields,
        }
        for step, phase, code, note, before, now, fields in marked.of(row)
    ]


def _reason(rules: Rules, decision: Decision) -> str:
    if decision.code.startswith("command_") and decision.fields is not None:
        return commands.explain(decision.fields)
    return rules.policy.explain(rules.config, decision)


_SETTINGS = ("lr", "momentum", "noise_std")


def _wanted(name: str, spec: Spec) -> _Wanted:
    kind, _, group = name.partition(":")
    decided = kind.removeprefix("decided_")
    if ":" not in name:
        check_signal_name(name)
        return _Wanted(("observed", "reported"), name, 0, 1)
    if kind == "shadow":
        shadow, _, setting = group.partition(":")
        _check_shadow(spec, shadow)
        own = _wanted("decided_" + setting, spec)
        return own._replace(column=f"{own.column}@{shadow}", at=f"=at@{shadow}")
    if decided not in _SETTINGS:
        raise Invalid(f"signals: {name!r} is no series; before the ':' stands lr, momentum, noise_std or shadow:NAME")
    names = [g.name for g in spec.groups]
    if group not in names:
        raise Invalid(f"signals: {name!r}: run {spec.run} has no group {group!r}; it has {', '.join(names)}")
    if decided != kind:
        return _Wanted(("observed",), "=" + decided, names.index(group), len(names))
    return _Wanted(("applied",), decided, names.index(group), len(names))


def checked_attempt(spec: Spec, run: Run, attempt: int | None) -> int:
    """The attempt asked for; the newest where none is. Raises NotFound for one that is not known."""
    if attempt is None:
        return run.attempt
    if not 0 <= attempt <= run.attempt:
        raise NotFound(f"run {spec.run}: attempt {attempt} is not known (newest: {run.attempt})")
    return attempt


def cutoffs(run: Run, attempt: int) -> Mapping[int, float]:
    """For each attempt on the line of `attempt`: its steps from this one on were overtaken by a later attempt."""
    # Side signals are journaled under attempt 0: they belong to whatever line the run is on.
    out: dict[int, float] = {0: float("inf")}
    cutoff = float("inf")
    while attempt > 0:
        out[attempt] = cutoff
        from_step, _, attempt_before = run.attempts[attempt - 1]
        cutoff, attempt = min(cutoff, from_step), attempt_before
    return out


def steps_of(block: Block) -> Ints:
    """The step of every entry of a block."""
    name = _step_column(block)
    if name in block.arrays:
        stored: Ints = block.arrays[name]
        return stored
    counts = block.last_step - block.first_step + 1
    starts = np.cumsum(counts) - counts
    steps: Ints = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(block.first_step - starts, counts)
    return steps


def _step_column(block: Block) -> str:
    """Where a block keeps its steps, if it does: a signal may be called step, so there it is =step."""
    return "step" if block.kind == "applied" else "=step"


def _values(block: Block, want: _Wanted, steps: Ints) -> tuple[Ints, Floats]:
    """The steps and values of one series in one block."""
    values = np.asarray(block.arrays[want.column], dtype=np.float64)
    if want.width > 1 or want.column.startswith("="):
        values = values[want.position :: want.width]
    if want.column.startswith("="):
        # Changes name the observation that decided them, counted within their own row.
        return steps[_absolute(block, want.at, _row_lengths(block))], values
    missing = want.column + "?"
    if missing in block.arrays and len(block.arrays[missing]):
        keep = np.ones(len(values), dtype=bool)
        keep[_absolute(block, missing, block.counts[want.column])] = False
        return steps[keep], values[keep]
    return steps, values


def _row_lengths(block: Block) -> Ints:
    name = _step_column(block)
    if name in block.counts:
        stored: Ints = block.counts[name]
        return stored
    lengths: Ints = block.last_step - block.first_step + 1
    return lengths


def _absolute(block: Block, column: str, lengths: Ints) -> Ints:
    """Indices counted within rows, as indices into the block."""
    starts = np.cumsum(lengths) - lengths
    offsets: Ints = np.repeat(starts, block.counts[column])
    absolute: Ints = block.arrays[column].astype(np.int64) + offsets
    return absolute


def _thinned(parts: list[tuple[Ints, Floats]], request: SeriesRequest, held_to: int | None) -> dict[str, list[Any]]:
    """One series within the asked-for steps, thinned. held_to: for a series of changes, each of which holds until the
    next, the run's newest step; the series then begins and ends with the value in force there."""
    steps = np.concatenate([s for s, _ in parts]) if parts else np.empty(0, np.int64)
    values = np.concatenate([v for _, v in parts]) if parts else np.empty(0)
    if (steps[1:] < steps[:-1]).any():  # side signals come in between
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
    low = 0 if request.from_step is None else int(np.searchsorted(steps, request.from_step, "left"))
    high = len(steps) if request.to_step is None else int(np.searchsorted(steps, request.to_step, "right"))
    end = held_to if request.to_step is None or held_to is None else min(request.to_step, held_to)
    start = request.from_step if held_to is not None and low > 0 else None
    before = values[low - 1 : low]
    steps, values = steps[low:high], values[low:high]
    if start is not None and (not len(steps) or steps[0] > start):
        steps, values = np.insert(steps, 0, start), np.concatenate([before, values])
    if end is not None and len(steps) and steps[-1] < end:
        steps, values = np.append(steps, end), np.append(values, values[-1])
    keep = thin(steps, values, request.points)
    return {"step": steps[keep].tolist(), "value": [plain(v) for v in values[keep].tolist()]}


def thin(steps: Ints, values: Floats, points: int) -> Ints:
    """The indices of at most `points` entries that keep every range's smallest and largest value in sight."""
    n = len(steps)
    if n <= points:
        return np.arange(n)
    bad = ~np.isfinite(values)
    per_range = 3 if bad.any() and points >= 3 else 2
    edges = np.linspace(steps[0], steps[-1] + 1, max(1, points // per_range) + 1)
    starts = np.unique(np.searchsorted(steps, edges[:-1], "left"))
    starts = starts[starts < n]
    chosen = []
    for key in (np.where(bad, np.inf, values), np.where(bad, np.inf, -values)):
        smallest = np.repeat(np.minimum.reduceat(key, starts), np.diff(np.append(starts, n)))
        chosen.append(_first_of_each(np.flatnonzero(key == smallest), starts))
    if per_range == 3:
        chosen.append(_first_of_each(np.flatnonzero(bad), starts))
    kept: Ints = np.unique(np.concatenate(chosen))
    return kept


def _first_of_each(index: Ints, starts: Ints) -> Ints:
    """Of rising indices, the first one in each of the ranges that begin at `starts`."""
    which = np.searchsorted(starts, index, "right")
    return index[np.flatnonzero(np.diff(which, prepend=-1))]


def parse_cursor(cursor: str | None) -> tuple[int, str] | None:
    """The key that a listing's cursor stands for. Raises Invalid."""
    if not cursor:
        return None
    created, _, run = cursor.partition("~")
    if not (created.isascii() and created.isdecimal() and int(created) <= limits.INTEGER_MAX) or not run:
        raise Invalid(f"cursor is {cursor!r}: give the one from the page before, unchanged")
    return int(created), run


def plain(value: float) -> float | str:
    """A number JSON can carry; NaN and the infinities as the strings the wire uses."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value
