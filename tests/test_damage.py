"""Goal: damage anywhere in a store is found, named by run and row, and keeps only that run from being written to.

Method: a real SQLite file with several runs, snapshots, segments and a tombstone; one thing in a copy is changed past
the service. Then `verify` is asked, the engine loads every run, its scrub ends, and each run is reported to again.
"""

import asyncio
import json
import logging
import random
import sqlite3
import time
from contextlib import closing

import httpx
import pytest
import torch
from tests.callers import ANYBODY, caller
from tests.e2e.processes import free_port
from tests.storage import stores
from tests.storage.stores import BATCH, BATCHES, RUNS, Opened, copied, make_store, report_message

import flyball
import flyball_server
from flyball_server import limits
from flyball_server.core.errors import Damaged, NotFound
from flyball_server.exports.exchange import Exchange
from flyball_server.messages import WhatIfRequest
from flyball_server.signing import new_signer
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE
from flyball_server.verify import names, verify, verify_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield make_store(tmp_path_factory.mktemp("damage") / "whole.db", patch)


def changed(path, *statements):
    """The store after each statement, which must touch something."""
    with closing(sqlite3.connect(path)) as db:
        for words, values in statements:
            assert db.execute(words, values).rowcount > 0
        db.commit()


def flipped(path, table, column, where, place):
    """One bit of one value, of whatever type it is."""
    with closing(sqlite3.connect(path)) as db:
        rowid, value = db.execute(f"SELECT rowid, {column} FROM {table} WHERE {where}").fetchall()[-1]
        if isinstance(value, int):
            value ^= 1 << (int(place * 40))
        else:
            data = bytearray(value if isinstance(value, bytes) else value.encode())
            data[int(place * len(data))] ^= 1
            value = bytes(data) if isinstance(value, bytes) else data.decode()
        db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rowid))
        db.commit()


def looked_at(path):
    """What `verify` finds: run -> words, and the store's own lines."""
    journal = open_journal(f"sqlite:///{path}", read_only=True)
    journal.start(lambda _: None)
    try:
        found = {run: verify(journal, run).problem for run in names(journal)}
        return {run: words for run, words in found.items() if words}, verify_store(journal)
    finally:
        journal.close()


def test_what_needs_all_of_a_damaged_run_is_refused(whole, tmp_path):
    path = copied(whole, tmp_path)
    flipped(path, "journal", "payload", "run = 'hit' AND last_seq = seq", 0.9)

    async def main():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            service = opened.service
            exchange = Exchange(opened.engine, opened.journal, new_signer(), "1")
            for run, asked in (("left", False), ("hit", True)):
                for call in (
                    lambda run=run: service.lineage(run, ANYBODY),
                    lambda run=run: service.what_if(
                        WhatIfRequest(run, {"type": "constant"}, None, {}, None, None), ANYBODY, points=9, limit=0
                    ),
                    lambda run=run: exchange.table(run, None, ANYBODY),
                ):
                    if not asked:
                        await call()
                        continue
                    with pytest.raises(Damaged, match=f"run '{run}', row"):
                        await call()

    asyncio.run(main())


def test_a_row_missing_before_the_snapshot_is_missed_before_anything_is_written(whole, tmp_path):
    path = copied(whole, tmp_path)
    with closing(sqlite3.connect(path)) as db:
        at = db.execute("SELECT max(seq) FROM snapshots WHERE run = 'hit'").fetchone()[0]
        assert db.execute("DELETE FROM journal WHERE run = 'hit' AND last_seq = ?", (at - 1,)).rowcount == 1
        db.commit()

    async def main():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            with pytest.raises(Damaged, match=f"row {at - 1} is missing"):
                await opened.service.attach(stores.attach_message("hit", "s2", resume=True, policy={}), ANYBODY)

    asyncio.run(main())


def test_labels_that_make_no_sense_keep_a_run_neither_from_being_deleted_nor_the_store_from_compacting(whole, tmp_path):
    path = copied(whole, tmp_path)
    changed(path, ("UPDATE runs SET labels = '{bad' WHERE run = 'hit'", ()))

    async def main():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            await asyncio.to_thread(opened.journal.compact, "hit")
            await opened.service.delete_run("hit", "no use", caller("tester"))
            assert opened.journal.record("hit").status == "deleted"

    asyncio.run(main())


async def scrubbed(opened):
    """All runs are loaded, as far as that goes, and the scrub is done."""
    for run in RUNS:
        try:
            await opened.engine.find(run)
        except Damaged:
            continue
    if opened.engine._scrub._task is not None:
        await opened.engine._scrub._task


