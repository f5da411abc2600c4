"""Several optimizers as one run: one step of the run is a step of the last of them.

Rule of this module: settings are asked for once a step, when the first of them steps, and go into each optimizer just
before it steps itself. So each is read back after its own step, and a scheduler of it finds its own values then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

from flyball.adapters.groups import effective
from flyball.governor import Governor
from flyball.optimizer import Conflict, Optimizer
from flyball.pending import Pending
from flyball.wire import Group, Settings

#: An optimizer that steps several times within one step of the run gets other noise each time.
SEED_STRIDE = 1_000_003


class Part(Optimizer, Protocol):
    """One of them."""

    declared: tuple[Group, ...]

    def steer(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call these around every step of the optimizer."""

    def effective(self) -> dict[str, float]:
        """The learning rates that LR-free groups found for themselves, by group."""


class Several:
    """See the module's head. parts: in the order in which they were listed."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._free = [part for part in parts if any(group.lr_free for group in part.declared)]
        ends = list(accumulate(len(part.declared) for part in parts))
        self._slices = [slice(end - len(part.declared), end) for part, end in zip(parts, ends, strict=True)]
        #: What `write` was asked for in the step that is under way, split up; None: no step is, or nothing was asked.
        self._asked: tuple[list[Settings | None], tuple[Any, ...], tuple[Any, ...], int | None] | None = None
        self._split: tuple[Settings | None, list[Settings | None]] = (None, [None] * len(parts))
        self._under_way = False
        #: How often each stepped within the step that is under way, and what each used when it stepped last.
        self._times = [0] * len(parts)
        self._used: list[Settings] = [Settings(tuple(g.lr for g in part.declared)) for part in parts]
        self._whole: tuple[list[Settings], Settings] | None = None

    def steer(self, governor: Governor) -> None:
        """Call the governor around every step of the last one."""
        for k, part in enumerate(self._parts):
            part.steer(partial(self._before, governor, k), partial(self._after, governor, k))

    def detach(self) -> None:
        """See `optimizer.Optimizer`."""
        for part in self._parts:
            part.detach()

    def forget(self) -> None:
        """See `optimizer.Optimizer`."""
        self._end()
        for part in self._parts:
            part.forget()

    def number(self, value: Any) -> float | Pending:
        """See `optimizer.Optimizer`."""
        return self._parts[0].number(value)

    def write(
        self,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
        noise_seed: int | None,
    ) -> Conflict | None:
        """Keep them for each optimizer's own step. See `optimizer.Optimizer`."""
        if settings is not self._split[0]:
            self._split = settings, [None if settings is None else _part(settings, its) for its in self._slices]
        whole = len(bounds) == self._slices[-1].stop
        its_bounds = tuple(bounds[its] if whole else bounds for its in self._slices)
        self._asked = self._split[1], tuple(reference[its] for its in self._slices), its_bounds, noise_seed
        return None

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """What each used when it stepped. One that did not step in this step of the run is written all the same, so
        that it stands there, and is told. See `optimizer.Optimizer`."""
        conflict = None
        for k, times in enumerate(self._times):
            if not times:
                conflict = self._write(k, noisy=False) or conflict
                conflict = self._read(k) or conflict
        self._end()
        if self._whole is None or any(a is not b for a, b in zip(self._whole[0], self._used, strict=True)):
            self._whole = list(self._used), self._joined()
        return self._whole[1], conflict

    def _before(self, governor: Governor, k: int) -> None:
        if not self._under_way:
            self._under_way = True
            governor.before_step()
        governor.aside(partial(self._write, k))
        self._times[k] += 1

    def _after(self, governor: Governor, k: int) -> None:
        governor.aside(partial(self._read, k))
        if k == len(self._parts) - 1:
            governor.after_step()
            if self._free:
                found = {name: value for part in self._free for name, value in part.effective().items()}
                governor.measured(effective(found, alone=False))

    def _write(self, k: int, *, noisy: bool = True) -> Conflict | None:
        if self._asked is None:
            return None
        settings, reference, bounds, seed = self._asked
        if seed is not None:
            seed = seed + k * 1009 * 1009 + self._times[k] * SEED_STRIDE if noisy else None
        return self._parts[k].write(settings[k], reference[k], bounds[k], seed)

    def _read(self, k: int) -> Conflict | None:
        self._used[k], conflict = self._parts[k].read_back()
        if conflict is None or conflict.wanted_lr is None:
            return conflict
        wanted = [conflict.wanted_lr if i == k else used.lr for i, used in enumerate(self._used)]
        return conflict._replace(wanted_lr=tuple(value for row in wanted for value in row))

    def _end(self) -> None:
        self._asked, self._under_way = None, False
        self._times = [0] * len(self._parts)

    def _joined(self) -> Settings:
        momentum: list[float | None] = []
        noise: list[float] = []
        for part, used in zip(self._parts, self._used, strict=True):
            none = tuple(None if group.momentum is None else 0.0 for group in part.declared)
            momentum += none if used.momentum is None else used.momentum
            noise += used.noise_std or (0.0,) * len(part.declared)
        lr = tuple(value for used in self._used for value in used.lr)
        told = any(used.momentum is not None for used in self._used)
        return Settings(lr, tuple(momentum) if told else None, tuple(noise) if any(noise) else None)


def _part(settings: Settings, its: slice) -> Settings:
    lr, momentum, noise_std = settings
    return Settings(lr[its], None if momentum is None else momentum[its], None if noise_std is None else noise_std[its])
