"""Where an Optax state holds what is steered: every `optax.inject_hyperparams` that has a learning rate.

Rule of this module: a state is never written to; what is changed is put together anew. What cannot be steered is
refused with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from flyball.wire import Group

LEARNING_RATES = ("learning_rate", "lr", "step_size")
MOMENTA = ("momentum", "b1")
SCHEDULED = (
    "{name} is a schedule, which writes its own value at every step: give inject_hyperparams a number and the service "
    "the schedule (base={{'type': 'cosine', ...}}), or steer a factor behind it: "
    "optax.chain(..., optax.inject_hyperparams(optax.scale)(step_size=1.0))"
)


class Place(NamedTuple):
    """Where a group's settings are: the path to its injected state, and the names of its hyperparameters there."""

    group: str
    path: tuple[Any, ...]
    lr: str
    momentum: str | None

    def hyperparams(self, state: Any) -> dict[str, Any]:
        """The hyperparameters, in a state of the same shape."""
        for key in self.path:
            state = _child(state, key)
        return dict(state.hyperparams)

    def declared(self, state: Any) -> Group:
        """The group as it stands. Raises TypeError where the state cannot be put together anew."""
        found = self.hyperparams(state)
        replaced(state, self.path, found)
        for name in (self.lr, self.momentum):
            if name is not None and np.size(found[name]) != 1:
                raise ValueError(
                    f"hyperparams[{name!r}] of group {self.group} has shape {np.shape(found[name])}: a run steers one "
                    "number per group, so attach outside of jax.vmap, to the state of one model"
                )
        if float(found[self.lr]) < 0:
            raise ValueError(
                f"hyperparams[{self.lr!r}] of group {self.group} is negative ({float(found[self.lr]):g}): inject "
                "optax.scale_by_learning_rate, which turns the sign itself, in the place of optax.scale"
            )
        momentum = None if self.momentum is None else float(found[self.momentum])
        betas = None
        if momentum is not None and self.momentum == "b1" and "b2" in found:
            betas = (momentum, float(found["b2"]))
        for name, value in zip((self.momentum, "b2"), betas or (momentum,), strict=False):
            if value is not None and value >= 1:
                dtype = getattr(found[str(name)], "dtype", "float")
                raise ValueError(
                    f"hyperparams[{name!r}] of group {self.group} is {value:g} as {dtype}, and must be below 1: a "
                    "hyperparam_dtype with few digits rounds 0.999 up; leave it at float32"
                )
        return Group(self.group, float(found[self.lr]), None if betas else momentum, betas)


def places_in(opt_state: Any) -> list[Place]:
    """Where the learning rates are, each under the name of its group."""
    found, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=lambda node: _rate_of(node) is not None)
    places = [(path, node, name) for path, node in found if (name := _rate_of(node)) is not None]
    if not places:
        raise ValueError(
            "opt_state has no injected learning rate: make the optimizer with "
            "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), and give what its init returned"
        )
    labels = [next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "") for path, _, _ in places]
    if len(places) == 1:
        labels = [labels[0] or "default"]
    elif len(set(labels)) < len(labels):
        labels = [f"group{i}" for i in range(len(labels))]
    for _, node, name in places:
        if name in (getattr(node, "hyperparams_states", None) or {}):
            raise ValueError(SCHEDULED.format(name=name))
    return [
        Place(label or f"group{i}", tuple(path), name, _momentum_of(node))
        for i, (label, (path, node, name)) in enumerate(zip(labels, places, strict=True))
    ]


def multi_steps(opt_state: Any) -> Any:
    """The state of optax.MultiSteps in this one, if there is one."""

    def is_it(node: Any) -> bool:
        return hasattr(node, "mini_step") and hasattr(node, "gradient_step")

    return next((node for node in jax.tree_util.tree_leaves(opt_state, is_leaf=is_it) if is_it(node)), None)


def _rate_of(node: Any) -> str | None:
    """The name of the learning rate among a node's injected hyperparameters, if it has any."""
    hyperparams = getattr(node, "hyperparams", None)
    if not isinstance(hyperparams, dict) or not hasattr(node, "inner_state"):
        return None
    return next((name for name in LEARNING_RATES if name in hyperparams), None)


def _momentum_of(node: Any) -> str | None:
    scheduled = getattr(node, "hyperparams_states", None) or {}
    return next((name for name in MOMENTA if name in node.hyperparams and name not in scheduled), None)


def _child(node: Any, key: Any) -> Any:
    if hasattr(key, "name"):
        return getattr(node, key.name)
    return node[key.idx if hasattr(key, "idx") else key.key]


def replaced(node: Any, path: tuple[Any, ...], hyperparams: dict[str, Any]) -> Any:
    """The state with other hyperparameters at the end of the path; everything off the path is shared."""
    if not path:
        return node._replace(hyperparams=hyperparams)
    key, child = path[0], replaced(_child(node, path[0]), path[1:], hyperparams)
    if hasattr(key, "name"):
        if hasattr(node, "_replace"):
            return node._replace(**{key.name: child})
        return dataclasses.replace(node, **{key.name: child})
    if isinstance(node, tuple):
        return (*node[: key.idx], child, *node[key.idx + 1 :])
    changed = copy.copy(node)
    changed[key.idx if hasattr(key, "idx") else key.key] = child
    return changed
