"""Policy `aees`: try learning-rate multipliers and gradient noise for whole episodes, and prefer what pays.

Rule: a candidate (one multiplier, one noise) is frozen for `episode_length` usable losses. Then its reward, the
log-ratio of the loss at both ends less a penalty for instability, goes to a bandit per axis, and the answer to that
very observation carries the next candidate. An episode whose steps mostly ran with something else teaches nothing;
one that `bad_limit` unusable losses in a row break off teaches the worst reward.

The rule is that of pulseopt (AEES, versions 0.1.0 and 0.3.0); with rng="pulseopt" and the same seed it draws the
same arms. Two differences, only where the package raises: unusable losses, and losses that are not positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

from flyball_server.core import bandit, episodes
from flyball_server.core.base import about, check
from flyball_server.core.episodes import Episode
from flyball_server.core.numbers import LARGEST_SIGNAL, spread
from flyball_server.core.types import APPLIED, Decision, Group, Observation, Policy

#: Streams of chance (see rng.py): arms of the learning rate, and arms of the noise (plus the LR arm where
#: each has a controller of its own).
LR_STREAM, NOISE_STREAM = 0x0100, 0x0200
#: Every arm is played for a whole episode, so more of them are a mistake.
MOST_CANDIDATES = 100
#: Losses are kept in blocks: one more costs as little in an episode of thousands.
BLOCK = 32
#: Multipliers beyond these may ruin a run within their first episode.
SAFE_MULTIPLIERS = (0.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """pulseopt's parameters under its names, and a few more; an axis with one candidate is a constant.

    Candidates and episodes: lr_candidates, noise_candidates, episode_length. How arms are chosen: control_mode to
    context_trend_epsilon, exploration_coef to warmup_rounds, rng, seed. What an episode is worth: the reward_
    parameters and ema_alpha. Guards: bad_limit, applied_share, guard.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    lr_candidates: tuple[float, ...] = field(default=(1.0,), metadata=about("Factors on the LR to choose from, > 0."))
    noise_candidates: tuple[float, ...] = field(
        default=(0.0,), metadata=about("Standard deviations of the gradient noise to choose from.", each_ge=0)
    )
    episode_length: int = field(default=100, metadata=about("Usable losses per episode.", ge=1, le=10_000))
    control_mode: Literal["adaptive", "random"] = field(
        default="adaptive", metadata=about("'random' plays every arm alike and learns nothing.")
    )
    structured_control_mode: Literal["independent", "conditional"] = field(
        default="independent", metadata=about("'conditional' learns the noise for every LR candidate on its own.")
    )
    context_mode: Literal["none", "trend", "trend_phase"] = field(
        default="none", metadata=about("Learn apart by the trend of the loss, and by the third of the run.")
    )
    total_training_steps: int | None = field(
        default=None, metadata=about("Length of the run; needed by context_mode='trend_phase'.", ge=1)
    )
    context_trend_window: int = field(default=3, metadata=about("Episodes that make a trend.", ge=1, le=10_000))
    context_trend_epsilon: float = field(
        default=1e-3, metadata=about("Change of loss per episode up to which it is stable.", ge=0)
    )
    version: Literal["0.1", "0.3"] = field(
        default="0.1", metadata=about("Version of pulseopt whose reward_instability_lambda is the default.")
    )
    reward_instability_lambda: float | None = field(
        default=None, metadata=about("Weight of instability in the reward; null: 0.1 (version 0.3: 0).", ge=0, le=1e6)
    )
    reward_epsilon: float = field(default=1e-8, metadata=about("Added to losses and squares in the reward.", gt=0))
    reward_clip_min: float = field(default=-1.0, metadata=about("Lowest reward.", ge=-1e6, le=1e6))
    reward_clip_max: float = field(default=1.0, metadata=about("Highest reward.", ge=-1e6, le=1e6))
    ema_alpha: float = field(default=0.1, metadata=about("Weight of a new loss in its average.", gt=0, le=1))
    exploration_coef: float = field(default=1.0, metadata=about("Weight of uncertainty in a score.", ge=0, le=1e6))
    bonus_scale: Literal["none", "reward_std"] = field(
        default="none", metadata=about("'reward_std' scales that weight by the spread of the rewards: recommended.")
    )
    discount: float = field(default=0.95, metadata=about("Factor on all that was learnt, at each episode.", gt=0, le=1))
    warmup_rounds: int = field(default=1, metadata=about("Episodes every arm gets before scores decide.", ge=0))
    rng: Literal["counter", "pulseopt", "native"] = field(
        default="counter", metadata=about("'pulseopt' draws as the package does ('native' is another spelling).")
    )
    seed: int | None = field(default=None, metadata=about("Seed of every choice; null: the run's."))
    bad_limit: int = field(default=3, metadata=about("So many unusable losses in a row end the episode.", ge=1))
    applied_share: float = field(
        default=0.8, metadata=about("Part of an episode's steps that must have used its candidate.", ge=0, le=1)
    )
    guard: bool = field(default=True, metadata=about("Do episodes below applied_share teach nothing?"))

    def __post_init__(self) -> None:
        check(self)
        for name in ("lr_candidates", "noise_candidates"):
            values = getattr(self, name)
            if not 1 <= len(values) <= MOST_CANDIDATES:
                raise ValueError(f"{name}: {len(values)} values are no choice; give 1 to {MOST_CANDIDATES}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values!r} holds a value twice; give each once")
        if any(value <= 0 for value in self.lr_candidates):
            raise ValueError(f"lr_candidates: {self.lr_candidates!r} is out of range; give factors greater than 0")
        if self.context_mode == "trend_phase" and self.total_training_steps is None:
            raise ValueError(
                "total_training_steps: None is not enough for context_mode='trend_phase'; give the length of the run"
            )
        if self.reward_clip_min > self.reward_clip_max:
            raise ValueError(
                f"reward_clip_min: {self.reward_clip_min!r} is above reward_clip_max = {self.reward_clip_max!r}; "
                "give reward_clip_min <= reward_clip_max"
            )
        if self.reward_instability_lambda is None:
            object.__setattr__(self, "reward_instability_lambda", 0.1 if self.version == "0.1" else 0.0)
        if self.rng == "native":
            object.__setattr__(self, "rng", "pulseopt")


