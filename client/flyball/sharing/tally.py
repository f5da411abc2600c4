"""What all ranks saw and used, step by step, as one: rank 0 tells it to the service.

Rule of this module: a step is told once every rank that is still training has told all of it, in the order of steps;
sums run in the order of ranks, so that the same numbers always give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

from flyball import limits
from flyball.columns import Signals
from flyball.sharing.noise_scale import NoiseScale
from flyball.sharing.slots import DONE, JOINED, Row, Slot
from flyball.wire import Settings


class Used(NamedTuple):
    """What one rank's step used, from `step` on until the next of these. decided .. controls: what only rank 0's is
    asked for."""

    step: int
    settings: Settings
    conflict: str = ""
    wanted_lr: tuple[float, ...] | None = None
    decided: int | None = None
    late: bool = False
    confirms: int = 0
    controls: Mapping[str, float] = {}


class Told(NamedTuple):
    """One step: its signals (None: nobody told any), and what was used from it on where that changed, with on how many
    ranks of how many."""

    step: int
    signals: Signals | None
    used: tuple[tuple[Used, int, int], ...]


class Tally:
    """Of one attempt."""

    def __init__(self, ranks: int) -> None:
        self._rows: list[dict[int, Row]] = [{} for _ in range(ranks)]
        self._receipts: list[deque[Used]] = [deque(maxlen=limits.RECEIPTS_MAX) for _ in range(ranks)]
        self._in_force: list[Used | None] = [None] * ranks
        self._through: list[float] = [-1] * ranks
        self._gone = [False] * ranks
        self._others: dict[int, Mapping[str, float]] = {}
        self._noise_scale = NoiseScale()

    def own(self, step: int, others: Mapping[str, float] | None) -> None:
        """Rank 0's signals besides those that all ranks share."""
        if others:
            self._others[step] = others

    def take(self, rank: int, slot: Slot, used: Sequence[Used]) -> None:
        """What a rank told in one exchange."""
        self._rows[rank].update((row.step, row) for row in slot.rows)
        self._receipts[rank].extend(used)
        self._gone[rank] = slot.head.tag in (DONE, JOINED)
        self._through[rank] = slot.head.through

    def abandon(self) -> None:
        """The other ranks will tell no more: what rank 0 saw and used is told as it is."""
        self._gone = [True] * len(self._gone)

    def tell(self) -> Iterator[Told]:
        """The steps that every rank has told all of, each once."""
        training = [t for t, gone in zip(self._through, self._gone, strict=True) if not gone]
        through = min(training, default=inf)
        steps = {step for rows in self._rows for step in rows} | {one.step for r in self._receipts for one in r}
        for step in sorted(step for step in steps if step <= through):
            rows = [taken.pop(step, None) for taken in self._rows]
            told = self._signals(step, [row for row in rows if row is not None])
            yield Told(step, told, self._used(step, rows))

    def _signals(self, step: int, rows: list[Row]) -> Signals | None:
        others = dict(self._others.pop(step, {}))
        if not rows:
            return None
        loss, reward, grad_norm = (_mean(rows, name) for name in ("loss", "reward", "grad_norm"))
        local_sq, mean_sq = _mean(rows, "local_sq"), _mean(rows, "mean_sq")
        if local_sq is not None and mean_sq is not None:
            others |= {"local_grad_sq": local_sq, "mean_grad_sq": mean_sq}
            local = [(row.local_sq, row.weight) for row in rows if row.local_sq is not None]
            scale = self._noise_scale.take(local, mean_sq) if len(local) == len(self._rows) else None
            if scale is not None:
                others["noise_scale"] = scale
        return loss, reward, grad_norm, others or None

    def _used(self, step: int, rows: list[Row | None]) -> tuple[tuple[Used, int, int], ...]:
        """What rank 0's receipts say from here on, each with on how many ranks that was so, of how many."""
        own: list[Used] = []
        reported: list[tuple[int, str]] = []
        moved = False
        for rank, receipts in enumerate(self._receipts):
            while receipts and receipts[0].step <= step:
                self._in_force[rank] = newest = receipts.popleft()
                moved = True
                if rank == 0:
                    own.append(newest)
                elif newest.conflict:
                    reported.append((rank, newest.conflict))
        first = self._in_force[0]
        if not moved or first is None:
            return ()
        if not own:  # another rank's changed, and rank 0's did not
            own = [first._replace(step=step, conflict="", confirms=0)]
        here = [rank for rank in range(len(rows)) if not self._gone[rank] or rows[rank] is not None]
        agreeing, conflict = self._agreeing(first, here)
        # What was overwritten in time was used on that rank all the same, and is told as well.
        told = (own[-1].conflict, conflict, *(f"rank {rank}: {one}" for rank, one in reported if one not in conflict))
        last = own[-1]._replace(conflict="; ".join(filter(None, told))[: limits.CONFLICT_CHARS])
        return (*((one, agreeing, len(here)) for one in own[:-1]), (last, agreeing, len(here)))

    def _agreeing(self, first: Used, here: list[int]) -> tuple[int, str]:
        """On how many ranks what was to be used was used, and what the others did."""
        wanted = first.settings if first.wanted_lr is None else first.settings._replace(lr=first.wanted_lr)
        agreeing, conflicts = 0, []
        for rank in here:
            one = self._in_force[rank]
            if one is None or (one.wanted_lr is None and _bits(one.settings) == _bits(wanted)):
                agreeing += 1
            elif rank:
                difference = _difference(one.settings, wanted)
                conflicts.append(f"rank {rank} used {difference}" + (f": {one.conflict}" if one.conflict else ""))
        return max(agreeing, 1), "; ".join(conflicts)[: limits.CONFLICT_CHARS]


def _mean(rows: list[Row], name: str) -> float | None:
    """The mean by weight over the ranks that measured it, summed in their order; the value itself where all say the
    same."""
    found = [(value, row.weight) for row in rows if (value := getattr(row, name)) is not None and row.weight > 0]
    if not found:
        return None
    first = found[0][0]
    if all(value == first for value, _ in found):
        return float(first)
    total = weights = 0.0
    for value, weight in found:
        total += value * weight
        weights += weight
    return total / weights


def _bits(settings: Settings) -> tuple[object, ...]:
    """Equal where every bit is, NaN included."""
    rows = (settings.lr, settings.momentum or (), settings.noise_std or ())
    return tuple(tuple(None if value is None else float.hex(float(value)) for value in row) for row in rows)


def _difference(used: Settings, wanted: Settings) -> str:
    """The first setting that differs, in words."""
    for name in Settings._fields:
        mine, theirs = getattr(used, name), getattr(wanted, name)
        if mine is None or theirs is None or mine == theirs:
            continue
        found, told = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), (mine, theirs))
        what = "" if name == "lr" else f"{name} "
        return f"{what}{found} instead of {told}"
    return "other settings"
