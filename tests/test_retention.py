"""Goal: a deleted run is gone whole, and what is left says who and why; a full store refuses, loses nothing, and goes
on by itself once there is room.

Method: a real service on a real file, asked over REST and the command line; real training jobs where one is told.
"""

import asyncio
import json
import logging
import sqlite3
import sys
import time
from contextlib import closing

import pytest
import torch
from tests.callers import ANYBODY, caller
from tests.command_line import client_command, server_command
from tests.storage.stores import BATCH, Opened, attach_message, fill, report_message

import flyball
import flyball.api
import flyball_server
from flyball.errors import Refused
from flyball_server import limits
from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid, NotFound
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE, RunFilter
from flyball_server.verify import names, verify, verify_store


def command(*words, of=server_command):
    done = of(*words)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/f.db"


def test_a_deleted_run_is_gone_and_its_name_is_not_used_again(store):
    async def ask():
        async with Opened(open_journal(store)) as opened:
            service = opened.service
            await fill(opened, "old", 4, "finished")
            await fill(opened, "kept", 4)
            newest = (await service.get_run("old", ANYBODY)).record
            with pytest.raises(Invalid, match="reason"):
                await service.delete_run("old", " ", caller("me"))
            with pytest.raises(NotFound):
                await service.delete_run("never", "why not", caller("me"))
            with pytest.raises(Conflict, match="active"):
                await service.delete_run("kept", "too early", caller("me"))
            left = await service.delete_run("old", "it was a test", caller("me"))
            expected = {
                "run": "old",
                "actor": "me",
                "reason": "it was a test",
                "attempts": 1,
                "observations": 4 * BATCH,
            }
            assert left.items() >= (expected | {"rows": newest.seq, "digest": newest.hash.hex()}).items()
            for asked in (service.get_run("old", ANYBODY), service.report(report_message("old", 5), ANYBODY)):
                with pytest.raises(NotFound, match=r"deleted at .*Z by me: it was a test"):
                    await asked
            for resume in (False, True):
                with pytest.raises(Conflict, match="choose another"):
                    await service.attach(attach_message("old", session="s2", resume=resume), ANYBODY)
            assert [view.record.run for view in (await service.list_runs(RunFilter(), None, 9, ANYBODY))[0]] == ["kept"]
            gone = (await service.list_runs(RunFilter(status="deleted"), None, 9, ANYBODY))[0]
            assert [(view.record.run, view.status) for view in gone] == [("old", "deleted")]
            assert await service.tombstones(0, 9, ANYBODY) == {"tombstones": [left], "next": None}
            opened.late_us = int(2e6 * limits.STALE_AFTER_S)
            second = await service.delete_run("kept", "stale by now", caller("you"))
            assert await service.tombstones(0, 1, ANYBODY) == {"tombstones": [left], "next": 1}
            assert await service.tombstones(1, 1, ANYBODY) == {"tombstones": [second], "next": None}
            assert verify_store(opened.journal) == []
            assert names(opened.journal) == []

    asyncio.run(ask())


def test_of_deletions_and_reports_at_once_the_journal_keeps_one_story(store):
    async def ask():
        async with Opened(open_journal(store)) as opened:
            for i in range(8):
                await fill(opened, f"r{i}", 2)
            opened.late_us = int(2e6 * limits.STALE_AFTER_S)
            calls = []
            for i in range(8):
                calls.append(opened.service.delete_run(f"r{i}", "all at once", caller("me")))
                calls.append(opened.service.report(report_message(f"r{i}", 2), ANYBODY))
                calls.append(opened.service.delete_run(f"r{i}", "and again", caller("you")))
            found = await asyncio.gather(*calls, return_exceptions=True)
            # A report makes a run active again; then it stays. Nothing is deleted twice, and nothing else happens.
            assert all(isinstance(one, (dict, tuple, NotFound, Conflict)) for one in found), found
            stones = [stone["run"] for stone in (await opened.service.tombstones(0, 99, ANYBODY))["tombstones"]]
            assert len(stones) == len(set(stones)) == 8 - len(names(opened.journal))
            assert verify_store(opened.journal) == []
            for run in names(opened.journal):
                assert verify(opened.journal, run).problem == ""

    asyncio.run(ask())


