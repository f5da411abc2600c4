"""What tests/client/test_keras_adapter.py has done in a process per backend: `python keras_training.py SERVER`.

Rule of this module: each function trains for real, and returns what a user would see; the test judges it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

import keras
import numpy as np

from flyball.adapters.keras import FlyballCallback

SERVER = sys.argv[1]
#: Halves at every step whose loss is no better than the best.
HALVING = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}
COSINE = {"type": "cosine", "T_max": 40}


def value_of(variable: Any) -> float:
    value = variable.value
    return float(value.numpy() if hasattr(value, "numpy") else value)


class Spy(keras.callbacks.Callback):
    """What stands behind each batch, which is what it used. write: by batch, what to write before it."""

    def __init__(self, write: dict[int, float] | None = None) -> None:
        super().__init__()
        self.used: list[float] = []
        self._write = write or {}
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.batches in self._write:
            self.model.optimizer.learning_rate = self._write[self.batches]
        self.batches += 1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.used.append(value_of(self.model.optimizer.learning_rate))


def model_of(optimizer: Any, **options: Any) -> Any:
    """A model whose loss is the mean of its labels."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    loss = lambda y, y_pred: 0 * keras.ops.sum(y_pred) + y[:, 0]  # noqa: E731
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def data(losses: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((len(losses), 2), np.float32), np.asarray(losses, np.float32).reshape(-1, 1)


def callback(run: str, **options: Any) -> FlyballCallback:
    return FlyballCallback(**{"run": run, "server": SERVER, "policy": HALVING, "lag": 0, "wait_s": 10.0, **options})


def fit(model: Any, losses: Any, *callbacks: Any, **options: Any) -> Any:
    x, y = data(losses)
    return model.fit(x, y, **{"batch_size": 1, "shuffle": False, "verbose": 0, "callbacks": [*callbacks], **options})


def every_step() -> Any:
    """A setting that changes at every step, with a model that must not be compiled again."""
    model, traced = model_of(keras.optimizers.Adam(0.1)), []
    plain = model.train_step
    model.train_step = lambda *args: (traced.append(1), plain(*args))[1]
    before = Before()
    fit(model, np.linspace(1, 0.5, 40), before, callback("every", policy="constant", base=COSINE))
    return {"used": before.used, "traced": len(traced)}


class Before(keras.callbacks.Callback):
    """What a callback that only reads finds behind each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.used.append(value_of(self.model.optimizer.learning_rate))


def raw_losses() -> Any:
    """Losses of unequal batches and epochs; the last thing Keras logs is their mean."""
    rng = np.random.default_rng(0)
    losses = (10 ** rng.uniform(-3, 3, 21)).astype(np.float32)
    model = model_of(keras.optimizers.SGD(0.1))
    x, y = data(losses)
    history = fit(model, losses, callback("raw"), batch_size=4, epochs=2, validation_data=(x[:3], y[:3]))
    means = [float(np.mean(losses[i : i + 4], dtype=np.float32)) for i in range(0, 21, 4)]
    return {"means": means * 2, "logged": history.history["loss"], "val": history.history["val_loss"]}


def others() -> Any:
    """Somebody writes before a batch, and ReduceLROnPlateau at the end of an epoch."""
    model, spy = model_of(keras.optimizers.SGD(0.1)), Spy({2: 0.03})
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=0, min_delta=0)
    steered = callback("others", policy="constant")
    kept = {}
    last = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: kept.update(n=steered.governor.status.conflicts))
    fit(model, [1.0] * 4, spy, plateau, steered, last, epochs=3)
    return {"used": spy.used, "conflicts": kept["n"]}


def multiplied() -> Any:
    """A scheduler by epoch underneath, and a factor of a half from the second step on."""
    model, spy = model_of(keras.optimizers.SGD(0.1)), Spy()
    seen: list[float] = []
    by_epoch = keras.callbacks.LearningRateScheduler(lambda epoch, lr: (seen.append(lr), 0.1 * 0.1**epoch)[1])
    steered = callback("multiplied", mode="multiplier")
    fit(model, [1.0] * 3, by_epoch, spy, steered, epochs=2)
    return {"behind": spy.used, "seen": seen}


def accumulated() -> Any:
    """Four micro-batches a step; seven leave three that wait for the next epoch."""
    model = model_of(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    steered = callback("accumulated")
    fit(model, np.arange(7) + 1.0, steered, epochs=2)
    return steered.state_dict()["step"]


def schedule() -> Any:
    """What is said of a schedule in the optimizer."""
    model = model_of(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 100)))
    try:
        fit(model, [1.0], callback("schedule"))
    except ValueError as error:
        return str(error)
    return ""


def several_at_once() -> Any:
    """steps_per_execution; Keras has it not on PyTorch."""
    if keras.backend.backend() == "torch":
        return 3
    model = model_of(keras.optimizers.SGD(0.1), steps_per_execution=4)
    steered = callback("several")
    fit(model, np.arange(12) + 1.0, steered)
    return steered.state_dict()["step"]


def killed_and_restored() -> Any:
    """A job that ends in its third epoch is started again, with the same lines, and goes on from the second."""
    with tempfile.TemporaryDirectory() as folder:
        backup = os.path.join(folder, "backup")

        def job(spoiled_at: int | None) -> list[float]:
            model = model_of(keras.optimizers.SGD(0.1))
            spy, count = Spy(), [0]

            def spoil(batch: int, logs: Any = None) -> None:
                count[0] += 1
                if count[0] == spoiled_at:
                    raise KeyboardInterrupt

            steered = callback("restored", backup_dir=backup)
            spoiler = keras.callbacks.LambdaCallback(on_train_batch_begin=spoil)
            try:
                fit(model, [1.0] * 3, keras.callbacks.BackupAndRestore(backup), spoiler, spy, steered, epochs=4)
            except KeyboardInterrupt:
                steered.close("")
            return spy.used

        return [job(8), job(None)]


def fitted_twice() -> Any:
    """The same callback in two fits; weights that were saved between them load into a model without it."""
    model, steered, spy = model_of(keras.optimizers.SGD(0.1)), callback("twice"), Spy()
    fit(model, [1.0] * 3, steered, spy)
    with tempfile.TemporaryDirectory() as folder:
        model.save(os.path.join(folder, "model.keras"))
        model.save_weights(os.path.join(folder, "model.weights.h5"))
        model_of(keras.optimizers.SGD(0.1)).load_weights(os.path.join(folder, "model.weights.h5"))
    fit(model, [1.0] * 2, steered, spy)
    wrapped = hasattr(model.train_function, "flyball_inner")
    return {"used": spy.used, "wrapped": wrapped}


def broken_off(run: str) -> tuple[Any, FlyballCallback]:
    """A model, and the callback of a fit that a user ended with Ctrl-C behind its third batch."""
    model, steered, count = model_of(keras.optimizers.SGD(0.1)), callback(run), [0]

    def end(batch: int, logs: Any = None) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(model, [1.0] * 5, steered, keras.callbacks.LambdaCallback(on_train_batch_end=end))
    return model, steered


def after_a_broken_fit() -> Any:
    """The model is trained on: without the callback, batch by batch, and with a callback of another run."""
    model, old = broken_off("broken")
    model.optimizer.learning_rate = 1e-4
    fit(model, [1.0] * 2)
    model.train_on_batch(*data([1.0]))
    alone = value_of(model.optimizer.learning_rate)
    model.optimizer.learning_rate = 0.01
    spy = Spy()
    fit(model, [1.0] * 3, callback("unbroken"), spy)
    return {"alone": alone, "new": spy.used, "old": old.state_dict()["step"]}


def refusals() -> Any:
    """What is said of two callbacks in one fit, and of another optimizer in the second fit."""
    said = {}
    model = model_of(keras.optimizers.SGD(0.1))
    try:
        fit(model, [1.0], callback("one-of-two"), callback("two-of-two"))
    except ValueError as error:
        said["two"] = str(error)
    steered, loss = callback("recompiled"), model.loss
    fit(model, [1.0] * 3, steered)
    model.compile(optimizer=keras.optimizers.SGD(1e-5), loss=loss)
    try:
        fit(model, [1.0] * 3, steered)
    except ValueError as error:
        said["other"] = str(error)
    spy = Spy()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    fit(model, [1.0] * 2, steered, spy)
    return {**said, "same": spy.used}


def made_anew() -> Any:
    """A callback behind ours has the training function made anew for every epoch."""
    model, steered, spy = model_of(keras.optimizers.SGD(0.1)), callback("anew"), Spy()
    anew = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: model.make_train_function(force=True))
    fit(model, [1.0] * 2, steered, anew, spy, epochs=3)
    return {"step": steered.state_dict()["step"], "used": spy.used}


ALL = (
    every_step, raw_losses, others, multiplied, accumulated, schedule, several_at_once, killed_and_restored,
    fitted_twice, after_a_broken_fit, refusals, made_anew,
)  # fmt: skip

if __name__ == "__main__":
    print(json.dumps({one.__name__: one() for one in ALL}))
