"""The loss of every single batch, out of a Keras model whose logs only have the mean of the epoch so far.

Rule of this module: the number is the one that the training step computed, to the bit. The metric that takes the mean
is given one more variable, which holds what it was last told; its mean stays what it was.
"""

from __future__ import annotations

from typing import Any

import keras


def last_loss(model: Any) -> Any:
    """A variable that holds the loss of the last batch: what the metric named "loss" was told. None where there is no
    such metric. The training function is made anew where what was traced before does not know of the variable."""
    metric = next((metric for metric in model.metrics if metric.name == "loss"), None)
    if metric is None:
        return None
    last = getattr(metric, "flyball_last", None)
    if last is None:
        last = _remembering(model, metric)
        model.make_train_function(force=True)
    return last


def _remembering(model: Any, metric: Any) -> Any:
    """Have the metric remember what it is told; returns the variable that does."""
    strategy = getattr(model, "distribute_strategy", None)  # TensorFlow makes variables inside of it
    if strategy is None:
        last = _variable(metric)
    else:
        with strategy.scope():
            last = _variable(metric)
    update = metric.update_state

    def update_state(values: Any, *args: Any, **kwargs: Any) -> Any:
        last.assign(keras.ops.cast(keras.ops.mean(values), last.dtype))
        return update(values, *args, **kwargs)

    metric.update_state = update_state
    metric.flyball_last = last
    return last


def _variable(metric: Any) -> Any:
    return metric.add_variable(shape=(), initializer="zeros", dtype=metric.dtype, name="last")
