"""Classify scikit-learn's digits with Keras 3, steered by a Flyball service. Copy what you need.

    KERAS_BACKEND=jax python examples/keras_digits.py --run digits-1 --policy windowed --lr 0.2

Any backend: torch, jax or tensorflow. Starts a service of its own unless FLYBALL_SERVER says where one is. Only the
lines with `steered` in them are Flyball's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import uuid
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from sklearn.datasets import load_digits

import flyball_server
from flyball.adapters.keras import FlyballCallback


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description="Train a small network on digits with Keras, steered by Flyball.")
    parser.add_argument("--run", default=f"keras-digits-{uuid.uuid4().hex[:6]}")
    parser.add_argument("--policy", default="windowed")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(options.lr, momentum=0.9),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )

    with contextlib.ExitStack() as stack:
        server = os.environ.get("FLYBALL_SERVER") or stack.enter_context(flyball_server.running()).http
        steered = FlyballCallback(run=options.run, policy=options.policy, server=server)
        history = model.fit(
            images[:1500],
            labels[:1500],
            validation_data=(images[1500:], labels[1500:]),
            batch_size=64,
            epochs=options.epochs,
            verbose=0,
            callbacks=[steered],
        )
    found = {name: values[-1] for name, values in history.history.items()}
    result = {"run": options.run, "backend": keras.backend.backend(), "step": steered.state_dict()["step"], **found}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
