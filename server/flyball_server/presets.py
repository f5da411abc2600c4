"""Named policies and guards: parameters that somebody has thought about, under a name that says what for.

Rule of this module: data only. A preset is a specification like any other; a run records it with every value, so that
a preset that changes in a later release changes no run that was begun under it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A specification and what it is for, in a sentence."""

    spec: Mapping[str, Any]
    about: str


_WARY = {"type": "windowed", "increase_factor": 1.05, "decrease_factor": 0.85}
_VERY_WARY = {"type": "windowed", "increase_factor": 1.02, "decrease_factor": 0.9, "max_change_per_step": 0.1}
_BOLD = {"type": "windowed", "increase_factor": 1.2, "increase_threshold": 0.01}

#: Policies by name; any parameter may be given beside the name and wins.
PRESETS: Mapping[str, Preset] = {
    "cautious": Preset(
        {"type": "cycle", "max_lr_factor": 3.0},
        "Escape from plateaus, but never above three times the learning rate you set.",
    ),
    "conservative": Preset(
        {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.9, "patience": 40},
        "Follow the loss in small steps, and wait long before a large cut.",
    ),
    "exploratory": Preset(
        {
            "type": "adaptive",
            "up_factor": 1.03,
            "down_factor": 0.8,
            "cooldown": 40,
            "use_cosine": True,
            "T0": 200,
            "T_mult": 2,
        },
        "Follow the loss under a cosine with warm restarts of growing length.",
    ),
    "gradient_safe": Preset(
        {"type": "gradient_aware", "policy": {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96}},
        "`steady`, with an immediate cut where the gradient norm explodes.",
    ),
    "moe": Preset(
        {"type": "windowed", "use_moe": True},
        "Mixture-of-experts models: narrow absolute bounds and gentle factors.",
    ),
    "moe_lora": Preset(
        {
            "type": "per_group",
            "policy": _WARY,
            "groups": {"*lora*": {"policy": _BOLD}, "*router*": {"policy": _VERY_WARY}},
        },
        "By parameter group: a wary base, a very wary router, bolder LoRA adapters.",
    ),
    "pulse": Preset(
        {"type": "aees", "lr_candidates": [0.5, 1.0, 2.0], "bonus_scale": "reward_std"},
        "Try half, full and double the learning rate in turn, and prefer what lowers the loss.",
    ),
    "reward_finetuning": Preset(
        {"type": "adaptive", "use_reward": True, "reward_up": 1.05, "reward_down": 0.8},
        "Reinforcement fine-tuning: the reward moves learning rate and momentum, the loss as well.",
    ),
    "spike_safe": Preset(
        {"type": "spike_guard", "policy": {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96}},
        "`steady`, with a playbook for spikes: cut, cut and ramp back, go back to a checkpoint, stop.",
    ),
    "steady": Preset(
        {"type": "adaptive", "up_factor": 1.02, "down_factor": 0.96},
        "Follow the loss in small steps, down only twice as fast as up: a good first choice.",
    ),
}

#: Guards by name: `guard={"preset": "moe"}`, with any other limit beside it.
GUARDS: Mapping[str, Preset] = {
    "careful": Preset(
        {"min_factor": 0.01, "max_factor": 10.0, "max_change": 2.0},
        "Between a hundredth of and ten times the learning rate you set, at most doubled or halved at a time.",
    ),
    "moe": Preset(
        {"min_lr": 1e-5, "max_lr": 2e-3},
        "The absolute bounds recommended for mixture-of-experts models.",
    ),
}
