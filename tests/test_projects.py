"""Goal: what a platform team caps, for all or for a project, no job and no command exceeds, and everybody is told.

Method: properties of the strictest of several guards; files with mistakes; real services over files, and jobs and
people that ask for more over REST.
"""

import contextlib
import json
import math

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flyball_server
from flyball_server.cli import cli
from flyball_server.core.errors import Invalid
from flyball_server.core.guard import begin, settle
from flyball_server.core.types import Decision, Group
from flyball_server.exports.check import check
from flyball_server.guards import limits_of, strictest
from flyball_server.projects import Project, Projects, load_projects

TEXT = """
"*":
  guard: {max_factor: 20, cooldown_steps: 2}
vision:
  about: ResNets
  guard: {max_lr: 0.05, groups: {head: {max_lr: 0.005, scale: 0.5}, router: {max_lr: 1.0e-4}}}
  approvals: 2
speech: {guard: {groups: {router: {max_lr: 1.0e-4}}}}
careful:
  guard: {preset: careful, keep_ratios: true}
"""
GROUPS = [{"name": "body", "lr": 0.1}, {"name": "head", "lr": 0.01}]


def write(tmp_path, text=TEXT, name="projects.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with flyball_server.running(projects=write(tmp_path_factory.mktemp("projects"))) as service:
        yield service


def attach(service, run, **fields):
    body = {"run": run, "session": "s", "groups": GROUPS, **fields}
    return httpx.post(f"{service.http}/v1/attach", json=body, trust_env=False)


def report(service, run, steps):
    body = {"session": "s", "attempt": 1, "step": steps, "signals": {"loss": [1.0] * len(steps)}}
    answer = httpx.post(f"{service.http}/v1/runs/{run}/report", json=body, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["changes"]["lr"][-1]


def command(service, run, kind, **fields):
    body = {"kind": kind, "reason": "a test", **fields}
    return httpx.post(f"{service.http}/v1/runs/{run}/commands", json=body, trust_env=False)


def shown(service, run):
    return httpx.get(f"{service.http}/v1/runs/{run}", trust_env=False).json()


# The strictest of several

bounds = st.floats(1e-6, 10.0)
ratios = st.floats(1.01, 100.0)


@st.composite
def guards(draw):
    keys = {
        "min_lr": st.floats(1e-9, 1e-6), "max_lr": bounds, "min_factor": st.floats(1e-9, 1e-7), "max_factor": bounds,
        "max_change": ratios, "warmup_steps": st.integers(0, 5), "cooldown_steps": st.integers(0, 5),
        "keep_ratios": st.booleans(),
        "groups": st.dictionaries(st.sampled_from("ab"), st.fixed_dictionaries({"max_lr": bounds}), max_size=2),
    }  # fmt: skip
    return draw(st.fixed_dictionaries({}, optional=keys))


@given(one=guards(), other=guards(), wanted=st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=6))
def test_what_the_strictest_lets_through_each_of_them_would_have(one, other, wanted):
    both = strictest(("one", one), ("other", other))
    assert limits_of(both) == limits_of(strictest(("other", other), ("one", one)))
    assert strictest(("both", both), ("one", one), ("other", other)) == both
    assert strictest(("one", one)) == one
    groups = (Group("a", 1.0), Group("b", 0.1))
    state = begin(groups, on_base=False)
    for step, lr in enumerate(wanted):
        before = state.factors
        state, out = settle(limits_of(both), state, groups, None, step + 10, Decision((lr, lr), None, None, "", ""))
        for guard in (one, other):
            limits = limits_of(guard)
            for group, now, factor, old in zip(groups, out.lr, state.factors, before, strict=True):
                own = limits.groups.get(group.name)
                tops = [limits.max_lr, None if limits.max_factor is None else limits.max_factor * group.lr]
                tops += [None if own is None else own.max_lr]
                assert now <= min((top for top in tops if top is not None), default=math.inf) * (1 + 1e-12)
                assert limits.max_change is None or factor <= old * limits.max_change * (1 + 1e-9)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({"max_lr": 0.2}, {"max_lr": 0.1}, {"max_lr": 0.1}),
        ({"max_lr": None}, {"max_lr": 0.1}, {"max_lr": 0.1}),
        ({"min_factor": 0.1}, {"min_factor": 0.2}, {"min_factor": 0.2}),
        ({"warmup_steps": 10}, {"warmup_steps": 5}, {"warmup_steps": 10}),
        ({"keep_ratios": True}, {"keep_ratios": False}, {"keep_ratios": True}),
        # Per window: the smaller ratio over the longer window; a length without a ratio is none.
        (
            {"max_change_per_window": 2.0, "window_steps": 100},
            {"max_change_per_window": 3.0, "window_steps": 500},
            {"max_change_per_window": 2.0, "window_steps": 500},
        ),
        (
            {"max_change_per_window": 4.0, "window_steps": 100},
            {"max_change_per_window": 3.0},
            {"max_change_per_window": 3.0, "window_steps": 1000},
        ),
        ({"window_steps": 5000}, {"max_change_per_window": 3.0}, {"max_change_per_window": 3.0}),
        ({"window_steps": 5000}, {"max_lr": 1.0}, {"window_steps": 5000, "max_lr": 1.0}),
        (
            {"groups": {"a": {"max_lr": 0.1, "scale": 0.2}}},
            {"groups": {"a": {"max_lr": 0.2, "min_lr": 0.01, "scale": 0.5}, "b": {"scale": 2.0}}},
            {"groups": {"a": {"max_lr": 0.1, "scale": 0.2, "min_lr": 0.01}, "b": {"scale": 2.0}}},
        ),
    ],
)
def test_the_strictest_limit_wins(one, other, both):
    assert strictest(("one", one), ("other", other)) == both


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"min_lr": 0.2}, {"max_lr": 0.1}, "guard.min_lr: 0.2 of one is above max_lr = 0.1 of other"),
        ({"max_factor": 0.5}, {"min_factor": 0.6}, "guard.min_factor: 0.6 of other is above max_factor = 0.5 of one"),
        (
            {"groups": {"a": {"min_lr": 0.2}}},
            {"groups": {"a": {"max_lr": 0.1}}},
            "guard.groups.a.min_lr: 0.2 of one is above max_lr = 0.1 of other",
        ),
        (
            {"groups": {"a": {"scale": 1.0}}},
            {"groups": {"a": {"scale": 0.5}}},
            "guard.groups.a.scale: 1.0 of one is not allowed; other says 0.5, and nobody may raise that",
        ),
    ],
)
def test_limits_that_cannot_both_hold_are_refused_by_the_names_of_both(one, other, words):
    with pytest.raises(Invalid, match=words):
        strictest(("one", one), ("other", other))


