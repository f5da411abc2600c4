"""JAX and Optax: settings go into the optimizer's state just before a step, as hyperparameters that are arrays.

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    opt_state = optimizer.init(params)
    steered = flyball.adapters.optax.attach(opt_state, run="mnist-7", policy="windowed")
    for batch in batches:
        opt_state = steered.before(opt_state)
        params, opt_state, loss = train_step(params, opt_state, batch)  # jitted, as ever
        steered.step(loss)
    steered.close()

Two lines: `before` returns the state with the newest settings in it (the very same state where nothing changed), and
`step` tells the step's signals, as `Governor.step` does. All else is at `steered.governor`: status, on, control, the
checkpoint token.

What is steered is every `optax.inject_hyperparams` in the state that has a learning rate ("learning_rate", "lr" or
"step_size") which is a number; with it "momentum" or "b1" where that is injected, too. Below `optax.partition` or
`optax.named_chain` a group is called by its label there. Nothing is compiled again: type and placement of the arrays
stay what they were.

What a step is: one pair of `before` and `step`. Where a jitted function makes several updates (`jax.lax.scan`), all of
them use the same settings: they are one step, whose loss is best their mean. Under `optax.MultiSteps` call the two
around the last micro-batch only.

A schedule inside the optimizer would write behind us, so it is refused. Either let the service have it
(`base={"type": "cosine", ...}`), or put a steerable factor behind it: `optax.chain(optax.adam(schedule),
optax.inject_hyperparams(optax.scale)(step_size=1.0))`, whose setting is then the factor. That is also what stands here
for mode="multiplier". Gradient noise is not added. A run is driven from one process: with more (`jax.process_count()`)
every one would have to write the same values at the same step, which this adapter does not arrange, so it refuses.

Rule of this module: nothing waits for a device. What was written is known; what a step put out is compared once it is
there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from types import TracebackType
from typing import Any, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from flyball.adapters.from_jax import copied, like, number
from flyball.govern import govern
from flyball.governor import Governor
from flyball.optimizer import Conflict
from flyball.options import Options
from flyball.pending import Pending
from flyball.wire import Group, Settings

LEARNING_RATES = ("learning_rate", "lr", "step_size")
MOMENTA = ("momentum", "b1")
SCHEDULED = (
    "{name} is a schedule, which writes its own value at every step: give inject_hyperparams a number and the service "
    "the schedule (base={{'type': 'cosine', ...}}), or steer a factor behind it: "
    "optax.chain(..., optax.inject_hyperparams(optax.scale)(step_size=1.0))"
)


def attach(opt_state: Any, **options: Unpack[Options]) -> Steered:
    """Let the service steer the optimizer whose state this is; see the module for how it is used.

    Raises TypeError or ValueError where the state has no injected learning rate, or one that is a schedule, or an
    option is wrong; Refused and FlyballError as `flyball.attach` does.
    """
    if options.get("mode") == "multiplier":
        raise ValueError(
            "mode is 'multiplier': here that is a factor of its own behind the schedule, "
            "optax.chain(..., optax.inject_hyperparams(optax.scale)(step_size=1.0)), attached without a mode"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"jax.process_count() is {jax.process_count()}: every process would have to write the same value at the "
            "same step, which this adapter does not arrange; train in one process"
        )
    places = _places(opt_state)
    groups = tuple(place.declared(opt_state) for place in places)
    injected = _Injected(places, groups)
    return Steered(govern(injected, groups, options), injected)


class Steered:
    """A steered optimizer state. A context manager that closes itself, as a governor is."""

    def __init__(self, governor: Governor, injected: _Injected) -> None:
        self.governor = governor
        self._injected = injected
        self._begun = self._called = False

    def before(self, opt_state: Any) -> Any:
        """The state to make the next step with. Its first call raises TypeError inside of a jitted function."""
        injected = self._injected
        if not self._called:
            self._called = True
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(opt_state)):
                raise TypeError("opt_state is being traced: call before(opt_state) outside of the jitted function")
        if injected.detached:
            return opt_state
        injected.state, self._begun = opt_state, True
        self.governor.before_step()
        changed, injected.state = injected.state, None
        return changed

    def step(self, loss: Any = None, *, reward: Any = None, grad_norm: Any = None, **signals: Any) -> None:
        """Report the signals of the step just made: see `Governor.step`. No device is waited for."""
        if self._begun:
            self._begun = False
            self.governor.after_step()
        self.governor.step(loss, reward=reward, grad_norm=grad_norm, **signals)

    @property
    def should_stop(self) -> bool:
        """See `Governor.should_stop`."""
        return self.governor.should_stop

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint token, to be saved with params and opt_state; `resume=` takes it back."""
        return self.governor.state_dict()

    def load_state_dict(self, token: dict[str, Any]) -> None:
        """Go back to a checkpoint: see `Governor.load_state_dict`."""
        self.governor.load_state_dict(token)

    def close(self, outcome: str = "finished") -> None:
        """See `Governor.close`; afterwards `before` returns what it is given."""
        self.governor.close(outcome)

    def __enter__(self) -> Steered:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")


class _Place(NamedTuple):
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
        _replaced(state, self.path, found)
        momentum = None if self.momentum is None else float(found[self.momentum])
        betas = None
        if momentum is not None and self.momentum == "b1" and "b2" in found:
            betas = (momentum, float(found["b2"]))
        return Group(self.group, float(found[self.lr]), None if betas else momentum, betas)


