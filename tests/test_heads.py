"""Goal: whoever shortens or rewrites what was signed is found out off-line, with the place, by the public key alone.

Method: a real service signs; its store is then changed past it, hash chains and all, and `verify --heads` is asked.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing

import httpx
import pytest
from tests.command_line import server_command
from tests.storage.making import chain
from tests.test_audit import client, got
from tests.test_commands import Job

import flyball_server
from flyball_server.storage import open_journal
from flyball_server.storage.blocks import store as stored
from flyball_server.storage.journal import STORE
from flyball_server.verify import verify_store

EVERY_S = 0.1


def signed(http, **newest):
    """Wait until the newest rows of these runs are signed; all lists then."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        lists = got(http, "/v1/heads", since=0)["heads"]
        found = {(run, seq) for one in lists for run, seq, _ in one["heads"]["runs"]}
        if newest.items() <= found:
            return lists
        time.sleep(0.05)
    raise AssertionError(f"{newest} not in {found}")


def exported(http, run):
    """The run's export; its head is signed for it."""
    answer = http.get(f"/v1/runs/{run}/export")
    assert answer.status_code == 200
    return answer.content


@pytest.fixture
def world(tmp_path):
    """A stopped store with two runs whose heads were signed at rows 3, 6, 7 and 2, 4; the lists, the key, an export."""
    store = f"sqlite:///{tmp_path / 'f.db'}"
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http) as http:
        job, other = Job(http, "r"), Job(http, "other")
        job.report()
        exported(http, "r")
        exported(http, "other")
        for _ in range(3):
            job.report()
        (tmp_path / "r.flyball").write_bytes(exported(http, "r"))
        job.report()
        exported(http, "r")
        other.report(end="finished")
        exported(http, "other")
        exported(http, "other")
        (tmp_path / "key.pem").write_text(got(http, "/v1/signing-key")["public_key"])
        (tmp_path / "heads.json").write_text(http.get("/v1/heads", params={"since": 0}).text)
    return tmp_path


def verified(world, *words, heads="heads.json", code=0):
    """What `verify --heads` says."""
    if not words:
        words = ("--store", "sqlite:///f.db")
    done = server_command("verify", "--heads", heads, "--public-key", "key.pem", *words, folder=world)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def rewritten(world, run, change, keep=None):
    """The run's rows written anew by somebody who knows how: every hash, and the record, follow."""
    with closing(sqlite3.connect(world / "f.db")) as db, db:
        journal = open_journal(f"sqlite:///{world / 'f.db'}", read_only=True)
        journal.start(lambda _: None)
        rows = chain(run, [change(row) for row in journal.rows(run)][:keep])
        journal.close()
        db.execute("DELETE FROM journal WHERE run = ?", (run,))
        for row in rows:
            marks = ", ".join("?" * 11)
            db.execute(f"INSERT INTO journal VALUES ({marks})", (run, *stored(row)))
        last = rows[-1]
        db.execute(
            "UPDATE runs SET seq = ?, hash = ?, updated_at = ? WHERE run = ?", (last.seq, last.hash, last.at, run)
        )
        db.execute("DELETE FROM snapshots WHERE run = ?", (run,))


def test_what_was_signed_is_still_there(world):
    said = verified(world)
    assert "r: 3 signed heads: as signed" in said
    assert "other: 2 signed heads: as signed" in said
    assert "the store's journal: " in said
    lines = [json.loads(line) for line in verified(world, "--store", "sqlite:///f.db", "--json").splitlines()]
    assert {one["run"]: one["problem"] for one in lines} == {"r": "", "other": "", STORE: ""}
    journal = open_journal(f"sqlite:///{world / 'f.db'}", read_only=True)
    journal.start(lambda _: None)
    assert verify_store(journal) == []
    journal.close()


def test_a_run_cut_short_is_found(world):
    rewritten(world, "r", lambda row: row, keep=5)
    assert "r: 3 signed heads: row 6 is missing, which was signed at" in verified(world, code=1)
    assert "the journal ends with row 5" in verified(world, code=1)


def test_a_run_written_anew_with_all_its_hashes_is_found_between_two_heads(world):
    rewritten(world, "r", lambda row: row._replace(actor="somebody else") if row.seq == 5 else row)
    said = verified(world, code=1)
    assert "row 6 has another hash than was signed" in said
    assert "something in rows 4 to 6 was written anew" in said
    assert "other: 2 signed heads: as signed" in said


def test_a_changed_row_is_found_though_its_hash_was_left_alone(world):
    with closing(sqlite3.connect(world / "f.db")) as db, db:
        db.execute("UPDATE journal SET actor = 'somebody else' WHERE run = 'r' AND seq = 5")
    said = verified(world, code=1)
    assert "row 5 is damaged: its hash is not that of its contents; up to row 3 all is as signed" in said
    assert "missing" not in said, "what lies behind it is there"


def test_the_stores_own_journal_is_signed_as_well(world):
    rewritten_store = world / "f.db"
    with closing(sqlite3.connect(rewritten_store)) as db, db:
        seqs = [seq for (seq,) in db.execute("SELECT seq FROM journal WHERE run = ? ORDER BY seq", (STORE,))]
        db.execute("DELETE FROM journal WHERE run = ? AND seq >= ?", (STORE, seqs[1]))
    assert "the store's journal: " in verified(world, code=1)
    assert "row 2 is missing" in verified(world, code=1)