class Memory(NamedTuple):
    """What outlives episodes. base: LR per group as attached. ends: last losses of closed episodes. controllers: the
    LR's, then the noise's (one, or one per LR arm); None on an axis with one candidate."""

    seed: int
    base: tuple[float, ...]
    ends: tuple[float, ...]
    controllers: tuple[tuple[Any, ...] | None, ...]


class State(NamedTuple):
    """blocks, tail: losses of the open episode, BLOCK in each block. left: losses until it is full. norm_sum, norms:
    of its update norms. used: losses whose step used its candidate. last: step of the last loss. bad_run: unusable
    losses in a row. lr, noise: in force. now: the open Episode; memory: Memory (both plain tuples after JSON)."""

    blocks: tuple[tuple[float, ...], ...]
    tail: tuple[float, ...]
    left: int
    norm_sum: float
    norms: int
    used: int
    last: int
    bad_run: int
    lr: tuple[float, ...]
    noise: tuple[float, ...] | None
    now: tuple[Any, ...]
    memory: tuple[Any, ...]


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The first episode, open from step 0 on."""
    seed = seed if config.seed is None else config.seed
    base = tuple([max(group.lr, 0.0) for group in groups])
    buckets = len(episodes.BUCKETS[config.context_mode]) if config.control_mode == "adaptive" else 0
    controllers: list[tuple[Any, ...] | None] = []
    for number in range(_in_charge(config, len(config.lr_candidates) - 1) + 1):
        n = len(config.noise_candidates if number else config.lr_candidates)
        own = _chance(config, seed, number, 0).own
        controllers.append(bandit.begin(n, buckets, own) if n > 1 else None)
    memory = Memory(seed, base, (), tuple(controllers))
    return _open(config, memory, None, -1, 0, "episode_open", {})


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """One observation. A step without a loss counts nothing."""
    blocks, tail, left, norm_sum, norms, used, _, _, lr, noise, now, memory = state
    fields = episodes.in_force(now)
    loss, norm, applied = seen.loss, seen.update_norm, seen.applied
    if loss is None:
        return state, Decision(lr, None, noise, "episode", "no_loss", fields)
    if not -LARGEST_SIGNAL <= loss <= LARGEST_SIGNAL:
        return _bad_loss(config, state, seen.step, fields)
    tail, left = (*tail, loss), left - 1
    if len(tail) == BLOCK:
        blocks, tail = (*blocks, tail), ()
    if norm is not None and -LARGEST_SIGNAL <= norm <= LARGEST_SIGNAL:
        norm_sum, norms = norm_sum + norm, norms + 1
    if applied is None or applied >= now[8]:
        used += 1
    state = State(blocks, tail, left, norm_sum, norms, used, seen.step, 0, lr, noise, now, memory)
    if left:
        return state, Decision(lr, None, noise, "episode", "in_episode", fields)
    return _close(config, state, seen.step)


def _losses(state: State) -> tuple[float, ...]:
    return (*chain.from_iterable(state.blocks), *state.tail)


def _bad_loss(config: Config, state: State, step: int, fields: dict[str, Any]) -> tuple[State, Decision]:
    """Nothing is ingested; every bad_limit-th unusable loss in a row drops the episode, at the lowest reward."""
    bad_run = state.bad_run + 1
    state = state._replace(bad_run=bad_run)
    if bad_run % config.bad_limit:
        hold = Decision(state.lr, None, state.noise, "episode", "nonfinite_hold", fields | {"bad_run": bad_run})
        return state, hold
    now = Episode(*state.now)
    memory = _learn(config, Memory(*state.memory), now, config.reward_clip_min)
    numbers = _account(config, state, memory, now)
    numbers |= {"outcome": "aborted", "bad_run": bad_run, "reward": config.reward_clip_min}
    return _open(config, memory, state, step, now.number + 1, "episode_aborted_nonfinite", numbers)


def _close(config: Config, state: State, step: int) -> tuple[State, Decision]:
    now, memory, worth = Episode(*state.now), Memory(*state.memory), _worth(config, state)
    if worth["outcome"] == "closed":
        memory = _learn(config, memory, now, worth["reward"])
    memory = memory._replace(ends=(*memory.ends, _losses(state)[-1])[-config.context_trend_window :])
    numbers = _account(config, state, memory, now) | worth
    return _open(config, memory, state, step, now.number + 1, f"episode_{worth['outcome']}", numbers)


def finish(config: Config, state: State) -> Decision | None:
    """The open episode as if it were closed, for the record; None where it has no loss. Nothing is learnt."""
    if not (state.blocks or state.tail):
        return None
    now, worth = Episode(*state.now), _worth(config, state)
    numbers = _account(config, state, Memory(*state.memory), now) | worth
    fields = {**episodes.in_force(now), **numbers, "final": True}
    return Decision(state.lr, None, state.noise, "episode", f"episode_{worth['outcome']}", fields, milestone=True)


def _open(
    config: Config, memory: Memory, state: State | None, decided: int, number: int, code: str, numbers: dict[str, Any]
) -> tuple[State, Decision]:
    """The next episode, and the answer that carries its candidate. state: the one before, None at the start."""
    start = decided + 1
    bucket = _bucket(config, memory.ends, start)
    memory, lr_index, audit = _choose(config, memory, 0, bucket, start)
    memory, noise_index, more = _choose(config, memory, _in_charge(config, lr_index), bucket, start)
    multiplier, std = float(config.lr_candidates[lr_index]), float(config.noise_candidates[noise_index])
    lr, noise = spread(multiplier, memory.base), None
    if config.noise_candidates != (0.0,):
        noise = (std,) * len(lr)
    since, last, bad_run = decided, -1, 0
    if state is not None:
        last, bad_run = state.last, state.bad_run
        lr, noise = state.lr if lr == state.lr else lr, state.noise if noise == state.noise else noise
        if lr is state.lr and noise is state.noise:  # nothing for the client to apply
            since = Episode(*state.now).since
    name = episodes.candidate_name(multiplier, std)
    now = Episode(number, lr_index, noise_index, multiplier, std, name, bucket, start, since)
    fields = {**episodes.in_force(now), **numbers, **audit, **more}
    return (
        State((), (), config.episode_length, 0.0, 0, 0, last, bad_run, lr, noise, now, memory),
        Decision(lr, None, noise, "episode", code, fields, milestone=state is not None),
    )


def _bucket(config: Config, ends: tuple[float, ...], start: int) -> str | None:
    if config.context_mode == "none":
        return None
    trend = episodes.trend(ends, config.context_trend_window, config.context_trend_epsilon)
    if config.total_training_steps is None or config.context_mode == "trend":
        return trend
    return f"{episodes.phase(start, config.total_training_steps)}_{trend}"


def _number(config: Config, bucket: str | None) -> int | None:
    """The number of the context for the controllers; those that choose at random know none."""
    return None if bucket is None or config.control_mode == "random" else episodes.NUMBER[bucket]


def _in_charge(config: Config, lr_index: int) -> int:
    """The number of the controller that chooses the noise beside the LR arm `lr_index`."""
    return 1 + lr_index if config.structured_control_mode == "conditional" else 1


def _chance(config: Config, seed: int, number: int, step: int) -> bandit.Chance:
    """What controller `number` draws at `step`; the seeds of its own generator are pulseopt's."""
    stream = NOISE_STREAM + number - 1 if number else LR_STREAM
    own = None if config.rng == "counter" else seed + 100 + number if number else seed
    return bandit.Chance(seed, stream, step, own)


