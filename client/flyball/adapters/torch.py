"""PyTorch: settings and gradient noise go in just before `optimizer.step()`, and are read back just after it.

Rule of this module: no device is synchronised. A step that a GradScaler skips runs no hook and is no step.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Unpack

import torch

from flyball.adapters.around import behind, factor, finally_do
from flyball.adapters.beside import Beside
from flyball.adapters.from_device import FromDevice
from flyball.adapters.gradient_noise import GradientNoise
from flyball.adapters.groups import momentum_of, names
from flyball.adapters.standing import Stand, changes, is_other, on_device, plain, standing, untouched
from flyball.adapters.writers import Writers
from flyball.governor import Governor, govern
from flyball.optimizer import Conflict, plain_number
from flyball.options import Options
from flyball.pending import Pending
from flyball.wire import Group, Settings

log = logging.getLogger("flyball")


def attach(optimizer: torch.optim.Optimizer, **options: Unpack[Options]) -> Governor:
    """Let the service steer `optimizer`; returns the governor, which is told each step's loss.

    Args:
        optimizer: its parameter groups are known by their "name" entry (else group0, group1 ...). Of a wrapper
            (Accelerate's), the optimizer in it is steered.
        options: see `flyball.options.Options`; `run` must be given.

    Raises:
        TypeError: `optimizer` is no torch optimizer, or there is no such option.
        ValueError: an option is wrong.
        Refused: the service says no (the run exists, an unknown policy ...) within `start_wait_s`.
        FlyballError: the address is wrong, or gRPC is not installed.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer")
    optimizer = within(optimizer)
    if optimizer in _steered:
        raise ValueError("optimizer is steered by another governor already: close that one first")
    multiplier = options.get("mode") == "multiplier"
    named = zip(names(optimizer.param_groups), optimizer.param_groups, strict=True)
    groups = tuple(_group(name, group, multiplier) for name, group in named)
    steered = _Groups(optimizer, groups, multiplier)
    governor = govern(steered, groups, options)
    steered.steer(governor)
    return governor


def within(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that makes the updates: what a wrapper such as Accelerate's holds, which has no hooks itself."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


#: The optimizers that have a governor: two would overwrite each other.
_steered: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _Groups:
    """A torch optimizer as the governor needs it: its parameter groups, written and read in place."""

    def __init__(self, optimizer: torch.optim.Optimizer, declared: tuple[Group, ...], multiplier: bool) -> None:
        self._optimizer = optimizer
        self._declared = declared
        self._multiplier = multiplier
        self._noise = GradientNoise(optimizer)
        self._wanted: Settings | None = None
        self._reference = tuple(group.lr for group in declared)
        self._bounds: tuple[tuple[float, float], ...] = ((0.0, inf),)
        self._factors: tuple[Settings, list[float]] | None = None
        #: In the first steps, where nobody else may write.
        self._beside = None if multiplier else Beside(optimizer)
        self._writers = Writers(optimizer, tuple(group.name for group in declared))
        #: What stood in the groups when this looked last: after writing, and after the step. None: not looked at.
        self._stands: list[Stand] | None = None
        #: Multiplier mode, during a step: the group, the object it held, and a tensor's value.
        self._restore: list[tuple[dict[str, Any], Any, torch.Tensor | None]] = []
        self._used: Settings | None = None
        self._added: tuple[float, ...] | None = None
        self._ends: list[Callable[[], None]] = []
        self._closure: Callable[[], Any] | None = None

    def steer(self, governor: Governor) -> None:
        """Call the governor around every step of the optimizer."""
        _steered.add(self._optimizer)
        self._ends = [
            self._optimizer.register_step_pre_hook(functools.partial(self._before, governor)).remove,
            self._optimizer.register_step_post_hook(lambda *_: governor.after_step()).remove,
            self._optimizer.register_load_state_dict_post_hook(self._loaded).remove,
        ]
        if self._multiplier:
            # torch runs no post-hook where a step raises.
            self._ends.append(finally_do(self._optimizer, self._put_back))

    def detach(self) -> None:
        """Take the hooks off again."""
        for end in self._ends:
            end()
        self._put_back()
        _steered.discard(self._optimizer)

    def _before(self, governor: Governor, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's pre-hook. A closure makes the gradients itself, so noise can only be added behind it."""
        if len(args) < 2 and not kwargs:
            return governor.before_step()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._closure = closure if callable(closure) else None
        governor.before_step()
        noisy, self._closure = self._closure, None
        if noisy is None or noisy is closure:
            return None
        return ((args[0], noisy, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": noisy})

    def write(
        self,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
        noise_seed: int | None,
    ) -> Conflict | None:
        """See `optimizer.Optimizer`."""
        self._added, self._bounds = None, bounds
        groups = self._optimizer.param_groups
        same = settings is self._wanted and self._used is not None and untouched(groups, self._stands or ())
        conflict = None if same else self._write(settings, reference, groups)
        if self._beside is not None:
            conflict = conflict or self._look(self._beside, settings is not None)
        if noise_seed is not None and settings is not None and settings.noise_std is not None:
            add = functools.partial(self._add_noise, settings.noise_std, noise_seed)
            if self._closure is None:
                add()
            else:
                self._closure = behind(self._closure, add)
        return conflict

    def _look(self, beside: Beside, steered: bool) -> Conflict | None:
        found = beside.look(steered=steered)
        if beside.over or self._writers.named:
            self._beside = None
        return None if self._writers.named else found

    def _add_noise(self, std: tuple[float, ...], seed: int) -> None:
        self._added = self._noise.add(std, seed)

    def forget(self) -> None:
        """See `optimizer.Optimizer`."""
        self._stands = self._used = None
        self._writers.loaded = False

    def _loaded(self, _: Any) -> None:
        self._used = None  # the very same numbers may stand in other groups now
        self._writers.loaded = True

    def _write(
        self, settings: Settings | None, reference: tuple[float, ...], groups: list[dict[str, Any]]
    ) -> Conflict | None:
        self._used, self._reference = None, reference
        conflict = None if self._multiplier else self._foreign(groups, settings)
        self._writers.loaded = False
        self._stands = None
        if self._multiplier:
            self._multiply(settings, groups)
            return None
        if settings is not None:
            wanted = self._spread(settings.lr, groups)
            for group, lr in zip(groups, wanted, strict=True):
                current = group["lr"]
                if isinstance(current, torch.Tensor):
                    # In place: a new object would recompile a compiled step.
                    current.fill_(lr)
                elif current != lr:
                    group["lr"] = lr
            if settings.momentum is not None:
                self._set_momentum(groups, settings.momentum)
            self._stands = standing(groups, wanted)
        self._wanted = settings
        return conflict

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """See `optimizer.Optimizer`."""
        groups, used = self._optimizer.param_groups, self._used
        if used is not None and untouched(groups, self._stands or ()):
            if used.noise_std is not self._added:
                used = self._used = used._replace(noise_std=self._added)
            return used, None
        conflict = self._in_between(groups)
        lr = [self._read(i, group["lr"]) for i, group in enumerate(groups)]
        momentum = tuple(momentum_of(g, d) for g, d in zip(groups, self._declared, strict=False))
        self._put_back()
        n = len(self._declared)
        # Where no group has momentum, or ever had, there is nothing to tell.
        told = any(momentum) or any(d.momentum or d.betas for d in self._declared)
        used = Settings(tuple(lr[:n]), momentum if told else None, self._added)
        self._stands = None if self._multiplier else standing(groups, lr)
        if conflict is None and not self._multiplier and not any(isinstance(g["lr"], torch.Tensor) for g in groups):
            # From here on, as long as every group holds the very same objects, nothing can have changed.
            self._used = used
        return used, conflict

    def number(self, value: Any, may_pend: bool) -> float | Pending:
        """See `optimizer.Optimizer`."""
        if not isinstance(value, torch.Tensor):
            return plain_number(value)
        if value.numel() != 1:
            raise TypeError(f"a tensor of shape {tuple(value.shape)} is no single number")
        if may_pend and value.is_cuda:
            return FromDevice(value.detach())
        return float(value.item())

    def _foreign(self, groups: list[dict[str, Any]], settings: Settings | None) -> Conflict | None:
        """Who else wrote since the last step, if anybody."""
        if self._stands is None or settings is None:
            return None
        found = changes(groups, self._stands, settings.momentum)
        return self._writers.conflict(found, "before the step", "{found} was found where {wanted} stood")

    def _in_between(self, groups: list[dict[str, Any]]) -> Conflict | None:
        """Who else wrote between `write` and the step, if anybody."""
        stands, wanted = self._stands, self._wanted
        if stands is None:
            return None
        found = changes(groups, stands, None if self._multiplier or wanted is None else wanted.momentum)
        conflict = self._writers.conflict(found, "within the step", "the step used {found} instead of {wanted}")
        told = tuple(stand.value for stand in stands[: len(self._declared)])
        return None if conflict is None else conflict._replace(wanted_lr=told)

    def _read(self, index: int, value: Any) -> float:
        if on_device(value):
            # Reading it would wait for the device; what was filled in is what the step uses.
            stands = self._stands or ()
            ours = index < len(stands) and not is_other(value, stands[index])
            return stands[index].value if ours else float("nan")
        return plain(value)

    def _spread(self, lr: tuple[float, ...], groups: list[dict[str, Any]]) -> tuple[float, ...]:
        """A value for every group: one that was added after attach follows the first group's factor."""
        if len(groups) <= len(lr):
            return lr[: len(groups)]
        times = factor(lr[0], self._reference[0])
        added = [g.setdefault("flyball_reference_lr", plain(g["lr"])) for g in groups[len(lr) :]]
        return (*lr, *(reference * times for reference in added))

    def _multiply(self, settings: Settings | None, groups: list[dict[str, Any]]) -> None:
        """Multiplier mode: the scheduler's value times the policy's factor, until the step is done."""
        self._put_back()  # a step that failed on the way left its values behind
        if settings is None:
            if all(bounds == (0.0, inf) for bounds in self._bounds):
                return
            settings = Settings(self._reference)  # nothing is known yet, but the bounds hold
        if self._factors is None or self._factors[0] is not settings:
            self._factors = settings, [factor(*pair) for pair in zip(settings.lr, self._reference, strict=True)]
        factors, shared = self._factors[1], set[int]()
        used: list[float] = []
        for i, group in enumerate(groups):
            lr, times = group["lr"], factors[i] if i < len(factors) else factors[0]
            low, high = self._bounds[i] if i < len(self._bounds) else self._bounds[0]
            if not isinstance(lr, torch.Tensor):
                self._restore.append((group, lr, None))
                # A scheduler's 0 stays 0: no bound may wake what its owner froze.
                group["lr"] = min(max(lr * times, low), high) if lr else lr
            elif id(lr) not in shared:  # several groups may hold one tensor
                shared.add(id(lr))
                self._restore.append((group, lr, lr.clone()))
                lr.mul_(times).clamp_(max=high)
                if low:
                    lr.copy_(torch.where(lr > 0, lr.clamp(min=low), lr))
            used.append(float("nan") if on_device(lr) else plain(group["lr"]))
        self._stands = standing(groups, used)

    def _put_back(self) -> None:
        restore, self._restore = self._restore, []
        for group, lr, value in restore:
            if value is not None:
                lr.copy_(value)
            group["lr"] = lr

    def _set_momentum(self, groups: list[dict[str, Any]], momentum: tuple[float | None, ...]) -> None:
        for group, declared, value in zip(groups, self._declared, momentum, strict=False):
            if value is None:
                continue
            # Only where it differs: a new object would recompile a compiled step. And only SGD makes the buffers that
            # a momentum switched on in mid-training needs; others look for theirs and fail.
            if declared.momentum is not None:
                can = declared.momentum or isinstance(self._optimizer, torch.optim.SGD)
                if can and group.get("momentum", value) != value:
                    group["momentum"] = value
            elif declared.betas is not None and "betas" in group and group["betas"][0] != value:
                group["betas"] = (value, *group["betas"][1:])


def _group(name: str, group: Mapping[str, Any], multiplier: bool) -> Group:
    momentum, betas = group.get("momentum"), group.get("betas")
    if not momentum and betas is not None:
        momentum = None  # the group's momentum is its betas[0]
    # A warm-up from 0 must not freeze the group: what its scheduler counts from stands beside it.
    initial = plain(group.get("initial_lr", 0.0)) if multiplier else 0.0
    return Group(
        name,
        initial or plain(group["lr"]),
        None if momentum is None else float(momentum),
        (float(betas[0]), float(betas[1])) if betas is not None and len(betas) == 2 else None,
    )