async def written_to(path):
    """run -> the refusal of one more report, or None."""
    out = {}
    async with Opened(open_journal(f"sqlite:///{path}")) as opened:
        await scrubbed(opened)
        for run in RUNS:
            try:
                out[run] = None
                assert (await opened.service.report(report_message(run, BATCHES), ANYBODY)).through == (
                    BATCHES + 1
                ) * BATCH - 1
            except Damaged as error:
                out[run] = str(error)
    return out


SEGMENT, SINGLES = "run = 'hit' AND last_seq > seq", "run = 'hit' AND last_seq = seq"
COLUMNS = ("seq", "last_seq", "kind", "attempt", "first_step", "last_step", "actor", "at", "payload", "hash")
RECORD = ("project", "name", "status", "policy", "attempt", "step", "created_at", "updated_at", "seq", "hash", "labels")
PLACES = [
    *(("journal", column, SINGLES) for column in COLUMNS),
    *(("journal", column, SEGMENT) for column in COLUMNS),
    *(("runs", column, "run = 'hit'") for column in RECORD),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(place[:2]) + " >"[place[2] is SEGMENT])
def test_a_flipped_bit_is_named_and_keeps_only_its_run_from_being_written(whole, tmp_path, place):
    path = copied(whole, tmp_path)
    flipped(path, *place, random.Random(str(place)).random())
    refused = asyncio.run(written_to(copied(path, tmp_path, "engine.db")))
    assert {run for run, words in refused.items() if words} == {"hit"}
    assert "'hit'" in refused["hit"]
    assert "row" in refused["hit"]
    found, _ = looked_at(path)
    assert set(found) == {"hit"}
    assert "row" in found["hit"] or "record" in found["hit"]


@pytest.mark.parametrize("which", [SEGMENT, SINGLES, "run = 'hit' AND seq = 13", "run = 'hit'"])
def test_missing_rows_are_named(whole, tmp_path, which):
    path = copied(whole, tmp_path)
    changed(path, (f"DELETE FROM journal WHERE {which}", ()))
    found, _ = looked_at(path)
    assert set(found) == {"hit"}
    assert "is missing" in found["hit"]
    refused = asyncio.run(written_to(path))
    assert {run for run, words in refused.items() if words} == {"hit"}
    assert "is missing" in refused["hit"]


def test_rows_without_a_record_and_a_record_without_rows_are_damage(whole, tmp_path):
    path = copied(whole, tmp_path)
    changed(path, ("UPDATE runs SET run = 'other' WHERE run = 'hit'", ()))
    found, lines = looked_at(path)
    assert set(found) == {"hit", "other"}
    assert any("'hit'" in line for line in lines), "its labels belong to nobody"

    async def ask():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            for run in ("hit", "other"):
                with pytest.raises(Damaged, match=repr(run)):
                    await opened.service.attach(stores.attach_message(run), ANYBODY)
            with pytest.raises(NotFound):
                await opened.service.get_run("never", ANYBODY)

    asyncio.run(ask())


def test_labels_and_tombstones_are_the_stores_own_lines(whole, tmp_path):
    path = copied(whole, tmp_path)
    changed(path, ("UPDATE labels SET value = 'x' WHERE run = 'hit'", ()))
    assert looked_at(path) == ({}, ["run 'hit': the table of labels differs from its record"])
    for i, words in enumerate(
        (
            "UPDATE journal SET at = at + 1 WHERE run = '#store'",
            "DELETE FROM journal WHERE run = '#store'",
            "UPDATE runs SET status = 'finished' WHERE run = 'gone'",
            "UPDATE runs SET hash = zeroblob(32) WHERE run = 'gone'",
            "UPDATE runs SET created_at = created_at + 1 WHERE run = 'gone'",
        )
    ):
        path = copied(whole, tmp_path, f"{i}.db")
        changed(path, (words, ()))
        found, lines = looked_at(path)
        assert any("gone" in words or STORE in words for words in [*found, *lines]), words


def answers(path):
    """Everything the service says about the runs, and what it decides next."""

    async def ask():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            views = {run: await opened.service.get_run(run, ANYBODY) for run in RUNS}
            told = [(view.record, view.status, view.run, view.reason) for view in views.values()]
            again = [await opened.service.report(report_message(run, BATCHES), ANYBODY) for run in RUNS]
            return told, [(advice.through, list(advice.changes), advice.reason) for advice in again]

    return asyncio.run(ask())


