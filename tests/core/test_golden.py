"""Goal: no policy of the table ever decides anything else on a trace than it did when its traces were recorded.

Method: every policy and version, in many configurations, on all kinds of `examples/traces.py`, for two groups; the
settings at some 40 steps and every code and phase are compared with `tests/traces/NAME@V/own.json`. The command

    pytest tests/core/test_golden.py --rewrite-traces [-k NAME]

records what is new and prints every value that moved. It is for versions that no release holds; whether the rule is
right is for other tests to say.
"""

import json
import math
from collections import Counter
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import pytest
from examples import traces
from examples.traces import KINDS, lines, trace
from tests.core.specs import MORE, SPECS

from flyball_server.core import guard
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.core.run import Rules, settle
from flyball_server.core.types import KNOWN_SIGNALS, Group, Observation
from flyball_server.policy_files import resolve
from flyball_server.presets import PRESETS
from flyball_server.simulate import simulate

TRACES = Path(__file__).resolve().parent.parent / "traces"
GROUPS = (Group("body", 1e-3, 0.9), Group("head", 1e-2, None, (0.9, 0.999)))
SEED = 7
#: Settings are recorded at so many steps beside the last one.
SAMPLES = 40
#: Codes and phases are kept as runs where there are at most so many, otherwise counted, with a hash of all.
RUNS = 60
SETTINGS = ("lr", "momentum", "noise_std")
ABOUT = "Decisions on the traces of examples/traces.py, recorded by tests/core/test_golden.py: never edit."


# What there is to record


def pinned(spec):
    """The specification with the version of every policy in it, and without presets, whose values may change."""
    if isinstance(spec, str):
        spec = {"type": spec}
    if isinstance(spec, list):
        return [pinned(one) for one in spec]
    if not isinstance(spec, dict):
        return spec
    kind = spec.get("type")
    if kind in PRESETS:
        return pinned({**PRESETS[kind].spec, **{key: value for key, value in spec.items() if key != "type"}})
    if kind in POLICIES:
        spec = {**spec, "type": POLICIES[kind].tag}
    deep = {"policy": pinned, "stages": pinned, "groups": lambda groups: {k: pinned(v) for k, v in groups.items()}}
    return {key: deep.get(key, lambda value: value)(value) for key, value in spec.items()}


def configurations(tag):
    """{name: specification} of what the policy is recorded with; nothing new is recorded of an older version."""
    named = {name: spec for name, spec in {**SPECS, **MORE}.items() if not name.startswith("preset ")}
    return {name: pinned(spec) for name, spec in named.items() if pinned(spec)["type"] == tag}


def kinds_of(name):
    return [kind for kind in KINDS if kind != "long" or name in POLICIES]


@cache
def observations(kind):
    return [Observation(step, **{name: row.get(name) for name in KNOWN_SIGNALS}) for step, row in trace(kind)]


@cache
def digest(kind):
    return sha256("\n".join(lines(kind)).encode()).hexdigest()[:16]


# Recording


def decisions(spec, kind):
    """(settings, phase, code, milestone) after every observation, through the fold's own way."""
    policy, config, base = resolve(spec)
    rules = Rules(policy, config, base, guard.Limits(), GROUPS, SEED)
    state, _ = policy.init(config, GROUPS, SEED)
    held = guard.begin(GROUPS, on_base=base is not None)
    for seen, decision in zip(
        observations(kind), traces.decisions(policy, config, state, observations(kind)), strict=True
    ):
        held, now = settle(rules, held, seen.step, decision)
        yield now, decision.phase, decision.code, decision.milestone


def in_full(now):
    """The settings with what they leave open: a group's own momentum, no noise."""
    own = tuple(group.momentum for group in GROUPS)
    none = (0.0,) * len(GROUPS)
    return now.lr, own if now.momentum is None else now.momentum, none if now.noise_std is None else now.noise_std


