"""Goal: while it is frozen nothing is steered, whichever run, process or crash; and a thaw gives back what there was.

Method: real services over HTTP, one after the other or two journals on one store; jobs spoken for by hand.
"""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.storage.stores import Opened, fill
from tests.test_commands import Job

import flyball_server
from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.commands.commanding import Commanding
from flyball_server.core.errors import Conflict, Denied, NotFound
from flyball_server.fleet.freezing import Freezing
from flyball_server.messages import CommandRequest
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE
from flyball_server.tail import Tail
from flyball_server.verify import verify, verify_store

ADMIN = Caller("root", "admin")


def begin(http, name, **attach):
    job = Job(http, name, **attach)
    job.run = job.advice["run"]
    return job


def holds(job):
    return [one["reason"] for one in job.show()["commands"] if one["kind"] == "hold"]


def said(answer, status=200):
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_freeze_holds_every_run_refuses_commands_and_ends_with_the_thaw(tmp_path):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    plateau = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0}
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        job = begin(http, "r", policy=plateau)
        job.report(2)
        job.command("override", value=0.5, setting="momentum", groups=["body"])
        own = begin(http, "own")
        own.command("hold", reason="mine")
        lr = job.lr
        frozen = said(http.post("/v1/freeze", json={"reason": "a fire"}))
        assert (frozen["held"], frozen["failed"], frozen["project"]) == (2, [], None)
        job.report(20)
        assert job.lr == lr, "the policy cuts on, and nothing moves"
        refused = job.command("override", value=1, status=409)["detail"]
        assert "everything is frozen by http:127.0.0.1 since " in refused
        assert ": a fire; thaw first" in refused
        assert job.command("release", status=409)["code"] == "conflict"
        for kind in ("note", "hold", "stop", "checkpoint"):
            job.command(kind)
        late = begin(http, "late")
        assert holds(late) == ["frozen: a fire"]
        assert late.advice["confirm"] > 0
        assert "frozen already" in said(http.post("/v1/freeze", json={"reason": "again"}), 409)["detail"]
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        job.http = own.http = late.http = http
        assert said(http.get("/v1/freeze"))["freezes"][0]["reason"] == "a fire"
        assert job.command("bounds", guard={"max_lr": 1}, status=409)["code"] == "conflict"
        thawed = said(http.post("/v1/thaw", json={"reason": "out"}))
        assert (thawed["held"], said(http.get("/v1/freeze"))["freezes"]) == (0, [])
        assert holds(job) == ["a test"], "what people held stays"
        assert (holds(own), holds(late)) == (["mine"], [])
        job.command("release", command=next(c["id"] for c in job.show()["commands"] if c["kind"] == "hold"))
        job.report()
        assert job.lr < lr
        assert job.advice["changes"]["momentum"][-1] == [0.5, 0.0], "what the holds covered goes on"
        assert "not frozen" in said(http.post("/v1/thaw", json={"reason": "out"}), 409)["detail"]
    journal = open_journal(store, read_only=True)
    journal.start(lambda _: None)
    assert (verify(journal, "r").problem, verify_store(journal)) == ("", [])
    journal.close()


def test_what_was_overridden_before_a_freeze_goes_on_after_it():
    with flyball_server.running() as service, httpx.Client(base_url=service.http, timeout=30) as http:
        job = begin(http, "r")
        given = job.command("override", factor=0.5)
        lasting = job.command("override", value=0.3, groups=["body"], setting="momentum", for_steps=3)
        said(http.post("/v1/freeze", json={"reason": "a fire"}))
        job.report(5)
        job.report()
        assert job.get(lasting["id"])["status"] == "expired"
        assert (job.lr, job.advice["changes"]["momentum"][-1]) == ([0.05, 0.005], [0.3, 0.0]), "held all the same"
        said(http.post("/v1/thaw", json={"reason": "out"}))
        job.report()
        assert (job.lr, job.advice["changes"]["momentum"][-1]) == ([0.05, 0.005], [0.9, 0.0])
        assert not job.get(given["id"])["over"]
        notice = job.show()["commands"][-1]
        assert (notice["kind"], notice["reason"]) == ("release", "thawed: out")


def test_a_project_is_frozen_alone(http_of_memory):
    http = http_of_memory
    inside, outside = begin(http, "a", project="v"), begin(http, "b")
    said(http.post("/v1/freeze", json={"reason": "a fire", "project": "v"}))
    assert "project v is frozen" in inside.command("override", value=0.2, status=409)["detail"]
    assert outside.command("override", value=0.2)["status"] == "accepted"
    said(http.post("/v1/freeze", json={"reason": "everywhere"}))
    assert sorted(holds(inside)) == ["frozen: a fire", "frozen: everywhere"]
    said(http.post("/v1/thaw", json={"reason": "out", "project": "v"}))
    assert (holds(inside), holds(outside)) == (["frozen: everywhere"], ["frozen: everywhere"])
    assert said(http.post("/v1/freeze", json={"reason": "x", "project": "no such/name"}), 422)["code"] == "invalid"
    assert said(http.post("/v1/freeze", json={"reason": "  "}), 422)["code"] == "invalid"


@pytest.fixture
def http_of_memory():
    with flyball_server.running() as service, httpx.Client(base_url=service.http, timeout=30) as client:
        yield client


