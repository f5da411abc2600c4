"""Goal: who may only propose changes nothing alone, and what is approved is checked against the run as it is then.

Method: the use cases themselves over a real engine, with the callers and the project that each case needs.
"""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest
from tests.storage.stores import Opened, fill

import flyball_server
from flyball.cli_words import stage
from flyball_server.audit.hook_events import told
from flyball_server.auth.access import Caller
from flyball_server.commands.commanding import Commanding
from flyball_server.core.errors import Conflict, Denied, Invalid, NotFound
from flyball_server.core.events import Judged, Outcome
from flyball_server.exports.check import check
from flyball_server.messages import CommandRequest
from flyball_server.storage import open_journal
from flyball_server.verify import verify

BOT, OTHER_BOT = Caller("bot", "proposer"), Caller("bot2", "proposer")
ANN, BEN = Caller("ann", "operator"), Caller("ben", "operator")
OVERRIDE = CommandRequest("r", "override", "the loss is flat", {"factor": 0.5})


class Project:
    """A project that takes so many people for a command."""

    def __init__(self, approvals):
        self._approvals = approvals

    def capped(self, project, guard, *groups):
        return guard

    enforced = capped

    def approvals(self, project):
        return self._approvals


def with_run(case, approvals=1):
    """Run a case on a run, and re-execute its journal afterwards."""

    async def ask():
        async with Opened(open_journal("memory:")) as opened:
            await fill(opened, "r", 2)
            commanding = Commanding(opened.engine, opened.journal, {}, Project(approvals))
            await case(opened, commanding)
            assert verify(opened.journal, "r").problem == ""

    asyncio.run(ask())


async def lr_of(opened):
    return (await opened.engine.find("r")).run.settings.lr


def test_a_proposal_changes_nothing_until_somebody_else_approves_it():
    async def case(opened, commanding):
        before = await lr_of(opened)
        asked = (await commanding.give(OVERRIDE._replace(expires_in_s=3600), BOT)).view
        assert (asked.status, asked.needed, asked.approvals, await lr_of(opened)) == ("proposed", 1, (), before)
        for caller in (BOT, OTHER_BOT, Caller("dan", "driver"), Caller("val", "viewer")):
            with pytest.raises(Denied):
                await commanding.judge("r", asked.id, "approved", "it is fine", caller)
        given = await commanding.judge("r", asked.id, "approved", "agreed", ANN)
        assert (given.status, given.kind, given.actor, given.proposal) == ("accepted", "override", "bot", asked.id)
        assert given.expires_at == asked.expires_at
        assert await lr_of(opened) == tuple(lr / 2 for lr in before)
        over = await commanding.get("r", asked.id, BOT)
        assert (over.status, over.command, over.approvals) == ("approved", given.id, ("ann",))
        with pytest.raises(NotFound, match="is over already"):
            await commanding.judge("r", asked.id, "approved", "again", BEN)

    with_run(case)


def test_who_may_only_propose_adds_no_note_and_no_operator_approves_their_own():
    async def case(opened, commanding):
        with pytest.raises(Denied):
            await commanding.give(CommandRequest("r", "note", "hello", {}), BOT)
        asked = (await commanding.give(OVERRIDE, ANN)).view
        assert (asked.status, asked.needed, asked.approvals) == ("proposed", 2, ("ann",))
        with pytest.raises(Denied, match="ann's own"):
            await commanding.judge("r", asked.id, "approved", "surely", ANN)
        given = await commanding.judge("r", asked.id, "approved", "agreed", BEN)
        assert (given.id[0], given.status) == ("c", "accepted")
        assert (await commanding.give(CommandRequest("r", "note", "by one person", {}), ANN)).view.status == "done"

    with_run(case, approvals=2)


def test_a_bots_proposal_takes_two_people_where_the_project_says_so():
    async def case(opened, commanding):
        before = await lr_of(opened)
        asked = (await commanding.give(OVERRIDE, BOT)).view
        first = await commanding.judge("r", asked.id, "approved", "agreed", ANN)
        assert (first.id, first.status, first.approvals, await lr_of(opened)) == (
            asked.id,
            "proposed",
            ("ann",),
            before,
        )
        assert stage(first._asdict(), first.history[-1]) == "approved 1 of 2 by ann: agreed", "on the command line"
        events = [Judged(asked.id, "approved", "cas", "agreed")]
        (told_,) = told((await opened.engine.whole("r")).run, events, [Outcome((), ())])
        assert told_.text == f"proposal {asked.id} approved 2 of 2 by cas: agreed"
        with pytest.raises(Conflict, match="approved by ann already"):
            await commanding.judge("r", asked.id, "approved", "still", ANN)
        assert (await commanding.judge("r", asked.id, "approved", "agreed", BEN)).status == "accepted"

    with_run(case, approvals=2)


def test_what_the_run_has_become_is_checked_again_at_the_approval():
    async def case(opened, commanding):
        asked = (await commanding.give(OVERRIDE._replace(fields={"factor": 4.0}), BOT)).view
        until = CommandRequest("r", "override", "for a while", {"value": 0.01, "until_step": 12})
        soon = (await commanding.give(until, BOT)).view
        await commanding.give(CommandRequest("r", "bounds", "careful", {"guard": {"max_lr": 0.06}}), ANN)
        given = await commanding.judge("r", asked.id, "approved", "agreed", ANN)
        assert (given.status, max(given.verdict["lr"])) == ("clamped", 0.06)
        await fill(opened, "r", 4)  # past step 12
        with pytest.raises(Invalid, match="until_step is 12"):
            await commanding.judge("r", soon.id, "approved", "agreed", ANN)
        assert (await commanding.get("r", soon.id, ANN)).status == "proposed"
        again = (await commanding.give(OVERRIDE, BOT)).view
        await fill(opened, "r", 6, "finished")
        with pytest.raises(Conflict, match="has finished"):
            await commanding.judge("r", again.id, "approved", "agreed", ANN)

    with_run(case)


