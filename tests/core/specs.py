"""What the policies are tested with: every policy by itself, every preset, and the variations that take other ways
through the code.

Rule of this module: data only. Traces are recorded under these names, so that one whose specification changes gets a
new name.
"""

from __future__ import annotations

from typing import Any

from flyball_server.core.policies import POLICIES
from flyball_server.presets import PRESETS

#: What each policy is run with besides its defaults; those that hold other policies have no defaults.
RULES: dict[str, Any] = {"type": "rules", "ema_loss_beta": 0.5}
AEES: dict[str, Any] = {
    "type": "aees",
    "episode_length": 7,
    "lr_candidates": [0.5, 1, 2],
    "noise_candidates": [0, 0.01],
}
INNER: dict[str, Any] = {"type": "windowed", "window_size": 5, "cooldown_steps": 0}
SPIKES: dict[str, Any] = {"type": "spike_guard", "confirm": 2, "min_samples": 20, "rewarm_steps": 30}
SPECS: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name, policy in POLICIES.items() if not policy.parts},
    **{f"preset {name}": {"type": name} for name in PRESETS},
    "cycle, short": {"type": "cycle", "window_size": 10, "patience": 15, "smoothing": 0.5},
    "cycle, original": {"type": "cycle", "compat": "original", "window_size": 9, "escape_ceiling": "multiplied"},
    "adaptive, all on": {"type": "adaptive", "use_reward": True, "use_cosine": True, "T0": 30, "patience": 5},
    "adaptive, original": {"type": "adaptive", "compat": "original", "use_reward": True, "use_cosine": True},
    "adaptive, beta1": {"type": "adaptive", "use_reward": True, "momentum_target": "beta1"},
    "rules, trend": {**RULES, "lr_rule": "trend", "momentum_rule": "relative", "reward_rule": "trend"},
    "rules, variance": {**RULES, "lr_rule": "variance", "momentum_rule": "normalized", "reward_rule": "variance"},
    "rules, grad_norm": {**RULES, "lr_rule": "grad_norm", "momentum_rule": "exp", "reward_rule": "scaling"},
    "rules, cyclical": {**RULES, "lr_rule": "cyclical", "momentum_rule": "inverse", "momentum_target": "beta1"},
    "rules, loss_decay": {**RULES, "lr_rule": "loss_decay", "reward_rule": "kelly"},
    "windowed, original": {"type": "windowed", "compat": "original"},
    "windowed, short": INNER,
    "greedy, short": {"type": "greedy", "patience": 2, "cooldown": 3, "warmup": 2, "smooth": True, "reset_start": 4},
    "aees, contexts": {**AEES, "context_mode": "trend", "structured_control_mode": "conditional"},
    "aees, phases": {**AEES, "context_mode": "trend_phase", "total_training_steps": 900, "bonus_scale": "reward_std"},
    "aees, random": {**AEES, "control_mode": "random"},
    "gradient_aware": {"type": "gradient_aware", "policy": INNER, "min_samples": 3, "vanish_patience": 2},
    "per_group": {
        "type": "per_group",
        "policy": {"type": "adaptive"},
        "groups": {"head": {"policy": INNER, "scale": 0.5}, "fro*": {"scale": 2.0}},
    },
    "spike_guard": {**SPIKES, "policy": INNER, "deviations": 2.0, "cooldown_steps": 5, "memory_steps": 60},
    "range_test": {"type": "range_test"},
    "range_test, linear": {
        "type": "range_test",
        "steps": 300,
        "spacing": "linear",
        "after": "reference",
        "policy": {**SPIKES, "policy": INNER},
    },
    "sequence": {
        "type": "sequence",
        "stages": [
            {"policy": {"type": "warmup", "steps": 20}, "until": 20},
            {"policy": {"type": "gradient_aware", "policy": "steady"}, "until": 90},
            {"policy": {"type": "per_group", "policy": "cycle", "groups": {"head": {"policy": AEES}}}},
        ],
    },
}

#: More of them, which only the recorded traces follow: other ways to move, and base schedules underneath.
MORE: dict[str, dict[str, Any]] = {
    "constant, on a schedule": {"type": "constant", "base": {"type": "cosine", "T_max": 800, "warmup_steps": 50}},
    "plateau, short": {"type": "plateau", "patience": 3, "factor": 0.5, "cooldown": 5, "min_lr": [1e-5, 1e-4]},
    "plateau, reward": {"type": "plateau", "metric": "reward", "mode": "max", "threshold_mode": "abs", "patience": 20},
    "greedy, relative": {"type": "greedy", "threshold_mode": "rel", "threshold": 0.01, "factor": 0.8, "patience": 5},
    "greedy, reward": {"type": "greedy", "metric": "reward", "mode": "max", "patience": 2},
    "cycle, by patience": {"type": "cycle", "window_size": 20, "patience": 60, "escape_on": "patience"},
    "cycle, by increase": {"type": "cycle", "window_size": 20, "escape_on": "increase", "group_mode": "same"},
    "adaptive, steady": {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96},
    "rules, falling": {"type": "rules", "momentum_rule": "inverse", "inverse_direction": "falling"},
    "rules, reward": {"type": "rules", "reward_rule": "trend", "reward_momentum": True, "momentum_target": "beta1"},
    "windowed, of a known length": {"type": "windowed", "total_steps": 1000, "emergency": {}},
    "windowed, experts": {"type": "windowed", "use_moe": True, "window_size": 10, "patience": 3, "group_mode": "same"},
    "windowed, on a schedule": {**INNER, "base": {"type": "one_cycle", "total_steps": 1000, "max_lr": 0.01}},
    "aees, as the package": {**AEES, "rng": "pulseopt", "version": "0.3", "exploration_coef": 0.2},
    "warmup, of one step": {"type": "warmup", "steps": 1},
    "gradient_aware, of momentum": {
        "type": "gradient_aware",
        "policy": {"type": "adaptive", "use_reward": True},
        "explode_ratio": 2.0,
        "vanish_ratio": 0.6,
        "vanish_patience": 3,
    },
    "per_group, of scales": {"type": "per_group", "policy": {"type": "greedy"}, "groups": {"*": {"scale": 0.5}}},
    "spike_guard, of defaults": {"type": "spike_guard", "policy": {"type": "constant"}},
    "spike_guard, without limits": {
        **SPIKES,
        "policy": {"type": "gradient_aware", "policy": {"type": "adaptive", "use_reward": True}},
        "max_cuts": 5,
        "max_rewarms": 3,
        "max_restores": 0,
        "base": {"type": "cosine", "T_max": 1000},
    },
    "sequence, of two": {
        "type": "sequence",
        "stages": [{"policy": {"type": "warmup", "steps": 50}, "until": 50}, {"policy": {"type": "cycle"}}],
    },
}
