"""Goal: a canary switches the runs that the hash says, compares what happened, and can be completed or undone.

Method: a real service over HTTP, jobs spoken for by hand; the comparison also on numbers made for it.
"""

from __future__ import annotations

import contextlib
import time

import httpx
import numpy as np
import pytest
from tests.test_commands import Job

import flyball_server
from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.fleet import comparing
from flyball_server.fleet.canaries import fraction
from flyball_server.http_api import fleet as http_fleet

CONSTANT = {"type": "constant"}


def begin(http, name, **attach):
    job = Job(http, name, **attach)
    job.run = job.advice["run"]
    job.report(64)
    return job


def post(http, path, *, status=200, key="", **body):
    answer = http.post(f"/v1/canaries{path}", json=body, headers={"Idempotency-Key": key} if key else {})
    assert answer.status_code == status, answer.text
    return answer.json()


def policy_of(job):
    shown = job.show()
    return shown["policy"], shown["base"] and shown["base"]["type"], shown["guard"]


def members_of(found):
    return [one["run"] for one in found["members"]]


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Who comes later is looked for at once."""
    monkeypatch.setattr(limits, "CANARY_EVERY_S", 0.05)


@pytest.fixture
def http():
    with flyball_server.running() as service, httpx.Client(base_url=service.http, timeout=30) as client:
        yield client


def test_a_share_chosen_by_hash_is_switched_compared_and_switched_back(http):
    windowed = {"type": "windowed", "base": {"type": "cosine", "T_max": 1000}}
    jobs = {name: begin(http, name, policy=windowed, guard={"max_lr": 0.1}) for name in "abcdefgh"}
    said = {"selector": "policy=windowed", "policy": "plateau", "base": None, "share": 0.5, "reason": "is it better?"}
    started = post(http, "", status=201, key="k", **said)
    assert post(http, "", status=201, key="k", **said)["id"] == started["id"]
    members = [name for name in jobs if fraction(started["id"], name) < 0.5]
    assert sorted(members_of(started)) == members
    assert sorted([*started["controls"], *members]) == [*jobs]
    for name, job in jobs.items():
        better = name in members
        assert policy_of(job)[:2] == (("plateau@1", None) if better else ("windowed@1", "cosine"))
        job.report(64, loss=0.5 if better else 0.9)
        job.report(1, loss=9.0 if better else 0.9)
    foreign = {"number": 90, "step": 129, "decided": 128, "lr": [0.3, 0.3], "conflict": "StepLR wrote lr"}
    jobs[started["controls"][0]].report(1, loss=0.9, confirm=False, receipts=[foreign])
    jobs[members[0]].report(end="failed")
    found = http.get(f"/v1/canaries/{started['id']}").json()
    arms = {name: found["comparison"][name] for name in ("members", "controls")}
    n = len(members)
    assert arms["members"]["loss_change"] == {"q1": -0.5, "median": -0.5, "q3": -0.5, "n": n}
    assert arms["controls"]["loss_change"]["median"] == pytest.approx(-0.1)
    assert (arms["members"]["spikes"], arms["controls"]["spikes"]) == (n, 0)
    assert (arms["members"]["conflicts"], arms["controls"]["conflicts"]) == (0, 1)
    assert arms["members"]["status"] == {"active": n - 1, "failed": 1}
    assert (arms["members"]["steps"], arms["members"]["runs"]) == (65, n)
    assert any("gross harm" in words for words in found["comparison"]["words"])
    assert {one["status"] for one in found["members"]} == {"applied"}
    # One was switched again by hand, and one has ended: both are told, and left alone.
    again = members[1]
    jobs[again].command("switch_policy", policy=CONSTANT)
    ended = post(http, f"/{started['id']}/back", reason="no gain")
    results = {one["run"]: one for one in ended["results"]}
    assert "switched again since" in results[again]["error"]
    assert "failed" in results[members[0]]["error"]
    for name in members[2:]:
        assert (results[name]["status"], policy_of(jobs[name])) == (
            "accepted", ("windowed@1", "cosine", {"max_lr": 0.1})
        )  # fmt: skip
    seqs = [job.show()["seq"] for job in jobs.values()]
    post(http, f"/{started['id']}/back", reason="no gain")
    assert [job.show()["seq"] for job in jobs.values()] == seqs, "a repeated request changes nothing"
    refused = post(http, f"/{started['id']}/promote", status=409, reason="after all")
    assert "closed: back by http:127.0.0.1: no gain" in refused["detail"]


def test_the_rest_is_switched_by_a_promotion_and_nobody_joins_after_it(http):
    jobs = {name: begin(http, name) for name in "abcdef"}
    started = post(http, "", status=201, selector="run=*", policy="plateau", share=0.4, reason="is it better?")
    members = members_of(started)
    assert 0 < len(members) < 6
    other = post(http, "", status=409, selector="run=a", policy="cycle", share=1, reason="as well")
    assert f"canary {started['id']}" in other["detail"]
    found = post(http, f"/{started['id']}/promote", reason="it is")
    assert sorted(one["run"] for one in found["results"]) == sorted(started["controls"])
    assert {policy_of(job)[0] for job in jobs.values()} == {"plateau@1"}
    listed = http.get("/v1/canaries").json()["canaries"]
    assert [(one["id"], one["status"], one["closed_reason"]) for one in listed] == [
        (started["id"], "promoted", "it is")
    ]
    late = begin(http, "late")
    time.sleep(0.3)
    assert policy_of(late)[0] == "constant@1", "a closed canary takes nobody in"


def test_a_run_that_comes_later_joins_by_its_hash_and_a_restart_forgets_nothing(tmp_path):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        jobs = {"first": begin(http, "first")}
        said = {"selector": "policy=constant", "profile": "nobody", "share": 0.5, "reason": "is it better?"}
        assert "no such profile" in post(http, "", status=422, **said)["detail"]
        assert http.get("/v1/canaries").json()["canaries"] == []
        del said["profile"]
        started = post(http, "", status=201, policy={"type": "plateau", "patience": 7}, **said)
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        jobs |= {name: begin(http, name) for name in ("l1", "l2", "l3", "l4")}
        members = {name for name in jobs if fraction(started["id"], name) < 0.5}
        until = time.monotonic() + 10
        found = {"members": []}
        while {one["run"] for one in found["members"] if one["command"]} != members and time.monotonic() < until:
            time.sleep(0.05)
            found = http.get(f"/v1/canaries/{started['id']}").json()
        assert set(members_of(found)) == members
        assert set(found["controls"]) == jobs.keys() - members
        for name in jobs:
            shown = http.get(f"/v1/runs/{name}").json()
            assert (shown["policy_config"].get("patience") == 7) == (name in members)
        jobs = post(http, f"/{started['id']}/back", reason="no")
        assert {one["status"] for one in jobs["results"]} == {"accepted"}


def test_a_profile_brings_its_limits_and_going_back_takes_them_away(tmp_path):
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text("careful:\n  policy: {type: plateau}\n  guard: {max_lr: 0.05}\n")
    with (
        flyball_server.running(profiles=str(profiles)) as service,
        httpx.Client(base_url=service.http, timeout=30) as http,
    ):
        job = begin(http, "r", guard={"min_lr": 1e-6})
        before = policy_of(job)
        started = post(http, "", status=201, selector="run=r", profile="careful", share=1, reason="is it safer?")
        assert policy_of(job) == ("plateau@1", None, {"min_lr": 1e-6, "max_lr": 0.05})
        post(http, f"/{started['id']}/back", reason="too slow")
        assert policy_of(job) == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"share": 0, "policy": CONSTANT}, "greater than 0"),
        ({"share": 0.5}, "a policy, with or without a base, or a profile"),
        ({"share": 0.5, "policy": CONSTANT, "profile": "x"}, "one of the two"),
        ({"share": 0.5, "policy": "windowd"}, "windowed"),
        ({"share": 0.5, "policy": CONSTANT, "selector": "projct=x"}, "project"),
        ({"share": 0.5, "policy": CONSTANT, "reason": ""}, "reason is empty"),
    ],
)
def test_a_wrong_canary_is_refused_and_nothing_begins(http, body, words):
    begin(http, "r")
    assert words in post(http, "", status=422, **{"selector": "run=*", "reason": "why", **body})["detail"]
    assert http.get("/v1/canaries").json()["canaries"] == []


def test_who_reaches_only_some_of_the_runs_sees_those_and_ends_nothing(http, monkeypatch):
    for project in ("default", "vision", "secret"):
        begin(http, "r", project=project)
    started = post(http, "", status=201, selector="run=*r", policy="plateau", share=1, reason="is it better?")
    for role, projects, seen, ending in (
        ("operator", {"vision"}, ["vision:r"], 403), ("operator", {"other"}, None, 404), ("viewer", None, 3, 403),
    ):  # fmt: skip
        caller = Caller("x", role, projects and frozenset(projects))
        monkeypatch.setattr(http_fleet, "caller_of", lambda _, caller=caller: caller)
        answer = http.get(f"/v1/canaries/{started['id']}")
        if seen is None:
            assert answer.status_code == 404
            assert http.get("/v1/canaries").json()["canaries"] == []
        else:
            assert (members_of(answer.json()) if projects else len(members_of(answer.json()))) == seen
        refused = http.post(f"/v1/canaries/{started['id']}/back", json={"reason": "why"})
        assert refused.status_code == ending
        assert "secret" not in refused.text
        refused = http.post("/v1/canaries", json={"selector": "run=*", "policy": "cycle", "share": 1, "reason": "x"})
        assert refused.status_code == (403 if role == "viewer" else 409 if "vision" in projects else 404)
        assert "secret" not in refused.text


def test_spikes_are_counted_once_each_whatever_the_scale_and_the_noise():
    noise = np.sin(np.arange(400) * 12.9898) * 0.05
    for scale in (1e-3, 1.0, 1e4):
        calm = (2.0 + noise) * scale
        assert comparing.spikes(calm[:64], calm[64:]) == 0
        wild = calm.copy()
        wild[[100, 101, 200]] = 5 * scale
        wild[[300, 301]] = np.nan, np.inf
        assert comparing.spikes(wild[:64], wild[64:]) == 3
    assert comparing.spikes(np.empty(0), np.full(10, np.nan)) == 1
    assert comparing.spikes(np.empty(0), np.empty(0)) == 0


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_canary_of_somebody_without_a_token_pauses_and_says_so(end):
    with flyball_server.running(auth=True) as service, contextlib.ExitStack() as clients:

        def client(secret):
            headers = {"Authorization": f"Bearer {secret}"}
            return clients.enter_context(httpx.Client(base_url=service.http, headers=headers, timeout=30))

        root = client(service.new_token())
        first = begin(root, "first")
        body = {"name": "leaver", "role": "operator", "projects": None, "expires_in_s": 2 if end == "expired" else None}
        token = root.post("/v1/tokens", json=body).json()
        started = post(
            client(token["secret"]), "", status=201, selector="run=*", policy="plateau", share=1, reason="is it better?"
        )
        assert (members_of(started), started["paused"]) == (["first"], "")
        if end == "revoked":
            assert root.delete(f"/v1/tokens/{token['id']}", params={"reason": "left"}).status_code == 200
        else:
            time.sleep(2.0)
        late = begin(root, "late")
        time.sleep(0.5)  # ten looks
        assert (policy_of(first)[0], policy_of(late)[0]) == ("plateau@1", "constant@1")
        found = root.get(f"/v1/canaries/{started['id']}").json()
        assert (members_of(found), found["status"]) == (["first"], "open")
        assert found["paused"] == f"token {token['id']} of token:{token['id']} leaver is {end}"
        assert post(root, f"/{started['id']}/back", reason="nobody looks after it")["closed"] == "back"
