"""DeepSpeed: settings go in around one step of the engine's optimizer, however many sub-steps ZeRO makes of it.

Rule of this module: one owner of the learning rate. An engine that has a scheduler is refused, unless we multiply.

    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    governor = flyball.adapters.deepspeed.attach(engine, run="zero")
    ...
    engine.step()
    governor.step(loss, weight=samples)

Leave "scheduler" out of DeepSpeed's config and pass no lr_scheduler, or attach with mode="multiplier", which multiplies
what that scheduler set and restores it before it goes on. A step that is skipped for an overflow is no step. All ranks
of the engine share the run (see adapters/ranks.py). Gradient noise is not added under ZeRO, whose gradients are not
where torch keeps them. Checked with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from flyball.adapters import torch as plain
from flyball.adapters.groups import begun, names
from flyball.adapters.groups import declared as declared_of
from flyball.adapters.torch_groups import Groups
from flyball.govern import govern
from flyball.governor import Governor
from flyball.options import Options


def attach(engine: Any, **options: Unpack[Options]) -> Governor:
    """Let the service steer the optimizer of a DeepSpeed engine; returns the governor, which is told each step's loss.

    Raises TypeError where `engine` is no DeepSpeed engine, ValueError where its scheduler owns the learning rate or
    ZeRO dropped parameter groups, and what `flyball.attach` raises.
    """
    wrapper = getattr(engine, "optimizer", None)
    if wrapper is None or not hasattr(engine, "lr_scheduler"):
        raise TypeError(f"engine is a {type(engine).__name__}: give what deepspeed.initialize returned first")
    scheduler = engine.lr_scheduler
    if scheduler is not None and options.get("mode") != "multiplier":
        raise ValueError(
            f'the engine\'s scheduler {type(scheduler).__name__} owns the learning rate: take "scheduler" out of '
            'DeepSpeed\'s config (and pass no lr_scheduler), or attach with mode="multiplier"'
        )
    inner = wrapper
    while hasattr(inner, "optimizer"):  # ZeRO and mixed precision stand around the optimizer that has the groups
        inner = inner.optimizer
    groups = inner.param_groups
    kept = getattr(wrapper, "trainable_param_groups", groups)
    if len(kept) != len(groups):
        raise ValueError(
            f"ZeRO-3 steps {len(kept)} of the optimizer's {len(groups)} parameter groups: leave out those without "
            "trainable parameters"
        )
    if inner is wrapper:
        return plain.attach(wrapper, **options)
    multiplier = options.get("mode") == "multiplier"
    groups = begun(groups, goes_on=bool(options.get("resume") or options.get("fork")))
    declared = tuple(
        declared_of(name, group, multiplier=multiplier) for name, group in zip(names(groups), groups, strict=True)
    )
    steered = _Engine(wrapper, Groups(inner, declared, multiplier, str(options.get("run", ""))))
    governor = govern(steered, declared, options)
    steered.steer(governor)
    return governor


class _Engine:
    """See `optimizer.Optimizer`: the groups of the inner optimizer, the steps of the outer one."""

    def __init__(self, wrapper: Any, groups: Any) -> None:
        self._wrapper = wrapper
        self._groups = groups
        self.read_back, self.forget, self.number = groups.read_back, groups.forget, groups.number
        self._end: Callable[[], None] = lambda: None

    def write(self, settings: Any, reference: Any, bounds: Any, noise_seed: int | None) -> Any:
        """See `optimizer.Optimizer`: noise is not added."""
        return self._groups.write(settings, reference, bounds, None)

    def steer(self, governor: Governor) -> None:
        """Call the governor around every step of the outer optimizer: ZeRO calls the inner one's once per part."""
        wrapper, step = self._wrapper, self._wrapper.step

        def steered(*args: Any, **kwargs: Any) -> Any:
            governor.before_step()
            try:
                done = step(*args, **kwargs)
            except BaseException:
                governor.abandon_step()
                raise
            if getattr(wrapper, "overflow", False):
                governor.abandon_step()
            else:
                governor.after_step()
            return done

        wrapper.step = steered

        def end() -> None:
            if wrapper.__dict__.get("step") is steered:
                del wrapper.step

        self._end = end

    def detach(self) -> None:
        """See `optimizer.Optimizer`."""
        self._end()
        self._groups.detach()