def _choose(
    config: Config, memory: Memory, number: int, bucket: str | None, start: int
) -> tuple[Memory, int, dict[str, Any]]:
    """The arm that controller `number` wants, with what led to it; arm 0 where there is no choice."""
    controller = memory.controllers[number]
    if controller is None:
        return memory, 0, {}
    chance = _chance(config, memory.seed, number, start)
    controller, choice = bandit.choose(config, controller, _number(config, bucket), chance)
    axis = "noise" if number else "lr"
    audit = {
        f"{axis}_scores": None if choice.scores is None else list(choice.scores),
        f"{axis}_tie": list(choice.tie),
        f"{axis}_u": choice.u,
    }
    memory = memory._replace(controllers=bandit.put(memory.controllers, number, controller))
    return memory, choice.arm, audit


def _learn(config: Config, memory: Memory, now: Episode, reward: float) -> Memory:
    """Both controllers in charge of the episode are told its reward."""
    for number, arm in ((0, now.lr_index), (_in_charge(config, now.lr_index), now.noise_index)):
        controller = memory.controllers[number]
        if controller is not None:
            learnt = bandit.learn(config, controller, _number(config, now.bucket), arm, reward)
            memory = memory._replace(controllers=bandit.put(memory.controllers, number, learnt))
    return memory


