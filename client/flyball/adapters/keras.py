"""Keras 3 on its PyTorch, JAX and TensorFlow backends: one callback for `model.fit`.

    model.fit(x, y, callbacks=[FlyballCallback(run="mnist-7", policy="windowed")])

It writes the optimizer's learning rate as late as can be, between the callbacks' `on_train_batch_begin` and the step
(nothing is compiled again, and that very step uses it, on JAX too), and reports the loss of every single batch: not
Keras's logs, which hold the mean of the epoch so far. It needs the metric named "loss" that every compiled model has; a
model with a `train_step` and metrics of its own must have one of that name among them. What validation finds
(`val_loss` ...) is reported with the last step of its epoch. `callback.governor` is there from the first epoch on:
status, on, control.

What a step is: one update of the weights. With `gradient_accumulation_steps=k` that is every k-th batch, and its loss
the mean of the k. With `steps_per_execution=n` Keras hands over n batches at once: those are one step, with the loss of
the last of them. A batch whose gradients a LossScaleOptimizer throws away counts as a step, with its loss: Keras does
not tell without waiting for the device.

Groups: one, "default"; with a `MultiOptimizer` one per optimizer, by its name. Momentum and betas are numbers that
Keras compiles into the step, so they are not steered; nor is gradient noise added.

Others that write: in the default mode their values are overwritten, and they are named (`ReduceLROnPlateau`, say). With
mode="multiplier" the service's factor multiplies what they wrote, and their own value is put back behind every step. A
`LearningRateSchedule` in the optimizer is computed inside of the
compiled step, where nothing can be multiplied: it is refused before training, with the remedy.

Checkpoints: `callback.state_dict()` is the token to save beside the weights, `resume=` takes it back. Beside
`keras.callbacks.BackupAndRestore(backup_dir)` give the same `backup_dir` here: a job that is started again then goes on
with the run, from the very step that the restored optimizer stands at. So does a second `fit` with the same callback.

Where training fails, Keras tells its callbacks nothing: the run stays open, to be resumed; `callback.close("failed")`
ends it.

Rule of this module: the model's training function is wrapped, nothing else of it is replaced. There is no hook behind a
batch, since Keras waits for the device wherever a callback has one; reports leave before the next batch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import keras

from flyball.adapters.keras_backend import BACKEND, Scalars, plainly
from flyball.adapters.keras_loss import last_loss
from flyball.adapters.keras_optimizer import KerasOptimizer
from flyball.errors import FlyballError
from flyball.govern import govern
from flyball.governor import Governor
from flyball.options import Options, checked

log = logging.getLogger("flyball")

#: The file in `backup_dir` that says which run the backup belongs to.
BACKUP = "flyball.json"


class FlyballCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Let the service steer the optimizer of the model that this is given to.

    backup_dir: that of a `keras.callbacks.BackupAndRestore` beside it. options: see `flyball.options.Options`; `run`
    must be given. What is wrong with them raises here or, before the first batch, in `fit`: ValueError, TypeError,
    Refused, FlyballError.
    """

    def __init__(self, *, backup_dir: str | os.PathLike[str] | None = None, **options: Unpack[Options]) -> None:
        super().__init__()
        checked(options)
        self._options = options
        self._backup = None if backup_dir is None else Path(backup_dir) / BACKUP
        self._governor: Governor | None = None
        self._scalars: Any = None
        self._last_loss: Any = None
        #: What the next attach goes on from; None: as the options say.
        self._token: dict[str, Any] | None = None
        self._every = 1
        self._batches = 0
        self._losses: list[Any] = []
        self._untold = False

    @property
    def governor(self) -> Governor:
        """The governor; FlyballError before the first epoch."""
        if self._governor is None:
            raise FlyballError("there is no governor yet: it is made when training begins")
        return self._governor

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint token, after the newest batch: to be saved with the weights."""
        if self._governor is None:
            return dict(self._token or {})
        self._report({})
        return self._governor.state_dict()

    def close(self, outcome: str = "finished") -> None:
        """Say how the training ended and let go of the optimizer: see `Governor.close`."""
        if self._governor is not None:
            self._token = self.state_dict()
            self._governor.close(outcome)
            self._governor = None
            if (function := self._model.train_function) is not None:
                self._model.train_function = getattr(function, "flyball_inner", function)

    # -- Keras's hooks -------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """A fit that was broken off before is left behind; the run goes on."""
        self.close("")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Attach, where that is still to be done: other callbacks have restored what they restore."""
        if self._governor is None:
            self._attach(self.model)
        if not hasattr(self._model.train_function, "flyball_inner"):  # made anew, by whom ever
            self._model.train_function = self._around(self._model.train_function)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Report the step before."""
        self._report({})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Report the last step of the epoch, with what validation found."""
        self._report({name: value for name, value in (logs or {}).items() if name.startswith("val_")})

    def on_train_end(self, logs: Any = None) -> None:
        """The run has finished."""
        self.close()

    # -- leaves --------------------------------------------------------------------------------------

    def _attach(self, model: Any) -> None:
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        several = getattr(model, "steps_per_execution", 1) or 1
        self._every = 1 if several > 1 else getattr(inner, "gradient_accumulation_steps", None) or 1
        self._batches = made = int(plainly(inner._iterations))
        self._losses, self._untold = [], False
        if several > 1:
            log.info("flyball: steps_per_execution is %d: so many batches are one step, with the last's loss", several)
        self._scalars = Scalars(model)
        optimizer = KerasOptimizer(model, self._scalars, self._options.get("mode") == "multiplier")
        options: dict[str, Any] = dict(self._options)
        if self._token:
            options["resume"] = self._token
        elif self._backup is not None:
            options |= _backed_up(self._backup, options, made // max(several, self._every))
        self._last_loss = last_loss(model)
        if BACKEND == "jax" and hasattr(model, "_record_training_state_sharding_spec"):
            model._record_training_state_sharding_spec()  # Keras 3.5 took them before the model had this variable
        if self._last_loss is None:
            log.warning("flyball: no metric of the model is named 'loss': no loss is reported until one is")
        self._governor = govern(optimizer, optimizer.groups, options)

    def _around(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The training function, with the governor around it."""

        @functools.wraps(inner)
        def train_function(*args: Any) -> Any:
            if BACKEND != "jax":
                self._before()
                logs = inner(*args)
                self._after()
                return logs
            self._scalars.state = args[0]
            try:
                self._before()
                logs, self._scalars.state = inner(self._scalars.state, *args[1:])
                self._after()
                return logs, self._scalars.state
            finally:
                self._scalars.state = None

        train_function.flyball_inner = inner  # type: ignore[attr-defined]
        return train_function

    def _before(self) -> None:
        self._batches += 1
        if self._governor is not None and self._batches % self._every == 0:
            self._governor.before_step()

    def _after(self) -> None:
        if self._last_loss is not None:
            self._losses.append(self._scalars.copy(self._last_loss))
        if self._governor is not None and self._batches % self._every == 0:
            self._governor.after_step()
            self._untold = True

    def _report(self, signals: dict[str, Any]) -> None:
        """Tell the last step's loss, unless that is done."""
        if not self._untold or self._governor is None:
            return
        self._untold = False
        losses, self._losses = self._losses, []
        loss = None if not losses else losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)
        self._governor.step(loss, **signals)
        if self._governor.should_stop:
            self._model.stop_training = True


def _backed_up(path: Path, options: dict[str, Any], step: int) -> dict[str, Any]:
    """What to resume from, as the backup's note says; without one, a note is made."""
    run, project = options["run"], options.get("project", "default")
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"run": run, "project": project, "from": step}), encoding="utf-8")
        return {}
    if (note["run"], note["project"]) != (run, project):
        raise ValueError(
            f"{path} is of run {note['run']!r} in {note['project']!r}: give that one, or another backup_dir"
        )
    return {"resume": {"run": run, "project": project, "step": max(step - int(note["from"]), 0)}}
