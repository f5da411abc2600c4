"""REINFORCE in plain PyTorch on a small grid, steered by rules that watch the reward, beside four usual schedules.

    python examples/reinforce.py            # some 60 s; --quick: a few

All arms begin with the same policy network and the same learning rate, which nobody tuned; only what moves the learning
rate differs, and all of it runs in a Flyball service (FLYBALL_SERVER, or one that is started here). lag=0 makes every
update wait for its decision, so that the same seeds give the same table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import flyball
import flyball_server

SIDE, HORIZON, EPISODES = 5, 24, 16
#: From the upper left to the lower right, past two pits.
START, GOAL, PITS = 0, SIDE * SIDE - 1, (7, 16)
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
LR = 0.05


def arms(steps: int) -> dict[str, Any]:
    """What moves the learning rate, by name."""
    return {
        "constant": "constant",
        "cosine": {"type": "cosine", "T_max": steps},
        "one-cycle": {"type": "one_cycle", "max_lr": 2 * LR, "total_steps": steps},
        "plateau": {"type": "plateau", "metric": "reward", "mode": "max", "patience": max(steps // 15, 2)},
        "rules, reward trend": {"type": "rules", "reward_rule": "trend", "ema_reward_beta": 0.9},
        "adaptive, reward": {"type": "adaptive", "use_reward": True},
    }


def play(policy: torch.nn.Module, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """EPISODES games at once: the log probability of each move taken, its reward, and the states (-1: over)."""
    state = torch.full((EPISODES,), START)
    alive = torch.ones(EPISODES, dtype=torch.bool)
    taken, rewards, states = [], [], []
    for _ in range(HORIZON):
        logits = torch.log_softmax(policy(state), dim=1)
        move = torch.multinomial(logits.exp(), 1, generator=generator).squeeze(1)
        taken.append(logits.gather(1, move[:, None]).squeeze(1) * alive)
        states.append(torch.where(alive, state, -1))
        row, column = (torch.stack([state // SIDE, state % SIDE]) + MOVES[move].T).clamp(0, SIDE - 1)
        state = torch.where(alive, row * SIDE + column, state)
        at_goal, in_pit = state == GOAL, torch.isin(state, torch.tensor(PITS))
        rewards.append((at_goal.float() - in_pit.float() - 0.02) * alive)
        alive = alive & ~at_goal & ~in_pit
    return torch.stack(taken), torch.stack(rewards), torch.stack(states)


def train(run: str, policy_spec: Any, steps: int, seed: int, server: str | None) -> dict[str, float]:
    """One run; what is in the table of it."""
    torch.manual_seed(seed)
    policy, start = torch.nn.Embedding(SIDE * SIDE, 4), torch.nn.Embedding(SIDE * SIDE, 4)
    start.load_state_dict(policy.state_dict())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    labels = {"example": "reinforce"}
    governor = flyball.attach(
        optimizer, run=run, policy=policy_spec, seed=seed, lag=0, wait_s=5.0, server=server, labels=labels
    )
    returns = []
    with governor:
        for _ in range(steps):
            taken, rewards, states = play(policy, generator)
            to_go = rewards.flip(0).cumsum(0).flip(0)
            loss = -(taken * (to_go - to_go[0].mean())).sum(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reward = rewards.sum(0).mean()
            governor.step(loss, reward=reward, kl=kl(policy, start, states))
            returns.append(float(reward))
    tenth = max(steps // 10, 1)
    late = torch.tensor(returns[steps // 2 :])
    gained = sum(returns[-tenth:]) / tenth - sum(returns[:tenth]) / tenth
    return {
        "reward": sum(returns) / steps,
        "reward at the end": sum(returns[-tenth:]) / tenth,
        "variance": float(late.var()),
        "KL": kl(policy, start, states),
        "reward per step": gained / steps,
    }


@torch.no_grad()
def kl(policy: torch.nn.Module, start: torch.nn.Module, states: torch.Tensor) -> float:
    """KL(policy | start) per move, in nats, over the states that were visited."""
    visited = states[states >= 0]
    now, then = (torch.log_softmax(one(visited), dim=1) for one in (policy, start))
    return float((now.exp() * (now - then)).sum(1).mean())


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
    parser = argparse.ArgumentParser(description="REINFORCE on a small grid, steered by rules that watch the reward.")
    parser.add_argument("--steps", type=int, default=200, help="updates per run")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="20 updates, 2 seeds")
    parser.add_argument("--server", help="default: FLYBALL_SERVER, or a service started here")
    options = parser.parse_args(arguments)
    steps, seeds = (20, 2) if options.quick else (options.steps, options.seeds)
    torch.set_num_threads(1)
    name = f"reinforce-{secrets.token_hex(3)}"
    results: dict[str, list[dict[str, float]]] = {}
    with service(options.server) as server:
        for arm, policy in arms(steps).items():
            runs = (f"{name}-{arm.replace(', ', '-').replace(' ', '-')}-{seed}" for seed in range(seeds))
            results[arm] = [train(run, policy, steps, seed, server) for seed, run in enumerate(runs)]
    print(f"{seeds} seeds of {steps} updates, {EPISODES} games each; mean over seeds ± their standard deviation.")
    print(f"All arms begin with the same policy and Adam at {LR:g}; one-cycle goes up to {2 * LR:g}.")
    print("reward: mean return of all games. reward at the end: of the last tenth of the updates. variance: of the")
    print("updates' mean returns, second half. KL: from the first policy to the last, nats per move, where it goes.")
    print("reward per step: what the last tenth of the updates has more than the first, per update.\n")
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