def _account(config: Config, state: State, memory: Memory, now: Episode) -> dict[str, Any]:
    """What the open episode was, as it ends, with what its controllers know by now."""
    losses = _losses(state)
    fields = {f"closed_{name}": value for name, value in episodes.in_force(now).items()}
    fields |= {
        "start_step": now.start, "end_step": now.start + len(losses) - 1, "last_step": state.last if losses else None,
        "losses": len(losses), "used": state.used,
        "start_loss": losses[0] if losses else None, "end_loss": losses[-1] if losses else None,
        "mean_update_norm": state.norm_sum / state.norms if state.norms else None,
    }  # fmt: skip
    for axis, number in (("lr", 0), ("noise", _in_charge(config, now.lr_index))):
        controller = memory.controllers[number]
        if controller is not None:
            known = bandit.audit(controller, _number(config, now.bucket))
            fields |= {f"{axis}_{name}": value for name, value in known.items()}
    return fields


def _worth(config: Config, state: State) -> dict[str, Any]:
    """The reward of the losses, with its parts, and whether it counts."""
    weight, limits = config.reward_instability_lambda or 0.0, (config.reward_clip_min, config.reward_clip_max)
    losses = _losses(state)
    parts = episodes.reward(losses, config.ema_alpha, weight, config.reward_epsilon, limits)
    stale = config.guard and state.used / len(losses) < config.applied_share
    return parts._asdict() | {"outcome": "stale" if stale else "closed", "reward": parts.reward_final_clipped}


