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
them use the same settings: they are one step, whose loss is best their mean. Under `optax.MultiSteps` only every k-th
update is a step: attach with accumulate="mean", call `before` ahead of the last micro-batch only, and `step` with every
one's loss.

A schedule inside the optimizer would write behind us, so it is refused. Either let the service have it
(`base={"type": "cosine", ...}`), or put a steerable factor behind it: `optax.chain(optax.adam(schedule),
optax.inject_hyperparams(optax.scale)(step_size=1.0))`, whose setting is then the factor. That is also what stands here
for mode="multiplier". Gradient noise is not added. A run is driven from one process: with more (`jax.process_count()`)
every one would have to write the same values at the same step, which this adapter does not arrange, so it refuses.

Rule of this module: nothing waits for a device. What was written is known; what a step put out is compared once it is
there.
"""

from __future__ import annotations

import logging
from collections import deque
from math import inf
from types import TracebackType
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from flyball.adapters.from_jax import copied, like, number
from flyball.adapters.optax_state import MOMENTA, Place, multi_steps, places_in, replaced
from flyball.govern import govern
from flyball.governor import Governor
from flyball.optimizer import Conflict
from flyball.options import Options
from flyball.pending import Pending
from flyball.wire import Group, Settings

log = logging.getLogger("flyball")

MICRO_BATCHES = (
    "opt_state is of optax.MultiSteps, where only every k-th update is a step: attach with accumulate='mean', call "
    "before() ahead of the last micro-batch of each step only, and step(loss) with every micro-batch"
)
#: After so many reports without a single `before` somebody has forgotten it.
FORGOTTEN = 20


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
    places = places_in(opt_state)
    accumulates = options.get("accumulate") is not None
    if not accumulates and multi_steps(opt_state) is not None:
        raise ValueError(MICRO_BATCHES)
    groups = tuple(place.declared(opt_state) for place in places)
    injected = _Injected(places, groups)
    return Steered(govern(injected, groups, options), injected, accumulates)


class Steered:
    """A steered optimizer state. A context manager that closes itself, as a governor is."""

    def __init__(self, governor: Governor, injected: _Injected, accumulates: bool) -> None:
        self.governor = governor
        self._injected = injected
        self._begun = self._called = False
        #: Reports before the first `before`; with micro-batches there may be many.
        self._bare, self._forgotten = 0, inf if accumulates else FORGOTTEN

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
        elif not self._called:
            self._bare += 1
            if self._bare == self._forgotten:
                log.warning(
                    "flyball: step() was called %d times, and before() never: nothing is steered, and no step is "
                    "counted; opt_state = steered.before(opt_state) belongs ahead of every step",
                    self._bare,
                )
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


class _Injected:
    """The optimizer state as the governor needs it (see `optimizer.Optimizer`); `state` is there during `before`."""

    def __init__(self, places: list[Place], declared: tuple[Group, ...]) -> None:
        self.state: Any = None
        self.detached = False
        self._places = places
        self._declared = declared
        #: Whether what `before` returned was ever seen to be used, and whether what it returned last was dropped.
        self._taken = False
        self._dropped: Conflict | None = None
        #: MultiSteps' count of updates at the last step, and whether its misuse was told.
        self._updates: float | None = None
        self._told = False
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
        self._watch_updates()
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
                if value is not None and stood is not None:
                    judged = self._judged(i, name, found[name], value, stood)
                    conflict = conflict or judged
                if target is not None and not _holds(found[name], value, target):
                    changed[name], value = self._make(i, name, target, found[name]), target
                now.append(stood if value is None else float(_typed(changed[name], value)))
            if any(changed[name] is not found[name] for name in changed):
                self.state = replaced(self.state, place.path, changed)
            lr, momentum = now
            stands.append((float("nan") if lr is None else lr, momentum))
        self._stands = stands
        return None if self._dropped is not None else conflict

    def read_back(self) -> tuple[Settings, Conflict | None]:
        """What was written last, as nobody can write while a jitted step runs; where what `before` returned is dropped,
        what the state began with."""
        stands = self._stands or []
        if self._dropped is not None:
            wanted = tuple(lr for lr, _ in stands)
            began = tuple(group.betas[0] if group.betas else group.momentum for group in self._declared)
            rates = tuple(group.lr for group in self._declared)
            used = Settings(rates, began if any(momentum is not None for momentum in began) else None, None)
            return used, self._dropped._replace(wanted_lr=wanted)
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
            conflict = self._judged(group, self._places[group].lr, value, float(value), stood)
            if conflict is not None:
                return conflict
        return None

    def _judged(self, group: int, name: str, holder: Any, found: float, stood: float) -> Conflict | None:
        """Who wrote what was found, where that is not what stood. As long as every state that comes in holds what the
        first one held, whatever was written, it is the caller that drops what `before` returned."""
        is_rate, began = name == self._places[group].lr, self._declared[group].lr
        if _same(holder, found, stood):
            if is_rate and not _same(holder, stood, began):
                self._taken, self._dropped = True, None
            return None
        conflict = self._conflict(group, name, found, stood)
        if not is_rate or self._taken:
            return conflict
        if isinstance(holder, jax.Array) and _same(holder, found, began):
            self._dropped = Conflict(
                "before() in vain",
                f"opt_state comes in with the learning rate that it began with ({found:.9g} in group "
                f"{self._declared[group].name}), not with {stood:.9g} as before() returned it: is what before() "
                "returned used? (opt_state = steered.before(opt_state))",
            )
            return self._dropped
        self._taken, self._dropped = True, None  # somebody else writes
        return conflict

    def _watch_updates(self) -> None:
        """Under MultiSteps each `before` belongs to another update. What is not computed yet is not looked at."""
        node = None if self._told else multi_steps(self.state)
        if node is None or not getattr(node.gradient_step, "is_ready", lambda: True)():
            return
        before, self._updates = self._updates, float(node.gradient_step)
        if before == self._updates:
            self._told = True
            log.warning("flyball: micro-batches are counted as steps: %s", MICRO_BATCHES)

    def _conflict(self, group: int, name: str, found: float, stood: float) -> Conflict:
        what = "momentum" if name in MOMENTA else "learning rate"
        return Conflict(
            f"{what} in {self._declared[group].name}",
            f"somebody else writes the {what} of group {self._declared[group].name} (hyperparams[{name!r}]): "
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
