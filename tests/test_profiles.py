"""Goal: what a platform team puts into a profiles file is what its jobs get, under its limits, and a mistake in it is
refused by path before the service begins. Method: files, real services over them, real attaches over REST and torch.
"""

import json

import httpx
import pytest
import torch

import flyball
import flyball_server
from flyball_server import limits
from flyball_server.cli import cli
from flyball_server.core.errors import Invalid
from flyball_server.guards import expanded, limits_of
from flyball_server.policy_files import json_schema, resolve
from flyball_server.presets import GUARDS, PRESETS
from flyball_server.profiles import load_profiles

TEXT = """
vision:
  about: ResNets
  policy: {type: conservative, patience: 60}
  base: {type: cosine, T_max: 1000}
  guard: {preset: careful, max_lr: 0.4}
tiny: {policy: steady}
"""


def write(tmp_path, text, name="profiles.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("profiles"), TEXT)
    with flyball_server.running(profiles=path) as service:
        yield service


def attach(service, run, **fields):
    body = {"run": run, "session": "s", "groups": [{"name": "default", "lr": 0.1}], **fields}
    return httpx.post(f"{service.http}/v1/attach", json=body, trust_env=False)


def detail(service, run):
    return httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).json()


def test_a_profile_is_a_whole_policy_with_base_and_guard(tmp_path):
    profile = load_profiles(write(tmp_path, TEXT))["vision"]
    assert profile.about == "ResNets"
    assert profile.policy["type"] == "adaptive@1"
    assert (profile.policy["up_factor"], profile.policy["patience"]) == (1.02, 60)
    assert profile.policy["base"]["T_max"] == 1000
    assert profile.guard == {"min_factor": 0.01, "max_factor": 10.0, "max_change": 2.0, "max_lr": 0.4}
    as_json = json.dumps({"tiny": {"policy": "steady"}})
    assert load_profiles(write(tmp_path, as_json, "p.json"))["tiny"].policy == resolve({"type": "steady"}).spec()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "give a mapping of profiles by name"),
        ("vision: steady", "vision: give a mapping with a policy"),
        ("vision: {polcy: steady}", "vision: give a mapping with a policy"),
        ("vision: {policy: steady, gaurd: {}}", "vision.gaurd: .*did you mean 'guard'"),
        ("vision: {policy: {type: steady, patiense: 3}}", "vision: patiense: .*did you mean 'patience'"),
        ("vision: {policy: steddy}", "vision: type: 'steddy' .*did you mean 'steady'"),
        ("vision: {policy: steady, guard: {max_lr: -1}}", "vision: guard: max_lr is -1"),
        ("vision: {policy: steady, guard: {preset: moee}}", "vision: guard.preset: .*did you mean 'moe'"),
        ("vision: {policy: steady, guard: 3}", "vision: guard: 3 is not allowed"),
        ("vision: {policy: {type: steady, base: {type: cosine}}, base: {type: cosine}}", "vision: base is given twice"),
        ("steady: {policy: adaptive}", "steady: is the name of a policy, preset or base schedule"),
        ("'a b': {policy: steady}", "'a b' is no name for a profile"),
        ("1: {policy: steady}", "1 is no name for a profile"),
    ],
)
def test_a_wrong_profile_is_refused_with_file_path_and_remedy(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(Invalid, match=words) as error:
        load_profiles(path)
    assert str(error.value).startswith(path)
    with pytest.raises(Invalid, match=words):
        flyball_server.running(profiles=path).start()


def test_a_job_gets_the_profile_it_asks_for_and_its_record_says_so(service):
    answer = attach(service, "p1", policy={"type": "vision"})
    assert answer.status_code == 200, answer.text
    found = detail(service, "p1")
    assert (found["profile"], found["policy"]) == ("vision", "adaptive@1")
    assert found["policy_config"]["patience"] == 60
    assert found["base"]["T_max"] == 1000
    assert found["guard"]["max_lr"] == 0.4
    assert detail(service, "p1")["settings"][0]["lr"] == pytest.approx(0.1)


def test_a_job_may_add_limits_to_a_profile_but_change_nothing_of_it(service):
    assert attach(service, "p2", policy={"type": "vision"}, guard={"cooldown_steps": 5}).status_code == 200
    assert detail(service, "p2")["guard"]["cooldown_steps"] == 5
    loose = attach(service, "p3", policy={"type": "vision"}, guard={"max_lr": 4.0})
    assert loose.status_code == 422
    assert "guard.max_lr: 4.0 is not allowed; the profile 'vision' says 0.4" in loose.json()["detail"]
    other = attach(service, "p3", policy={"type": "vision", "patience": 3})
    assert other.status_code == 422
    assert "the profile 'vision' is used as it is" in other.json()["detail"]
    assert httpx.get(f"{service.http}/v1/runs/p3", trust_env=False).status_code == 404


def test_a_resumed_run_keeps_its_profile_as_recorded(tmp_path):
    store = f"sqlite:///{tmp_path}/runs.db"
    path = write(tmp_path, TEXT)
    with flyball_server.running(store=store, profiles=path) as service:
        assert attach(service, "p4", policy={"type": "vision"}).status_code == 200
    write(tmp_path, TEXT.replace("patience: 60", "patience: 90").replace("0.4", "0.2"))
    with flyball_server.running(store=store, profiles=path) as service:
        again = attach(service, "p4", policy={"type": "vision"}, session="t", resume=True)
        assert again.status_code == 200, again.text
        assert detail(service, "p4")["policy_config"]["patience"] == 60
        assert attach(service, "p5", policy={"type": "vision"}).status_code == 200
        assert detail(service, "p5")["policy_config"]["patience"] == 90


def test_the_training_process_keeps_inside_the_profile_s_bounds(service):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with flyball.attach(optimizer, run="p6", policy="vision", server=service.grpc, lag=0, wait_s=5.0) as governor:
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(1)
        optimizer.step()
        governor.step(1.0)
        assert optimizer.param_groups[0]["lr"] <= 0.4


def test_rest_lists_presets_guards_and_profiles_with_their_schemas(service):
    found = httpx.get(f"{service.http}/v1/policies", trust_env=False).json()
    assert {one["name"] for one in found["presets"]} == PRESETS.keys()
    assert {one["name"] for one in found["guards"]} == GUARDS.keys()
    assert [one["name"] for one in found["profiles"]] == ["vision", "tiny"]
    assert found["guard_schema"]["additionalProperties"] is False
    assert {"cycle", "adaptive", "rules", "windowed", "aees", "greedy"} <= {one["name"] for one in found["policies"]}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_specification_whose_parameters_can_be_changed(name):
    whole = resolve({"type": name}).spec()
    assert resolve(whole).spec() == whole
    schema = json_schema(name)
    assert schema["properties"]["type"] == {"const": name}
    for key, value in PRESETS[name].spec.items():
        if key != "type":
            assert schema["properties"][key]["default"] == value
    assert resolve({"type": "steady", "patience": 7}).config.patience == 7


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_preset_holds_and_what_stands_beside_it_wins(name):
    limits_of(expanded({"preset": name}))
    assert expanded({"preset": name, "max_lr": 0.5})["max_lr"] == 0.5
    assert "preset" not in expanded({"preset": name})


def test_the_mixture_of_experts_bounds_are_those_recommended():
    assert expanded({"preset": "moe"}) == {"min_lr": 1e-5, "max_lr": 2e-3}


def test_the_seed_of_a_policy_file_wins_over_the_run_s(service):
    spec = {"type": "aees", "lr_candidates": [0.5, 1, 2], "seed": 11}
    answer = attach(service, "p7", policy=spec, seed=3)
    assert answer.json()["seed"] == 11
    assert detail(service, "p7")["seed"] == 11
    assert attach(service, "p8", policy=spec | {"seed": None}, seed=3).json()["seed"] == 3
    too_large = attach(service, "p9", policy=spec | {"seed": limits.INTEGER_MAX + 1})
    assert too_large.status_code == 422
    assert "seed" in too_large.json()["detail"]


@pytest.mark.parametrize("name", ["cosine", "windowed@1", "moe", "steady", "careful", "vision", None])
def test_everything_that_is_listed_can_be_described(name, tmp_path, capsys):
    path = write(tmp_path, TEXT)
    cli(["policies", *([name] if name else []), "--profiles", path], standalone_mode=False)
    told = capsys.readouterr().out
    assert len(told.splitlines()) > 2
    assert name or all(word in told for word in ("vision", "ResNets", "steady", "cosine", "aees@1", "careful"))


def test_a_job_that_misspells_a_profile_is_told_its_name(service):
    answer = attach(service, "p10", policy={"type": "visoin"})
    assert answer.status_code == 422
    assert "did you mean 'vision'" in answer.json()["detail"]
    twice = attach(service, "p11", policy={"type": "vision"}, base={"type": "linear"})
    assert "base is given twice, in the profile 'vision' and beside it" in twice.json()["detail"]


def test_a_run_whose_parameters_overflow_is_recorded_like_any_other(service):
    spec = {"type": "windowed", "window_size": 4, "cooldown_steps": 0, "increase_factor": 1e308}
    spec |= {"max_change_per_step": 1e308, "lr_max": 1e308}
    assert attach(service, "p12", policy=spec).status_code == 200
    body = {
        "session": "s",
        "attempt": 1,
        "step": list(range(40)),
        "signals": {"loss": [1 / (1 + i) for i in range(40)]},
    }
    assert httpx.post(f"{service.http}/v1/runs/p12/report", json=body, trust_env=False).status_code == 200
    assert detail(service, "p12")["observations"] == 40
    moved = httpx.get(f"{service.http}/v1/runs/p12/decisions", trust_env=False).json()["decisions"]
    assert any(one["fields"]["change_pct"] > 1e300 and one["reason"].endswith("%).") for one in moved)
