"""The values that flow through the core: all immutable, all plain Python numbers and strings.

Rule of this module: data only. What the values mean together is said in `run.py`.
Units: a step is an optimizer step counted from 0; learning rates, momenta and losses are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: The signals that have a field of their own in `Observation`; any other name rides in `others`.
KNOWN_SIGNALS = ("loss", "reward", "grad_norm", "update_norm", "val_loss")
#: What a policy `reads` to get `Observation.applied`, `.rollbacks` and `.answers`; no user's signal has such a name.
APPLIED = "=applied"
ROLLBACKS = "=rollbacks"
ANSWERS = "=answers"


class Group(NamedTuple):
    """A parameter group as the client declared it: its name and the settings it had at attach.

    `momentum` is None where the optimizer has no such setting and 0 where it is switched off; `betas` is None outside
    the Adam family. These values are the reference that factors multiply. `lr_free`: the optimizer finds its own step
    size, and `lr` multiplies that.
    """

    name: str
    lr: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    lr_free: bool = False


class Answered(NamedTuple):
    """What became of what a policy asked of the job: kind, args and tag (that of the args, or "") are those of the ask.

    outcome: "done" or "declined" by the job, with its note; "declined" where people took it back; "returned" where the
    run has gone back to an earlier step after it.
    """

    kind: str
    tag: str
    outcome: str
    note: str
    args: Mapping[str, Any]


class Observation(NamedTuple):
    """The signals of one optimizer step. None means "not measured"; NaN means "measured, and NaN".

    applied: the step whose decision was in force at this one, as the client's receipts say; None: not known. It is
    filled in only for policies that read `APPLIED`.
    rollbacks: how often the run has gone back to an earlier step so far after this policy asked for it, which the
    policy's own state, gone back with it, cannot tell; a job that was only killed and resumed counts for nothing. It is
    filled in only for policies that read `ROLLBACKS`.
    answers: what became of what this policy asked, the newest of each kind and tag; it outlasts going back, too, and is
    filled in only for policies that read `ANSWERS`.
    """

    step: int
    loss: float | None = None
    reward: float | None = None
    grad_norm: float | None = None
    update_norm: float | None = None
    val_loss: float | None = None
    others: Mapping[str, float] | None = None
    applied: int | None = None
    rollbacks: int = 0
    answers: tuple[Answered, ...] = ()

    def signal(self, name: str) -> float | None:
        """The value of the signal `name`, or None where it was not measured."""
        if name in KNOWN_SIGNALS:
            value: float | None = getattr(self, name)
            return value
        return None if self.others is None else self.others.get(name)


class Ask(NamedTuple):
    """What a policy asks of the training job besides settings: kind is that of a directive (checkpoint, restore,
    evaluate, stop), args its arguments, reason a sentence for people. The job may decline."""

    kind: str
    args: Mapping[str, Any]
    reason: str


class Decision(NamedTuple):
    """What a policy wants from the next optimizer step on.

    lr: one learning rate per group, in the groups' order. A policy that did not move returns the very
        same tuple object as before; the fold uses identity to skip work.
    momentum: one value per group (its own where the policy leaves it alone, None for a group that has neither
        momentum nor betas), or None: momentum untouched.
    noise_std: standard deviation of Gaussian gradient noise, per group, or None: no noise.
    phase, code: the machine strings of the policy's specification.
    fields: the numbers the decision rests on (finite numbers, strings, None), or None.
    milestone: whether the journal shall keep it with its numbers in any case: a rare move, or an end of something. Of
        other decisions that move it keeps the first of a streak.
    asks: directives for the training job, each asked for once, with this very decision.
    """

    lr: tuple[float, ...]
    momentum: tuple[float | None, ...] | None
    noise_std: tuple[float, ...] | None
    phase: str
    code: str
    fields: Mapping[str, Any] | None = None
    milestone: bool = False
    asks: tuple[Ask, ...] = ()


class Settings(NamedTuple):
    """The settings of every group at one step, after base schedule and guard: what leaves the service."""

    lr: tuple[float, ...]
    momentum: tuple[float | None, ...] | None = None
    noise_std: tuple[float, ...] | None = None


class Policy(NamedTuple):
    """A policy: a name, a version that never changes its rule, and two pure functions.

    config: a frozen dataclass; its fields are the parameters, its `__post_init__` the range checks
        (ValueError with the field, the value and the remedy).
    init(config, groups, seed) -> (state, decision for step 0).
    step(config, state, seen) -> (state, decision for the step after `seen.step`).
    explain(config, decision) -> one sentence for people, built from the decision's code and fields.
    reads(config) -> the user-named signals it looks at (`Observation.others` holds only these in a run), and
        `APPLIED`, `ROLLBACKS` and `ANSWERS` where it needs to know these.
    codes: every decision code it can give (a code may join several with "+"), with its sentence's template.
    parts: where in the parameters other policies stand, as dotted paths ("stages.*.policy"); there the config holds a
        `Part` each.
    finish(config, state) -> what there is to say when a run ends, as a decision for the record, or None. It changes
        nothing: a run that is resumed goes on from the same state.
    """

    name: str
    version: int
    config: type[Any]
    state: type[Any]
    init: Callable[[Any, tuple[Group, ...], int], tuple[Any, Decision]]
    step: Callable[[Any, Any, Observation], tuple[Any, Decision]]
    explain: Callable[[Any, Decision], str]
    reads: Callable[[Any], frozenset[str]] = lambda _: frozenset()
    codes: Mapping[str, str] = {}
    finish: Callable[[Any, Any], Decision | None] | None = None
    parts: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """The policy's name with its version, as the journal records it: `windowed@1`."""
        return f"{self.name}@{self.version}"


class Part(NamedTuple):
    """A policy with its parameters inside another policy's."""

    policy: Policy
    config: Any

    def step(self, state: Any, seen: Observation) -> tuple[Any, Decision]:
        """`Policy.step`; the state may have come through JSON as a plain tuple."""
        kind = self.policy.state
        return self.policy.step(self.config, state if type(state) is kind else tuple.__new__(kind, state), seen)

    def explain(self, decision: Decision) -> str:
        """`Policy.explain`."""
        return self.policy.explain(self.config, decision)

    def finish(self, state: Any) -> Decision | None:
        """`Policy.finish`, or None where it has none."""
        finish = self.policy.finish
        return None if finish is None else finish(self.config, self.policy.state(*state))

    def reads(self) -> frozenset[str]:
        """`Policy.reads`."""
        return self.policy.reads(self.config)
