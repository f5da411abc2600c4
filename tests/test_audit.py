"""Goal: whoever may, finds what was asked, done and refused, for one run or all, and nobody sees more than that.

Method: a real service over HTTP with tokens of several roles and projects, on both stores; runs spoken for by hand.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import time
from contextlib import closing

import httpx
import pytest
from tests.command_line import client_command, server_command
from tests.storage.making import append, chain, keep, observed, row, started
from tests.test_commands import Job

import flyball_server
from flyball_server.http_api.audit import cell
from flyball_server.storage import blocks, open_journal
from flyball_server.storage.journal import STORE
from flyball_server.verify import verify, verify_store


@pytest.fixture(params=["memory", "sqlite"])
def service(request, tmp_path):
    store = "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'f.db'}"
    with flyball_server.running(store=store, auth=True) as running:
        yield running


def client(service, role="admin", projects=None, name="ann"):
    headers = {"Authorization": f"Bearer {service.new_token(role, projects, name)}"}
    return httpx.Client(base_url=service.http, headers=headers, timeout=30)


def got(http, path, **parameters):
    answer = http.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_runs_journal_comes_in_pages_without_gaps_while_it_grows(service):
    with client(service) as http:
        job = Job(http, "r", policy={"type": "plateau", "patience": 0})
        for _ in range(7):
            job.report(3)
        rows, page = [], got(http, "/v1/runs/r/journal", limit=4)
        while page["next"] is not None:
            rows += page["rows"]
            job.report()  # it goes on meanwhile
            page = got(http, "/v1/runs/r/journal", limit=4, since=page["next"])
        rows += page["rows"]
        assert [one["seq"] for one in rows] == list(range(1, len(rows) + 1))
        assert page["through"] == len(rows)
        assert got(http, "/v1/runs/r/journal", since=page["through"])["rows"] == []
        job.report(end="finished")
        last = got(http, "/v1/runs/r/journal", since=page["through"])
        assert [one["kind"] for one in last["rows"]] == ["observed", "ended"]
        assert last["rows"][-1]["hash"] == got(http, "/v1/runs/r")["digest"]
        everything = http.get("/v1/runs/r/journal", params={"format": "jsonl"}).text.splitlines()
        assert [json.loads(line) for line in everything] == [
            {name: value for name, value in one.items() if name != "columns"} for one in [*rows, *last["rows"]]
        ]


def test_a_page_that_looked_through_enough_rows_says_how_far_it_came(service, monkeypatch):
    monkeypatch.setattr("flyball_server.limits.JOURNAL_LOOKED_MAX", 5)
    with client(service) as http:
        job = Job(http, "r")
        for _ in range(12):
            job.report()
        seen, since, pages = [], 0, 0
        while since is not None:
            page = got(http, "/v1/runs/r/journal", actor="nobody", since=since)
            seen, since, pages = seen + page["rows"], page["next"], pages + 1
        assert (seen, page["through"], pages) == ([], 14, 3)


def test_rows_are_filtered_by_kind_actor_attempt_and_time(service):
    with client(service) as http, client(service, "operator", name="bob") as other:
        job = Job(http, "r")
        job.report(3)
        Job(other, "r", resume=True, **{"session": "b"})
        job.command("note", reason="mine")
        found = got(http, "/v1/runs/r/journal", kind=["attached", "commanded"])["rows"]
        assert [(one["kind"], one["attempt"]) for one in found] == [("attached", 1), ("attached", 2), ("commanded", 0)]
        assert [one["seq"] for one in got(http, "/v1/runs/r/journal", attempt=1)["rows"]] == [2, 3]
        actors = {one["kind"]: one["actor"] for one in found}
        assert actors["attached"] != actors["commanded"]
        assert [r["seq"] for r in got(http, "/v1/runs/r/journal", actor=actors["attached"])["rows"]] == [4]
        at = found[1]["at"]
        assert [r["seq"] for r in got(http, "/v1/runs/r/journal", until=at)["rows"]] == [1, 2, 3]
        assert [r["seq"] for r in got(http, "/v1/runs/r/journal", **{"from": at})["rows"]] == [4, 5]
        for wrong in ({"kind": "spoken"}, {"from": "yesterday"}, {"until": "2027-01-01T00:00:00"}, {"limit": 0}):
            answer = http.get("/v1/runs/r/journal", params=wrong)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), wrong
        assert http.get("/v1/runs/unknown/journal").status_code == 404


def test_observations_are_summed_up_and_shown_in_full_where_asked(service):
    with client(service) as http:
        job = Job(http, "r", policy={"type": "constant"})
        job.report(3, loss="NaN")
        http.post("/v1/runs/r/signals", json={"signals": {"val_loss": 0.5}})
        *_, row_, side = got(http, "/v1/runs/r/journal")["rows"]
        assert row_["summary"] == {"observations": 3, "signals": ["loss"], "changes": 1, "marks": 0, "asks": 0}
        assert row_["columns"] is None
        assert (side["summary"], side["text"]) == ({"signals": {"val_loss": 0.5}}, "val_loss 0.5")
        row_ = got(http, "/v1/runs/r/journal", columns=True, kind="observed")["rows"][0]
        assert row_["columns"]["loss"] == ["NaN"] * 3
        assert row_["columns"]["=lr"] == [0.1, 0.01]


def test_rare_rows_of_a_long_run_are_found_without_unpacking_its_observations(tmp_path, monkeypatch):
    journal = open_journal(f"sqlite:///{tmp_path / 'f.db'}")
    rows = [row("created", attempt=0), *observed(3000, 16), row("commanded"), *observed(3000, 16), row("reported")]
    rows = chain("r", [*rows, *observed(3000, 16)])
    with started(journal) as (opened, results):
        assert keep(opened, results, append("r", rows)) == [None]
        opened.compact("r")
        hashed = []
        real = blocks.chained
        monkeypatch.setattr(blocks, "chained", lambda *given: hashed.append(1) or real(*given))
        assert list(opened.rows("r", kinds=frozenset({"commanded"}))) == [rows[3001]]
        assert hashed == []
        assert list(opened.rows("r", kinds=frozenset({"reported"}))) == [rows[6002]]
        assert 0 < len(hashed) <= 4096


def test_the_audit_tells_of_all_runs_newest_first_and_pages_stay_in_place(service):
    with client(service) as http:
        for name in ("a", "b", "c"):
            job = Job(http, name, project="vision" if name != "c" else "nlp")
            job.run = f"{'vision' if name != 'c' else 'nlp'}:{name}"
            job.report()
            job.command("override", value=0.02, reason=f"for {name}")
            job.report()
            job.report()
            job.report(end="finished")
        http.delete("/v1/runs/vision:a", params={"reason": "no use"})
        assert httpx.get(f"{service.http}/v1/runs", headers={"Authorization": "Bearer fb_wrong"}).status_code == 401
        while not got(http, "/v1/audit", kind="refused")["entries"]:
            time.sleep(0.05)  # what was refused comes to the record by itself
        whole = got(http, "/v1/audit", limit=1000)["entries"]
        assert sorted(whole, key=lambda one: one["at"], reverse=True) == whole
        kinds = {"token_created", "deleted", "created", "attached", "commanded", "command_moved", "ended", "refused"}
        assert {one["kind"] for one in whole} == kinds
        assert not [one for one in whole if one["run"] == "vision:a" and one["kind"] != "deleted"]
        assert "sha256" not in json.dumps(whole)
        first = got(http, "/v1/audit", limit=5)
        Job(http, "late")
        rest = got(http, "/v1/audit", limit=1000, cursor=first["cursor"])
        assert first["entries"] + rest["entries"] == whole
        assert rest["cursor"] is None
        (note,) = got(http, "/v1/audit", kind="commanded", project="nlp")["entries"]
        assert (note["run"], note["text"]) == ("nlp:c", "override of lr of all groups: 0.02, accepted: for c")
        assert [one["kind"] for one in got(http, "/v1/audit", run="nlp:c", kind=["ended", "created"])["entries"]] == [
            "ended",
            "created",
        ]
        lines = http.get("/v1/audit", params={"format": "jsonl", "until": whole[0]["at"]}).text.splitlines()
        assert [json.loads(line) for line in lines] == whole[1:]
        assert http.get("/v1/audit", params={"cursor": "1~x~y"}).status_code == 422


def test_nobody_sees_more_of_the_audit_than_their_projects_and_role(service):
    with client(service) as admin:
        for project in ("vision", "nlp"):
            Job(admin, "kept", project=project)
            job = Job(admin, "gone", project=project)
            job.run = f"{project}:gone"
            job.report(end="finished")
            admin.delete(f"/v1/runs/{project}:gone", params={"reason": "no use"})
        with client(service, "viewer", ["vision"], "vi") as viewer, client(service, "viewer", None, "all") as all_:
            seen = got(viewer, "/v1/audit")["entries"]
            assert {one["project"] for one in seen} == {"vision"}
            assert {one["kind"] for one in seen} == {"created", "attached", "deleted"}
            for path in ("/v1/audit?project=nlp", "/v1/audit?run=nlp:kept", "/v1/runs/nlp:kept/journal"):
                assert viewer.get(path).status_code == 404, path
            assert "nlp" not in viewer.get("/v1/audit?format=csv").text
            seen = got(all_, "/v1/audit")["entries"]
            assert {one["project"] for one in seen} == {"vision", "nlp"}
            assert not [one for one in seen if one["kind"].startswith("token")]
            assert viewer.get("/v1/webhooks/deliveries").status_code == 403
        with client(service, "admin", ["vision"], "va") as scoped:
            assert {one["project"] for one in got(scoped, "/v1/audit")["entries"]} == {"vision"}
            assert scoped.get("/v1/webhooks/deliveries").status_code == 403


def test_an_import_is_on_record_and_its_rows_are_marked_as_what_somebody_else_said(service):
    with flyball_server.running() as elsewhere, httpx.Client(base_url=elsewhere.http, timeout=30) as http:
        job = Job(http, "r", project="vision")
        job.run = "vision:r"
        job.report()
        job.command("override", value=0.02, reason="nobody here said that")
        data = http.get("/v1/runs/vision:r/export").content
    with client(service, "operator", ["vision"], "ivy") as ivy, client(service, "viewer", ["vision"], "vi") as viewer:
        found = ivy.post("/v1/import", content=data).json()
        assert ivy.post("/v1/import", content=data).json()["status"] == "unchanged"
        ivy.post("/v1/runs/vision:r/commands", json={"kind": "note", "reason": "mine"})
        with client(service, "viewer", ["nlp"], "other") as other:
            assert got(other, "/v1/audit")["entries"] == []
        seen = got(viewer, "/v1/audit")["entries"]
        (brought,) = [one for one in seen if one["kind"] == "imported"]
        assert (brought["actor"].endswith(" ivy"), brought["run"], brought["store"]) == (True, "vision:r", True)
        assert brought["text"] == f"run vision:r imported, 4 rows, signed by {found['signer']}"
        assert brought["meta"] == {"run": "vision:r", "project": "vision", "rows": 4, "digest": found["digest"],
                                   "signer": found["signer"]}  # fmt: skip
        marked = {one["seq"]: one["imported"] for one in seen if not one["store"]}
        assert marked == {1: found["signer"], 2: found["signer"], 4: found["signer"], 5: None}
        assert found["signer"] in viewer.get("/v1/audit?format=csv").text


def test_freezes_canaries_and_fleets_are_on_record_in_words(service):
    with client(service) as http:
        for name in ("a", "b"):
            Job(http, name, project="vision", labels={"n": "x" * 9})
        for path, body in (
            ("fleet/commands", {"selector": "project=vision", "command": {"kind": "note", "reason": "all of them"}}),
            ("canaries", {"selector": "project=vision", "share": 0.5, "reason": "try", "policy": "constant"}),
            ("freeze", {"project": "vision", "reason": "an incident"}),
            ("thaw", {"project": "vision", "reason": "over"}),
        ):
            answer = http.post(f"/v1/{path}", json=body)
            assert answer.is_success, answer.text
        said = {one["kind"]: one["text"] for one in got(http, "/v1/audit", limit=1000)["entries"]}
        assert said["fleet"] == "note for the 2 runs of project=vision: all of them"
        assert said["canary"] == "canary of switch_policy on 50 % of the 2 runs of project=vision: try"
        assert (said["frozen"], said["thawed"]) == ("project vision frozen: an incident", "project vision thawed: over")


def test_a_table_holds_no_formulas(service):
    with client(service) as http:
        job = Job(http, "r")
        job.command("note", reason='=HYPERLINK("http://x")')
        http.post("/v1/runs/r/signals", json={"signals": {"+1": 1.0}})
        for path in ("/v1/audit", "/v1/runs/r/journal"):
            table = list(csv.DictReader(io.StringIO(http.get(path, params={"format": "csv"}).text)))
            assert len(table) >= 3
            assert all(not value.startswith(("=", "+", "-", "@")) for one in table for value in one.values())
    for text in ("=1+1", "+1", "-1", "@sum", "\t=1", "  =1", "\r=1"):
        assert cell(text) == "'" + text
    assert [cell(one) for one in (-1, True, None, "a=1", {"a": 1})] == [-1, True, "", "a=1", '{"a": 1}']


def test_a_damaged_run_is_read_up_to_the_damage(tmp_path):
    path = tmp_path / "f.db"
    with flyball_server.running(store=f"sqlite:///{path}") as service, httpx.Client(base_url=service.http) as http:
        job = Job(http, "r")
        for _ in range(6):
            job.report()
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE journal SET payload = X'00' WHERE run = 'r' AND seq = 5")
        page = got(http, "/v1/runs/r/journal")
        assert ([one["seq"] for one in page["rows"]], page["next"]) == ([1, 2, 3, 4], None)
        assert "row 5 is damaged" in page["problem"]
        streamed = http.get("/v1/runs/r/journal", params={"format": "csv"}).text
        assert "row 5 is damaged" in streamed.splitlines()[-1]
        kinds = got(http, "/v1/runs/r/journal", kind="attached")
        assert [one["seq"] for one in kinds["rows"]] == [2]


def test_what_is_noted_is_verified_and_made_again_by_compacting(tmp_path):
    path = tmp_path / "f.db"
    store = f"sqlite:///{path}"
    with flyball_server.running(store=store, auth=True) as service, client(service) as http:
        job = Job(http, "r")
        job.report()
        job.command("note", reason="the truth")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE audit SET meta = replace(meta, 'truth', 'fibs!') WHERE kind = 'commanded'")
        db.execute("DELETE FROM audit WHERE kind = 'token_created'")
        db.execute("INSERT INTO audit SELECT 'ghost', seq, project, kind, attempt, first_step, last_step, actor, at, "
                   "meta, hash FROM audit WHERE seq = 2 AND run = 'r'")  # fmt: skip
    journal = open_journal(store, read_only=True)
    journal.start(lambda _: None)
    try:
        assert "row 4: what is noted of it differs" in verify(journal, "r").problem
        assert "no such run" in verify(journal, "ghost").problem
        assert any(f"{STORE}" in words or "store's journal" in words for words in verify_store(journal))
    finally:
        journal.close()
    for words, code in ((["verify"], 1), (["compact"], 0), (["verify"], 0)):
        done = server_command(*words, "--store", store)
        assert done.returncode == code, (words, done.stdout, done.stderr)


def test_the_record_on_the_command_line(tmp_path):
    with flyball_server.running(auth=True) as service, client(service) as http:
        job = Job(http, "r", policy={"type": "plateau", "patience": 0})
        job.report(3)
        job.command("override", value=0.02, reason="too high")
        job.report(end="finished")
        token = http.headers["Authorization"].removeprefix("Bearer ")

        def said(*words, code=0):
            done = client_command(*words, "--server", service.http, "--token", token)
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        header, *lines = said("journal", "r", "--since", "1").splitlines()
        assert header.split() == ["row", "at", "kind", "attempt", "steps", "actor", "what"]
        assert [line.split()[0] for line in lines] == ["2", "3", "4", "5", "6"]
        assert lines[1].split()[4] == "0..2"
        assert "override of lr of all groups: 0.02, accepted: too high" in lines[2]
        (row_,) = json.loads(said("journal", "r", "--kind", "commanded", "--json"))
        assert row_["meta"]["reason"] == "too high"
        table = list(csv.DictReader(said("journal", "r", "--csv", "--actor", row_["actor"]).splitlines()))
        assert [one["seq"] for one in table] == ["1", "2", "3", "4", "5", "6"]
        assert "ended, finished" in said("audit", "--run", "r").splitlines()[1]
        assert [one["kind"] for one in json.loads(said("audit", "--kind", "token_created", "--json"))]
        assert len(said("audit", "--csv", "--run", "r").splitlines()) == 5
        more = client_command("audit", "--limit", "1", "--server", service.http, "--token", token)
        assert "more than 1" in more.stderr
        assert "not known" in said("journal", "unknown", code=1)
        http.get("/v1/runs/r/export")
        (heads,) = map(json.loads, said("heads").splitlines())
        assert heads["heads"]["runs"][0][:2] == ["r", 6]
        assert said("deliveries").split()[:3] == ["at", "hook", "event"]