class _Injected:
    """The optimizer state as the governor needs it (see `optimizer.Optimizer`); `state` is there during `before`."""

    def __init__(self, places: list[_Place], declared: tuple[Group, ...]) -> None:
        self.state: Any = None
        self.detached = False
        self._places = places
        self._names = [group.name for group in declared]
        #: What each group's learning rate and momentum were when this looked last; None: not known.
        self._stands: list[tuple[float, float | None]] | None = None
        #: What was written last, to be used again unless it was given away.
        self._made: dict[tuple[int, str], tuple[float, jax.Array]] = {}
        #: A step's learning rate that had not been computed yet, with its group and what it must be.
        self._later: deque[tuple[Any, int, float]] = deque()

    def write(
        self,
        settings: Settings | None,
        reference: tuple[float, ...],
        bounds: tuple[tuple[float, float], ...],
        noise_seed: int | None,
    ) -> Conflict | None:
        """See `optimizer.Optimizer`."""
        conflict = self._come_in()
        stands: list[tuple[float, float | None]] = []
        for i, place in enumerate(self._places):
            found = place.hyperparams(self.state)
            before = self._stands[i] if self._stands else (None, None)
            momenta = None if settings is None else settings.momentum
            wanted = (None if settings is None else settings.lr[i], None if momenta is None else momenta[i])
            changed, now = dict(found), list[float | None]()
            for name, stood, target in zip((place.lr, place.momentum), before, wanted, strict=True):
                if name is None:
                    now.append(None)
                    continue
                value = self._known(found[name], i if name == place.lr else None, stood)
                if value is not None and stood is not None and not _same(found[name], value, stood):
                    conflict = conflict or self._conflict(i, name, value, stood)
                if target is not None and not _holds(found[name], value, target):
                    changed[name], value = self._make(i, name, target, found[name]), target
                now.append(stood if value is None else float(_typed(changed[name], value)))
            if any(changed[name] is not found[name] for name in changed):
                self.state = _replaced(self.state, place.path, changed)
            lr, momentum = now
            stands.append((float("nan") if lr is None else lr, momentum))
        self._stands = stands
        return conflict

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """What was written last: nobody can write while a jitted step runs."""
        stands = self._stands or []
        momenta = tuple(momentum for _, momentum in stands)
        told = any(momentum is not None for momentum in momenta)
        return Settings(tuple(lr for lr, _ in stands), momenta if told else None, None), None

    def forget(self) -> None:
        """See `optimizer.Optimizer`."""
        self._stands = None
        self._later.clear()

    def number(self, value: Any) -> float | Pending:
        """See `optimizer.Optimizer`."""
        return number(value)

    def detach(self) -> None:
        """From here on the state is left alone."""
        self.detached = True

    def _known(self, value: Any, group: int | None, stood: float | None) -> float | None:
        """The value, where reading it waits for nothing; else it is looked at once it is there."""
        if not isinstance(value, jax.Array) or cast(Any, value).is_ready():
            return float(value)
        if group is not None and stood is not None and len(self._later) < len(self._places):
            self._later.append((copied(value), group, stood))
        return None

    def _come_in(self) -> Conflict | None:
        """What somebody else wrote in earlier steps, as far as that is known by now."""
        while self._later and self._later[0][0].is_ready():
            value, group, stood = self._later.popleft()
            if not _same(value, float(value), stood):
                return self._conflict(group, self._places[group].lr, float(value), stood)
        return None

    def _conflict(self, group: int, name: str, found: float, stood: float) -> Conflict:
        what = "momentum" if name in MOMENTA else "learning rate"
        return Conflict(
            f"{what} in {self._names[group]}",
            f"somebody else writes the {what} of group {self._names[group]} (hyperparams[{name!r}]): "
            f"{found:.9g} was found where {stood:.9g} stood",
        )

    def _make(self, group: int, name: str, value: float, old: Any) -> jax.Array:
        """An array of this value, of the type and at the place of the old one."""
        known = self._made.get((group, name))
        if known is not None and known[0] == value and not known[1].is_deleted():
            return known[1]
        if isinstance(old, jax.Array):
            made = like(old, value)
            self._made[group, name] = value, made
            return made
        # Somebody wrote a plain number, which would be compiled in anew: what stood there before shows how it was.
        return jnp.asarray(np.float32(value)) if known is None else _like_made(known[1], value)


def _like_made(made: jax.Array, value: float) -> jax.Array:
    return jnp.asarray(np.asarray(value, made.dtype)) if made.is_deleted() else like(made, value)


def _typed(holder: Any, value: float) -> Any:
    """The value as it is in what holds it."""
    return np.asarray(value, holder.dtype) if hasattr(holder, "dtype") else value


def _same(holder: Any, found: float, meant: float) -> bool:
    return found == meant or found == float(_typed(holder, meant)) or np.float32(found) == np.float32(meant)


def _holds(holder: Any, value: float | None, target: float) -> bool:
    """Whether this is an array that is known to hold the target already."""
    return isinstance(holder, jax.Array) and value is not None and value == float(_typed(holder, target))


def _places(opt_state: Any) -> list[_Place]:
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
        _Place(label or f"group{i}", tuple(path), name, _momentum_of(node))
        for i, (label, (path, node, name)) in enumerate(zip(labels, places, strict=True))
    ]


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


def _replaced(node: Any, path: tuple[Any, ...], hyperparams: dict[str, Any]) -> Any:
    """The state with other hyperparameters at the end of the path; everything off the path is shared."""
    if not path:
        return node._replace(hyperparams=hyperparams)
    key, child = path[0], _replaced(_child(node, path[0]), path[1:], hyperparams)
    if hasattr(key, "name"):
        if hasattr(node, "_replace"):
            return node._replace(**{key.name: child})
        return dataclasses.replace(node, **{key.name: child})
    if isinstance(node, tuple):
        return (*node[: key.idx], child, *node[key.idx + 1 :])
    changed = copy.copy(node)
    changed[key.idx if hasattr(key, "idx") else key.key] = child
    return changed