def test_a_training_job_whose_run_is_deleted_is_told_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(limits, "STALE_AFTER_S", 0.0)  # so that even this one may be deleted
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with (
        caplog.at_level(logging.ERROR, "flyball"),
        flyball_server.running(store=f"sqlite:///{tmp_path}/f.db") as service,
        flyball.attach(optimizer, run="r", server=service.http) as governor,
    ):
        for _ in range(20):
            optimizer.step()
            governor.step(1.0)
        told = command("delete", "r", "--reason", "no use", "--server", service.http, "--json", of=client_command)
        assert told[0] == 0, told
        assert json.loads(told[1])["reason"] == "no use"
        for _ in range(2000):
            optimizer.step()
            governor.step(1.0)
            if governor.status.state == "superseded":
                break
            time.sleep(0.005)
        assert governor.status.state == "superseded"
        assert "no use" in governor.status.last_error
        with flyball.api.Client(service.http) as client:
            assert [stone["run"] for stone in client.tombstones()] == ["r"]
            assert list(client.runs()) == []
            with pytest.raises(Refused, match="no use"):
                client.run("r")
            with pytest.raises(Refused, match="reason"):
                client.delete("r", reason="")
        code, out, _ = command("tombstones", "--server", service.http, of=client_command)
        assert (code, "no use" in out) == (0, True)


def test_a_damaged_run_can_be_deleted_and_the_store_is_well_again(tmp_path):
    path = tmp_path / "f.db"

    async def ask():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            for run in ("hit", "bare", "well"):
                await fill(opened, run, 3)
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE journal SET at = at + 1 WHERE run = 'hit' AND seq = 1")
            db.execute("DELETE FROM runs WHERE run = 'bare'")
            db.commit()
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            for run in ("hit", "bare"):
                with pytest.raises(Damaged, match=run):
                    await opened.service.report(report_message(run, 3), ANYBODY)
                await opened.service.delete_run(run, "beyond repair", caller("me"))
                with pytest.raises(NotFound, match="beyond repair"):
                    await opened.service.get_run(run, ANYBODY)
            assert opened.service.damaged(ANYBODY) == {}
            assert verify_store(opened.journal) == []
            assert names(opened.journal) == ["well"]

    asyncio.run(ask())


