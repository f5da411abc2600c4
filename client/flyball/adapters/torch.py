"""PyTorch: settings and gradient noise go in just before `optimizer.step()`, and are read back just after it.

    governor = flyball.attach(optimizer, run="first", policy="windowed")
    ...
    optimizer.step()
    governor.step(loss)

Groups are known by their name: their "name" entry; or what the names of their parameters begin with, where the
optimizer was given `model.named_parameters()`; or group0, group1 ... A group that is added later (`add_param_group`
after unfreezing) follows the first group's factor, also where the run goes on from a checkpoint; one that is dropped is
told once and goes without; the order of the list means nothing.
A tensor learning rate is filled in place, on its device, so that a compiled step is compiled once.
A momentum is a Python number that torch compiles in: where a policy steers it on a compiled step, a warning says so.

A step that a GradScaler skips runs no hook and is no step. (A fused optimizer on a device runs them and decides there:
such a step counts, with the loss it had.) With `accumulate` the micro-batches make one step, see `governor.step`.
Closures are called as often as the optimizer likes, for one step. AdamW's decay is lr * weight_decay: whoever steers
the learning rate steers the decay with it.

Several optimizers may be one run, or one each. In one run a step is a step of the last one listed; an optimizer that
steps more often is steered each time, and one that steps more rarely is told as it stands.

LR-free optimizers (Prodigy, D-Adaptation, schedule-free) are known by what their groups hold. Their lr is a multiplier;
what they make of it is reported as the signal `effective_lr`, and the service wants factors from people instead of
values. The `train()` and `eval()` of schedule-free optimizers stay the script's to call.

Rule of this module: nothing is imported that the optimizer may come from; what wraps an optimizer is known by holding
it as `.optimizer`, `.base` or `.base_optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, Unpack

import torch

from flyball.adapters.groups import begun, declared, effective, names
from flyball.adapters.several import Several
from flyball.adapters.signals import Signals
from flyball.adapters.torch_groups import Groups, steered_by
from flyball.govern import closing, govern
from flyball.governor import Governor
from flyball.options import Options, measured
from flyball.ranks import together
from flyball.wire import Group

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer]


@together
def attach(optimizer: Optimizers, **options: Unpack[Options]) -> Governor:
    """Let the service steer `optimizer`; returns the governor, which is told each step's loss.

    Args:
        optimizer: one, or what wraps one and holds it as `.optimizer` (accelerate does) or `.base_optimizer` (SAM); its
            parameter groups are known by their "name" entry, else as the module's head says. Or several, in a list or
            by name: their groups are named NAME/GROUP, by their class in small letters in a list ("muon/default";
            "adam0/...", "adam1/..." where a class comes twice), by place where a dictionary's keys are no text
            ("optimizer0/..."). One step of the run is one step of the last.
        options: see `flyball.options.Options`; `run` must be given.

    Raises:
        TypeError: `optimizer` is no torch optimizer, or there is no such option.
        ValueError: an option is wrong, or the optimizer has a governor already.
        Refused: the service says no (the run exists, an unknown policy ...) within `start_wait_s`.
        FlyballError: the address is wrong, or gRPC is not installed.
    """
    named = _named(optimizer)
    optimizers = _optimizers(named)
    chosen, every, rest = measured(options)
    multiplier = options.get("mode") == "multiplier"
    goes_on, run = bool(options.get("resume") or options.get("fork")), str(options.get("run", ""))
    parts = [
        Groups(one, _declared(name, named[name], multiplier, goes_on), multiplier, run)
        for name, one in optimizers.items()
    ]
    groups = tuple(group for part in parts for group in part.declared)
    signals = Signals(list(optimizers.values()), chosen, every)
    parts[-1].at_end(signals.detach)
    if len(parts) == 1:
        governor = govern(parts[0], groups, rest)
        with closing(governor):
            signals.steer(governor)
            parts[0].steer(governor.before_step, _after(parts[0], governor))
        return governor
    several = Several(parts)
    governor = govern(several, groups, rest)
    with closing(governor):
        signals.steer(governor)
        several.steer(governor)
    return governor


def unwrapped(optimizer: Any) -> Any:
    """The optimizer whose step is the real one: wrappers show its groups, and hold it as `.optimizer`, `.base` or
    `.base_optimizer`."""
    return _layers(optimizer)[-1]


def _layers(optimizer: Any) -> list[Any]:
    """A wrapper, what it wraps, and so on. A scheduler holds an optimizer as well, but shows no groups."""
    layers = [optimizer]
    while hasattr(layers[-1], "param_groups"):
        held = (getattr(layers[-1], name, None) for name in _holds(layers[-1]))
        inner = next((one for one in held if hasattr(one, "param_groups")), None)
        if inner is None or any(inner is layer for layer in layers):
            break
        layers.append(inner)
    return layers


def _holds(wrapper: Any) -> tuple[str, ...]:
    """Where it may hold what it wraps. ZeroRedundancyOptimizer steps by itself, and its `.optim` is a part of it."""
    shards = isinstance(wrapper, torch.optim.Optimizer) and hasattr(wrapper, "_optimizer_step_pre_hooks")
    held = ("optimizer", "base", "base_optimizer")
    return held if shards else (*held, "optim")


def _named(given: Any) -> dict[str, Any]:
    """What was given, by name; "" for a single one."""
    if isinstance(given, Mapping):
        text = all(isinstance(name, str) for name in given)
        return {name if text else f"optimizer{i}": one for i, (name, one) in enumerate(given.items())}
    if not isinstance(given, Sequence):
        return {"": given}
    classes = [type(unwrapped(one)).__name__.lower() for one in given]
    count = {name: iter(range(len(classes))) for name in classes}
    names = [f"{name}{next(count[name])}" if classes.count(name) > 1 else name for name in classes]
    return dict(zip(names, given, strict=True))


def _optimizers(named: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    """The real optimizers by name. Raises TypeError and ValueError as `attach` says."""
    if not named:
        raise ValueError("optimizer is empty: give one, or several in a list or by name")
    found = {name: unwrapped(one) for name, one in named.items()}
    for name, one in found.items():
        where = f"optimizer {name!r}" if name else "optimizer"
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"{where} is a {type(one).__name__}: give a torch.optim.Optimizer")
        if (run := steered_by(one)) is not None:
            raise ValueError(
                f"{where} is steered by another governor already, that of run {run!r}: close that one first"
            )
        if sum(one is other for other in found.values()) > 1:
            raise ValueError(f"{where} is given twice: give each optimizer once")
    return found


def _declared(name: str, optimizer: Any, multiplier: bool, goes_on: bool) -> tuple[Group, ...]:
    """The groups of an optimizer as it was given; a wrapper may say what its groups do not."""
    layers = _layers(optimizer)
    groups = begun(layers[-1].param_groups, goes_on=goes_on)
    prefix = f"{name}/" if name else ""
    free = any(hasattr(layer, "train_mode") for layer in layers)
    told = [
        declared(prefix + own, group, multiplier=multiplier) for own, group in zip(names(groups), groups, strict=True)
    ]
    return tuple(group._replace(lr_free=group.lr_free or free) for group in told)


def _after(part: Groups, governor: Governor) -> Callable[[], None]:
    if not any(group.lr_free for group in part.declared):
        return governor.after_step

    def after() -> None:
        governor.after_step()
        governor.measured(effective(part.effective(), alone=len(part.declared) == 1))

    return after
