"""What each job of a world is: its policy, its limits, its losses, and when it will crash. All of it from the seed.

Rule of this module: a plan says nothing about faults of the network, the disk or the service, so that a world with
them and one without have the same jobs.
"""

from math import exp, inf, nan
from random import Random
from typing import Any, NamedTuple

from tests.core.specs import INNER, SPECS

#: Decides at nearly every step, so that a decision in the wrong place shows.
RESTLESS = {"type": "plateau", "patience": 0, "factor": 0.97, "threshold": 0.0}
POLICIES = [*SPECS.values()]
GROUPS = (("body", 0.1, 0.9, None), ("head", 0.01, None, (0.9, 0.999)), ("frozen", 0.0, None, None))
GUARDS: list[dict[str, Any]] = [
    {"max_lr": 0.05},
    {"min_lr": 0.001, "max_lr": 0.2},
    {"max_factor": 1.5, "min_factor": 0.5},
    {"max_change": 1.1, "cooldown_steps": 3},
    {"max_change_per_window": 1.2, "window_steps": 10, "groups": {"body": {"max_lr": 0.08}}},
    {"warmup_steps": 12, "max_lr": 0.09},
]
BASES = [{"type": "cosine", "T_max": 90, "warmup_steps": 8}, {"type": "one_cycle", "total_steps": 200, "max_lr": 0.3}]


class Incident(NamedTuple):
    """Before the job's step `at`, when it first comes there: go back `back` checkpoints.

    how: "crash"; "linger" (the old process lives on); "rewind" (in the same process); "astray" (likewise, to
    a checkpoint of a future that did not happen); "newest" (a crash, and the job
    goes on behind the run's newest step, whatever its model's checkpoint says).
    """

    at: int
    how: str
    back: int


class Plan(NamedTuple):
    """One job. exact: it waits for every decision, so that a run of it can be repeated to the last bit."""

    name: str
    policy: dict[str, Any]
    base: dict[str, Any] | None
    guard: dict[str, Any]
    groups: tuple[Any, ...]
    lag: int | None
    wait_s: float | None
    on_outage: str
    start_wait_s: float
    steps: int
    step_s: float
    every: int
    ranks: int
    seed: int
    noise: tuple[float, ...]
    coupling: float
    wild: bool
    incidents: tuple[Incident, ...]

    @property
    def exact(self) -> bool:
        # Of a policy that asks its job for something the answer counts, whose step is another where a fault delays it.
        return self.lag is not None and self.wait_s is None and self.policy["type"] != "range_test"

    def signals(self, step, lr, line=0):
        """What the job measures at its own step `step`, made with `lr`; unless it is exact, anew each time."""
        noise = self.noise[step]
        if self.wild and noise > 0.97:
            return None, None, None, None
        if self.wild and noise > 0.9:
            return (nan if noise > 0.94 else inf if noise > 0.92 else 1e300), None, 2.0, None
        loss = 3.0 * exp(-step / 40) + 0.5 * noise + self.coupling * lr + (0.0 if self.exact else (step * line) % 7 / 5)
        reward = noise - 0.5 if step % 3 == 0 else None
        return loss, reward, 1.0 + noise, {"tokens": float(step)} if step % 5 == 0 else None


def plans(seed):
    """The jobs of a world."""
    chance = Random(f"plans {seed}")
    return [_plan(chance, f"job{i}") for i in range(chance.choice([1, 2, 2]))]


def _plan(chance, name):
    lag = chance.choice([None, None, 0, 0, 1, 3])
    base = chance.choice(BASES) if chance.random() < 0.3 else None
    steps = chance.randint(25, 45) if lag == 0 else chance.randint(35, 75)
    policy = chance.choice([RESTLESS, INNER, chance.choice(POLICIES), chance.choice(POLICIES)])
    return Plan(
        name=name,
        policy=policy,
        base=base,
        guard=chance.choice(GUARDS) if chance.random() < 0.6 else {},
        groups=GROUPS[: chance.choice([2, 2, 3])],
        lag=lag,
        wait_s=chance.choice([None, None, 0.05]),
        on_outage="base" if base is not None and chance.random() < 0.7 else "hold",
        start_wait_s=chance.choice([0.0, 0.1]),
        steps=steps,
        step_s=chance.choice([0.002, 0.01, 0.03]),
        every=chance.choice([5, 10, 20]),
        ranks=chance.choice([1, 1, 2, 4]),
        seed=chance.randint(0, 1000),
        noise=tuple(chance.random() for _ in range(steps)),
        coupling=chance.choice([0.0, 5.0]),
        wild=chance.random() < 0.3,
        incidents=_incidents(chance, steps, exact=lag is not None),
    )


def _incidents(chance, steps, exact):
    kinds = ["crash", "crash", "linger", "rewind"] + ([] if exact else ["newest", "astray", "astray"])
    at, out = 0, []
    for _ in range(chance.choice([0, 0, 1, 1, 2, 3] if exact else [0, 1, 2, 3])):
        # Often soon after another one: from a checkpoint whose last steps never arrived, or one resumed from before.
        at = min(steps - 1, at + chance.choice([0, 1, 3, chance.randint(5, 40)]))
        out.append(Incident(at, chance.choice(kinds), chance.choice([0, 0, 1, 2] if exact else [0, 1, 2])))
    return tuple(out)
