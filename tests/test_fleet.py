"""Goal: a command to many runs does to each what it says, tells it beforehand, and can be repeated.

Method: a real service over HTTP, jobs spoken for by hand; roles on the use cases themselves.
"""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.storage.stores import Opened, fill
from tests.test_commands import Job

import flyball_server
from flyball_server.auth.access import Caller
from flyball_server.commands.commanding import Commanding
from flyball_server.core.errors import Denied
from flyball_server.fleet.fleet import Fleet, FleetRequest
from flyball_server.messages import CommandRequest
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE
from flyball_server.tail import Tail


@pytest.fixture
def http():
    with flyball_server.running() as service, httpx.Client(base_url=service.http, timeout=30) as client:
        yield client


def begin(http, name, **attach):
    job = Job(http, name, **attach)
    job.run = job.advice["run"]
    job.report(2)
    return job


def fleet(http, selector, *, status=200, key="", dry_run=False, **command):
    body = {"selector": selector, "command": {"reason": "a test", **command}, "dry_run": dry_run}
    answer = http.post("/v1/fleet/commands", json=body, headers={"Idempotency-Key": key} if key else {})
    assert answer.status_code == status, answer.text
    return answer.json()


def by_run(found):
    return {one["run"]: one for one in found["results"]}


def test_a_dry_run_tells_exactly_what_would_change_and_changes_nothing(http):
    free = begin(http, "free", project="v")
    held = begin(http, "held", project="v", guard={"max_factor": 1.5}, lag=2)
    over = begin(http, "over", project="v")
    begin(http, "other")
    free.command("override", value=0.04, groups=["body"])
    over.report(end="finished")
    seqs = {job.run: job.show()["seq"] for job in (free, held, over)}
    told = fleet(http, "project=v", kind="override", factor=3.0, dry_run=True)
    assert (told["dry_run"], told["fleet"], told["counts"]) == (True, None, {"accepted": 1, "clamped": 1})
    results = by_run(told)
    assert results.keys() == {"v:free", "v:held"}, "what has ended is not meant, nor another project"
    would = results["v:free"]["would"]
    assert would["before"] == {"body": 0.04, "head": 0.01}
    assert would["after"] == pytest.approx({"body": 0.3, "head": 0.03}), "a factor on what the policy says"
    assert would["ends"] == ["c4"]
    assert results["v:held"]["would"]["after"] == pytest.approx({"body": 0.15, "head": 0.015})
    refused = by_run(fleet(http, "project=v,status=finished", kind="hold", dry_run=True))["v:over"]
    assert (refused["status"], refused["code"], refused["would"]) == ("refused", "conflict", None)
    assert seqs == {job.run: job.show()["seq"] for job in (free, held, over)}
    # What was told is what happens.
    fleet(http, "project=v", kind="override", factor=3.0)
    for job in (free, held):
        job.report(4)
        after = [group["lr"] for group in job.show()["settings"]]
        assert after == list(results[job.run]["would"]["after"].values())


def test_what_one_run_refuses_keeps_no_other_from_its_command(http):
    plain = begin(http, "plain")
    begin(http, "multiplied", mode="multiplier")
    results = by_run(fleet(http, "run=*", kind="override", value=0.02))
    assert (results["plain"]["status"], results["multiplied"]["code"]) == ("accepted", "invalid")
    assert "multiplier mode" in results["multiplied"]["error"]
    plain.report()
    assert plain.lr == [0.02, 0.02]


def test_a_repeated_request_means_the_same_runs_and_commands_none_twice(http):
    jobs = [begin(http, name, policy={"type": "plateau"}) for name in ("a", "b")]
    said = {"kind": "switch_policy", "policy": {"type": "constant"}, "key": "once"}
    first = fleet(http, "policy=plateau", **said)
    begin(http, "late", policy={"type": "plateau"})
    for job in jobs:
        job.report(2)
    again = fleet(http, "policy=plateau", **said)
    assert [(one["run"], one["id"]) for one in again["results"]] == [
        (one["run"], one["id"]) for one in first["results"]
    ]
    assert {one["status"] for one in again["results"]} == {"accepted"}
    assert http.get("/v1/runs/late").json()["policy"] == "plateau@1"
    assert fleet(http, "policy=plateau", kind="hold", key="once", status=409)["code"] == "conflict"
    assert "means no run" in fleet(http, "policy=windowed", kind="hold", status=404)["detail"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"selector": "run=*", "command": {"kind": "hold", "reason": ""}}, "reason is empty"),
        ({"selector": "run=*", "command": {"kind": "hodl", "reason": "x"}}, "hold"),
        ({"selector": "", "command": {"kind": "hold", "reason": "x"}}, "selector is empty"),
        ({"selector": "run=*", "command": {"kind": "bounds", "reason": "x", "guard": {"a": "b" * 70000}}}, "bytes"),
    ],
)
def test_a_wrong_fleet_command_is_refused_as_a_whole(http, body, words):
    begin(http, "r")
    answer = http.post("/v1/fleet/commands", json=body)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


def test_roles_and_projects_hold_for_many_runs_as_for_one():
    async def ask():
        async with Opened(open_journal("memory:")) as opened:
            for run in ("r1", "r2"):
                await fill(opened, run, 1)
            tail = Tail(opened.engine.ledger)
            commanding = Commanding(opened.engine, opened.journal, {})
            many = Fleet(opened.engine, opened.journal, commanding, tail)
            request = FleetRequest("run=*", CommandRequest("", "override", "a test", {"factor": 0.5}))
            bot = await many.command(request, Caller("bot", "proposer"))
            assert bot["counts"] == {"proposed": 2}
            tried = await many.command(request._replace(dry_run=True), Caller("bot", "proposer"))
            assert tried["counts"] == {"proposed": 2}
            with pytest.raises(Denied):
                await many.command(request, Caller("eve", "viewer"))
            elsewhere = Caller("far", "operator", frozenset({"another"}))
            assert (await many.command(request._replace(dry_run=True), elsewhere))["results"] == []
            rows = list(opened.journal.rows(STORE))
            assert [(row.kind, row.actor) for row in rows] == [("fleet", "bot"), ("fleet_done", "bot")]
            assert rows[0].meta["selector"] == "run=*"
            assert rows[0].meta["command"] == {"kind": "override", "reason": "a test", "factor": 0.5}
            assert rows[1].meta["counts"] == {"proposed": 2}

    asyncio.run(ask())
