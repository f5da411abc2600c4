"""A Keras optimizer as the governor needs it: its learning rate is a variable, written in place.

Rule of this module: a value is written only where another one stands, or may stand. What stands is read where that
waits for nothing, else it is what was written, for as long as nobody has touched it.
"""

from __future__ import annotations

from math import inf
from typing import Any

import keras

from flyball.adapters.around import factor
from flyball.adapters.keras_backend import Scalars, at_once, is_marked, mark, number, plainly, rounded
from flyball.adapters.writers import holders
from flyball.optimizer import Conflict
from flyball.pending import Pending
from flyball.wire import Group, Settings

SCHEDULED = (
    "the optimizer's learning rate is a {kind}, which Keras computes inside of the compiled step: make the optimizer "
    "with a float, and let the service have the schedule (base={{'type': 'cosine', ...}}), or use a "
    "keras.callbacks.LearningRateScheduler with mode='multiplier'"
)


class KerasOptimizer:
    """See `flyball.optimizer.Optimizer`. Raises ValueError where a learning rate is no plain number."""

    def __init__(self, model: Any, scalars: Scalars, multiplier: bool) -> None:
        self._model = model
        self._scalars = scalars
        self._multiplier = multiplier
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # a LossScaleOptimizer has one
        optimizers = list(getattr(inner, "optimizers", None) or [inner])  # a MultiOptimizer has several
        for one in optimizers:
            if not hasattr(one._learning_rate, "assign"):  # the class is called differently from version to version
                raise ValueError(SCHEDULED.format(kind=type(one._learning_rate).__name__))
        self._variables = [one._learning_rate for one in optimizers]
        names = ["default"] if len(optimizers) == 1 else [str(one.name) for one in optimizers]
        self.groups = tuple(
            Group(name, plainly(variable), None, None) for name, variable in zip(names, self._variables, strict=True)
        )
        #: What stood in each variable when this looked last, and the mark of what held it; None: not looked at.
        self._stands: list[tuple[float, Any]] | None = None
        #: Multiplier mode, during a step: the scheduler's values.
        self._bases: list[float] | None = None
        self._used: Settings | None = None
        self._writer: str | None = None

    def write(
        self,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
        noise_seed: int | None,
    ) -> Conflict | None:
        """See `optimizer.Optimizer`."""
        self._put_back()  # a step that failed on the way left its values behind
        found = [self._now(i) for i in range(len(self._variables))]
        conflict = None if self._multiplier else self._foreign(found)
        if self._multiplier:
            self._bases = [self.groups[i].lr if value is None else value for i, value in enumerate(found)]
            wanted = [self._product(i, base, settings, reference, bounds) for i, base in enumerate(self._bases)]
        elif settings is None:
            wanted = [self.groups[i].lr if value is None else value for i, value in enumerate(found)]
        else:
            wanted = list(settings.lr)
        for variable, value, target in zip(self._variables, found, wanted, strict=True):
            if value is None or value != rounded(variable, target):
                self._scalars.write(variable, target)
        self._look(wanted)
        return conflict

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """What the step used: nobody writes while it runs, unless a `train_step` does itself."""
        stands = self._stands or []
        used, conflict = [value for value, _ in stands], None
        for i, now in enumerate(self._now(i) for i in range(len(stands))):
            if now is not None and now != used[i]:
                conflict = conflict or self._conflict(i, "within the step", now, used[i])
                used[i] = now
        if conflict is not None:
            conflict = conflict._replace(wanted_lr=tuple(value for value, _ in stands))
        self._put_back()
        if not self._multiplier:
            self._look(used)
        if self._used is None or list(self._used.lr) != used:
            self._used = Settings(tuple(used), None, None)
        return self._used, conflict

    @property
    def stood(self) -> tuple[float, ...]:
        """The learning rates that stood when this looked last."""
        return tuple(value for value, _ in self._stands or ()) or tuple(group.lr for group in self.groups)

    def forget(self) -> None:
        """See `optimizer.Optimizer`."""
        self._stands = None

    def number(self, value: Any) -> float | Pending:
        """See `optimizer.Optimizer`."""
        return number(value)

    def detach(self) -> None:
        """See `optimizer.Optimizer`."""

    def _look(self, meant: list[float]) -> None:
        """Note what stands now; meant: what does as far as is known."""
        pairs = zip(self._variables, meant, strict=True)
        self._stands = [(rounded(variable, value), mark(self._scalars.holder(variable))) for variable, value in pairs]

    def _now(self, group: int) -> float | None:
        """What stands in the variable; None where that is not known without waiting."""
        holder = self._scalars.holder(self._variables[group])
        if self._stands is not None and is_marked(holder, self._stands[group][1]):
            return self._stands[group][0]
        return at_once(holder)

    def _foreign(self, found: list[float | None]) -> Conflict | None:
        """Who else wrote since the last step, if anybody."""
        for i, (value, stand) in enumerate(zip(found, self._stands or (), strict=False)):
            if value is not None and value != stand[0]:
                return self._conflict(i, "before the step", value, stand[0])
        return None

    def _product(
        self,
        group: int,
        base: float,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
    ) -> float:
        """Multiplier mode: the scheduler's value times the policy's factor, inside the bounds."""
        times = 1.0 if settings is None else factor(settings.lr[group], reference[group])
        low, high = bounds[group] if group < len(bounds) else (0.0, inf)
        # A scheduler's 0 stays 0: no bound may wake what its owner froze.
        return min(max(base * times, low), high) if base else base

    def _put_back(self) -> None:
        bases, self._bases = self._bases, None
        if bases is not None:
            for variable, base in zip(self._variables, bases, strict=True):
                self._scalars.write(variable, base)
            self._look(bases)

    def _conflict(self, group: int, when: str, found: float, stood: float) -> Conflict:
        if self._writer is None:
            self._writer = self._name_writer()
        name = self.groups[group].name
        return Conflict(
            f"{when} by {self._writer} in {name}",
            f"{self._writer} writes the learning rate of group {name} {when}: {found:.9g} was found where {stood:.9g} "
            "stood",
        )

    def _name_writer(self) -> str:
        """The callback that writes learning rates, if there is one at this model."""
        kinds = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
        found = sorted({type(one).__name__ for one in holders(self._model) if isinstance(one, kinds)})
        return f"somebody else (perhaps {' or '.join(found)})" if found else "somebody else"
