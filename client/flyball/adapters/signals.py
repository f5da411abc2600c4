"""Signals that are measured around a torch optimizer's step, for whoever asks for them: `attach(..., signals=(...))`.

Rule of this module: no device is synchronised, and nothing here may end the training job. Results stay tensors, leave
a device in one copy, and are read by the reporting thread once that has arrived.

With g the gradient that the optimizer gets (after clipping; before the noise that Flyball adds; divided by the loss
scale where a fused optimizer gets scaled ones), and w the parameters, each one vector over all groups:

    grad_norm      ||g||                      in units of the loss per unit of a parameter
    update_norm    ||w_after - w_before||     in units of a parameter
    distance       ||w_after - w_start||      likewise; w_start as at attach. What DoG takes the maximum of (Ivgi et
                                              al. 2023, arXiv:2302.12022)
    inner_product  <g, w_after - w_before>    in units of the loss: what the step changes it by, to first order;
                                              with plain SGD -lr ||g||^2. Such products are what hypergradients
                                              (Baydin et al. 2018, arXiv:1703.04782) and D-Adaptation (Defazio &
                                              Mishchenko 2023, arXiv:2301.07733) are made of

All norms are Euclidean; each signal is one number per step. A result that is not finite is reported as such: it was
measured. Half precision is summed in float32, and the sums of devices and types in float64.

Memory: grad_norm needs none; update_norm a copy of the parameters; distance two, which with update_norm is one more;
inner_product one for update_norm's and one for the gradient; each in the parameter's type. Parameters that do not
require gradients do not count (they do not move), one without a gradient adds nothing to g, and a sparse gradient is
made dense for the moment. A closure's gradient is that of its first call in the step.

`signals_every=N` measures the first step of this process and each Nth after it; in the others nothing is measured, and
nothing is reported. A step that a GradScaler skips runs no hook and is no step. A fused optimizer skips on its device,
which only the device knows: such a step has a grad_norm of infinity (or NaN) and an update_norm of 0.

Sharded parameters: each process holds a part of every sum. `Sums.sums` are what has to be added up over the processes
before `finished` makes signals of them. Nobody does that yet, so `attach` refuses signals where parameters are sharded
over several processes, and where they become so later, nothing is measured, and the log says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import hypot, sqrt
from typing import Any

import torch

from flyball.adapters.around import behind
from flyball.adapters.flat import Flat, is_sharded, norms, plain
from flyball.adapters.from_device import Copy
from flyball.governor import Governor
from flyball.pending import Pending

#: What one optimizer's step gave: a copy per device, with a label for each of its numbers. "scale" is no signal, but
#: what the optimizer's gradients are multiplied by.
Found = list[tuple[list[str], Copy]]


class Signals:
    """Measures around the steps of the optimizers of one run. A round is a step of the last one; of another that
    steps more than once in it, the last step counts."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], names: Iterable[str], every: int) -> None:
        self._names = tuple(names)
        self._every = every
        self._round = 0
        self._parts = [_Part(one, frozenset(self._names)) for one in optimizers] if self._names else []
        self._ends: list[Callable[[], None]] = []

    def steer(self, governor: Governor) -> None:
        """Measure from now on. To be called before the governor's own hooks are made, so that noise comes later."""
        for part in self._parts:
            self._ends += [
                part.optimizer.register_step_pre_hook(functools.partial(self._before, governor, part)).remove,
                part.optimizer.register_step_post_hook(functools.partial(self._after, governor, part)).remove,
            ]

    def detach(self) -> None:
        """Take the hooks off again, and let go of the copies."""
        for end in self._ends:
            end()
        self._ends, self._parts = [], []

    def _before(self, governor: Governor, part: _Part, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's pre-hook. A closure makes the gradients itself: they are looked at behind its first call."""
        if self._round % self._every:
            return None
        governor.measure(part.begin)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return governor.measure(part.look)
        seen = behind(closure, lambda: governor.measure(part.look))
        return ((args[0], seen, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": seen})

    def _after(self, governor: Governor, part: _Part, *_: Any) -> None:
        """torch's post-hook."""
        last = part is self._parts[-1]
        if self._round % self._every == 0:
            governor.measure(part.end)
            if last:
                governor.measure(self._report)
        self._round += last

    def _report(self) -> Mapping[str, Pending]:
        sums = Sums([found for part in self._parts if (found := part.take()) is not None])
        return {name: Signal(name, sums) for name in self._names if name in sums.labels}


class Sums:
    """What the signals of one step are made of, on its way to the host. parts: one per optimizer."""

    def __init__(self, parts: Sequence[Found]) -> None:
        self._parts = parts
        self._sums: dict[str, float] | None = None
        self.labels = {label for part in parts for labels, _ in part for label in labels}

    def ready(self) -> bool:
        """Whether everything has arrived."""
        return all(copy.ready() for part in self._parts for _, copy in part)

    def sums(self) -> dict[str, float]:
        """By signal the sum of squares, for inner_product the sum of products. No wait once ready."""
        if self._sums is None:
            total: dict[str, float] = {}
            for part in self._parts:
                for name, value in _sums(part).items():
                    total[name] = total.get(name, 0.0) + value
            self._sums = total
        return self._sums


class Signal:
    """One signal out of sums that are on their way: a `pending.Pending`."""

    def __init__(self, name: str, sums: Sums) -> None:
        self._name = name
        self._sums = sums
        self.ready = sums.ready

    def value(self) -> float:
        """The value; no wait once ready."""
        return finished(self._name, self._sums.sums()[self._name])


def finished(name: str, total: float) -> float:
    """The signal of this name, out of its sum over everything there is."""
    return total if name == "inner_product" else sqrt(total)


def _sums(part: Found) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for labels, copy in part:
        for label, value in zip(labels, copy.values(), strict=True):
            found.setdefault(label, []).append(value)
    scale = found.pop("scale", [1.0])[0]
    out = {}
    for name, values in found.items():
        if name == "inner_product":
            out[name] = sum(values) / scale
        else:
            norm = hypot(*values) / (scale if name == "grad_norm" else 1.0)
            out[name] = norm * norm
    return out


class _Part:
    """One optimizer: copies of its parameters, and what its step has given so far."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: frozenset[str]) -> None:
        self.optimizer = optimizer
        self._names = names
        self._weights, self._gradient = Flat(), Flat()
        self._start: dict[torch.Tensor, torch.Tensor] = {}
        #: The parameters of the step under way, and its numbers, each with its label. None: there is no such step.
        self._parameters: list[torch.Tensor] | None = None
        self._numbers: list[tuple[str, torch.Tensor]] = []
        #: Whether somebody looked for gradients in this step, and found any.
        self._looked = self._given = False
        self._found: Found | None = None
        self._counted, self._sharded = -1, False
        parameters = self._all()
        if "distance" in names:
            self._adopt(parameters)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """Just before the step."""
        self._parameters, self._found, self._numbers = None, None, []
        self._looked = self._given = False
        parameters = self._all()
        if "distance" in self._names:
            self._adopt(parameters)
        if "update_norm" in self._names or "inner_product" in self._names:
            now = [plain(one) for one in parameters]
            self._weights.hold(now, now)
        self._parameters = parameters

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def look(self) -> None:
        """The gradient is there; only the first look of a step counts."""
        if self._looked or self._parameters is None:
            return
        self._looked = True
        if "grad_norm" not in self._names and "inner_product" not in self._names:
            return
        gradients = [None if (grad := one.grad) is None else plain(grad) for one in self._parameters]
        given = [one for one in gradients if one is not None]
        if not given:
            return
        if "grad_norm" in self._names:
            self._numbers += [("grad_norm", norm) for norm in norms(given)]
        if "inner_product" in self._names:
            self._gradient.hold(gradients, [plain(one) for one in self._parameters])
            self._given = True
        scale = getattr(self.optimizer, "grad_scale", None)
        if isinstance(scale, torch.Tensor):
            self._numbers.append(("scale", scale.reshape(())))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Just after the step."""
        parameters, self._parameters = self._parameters, None
        if parameters is None:
            return
        now = [plain(one) for one in parameters]
        # What is held after this is w_before - w_after.
        if "update_norm" in self._names or "inner_product" in self._names:
            self._weights.subtract(now)
        if "update_norm" in self._names:
            self._numbers += [("update_norm", norm) for norm in self._weights.norms()]
        if self._given:
            self._numbers += [("inner_product", -product) for product in self._gradient.dots(self._weights)]
        if "distance" in self._names:
            self._weights.hold(now, now)
            self._weights.subtract([self._start[one] for one in parameters])
            self._numbers += [("distance", norm) for norm in self._weights.norms()]
        self._found = _leave(self._numbers)
        self._numbers = []

    def take(self) -> Found | None:
        """What the last step gave, once."""
        found, self._found = self._found, None
        return found

    def _all(self) -> list[torch.Tensor]:
        """The parameters that count: those that move, and those that were measured before."""
        groups = self.optimizer.param_groups
        found = [one for group in groups for one in group["params"] if one.requires_grad or one in self._start]
        if len(found) != self._counted:
            self._counted, self._sharded = len(found), any(map(is_sharded, found))
        if self._sharded:
            raise ValueError(
                f"signals is {tuple(sorted(self._names))!r}, but parameters are sharded over several processes, and "
                "each would measure its own part: leave signals out, and report what clip_grad_norm_ returns"
            )
        return found

    def _adopt(self, parameters: Sequence[torch.Tensor]) -> None:
        """Where parameters start that are new here."""
        if len(self._start) < len(parameters):
            for one in parameters:
                if one not in self._start:
                    self._start[one] = plain(one.detach()).clone()


def _leave(numbers: Sequence[tuple[str, torch.Tensor]]) -> Found:
    """Begin to copy numbers from where they are."""
    devices: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for label, number in numbers:
        devices.setdefault(number.device, []).append((label, number))
    return [
        ([label for label, _ in some], Copy(torch.stack([number for _, number in some]))) for some in devices.values()
    ]
