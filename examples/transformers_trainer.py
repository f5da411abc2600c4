"""Hugging Face's Trainer with Flyball: a character-level language model on text that comes with Python.

    python examples/transformers_trainer.py            # some 40 s; --quick: a few

The only line of Flyball's is the callback. Nothing is downloaded; the service is FLYBALL_SERVER's, or started here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import flyball_server
from flyball.adapters.transformers import FlyballCallback

LETTERS = 64


def characters() -> torch.Tensor:
    """What `help("topics")` tells, a number per character; what is no ASCII is a question mark."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode("ascii", "replace")))


def samples(text: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Pieces of LETTERS characters; the model learns to say the next one."""
    pieces = text[: len(text) // LETTERS * LETTERS].reshape(-1, LETTERS)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print what the Trainer logged."""
    parser = argparse.ArgumentParser(description="A character-level model in Hugging Face's Trainer, with Flyball.")
    parser.add_argument("--run", default=f"characters-{secrets.token_hex(3)}")
    parser.add_argument("--policy", default="steady", help="a policy's name; see docs/policies.md")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--server", help="default: FLYBALL_SERVER, or a service started here")
    options = parser.parse_args(arguments)
    steps = 20 if options.quick else options.steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    data = samples(characters())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=LETTERS, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with service(options.server) as server, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=3e-3,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                logging_steps=max(steps // 10, 1),
                eval_strategy="steps",
                eval_steps=max(steps // 3, 1),
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data[:-64],
            eval_dataset=data[-64:],
            callbacks=[callback := FlyballCallback(run=options.run, policy=options.policy, server=server)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    for line in trainer.state.log_history:
        print(as_text(line))
    status = callback.governor.status
    print(f"\nrun {status.run}: {status.step} optimizer steps, the newest decision: {status.reason}")


def as_text(line: dict[str, Any]) -> str:
    """What is of interest in a line of the Trainer's history."""
    wanted = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "train_loss")
    return "  ".join(f"{name} {line[name]:.4g}" for name in wanted if name in line)


@contextlib.contextmanager
def service(server: str | None) -> Iterator[str | None]:
    """The address of a service: the given one, FLYBALL_SERVER's (None), or that of one started here."""
    if server or os.environ.get("FLYBALL_SERVER"):
        yield server
    else:
        with flyball_server.running() as here:
            yield here.http


if __name__ == "__main__":
    main()