def test_without_snapshots_everything_is_the_same(whole, tmp_path):
    path = copied(whole, tmp_path)
    expected = answers(copied(whole, tmp_path, "whole.db"))
    changed(path, ("DELETE FROM snapshots", ()))
    assert answers(path) == expected


@pytest.mark.parametrize(
    "words",
    [
        "state = zeroblob(40)",
        "state = substr(state, 1, 60)",
        "attempt = attempt + 1",
        "step = NULL",
        "state = 'text'",
        "state = (SELECT state FROM snapshots s WHERE s.run = 'left' ORDER BY seq LIMIT 1)",
    ],
)
def test_a_damaged_snapshot_is_passed_over_with_a_line_and_found_by_verify(whole, tmp_path, words, caplog):
    path = copied(whole, tmp_path)
    expected = answers(copied(whole, tmp_path, "whole.db"))
    newest = "seq = (SELECT max(seq) FROM snapshots s WHERE s.run = 'hit')"
    changed(path, (f"UPDATE snapshots SET {words} WHERE run = 'hit' AND {newest}", ()))
    found, _ = looked_at(path)
    assert set(found) == {"hit"}
    assert "snapshot" in found["hit"]
    with caplog.at_level(logging.WARNING):
        assert answers(path) == expected
    assert "'hit': the snapshot at row" in caplog.text


def test_a_snapshot_that_the_fold_would_not_give_is_found_by_verify(whole, tmp_path):
    """Well-formed, of the right row, and wrong."""
    from flyball_server.storage.packing import seal, unseal

    path = copied(whole, tmp_path)
    with closing(sqlite3.connect(path)) as db:
        seq, state = db.execute("SELECT max(seq), state FROM snapshots WHERE run = 'hit'").fetchone()
        data = json.loads(unseal(state))
        data["last"]["loss"] = "0.125"
        forged = seal([json.dumps(data).encode()])
    changed(path, ("UPDATE snapshots SET state = ? WHERE run = 'hit' AND seq = ?", (forged, seq)))
    assert looked_at(path)[0] == {
        "hit": f"the snapshot at row {seq} differs from the fold: it is a cache; nothing is lost with it"
    }


def test_what_can_be_read_of_a_damaged_run_is_and_it_works_again_once_restored(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "DAMAGE_RECHECK_S", 0.05)
    monkeypatch.setattr(limits, "DAMAGE_RECHECK_SHARE", 0)
    path = copied(whole, tmp_path)
    newest = "run = 'hit' AND seq = (SELECT max(seq) FROM journal WHERE run = 'hit')"
    flipped(path, "journal", "at", newest, 0.1)
    with closing(sqlite3.connect(whole)) as db:
        (right,) = db.execute(f"SELECT at FROM journal WHERE {newest}").fetchone()
    with flyball_server.running(store=f"sqlite:///{path}") as service, httpx.Client(base_url=service.http) as http:
        detail = http.get("/v1/runs/hit").json()
        assert detail["status"] == "damaged"
        assert "'hit', row" in detail["problem"]
        assert detail["observations"] == (BATCHES - 1) * BATCH
        listed = {run["run"]: run["status"] for run in http.get("/v1/runs").json()["runs"]}
        assert listed["hit"] == "damaged"
        assert "damaged" not in (listed["left"], listed["right"])
        series = http.get("/v1/runs/hit/series").json()
        assert len(series["series"]["loss"]["step"]) >= (BATCHES - 1) * BATCH
        assert series["problem"] == detail["problem"]
        assert http.get("/v1/runs/hit/decisions").json()["decisions"]
        assert list(http.get("/v1/store").json()["damaged"]) == ["hit"]
        assert http.get("/v1/store").json()["damaged"] == {"hit": detail["problem"]}
        body = {"session": "s1", "attempt": 1, "step": [BATCH * BATCHES], "signals": {"loss": [1.0]}}
        refused = http.post("/v1/runs/hit/report", json=body)
        assert (refused.status_code, refused.json()["code"]) == (500, "damaged")
        assert "'hit', row" in refused.json()["detail"]
        assert http.post("/v1/runs/left/report", json=body).status_code == 200
        changed(path, (f"UPDATE journal SET at = ? WHERE {newest}", (right,)))
        for _ in range(100):
            answer = http.post("/v1/runs/hit/report", json=body)
            if answer.status_code == 200:
                break
        assert answer.status_code == 200, answer.text
        assert http.get("/v1/runs/hit").json()["problem"] == ""
        assert http.get("/v1/store").json()["damaged"] == {}


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_training_job_whose_run_is_damaged_goes_on_and_loses_nothing(tmp_path, monkeypatch, transport):
    monkeypatch.setattr(limits, "DAMAGE_RECHECK_S", 0.05)
    path, ports = tmp_path / "f.db", {name: f"127.0.0.1:{free_port()}" for name in ("http", "grpc")}
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    service = flyball_server.running(store=f"sqlite:///{path}", **ports)
    with service, flyball.attach(optimizer, run="r", server=getattr(service, transport)) as governor:

        def train(until, pause_s=0.0):
            for _ in range(400):
                optimizer.step()
                governor.step(1.0)
                if until():
                    return
                time.sleep(pause_s or 0.005)
            raise AssertionError(governor.status)

        train(lambda: governor.status.state == "steering")
        service.stop()
        changed(path, ("UPDATE journal SET actor = actor || 'x' WHERE seq = 2", ()))
        service.start()
        train(lambda: "row 2 is damaged" in governor.status.last_error)
        with closing(sqlite3.connect(path)) as db:
            kept = db.execute("SELECT max(seq) FROM journal").fetchone()
        assert governor.status.state == "away"
        changed(path, ("UPDATE journal SET actor = substr(actor, 1, length(actor) - 1) WHERE seq = 2", ()))
        train(lambda: governor.status.state == "steering", pause_s=0.02)
        governor.close()
        steps = governor.status.step
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT max(seq) FROM journal").fetchone() > kept
    journal = open_journal(f"sqlite:///{path}", read_only=True)
    journal.start(lambda _: None)
    try:
        found = verify(journal, "r")
    finally:
        journal.close()
    assert (found.problem, found.observations) == ("", steps)