class Process:
    """What one process knows of the freezes of a store."""

    def __init__(self, opened):
        self.opened, self.tail = opened, Tail(opened.engine.ledger)
        self.freezing = Freezing(opened.engine, opened.journal, self.tail)
        self.commanding = Commanding(opened.engine, opened.journal, {}, None, self.freezing)


def test_another_process_notices_within_a_second_and_a_crash_in_the_middle_is_made_good(tmp_path):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    assert limits.TAIL_POLL_S < 1

    async def ask():
        async with Opened(open_journal(store)) as opened, Opened(open_journal(store, beside=True)) as beside:
            await fill(opened, "r", 1)
            here, there = Process(opened), Process(beside)
            watching = asyncio.create_task(there.tail.watch())
            await asyncio.sleep(0.05)
            # Only the row: the process that froze died before it reached any run.
            await opened.engine.ledger.append("frozen", {"project": "", "reason": "a fire"}, "root")
            await asyncio.sleep(0.9)
            with pytest.raises(Conflict, match="everything is frozen by root"):
                there.freezing.check("override", "default")
            watching.cancel()
            with pytest.raises(Conflict, match="frozen"):
                await here.commanding.give(CommandRequest("r", "override", "why", {"value": 1.0}), ADMIN)
            live = await opened.engine.find("r")
            async with opened.engine.turn(live):  # as the next report does
                await here.freezing.keep(live)
                await here.freezing.keep(live)
            assert [one.reason for one in live.run.steering.commands] == ["frozen: a fire"]
            await opened.engine.ledger.append("thawed", {"freeze": 1, "project": "", "reason": "out"}, "root")
            await here.freezing.look()
            async with opened.engine.turn(live):
                await here.freezing.keep(live)
            assert [one.kind for one in live.run.steering.commands] == ["release"]

    asyncio.run(ask())


def test_of_two_who_freeze_at_once_one_does_and_roles_decide_who_may():
    async def ask():
        async with Opened(open_journal("memory:")) as opened:
            await fill(opened, "r", 1)
            freezing = Process(opened).freezing
            answers = await asyncio.gather(
                *(freezing.freeze("", reason, ADMIN) for reason in ("one", "two")), return_exceptions=True
            )
            assert sorted(type(one) for one in answers if isinstance(one, Exception)) == [Conflict]
            live = await opened.engine.find("r")
            assert len(live.run.steering.commands) == 1
            operator = Caller("op", "operator", frozenset({"default"}))
            for wrong in (operator, Caller("op", "operator"), Caller("a", "admin", frozenset({"default"}))):
                with pytest.raises(Denied):
                    await freezing.thaw("", "out", wrong)
            with pytest.raises(NotFound):
                await freezing.freeze("vision", "why", operator)
            assert (await freezing.freeze("default", "why", operator))["held"] == 1
            assert len(await freezing.state(Caller("v", "viewer", frozenset({"vision"})))) == 1
            kinds = [row.kind for row in opened.journal.rows(STORE)]
            assert kinds[-1] == "frozen"

    asyncio.run(ask())


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_that_came_from_a_frozen_store_is_free_here(before, http_of_memory):
    """before: how many rows the other store's journal had; with none the freezes have the same number in both."""
    with flyball_server.running() as elsewhere, httpx.Client(base_url=elsewhere.http, timeout=30) as there:
        for _ in range(before):
            said(there.post("/v1/freeze", json={"reason": "x", "project": "other"}))
            said(there.post("/v1/thaw", json={"reason": "x", "project": "other"}))
        begin(there, "r").report(2)
        said(there.post("/v1/freeze", json={"reason": "theirs"}))
        data = there.get("/v1/runs/r/export").content
    http = http_of_memory
    if not before:
        said(http.post("/v1/freeze", json={"reason": "ours"}))
    said(http.post("/v1/import", content=data))
    job = begin(http, "r", resume=True, session="here")
    assert holds(job) == ([] if before else ["frozen: ours"])
    if not before:
        said(http.post("/v1/thaw", json={"reason": "out"}))
    assert holds(job) == []
    assert job.command("override", value=0.2)["status"] == "accepted"


def test_who_may_thaw_reaches_as_far_as_who_froze():
    async def ask():
        async with Opened(open_journal("memory:")) as opened:
            freezing = Process(opened).freezing
            both = frozenset({"two", "three"})
            one = frozenset({"two"})
            cases = (
                (ADMIN, Caller("x", "operator", one), False),
                (ADMIN, Caller("x", "admin", one), False),
                (ADMIN, Caller("x", "operator"), False),
                (ADMIN, Caller("x", "admin"), True),
                (Caller("f", "operator"), Caller("x", "admin", both), False),
                (Caller("f", "admin", one), Caller("x", "operator", both), False),
                (Caller("f", "operator", both), Caller("x", "operator", one), False),
                (Caller("f", "operator", one), Caller("x", "operator", both), True),
            )
            for who, other, may in cases:
                await freezing.freeze("two", "why", who)
                if may:
                    await freezing.thaw("two", "out", other)
                    continue
                with pytest.raises(Denied, match="froze it, who is") as refused:
                    await freezing.thaw("two", "out", other)
                assert "three" not in str(refused.value)
                await freezing.thaw("two", "out", ADMIN)

    asyncio.run(ask())
