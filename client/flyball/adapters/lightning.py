"""Lightning 2: one callback for the Trainer, with `lightning.pytorch` or `pytorch_lightning`.

    trainer = Trainer(callbacks=[FlyballCallback(run="mnist-7", policy="windowed")])

It attaches when training starts, behind sanity checking and after optimizers are restored (with `fast_dev_run` not at
all), and steers each optimizer as `flyball.attach` steers a torch optimizer: steps that a gradient scaler skips are no
steps, groups are known by name, `LearningRateMonitor` shows what was applied.

Loss: what was really back-propagated for the step, before Lightning divided it by `accumulate_grad_batches`, as a mean
over the micro-batches. It is seen in `manual_backward`, too; a step's loss there is the sum of what was back-propagated
since any optimizer last stepped. Where a module calls `loss.backward()` itself, it is what `training_step` returns as
"loss"; where that is nothing, no loss is ever seen, and a warning says so. What validation logs is reported with the
next step. More signals: `callback.governor.step` is called for you, so log them in validation, or report them with
`flyball report`.

Several optimizers (manual optimisation) are one run each: "RUN-NAME", with the name of the submodule that holds all of
an optimizer's parameters (generator, discriminator), else optimizer0, optimizer1 ...; `names=` gives others, and
`each={NAME: {options}}` options that differ. They step in any order.

Lightning's schedulers go on: in the default mode what they write is replaced before each step, and they are named; with
mode="multiplier" the service's factor multiplies what they set, by step or epoch, `ReduceLROnPlateau` too.

Checkpoints hold the token, so `ckpt_path=` goes on with the run from the checkpoint's step; so does a second `fit` with
the same callback, also behind one that failed. The first fit does what `resume=` and `fork=` given here say. A token
that the service does not know (it was away, or lost something) is imported, unless `on_unknown="refuse"` is given. A
stop that the service asks for sets `trainer.should_stop`. A run ends as finished, or as failed where training raises;
an interrupt (Ctrl-C, SIGTERM) leaves it open, to be resumed.

Rule of this module: it only uses Lightning's public hooks, and what it does per batch waits for nothing.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch

from flyball.adapters.callbacks import check, going_on, refusals
from flyball.adapters.torch import attach
from flyball.errors import FlyballError
from flyball.governor import Governor
from flyball.options import Options

log = logging.getLogger("flyball")

#: After so many steps without a loss a warning says how to give one.
SILENT_STEPS = 10


def _bases() -> tuple[Any, ...]:
    """The Callback of the Lightning that the script uses: it is published under two names that know not each other."""
    names = ("lightning.pytorch", "pytorch_lightning")
    known = [name for name in names if name in sys.modules]
    for name in () if known else names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        known.append(name)
        break
    if not known:
        raise ModuleNotFoundError("Lightning is not installed: pip install lightning", name="lightning")
    return tuple(sys.modules[name].Callback for name in known)


class FlyballCallback(*_bases()):  # type: ignore[misc]
    """Let the service steer the optimizers of the module that the Trainer fits.

    names: what the runs of several optimizers are called, in the order of `configure_optimizers`. each: options by such
    a name, in the place of the common ones. options: see `flyball.options.Options`; `run` must be given. What is wrong
    with them raises here or when training starts: ValueError, TypeError, Refused, FlyballError.
    """

    def __init__(
        self,
        *,
        names: Sequence[str] = (),
        each: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        check(options)
        self._options = options
        self._names = tuple(names)
        self._each = {name: dict(own) for name, own in (each or {}).items()}
        self._steered: dict[str, _Steered] = {}
        #: Tokens by name: of a checkpoint that was loaded, or of the fit before.
        self._tokens: dict[str, dict[str, Any]] = {}
        #: What was back-propagated since an optimizer last stepped, and before that.
        self._pending: list[Any] = []
        self._stepped: list[Any] = []
        self._before_validation: dict[str, Any] = {}
        #: The names of the runs that this very callback has driven: what was asked for was their first fit.
        self._driven: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has not trained: it goes on with nothing."""
        fresh: dict[str, Any] = {
            "_steered": {},
            "_tokens": {},
            "_pending": [],
            "_stepped": [],
            "_before_validation": {},
        }
        # While a fit is on, Lightning puts methods of the module here.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, **fresh, "_driven": set()}

    @property
    def governor(self) -> Governor:
        """The governor of the only optimizer; FlyballError where there are several, or training has not begun."""
        if len(self._steered) != 1:
            raise FlyballError(f"there are {len(self._steered)} governors: see callback.governors in training")
        return next(iter(self._steered.values())).governor

    @property
    def governors(self) -> dict[str, Governor]:
        """The governors by the names of their optimizers."""
        return {name: one.governor for name, one in self._steered.items()}

    # -- Lightning's hooks ---------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to every optimizer: only now are they what they will be."""
        if trainer.fast_dev_run:
            log.info("flyball: fast_dev_run: nothing is steered")
            return
        self._end("")
        names = _named(trainer.optimizers, pl_module, self._names)
        unknown = sorted(set(self._each) - set(names))
        if unknown:
            raise ValueError(f"each names {', '.join(unknown)}: the optimizers are {', '.join(names)}")
        try:
            for name, optimizer in zip(names, trainer.optimizers, strict=True):
                self._steered[name] = _Steered(optimizer, self._options_of(name, len(names)))
                self._driven.add(name)
        except BaseException:
            self._end("")
            raise

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """What is about to be back-propagated: scaled, where there is a gradient scaler."""
        if self._steered and isinstance(loss, torch.Tensor):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            value = loss.detach()
            if scaler is not None:
                value = value / scaler.scale(torch.ones((), device=value.device))
            self._pending.append(value)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """An optimizer is about to step: the losses so far are its own."""
        for one in self._steered.values():
            if one.optimizer is optimizer:
                one.flush()
                # In manual optimisation two optimizers may step on what was back-propagated once.
                if self._pending or pl_module.automatic_optimization:
                    self._stepped, self._pending = self._pending, []
                # What Lightning divided each loss by: a GradientAccumulationScheduler changes it by epoch.
                one.parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                one.losses = self._stepped
                one.attempted = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report the steps of this batch. A micro-batch that only accumulates has none."""
        returned = outputs.get("loss") if isinstance(outputs, Mapping) else None
        for one in self._steered.values():
            one.report(returned)
            if one.governor.should_stop and not trainer.should_stop:
                log.warning("flyball: training stops: %s", one.governor.status.stop_reason)
                trainer.should_stop = True

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember what was logged before."""
        self._before_validation = dict(trainer.callback_metrics) if self._steered else {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What validation logged is reported with the next step."""
        if trainer.sanity_checking or not self._steered:
            return
        before = self._before_validation
        logged = {name: value for name, value in trainer.callback_metrics.items() if before.get(name) is not value}
        for one in self._steered.values():
            one.signals |= logged

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The runs have finished."""
        self._end("finished")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The runs have failed; an interrupt leaves them open."""
        self._end("failed" if isinstance(exception, Exception) and "SIGTERM" not in type(exception).__name__ else "")

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint tokens by name."""
        for name, one in self._steered.items():
            one.flush()
            self._tokens[name] = one.governor.state_dict()
        return {"tokens": dict(self._tokens)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these tokens when training starts."""
        self._tokens = dict(state_dict.get("tokens", {}))

    # -- leaves --------------------------------------------------------------------------------------

    def _options_of(self, name: str, of: int) -> dict[str, Any]:
        """What to attach one of so many optimizers with."""
        options: dict[str, Any] = {**self._options, **self._each.get(name, {})}
        if of > 1 and "run" not in self._each.get(name, {}):
            options["run"] = f"{options['run']}-{name}"
        token = self._tokens.get(name)
        asked = "resume" in options or options.get("fork")
        if token and (name in self._driven or not asked):
            if token.get("run") != options["run"]:
                raise ValueError(
                    f"the checkpoint belongs to run {token.get('run')!r}, but this is run {options['run']!r}: go on "
                    f"with that one, give fork={{'run': {token.get('run')!r}, 'step': {token.get('step')}}} to begin "
                    "as a fork of it, or resume=False to begin anew"
                )
            return going_on(options, token)
        return options

    def _end(self, outcome: str) -> None:
        self.state_dict()  # whoever fits again goes on
        for one in self._steered.values():
            one.close(outcome)
        self._steered = {}
        self._pending, self._stepped = [], []


class _Steered:
    """One optimizer, its governor, and what is still to be reported of its last step."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.losses: list[Any] = []
        self.signals: dict[str, Any] = {}
        #: Whether a step was about to be made, and was made, since the last report.
        self.attempted = self.stepped = False
        #: What Lightning divided each of the losses by.
        self.parts = 1
        #: How many steps there were without a loss; None once one had any.
        self._silent: int | None = 0
        # Before the governor's own: a second step within one batch first reports the one before it.
        self._ends: list[Callable[[], None]] = [
            optimizer.register_step_pre_hook(lambda *_: self.flush()).remove,
            optimizer.register_step_post_hook(lambda *_: self._stepped()).remove,
        ]
        try:
            with refusals():
                self.governor = attach(optimizer, **options)
        except BaseException:
            self._let_go()
            raise

    def report(self, returned: Any) -> None:
        """Report the last step, if there was one. returned: what the training step returned as its loss."""
        if self.attempted:
            losses, self.losses = self.losses, []
            self.attempted = self.stepped = False
            signals, self.signals = self.signals, {}
            loss = returned if not losses else functools.reduce(lambda a, b: a + b, losses)
            if self.parts > 1 and losses:
                loss = loss * (self.parts / len(losses))
            self._listen(loss)
            # Where no step was made, a scaler skipped it: the governor counts that.
            self.governor.step(loss, **signals)

    def flush(self) -> None:
        """Report a step that was made within a batch that goes on."""
        if self.stepped:
            self.report(None)

    def close(self, outcome: str) -> None:
        """Close the governor."""
        self.governor.close(outcome)
        self._let_go()

    def _listen(self, loss: Any) -> None:
        """A run that never hears a loss is told of: a policy would wait for one in vain."""
        if self._silent is None:
            return
        self._silent = self._silent + 1 if loss is None else None
        if self._silent == SILENT_STEPS:
            log.warning(
                "flyball: run %r has had no loss in %d steps: call self.manual_backward(loss) in place of "
                "loss.backward(), or return the loss from training_step",
                self.governor.status.run,
                SILENT_STEPS,
            )

    def _stepped(self) -> None:
        self.stepped = self.attempted = True

    def _let_go(self) -> None:
        for end in self._ends:
            end()


def _named(optimizers: Sequence[Any], module: Any, given: tuple[str, ...]) -> list[str]:
    """A name for every optimizer. Raises ValueError where those given do not fit."""
    if given:
        if len(given) != len(optimizers) or len(set(given)) < len(given):
            raise ValueError(f"names is {given!r}: give {len(optimizers)} different ones, one for each optimizer")
        return list(given)
    if len(optimizers) == 1:
        return ["default"]
    owners = {parameter: name.partition(".")[0] for name, parameter in module.named_parameters() if "." in name}
    found = []
    for i, optimizer in enumerate(optimizers):
        parts = {owners.get(parameter, "") for group in optimizer.param_groups for parameter in group["params"]}
        found.append(parts.pop() if len(parts) == 1 and "" not in parts else f"optimizer{i}")
    return found if len(set(found)) == len(found) else [f"optimizer{i}" for i in range(len(found))]