def test_a_proposal_ends_by_rejection_by_its_maker_or_by_time():
    async def case(opened, commanding):
        ids = [(await commanding.give(OVERRIDE._replace(expires_in_s=60), BOT)).view.id for _ in range(3)]
        rejected = await commanding.judge("r", ids[0], "rejected", "too early", ANN)
        assert (rejected.status, rejected.history[-1]["reason"]) == ("rejected", "too early")
        with pytest.raises(Denied, match="bot's"):
            await commanding.judge("r", ids[1], "withdrawn", "not mine", OTHER_BOT)
        assert (await commanding.judge("r", ids[1], "withdrawn", "a mistake", BOT)).status == "withdrawn"
        opened.late_us = 61_000_000
        with pytest.raises(NotFound):
            await commanding.judge("r", ids[2], "approved", "too late", ANN)
        assert (await commanding.get("r", ids[2], ANN)).status == "expired"
        assert (await opened.engine.find("r")).run.steering.proposals == ()

    with_run(case)


def test_a_proposal_in_another_project_does_not_exist():
    async def case(opened, commanding):
        asked = (await commanding.give(OVERRIDE, BOT)).view
        far = Caller("far", "operator", frozenset({"vision"}))
        for ask in (
            commanding.judge("r", asked.id, "approved", "agreed", far),
            commanding.get("r", asked.id, far),
            commanding.preview(OVERRIDE, far),
        ):
            with pytest.raises(NotFound, match="run 'r' is not known"):
                await ask

    with_run(case)


def asked_elsewhere(folder, approvals, role):
    """The export of a run with an open proposal, and its id."""
    path = folder / "elsewhere.yaml"
    path.write_text(f"vision: {{approvals: {approvals}}}")
    with flyball_server.running(auth=True, projects=str(path)) as service, client(service, "admin") as http:
        begun = {"run": "r", "project": "vision", "session": "s", "groups": [{"name": "g", "lr": 0.1}]}
        assert http.post("/v1/attach", json=begun).status_code == 200
        with client(service, role, "stranger") as asking:
            body = {"kind": "override", "factor": 0.5, "reason": "trust me"}
            given = asking.post("/v1/runs/vision:r/commands", json=body).json()
        assert given["status"] == "proposed"
        return http.get("/v1/runs/vision:r/export").content, given["id"]


def client(service, role, name="somebody"):
    token = service.new_token(role, None, name)
    return httpx.Client(base_url=service.http, headers={"Authorization": f"Bearer {token}"}, timeout=30)


@pytest.mark.parametrize(("approvals", "role"), [(1, "proposer"), (2, "operator")])
def test_an_imported_proposal_takes_as_many_people_of_this_service_as_any(tmp_path, approvals, role):
    data, proposal = asked_elsewhere(tmp_path, approvals, role)
    projects = tmp_path / "here.yaml"
    projects.write_text("vision: {approvals: 2}")
    with flyball_server.running(auth=True, projects=str(projects)) as service, contextlib.ExitStack() as clients:
        people = [clients.enter_context(client(service, "operator")) for _ in range(3)]
        assert people[0].post("/v1/import", content=data).json()["status"] == "imported"
        statuses = []
        for http in people[1:]:
            answer = http.post(
                f"/v1/runs/vision:r/proposals/{proposal}", json={"verdict": "approved", "reason": "agreed"}
            )
            assert answer.status_code == 200, answer.text
            statuses.append(answer.json()["status"])
        assert statuses == ["proposed", "accepted"]
        settings = people[0].get("/v1/runs/vision:r").json()["settings"]
        assert settings[0]["lr"] == 0.05
        again = tmp_path / "again.flyball"
        again.write_bytes(people[0].get("/v1/runs/vision:r/export").content)
        assert check(again).verdict.problem == ""


def test_whoever_made_a_token_is_no_second_person_beside_it(tmp_path):
    projects = tmp_path / "here.yaml"
    projects.write_text("two: {approvals: 2}")
    with flyball_server.running(auth=True, projects=str(projects)) as service, contextlib.ExitStack() as clients:

        def made_by(maker, role):
            answer = maker.post("/v1/tokens", json={"name": "made", "role": role, "projects": ["two"]})
            headers = {"Authorization": f"Bearer {answer.json()['secret']}"}
            return clients.enter_context(httpx.Client(base_url=service.http, headers=headers, timeout=30))

        ann, ben = (clients.enter_context(client(service, role, role)) for role in ("admin", "operator"))
        under = made_by(ann, "admin")
        sock = made_by(under, "operator")
        begun = {"run": "r", "project": "two", "session": "s", "groups": [{"name": "g", "lr": 0.1}]}
        assert ann.post("/v1/attach", json=begun).status_code == 200

        def approves(proposer, approver):
            body = {"kind": "override", "factor": 0.5, "reason": "why"}
            asked = proposer.post("/v1/runs/two:r/commands", json=body).json()
            body = {"verdict": "approved", "reason": "agreed"}
            return approver.post(f"/v1/runs/two:r/proposals/{asked['id']}", json=body)

        for proposer, approver in ((ann, under), (under, ann), (ann, sock), (sock, ann), (sock, under)):
            refused = approves(proposer, approver)
            assert refused.status_code == 403, refused.text
            assert "one made the token of the other" in refused.json()["detail"]
        assert approves(ann, ben).json()["status"] == "accepted"
        assert approves(sock, ben).json()["status"] == "accepted"