def reads(config: Config) -> frozenset[str]:
    """With the guard it must know which decision was in force."""
    return frozenset((APPLIED,)) if config.guard else frozenset()


_ENDED = "Episode {closed_episode} ({closed_candidate}) "
_NEXT = "From here on {candidate}: learning rate x {lr_multiplier:g}, noise {noise_std:g}."
_SENTENCES = {
    "episode_open": "Episode {episode} begins.",
    "in_episode": "Episode {episode} goes on with {candidate}.",
    "no_loss": "No loss was measured: nothing counts.",
    "nonfinite_hold": "The loss is not a usable number ({bad_run} in a row): nothing counts, the episode goes on.",
    "episode_closed": _ENDED + "took the loss from {start_loss:.6g} to {ema_loss_end:.6g} (smoothed): "
    "reward {reward:.4g}.",
    "episode_stale": _ENDED + "counts for nothing: only {used} of its {losses} steps ran with its candidate.",
    "episode_aborted_nonfinite": _ENDED + "ends at {bad_run} unusable losses in a row: reward {reward:g}.",
}


def explain(config: Config, decision: Decision) -> str:
    """One sentence for people or two, from the decision's code and fields; at the start with what is doubtful."""
    fields = decision.fields or {}
    text = _SENTENCES[decision.code].format(**fields)
    if decision.code.startswith("episode_") and "final" not in fields:
        text += " " + _NEXT.format(**fields)
    if decision.code == "episode_open":
        low, high = SAFE_MULTIPLIERS
        unsafe = [f"{value:g}" for value in config.lr_candidates if not low <= value <= high]
        if unsafe:
            text += f" Warning: {', '.join(unsafe)} beyond [{low:g}, {high:g}] may ruin a run: each is played in full."
        if config.total_training_steps is not None and config.context_mode != "trend_phase":
            text += " total_training_steps is ignored: only context_mode='trend_phase' reads it."
    return text


_LOG = {
    "selected_lr_indices": "closed_lr_index", "selected_noise_indices": "closed_noise_index",
    "selected_lr_values": "closed_lr_multiplier", "selected_noise_values": "closed_noise_std",
    "selected_combined_names": "closed_candidate", "episode_rewards": "reward",
    "episode_start_steps": "start_step", "episode_end_steps": "end_step",
    "episode_start_losses": "start_loss", "episode_end_losses": "end_loss",
    "episode_ema_loss_starts": "ema_loss_start", "episode_ema_loss_ends": "ema_loss_end",
    "reward_base": "reward_base", "reward_instability": "reward_instability", "reward_penalty": "reward_penalty",
    "reward_final_unclipped": "reward_final_unclipped", "reward_final_clipped": "reward_final_clipped",
    "mean_update_norms": "mean_update_norm",
}  # fmt: skip
_LOG_OF_CONTEXT = ("context_buckets", "context_bucket_ids", "context_bucket_names")


def episode_log(fields: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """pulseopt's log lists from the fields of all closing decisions, in order; with a context those of both its
    versions. Episodes that were dropped or counted for nothing are in none of them."""
    rows = [row for row in fields if row["outcome"] == "closed"]
    log = {name: [row[key] for row in rows] for name, key in _LOG.items()}
    if rows and "closed_bucket" in rows[0]:
        buckets = [row["closed_bucket"] for row in rows]
        log |= {name: list(buckets) for name in _LOG_OF_CONTEXT}
        log["context_trends"] = [bucket.rpartition("_")[2] for bucket in buckets]
        log["context_phases"] = [bucket.rpartition("_")[0] or None for bucket in buckets]
    return log


POLICY = Policy("aees", 1, Config, State, init, step, explain, reads, codes=_SENTENCES, finish=finish)
