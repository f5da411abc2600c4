"""A Keras model trained by `fit`, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from tests.conformance.loop import AFTER_CLOSE_LR, Trained

from flyball.adapters.keras import FlyballCallback

HOLDS = "float32"


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=lambda y, y_pred: 0 * keras.ops.sum(y_pred) + y[:, 0])
    steered, watcher = FlyballCallback(**options), Watcher(before, meddle_at)
    kept: dict[str, Any] = {}
    last = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: kept.update(token=steered.state_dict(), status=steered.governor.status)
    )
    x, y = np.ones((len(trace), 2), np.float32), np.asarray(trace, np.float32).reshape(-1, 1)
    model.fit(x, y, batch_size=1, shuffle=False, verbose=0, callbacks=[watcher, steered, last])
    model.optimizer.learning_rate = AFTER_CLOSE_LR
    one_more = Watcher(lambda i: None, None)
    model.fit(x[:1], y[:1], batch_size=1, verbose=0, callbacks=[one_more])
    return Trained(watcher.used, kept["token"], kept["status"], one_more.used[0])


def value_of(variable: Any) -> float:
    """A scalar variable's value."""
    value = variable.value
    return float(value.numpy() if hasattr(value, "numpy") else value)


class Watcher(keras.callbacks.Callback):  # type: ignore[misc]
    """Looks at what each step used, and is the other writer."""

    def __init__(self, before: Callable[[int], None], meddle_at: int | None) -> None:
        super().__init__()
        self.used: list[tuple[float, ...]] = []
        self._before, self._meddle_at = before, meddle_at

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Before the steered callback writes."""
        self._before(batch)
        if batch == self._meddle_at:
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            self.model.optimizer.learning_rate = 0.5 * value_of(self.model.optimizer.learning_rate)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """What the step used stands there until the next one."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self.used.append((value_of(self.model.optimizer.learning_rate),))