def test_damage_found_by_the_scrub_stops_writing_and_the_scrub_takes_its_share(whole, tmp_path, monkeypatch):
    """Rows before a snapshot are not read at first; a second look finds them, and is no load."""
    monkeypatch.setattr(limits, "SCRUB_ROWS", 2)
    path = copied(whole, tmp_path)
    flipped(path, "journal", "payload", "run = 'hit' AND seq = 12", 0.5)

    async def ask():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            live = await opened.engine.find("hit")
            assert opened.engine.damage.words("hit") == ""
            kept = await opened.service.get_run("hit", ANYBODY)
            await scrubbed(opened)
            with pytest.raises(Damaged, match="run 'hit', row 12"):
                await opened.service.report(report_message("hit", BATCHES), ANYBODY)
            view = await opened.service.get_run("hit", ANYBODY)
            assert (view.status, view.run) == ("damaged", kept.run), "what is in memory can still be read"
            changed(path, ("DELETE FROM journal WHERE run = 'hit'", ()))
            monkeypatch.setattr(limits, "DAMAGE_RECHECK_S", 0)
            opened.engine.found_damage("hit", "gone by now")
            for _ in range(3):
                view = await opened.service.get_run("hit", ANYBODY)
                assert (view.status, view.run) == ("damaged", kept.run), "also when it is examined again"
            assert live.lock.locked() is False
            assert (await opened.service.report(report_message("left", BATCHES), ANYBODY)).through > 0

    asyncio.run(ask())


def test_what_is_wrong_with_the_file_is_told_to_the_log_and_not_to_callers(tmp_path, caplog):
    file = tmp_path / "store.db"
    body = {"run": "r", "session": "s", "groups": [{"name": "a", "lr": 0.1}]}
    with flyball_server.running(store=f"sqlite:///{file}") as service:

        def problem(method, path, **send):
            caplog.clear()
            answer = httpx.request(method, service.http + path, trust_env=False, **send)
            assert answer.status_code == 503, answer.text
            assert not [word for word in (str(tmp_path), "sqlite", "SELECT", "table") if word in answer.text]
            return answer.json()["detail"], caplog.text

        with sqlite3.connect(file) as beside:
            beside.execute("ALTER TABLE runs RENAME TO gone")
        words, logged = problem("GET", "/v1/runs")
        assert "log says why" in words
        assert f"{file} cannot be read now: no such table: runs" in logged
        with sqlite3.connect(file) as beside:
            beside.execute("ALTER TABLE gone RENAME TO runs")
        file.rename(tmp_path / "moved.db")
        words, logged = problem("POST", "/v1/attach", json=body)
        assert "put it back" in words
        assert f"{file} is not there any more" in logged
        (tmp_path / "moved.db").rename(file)
