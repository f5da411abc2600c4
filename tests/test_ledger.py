"""The store's own journal: many writers in several processes, one chain.

Goal: rows of any kind stand beside tombstones, none is lost, none is written twice. Method: real stores, written by a
service and by others beside it.
"""

import asyncio
import sqlite3
from contextlib import closing

import pytest
from tests.callers import ANYBODY, caller
from tests.storage.stores import Opened, fill

from flyball_server import ledger, limits
from flyball_server.core.errors import Busy, Damaged
from flyball_server.storage import open_journal
from flyball_server.storage.journal import STORE
from flyball_server.verify import verify_store


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path / 'flyball.db'}"


def test_rows_beside_a_running_service_are_one_chain_with_its_own(store):
    async def ask():
        async with Opened(open_journal(store)) as service, Opened(open_journal(store, beside=True)) as beside:
            await fill(service, "r", 1, "finished")
            writers = [service.engine.ledger.append, beside.engine.ledger.append] * 20
            rows = await asyncio.gather(*(write("token_created", {"n": n}, "me") for n, write in enumerate(writers)))
            await service.service.delete_run("r", "to have a tombstone", caller("me"))
            assert sorted(row.seq for row in rows) == list(range(1, 41))
            seen = await beside.engine.ledger.rows(None, 30)
            seen += await beside.engine.ledger.rows(seen[-1])
            assert [row.kind for row in seen] == ["token_created"] * 40 + ["deleted"]
            assert sorted(row.meta["n"] for row in seen[:-1]) == list(range(40))
            assert verify_store(service.journal) == []
            with pytest.raises(Busy, match="beside the service"):
                await fill(beside, "another", 1)

    asyncio.run(ask())


def test_tombstones_are_paged_with_other_rows_between(store):
    async def ask():
        async with Opened(open_journal(store)) as opened:
            for name in ("a", "b"):
                await fill(opened, name, 1, "finished")
                await opened.engine.ledger.append("refused", {"name": name}, "me")
                await opened.service.delete_run(name, "why not", caller("me"))
            page = await opened.service.tombstones(0, 1, ANYBODY)
            assert ([stone["run"] for stone in page["tombstones"]], page["next"]) == (["a"], 2)
            page = await opened.service.tombstones(page["next"], 1, ANYBODY)
            assert ([stone["run"] for stone in page["tombstones"]], page["next"]) == (["b"], None)

    asyncio.run(ask())


def test_a_changed_row_is_found_and_nothing_is_written_behind_it(store):
    async def ask():
        async with Opened(open_journal(store)) as opened:
            for n in range(3):
                await opened.engine.ledger.append("frozen", {"n": n}, "me")
        with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as db, db:
            db.execute("UPDATE journal SET actor = 'you' WHERE run = ? AND seq = 2", (STORE,))
        async with Opened(open_journal(store)) as opened:
            with pytest.raises(Damaged, match="row 2"):
                await opened.engine.ledger.append("thawed", {}, "me")
            with pytest.raises(Damaged, match="row 2"):
                list(ledger.read(opened.journal, None))
            assert any("row 2" in words for words in verify_store(opened.journal))

    asyncio.run(ask())


def test_who_is_always_too_late_is_told_to_come_again(store, monkeypatch):
    monkeypatch.setattr(limits, "LEDGER_TRIES", 2)

    async def lost(name, hand):
        raise ledger.Lost(name)

    async def ask():
        async with Opened(open_journal("memory:")) as opened:
            with pytest.raises(Busy):
                await ledger.Ledger(opened.journal, lost, opened.engine.now_us).append("frozen", {}, "me")

    asyncio.run(ask())
