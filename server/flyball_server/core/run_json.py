"""A run as plain JSON values, there and back: what snapshots and rewinds carry.

Rule of this module: `load(rules, dump(run)) == run`, bit for bit, after any trip through JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyball_server.core import commands, guard, steering
from flyball_server.core.folded import Rules, Run, under
from flyball_server.core.numbers import finite
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Decision, Settings


def dump(run: Run) -> dict[str, Any]:
    """The run as plain JSON values: what snapshots and rewinds carry. `load` gives back an equal run."""
    data = run._asdict()
    data["attempts"] = [list(attempt) for attempt in run.attempts]
    data["policy_state"] = dump_state(run.policy_state)
    data["decision"] = finite(run.decision[:7])
    data["guard_state"] = list(run.guard_state)
    data["settings"] = list(run.settings)
    data["in_force"] = [list(pair) for pair in run.in_force]
    # JSON has no NaN; the newest signals and what was read back from an optimizer may well be one.
    data["applied"] = None if run.applied is None else [_texts(row) for row in run.applied]
    data["last"] = {name: repr(value) for name, value in run.last.items()}
    data["side"] = {name: repr(value) for name, value in run.side.items()}
    if data.pop("shadows"):  # a run without any is dumped as it was before there were shadows
        data["shadows"] = [dump(shadow) for shadow in run.shadows]
    if data.pop("steering") != commands.NONE:
        data["steering"] = steering.dump(run.steering)
    return data


def load(rules: Rules, data: Mapping[str, Any]) -> Run:
    """The run that `dump` wrote, after any trip through JSON."""
    lr, momentum, noise_std, phase, code, fields, milestone, *_ = data["decision"]
    beside = steering.load(data.get("steering"))
    rules = under(rules, beside.plans[-1][1] if beside.plans else "")
    factors, changed, window, window_factors, note = data["guard_state"]
    return Run(
        **{
            **data,
            "answered": tuple(data["answered"]),
            "in_force": tuple((step, decided) for step, decided in data["in_force"]),
            "attempts": tuple((from_step, seq, parent) for from_step, seq, parent in data["attempts"]),
            "policy_state": load_state(rules.policy, data["policy_state"]),
            "decision": Decision(tuple(lr), _tuple(momentum), _tuple(noise_std), phase, code, fields, milestone),
            "guard_state": guard.GuardState(tuple(factors), changed, window, tuple(window_factors), note),
            "settings": _settings_of(data["settings"]),
            "applied": None if data["applied"] is None else _numbers_of(data["applied"]),
            "last": {name: float(value) for name, value in data["last"].items()},
            "side": {name: float(value) for name, value in data["side"].items()},
            "shadows": tuple(load(r, d) for r, d in zip(rules.shadows, data.get("shadows", ()), strict=True)),
            "steering": beside,
        }
    )


def _settings_of(data: Sequence[Any]) -> Settings:
    lr, momentum, noise_std = data
    return Settings(tuple(lr), _tuple(momentum), _tuple(noise_std))


def _texts(row: Sequence[float | None] | None) -> list[str | None] | None:
    return None if row is None else [None if value is None else repr(value) for value in row]


def _numbers(row: Sequence[str | None] | None) -> tuple[Any, ...] | None:
    return None if row is None else tuple(None if value is None else float(value) for value in row)


def _numbers_of(data: Sequence[Any]) -> Settings:
    lr, momentum, noise_std = map(_numbers, data)
    return Settings(lr or (), momentum, noise_std)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