def test_a_store_full_by_its_limit_is_busy_until_a_run_is_deleted(tmp_path, monkeypatch, caplog):
    store = f"sqlite:///{tmp_path}/f.db"
    bytes_max = 250_000
    monkeypatch.setattr(limits, "STALE_AFTER_S", 1e9)

    async def ask():
        acknowledged = {}
        async with Opened(open_journal(store, bytes_max=bytes_max)) as opened:
            service, refused, seen = opened.service, None, set()
            await fill(opened, "old", 20, "finished")
            for i in range(1000):
                run = f"r{i % 2}"
                try:
                    if i < 2:
                        await service.attach(attach_message(run), ANYBODY)
                    advice = await service.report(report_message(run, i // 2), ANYBODY)
                    acknowledged[run] = advice.through
                except Busy as error:
                    refused = error
                    break
                usage = await service.usage(ANYBODY)
                seen.add(usage.state)
            assert seen == {"ok", "nearly_full"}, "it is announced before it happens"
            assert f"of {bytes_max} bytes" in str(refused)
            assert "flyball delete" in str(refused)
            assert refused.retry_after_s >= 1
            usage = await service.usage(ANYBODY)
            assert (usage.state, usage.bytes_max, usage.words) == ("full", bytes_max, str(refused))
            assert usage.bytes >= bytes_max
            assert (await service.ready())["store"] == "full"
            assert (await service.get_run("r0", ANYBODY)).run.through == acknowledged["r0"]
            await service.delete_run("old", "to make room", caller("me"))
            advice = await service.report(report_message(run, i // 2), ANYBODY)
            assert advice.through == (i // 2 + 1) * BATCH - 1, "the refused report, sent again, goes on where it was"
            acknowledged[run] = advice.through
        return acknowledged

    with caplog.at_level(logging.INFO, "flyball_server.storage.gauge"):
        acknowledged = asyncio.run(ask())
    states = [record.message for record in caplog.records]
    assert ["nearly full" in states[0], "is full" in states[1]] == [True, True]
    assert len(states) <= 4, "once per change"
    journal = open_journal(store, read_only=True)
    journal.start(lambda _: None)
    try:
        for run, through in acknowledged.items():
            assert verify(journal, run).problem == ""
            assert journal.record(run).step == through
    finally:
        journal.close()


def test_a_disk_about_to_be_full_is_busy_and_tells(tmp_path):
    async def ask():
        huge = 1 << 60  # more than any disk has
        async with Opened(open_journal(f"sqlite:///{tmp_path}/f.db", disk_free_min=huge)) as opened:
            with pytest.raises(Busy, match="disk is full"):
                await opened.service.attach(attach_message("r"), ANYBODY)
            usage = await opened.service.usage(ANYBODY)
            assert (usage.state, usage.disk_free_min) == ("full", huge)

    asyncio.run(ask())


def test_verify_works_beside_a_running_service_and_compact_gives_space_back(tmp_path):
    path = tmp_path / "f.db"
    store = f"sqlite:///{path}"
    with pytest.raises(Invalid, match="does not exist"):
        open_journal(store, read_only=True).start(lambda _: None)

    async def ask():
        async with Opened(open_journal(store)) as opened:
            for i in range(4):
                await fill(opened, f"r{i}", 30, "finished")
            verified = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "flyball_server.cli", "verify", "--store", store, stdout=asyncio.subprocess.PIPE
            )
            await fill(opened, "grows", 60)
            out, _ = await verified.communicate()
            assert verified.returncode == 0, out
            assert out.count(b"matches bit for bit") >= 4
            code, _, err = await asyncio.to_thread(command, "compact", "--store", store)
            assert (code, "in use by another" in err) == (1, True)
            for i in range(3):
                await opened.service.delete_run(f"r{i}", "to be compacted", caller("me"))

    asyncio.run(ask())
    before = path.stat().st_size
    code, out, err = command("compact", "--store", store)
    assert (code, err) == (0, "")
    assert path.stat().st_size < before * 0.7
    assert str(path.stat().st_size) in out
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM journal WHERE run = 'grows'").fetchone() == (1,)
        db.execute("UPDATE journal SET at = at + 1 WHERE run = '#store'")
        db.commit()
    code, out, _ = command("verify", "--store", store, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [line["problem"] for line in lines[:-1]] == ["", ""]
    assert any(STORE in words for words in lines[-1]["problems"])
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE alembic_version SET version_num = '0000'")
        db.commit()
    with pytest.raises(Invalid, match="service on it once"):
        open_journal(store, read_only=True).start(lambda _: None)


def test_small_segments_become_large_ones(tmp_path):
    path = tmp_path / "f.db"

    async def ask():
        async with Opened(open_journal(f"sqlite:///{path}")) as opened:
            await opened.service.attach(attach_message("r"), ANYBODY)
            for batch in range(12):
                await opened.service.report(report_message("r", batch), ANYBODY)
                if batch % 3 == 2:
                    with closing(sqlite3.connect(path)) as db:
                        singles = db.execute("SELECT count(*) FROM journal WHERE last_seq = seq").fetchone()
                    await asyncio.to_thread(opened.journal.compact, "r")
                    assert singles[0] >= 3
            rows = list(opened.journal.rows("r"))
            with closing(sqlite3.connect(path)) as db:
                assert db.execute("SELECT seq, last_seq FROM journal").fetchall() == [(1, len(rows))]
            assert verify(opened.journal, "r").problem == ""

    asyncio.run(ask())
