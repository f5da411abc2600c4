"""Copies of what a torch training consists of, in the machine's memory, and the way back.

Rule of this module: what is put back goes into the tensors that are there (whoever else holds them, a compiled step
or DDP say, goes on working), and before the first one is touched it is known that all fit. No device is waited for.

Kinds: a module (its parameters and all buffers, and what `get_extra_state` adds), an optimizer (its state and groups),
a `torch.Generator`, the random numbers of the process, and anything with `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch


class Held(NamedTuple):
    """A tensor's values on the CPU, and where they belong."""

    data: torch.Tensor
    device: torch.device


class Copied(NamedTuple):
    """A tree of plain values with `Held` in the place of every tensor. ready: on a device, when all is copied."""

    tree: Any
    held: tuple[Held, ...]
    ready: tuple[torch.cuda.Event, ...]

    def loose(self) -> Any:
        """The tree with fresh tensors, each on its own device."""
        memo = {id(held): held.data.to(held.device, copy=True) for held in self.held}
        return copy.deepcopy(self.tree, memo)


class Thing(Protocol):
    """One thing to keep."""

    def live(self) -> Any:
        """A tree of its own tensors and plain values: nothing is copied."""

    def misfit(self, tree: Any) -> str:
        """Why the tree of a copy cannot be put back, "" where it can."""

    def put(self, copied: Copied) -> None:
        """Make everything as it was."""


def thing(name: str, value: Any) -> Thing:
    """How to keep `value`. Raises TypeError for what there is no way for."""
    if isinstance(value, list | tuple):
        return _Several([thing(f"{name}.{i}", one) for i, one in enumerate(value)])
    if isinstance(value, torch.nn.Module):
        return _Module(value)
    if isinstance(value, torch.optim.Optimizer):
        return _Optimizer(value)
    if isinstance(value, torch.Generator):
        return _Generator(value)
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return _Stateful(value)
    raise TypeError(
        f"{name} is a {type(value).__name__}: give a module, an optimizer, a torch.Generator, anything with state_dict "
        "and load_state_dict, or a list of such"
    )


def size_of(tree: Any) -> int:
    """Bytes of all tensors in the tree, each counted once."""
    return sum(one.numel() * one.element_size() for one in {id(own): own for own in map(_own, _tensors(tree))}.values())


def copied(tree: Any) -> Copied:
    """A copy that shares nothing with the tree. A device's tensors are copied when it gets there, in the order of its
    own work, into pinned memory."""
    held: dict[int, Held] = {}
    devices: set[torch.device] = set()
    for tensor in _tensors(tree):
        if id(tensor) not in held:
            held[id(tensor)] = Held(_on_cpu(_own(tensor).detach()), _own(tensor).device)
            devices.add(_own(tensor).device)
    ready = []
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                ready.append(torch.cuda.Event())
                ready[-1].record()
    return Copied(copy.deepcopy(tree, dict(held)), tuple(held.values()), tuple(ready))


def check_fit(pairs: list[tuple[str, Thing, Copied]]) -> None:
    """Raise ValueError where a copy does not fit any more."""
    for name, one, saved in pairs:
        if problem := one.misfit(saved.tree):
            raise ValueError(f"{name} is not what it was at the checkpoint: {problem}")


def put_all(pairs: list[tuple[str, Thing, Copied]]) -> None:
    """Put every copy back, or none: raises ValueError where one does not fit any more."""
    check_fit(pairs)
    # Somebody else's load_state_dict may still refuse: before anything that cannot.
    pairs = sorted(pairs, key=lambda pair: not isinstance(pair[1], _Stateful))
    with torch.no_grad():
        for _, one, saved in pairs:
            for event in saved.ready:
                event.wait()
            one.put(saved)


class _Several:
    """A list of things."""

    def __init__(self, things: list[Thing]) -> None:
        self._things = things

    def live(self) -> Any:
        return [one.live() for one in self._things]

    def misfit(self, tree: Any) -> str:
        return next(filter(None, (one.misfit(part) for one, part in zip(self._things, tree, strict=True))), "")

    def put(self, copied: Copied) -> None:
        for one, part in zip(self._things, copied.tree, strict=True):
            one.put(copied._replace(tree=part))


