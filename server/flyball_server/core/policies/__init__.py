"""The table of policies.

Rule of this package: one file per policy and one line here. A released rule never changes: a change is a new
version in a new file, and the old one stays in `ALL` as long as journals may name it.
"""

from __future__ import annotations

from flyball_server.core.policies import (
    adaptive,
    aees,
    constant,
    cycle,
    gradient_aware,
    greedy,
    per_group,
    plateau,
    range_test,
    rules,
    sequence,
    spike_guard,
    warmup,
    windowed,
)
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Policy

#: Every version of every policy, by tag (`windowed@1`).
ALL: dict[str, Policy] = {
    policy.tag: policy
    for policy in (
        adaptive.POLICY,
        aees.POLICY,
        constant.POLICY,
        cycle.POLICY,
        gradient_aware.POLICY,
        greedy.POLICY,
        per_group.POLICY,
        plateau.POLICY,
        range_test.POLICY,
        rules.POLICY,
        sequence.POLICY,
        spike_guard.POLICY,
        warmup.POLICY,
        windowed.POLICY,
    )
}

#: The newest version of every policy, by name.
POLICIES: dict[str, Policy] = {policy.name: policy for policy in sorted(ALL.values(), key=lambda one: one.version)}

__all__ = ["ALL", "POLICIES", "dump_state", "load_state"]
