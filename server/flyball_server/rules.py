"""What a run's specification means: its policy, base schedule, guard and shadows, ready to fold with.

Rule of this module: a recorded specification means the same for ever; what it names is looked up, nothing is added.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from flyball_server.checks import check_spec
from flyball_server.core.base import build
from flyball_server.core.events import Spec
from flyball_server.core.run import Rules, Run
from flyball_server.guards import limits_of, relative
from flyball_server.policy_files import resolve

#: What of a specification a command may change.
PLAN = ("policy", "base", "guard", "profile")


def plan_of(spec: Spec) -> dict[str, Any]:
    """What of a specification a command may change, as it stands."""
    return {name: getattr(spec, name) for name in PLAN}


def spec_under(spec: Spec, run: Run) -> Spec:
    """The specification with what commands have made of it."""
    plans = run.steering.plans
    return spec._replace(**json.loads(plans[-1][1])) if plans and plans[-1][1] else spec


def rules_of(spec: Spec) -> Rules:
    """What a specification means. Raises Invalid where it names something that does not exist."""
    fixed = _fixed(spec)

    @lru_cache(8)
    def under(plan: str) -> Rules:
        if not plan:
            return fixed._replace(under=under)
        # The shadows are what they were: they stand on the specification, whatever was commanded since.
        found = _fixed(spec._replace(**json.loads(plan), shadows={}))
        return found._replace(shadows=fixed.shadows, under=under)

    return fixed._replace(under=under)


def _fixed(spec: Spec) -> Rules:
    check_spec(spec)
    policy, config, _ = resolve(spec.policy)
    base = None if spec.base is None else build(spec.base)
    limits = limits_of(spec.guard)
    if spec.mode == "multiplier":
        limits = relative(limits)
    rules = Rules(policy, config, base, limits, spec.groups, spec.seed)
    return rules._replace(
        shadows=tuple(_fixed(spec._replace(**beside, shadows={})) for beside in spec.shadows.values())
    )