def sampled(n):
    """The places in a trace of length n whose settings are recorded."""
    return sorted({i * (n - 1) // SAMPLES for i in range(SAMPLES + 1)})


def column(values):
    """Ten significant digits; a single value where all are the same."""
    rounded = [None if value is None else float(f"{value:.10g}") for value in values]
    return rounded[0] if len(set(rounded)) == 1 else rounded


def told(words):
    """Codes or phases, as runs [word, times] or as counts."""
    runs = [[word, len(list(same))] for word, same in groupby(words)]
    if len(runs) <= RUNS:
        return runs
    return {"counts": dict(sorted(Counter(words).items())), "sha256": sha256("\n".join(words).encode()).hexdigest()}


def recorded(spec, kind):
    """All that is kept of one policy on one trace."""
    settings, phases, codes, milestones = zip(*decisions(spec, kind), strict=True)
    rows = [in_full(settings[i]) for i in sampled(len(settings))]
    record = {"n": len(settings)}
    for place, setting in enumerate(SETTINGS):
        record[setting] = [column([row[place][group] for row in rows]) for group in range(len(GROUPS))]
    return {**record, "milestones": sum(milestones), "phases": told(phases), "codes": told(codes)}


# Comparing and writing


def moved(old, new):
    """What differs between two records, in words."""
    at = sampled(new["n"])
    found = [f"{key} {old[key]} -> {new[key]}" for key in ("n", "milestones") if old[key] != new[key]]
    if old["n"] != new["n"]:
        return found
    for setting in SETTINGS:
        for group, one, other in zip(GROUPS, old[setting], new[setting], strict=True):
            one, other = (values if isinstance(values, list) else [values] * len(at) for values in (one, other))
            pairs = [pair for pair in zip(at, one, other, strict=True) if not near(*pair[1:])]
            if pairs:
                step, before, after = pairs[0]
                found.append(f"{setting} of {group.name} at {len(pairs)} steps, first {step}: {before} -> {after}")
    words = [key for key in ("phases", "codes") if old[key] != new[key]]
    return found + [f"{key} {old[key]!s:.90} -> {new[key]!s:.90}" for key in words]


def near(one, other):
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-8)


def file_of(tag):
    return TRACES / tag / "own.json"


def load(tag):
    return json.loads(file_of(tag).read_text()) if file_of(tag).exists() else None


def made_anew(tag, old):
    """What own.json should hold, given what it holds: recorded cases stay, also those nobody asks for any more."""
    specs = {name: case["spec"] for name, case in (old or {"cases": {}})["cases"].items()} | configurations(tag)
    cases = {
        name: {"spec": spec, "kinds": {kind: recorded(spec, kind) for kind in kinds_of(name)}}
        for name, spec in specs.items()
    }
    groups = [group._asdict() for group in GROUPS]
    return {"about": ABOUT, "seed": SEED, "groups": groups, "traces": {k: digest(k) for k in KINDS}, "cases": cases}


def differences(old, new):
    """Every recorded value that moved, in words; what is only in `new` is none."""
    found = [f"the trace {kind} itself" for kind, value in old["traces"].items() if value != new["traces"].get(kind)]
    for name, case in old["cases"].items():
        now = new["cases"][name]
        if case["spec"] != now["spec"]:
            found.append(f"{name}: specification {case['spec']} -> {now['spec']} (give a changed one a new name)")
        found += [
            f"{name} on {kind}: {text}"
            for kind, record in case["kinds"].items()
            for text in (moved(record, now["kinds"][kind]) if kind in now["kinds"] else ["gone"])
        ]
    return found


def text_of(data):
    """The file's text: JSON with one line for each configuration on each trace."""
    short = {key: json.dumps(value) for key, value in data.items() if key != "cases"}
    cases = []
    for name, case in data["cases"].items():
        kinds = ",\n".join(
            f"   {json.dumps(kind)}: {json.dumps(record, separators=(',', ':'))}"
            for kind, record in case["kinds"].items()
        )
        cases.append(f'  {json.dumps(name)}: {{"spec": {json.dumps(case["spec"])}, "kinds": {{\n{kinds}}}}}')
    head = ",\n".join(f" {json.dumps(key)}: {value}" for key, value in short.items())
    return f'{{\n{head},\n "cases": {{\n' + ",\n".join(cases) + "}}\n"


def rewrite(tag, old, new):
    """Write the file, and return what there is to say about it."""
    file_of(tag).parent.mkdir(exist_ok=True)
    file_of(tag).write_text(text_of(new))
    if old is None:
        return [f"{tag}: recorded for the first time, {len(new['cases'])} configurations"]
    fresh = [name for name in new["cases"] if name not in old["cases"]]
    return [f"{tag}: {text}" for text in [*(f"new: {name}" for name in fresh), *differences(old, new)]]


@pytest.mark.parametrize("tag", ALL)
def test_a_policy_decides_what_it_decided_when_its_traces_were_recorded(tag, pytestconfig, capsys):
    old = load(tag)
    new = made_anew(tag, old)
    if pytestconfig.getoption("rewrite_traces"):
        with capsys.disabled():
            print(*["", *(rewrite(tag, old, new) or [f"{tag}: nothing moved"])], sep="\n")
        return
    assert old is not None, f"{file_of(tag)} is missing: record it with --rewrite-traces"
    missing = [
        f"{name} on {kind}"
        for name in new["cases"]
        for kind in new["cases"][name]["kinds"]
        if kind not in old["cases"].get(name, {"kinds": {}})["kinds"]
    ]
    assert not missing, f"not recorded yet, use --rewrite-traces: {missing}"
    assert new["cases"], f"{tag}: no configuration in tests/core/specs.py"
    found = differences(old, new)
    if found:
        pytest.fail("\n".join([f"{tag} does not decide what it did ({len(found)} cases):", *found[:30]]), pytrace=False)


def test_every_recorded_folder_belongs_to_a_policy():
    """A version that left the table would leave its journals without a rule."""
    assert {path.parent.name for path in TRACES.glob("*@*/own.json")} <= set(ALL)


@pytest.mark.parametrize("tag", [tag for tag, policy in ALL.items() if not policy.parts])
def test_every_code_that_was_recorded_is_one_the_policy_lists(tag):
    told = [kind["codes"] for case in load(tag)["cases"].values() for kind in case["kinds"].values()]
    codes = {code for one in told for code in (one["counts"] if isinstance(one, dict) else dict(one))}
    listed = ALL[tag].codes
    parts = {part.removesuffix("@bound") for code in codes - listed.keys() for part in code.split("+")}
    assert codes
    assert parts <= listed.keys()


def test_a_moved_value_is_found_and_rounding_is_not():
    record = recorded(pinned(SPECS["windowed, short"]), "spike")
    again = json.loads(json.dumps(record))
    assert moved(again, record) == []
    again["lr"][0] = [value * (1 + 1e-10) for value in again["lr"][0]]
    assert moved(again, record) == []
    again["lr"][0][20] *= 1 + 1e-6
    again["codes"] = [["hold", 1000]]
    first, second = moved(again, record)
    assert first.startswith(f"lr of body at 1 steps, first {sampled(1000)[20]}: ")
    assert second.startswith("codes [['hold', 1000]] -> ")


@pytest.mark.parametrize("name", ["aees, contexts", "windowed, on a schedule", "adaptive, beta1"])
def test_what_is_recorded_is_what_simulate_says(name):
    spec = {**SPECS, **MORE}[name]
    for (now, phase, code, _), answer in zip(
        decisions(spec, "sparse"), simulate(spec, lines("sparse"), GROUPS, SEED), strict=True
    ):
        assert (phase, code) == (answer["phase"], answer["decision"])
        rows = answer["settings"]
        assert in_full(now) == tuple(tuple(row[setting] for row in rows) for setting in SETTINGS)
