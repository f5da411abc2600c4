"""Scalars of the training job that are steered like a learning rate (`kl_coef`, `grad_clip` ...).

Rule of this module: a control's value is finite and inside its declared bounds, whatever the service says. It is
replaced whole, so that reading it from any thread is one look at an attribute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any

from flyball import limits, wire

#: What a signal or a control may be called.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./@%+-]*")
#: Settings that every run has; a control of such a name would be mistaken for one.
BUILT_IN = ("lr", "momentum", "noise_std")


class Control:
    """One declared control; `value` is the service's newest, what the job began with before any."""

    __slots__ = ("_value", "declared")

    def __init__(self, declared: wire.Control) -> None:
        self.declared = declared
        self._value = declared.value

    @property
    def name(self) -> str:
        """What the run's record calls it."""
        return self.declared.name

    @property
    def value(self) -> float:
        """The value in force; may be read from any thread."""
        return self._value

    def __repr__(self) -> str:
        return f"Control({self.name!r}, {self._value!r}, min={self.declared.min!r}, max={self.declared.max!r})"

    def __float__(self) -> float:
        return self._value


class Controls:
    """The controls of one run, and which of them the service has yet to hear of.

    values: name -> value of all that the service knows of; another object whenever one of them changes.
    """

    def __init__(self) -> None:
        self.values: Mapping[str, float] = MappingProxyType({})
        self._controls: dict[str, Control] = {}
        self._untold: dict[str, wire.Control] = {}
        self._refused: set[str] = set()

    def declare(self, name: str, value: Any, low: Any, high: Any) -> Control:
        """A new control, or the one of that name. Raises ValueError where it makes no sense or contradicts itself."""
        declared = wire.Control(
            name, *(_number(name, *pair) for pair in (("value", value), ("min", low), ("max", high)))
        )
        if not isinstance(name, str) or len(name) > limits.NAME_MAX or not NAME.fullmatch(name) or name in BUILT_IN:
            raise ValueError(
                f"control {name!r:.150}: give a name of at most {limits.NAME_MAX} letters, digits and any of "
                f"_ . / @ % + - that is none of {', '.join(BUILT_IN)}"
            )
        if not declared.min <= declared.value <= declared.max:
            raise ValueError(f"control {name}: give min <= value <= max, not {low!r}, {value!r}, {high!r}")
        known = self._controls.get(name)
        if known is not None:
            if known.declared != declared:
                raise ValueError(f"control {name} is declared already, as {known!r}: give the same, or another name")
            return known
        if len(self._controls) >= limits.CONTROLS_MAX:
            raise ValueError(f"control {name}: a run has at most {limits.CONTROLS_MAX} controls")
        control = self._controls[name] = Control(declared)
        self._untold = {**self._untold, name: declared}
        return control

    def begin(self) -> None:
        """An attempt begins: until the service says more, every control is what the job begins with."""
        for control in self._controls.values():
            control._value = control.declared.value
        self._put_together()

    def tell_all(self) -> None:
        """The service may not know them any more: every one is declared again."""
        self._untold = {name: c.declared for name, c in self._controls.items() if name not in self._refused}

    @property
    def untold(self) -> tuple[wire.Control, ...]:
        """What is to be declared in the next report."""
        return tuple(self._untold.values())

    def told(self, declared: tuple[wire.Control, ...], refused: bool = False) -> None:
        """The service took these, or refused them: then they keep their values, and are not declared again."""
        names = {control.name for control in declared}
        self._untold = {name: c for name, c in self._untold.items() if name not in names}
        if refused:
            self._refused |= names
        self._put_together()

    def know(self, names: set[str]) -> None:
        """The service knows these, by what rank 0 of several says."""
        self.told(tuple(control for control in self.untold if control.name in names))

    def snapshot(self) -> dict[str, tuple[float, bool]]:
        """Every value, and whether the service knows of it."""
        return {name: (c._value, name in self.values) for name, c in list(self._controls.items())}

    def adopt(self, values: Mapping[str, float]) -> None:
        """Take over what the service says. What is no finite number changes nothing."""
        moved = False
        for name, value in values.items():
            control = self._controls.get(name)
            if control is None or not _is_finite(value):
                continue
            within = min(max(float(value), control.declared.min), control.declared.max)
            moved = moved or within != control._value
            control._value = within
        if moved:
            self._put_together()

    def _put_together(self) -> None:
        unknown = self._refused | self._untold.keys()
        values = {name: c._value for name, c in list(self._controls.items()) if name not in unknown}
        if values != self.values:
            self.values = MappingProxyType(values)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _number(name: Any, field: str, value: Any) -> float:
    if isinstance(value, bool) or not _is_finite(value):
        raise ValueError(f"control {name!r:.150}: {field} is {value!r:.80}: give a finite number")
    return float(value)
