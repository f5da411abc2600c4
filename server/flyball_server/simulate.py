"""Run a policy over a recorded trace: what would it have done?

Rule of this module: it folds exactly as the service does, one observation at a time, without clock, network
or storage; the same specification, groups, trace and seed give the same output, bit for bit.

A trace is JSON lines, one observation each: `{"step": 0, "loss": 2.3, "reward": null, ...}`. Any other numeric
key is a signal of that name. NaN, Infinity, -Infinity and null are accepted. Blank lines are skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flyball_server.core import guard
from flyball_server.core.errors import Invalid
from flyball_server.core.guard import Limits
from flyball_server.core.numbers import finite
from flyball_server.core.rng import noise_seed
from flyball_server.core.run import Rules, settle
from flyball_server.core.types import KNOWN_SIGNALS, Decision, Group, Observation, Settings
from flyball_server.limits import INTEGER_MAX
from flyball_server.policy_files import Resolved, load_data, resolve

#: The LR of the single group `default` where nobody names one: the published default of the policy, else this.
DEFAULT_LR = 1e-3
DEFAULT_LRS = {"cycle": 1e-4, "windowed": 5e-5}
#: Most groups a simulation takes.
MAX_GROUPS = 1024


def simulate(
    policy_spec: Mapping[str, Any],
    trace: str | Path | Iterable[str],
    groups: Sequence[Mapping[str, Any] | Group] | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """One answer per observation of `trace` (a file's path, or its lines).

    An answer holds step, settings (per group; in force from the next step on), phase, decision, reason, fields.
    groups: as `read_groups` gives them; None: one group `default` at `default_lr`. A repeated step gets the stored
    answer again. Raises Invalid, at once for the specification and the groups, later for a line.
    """
    resolved = resolve(policy_spec)
    if groups is None:
        declared: tuple[Group, ...] = (Group("default", default_lr(resolved)),)
    else:
        declared = tuple(one if isinstance(one, Group) else _group(one, str(i)) for i, one in enumerate(groups))
    _check_groups(declared)
    own = getattr(resolved.config, "seed", None)
    rules = Rules(*resolved, Limits(), declared, seed if own is None else own)
    try:
        state, _ = rules.policy.init(rules.config, declared, seed)
    except ValueError as error:
        raise Invalid(str(error)) from error
    return _answers(rules, state, read_trace(trace))


def _answers(rules: Rules, state: Any, trace: Iterable[tuple[int, Observation]]) -> Iterator[dict[str, Any]]:
    policy, config = rules.policy, rules.config
    held = guard.begin(rules.groups, on_base=rules.base is not None)
    newest, answer = -1, None
    for number, seen in trace:
        if seen.step < newest:
            raise Invalid(f"stale_step: line {number}: step {seen.step} comes after step {newest}; steps only grow")
        if answer is None or seen.step > newest:
            state, decision = policy.step(config, state, seen)
            # Through the fold's own way, so that a live run on these signals gives the same bits.
            held, now = settle(rules, held, seen.step, decision)
            newest = seen.step
            answer = {
                "step": newest,
                "settings": _rows(rules.groups, now),
                "phase": decision.phase,
                "decision": decision.code,
                "reason": policy.explain(config, decision),
                "fields": finite(decision.fields or {}),
                **_overall(rules, decision, now, newest + 1),
            }
        yield answer


def _overall(rules: Rules, decision: Decision, now: Settings, step: int) -> dict[str, Any]:
    """What multiplier mode and gradient noise go by at `step`: the reference group's factor, and the noise's seed."""
    # The first group that is not frozen.
    reference = next((i for i, group in enumerate(rules.groups) if group.lr > 0), None)
    factor = 1.0 if reference is None else now.lr[reference] / rules.groups[reference].lr
    if rules.base is None and decision.fields and "lr_multiplier" in decision.fields:
        factor = decision.fields["lr_multiplier"]  # the policy's own, without a rounding there and back
    noisy = now.noise_std is not None and any(now.noise_std)
    return {
        "lr_multiplier": factor,
        "noise_std": max(now.noise_std) if now.noise_std else 0.0,
        "noise_seed": noise_seed(rules.seed, step) if noisy else None,
    }


def _rows(groups: tuple[Group, ...], now: Settings) -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "lr": now.lr[i],
            "momentum": group.momentum if now.momentum is None else now.momentum[i],
            "noise_std": 0.0 if now.noise_std is None else now.noise_std[i],
        }
        for i, group in enumerate(groups)
    ]


def default_lr(resolved: Resolved) -> float:
    """The policy's own initial LR: its parameter `initial_lr` or `base_lr`, its published default, or 1e-3."""
    for name in ("initial_lr", "base_lr"):
        given = getattr(resolved.config, name, None)
        if given is not None:
            return float(given)
    return DEFAULT_LRS.get(resolved.policy.name, DEFAULT_LR)


def read_groups(path: str | Path) -> tuple[Group, ...]:
    """The groups in a JSON, YAML or TOML file: a list of {name, lr, momentum?, betas?}, or that under `groups`."""
    data = load_data(path)
    rows = data.get("groups") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise Invalid(f"{path}: give a list of groups, each with name and lr, or a mapping with that list as 'groups'")
    groups = tuple(_group(row, str(i)) for i, row in enumerate(rows))
    _check_groups(groups)
    return groups


def _check_groups(groups: tuple[Group, ...]) -> None:
    names = [group.name for group in groups]
    if not 0 < len(names) <= MAX_GROUPS:
        raise Invalid(f"groups: {len(names)} groups; give 1 to {MAX_GROUPS}")
    for name in names:
        if names.count(name) > 1:
            raise Invalid(f"groups: the name {name!r} is given twice; names must differ")


def _group(row: Any, index: str) -> Group:
    where = f"groups.{index}"
    if not isinstance(row, Mapping):
        raise Invalid(f"{where}: {row!r} is not allowed; give a mapping with name and lr")
    if extra := sorted(set(row) - {"name", "lr", "momentum", "betas"}):
        raise Invalid(f"{where}.{extra[0]}: not known; a group has name, lr, momentum and betas")
    name, betas = row.get("name"), row.get("betas")
    if not isinstance(name, str) or not name:
        raise Invalid(f"{where}.name: {name!r} is not allowed; give a string")
    lr = _number(row.get("lr"), f"{where}.lr", math.inf)
    momentum = None if row.get("momentum") is None else _number(row["momentum"], f"{where}.momentum", 1.0)
    if betas is not None:
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise Invalid(f"{where}.betas: {betas!r} is not allowed; give two numbers")
        betas = (_number(betas[0], f"{where}.betas.0", 1.0), _number(betas[1], f"{where}.betas.1", 1.0))
    return Group(name, lr, momentum or None, betas)


def _number(value: Any, where: str, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        limit = "a finite number, 0 or more" if below == math.inf else f"a number from 0 to below {below:g}"
        raise Invalid(f"{where}: {value!r} is not allowed; give {limit}")
    return float(value)


def read_trace(trace: str | Path | Iterable[str]) -> Iterator[tuple[int, Observation]]:
    """(line number, observation) for every line that is not blank. Raises Invalid with the line number."""
    if isinstance(trace, str | Path):
        try:
            with open(trace, encoding="utf-8") as lines:
                yield from read_trace(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"{trace}: cannot be read ({error})") from error
        return
    for number, line in enumerate(trace, 1):
        if line.strip():
            yield number, _observation(line, number)


def _observation(line: str, number: int) -> Observation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"line {number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise Invalid(f"line {number}: {row!r} is not allowed; give an object with a key 'step'")
    step = row.pop("step", None)
    if type(step) is not int or not 0 <= step <= INTEGER_MAX:
        raise Invalid(f"line {number}: step: {step!r} is not allowed; give an integer from 0 to {INTEGER_MAX}")
    signals: dict[str, float | None] = {}
    for name, value in row.items():
        if value in ("NaN", "Infinity", "-Infinity"):  # as the wire and `flyball series --json` write them
            value = float(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Invalid(f"line {number}: {name}: {value!r} is not allowed; give a number, null, NaN or Infinity")
        signals[name] = value if value is None else _float(value)
    known = [signals.pop(name, None) for name in KNOWN_SIGNALS]
    loss, reward, grad_norm, update_norm, val_loss = known
    others = {name: value for name, value in signals.items() if value is not None}
    return Observation(step, loss, reward, grad_norm, update_norm, val_loss, others or None)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64: as unusable as the infinity it rounds to
        return math.inf if value > 0 else -math.inf
