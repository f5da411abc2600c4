"""What a run's specification means: its policy, base schedule, guard and shadows, ready to fold with.

Rule of this module: a recorded specification means the same for ever; what it names is looked up, nothing is added.
"""

from __future__ import annotations

from flyball_server.checks import check_spec
from flyball_server.core.base import build
from flyball_server.core.events import Spec
from flyball_server.core.run import Rules
from flyball_server.guards import limits_of, relative
from flyball_server.policy_files import resolve


def rules_of(spec: Spec) -> Rules:
    """What a specification means. Raises Invalid where it names something that does not exist."""
    check_spec(spec)
    policy, config, _ = resolve(spec.policy)
    base = None if spec.base is None else build(spec.base)
    limits = limits_of(spec.guard)
    if spec.mode == "multiplier":
        limits = relative(limits)
    rules = Rules(policy, config, base, limits, spec.groups, spec.seed)
    return rules._replace(
        shadows=tuple(rules_of(spec._replace(**beside, shadows={})) for beside in spec.shadows.values())
    )