def test_a_deleted_run_is_told_apart_from_a_lost_one(world):
    with (
        flyball_server.running(store=f"sqlite:///{world / 'f.db'}") as service,
        httpx.Client(base_url=service.http) as http,
    ):
        assert http.delete("/v1/runs/other", params={"reason": "no use"}).status_code == 200
    assert "other: 2 signed heads: deleted: row " in verified(world)


def test_lists_that_were_changed_left_out_or_signed_by_another_are_refused(world):
    lists = json.loads((world / "heads.json").read_text())["heads"]
    numbers = [one["heads"]["number"] for one in lists]
    assert numbers == list(range(1, len(lists) + 1))
    assert len(lists) == 5, "what has not moved is not signed again"

    def saying(name, entries):
        (world / name).write_text("\n".join(json.dumps(one) for one in entries))
        return verified(world, heads=name, code=1)

    for name, value in (("seq", 99), ("seq", True), ("project", "vision"), ("at", "2020-01-01T00:00:00Z")):
        assert f"list 1: '{name}' is {value!r}, but" in saying("around.jsonl", [{**lists[0], name: value}])
    assert "r: 3 signed heads" in verified(world, heads="heads.json")
    assert "one in between is missing" in saying("gap.jsonl", [lists[0], *lists[2:]])
    lists[1]["heads"]["runs"][0][1] += 1
    assert "list 2: the signature is not that of the key" in saying("changed.jsonl", lists)
    lists[1]["key"] = "00" * 32
    assert "not by the key given" in saying("other.jsonl", lists)
    assert "no signed list" in saying("none.jsonl", [{"heads": {}}])


def test_an_export_holds_the_heads_signed_before_it(world):
    said = verified(world, "r.flyball")
    assert "r: 2 signed heads: 1 heads are newer than the file, which ends with row 6" in said
    # Somebody who has the key of the service exports a shortened run as if it were all there was.
    rewritten(world, "r", lambda row: row._replace(actor="x") if row.seq == 2 else row)
    with (
        flyball_server.running(store=f"sqlite:///{world / 'f.db'}") as service,
        httpx.Client(base_url=service.http) as http,
    ):
        (world / "forged.flyball").write_bytes(http.get("/v1/runs/r/export").content)
    assert "row 3 has another hash than was signed" in verified(world, "forged.flyball", code=1)


def test_what_proves_nothing_is_no_good_news(world):
    for name, text in (("empty", ""), ("none", '{"heads": [], "next": null}')):
        (world / name).write_text(text)
        assert "holds no signed heads, so nothing is proved" in verified(world, heads=name, code=1)
    lists = json.loads((world / "heads.json").read_text())["heads"]
    (world / "other").write_text(json.dumps(next(one for one in lists if one["heads"]["runs"][0][0] == "other")))
    said = verified(world, "r.flyball", heads="other", code=1)
    assert "r: 0 signed heads: nothing is proved: none of the heads is of this run" in said
    newest = [one for one in lists if one["heads"]["runs"][0][:2] == ["r", 7]]
    (world / "newer").write_text(json.dumps(newest[0]))
    assert "nothing is proved: 1 heads are newer than the file" in verified(world, "r.flyball", heads="newer", code=1)
    in_store = ("--store", "sqlite:///f.db")
    assert verified(world, "r", *in_store) == "r: 3 signed heads: as signed\n", "what is asked for only"
    assert "nobody: 0 signed heads: nothing is proved" in verified(world, "r", "nobody", *in_store, code=1)


def test_a_file_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss\n")
    for name, words in (
        ("nope.flyball", "nope.flyball does not exist"),
        ("steps.csv", "steps.csv is no export file"),
        ("other.csv", "other.csv does not exist"),
    ):
        done = server_command("verify", name, folder=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr


def test_lists_go_on_after_a_restart_and_only_what_moved_is_signed_again(world):
    store = f"sqlite:///{world / 'f.db'}"
    before = json.loads((world / "heads.json").read_text())["heads"]
    with (
        flyball_server.running(store=store, heads_every_s=EVERY_S) as service,
        httpx.Client(base_url=service.http) as http,
    ):
        time.sleep(3 * EVERY_S)
        assert got(http, "/v1/heads", since=0)["heads"] == before
        body = {"run": "r", "session": "again", "groups": [{"name": "body", "lr": 0.1}, {"name": "head", "lr": 0.01}]}
        http.post("/v1/attach", json={**body, "resume": True})
        lists = signed(http, r=8)
        assert [one[0] for one in lists[-1]["heads"]["runs"]] == ["r"]
        (world / "heads.json").write_text(json.dumps({"heads": lists}))
        assert got(http, "/v1/heads", limit=1)["heads"] == lists[-1:]
        page = got(http, "/v1/heads", since=0, limit=2)
        assert got(http, "/v1/heads", since=page["next"])["heads"] == lists[2:]
    assert "r: 4 signed heads: as signed" in verified(world)


def test_each_project_has_lists_of_its_own_that_others_do_not_see():
    with flyball_server.running(auth=True, heads_every_s=EVERY_S) as service, client(service) as admin:
        for project in ("vision", "nlp"):
            Job(admin, "r", project=project)
        lists = signed(admin, **{"vision:r": 2, "nlp:r": 2})
        assert {one["project"] for one in lists} == {"vision", "nlp"}
        assert all(run.startswith(one["project"]) for one in lists for run, _, _ in one["heads"]["runs"])
        with client(service, "viewer", ["nlp"], "v") as viewer:
            mine = got(viewer, "/v1/heads", since=0)["heads"]
            assert mine == [one for one in lists if one["project"] == "nlp"]
            assert viewer.get("/v1/heads", params={"project": "vision"}).status_code == 404
