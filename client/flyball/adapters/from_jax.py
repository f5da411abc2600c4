"""A number that is fetched from where JAX computes it.

Rule of this module: the training thread never waits for the device, and no array is touched once it may be donated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flyball.optimizer import plain_number
from flyball.pending import Pending


class FromJax:
    """A loss that JAX may still be computing."""

    def __init__(self, value: Any) -> None:
        self._value = value
        value.copy_to_host_async()

    def ready(self) -> bool:
        """Whether it has arrived. One that was given away (donated) will not: that counts as arrived."""
        return bool(self._value.is_deleted() or self._value.is_ready())

    def value(self) -> float:
        """The value; NaN where it was given away before it could be read."""
        return float("nan") if self._value.is_deleted() else float(np.asarray(self._value).reshape(()))


def number(value: Any) -> float | Pending:
    """See `flyball.optimizer.Optimizer.number`. An array over several processes must be the same on all."""
    if not isinstance(value, jax.Array):
        return plain_number(value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError("it is being traced: report what the jitted function returned, outside of it")
    if value.size != 1:
        raise TypeError(f"an array of shape {value.shape} is no single number")
    if not value.is_fully_addressable:
        if not value.is_fully_replicated:
            raise TypeError("it lies on several processes, and is not the same on all: reduce it first")
        value = value.addressable_data(0)
    return FromJax(value) if not value.is_ready() else float(np.asarray(value).reshape(()))


#: An array of its own with the same value: what a training step is given, it may give away.
copied = jax.jit(lambda value: value.copy())


def like(old: jax.Array, value: float) -> jax.Array:
    """An array of this value, of the type and at the place of the old one: nothing is compiled again for it."""
    typed = np.asarray(value, old.dtype)
    # Where an array may lie anywhere, one that must lie there would be compiled for anew.
    return jax.device_put(typed, old.sharding) if getattr(old, "committed", True) else jax.numpy.asarray(typed)
