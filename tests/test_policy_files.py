"""Goal: a specification is either refused with the key, the value and the remedy, or resolved to the same for ever.

Method: files of every kind, wrong specifications beside the words their refusal must hold, resolving twice.
"""

import json
import sys

import pytest

from flyball_server.core.base import SCHEDULES
from flyball_server.core.errors import Invalid
from flyball_server.core.policies import ALL, POLICIES
from flyball_server.policy_files import json_schema, load_policy, resolve, resolved_spec

WINDOWED = {"type": "windowed", "window_size": 20, "lr_min": 1e-5, "base": {"type": "cosine", "T_max": 100}}
TEXTS = {
    "policy.json": '{"type": "windowed", "window_size": 20, "lr_min": 1e-5, "base": {"type": "cosine", "T_max": 100}}',
    "policy.yaml": "type: windowed\nwindow_size: 20\nlr_min: 1e-5\nbase: {type: cosine, T_max: 100}\n",
    "policy.toml": 'type = "windowed"\nwindow_size = 20\nlr_min = 1e-5\n[base]\ntype = "cosine"\nT_max = 100\n',
}
TEXTS |= {"json.policy": TEXTS["policy.json"], "yaml.policy": TEXTS["policy.yaml"]}


@pytest.mark.parametrize("name", TEXTS)
def test_a_policy_file_of_any_kind_holds_the_same_mapping(tmp_path, name):
    path = tmp_path / name
    path.write_text(TEXTS[name])
    assert load_policy(path) == WINDOWED


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", "type: cosine"),
        ("p.yaml", "a: [1"),
        ("p.toml", "a = "),
        ("p.yaml", "!!python/object/apply:os.getcwd []"),
        ("p.json", "[1]"),
        ("p", "42"),
        ("p.json", " " * (1 << 20) + "{}"),
    ],
)
def test_an_unreadable_file_is_refused_with_its_path(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(Invalid, match=str(path)):
        load_policy(path)
    with pytest.raises(Invalid, match="cannot be read"):
        load_policy(tmp_path / "absent.json")


#: What the policies that hold others cannot do without.
INNER = {
    "gradient_aware": {"policy": "steady"},
    "per_group": {"policy": "steady"},
    "sequence": {"stages": [{"policy": "steady"}]},
    "spike_guard": {"policy": "steady"},
}
SPECS = [
    *({"type": tag, **INNER.get(policy.name, {})} for tag, policy in ALL.items()),
    WINDOWED,
    {"type": "windowed", "compat": "seed", "total_steps": 600, "use_moe": True},
    {"type": "windowed", "total_steps": 600, "patience_unit": "steps", "emergency": {"ratio": 2}},
    {"type": "plateau", "min_lr": [1e-5, 1e-6], "factor": 0.5, "base": None},
    {"type": "constant", "base": {"type": "multistep", "milestones": [20, 10]}},
    {"type": "one_cycle", "total_steps": 100, "max_lr": 1},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: json.dumps(spec)[:60])
def test_the_resolved_specification_is_plain_json_and_resolves_to_itself(spec):
    given = json.dumps(spec)
    whole = resolved_spec(spec)
    assert json.dumps(spec) == given
    again = resolved_spec(json.loads(json.dumps(whole, allow_nan=False)))
    assert json.dumps(again) == json.dumps(whole)
    assert resolve(whole) == resolve(spec)
    assert whole["type"] in ALL


def test_a_version_names_the_rule_and_none_means_the_newest():
    for tag, policy in ALL.items():
        inner = INNER.get(policy.name, {})
        assert resolve({"type": tag, **inner}).policy is policy
        assert resolve({"type": policy.name, **inner}).policy is POLICIES[policy.name]


def test_the_name_of_a_base_schedule_is_short_for_the_constant_policy_on_it():
    short = resolve({"type": "cosine", "T_max": 100})
    assert short == resolve({"type": "constant", "base": {"type": "cosine", "T_max": 100}})
    assert short.policy.name == "constant"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "windowd"}, ["type", "'windowd'", "did you mean 'windowed'"]),
        ({"type": "windowed@99"}, ["type", "'windowed@99'", "did you mean 'windowed@1'"]),
        ({"type": "windowed@"}, ["type", "'windowed@'", "did you mean 'windowed@1'"]),
        ({"type": 3}, ["type", "3"]),
        ({}, ["type", "None"]),
        ([], ["a list", "a mapping"]),
        ({"type": "windowed", "windowsize": 5}, ["windowsize", "did you mean 'window_size'"]),
        ({"type": "windowed", "window_size": "5"}, ["window_size", "'5'", "integer"]),
        ({"type": "windowed", "window_size": 5.0}, ["window_size", "5.0", "integer"]),
        ({"type": "windowed", "window_size": True}, ["window_size", "True", "integer"]),
        ({"type": "windowed", "window_size": 1}, ["window_size", "1", "2"]),
        ({"type": "windowed", "lr_min": float("nan")}, ["lr_min"]),
        ({"type": "windowed", "lr_min": 1.0, "lr_max": 0.1}, ["lr_min", "1.0", "lr_max"]),
        ({"type": "windowed", "compat": "originl"}, ["compat", "'originl'", "'original'"]),
        ({"type": "windowed", "emergency": {"ratioo": 2}}, ["emergency.ratioo", "did you mean 'ratio'"]),
        ({"type": "windowed", "emergency": {"ratio": 0.5}}, ["emergency.ratio", "0.5", "1"]),
        ({"type": "windowed", "window_size": "5", "use_moe": 1}, ["window_size", "use_moe", "boolean"]),
        ({"type": "plateau", "min_lr": [0.1, "x"]}, ["min_lr", "'x'", "number"]),
        ({"type": "plateau", "mode": "least"}, ["mode", "'least'", "'min'"]),
        ({"type": "plateau", "metric": {1, 2}}, ["JSON"]),
        ({"type": "constant", "warmup_steps": 10}, ["warmup_steps", "under 'base'"]),
        ({"type": "constant", "base": {"type": "cosine", "Tmax": 10}}, ["base.Tmax", "did you mean 'T_max'"]),
        ({"type": "constant", "base": "cosine"}, ["base.T_max", "needs it"]),
        ({"type": "constant", "base": 3}, ["base", "3", "a mapping"]),
        ({"type": "cosine", "T_max": -1}, ["T_max", "-1", "at least 1"]),
        ({"type": "cosine", "T_max": 5, "base": {"type": "linear"}}, ["base", "only one"]),
    ],
)
def test_a_wrong_specification_is_refused_with_the_key_the_value_and_the_remedy(spec, words):
    if not words:
        assert resolve(spec).policy.name == "windowed"
        return
    with pytest.raises(Invalid) as refused:
        resolve(spec)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize("name", [*ALL, *POLICIES, *SCHEDULES])
