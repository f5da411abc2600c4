"""Classify scikit-learn's digits with JAX and Optax, steered by a Flyball service. Copy what you need.

    python examples/optax_digits.py --run digits-1 --policy windowed --lr 0.3

Starts a service of its own unless FLYBALL_SERVER says where one is. Only the lines with `steered` are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import flyball_server
from flyball.adapters.optax import attach


def init(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """A network of one hidden layer."""
    one, two = jax.random.split(key)
    return {
        "body": {"w": jax.random.normal(one, (64, 32)) * 0.1, "b": jnp.zeros(32)},
        "head": {"w": jax.random.normal(two, (32, 10)) * 0.1, "b": jnp.zeros(10)},
    }


def logits(params: Any, images: jax.Array) -> jax.Array:
    """What the network says of each image."""
    hidden = jax.nn.relu(images @ params["body"]["w"] + params["body"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description="Train a small network on digits with Optax, steered by Flyball.")
    parser.add_argument("--run", default=f"optax-digits-{uuid.uuid4().hex[:6]}")
    parser.add_argument("--policy", default="windowed")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(argv)

    images, labels = (jnp.asarray(part) for part in load_digits(return_X_y=True))
    images = images.astype(jnp.float32) / 16
    params = init(jax.random.key(0))
    # Body and head are two groups: each has a learning rate of its own in the service.
    sgd = optax.inject_hyperparams(optax.sgd)
    parts = {name: sgd(learning_rate=options.lr, momentum=0.9) for name in params}
    optimizer = optax.multi_transform(parts, {name: name for name in params})
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            found = logits(params, images[batch])
            return optax.softmax_cross_entropy_with_integer_labels(found, labels[batch]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER") or stack.enter_context(flyball_server.running()).http
        steered = stack.enter_context(attach(opt_state, run=options.run, policy=options.policy, server=server))
        for key in jax.random.split(jax.random.key(1), options.steps):
            batch = jax.random.randint(key, (64,), 0, 1500)
            opt_state = steered.before(opt_state)
            params, opt_state, loss = train_step(params, opt_state, batch)
            steered.step(loss)
        status = steered.governor.status

    accuracy = float((logits(params, images[1500:]).argmax(axis=1) == labels[1500:]).mean())
    result = {
        "run": status.run,
        "steps": status.step,
        "last_loss": float(loss),
        "accuracy": accuracy,
        "lr": None if status.settings is None else list(status.settings.lr),
        "compiled": train_step._cache_size(),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
