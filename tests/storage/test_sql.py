"""What the SQL journal keeps beyond the common promises: durability, one owner, full disks, schema, housekeeping.

Goal: what was delivered is there after a kill; a database that cannot be written or opened says so and nothing else.
Method: a subprocess killed while appending; a second process; a page limit as a full disk; Alembic's own comparison.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from tests.storage.making import SIGNALS, Results, append, chain, joined, joined_blocks, keep, observed, row, started

from flyball_server.core.errors import Busy, Conflict, Damaged, Invalid
from flyball_server.storage import heads, tables, tidying, writer
from flyball_server.storage.journal import GENESIS, Snapshot, chained
from flyball_server.storage.sql import SqlJournal

ROOT = Path(__file__).resolve().parents[2]
BYTES_PER_OBSERVATION = 17.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def opened(path: Path) -> SqlJournal:
    return SqlJournal(f"sqlite:///{path}")


def table_rows(path: Path) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT seq, last_seq FROM journal ORDER BY run, seq").fetchall()


# -- durability ----------------------------------------------------------------------------------------------

APPENDING = """
import sys, threading
from flyball_server.storage import open_journal
from tests.storage.making import append, chain, observed

def deliver(results):
    for item, error in results:
        assert error is None, error
        sys.stdout.write(f"{item.record.run} {item.rows[-1].seq}\\n")
    sys.stdout.flush()
    room.release(len(results))

room = threading.Semaphore(40)
journal = open_journal(sys.argv[1])
journal.start(deliver)
newest = dict.fromkeys("abc")
while True:
    for run in newest:
        rows = chain(run, observed(3, 64), after=newest[run])
        newest[run] = rows[-1]
        room.acquire()
        journal.append(append(run, rows))
"""


def test_what_was_delivered_is_there_after_a_kill(path: Path) -> None:
    env = {"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}", "PATH": ""}
    command = [sys.executable, "-c", APPENDING, f"sqlite:///{path}"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        delivered = [process.stdout.readline() for _ in range(400)]
        process.send_signal(signal.SIGKILL)
        delivered += process.stdout.readlines()
    newest = {run: int(seq) for run, seq in (line.split() for line in delivered if line.endswith("\n"))}
    with started(opened(path)) as (journal, results):
        for run, seq in newest.items():
            rows = list(journal.rows(run))
            assert len(rows) >= seq >= 3 * 100
            previous = GENESIS
            for number, one in enumerate(rows, 1):
                previous = chained(previous, run, one)
                assert (one.seq, one.hash) == (number, previous)
            found = journal.record(run)
            assert found is not None
            assert (found.seq, found.hash) == (len(rows), previous)
            assert keep(journal, results, append(run, chain(run, observed(1, 1), after=rows[-1]))) == [None]
    assert any(last > first for first, last in table_rows(path)), "no segment was made meanwhile"


def test_everything_is_there_after_closing_and_opening_again(path: Path) -> None:
    rows = chain("r", observed(30, 4))
    with started(opened(path)) as (journal, results):
        items = [append("r", rows[:20], labels={"a": "b"}), append("r", rows[20:], snapshot=Snapshot(30, 1, 119, "{}"))]
        for item in items:
            journal.append(item)
    assert results.wait(2) == [None, None], "closing delivers what was accepted"
    with started(opened(path)) as (journal, results):
        assert list(journal.rows("r")) == rows
        assert journal.record("r") == items[1].record
        assert journal.snapshot("r") == items[1].snapshot
        assert keep(journal, results, append("r", chain("r", observed(1, 1), after=rows[-1]))) == [None]


def test_appends_that_wait_share_a_commit_and_a_delivery(path: Path) -> None:
    rows = chain("r", observed(30, 1))
    with started(opened(path)) as (journal, results):
        with results.held():
            journal.append(append("r", rows[:1]))
            results.wait(1)
            for one in rows[1:]:
                journal.append(append("r", [one]))
        results.wait(30)
    assert [len(call) for call in results.calls] == [1, 29]


def test_more_waiting_appends_than_the_limit_are_busy_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "APPENDS_MAX", 5)
    rows = chain("r", observed(8, 1))
    with started(opened(path)) as (journal, results):
        with results.held():
            journal.append(append("r", rows[:1]))
            results.wait(1)
            for one in rows[1:6]:
                journal.append(append("r", [one]))
            with pytest.raises(Busy, match="5 appends"):
                journal.append(append("r", rows[6:7]))
        assert results.wait(6) == [None] * 6
        assert keep(journal, results, append("r", rows[6:])) == [None]


# -- one owner, and files that are not ours ------------------------------------------------------------------


def test_another_name_of_a_file_in_use_is_refused_too(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    with started(opened(path)), pytest.raises(Busy, match="in use by another Flyball server"):
        opened(link).start(Results())


def test_a_second_process_is_refused_by_name(path: Path) -> None:
    code = f"from flyball_server.storage import open_journal; open_journal('sqlite:///{path}').start(print)"
    env = {"PYTHONPATH": str(ROOT / "server"), "PATH": ""}
    with started(opened(path)):
        with pytest.raises(Busy, match=r"runs\.db is in use"):
            opened(path).start(Results())
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "runs.db is in use by another Flyball server" in done.stderr
    with started(opened(path)):
        pass


def test_files_that_are_no_journal_are_refused_by_name_and_left_alone(path: Path) -> None:
    path.write_bytes(b"these are my holiday notes, not a database" * 100)
    with pytest.raises(Invalid, match=r"runs\.db is damaged or not an SQLite database"):
        opened(path).start(Results())
    assert path.read_bytes().startswith(b"these are")
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(Invalid, match=r"another program's database.*recipes"):
        opened(path).start(Results())
    with pytest.raises(Invalid, match="cannot be created or opened"):
        opened(path / "missing" / "runs.db").start(Results())


def test_a_database_of_a_newer_version_is_refused(path: Path) -> None:
    with started(opened(path)):
        pass
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Invalid, match="newer version"):
        opened(path).start(Results())


def test_damage_in_the_file_is_named_when_it_is_read(path: Path) -> None:
    rows = chain("r", observed(40, 64))
    with started(opened(path)) as (journal, results):
        keep(journal, results, append("r", rows))
        journal.compact("r")
    with closing(sqlite3.connect(path)) as db, db:
        payload = bytearray(db.execute("SELECT payload FROM journal").fetchone()[0])
        payload[len(payload) // 2] ^= 1
        db.execute("UPDATE journal SET payload = ?", (bytes(payload),))
    with started(opened(path)) as (journal, _):
        with pytest.raises(Damaged, match=r"run 'r', rows 1 to 40"):
            list(journal.rows("r"))
        with pytest.raises(Damaged, match=r"run 'r', rows 1 to 40"):
            list(journal.blocks("r", SIGNALS))


# -- a database that cannot write ----------------------------------------------------------------------------


@contextmanager
def connections() -> Iterator[list[sqlite3.Connection]]:
    """The SQLite connections that are opened meanwhile; the first is the writer's."""
    found: list[sqlite3.Connection] = []

    def note(connection: sqlite3.Connection, _: object) -> None:
        found.append(connection)

    sa.event.listen(sa.Engine, "connect", note)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "connect", note)