def test_every_policy_and_schedule_has_a_schema_with_descriptions(name):
    schema = json_schema(name)
    json.dumps(schema)
    assert schema["properties"]["type"] == {"const": name}
    assert schema["additionalProperties"] is False
    for key, entry in schema["properties"].items():
        assert key == "type" or entry["description"], key
    assert set(schema["required"]) <= set(schema["properties"])


def test_a_schema_tells_limits_and_distinguishes_the_two_constants():
    assert json_schema("cosine")["properties"]["T_max"]["minimum"] == 1
    assert set(json_schema("constant")["properties"]) == {"type", "base"}
    assert set(json_schema("constant", base=True)["properties"]) == {"type", "warmup_steps", "factor", "total_iters"}
    with pytest.raises(Invalid, match="did you mean 'plateau'"):
        json_schema("platau")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "gradient_aware", "policy": None}, "policy: null is not allowed"),
        ({"type": "per_group", "policy": None}, "policy: null is not allowed"),
        ({"type": "sequence", "stages": [{"policy": None}]}, "stages.0.policy: null is not allowed"),
        (
            {"type": "steady", "guard": {"max_lr": 1}},
            "guard: adaptive has no such parameter; give it beside the policy",
        ),
        ({"type": "x" * 10_000}, "^type: .{1,900}$"),
        ({"type": "vishion"}, "did you mean 'vision'"),
    ],
)
def test_what_a_newcomer_tried_is_refused_with_the_way_out(spec, words):
    with pytest.raises(Invalid, match=words):
        resolve(spec, profiles=["vision"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.yaml", "type: windowed\nwindow_size: 5\nwindow_size: 6\n", "'window_size' stands twice"),
        ("p.json", '{"type": "windowed", "type": "steady"}', "'type' stands twice"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.yaml", "[" * 5000, "p.yaml: "),
    ],
)
def test_a_file_that_would_lose_something_is_refused(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(Invalid, match=words):
        load_policy(path)


def test_numbers_that_overflow_in_the_reasons_of_a_decision_do_not_reach_the_record():
    from flyball_server.core.numbers import finite

    given = {"a": float("inf"), "b": [1.0, float("nan")], "c": {"d": -1e300}, "e": "x", "f": None}
    assert finite(given) == {"a": sys.float_info.max, "b": [1.0, 0.0], "c": {"d": -1e300}, "e": "x", "f": None}
    assert finite(-float("inf")) == -sys.float_info.max
