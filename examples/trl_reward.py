"""Reward-driven fine-tuning with TRL: GRPO on a tiny language model, whose reward is a penalty on the wrong length.

    python examples/trl_reward.py            # some 90 s; --quick: a few

One callback in the trainer is all that Flyball needs: it reports each step's reward, and a rule that watches it moves
the learning rate. Beside it, four usual schedules. All arms begin with the same random model and learning rate, which
nobody tuned, and all of it runs in a Flyball service (FLYBALL_SERVER, or one that is started here). Nothing is
downloaded. lag=0 makes every step wait for its decision, so that the same seeds give the same table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import string
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import flyball_server
from flyball.adapters.transformers import FlyballCallback

LR, LENGTH, LONGEST = 3e-3, 4, 12


def arms(steps: int) -> dict[str, Any]:
    """What moves the learning rate, by name."""
    return {
        "constant": "constant",
        "cosine": {"type": "cosine", "T_max": steps},
        "one-cycle": {"type": "one_cycle", "max_lr": 2 * LR, "total_steps": steps},
        "plateau": {"type": "plateau", "metric": "reward", "mode": "max", "patience": max(steps // 15, 2)},
        "rules, reward trend": {"type": "rules", "reward_rule": "trend", "ema_reward_beta": 0.9},
    }


def penalty(completions: list[str], **_: Any) -> list[float]:
    """The reward: 0 for LENGTH letters, less by a part of LONGEST for each letter more or fewer."""
    return [-abs(len(text) - LENGTH) / LONGEST for text in completions]


def letters() -> PreTrainedTokenizerFast:
    """A token per letter."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=32
    )


def language_model(folder: str, seed: int) -> GPT2LMHeadModel:
    """Two random layers; from a folder, since GRPO reads the model it began with there once more, for the KL."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=28, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder)


def train(run: str, policy: Any, steps: int, seed: int, server: str | None) -> dict[str, float]:
    """One run; what is in the table of it."""
    callback = FlyballCallback(
        run=run, policy=policy, seed=seed, lag=0, wait_s=5.0, server=server, labels={"example": "trl_reward"}
    )
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            learning_rate=LR,
            max_steps=steps,
            seed=seed,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=LONGEST,
            beta=0.02,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=language_model(folder, seed),
            reward_funcs=penalty,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": letter} for letter in string.ascii_lowercase]),
            processing_class=letters(),
            callbacks=[callback],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    history = [line for line in trainer.state.log_history if "reward" in line]
    rewards = [line["reward"] for line in history]
    tenth = max(steps // 10, 1)
    return {
        "reward": sum(rewards) / steps,
        "reward at the end": sum(rewards[-tenth:]) / tenth,
        "variance": float(torch.tensor(rewards[steps // 2 :]).var()),
        "KL": sum(line["kl"] for line in history[-tenth:]) / tenth,
        "reward per step": (sum(rewards[-tenth:]) - sum(rewards[:tenth])) / tenth / steps,
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A line per arm: the mean over seeds, and how far seeds lie from it (standard deviation)."""
    columns = list(next(iter(results.values()))[0])
    lines = ["".join([f"{'':<22}", *(f"{column:>24}" for column in columns)])]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = torch.tensor([one[column] for one in runs], dtype=torch.float64)
            cells.append(f"{values.mean():.4f} ± {values.std(correction=0):.4f}")
        lines.append("".join([f"{name:<22}", *(f"{cell:>24}" for cell in cells)]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all arms with every seed, and print the table."""
    parser = argparse.ArgumentParser(description="GRPO on a tiny language model, steered by a rule on its reward.")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 steps, 1 seed")
    parser.add_argument("--server", help="default: FLYBALL_SERVER, or a service started here")
    options = parser.parse_args(arguments)
    steps, seeds = (4, 1) if options.quick else (options.steps, options.seeds)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = f"trl-{secrets.token_hex(3)}"
    results: dict[str, list[dict[str, float]]] = {}
    with service(options.server) as server:
        for arm, policy in arms(steps).items():
            runs = (f"{name}-{arm.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in range(seeds))
            results[arm] = [train(run, policy, steps, seed, server) for seed, run in enumerate(runs)]
    print(f"{seeds} seeds of {steps} GRPO steps, 16 completions each; mean over seeds ± their standard deviation.")
    print(f"All arms begin with the same model and AdamW at {LR:g}; one-cycle goes up to {2 * LR:g}.")
    print(f"reward: mean of all completions (-|letters - {LENGTH}| / {LONGEST}). reward at the end: of the steps' last")
    print("tenth. variance: of the steps' mean rewards, second half. KL: to the first model, as TRL estimates it, in")
    print("nats per token, last tenth. reward per step: what the last tenth has more than the first, per step.\n")
    print(table(results))


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