# The file


def test_a_file_of_projects_is_read_with_what_holds_for_all(tmp_path):
    projects = load_projects(write(tmp_path))
    assert projects.capped("elsewhere", {}) == {"max_factor": 20, "cooldown_steps": 2}
    assert projects.capped("careful", {"max_change": 5.0})["max_change"] == 2.0
    assert projects.capped("careful", {})["max_factor"] == 10.0
    assert projects.capped("vision", {}, ["body"]) == {"max_factor": 20, "cooldown_steps": 2, "max_lr": 0.05}
    assert [projects.approvals(name) for name in ("vision", "careful", "elsewhere")] == [2, 1, 1]
    strict = load_projects(write(tmp_path, json.dumps({"*": {"approvals": 3}, "a": {"approvals": 2}}), "p.json"))
    assert strict.approvals("a") == strict.approvals("b") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "give a mapping of projects by name"),
        ("vision: 3", "vision: 3 is not allowed; give a mapping"),
        ("'a b': {}", "'a b' is no name for a project"),
        ("vision: {gaurd: {}}", "vision.gaurd: .*did you mean 'guard'"),
        ("vision: {guard: {maxlr: 1}}", "vision: guard.maxlr: .*did you mean 'max_lr'"),
        ("vision: {guard: {preset: moee}}", "vision: guard.preset: .*did you mean 'moe'"),
        ("vision: {guard: [1]}", r"vision.guard: \[1\] is not allowed"),
        ("vision: {approvals: 0}", "vision.approvals: 0 is not allowed; give 1 to 10 people"),
        ("vision: {approvals: true}", "vision.approvals: True is not allowed"),
        (
            "{'*': {guard: {max_lr: 0.1}}, vision: {guard: {min_lr: 0.2}}}",
            "min_lr: 0.2 of the project 'vision' is above max_lr = 0.1 of the service",
        ),
    ],
)
def test_a_wrong_file_is_refused_as_a_whole_before_the_service_begins(tmp_path, capsys, text, words):
    path = write(tmp_path, text)
    with pytest.raises(Invalid, match=words) as error:
        load_projects(path)
    assert str(error.value).startswith(path)
    with pytest.raises(Invalid, match=words):
        flyball_server.running(projects=path).start()
    with pytest.raises(SystemExit):
        cli(["policies", "--projects", path])
    assert path in capsys.readouterr().err


