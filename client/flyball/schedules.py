"""A static schedule as a Python module: the few lines that use its JSON file with torch, optax and Keras.

Rule of this module: what it writes needs neither a service nor Flyball, only the framework it is used with.
"""

from __future__ import annotations

import re
from pathlib import Path


def module_beside(path: Path) -> Path:
    """Where the module of a JSON file goes: beside it, under a name that can be imported."""
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    return path.with_name((f"_{name}" if name[:1].isdigit() else name) + ".py")


def module_text(path: Path, run: str, steps: int) -> str:
    """The module of the schedule in the JSON file `path`."""
    name = module_beside(path).stem
    return (
        _TEXT.replace("@NAME@", name)
        .replace("@RUN@", run)
        .replace("@STEPS@", str(steps))
        .replace("@JSON@", ascii(path.name))
    )


_TEXT = '''"""The learning rates that run @RUN@ had in its @STEPS@ steps, as a schedule that needs no service.

    import @NAME@

    scheduler = @NAME@.torch_scheduler(optimizer)                     # torch: scheduler.step() after each step
    optimizer = optax.sgd(learning_rate=@NAME@.optax_schedule())      # optax, under jit, too
    optimizer = keras.optimizers.SGD(@NAME@.keras_schedule())         # Keras 3

Steps are counted from 0. Where the run had several parameter groups, torch's are told apart by their `name`, or else by
their order; elsewhere say which one: optax_schedule("head"). The last learning rate holds behind the last step. The
numbers stand in the JSON file beside this one.
"""

import json
from bisect import bisect_right
from pathlib import Path

_FOUND = json.loads(Path(__file__).with_name(@JSON@).read_text(encoding="utf-8"))
RUN, STEPS, GROUPS = _FOUND["run"], _FOUND["steps"], _FOUND["groups"]


def lr(step, group=None):
    """The learning rate that was applied at a step."""
    found = GROUPS[_name(group)]
    place = bisect_right(found["from_step"], step)
    return float(found["lr"][place - 1]) if place else found["reference_lr"]


def momentum(step, group=None):
    """The momentum (Adam: the first beta) that was applied at a step; None where it was not steered."""
    found = GROUPS[_name(group)]
    place = bisect_right(found["from_step"], step)
    value = found.get("momentum", [None] * place)[place - 1] if place else None
    return None if value is None else float(value)


def torch_scheduler(optimizer):
    """torch's LambdaLR with these learning rates. Momentum, where it was steered: torch_momentum(optimizer, step)."""
    from torch.optim.lr_scheduler import LambdaLR

    names = _torch_names(optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # what LambdaLR multiplies: so each factor is the learning rate itself, to the bit
    scheduler = LambdaLR(optimizer, [lambda step, name=name: lr(step, name) for name in names])
    return scheduler


def torch_momentum(optimizer, step):
    """Set the momentum of a step, just before it."""
    for group, name in zip(optimizer.param_groups, _torch_names(optimizer), strict=True):
        value = momentum(step, name)
        if value is not None and "betas" in group:
            group["betas"] = (value, *group["betas"][1:])
        elif value is not None:
            group["momentum"] = value


def optax_schedule(group=None):
    """A schedule for optax: count -> learning rate."""
    import jax.numpy as jnp

    from_step, values = _arrays(group)
    from_step, values = jnp.asarray(from_step, dtype=jnp.int32), jnp.asarray(values)
    return lambda count: values[jnp.searchsorted(from_step, count, side="right")]


def keras_schedule(group=None):
    """A LearningRateSchedule for Keras 3, on any of its backends."""
    import keras

    from_step, values = _arrays(group)

    class Applied(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            first = keras.ops.convert_to_tensor(from_step, dtype="int32")
            lrs = keras.ops.convert_to_tensor(values, dtype="float32")
            place = keras.ops.sum(keras.ops.cast(first <= keras.ops.cast(step, "int32"), "int32"))
            return keras.ops.take(lrs, place)

        def get_config(self):
            return {}

    return Applied()


def _arrays(group):
    """The steps at which the learning rate changes, and the learning rates before the first and from each on."""
    found = GROUPS[_name(group)]
    return found["from_step"], [found["reference_lr"], *map(float, found["lr"])]


def _name(group):
    if group is None and len(GROUPS) == 1:
        return next(iter(GROUPS))
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}: give one of {', '.join(GROUPS)}")
    return group


def _torch_names(optimizer):
    names = list(GROUPS)
    groups = optimizer.param_groups
    if all(group.get("name") in GROUPS for group in groups):
        return [group["name"] for group in groups]
    if len(groups) != len(names):
        raise ValueError(f"the optimizer has {len(groups)} parameter groups, and the schedule {', '.join(names)}")
    return names
'''
