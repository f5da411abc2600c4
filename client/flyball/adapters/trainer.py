"""What a Hugging Face Trainer does not tell its callbacks: itself, every micro-batch's loss, the metrics of a step.

Rule of this module: no library is needed, and no device is asked. What is wrapped returns what it returned before, and
is as it was once `end` is called.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flyball.adapters.groups import names
from flyball.adapters.standing import plain

#: What DPO and its kin have for a reward: by how much the chosen answer's is above the rejected one's.
MARGINS = "rewards/margins"
#: Of the lists that TRL's trainers fill at every step, those that are reported beside the reward.
METRICS = ("reward_std", "kl", "entropy", "completions/mean_length")


def trainer_of(callback: Any) -> Any:
    """The trainer that is calling `callback` right now; None where none is found.

    A callback is handed everything but its trainer, which is a few calls up the stack: the `self` whose
    `callback_handler` has the callback.
    """
    frame = sys._getframe(1)
    while frame is not None:
        one = frame.f_locals.get("self")
        handler = getattr(one, "__dict__", {}).get("callback_handler")
        if any(known is callback for known in getattr(handler, "callbacks", ())):
            return one
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Watched:
    """One trainer's `training_step` and gradient clipping, listened to."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loss: Any = None
        self._grad_norm: Any = None
        #: By metric: the list that was read last, and how far.
        self._read: dict[str, tuple[Any, int]] = {}
        self._ends = [_listen(trainer, "training_step", self._add)]
        accelerator = getattr(trainer, "accelerator", None)
        if hasattr(accelerator, "clip_grad_norm_"):
            self._ends.append(_listen(accelerator, "clip_grad_norm_", self._clipped))

    def begin(self) -> None:
        """A step begins: what an unfinished one left is forgotten."""
        self._loss = self._grad_norm = None

    def loss(self) -> Any:
        """The step's loss: the sum over its micro-batches, each scaled for accumulation by the trainer. It is what the
        gradients are of. On the device where it was computed; None where `training_step` was not called."""
        return self._loss

    def grad_norm(self) -> Any:
        """The norm of the gradients before clipping, where that is known without asking a device."""
        norm = self._grad_norm
        return norm if getattr(getattr(norm, "device", None), "type", "cpu") == "cpu" else None

    def metrics(self) -> dict[str, float]:
        """What TRL's trainers found out in this step: the reward, and METRICS; each the mean over its micro-batches.

        They keep a list per metric until the next log, and put a new list in its place then.
        """
        kept = getattr(self._trainer, "_metrics", None)
        lists = kept.get("train") if isinstance(kept, Mapping) else None
        if not isinstance(lists, Mapping):
            return {}
        found: dict[str, float] = {}
        for name in ("reward", *METRICS):
            values = lists.get(MARGINS if name == "reward" and name not in lists else name)
            if not isinstance(values, list):
                continue
            known, upto = self._read.get(name, (None, 0))
            new = [value for value in values[upto if known is values else 0 :] if isinstance(value, int | float)]
            self._read[name] = values, len(values)
            if new:
                found[name] = sum(new) / len(new)
        return found

    def keeps_rewards(self) -> bool:
        """Whether the trainer keeps metrics by step, so that its logs are not needed for them."""
        return isinstance(getattr(self._trainer, "_metrics", None), Mapping)

    def end(self) -> None:
        """Listen no more."""
        for end in self._ends:
            end()

    def _add(self, loss: Any) -> None:
        if loss is not None:
            self._loss = loss if self._loss is None else self._loss + loss

    def _clipped(self, norm: Any) -> None:
        self._grad_norm = norm


class Applied:
    """What the newest step of a torch optimizer used. Made after `attach`, so that it looks after Flyball wrote.

    stepped: whether there was a step since this was set to False.
    """

    def __init__(self, optimizer: Any) -> None:
        self.stepped = False
        self._optimizer = optimizer
        self._lrs: list[Any] = []
        self.end: Callable[[], None] = optimizer.register_step_pre_hook(self._look).remove

    def lrs(self) -> list[float]:
        """A learning rate per group. Asks the device of one that is a tensor there, so it is for logs."""
        return [plain(lr) for lr in self._lrs or (group["lr"] for group in self._optimizer.param_groups)]

    def _look(self, *_: Any) -> None:
        self.stepped = True
        lrs = [group["lr"] for group in self._optimizer.param_groups]
        # A tensor is filled in place by the next step.
        self._lrs = [lr.clone() if hasattr(lr, "clone") else lr for lr in lrs]


class StandIn:
    """In the place of a trainer's scheduler: it writes nothing, and says what was applied.

    All else, its state in checkpoints included, is that of the scheduler it stands in for.
    """

    def __init__(self, scheduler: Any, applied: Applied) -> None:
        self.scheduler = scheduler
        self._applied = applied

    def step(self, *_: Any, **__: Any) -> None:
        """Nothing: the service steers."""

    def get_last_lr(self) -> list[float]:
        """What the newest step used, per group."""
        return self._applied.lrs()

    def __getattr__(self, name: str) -> Any:
        # Only called for what is not here; before __init__ (a copy, an unpickling) there is nothing to ask.
        if name in ("scheduler", "_applied"):
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def name_groups(groups: list[dict[str, Any]], kept: Sequence[str] | None) -> None:
    """Name the two groups that a Trainer makes by itself, for parameters that decay and others that do not. kept: the
    names that the run was begun with, where that is known, as a run's groups keep their names."""
    if len(groups) != 2 or names(groups) != ["group0", "group1"]:
        return
    decays = [bool(group.get("weight_decay")) for group in groups]
    if kept is None and decays[0] != decays[1]:
        kept = ["decay" if one else "no_decay" for one in decays]
    for group, name in zip(groups, kept or (), strict=False):
        group["name"] = name


def _listen(thing: Any, name: str, hear: Callable[[Any], None]) -> Callable[[], None]:
    """Have `hear` called with what the method returns; returns what ends that."""
    inner = getattr(thing, name)
    before = vars(thing).get(name)

    @functools.wraps(inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        hear(out)
        return out

    setattr(thing, name, method)

    def end() -> None:
        if vars(thing).get(name) is method:
            delattr(thing, name)
            if before is not None:
                setattr(thing, name, before)

    return end