def test_the_command_line_checks_a_file_and_says_what_holds(tmp_path, capsys):
    cli(["policies", "--projects", write(tmp_path)], standalone_mode=False)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("project")]
    assert len(told) == 4
    assert "ResNets" in told[1]
    assert '"max_factor": 20' in told[1]
    assert '"max_lr": 0.05' in told[1]
    assert told[1].endswith("approvals 2")


# Jobs and people that ask for more


def test_a_job_cannot_exceed_its_projects_limits_and_is_told_what_holds(service):
    answer = attach(service, "r1", project="vision", guard={"max_lr": 3.0, "max_change": 2.0})
    assert answer.status_code == 200, answer.text
    effective = {
        "max_lr": 0.05, "max_change": 2.0, "max_factor": 20, "cooldown_steps": 2,
        "groups": {"head": {"max_lr": 0.005, "scale": 0.5}},
    }  # fmt: skip
    assert answer.json()["guard"] == effective  # and the training process keeps to that by itself
    assert answer.json()["changes"]["lr"] == [[0.05, 0.005]]
    assert shown(service, "vision:r1")["guard"] == effective
    assert report(service, "vision:r1", [0, 1]) == [0.05, 0.005]
    strict = attach(service, "r2", project="vision", guard={"max_lr": 0.01})
    assert strict.json()["guard"]["max_lr"] == 0.01
    free = attach(service, "r3", guard={"max_lr": 3.0})
    assert free.json()["guard"] == {"max_lr": 3.0, "max_factor": 20, "cooldown_steps": 2}


def test_what_cannot_hold_together_is_refused_by_name_and_begins_no_run(service):
    for guard, words in (
        ({"min_lr": 0.1}, "guard.min_lr: 0.1 of the run is above max_lr = 0.05 of the project 'vision'"),
        ({"groups": {"head": {"scale": 2.0}}}, "the project 'vision' says 0.5, and nobody may raise that"),
    ):
        answer = attach(service, "r4", project="vision", guard=guard)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
    assert httpx.get(f"{service.http}/v1/runs/vision:r4", trust_env=False).status_code == 404


def test_no_command_goes_beyond_the_caps(service):
    assert attach(service, "r5").status_code == 200
    over = command(service, "r5", "override", setting="lr", factor=1000.0)
    assert over.status_code == 201, over.text
    assert over.json()["status"] == "clamped"
    assert report(service, "r5", [0]) == [2.0, 0.2]
    looser = command(service, "r5", "bounds", guard={"max_factor": 500.0, "cooldown_steps": None})
    assert looser.json()["status"] == "clamped"
    assert shown(service, "r5")["guard"] == {"max_factor": 20, "cooldown_steps": 2}
    assert command(service, "r5", "bounds", guard={"max_factor": 10.0}).json()["status"] == "accepted"
    assert shown(service, "r5")["guard"]["max_factor"] == 10.0
    assert report(service, "r5", [1]) == [1.0, 0.1]


