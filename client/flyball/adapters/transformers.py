"""Hugging Face's Trainer, and all trainers made of it (TRL's): one callback.

    Trainer(..., callbacks=[FlyballCallback(run="bert-7", policy="windowed")])

Rule of this module: what is reported is what the optimizer step was made of, never what the Trainer logs of it. Logs
are means over `logging_steps`, and by default leave out NaN.

- The loss of a step is the sum of what `training_step` returned for its micro-batches, each of which the Trainer has
  scaled for gradient accumulation: the very number whose gradient the step uses, NaN included. It is summed where it
  was computed, and fetched without waiting. The norm of the gradients before clipping goes with it where the Trainer
  has it on the CPU; asking a device for it would wait.
- From TRL's trainers (GRPO, RLOO ...) come the reward, `reward_std`, `kl`, `entropy` and the completions' mean length
  of the step in which they were found out; from DPO and its kin `rewards/margins` as the reward. A trainer that keeps
  no metrics by step has the reward of its last log reported, one step late. What an evaluation found (`eval_loss` as
  `val_loss`, all else under its own name) goes with the next step.
- `scheduler="neutralise"` (default): the Trainer makes its scheduler all the same, but it never writes; the learning
  rate you gave (not the first value of the warm-up) is the reference. Declare a schedule as `base={"type": "cosine",
  "T_max": ...}`. The scheduler's state in checkpoints stays that of its beginning.
  `scheduler="multiply"` (or mode="multiplier"): the service's factor multiplies what the Trainer's scheduler wrote, in
  each step; ReduceLROnPlateau and GreedyLR work as well.
- Settings stand in the optimizer from `on_pre_optimizer_step` on, and are written once more within the step. Anybody
  else who writes is named, in `governor.status.conflicts` and in the run's record.
- `learning_rate` in the Trainer's logs (and so in TensorBoard, W&B ...) is what the newest step used: of the first
  group, and `learning_rate/NAME` of each where there are several.
- Every checkpoint of the Trainer holds the run's token (in trainer_state.json), and `resume_from_checkpoint` goes on
  from there, as a new attempt whose policy stands as it stood then; a token that the service does not know (it was
  away, or lost something) is imported, unless `on_unknown="refuse"` is given. Under another run's name it begins as a
  fork. Where `resume` or `fork` is given, that is what the first training does. A training that begins from its start
  again in the same process (`auto_find_batch_size`) goes back to its start; a second `train()` with the same callback
  goes on with the run after its newest step.
- The two groups that a Trainer makes where weight decay is not 0 are called `decay` and `no_decay`.
- Asked to stop, the Trainer saves (if it saves at all) and stops, and the run stays open to be resumed. Asked for a
  checkpoint or an evaluation it makes one right after the step. That is declined on several ranks, where all would
  have to begin it together. Other directives are for handlers of yours: `callback.governor.on(...)`, once training has
  begun.

Steps are optimizer steps: one that AMP skips counts for the Trainer's `global_step` and not here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, cast

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from flyball import options as known
from flyball.adapters.beside import at_rest
from flyball.adapters.callbacks import check, going_on, refusals
from flyball.adapters.groups import names
from flyball.adapters.standing import plain
from flyball.adapters.torch import attach, unwrapped
from flyball.adapters.trainer import Applied, StandIn, Watched, name_groups, trainer_of
from flyball.errors import FlyballError
from flyball.governor import Governor
from flyball.options import Options

log = logging.getLogger("flyball")

#: What an evaluation tells of itself and not of the model.
_NOT_MEASURED = ("_runtime", "_per_second", "_time", "epoch", "_flos", "_tokens_seen")


class FlyballCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Let the service steer a Trainer's optimizer. Attaches when training begins, and closes when it ends.

    governor: the run's, from the beginning of training on; None before.
    """

    #: What the newest callback was made with. A Trainer told to `restore_callback_states_from_checkpoint` makes its
    #: callbacks anew out of a file; options are the script's, and a bearer token must not be in a file.
    _given: ClassVar[tuple[str, Options] | None] = None

    def __init__(self, *, scheduler: str | None = None, **options: Unpack[Options]) -> None:
        """scheduler: "neutralise" or "multiply", see the module's head. options: see `flyball.options.Options`; `run`
        must be given. Raises TypeError or ValueError for a wrong one."""
        if not options and scheduler is None and FlyballCallback._given is not None:
            scheduler, options = FlyballCallback._given
        check(options)
        self._scheduler = _agreed(scheduler, options.get("mode"))
        self._options = options
        FlyballCallback._given = self._scheduler, options
        self.governor: Governor | None = None
        #: Set by a Trainer that makes its callbacks out of a file; the token is read from its state in any case.
        self.checkpoint: Any = None
        self._watched: Watched | None = None
        self._applied: Applied | None = None
        self._trainer: Any = None
        #: The names of the optimizer's groups; set, too, by a Trainer that makes its callbacks out of a file.
        self.groups: list[str] = []
        #: The tokens of the moments when training began, and when it came to its end.
        self._began: Mapping[str, Any] | None = None
        self._ended: Mapping[str, Any] | None = None
        #: Signals that came after their step was reported: they go with the next one.
        self._late: dict[str, float] = {}
        self._save = self._evaluate = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps: the run's token."""
        steering = self.governor is not None and self._watched is not None
        token = self.governor.state_dict() if steering and self.governor else None
        return {"args": {}, "attributes": {"checkpoint": token, "groups": self.groups}}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has not trained: it goes on with nothing."""
        fresh = {"governor": None, "_watched": None, "_applied": None, "_trainer": None, "_began": None, "_ended": None}
        return {**self.__dict__, **fresh, "_late": {}, "groups": []}

    # -- the Trainer's events ------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach. Raises what `attach` raises, and FlyballError where the trainer is not found."""
        trainer = trainer_of(self)
        if trainer is None:
            raise FlyballError(
                "FlyballCallback finds no trainer that calls it: give it to one, callbacks=[FlyballCallback(...)], or "
                "use flyball.attach(optimizer, ...) and governor.step(loss) in a loop of your own"
            )
        restarted = self._end("")  # of a training that failed, or that begins anew
        options = self._resumed(state, self._began if restarted else self._ended)
        optimizer = unwrapped(kwargs["optimizer"])
        options["mode"] = "multiplier" if self._scheduler == "multiply" else "absolute"
        if self._scheduler == "neutralise":
            at_rest(optimizer)
            if not state.global_step:
                _without_warmup(optimizer)
        name_groups(optimizer.param_groups, self._known_groups(state))
        with refusals():
            governor = self.governor = attach(optimizer, **cast(Any, options))
        self._trainer, self.groups = trainer, names(optimizer.param_groups)
        self._began = governor.state_dict()
        self._applied, self._watched = Applied(optimizer), Watched(trainer)
        if self._scheduler == "neutralise":
            self._stand_in(trainer, self._applied)
        _to_the_front(self, trainer.callback_handler.callbacks)
        # A checkpoint made before there was a FlyballCallback lacks what the Trainer looks for when it saves.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._save = self._evaluate = False
        self._late = {}
        if args.world_size == 1:
            governor.on("checkpoint", self._save_next)
            if trainer.eval_dataset is not None:
                governor.on("evaluate", self._evaluate_next)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing of a step has been seen yet."""
        if self._watched is not None:
            self._watched.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The settings stand from here on."""
        if self._applied is not None and self.governor is not None:
            self._applied.stepped = False
            self.governor.prepare_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step that AMP skipped leaves nothing behind."""
        if self._applied is not None and self.governor is not None and not self._applied.stepped:
            self.governor.abandon_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step, and pass on what the service asks for."""
        governor, watched = self.governor, self._watched
        if governor is None or watched is None:
            return
        signals: dict[str, Any] = {**self._late, **watched.metrics()}
        self._late = {}
        signals.setdefault("grad_norm", watched.grad_norm())
        governor.step(watched.loss(), **signals)
        if governor.should_stop and not control.should_training_stop:
            log.warning("flyball: training ends here: %s", governor.status.stop_reason)
            control.should_training_stop = True
            control.should_save = control.should_save or str(getattr(args.save_strategy, "value", "")) != "no"
        control.should_save = control.should_save or self._save
        control.should_evaluate = control.should_evaluate or self._evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was measured goes with the next step."""
        self._evaluate = False
        if self._watched is None:
            return
        for name, value in (kwargs.get("metrics") or {}).items():
            if isinstance(value, int | float) and not name.endswith(_NOT_MEASURED):
                self._late["val_loss" if name == "eval_loss" else name] = float(value)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was asked for is done."""
        self._save = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The learning rate that was applied, in place of what a scheduler says."""
        logs = kwargs.get("logs")
        if self._applied is None or self._watched is None or not isinstance(logs, dict):
            return
        if "reward" in logs and not self._watched.keeps_rewards() and isinstance(logs["reward"], int | float):
            self._late["reward"] = float(logs["reward"])
        if "learning_rate" not in logs:
            return
        lrs = self._applied.lrs()
        told = {"learning_rate": lrs[0]}
        if len(lrs) > 1:
            told |= {f"learning_rate/{name}": lr for name, lr in zip(self.groups, lrs, strict=False)}
        logs.update(told)
        # The Trainer's own history holds a copy.
        if state.log_history and "learning_rate" in state.log_history[-1]:
            state.log_history[-1].update(told)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Deliver what waits. A training that was asked to stop stays open to be resumed."""
        stopped = self.governor is not None and self.governor.should_stop
        self._end("" if stopped else "finished")

    # -- leaves --------------------------------------------------------------------------------------

    def _save_next(self, _: Mapping[str, Any]) -> str:
        self._save = True
        return "the Trainer saves right after this step"

    def _evaluate_next(self, _: Mapping[str, Any]) -> str:
        self._evaluate = True
        return "the Trainer evaluates right after this step"

    def _resumed(self, state: Any, again: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options, with where to go on from. again: the token of this callback's own training before."""
        options: dict[str, Any] = dict(self._options)
        # At step 0 the state is a new one, whatever it holds.
        token = _token(state, type(self).__name__) if state.global_step else again
        asked = "resume" in options or options.get("fork") is not None
        if token is None or (asked and self._began is None):  # what was asked for was the first training
            return options
        ours = (options["run"], options.get("project", "default"))
        if (token.get("run"), token.get("project", "default")) == ours:
            return going_on(options, token)
        if token.get("attempt") is not None:
            return {**options, "resume": False, "fork": token}
        log.warning("flyball: no service knew run %r, which the checkpoint is of: this one begins anew", token["run"])
        return options

    def _known_groups(self, state: Any) -> list[str] | None:
        """What the groups of the run that a checkpoint is of are called; None where there is no such run."""
        kept = _kept(state, type(self).__name__) if state.global_step else {}
        # A checkpoint without names is from before groups got any.
        return list(kept.get("groups") or ()) if isinstance(kept.get("checkpoint"), dict) else None

    def _stand_in(self, trainer: Any, applied: Applied) -> None:
        own = trainer.lr_scheduler
        if own is not None:
            trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = StandIn(own, applied)

    def _end(self, outcome: str) -> bool:
        """Let go of the trainer and close the run; whether there was one."""
        if self._watched is None or self._applied is None:
            return False
        self._watched.end()
        self._applied.end()
        trainer, self._trainer = self._trainer, None
        if isinstance(trainer.lr_scheduler, StandIn):
            trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = trainer.lr_scheduler.scheduler
        self._watched = self._applied = None
        if self.governor is not None:
            self._ended = self.governor.state_dict()
            self.governor.close(outcome)
        return True


def _agreed(scheduler: str | None, mode: str | None) -> str:
    """What to do with the Trainer's scheduler. Raises ValueError where the two options contradict each other."""
    if scheduler is None:
        return "multiply" if mode == "multiplier" else "neutralise"
    known.check_choice("scheduler", scheduler, "neutralise", "multiply")
    if mode is not None and (mode == "multiplier") != (scheduler == "multiply"):
        raise ValueError(f"scheduler is {scheduler!r} and mode is {mode!r}: give one of them")
    return scheduler


def _token(state: Any, name: str) -> Mapping[str, Any] | None:
    """The token that a checkpoint's trainer_state.json holds, if it holds one."""
    return _kept(state, name).get("checkpoint")


def _kept(state: Any, name: str) -> Mapping[str, Any]:
    """What a checkpoint's trainer_state.json holds of the callback that was steering; empty where none was."""
    kept = (state.stateful_callbacks or {}).get(name)
    for one in kept if isinstance(kept, list) else [kept]:
        attributes = one.get("attributes", {}) if isinstance(one, dict) else {}
        if isinstance(attributes.get("checkpoint"), dict):
            return dict(attributes)
    return {}


def _without_warmup(optimizer: Any) -> None:
    """What a scheduler wrote when it was made (0, for a warm-up) is not the learning rate that was asked for."""
    for group in optimizer.param_groups:
        asked = group.get("initial_lr")
        if asked is None:
            continue
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(plain(asked))
        else:
            group["lr"] = plain(asked)


def _to_the_front(callback: Any, callbacks: list[Any]) -> None:
    """Before those who write the logs away. Called by the handler that walks through the list: those behind stay
    where they are, those before have been called."""
    callbacks[:] = [callback, *(one for one in callbacks if one is not callback)]
