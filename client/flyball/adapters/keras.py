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
with the run, from the very step that the restored optimizer stands at. So does a second `fit` with the same callback,
if the model has the same optimizer, or one that is compiled with the learning rate that the run began with or stands
at; any other is refused before training: a run keeps the learning rate it began with.

Where training fails, Keras tells its callbacks nothing: the run stays open, to be resumed; `callback.close("failed")`
ends it. A `fit` without the callback, `train_on_batch` and loops of your own are not steered; a `fit` with another one
goes on under that alone.

Rule of this module: the model's training function is wrapped, nothing else of it is replaced. There is no hook behind a
batch, since Keras waits for the device wherever a callback has one; reports leave before the next batch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import weakref
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
        #: The model and the optimizer that are steered, or were in the last fit.
        self._steered: Any = None
        self._optimizer: Any = None
        #: The learning rates that another optimizer may have, if it is to go on with the run.
        self._rates: set[tuple[float, ...]] = set()
        self._writing: KerasOptimizer | None = None
        #: Whether the coming call of the training function is one of a fit that this callback was given to.
        self._due = False
        self._warned = False
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
            self._due = False
            function = self._steered.train_function
            if getattr(function, "flyball_owner", None) is self:
                self._steered.train_function = function.flyball_inner

    # -- Keras's hooks -------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """A fit that was broken off before, this callback's or another's, is left behind; two in one are refused."""
        self.close("")
        known = _drivers.get(self.model)
        other = None if known is None else known()
        if other is not None and other is not self:
            if self.params is not None and other.params is self.params:  # Keras gives one dict to all of a fit
                raise ValueError(
                    "two FlyballCallbacks in one fit would both write the same learning rate: give one of them, and "
                    "shadows= for policies that are only to be watched"
                )
            other.close("")
        _drivers[self.model] = weakref.ref(self)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Attach, where that is still to be done: other callbacks have restored what they restore."""
        if self._governor is None:
            self._attach(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Report the step before, and see to it that the coming one is ours."""
        self._report({})
        model = self._steered
        if model is None:
            return
        if model.optimizer is not self._optimizer:
            if not self._warned:
                self._warned = True
                log.warning("flyball: the model was compiled anew within this fit: its new optimizer is not steered")
            return
        if getattr(model.train_function, "flyball_owner", None) is not self:  # made anew, by whom ever
            model.train_function = self._around(model.train_function)
        self._due = True

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
        self._check_goes_on(model, optimizer)
        options: dict[str, Any] = dict(self._options)
        if self._token:
            options["resume"] = self._token
        elif self._backup is not None:
            options |= _backed_up(self._backup, options, made // max(several, self._every))
        self._last_loss = last_loss(model)
        if BACKEND == "jax" and hasattr(model, "_record_training_state_sharding_spec"):
            model._record_training_state_sharding_spec()  # Keras 3.5 took them before the model had this variable
        if self._last_loss is None:
            log.warning(
                "flyball: no metric of the model is named 'loss', so no loss is reported: a model with metrics of its "
                "own needs keras.metrics.Mean(name='loss') among them"
            )
        self._governor = govern(optimizer, optimizer.groups, options)
        self._steered, self._optimizer, self._writing, self._warned = model, model.optimizer, optimizer, False

    def _check_goes_on(self, model: Any, optimizer: KerasOptimizer) -> None:
        """A run keeps the learning rates it began with. Raises ValueError where another optimizer has others."""
        found = tuple(group.lr for group in optimizer.groups)
        if self._writing is None:
            self._rates = {found}
        elif model.optimizer is not self._optimizer:
            run, known = self._options["run"], self._rates | {self._writing.stood}
            if found not in known and self._options.get("mode") != "multiplier":
                raise ValueError(
                    f"the model has another optimizer than in the last fit, with learning rate {_told(found)} in the "
                    f"place of {' or '.join(sorted(map(_told, known)))}, but run {run!r} would go on with its own: "
                    "give a new FlyballCallback with another run name, or compile the model with the old learning rate"
                )
            log.warning("flyball: the model has another optimizer than in the last fit; run %r goes on with it", run)

    def _around(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The training function, with the governor around it."""

        inner = getattr(inner, "flyball_inner", inner)

        @functools.wraps(inner)
        def train_function(*args: Any) -> Any:
            if not self._due:  # a fit without this callback, or train_on_batch
                return inner(*args)
            self._due = False
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
        train_function.flyball_owner = self  # type: ignore[attr-defined]
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
            self._steered.stop_training = True


#: The newest callback of each model.
_drivers: weakref.WeakKeyDictionary[Any, weakref.ref[FlyballCallback]] = weakref.WeakKeyDictionary()


def _told(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:.6g}" for rate in rates)


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
