"""The state of a policy as JSON, there and back.

Rule of this module: `load_state(policy, dump_state(state)) == state`, bit for bit, through any JSON
writer that keeps float64 (Python's does), so a run can be saved at any step and continued elsewhere.
"""

from __future__ import annotations

from typing import Any

from flyball_server.core.types import Policy


def dump_state(state: Any) -> list[Any]:
    """The fields of `state` as a list of numbers, strings, None and lists."""
    return [_lists(value) for value in state]


def load_state(policy: Policy, data: list[Any]) -> Any:
    """The state of `policy` from what `dump_state` gave; `data` is not altered.

    Raises ValueError if `data` does not have the state's fields.
    """
    names = policy.state._fields
    if len(data) != len(names):
        raise ValueError(f"state of {policy.tag}: {len(data)} values, but it has {len(names)} ({', '.join(names)})")
    return policy.state(*[_tuples(value) for value in data])


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple([_tuples(one) for one in value]) if isinstance(value, list) else value
