"""Base schedules: learning rates that depend on the step alone, in closed form.

Rule of this module: `lr(t)` is the learning rate in force at optimizer step t (the first is 0), a pure
O(1) function of (config, t, the group's reference LR), equal to what the scheduler of the same name in
torch 2.x or transformers 5.x would have set. It is finite, never negative, and asking never raises.

The parameter names and defaults are those of the two libraries. In addition `warmup_steps` puts a
linear warm-up from 0 in front (transformers' `*_with_warmup`): the schedule itself is then evaluated at
`step - warmup_steps`.

Longer than 400 lines because it must stand alone in one file (standard library only, no relative
imports): the client follows the very same schedules while the service is away.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

#: No schedule returns more than this, however long a growing one (gamma > 1) runs.
LARGEST_LR = 1e100
#: The integers every float can hold; no count of steps needs more.
LARGEST_INT = 2**53

_TYPE_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", NoneType: "null"}
_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (lambda value, limit: value >= limit, "at least"),
    "gt": (lambda value, limit: value > limit, "greater than"),
    "le": (lambda value, limit: value <= limit, "at most"),
    "lt": (lambda value, limit: value < limit, "less than"),
    "each_ge": (lambda value, limit: value >= limit, "at least"),  # for lists; the others are JSON Schema's, too
}


# ---- checking parameters ---------------------------------------------------------------------------


def about(description: str, **limits: float) -> dict[str, Any]:
    """The metadata of one parameter: its description and its limits (`ge`, `gt`, `le`, `lt`, `each_ge`)."""
    return {"description": description, **limits}


def check(config: Any) -> None:
    """Check every field of the dataclass `config` against its annotation and its limits.

    Raises ValueError naming the field, the value and what is allowed.
    """
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value, hint = getattr(config, entry.name), hints[entry.name]
        if not _fits(value, hint):
            raise ValueError(f"{entry.name}: {value!r} is not allowed; give {_words(hint)}")
        for key, (holds, words) in _LIMITS.items():
            if key in entry.metadata and not all(holds(one, entry.metadata[key]) for one in _numbers(value)):
                raise ValueError(f"{entry.name}: {value!r} is out of range; give {words} {entry.metadata[key]}")


def nearest(name: object, known: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of known names."""
    close = get_close_matches(name[:100], list(known), 1, 0.6) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _numbers(value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value
    return () if value is None or isinstance(value, str) else (value,)


def _fits(value: Any, hint: Any) -> bool:
    """Is `value` of the annotated type? A bool is no number, an int is a float, floats are finite."""
    if hint is Any:
        return True
    if hint is int:
        return type(value) is int and abs(value) <= LARGEST_INT
    if hint is float:
        return type(value) in (int, float) and abs(value) <= 1.7e308
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if get_args(hint):
        return any(_fits(value, one) for one in get_args(hint))
    return type(value) is hint


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list, each item " + _words(get_args(hint)[0])
    if get_args(hint):
        return " or ".join(map(_words, get_args(hint)))
    return _TYPE_WORDS.get(hint, getattr(hint, "__name__", str(hint)))


# ---- the parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Warmed(_Checked):
    warmup_steps: int = field(default=0, metadata=about("Steps of linear warm-up from 0, before the schedule.", ge=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(_Warmed):
    """torch ConstantLR; with its defaults here: the reference LR, always."""

    factor: float = field(default=1.0, metadata=about("Factor on the LR for the first total_iters steps.", ge=0, le=1))
    total_iters: int = field(default=0, metadata=about("Number of steps the factor holds.", ge=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(_Warmed):
    """torch LinearLR. transformers' linear schedule is start_factor=1, end_factor=0, total_iters=N-warmup."""

    start_factor: float = field(default=1 / 3, metadata=about("Factor on the LR at the first step.", gt=0, le=1))
    end_factor: float = field(default=1.0, metadata=about("Factor on the LR from step total_iters on.", ge=0, le=1))
    total_iters: int = field(default=5, metadata=about("Steps from start_factor to end_factor.", ge=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(_Warmed):
    """torch CosineAnnealingLR. transformers' cosine schedule is T_max=N-warmup, eta_min=0."""

    T_max: int = field(metadata=about("Steps from the LR down to eta_min; then it climbs back, and so on.", ge=1))
    eta_min: float = field(default=0.0, metadata=about("Lowest LR, absolute.", ge=0, le=LARGEST_LR))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(_Warmed):
    """torch StepLR."""

    step_size: int = field(metadata=about("Steps between two cuts.", ge=1))
    gamma: float = field(default=0.1, metadata=about("Factor on the LR at each cut.", ge=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiStep(_Warmed):
    """torch MultiStepLR."""

    milestones: tuple[int, ...] = field(metadata=about("The steps at which the LR is cut (kept sorted).", each_ge=0))
    gamma: float = field(default=0.1, metadata=about("Factor on the LR at each milestone.", ge=0))

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(_Warmed):
    """torch ExponentialLR."""

    gamma: float = field(metadata=about("Factor on the LR at every step.", ge=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial(_Warmed):
    """torch PolynomialLR; with lr_end (1e-7 there) transformers' polynomial decay with warm-up."""

    total_iters: int = field(default=5, metadata=about("Steps down to lr_end.", ge=1))
    power: float = field(default=1.0, metadata=about("Power of the polynomial.", ge=0))
    lr_end: float = field(default=0.0, metadata=about("Last LR, absolute.", ge=0, le=LARGEST_LR))


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCycle(_Checked):
    """torch OneCycleLR: up to max_lr, down to far below the start; momentum the other way round."""

    total_steps: int = field(metadata=about("Steps of the whole cycle; the last value holds after it.", ge=1))
    max_lr: float | None = field(
        default=None, metadata=about("Peak LR; null: the group's own LR.", gt=0, le=LARGEST_LR)
    )
    pct_start: float = field(default=0.3, metadata=about("Fraction of the cycle spent going up.", ge=0, le=1))
    anneal_strategy: Literal["cos", "linear"] = field(default="cos", metadata=about("Shape of each phase."))
    cycle_momentum: bool = field(default=True, metadata=about("Cycle the momentum inversely to the LR."))
    base_momentum: float = field(default=0.85, metadata=about("Momentum at the peak LR.", ge=0, lt=1))
    max_momentum: float = field(default=0.95, metadata=about("Momentum at the start and the end.", ge=0, lt=1))
    div_factor: float = field(default=25.0, metadata=about("First LR = max_lr / div_factor.", gt=0))
    final_div_factor: float = field(default=1e4, metadata=about("Last LR = first LR / final_div_factor.", gt=0))
    three_phase: bool = field(default=False, metadata=about("Come down to the first LR, then to the last."))


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineRestarts(_Warmed):
    """torch CosineAnnealingWarmRestarts."""

    T_0: int = field(metadata=about("Steps until the first restart.", ge=1))
    T_mult: int = field(default=1, metadata=about("Factor on the period at every restart.", ge=1))
    eta_min: float = field(default=0.0, metadata=about("Lowest LR, absolute.", ge=0, le=LARGEST_LR))


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseSqrt(_Warmed):
    """transformers get_inverse_sqrt_schedule."""

    timescale: int | None = field(
        default=None, metadata=about("Steps until the LR is 1/sqrt(2) of itself; null: warmup_steps or 10000.", ge=1)
    )

    def __post_init__(self) -> None:
        check(self)
        if self.timescale is None:
            object.__setattr__(self, "timescale", self.warmup_steps or 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupStableDecay(_Warmed):
    """transformers get_wsd_schedule: warm-up, constant, decay; after that min_lr_ratio for ever."""

    num_decay_steps: int = field(metadata=about("Steps of the decay.", ge=0))
    num_stable_steps: int | None = field(
        default=None, metadata=about("Steps at full LR; null: what num_training_steps leaves.", ge=0)
    )
    num_training_steps: int | None = field(
        default=None, metadata=about("All steps; needed where num_stable_steps is not given.", ge=0)
    )
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = field(
        default="linear", metadata=about("Shape of the warm-up.")
    )
    decay_type: Literal["linear", "cosine", "1-sqrt"] = field(default="cosine", metadata=about("Shape of the decay."))
    min_lr_ratio: float = field(default=0.0, metadata=about("Lowest LR as a part of the reference LR.", ge=0, le=1))
    num_cycles: float = field(default=0.5, metadata=about("Waves of the cosine decay.", ge=0, le=1e6))

    def __post_init__(self) -> None:
        check(self)
        if self.num_stable_steps is not None:
            return
        if self.num_training_steps is None:
            raise ValueError("num_stable_steps: null is not enough; give num_stable_steps or num_training_steps")
        stable = self.num_training_steps - self.warmup_steps - self.num_decay_steps
        if stable < 0:
            raise ValueError(
                f"num_training_steps: {self.num_training_steps} is less than warmup_steps + num_decay_steps = "
                f"{self.warmup_steps + self.num_decay_steps}; give more steps or shorten these two"
            )
        object.__setattr__(self, "num_stable_steps", stable)


# ---- the formulas ------------------------------------------------------------------------------------


def _warmed(formula: Callable[[Any, int, float], float]) -> Callable[[Any, int, float], float]:
    """Put transformers' linear warm-up in front: lr * step / max(1, warmup)."""

    def lr(config: Any, step: int, reference_lr: float) -> float:
        warmup: int = config.warmup_steps
        if step < warmup:
            return reference_lr * (step / warmup)
        return formula(config, step - warmup, reference_lr)

    return lr


def _constant(config: Constant, step: int, reference_lr: float) -> float:
    """lr·factor while t < total_iters, then lr (docs: torch.optim.lr_scheduler.ConstantLR)."""
    return reference_lr * config.factor if step < config.total_iters else reference_lr


def _linear(config: Linear, step: int, reference_lr: float) -> float:
    """lr·(s + (e - s)·min(t, T)/T) (docs: torch.optim.lr_scheduler.LinearLR)."""
    part = min(step, config.total_iters) / config.total_iters
    return reference_lr * (config.start_factor + (config.end_factor - config.start_factor) * part)


def _cosine(config: Cosine, step: int, reference_lr: float) -> float:
    """eta_min + (lr - eta_min)·(1 + cos(pi·t/T_max))/2 (Loshchilov & Hutter 2017, SGDR, eq. 5, without restarts)."""
    wave = (1.0 + math.cos(math.pi * ((step % (2 * config.T_max)) / config.T_max))) / 2
    return config.eta_min + (reference_lr - config.eta_min) * wave


def _step(config: Step, step: int, reference_lr: float) -> float:
    """lr·gamma^floor(t / step_size) (docs: torch.optim.lr_scheduler.StepLR)."""
    return reference_lr * float(config.gamma) ** (step // config.step_size)


def _multistep(config: MultiStep, step: int, reference_lr: float) -> float:
    """lr·gamma^(number of milestones <= t) (docs: torch.optim.lr_scheduler.MultiStepLR)."""
    return reference_lr * float(config.gamma) ** bisect_right(config.milestones, step)


def _exponential(config: Exponential, step: int, reference_lr: float) -> float:
    """lr·gamma^t (docs: torch.optim.lr_scheduler.ExponentialLR)."""
    return reference_lr * float(config.gamma) ** step


def _polynomial(config: Polynomial, step: int, reference_lr: float) -> float:
    """lr_end + (lr - lr_end)·(1 - t/T)^power (docs: transformers.get_polynomial_decay_schedule_with_warmup)."""
    left = 1.0 - min(step, config.total_iters) / config.total_iters
    return config.lr_end + (reference_lr - config.lr_end) * math.pow(left, config.power)


def _one_cycle_at(config: OneCycle, step: int, low: float, peak: float, last: float) -> float:
    """The value at `step` of a quantity that goes low -> peak -> (low ->) last.

    Smith & Topin 2018, "Super-Convergence"; phase ends as in torch.optim.lr_scheduler.OneCycleLR.
    """
    total, rise = config.total_steps, config.pct_start * config.total_steps
    ends, values = [rise - 1, total - 1.0], [low, peak, last]
    if config.three_phase:
        ends, values = [rise - 1, 2 * rise - 2, total - 1.0], [low, peak, low, last]
    step, begin, phase = min(step, total - 1), 0.0, 0
    while step > ends[phase] and phase < len(ends) - 1:
        begin, phase = ends[phase], phase + 1
    part = (step - begin) / (ends[phase] - begin) if ends[phase] != begin else 1.0
    start, end = values[phase], values[phase + 1]
    if config.anneal_strategy == "linear":
        return (end - start) * part + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1.0)


def _one_cycle(config: OneCycle, step: int, reference_lr: float) -> float:
    """max_lr/div_factor -> max_lr -> max_lr/div_factor/final_div_factor (see `_one_cycle_at`)."""
    peak = reference_lr if config.max_lr is None else config.max_lr
    low = peak / config.div_factor
    return _one_cycle_at(config, step, low, peak, low / config.final_div_factor)


def _one_cycle_momentum(config: OneCycle, step: int) -> float | None:
    """max_momentum -> base_momentum -> max_momentum, or None with cycle_momentum off."""
    if not config.cycle_momentum:
        return None
    return _one_cycle_at(config, step, config.max_momentum, config.base_momentum, config.max_momentum)


def _cosine_restarts(config: CosineRestarts, step: int, reference_lr: float) -> float:
    """eta_min + (lr - eta_min)·(1 + cos(pi·T_cur/T_i))/2 (Loshchilov & Hutter 2017, SGDR, eq. 5)."""
    period = config.T_0
    if config.T_mult == 1:
        step %= period
    while step >= period:  # periods grow at least twofold: at most 64 rounds for any 64-bit step
        step, period = step - period, period * config.T_mult
    return config.eta_min + (reference_lr - config.eta_min) * (1.0 + math.cos(math.pi * step / period)) / 2


def _inverse_sqrt(config: InverseSqrt, step: int, reference_lr: float) -> float:
    """lr / sqrt((t + timescale)/timescale) (Zhai et al. 2022, "Scaling Vision Transformers"; transformers docs)."""
    timescale = config.timescale or 10_000
    return reference_lr * (1.0 / math.sqrt((step + timescale) / timescale))


def _wsd(config: WarmupStableDecay, step: int, reference_lr: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, "MiniCPM"; shapes as in transformers.get_wsd_schedule)."""
    warmup, decay, floor = config.warmup_steps, config.num_decay_steps, config.min_lr_ratio
    after = step - warmup - (config.num_stable_steps or 0)
    if step < warmup:
        part, shape, cycles = 1.0 - step / warmup, config.warmup_type, 0.5
    elif after < 0:
        return reference_lr
    elif after < decay:
        part, shape, cycles = after / decay, config.decay_type, config.num_cycles
    else:
        return reference_lr * floor
    if shape == "linear":
        factor = 1.0 - part
    elif shape == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * part))
    else:  # a warm-up runs 1 - sqrt(1 - p) upwards, a decay 1 - sqrt(p) downwards: the same curve
        factor = 1.0 - math.sqrt(part)
    return reference_lr * max(0.0, factor * (1.0 - floor) + floor)


# ---- the table -----------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """One kind of schedule: name, frozen dataclass of parameters, and its closed forms."""

    name: str
    config: type[Any]
    lr: Callable[[Any, int, float], float]
    momentum: Callable[[Any, int], float | None] | None = None


SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("constant", Constant, _warmed(_constant)),
        Schedule("linear", Linear, _warmed(_linear)),
        Schedule("cosine", Cosine, _warmed(_cosine)),
        Schedule("step", Step, _warmed(_step)),
        Schedule("multistep", MultiStep, _warmed(_multistep)),
        Schedule("exponential", Exponential, _warmed(_exponential)),
        Schedule("polynomial", Polynomial, _warmed(_polynomial)),
        Schedule("one_cycle", OneCycle, _one_cycle, _one_cycle_momentum),
        Schedule("cosine_restarts", CosineRestarts, _warmed(_cosine_restarts)),
        Schedule("inverse_sqrt", InverseSqrt, _warmed(_inverse_sqrt)),
        Schedule("wsd", WarmupStableDecay, _wsd),
    )
}


class Base(NamedTuple):
    """A schedule with its parameters: what a run declares as its base."""

    name: str
    config: Any

    def lr(self, step: int, reference_lr: float) -> float:
        """The LR at optimizer step `step` of a group whose reference LR is `reference_lr`."""
        try:
            value = SCHEDULES[self.name].lr(self.config, step, reference_lr)
        except OverflowError:  # gamma > 1 for very long
            return LARGEST_LR if reference_lr > 0 else 0.0
        if value > LARGEST_LR:
            return LARGEST_LR
        return value if value >= 0 else 0.0  # extreme parameters may overflow on the way, to NaN even

    def momentum(self, step: int) -> float | None:
        """The momentum at optimizer step `step`, or None where the schedule leaves momentum alone."""
        formula = SCHEDULES[self.name].momentum
        return None if formula is None else formula(self.config, step)

    def spec(self) -> dict[str, Any]:
        """The specification with every default filled in, as plain JSON values; `build` reads it back."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.config).items()}
        return {"type": self.name, **values}


def build(spec: Mapping[str, Any]) -> Base:
    """The base schedule of `{"type": name, **parameters}`.

    Raises ValueError naming the key, the value and what is allowed.
    """
    name = spec.get("type")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"type: there is no base schedule {name!r}{nearest(name, SCHEDULES)}")
    config, given = SCHEDULES[name].config, {key: value for key, value in spec.items() if key != "type"}
    known, hints = {entry.name: entry for entry in fields(config)}, get_type_hints(config)
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{key}: {name} has no such parameter{nearest(key, known)}")
        if isinstance(value, list):
            given[key] = tuple(value)
        elif type(value) is int and float in (hints[key], *get_args(hints[key])) and _fits(value, float):
            given[key] = float(value)  # one spelling of a number, so that equal specifications are equal texts
    missing = [key for key, entry in known.items() if entry.default is MISSING and key not in given]
    if missing:
        raise ValueError(f"{missing[0]}: {name} needs it; {known[missing[0]].metadata['description']}")
    return Base(name, config(**given))