class _Module:
    """Parameters and buffers by name, those that a state_dict leaves out, too."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def live(self) -> Any:
        return {"tensors": self._named(), "extra": {name: one.get_extra_state() for name, one in self._with_extra()}}

    def misfit(self, tree: Any) -> str:
        return _misfits(self._named(), tree["tensors"])

    def put(self, copied: Copied) -> None:
        now = self._named()
        for name, held in copied.tree["tensors"].items():
            _own(now[name]).copy_(held.data, non_blocking=True)
        if copied.tree["extra"]:
            extra = copied._replace(tree=copied.tree["extra"]).loose()
            for name, one in self._with_extra():
                one.set_extra_state(extra[name])

    def _named(self) -> dict[str, torch.Tensor]:
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def _with_extra(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name, one in self._module.named_modules():
            if type(one).get_extra_state is not torch.nn.Module.get_extra_state:
                yield name, one


class _Optimizer:
    """The groups without their parameters, and each parameter's state; None where it has none yet."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def live(self) -> Any:
        groups, state = self._optimizer.param_groups, self._optimizer.state
        return {
            "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
            "state": [state.get(parameter) for parameter in self._parameters()],
        }

    def misfit(self, tree: Any) -> str:
        now, then = len(self._optimizer.param_groups), len(tree["groups"])
        if now != then:
            return f"it has {now} parameter groups, and had {then}"
        now, then = len(self._parameters()), len(tree["state"])
        return "" if now == then else f"it has {now} parameters, and had {then}"

    def put(self, copied: Copied) -> None:
        for group, then in zip(self._optimizer.param_groups, copied.tree["groups"], strict=True):
            for key in [key for key in group if key != "params" and key not in then]:
                del group[key]
            for key, value in then.items():
                group[key] = _into(group.get(key), value)
        state = self._optimizer.state
        for parameter, then in zip(self._parameters(), copied.tree["state"], strict=True):
            if then is None:
                state.pop(parameter, None)  # the first step makes it, as it did the first time
            else:
                state[parameter] = _into(state.get(parameter), then)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


class _Generator:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def live(self) -> Any:
        return self._generator.get_state()

    def misfit(self, tree: Any) -> str:
        return ""

    def put(self, copied: Copied) -> None:
        self._generator.set_state(copied.tree.data.clone())


class _Stateful:
    def __init__(self, value: Any) -> None:
        self._value = value

    def live(self) -> Any:
        return self._value.state_dict()

    def misfit(self, tree: Any) -> str:
        return ""

    def put(self, copied: Copied) -> None:
        self._value.load_state_dict(copied.loose())  # a copy: many keep what they are given


class Chance:
    """Python's, NumPy's (where it is loaded) and torch's random numbers, on the CPU and every CUDA device."""

    def live(self) -> Any:
        numpy = sys.modules.get("numpy")
        return {
            "python": random.getstate(),
            "numpy": None if numpy is None else numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def misfit(self, tree: Any) -> str:
        return ""

    def put(self, copied: Copied) -> None:
        then = copied.loose()
        random.setstate(then["python"])
        if then["numpy"] is not None:
            sys.modules["numpy"].random.set_state(then["numpy"])
        torch.set_rng_state(then["torch"])
        if then["cuda"]:
            torch.cuda.set_rng_state_all(then["cuda"])


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is spread over several."""
    local = getattr(tensor, "to_local", None)
    own: torch.Tensor = tensor if local is None else local()
    return own


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda and tensor.layout is torch.strided:
        try:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:  # the system has no more of it
            return tensor.to("cpu", copy=True)
        return pinned.copy_(tensor, non_blocking=True)
    return tensor.to("cpu", copy=True)


def _misfits(now: dict[str, torch.Tensor], then: dict[str, Held]) -> str:
    if now.keys() != then.keys():
        return f"other tensors than {', '.join(sorted(now.keys() ^ then.keys())[:4])} are the same"
    for name, held in then.items():
        own = _own(now[name])
        if (own.shape, own.dtype) != (held.data.shape, held.data.dtype):
            return f"{name} is {own.dtype} {tuple(own.shape)}, and was {held.data.dtype} {tuple(held.data.shape)}"
    return ""


def _into(now: Any, then: Any) -> Any:
    """The value of then, in the tensors of now as far as there are such."""
    if isinstance(then, Held):
        if isinstance(now, torch.Tensor):
            own = _own(now)
            if (own.shape, own.dtype, own.device) == (then.data.shape, then.data.dtype, then.device):
                own.copy_(then.data, non_blocking=True)
                return now
        return then.data.to(then.device, copy=True)
    if isinstance(then, dict):
        # The very same mapping where there is one: a compiled step knows it.
        found = now if isinstance(now, dict) else {}
        for key in [key for key in found if key not in then]:
            del found[key]
        for key, value in then.items():
            found[key] = _into(found.get(key), value)
        return found
    if type(then) in (list, tuple):
        parts = now if isinstance(now, list | tuple) and len(now) == len(then) else [None] * len(then)
        return type(then)(_into(one, other) for one, other in zip(parts, then, strict=True))
    return copy.deepcopy(then)