def test_caps_about_groups_that_a_run_does_not_have_are_left_out_for_good(service):
    assert attach(service, "r6", project="speech").status_code == 200
    for top in (0.02, 0.01):
        answer = command(service, "speech:r6", "bounds", guard={"max_lr": top})
        assert (answer.status_code, answer.json()["status"]) == (201, "accepted"), answer.text
    assert shown(service, "speech:r6")["guard"] == {"max_factor": 20, "cooldown_steps": 2, "max_lr": 0.01}


def test_where_a_project_wants_two_people_a_command_is_a_proposal(service):
    assert attach(service, "r9", project="vision").status_code == 200
    answer = command(service, "vision:r9", "hold")
    assert (answer.status_code, answer.json()["status"], answer.json()["needed"]) == (202, "proposed", 2)


def test_a_resumed_job_is_not_blamed_for_what_others_added_then_or_since(tmp_path):
    store, asked = f"sqlite:///{tmp_path}/runs.db", {"max_lr": 3.0}
    path = write(tmp_path)
    with flyball_server.running(store=store) as service:
        assert attach(service, "old", project="vision", guard=asked).status_code == 200
    with flyball_server.running(store=store, projects=path) as service:
        assert attach(service, "new", project="vision", guard=asked).status_code == 200
        assert attach(service, "old", project="vision", guard=asked, session="t", resume=True).status_code == 200
        assert shown(service, "vision:old")["guard"]["max_lr"] == 0.05  # and held to it all the same
    write(tmp_path, TEXT.replace("0.05", "0.02"))
    with flyball_server.running(store=store, projects=path) as service:
        again = attach(service, "new", project="vision", guard=asked, session="t", resume=True)
        assert again.status_code == 200, again.text
        assert again.json()["guard"]["max_lr"] == 0.02
        other = attach(service, "new", project="vision", guard={"max_lr": 2.0}, session="u", resume=True)
        assert other.status_code == 422
        assert "max_lr is recorded as 3.0, this process asks for 2.0" in other.json()["detail"]


def test_a_fork_is_held_by_its_parents_limits_and_by_those_of_the_project_it_goes_to(service):
    assert attach(service, "r7", guard={"max_lr": 0.03, "max_change": 3.0}).status_code == 200
    report(service, "r7", [0, 1])
    for project, expected in (("careful", 0.03), ("vision", 0.03)):
        body = {"name": "fork", "project": project, "step": 1}
        answer = httpx.post(f"{service.http}/v1/runs/r7/fork", json=body, trust_env=False)
        assert answer.status_code in (200, 201), answer.text
        found = shown(service, f"{project}:fork")["guard"]
        assert found["max_lr"] == expected
        assert found["max_change"] == (2.0 if project == "careful" else 3.0)


def imported(service, run, *, commands=(), **fields):
    """A run from a service without any limits."""
    with flyball_server.running() as elsewhere:
        assert attach(elsewhere, run, project="vision", **fields).status_code == 200
        report(elsewhere, f"vision:{run}", [0, 1])
        for kind, words in commands:
            assert command(elsewhere, f"vision:{run}", kind, **words).status_code == 201
        data = httpx.get(f"{elsewhere.http}/v1/runs/vision:{run}/export", trust_env=False).content
    answer = httpx.post(f"{service.http}/v1/import", content=data, trust_env=False)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("lag", [None, 2])
