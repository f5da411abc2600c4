"""A jitted JAX training step with an Optax optimizer of two labelled parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tests.conformance.loop import AFTER_CLOSE_LR, Trained

from flyball.adapters.optax import attach

HOLDS = "float32"


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    parts = {
        name: optax.inject_hyperparams(optax.sgd)(learning_rate=lr) for name, lr in (("body", 0.1), ("head", 0.01))
    }
    optimizer = optax.multi_transform(parts, {"body": "body", "head": "head"})
    params = {"body": jnp.ones((2, 2)), "head": jnp.ones(2)}
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any, value: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            return 0 * (params["head"] @ params["body"]).sum() + value

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    used: list[Any] = []
    steered = attach(opt_state, **options)
    for i, value in enumerate(trace):
        before(i)
        if i == meddle_at:
            for part in parts:
                opt_state.inner_states[part].inner_state.hyperparams["learning_rate"] *= 0.5
        opt_state = steered.before(opt_state)
        params, opt_state, loss = train_step(params, opt_state, jnp.float32(value))
        steered.step(loss)
        used.append(_rates(opt_state))
    token, status = steered.state_dict(), steered.governor.status
    steered.close()
    for part in parts:
        opt_state.inner_states[part].inner_state.hyperparams["learning_rate"] = jnp.float32(AFTER_CLOSE_LR)
    _, opt_state, _ = train_step(params, steered.before(opt_state), jnp.float32(1.0))
    return Trained([_floats(row) for row in used], token, status, _floats(_rates(opt_state)))


def _rates(opt_state: Any) -> tuple[jax.Array, ...]:
    """What a step used: it puts out what it was given."""
    parts = opt_state.inner_states
    return tuple(parts[name].inner_state.hyperparams["learning_rate"] for name in ("body", "head"))


def _floats(row: tuple[jax.Array, ...]) -> tuple[float, ...]:
    return tuple(float(value) for value in row)
