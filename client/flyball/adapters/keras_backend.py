"""Scalars in a Keras model's variables, read and written between two batches on each of Keras's backends.

Rule of this module: JAX and PyTorch are never waited for. With TensorFlow reading a variable waits for the step, as
Keras's own progress bar does.

On JAX the variables of a model are empty while it trains: their values are handed to the training function and come
back from it, in the order of the variables. So there it is these values that are read and replaced.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from flyball.optimizer import plain_number
from flyball.pending import Pending

BACKEND = keras.backend.backend()
#: What JAX's training function is given holds, in this order.
_OPTIMIZER, _METRICS = 2, 3


class Scalars:
    """The scalars of a model's optimizer and metrics. state: what JAX's training function is given, or gave."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._places: dict[int, tuple[int, int]] = {}
        self.state: Any = None

    def holder(self, variable: Any) -> Any:
        """The array or tensor that is the variable's value now."""
        if self.state is None:
            return variable.value
        part, index = self._place(variable)
        return self.state[part][index]

    def copy(self, variable: Any) -> Any:
        """The value now, in an array that nothing changes any more."""
        value = self.holder(variable)
        if BACKEND == "jax":
            from flyball.adapters.from_jax import copied

            return copied(value)
        return value.detach().clone() if BACKEND == "torch" else value.numpy()

    def write(self, variable: Any, value: float) -> None:
        """Write a value, of the variable's type."""
        if self.state is None:
            variable.assign(value)
            return
        from flyball.adapters.from_jax import like

        part, index = self._place(variable)
        values = self.state[part]
        changed = type(values)([*values[:index], like(values[index], value), *values[index + 1 :]])
        self.state = (*self.state[:part], changed, *self.state[part + 1 :])

    def _place(self, variable: Any) -> tuple[int, int]:
        place = self._places.get(id(variable))
        if place is None:
            for part, known in (
                (_OPTIMIZER, self._model.optimizer.variables),
                (_METRICS, self._model.metrics_variables),
            ):
                for index, one in enumerate(known):
                    self._places[id(one)] = part, index
            place = self._places[id(variable)]
        return place


def at_once(holder: Any) -> float | None:
    """The value as a float where that waits for nothing, else None."""
    if BACKEND == "jax":
        return float(holder) if holder.is_ready() else None
    if BACKEND == "torch":
        return float(holder) if holder.device.type == "cpu" else None
    return float(holder.numpy())


def mark(holder: Any) -> Any:
    """What changes where the holder is written: another object, or the same in another version."""
    return holder, getattr(holder, "_version", None)


def is_marked(holder: Any, known: Any) -> bool:
    """Whether the holder is the very one that was marked, and was not written since."""
    if BACKEND == "tensorflow":  # a variable's value is a new object at every look
        return False
    return known is not None and holder is known[0] and getattr(holder, "_version", None) == known[1]


def rounded(variable: Any, value: float) -> float:
    """The value as the variable holds it."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return float(np.asarray(value, dtype)) if dtype in ("float16", "float32", "float64") else value


def plainly(variable: Any) -> float:
    """The value of a variable that is not being trained with."""
    return float(variable.value.numpy() if BACKEND == "tensorflow" else variable.value)


def number(value: Any) -> float | Pending:
    """See `flyball.optimizer.Optimizer.number`."""
    if BACKEND == "jax":
        from flyball.adapters import from_jax

        return from_jax.number(value)
    if BACKEND == "torch" and hasattr(value, "detach"):
        if value.numel() != 1:
            raise TypeError(f"a tensor of shape {tuple(value.shape)} is no single number")
        if value.is_cuda:
            from flyball.adapters.from_device import FromDevice

            return FromDevice(value.detach())
        return float(value.item())
    return float(value.numpy()) if hasattr(value, "numpy") else plain_number(value)
