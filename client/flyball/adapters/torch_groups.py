"""The settings of one torch optimizer: written into its groups just before it steps, and read back just after.

Rule of this module: no device is synchronised. What is held is written in place: a new object recompiles a step.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import torch

from flyball.adapters.around import behind, factor, finally_do
from flyball.adapters.beside import Beside
from flyball.adapters.compiled import is_compiled
from flyball.adapters.from_device import FromDevice, whole_of
from flyball.adapters.gradient_noise import GradientNoise
from flyball.adapters.groups import Rows, added, begun, effective_lr, momentum_of
from flyball.adapters.standing import Stand, changes, is_other, on_device, plain, standing, untouched
from flyball.adapters.writers import Writers
from flyball.optimizer import Conflict, plain_number
from flyball.pending import Pending
from flyball.wire import Group, Settings

log = logging.getLogger("flyball")


#: The optimizers that have a governor, and the names of their runs: two would overwrite each other.
_steered: weakref.WeakKeyDictionary[torch.optim.Optimizer, str] = weakref.WeakKeyDictionary()


def steered_by(optimizer: torch.optim.Optimizer) -> str | None:
    """The run whose governor the optimizer has already; None where it has none."""
    return _steered.get(optimizer)


class Groups:
    """A torch optimizer as the governor needs it: its parameter groups, written and read in place.

    declared: the groups its run began with as the service is told of them, in the order they have now.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, declared: tuple[Group, ...], multiplier: bool, run: str = ""
    ) -> None:
        self.declared = declared
        self._run = run
        self._optimizer = optimizer
        self._rows = Rows(declared, begun(optimizer.param_groups, goes_on=True))
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
        self._last: Callable[[], None] = lambda: None
        self._closure: Callable[[], Any] | None = None
        #: Whether the step that is being made leaves everything as it is.
        self._skips = [False]
        self._warned = False

    def steer(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call these around every step of the optimizer, until `detach`."""
        _steered[self._optimizer] = self._run
        # Traced into a compiled step, they would be guarded by every number that they look at. (This costs half a
        # microsecond each, and asking first whether torch is tracing is not enough: it traces what it calls, too.)
        apart: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable
        skips = self._skips

        def pre(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._before(before, args, kwargs)

        def post(*_: Any) -> None:
            if not skips[0]:
                after()

        self._ends = [
            self._optimizer.register_step_pre_hook(apart(pre)).remove,
            self._optimizer.register_step_post_hook(apart(post)).remove,
            self._optimizer.register_load_state_dict_post_hook(self._loaded).remove,
        ]
        if self._multiplier:
            # torch runs no post-hook where a step raises.
            self._ends.append(finally_do(self._optimizer, apart(self._put_back)))

    def at_end(self, end: Callable[[], None]) -> None:
        """Have something else done where the hooks are taken off."""
        self._last = end

    def detach(self) -> None:
        """Take the hooks off again."""
        _steered.pop(self._optimizer, None)
        for end in (*self._ends, self._last):
            end()
        self._put_back()

    def _before(self, before: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's pre-hook. A closure makes the gradients itself, so noise can only be added behind it."""
        if "found_inf" in self._optimizer.__dict__ or self._skips[0]:
            self._skips[0] = _is_skipped(self._optimizer)
            if self._skips[0]:
                return None
        if len(args) < 2 and not kwargs:
            return before()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._closure = closure if callable(closure) else None
        before()
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
        # Where every place of the list holds the very same objects, whatever group is there, nothing can have changed.
        same = settings is self._wanted and self._used is not None and untouched(groups, self._stands or ())
        conflict = None if same else self._write(settings, reference, self._rows.of(groups))
        if self._beside is not None:
            conflict = conflict or self._look(self._beside, settings is not None, reference[0])
        if noise_seed is not None and settings is not None and settings.noise_std is not None:
            add = functools.partial(self._add_noise, settings.noise_std, noise_seed)
            if self._closure is None:
                add()
            else:
                self._closure = behind(self._closure, add)
        return conflict

    def _look(self, beside: Beside, steered: bool, reference: float) -> Conflict | None:
        found = beside.look(steered=steered, reference=reference, known=self._writers.is_named)
        if beside.over or self._writers.named:
            self._beside = None
        return None if self._writers.named else found

    def _add_noise(self, std: tuple[float, ...], seed: int) -> None:
        self._added = self._noise.add(self._rows.of(self._optimizer.param_groups), std, seed)

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
            wanted = (*settings.lr, *self._follow(groups[len(settings.lr) :], settings.lr[0]))
            _fill(groups, settings.lr)
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
        groups = self._rows.of(groups)
        conflict = self._in_between(groups)
        lr = [self._read(i, group["lr"]) for i, group in enumerate(groups)]
        momentum = tuple(momentum_of(g, d) for g, d in zip(groups, self.declared, strict=False))
        self._put_back()
        n = len(self.declared)
        # Where no group has momentum, or ever had, there is nothing to tell.
        told = any(momentum) or any(d.momentum or d.betas for d in self.declared)
        used = Settings(tuple(lr[:n]), momentum if told else None, self._added)
        self._stands = None if self._multiplier else standing(groups, lr)
        if conflict is None and not self._multiplier and not any(isinstance(g["lr"], torch.Tensor) for g in groups):
            # From here on, as long as every group holds the very same objects, nothing can have changed.
            self._used = used
        return used, conflict

    def effective(self) -> dict[str, float]:
        """The learning rates that LR-free groups found for themselves, where they can be read without waiting."""
        rows = self._rows.of(self._optimizer.param_groups)
        found = {d.name: effective_lr(row) for d, row in zip(self.declared, rows, strict=False) if d.lr_free}
        return {name: value for name, value in found.items() if value is not None}

    def number(self, value: Any) -> float | Pending:
        """See `optimizer.Optimizer`."""
        if not isinstance(value, torch.Tensor):
            return plain_number(value)
        value = whole_of(value)
        if value.numel() != 1:
            raise TypeError(f"a tensor of shape {tuple(value.shape)} is no single number")
        if value.is_cuda:
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
        told = tuple(stand.value for stand in stands[: len(self.declared)])
        return None if conflict is None else conflict._replace(wanted_lr=told)

    def _read(self, index: int, value: Any) -> float:
        if on_device(value):
            # Reading it would wait for the device; what was filled in is what the step uses.
            stands = self._stands or ()
            ours = index < len(stands) and not is_other(value, stands[index])
            return stands[index].value if ours else float("nan")
        return plain(value)

    def _follow(self, later: list[dict[str, Any]], first: float) -> list[float]:
        """Groups that were added after attach follow the first group's factor; what is known of their values."""
        if not later:
            return []
        times, out = factor(first, self._reference[0]), []
        for i, group in enumerate(later, len(self.declared)):
            lr, reference = group["lr"], added(group, i, times)
            if not isinstance(reference, torch.Tensor):
                out.append(reference * times)
                _fill([group], out[-1:])
            else:
                if isinstance(lr, torch.Tensor):
                    lr.detach().copy_(reference * times)
                out.append(nan)
        return out

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
            if i >= len(factors):
                added(group, i, times)
            if not isinstance(lr, torch.Tensor):
                self._restore.append((group, lr, None))
                # A scheduler's 0 stays 0: no bound may wake what its owner froze.
                group["lr"] = min(max(lr * times, low), high) if lr else lr
            elif id(lr) not in shared:  # several groups may hold one tensor
                shared.add(id(lr))
                own = lr.detach()  # one that wants a gradient may not be written itself
                self._restore.append((group, lr, own.clone()))
                own.mul_(times).clamp_(max=high)
                if low:
                    own.copy_(torch.where(own > 0, own.clamp(min=low), own))
            used.append(float("nan") if on_device(lr) else plain(group["lr"]))
        self._stands = standing(groups, used)

    def _put_back(self) -> None:
        restore, self._restore = self._restore, []
        for group, lr, value in restore:
            if value is not None:
                lr.detach().copy_(value)
            group["lr"] = lr

    def _set_momentum(self, groups: list[dict[str, Any]], momentum: tuple[float | None, ...]) -> None:
        written = False
        for group, declared, value in zip(groups, self.declared, momentum, strict=False):
            if value is None:
                continue
            # Only where it differs: a new object would recompile a compiled step. And only SGD makes the buffers that
            # a momentum switched on in mid-training needs; others look for theirs and fail.
            if declared.momentum is not None:
                can = declared.momentum or isinstance(self._optimizer, torch.optim.SGD)
                if can and group.get("momentum", value) != value:
                    group["momentum"], written = value, True
            elif declared.betas is not None and "betas" in group and group["betas"][0] != value:
                group["betas"], written = (value, *group["betas"][1:]), True
        if written and not self._warned and is_compiled(self._optimizer):
            self._warned = True
            log.warning(
                "flyball: momentum is steered, and %s.step is compiled: every new momentum compiles it again, and "
                "after a few torch gives up and runs it uncompiled. Leave momentum alone (cycle_momentum=False), or "
                "do not compile the step",
                type(self._optimizer).__name__,
            )


def _fill(groups: list[dict[str, Any]], wanted: Sequence[float]) -> None:
    """Write learning rates, into tensors in place. torch gives every group that names none the same tensor: where they
    are to differ, those behind the first get their own."""
    filled: dict[int, float] = {}
    for group, lr in zip(groups, wanted, strict=False):
        current = group["lr"]
        if not isinstance(current, torch.Tensor):
            if current != lr:
                group["lr"] = lr
        elif filled.setdefault(id(current), lr) != lr:
            group["lr"] = current.detach().clone().fill_(lr)
        else:
            current.detach().fill_(lr)


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer runs its hooks and then does nothing, as a GradScaler found infinite gradients. On a
    device nobody knows: such a step counts."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and not on_device(found) and bool(found.item())
