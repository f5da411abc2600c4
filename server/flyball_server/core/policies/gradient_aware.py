"""Policy `gradient_aware`: another policy, with a hand on the brake that watches the gradient norm.

Rule: where the gradient norm explodes against its own running norm, the learning rate is cut at once; where it has
vanished for a while, the learning rate is raised a little; otherwise the correction fades. It is a factor on top of
the inner policy, which knows nothing of it, and it stays within [min_factor, max_factor].

The running norm is an exponential average of log(grad_norm) whose every update is clipped to log(explode_ratio), the
idea behind Huber's estimate of location (Huber 1964): one wild gradient moves it by no more than an ordinary one could.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from typing import Any, ClassVar, NamedTuple

from flyball_server.core.base import about, check
from flyball_server.core.numbers import bad, emit
from flyball_server.core.types import Decision, Group, Observation, Part, Policy

#: A gradient norm of 0 counts as this.
SMALLEST_NORM = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The inner policy, what counts as exploding or vanishing, and how strong the correction is."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    policy: Any = field(metadata=about("The inner policy: {type: NAME, parameters ...}."))
    explode_ratio: float = field(default=4.0, metadata=about("Exploding: above this multiple of the norm.", gt=1))
    vanish_ratio: float = field(default=0.1, metadata=about("Vanishing: below this part of the norm.", gt=0, lt=1))
    vanish_patience: int = field(default=20, metadata=about("So many such observations in a row raise once.", ge=1))
    cut_factor: float = field(default=0.5, metadata=about("Factor on the correction at an explosion.", gt=0, lt=1))
    raise_factor: float = field(default=1.1, metadata=about("Factor on the correction when vanished.", gt=1))
    recovery: float = field(default=1.02, metadata=about("How fast it fades: ratio per ordinary observation.", gt=1))
    min_factor: float = field(default=0.1, metadata=about("Lowest correction.", gt=0, le=1))
    max_factor: float = field(default=2.0, metadata=about("Highest correction.", ge=1))
    beta: float = field(default=0.98, metadata=about("Memory of the running norm per observation.", ge=0, lt=1))
    min_samples: int = field(default=20, metadata=about("Observations before it may act.", ge=1))

    def __post_init__(self) -> None:
        if self.policy is None:
            raise ValueError("policy: null is not allowed; give {type: NAME, parameters ...}")
        check(self)


class State(NamedTuple):
    """inner: the inner policy's state. lr: its learning rates. out: those times factor. norm: the running log norm.

    samples: gradient norms so far. low: vanished ones in a row.
    """

    inner: tuple[Any, ...]
    lr: tuple[float, ...]
    out: tuple[float, ...]
    factor: float
    norm: float
    samples: int
    low: int


def init(config: Config, groups: tuple[Group, ...], seed: int) -> tuple[State, Decision]:
    """The inner policy's first decision. Raises ValueError where its parameters do not fit the groups."""
    policy, own = config.policy
    try:
        inner, first = policy.init(own, groups, seed)
    except ValueError as error:
        raise ValueError(f"policy.{error}") from error
    return State(inner, first.lr, first.lr, 1.0, 0.0, 0, 0), first


def step(config: Config, state: State, seen: Observation) -> tuple[State, Decision]:
    """The inner policy's step, and the correction on top."""
    inner, before, out, old, norm, samples, low = state
    part: Part = config.policy
    inner, decision = part.step(inner, seen)
    lr, momentum, noise, phase, code, fields, milestone, asks = decision
    factor, grad = old, seen.grad_norm
    if grad is not None and not bad(grad) and grad >= 0:
        running = norm
        factor, norm, low, mark = _judge(config, old, norm, samples, low, log(max(grad, SMALLEST_NORM)))
        samples += 1
        if mark:
            code = f"{code}+{mark}"
            fields = {**(fields or {}), "grad_norm": grad, "running_norm": exp(running), "grad_factor": factor}
    if factor != old or (lr is not before and lr != before):
        out = lr if factor == 1.0 else tuple([emit(one * factor) if one else 0.0 for one in lr])
    return (
        State(inner, lr, out, factor, norm, samples, low),
        Decision(out, momentum, noise, phase, code, fields, milestone, asks),
    )


def _judge(
    config: Config, factor: float, norm: float, samples: int, low: int, value: float
) -> tuple[float, float, int, str]:
    """(correction, running log norm, vanished in a row, mark) after one more log norm."""
    if samples == 0:
        return factor, value, 0, ""
    away, most = value - norm, log(config.explode_ratio)
    norm += (1 - config.beta) * min(max(away, -most), most)
    if samples < config.min_samples:
        return factor, norm, 0, ""
    if away > most:
        return max(factor * config.cut_factor, config.min_factor), norm, 0, "grad_exploding"
    if away < log(config.vanish_ratio):
        if low + 1 < config.vanish_patience:
            return factor, norm, low + 1, "grad_low"
        return min(factor * config.raise_factor, config.max_factor), norm, 0, "grad_vanishing"
    if factor < 1.0:
        factor = min(1.0, factor * config.recovery)
    elif factor > 1.0:
        factor = max(1.0, factor / config.recovery)
    return factor, norm, 0, ""


_SENTENCES = {
    "grad_exploding": "Gradient norm {grad_norm:.4g} exploded against its running {running_norm:.4g}: "
    "learning rate corrected by {grad_factor:.4g}.",
    "grad_low": "Gradient norm {grad_norm:.4g} is far below its running {running_norm:.4g}.",
    "grad_vanishing": "Gradient norm {grad_norm:.4g} stays far below its running {running_norm:.4g}: "
    "learning rate corrected by {grad_factor:.4g}.",
}


def explain(config: Config, decision: Decision) -> str:
    """The inner policy's sentence, and one for the correction where it acted."""
    part: Part = config.policy
    code, _, mark = decision.code.rpartition("+")
    if mark not in _SENTENCES:
        return part.explain(decision)
    own = _SENTENCES[mark].format(**(decision.fields or {}))
    return f"{part.explain(decision._replace(code=code))} {own}"


def reads(config: Config) -> frozenset[str]:
    """What the inner policy reads."""
    part: Part = config.policy
    return part.reads()


def finish(config: Config, state: State) -> Decision | None:
    """What the inner policy has to say at the end."""
    part: Part = config.policy
    return part.finish(state.inner)


POLICY = Policy("gradient_aware", 1, Config, State, init, step, explain, reads, _SENTENCES, finish, parts=("policy",))