def test_a_full_disk_is_busy_writes_nothing_and_recovers(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = chain("r", observed(12, 256))
    with connections() as found, started(opened(path)) as (journal, results):
        assert keep(journal, results, append("r", rows[:1])) == [None]
        pages = found[0].execute("PRAGMA page_count").fetchone()[0]
        found[0].execute(f"PRAGMA max_page_count = {pages + 1}")
        for _ in range(3):
            errors = keep(journal, results, append("r", rows[1:]), append("s", chain("s", rows[:3])))
            assert [type(e) for e in errors] == [Busy, Busy]
            assert "full" in caplog.text
            assert "disk is full" in str(errors[0])
            assert list(journal.rows("r")) == rows[:1]
            assert journal.record("s") is None
        found[0].execute("PRAGMA max_page_count = 1000000")
        assert keep(journal, results, append("r", rows[1:])) == [None]
        assert list(journal.rows("r")) == rows


def test_a_file_moved_away_is_busy_and_recovers_when_it_is_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writing goes on into a file that has no name any more; nobody would find that again."""
    rows, away = chain("r", observed(12, 256)), path.with_suffix(".away")
    with started(opened(path)) as (journal, results):
        assert keep(journal, results, append("r", rows[:1])) == [None]
        path.rename(away)
        for _ in range(2):
            [error] = keep(journal, results, append("r", rows[1:]))
            assert isinstance(error, Busy)
            assert str(path) in caplog.text
            assert "file" in str(error)
            path.touch(exist_ok=True)  # another file of that name is no better
        away.rename(path)
        assert keep(journal, results, append("r", rows[1:])) == [None]
        assert list(journal.rows("r")) == rows


def test_a_lock_by_another_program_is_busy_and_recovers(path: Path) -> None:
    rows = chain("r", observed(2, 1))
    with connections() as found, started(opened(path)) as (journal, results):
        found[0].execute("PRAGMA busy_timeout = 50")
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert [type(e) for e in keep(journal, results, append("r", rows[:1]))] == [Busy]
        assert keep(journal, results, append("r", rows)) == [None]


def test_a_key_taken_behind_the_journals_back_conflicts_for_the_loser_only(path: Path) -> None:
    a, b = chain("a", observed(3, 1)), chain("b", observed(2, 1))
    with started(opened(path)) as (journal, results):
        assert keep(journal, results, append("a", a[:1])) == [None]
        with closing(sqlite3.connect(path)) as other, other:
            other.execute(
                "INSERT INTO journal SELECT run, 2, 2, kind, attempt, 0, 0, actor, at, payload, hash FROM journal"
            )
        with results.held():  # so that the next three wait together and share a transaction
            journal.append(append("c", chain("c", observed(1, 1))))
            results.wait(2)
            for item in (append("b", b[:1]), append("a", a[1:2]), append("b", b[1:])):
                journal.append(item)
        errors = results.wait(5)[2:]
        assert [type(e) for e in errors] == [type(None), Conflict, type(None)]
        assert list(journal.rows("b")) == b
        assert keep(journal, results, append("a", a[2:])) == [None], "the run was read again"


# -- schema --------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_schema_of_the_tables(path: Path) -> None:
    with started(opened(path)):
        pass
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


# -- housekeeping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "per_row"), [(640, 64), (24 * 1024, 1)])
def test_runs_are_compacted_by_themselves_and_fit_the_budget(path: Path, count: int, per_row: int) -> None:
    rows = chain("r", observed(count, per_row))
    with started(opened(path)) as (journal, results):
        for start in range(0, count, 32):
            journal.append(append("r", rows[start : start + 32]))
        assert set(results.wait(count // 32)) == {None}
        journal.compact("r")
        assert joined_blocks(list(journal.blocks("r", SIGNALS))) == joined(rows, SIGNALS)
        assert list(journal.rows("r")) == rows
    stored = table_rows(path)
    assert 2 <= len(stored) <= count * max(per_row / heads.COMPACT_OBSERVATIONS, 1 / heads.COMPACT_ROWS) + 2
    with started(opened(path.with_name("empty.db"))):
        pass
    size = (bytes_in(path) - bytes_in(path.with_name("empty.db"))) / (count * per_row)
    print(f"{count} rows of {per_row} observations: {size:.2f} bytes an observation in the file")
    assert size <= BYTES_PER_OBSERVATION


def bytes_in(path: Path) -> int:
    """The pages in use: those that compaction has freed are used again by the next rows."""
    with closing(sqlite3.connect(path)) as db:
        page, used, free = (
            int(db.execute(f"PRAGMA {p}").fetchone()[0]) for p in ("page_size", "page_count", "freelist_count")
        )
    return page * (used - free)


def test_a_run_with_a_backlog_from_before_a_restart_is_compacted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chain("r", observed(300, 1))
    with started(opened(path)) as (journal, results):
        assert keep(journal, results, append("r", rows[:299])) == [None]
    monkeypatch.setattr(heads, "COMPACT_ROWS", 100)
    with started(opened(path)) as (journal, results):
        assert keep(journal, results, append("r", rows[299:])) == [None]
        journal.compact("another")  # waits until the writer is behind its housekeeping
        assert list(journal.rows("r")) == rows
    assert table_rows(path) == [(1, 300)]


def test_old_snapshots_thin_out(path: Path) -> None:
    rows = chain("r", observed(600, 1))
    with started(opened(path)) as (journal, results):
        for i, one in enumerate(rows, 1):
            assert keep(journal, results, append("r", [one], snapshot=Snapshot(i, 1, i, str(i)))) == [None]
        newest = journal.snapshot("r")
        old = journal.snapshot("r", until=300)
    assert newest is not None
    assert newest.state == "600"
    assert old is not None, "an older one is there to fold from"
    with closing(sqlite3.connect(path)) as db:
        kept = [seq for (seq,) in db.execute("SELECT seq FROM snapshots ORDER BY seq DESC")]
    assert kept[:8] == list(range(600, 592, -1))
    assert len(kept) <= 2 * tidying.SNAPSHOTS_KEPT + 12


def test_the_thinning_rule_keeps_the_newest_and_one_per_doubling() -> None:
    seqs = list(range(1000, 0, -1))
    kept = sorted(set(seqs) - set(tidying.superfluous(seqs)), reverse=True)
    assert kept == [*range(1000, 992, -1), 985, 969, 937, 873, 745, 489, 1]
    assert tidying.superfluous([]) == []
    assert tidying.superfluous([5]) == []


def test_a_store_from_before_there_were_noted_rows_has_them_after_its_migration(path: Path) -> None:
    a = chain("a", [row("created", attempt=0), *observed(40, 8), row("ended", meta={"outcome": "failed"})])
    bad = chain("bad", [row("created", attempt=0), row("ended")])
    with started(opened(path)) as (journal, results):
        assert keep(journal, results, append("a", a[:-1]), append("bad", bad)) == [None, None]
        journal.compact("a")
        assert keep(journal, results, append("a", a[-1:])) == [None]
        before = list(journal.audit.of("a"))
        assert [one.row.kind for one in before] == ["created", "ended"]
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE audit")
        db.execute("DROP TABLE deliveries")
        db.execute("UPDATE alembic_version SET version_num = '0003'")
        db.execute("UPDATE journal SET payload = 'x' WHERE run = 'bad' AND seq = 2")
        db.commit()
    with pytest.raises(Invalid, match="another version"), started(SqlJournal(f"sqlite:///{path}", read_only=True)):
        pass
    with started(opened(path)) as (journal, _):
        assert list(journal.audit.of("a")) == before
        assert list(journal.audit.of("bad")) == [], "a damaged run keeps no store from opening"
