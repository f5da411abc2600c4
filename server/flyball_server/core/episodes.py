"""Episodes of training: the reward of one, the context the next one begins in, and the name of its candidate.

Rule of this module: pure arithmetic over the losses of episodes; what is done with it is the policy's matter.
Formulas are pulseopt's (`NormalizedLossImprovementReward`, `StructuredEpisodeManager`) unless said otherwise.
"""

from __future__ import annotations

from math import fsum, log
from typing import Any, NamedTuple

TRENDS = ("improving", "stable", "worsening")
PHASES = ("early", "middle", "late")
#: The contexts of each mode, in order, and the number of each among its own.
BUCKETS = {
    "none": (),
    "trend": TRENDS,
    "trend_phase": tuple(f"{phase}_{trend}" for phase in PHASES for trend in TRENDS),
}
NUMBER = {name: number for names in BUCKETS.values() for number, name in enumerate(names)}
#: A mean of losses around zero makes the instability immense; it is cut off here so that it stays a number.
LARGEST_INSTABILITY = 1e100


class Episode(NamedTuple):
    """An open episode: its number, arms, their values and name, its context (None: without), its first step.

    since: the step whose observation decided the candidate in force; it stays where the next is the same.
    """

    number: int
    lr_index: int
    noise_index: int
    lr_multiplier: float
    noise_std: float
    name: str
    bucket: str | None
    start: int
    since: int


class Reward(NamedTuple):
    """The parts of a reward. fallback: was there no logarithm to take?"""

    ema_loss_start: float
    ema_loss_end: float
    reward_base: float
    reward_instability: float
    reward_penalty: float
    reward_final_unclipped: float
    reward_final_clipped: float
    reward_fallback: bool


def in_force(episode: tuple[Any, ...]) -> dict[str, Any]:
    """What every decision says of the open episode, an `Episode` or the plain tuple it is after JSON."""
    number, lr_index, noise_index, multiplier, std, name, bucket, _, _ = episode
    fields = {
        "episode": number, "lr_index": lr_index, "noise_index": noise_index, "lr_multiplier": multiplier,
        "noise_std": std, "candidate": name,
    }  # fmt: skip
    if bucket is not None:
        fields["bucket"] = bucket
    return fields


def reward(
    losses: tuple[float, ...], alpha: float, weight: float, epsilon: float, limits: tuple[float, float]
) -> Reward:
    """The log-ratio of the first and the smoothed last of `losses` (at least one), less a penalty for their spread.

    alpha: weight of a new loss in the moving average. weight: of the instability (variance / mean^2). Where a loss is
    not positive, twice the difference over the sum of sizes takes the place of the logarithm: equal to second order.
    """
    start = end = losses[0]
    for loss in losses[1:]:
        end = alpha * loss + (1.0 - alpha) * end
    fallback = start + epsilon <= 0 or end + epsilon <= 0
    if fallback:
        base = 2 * (start - end) / (abs(start) + abs(end) + epsilon)
    else:
        base = log(start + epsilon) - log(end + epsilon)
    mean = fsum(losses) / len(losses)
    variance = fsum([(loss - mean) * (loss - mean) for loss in losses]) / len(losses)
    instability = min(variance / (mean * mean + epsilon), LARGEST_INSTABILITY)
    penalty = weight * instability
    unclipped = base - penalty
    clipped = min(max(unclipped, limits[0]), limits[1])
    return Reward(start, end, base, instability, penalty, unclipped, clipped, fallback)


def trend(ends: tuple[float, ...], window: int, epsilon: float) -> str:
    """Where the end losses of the last `window` episodes go: the mean change of one to the next beyond `epsilon`."""
    last = ends[-window:]
    if len(last) < 2:
        return "stable"
    change = (last[-1] - last[0]) / (len(last) - 1)
    return "improving" if change < -epsilon else "worsening" if change > epsilon else "stable"


def phase(step: int, total: int) -> str:
    """The third of a run of `total` steps that `step` lies in."""
    part = step / total
    return "early" if part < 1 / 3 else "middle" if part < 2 / 3 else "late"


def candidate_name(multiplier: float, noise_std: float) -> str:
    """`lr0p5_n0p005` for 0.5 and 0.005: twelve digits, `-` as m and `.` as p."""
    return f"lr{multiplier:.12g}_n{noise_std:.12g}".replace("-", "m").replace(".", "p")