def test_an_imported_run_keeps_its_record_and_is_held_to_the_limits_when_its_job_comes(service, tmp_path, lag):
    run = f"imported{lag}"
    given = [("bounds", {"guard": {"max_lr": None}}), ("override", {"value": 77.0})]
    imported(service, run, commands=given, guard={"max_lr": 90.0, "min_lr": 1e-5}, lag=lag)
    assert shown(service, f"vision:{run}")["guard"] == {"min_lr": 1e-5}  # its record is proved, and not changed
    answer = attach(service, run, project="vision", session="t", resume=True, lag=lag).json()
    assert (answer["guard"]["max_lr"], answer["guard"]["min_lr"]) == (0.05, 1e-5)
    # With a lag what was decided before is still to come first; the job's own guard holds that to the same limits.
    assert max(answer["changes"]["lr"][-1]) == 0.05
    body = {"session": "t", "attempt": 2, "step": [2, 3, 4], "signals": {"loss": [1.0] * 3}}
    told = httpx.post(f"{service.http}/v1/runs/vision:{run}/report", json=body, trust_env=False).json()
    assert max(max(lr) for lr in told["changes"]["lr"]) == 0.05
    found = httpx.get(f"{service.http}/v1/runs/vision:{run}/commands", trust_env=False).json()["commands"]
    assert [(one["kind"], one["actor"], one["reason"]) for one in found[2:]] == [
        ("bounds", "service", "limits of the project")
    ]
    assert attach(service, run, project="vision", session="u", resume=True, lag=lag).status_code == 200
    assert len(httpx.get(f"{service.http}/v1/runs/vision:{run}/commands", trust_env=False).json()["commands"]) == 3
    path = tmp_path / "again.flyball"
    path.write_bytes(httpx.get(f"{service.http}/v1/runs/vision:{run}/export", trust_env=False).content)
    assert check(path).verdict.problem == ""


def test_what_is_commanded_of_an_imported_run_is_held_to_the_limits_before_its_job_comes(tmp_path):
    text = TEXT.replace("approvals: 2", "approvals: 1")
    with flyball_server.running(projects=write(tmp_path, text)) as service:
        imported(service, "r", guard={"min_lr": 1.0, "groups": {"head": {"scale": 3.0}}})
        tried = {"selector": "project=vision", "command": {"kind": "override", "value": 60.0, "reason": "x"}}
        would = httpx.post(f"{service.http}/v1/fleet/commands", json={**tried, "dry_run": True}, trust_env=False).json()
        assert would["results"][0]["would"]["after"] == {"body": 0.05, "head": 0.005}
        before = shown(service, "vision:r")
        given = command(service, "vision:r", "override", value=60.0)
        assert (given.status_code, given.json()["status"]) == (201, "clamped")
        assert given.json()["seq"] == before["seq"] + 2
        after = shown(service, "vision:r")
        # What cannot hold beside today's limits gives way to them.
        assert (after["guard"]["min_lr"], after["guard"]["max_lr"]) == (0.05, 0.05)
        assert after["guard"]["groups"]["head"]["scale"] == 0.5
        assert [one["lr"] for one in after["settings"]] == [0.05, 0.005]
        assert command(service, "vision:r", "note").status_code == 201
        assert [one["kind"] for one in after["commands"]] == ["bounds", "override"]


@st.composite
def any_guards(draw):
    """Guards of which two may contradict each other, but none itself."""
    levels = {"min_lr": bounds, "max_lr": bounds, "scale": bounds}
    groups = st.dictionaries(st.sampled_from("ab"), st.fixed_dictionaries({}, optional=levels), max_size=2)
    keys = {"min_factor": bounds, "max_factor": bounds, "max_change_per_window": ratios, "groups": groups}
    guard = draw(st.fixed_dictionaries({}, optional={**keys, "min_lr": bounds, "max_lr": bounds}))
    with contextlib.suppress(Invalid):
        limits_of(guard)
        return guard
    return {}


@given(own=any_guards(), cap=any_guards())
def test_what_is_held_to_the_limits_once_is_so_for_good(own, cap):
    projects = Projects([Project("p", guard=cap)])
    once = projects.enforced("p", own, "ab")
    assert projects.enforced("p", once, "ab") == once
    assert limits_of(strictest(("run", once), ("cap", cap))) == limits_of(once)
