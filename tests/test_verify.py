"""Goal: `verify` says ok for every real run, and names the row where anything in a journal was touched.

Method: journals of real runs, copied row by row with one thing changed, once with the old hashes and once chained anew
as a careful forger would; the SQLite file is changed in place.
"""

import asyncio
import sqlite3
from itertools import count

import pytest
from tests.callers import ANYBODY, caller

from flyball_server.core.events import Receipt
from flyball_server.core.types import Group, Settings
from flyball_server.engine import Engine
from flyball_server.messages import Attach, Report, SideReport
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage import open_journal
from flyball_server.storage.blocks import store
from flyball_server.storage.journal import GENESIS, Column, chained
from flyball_server.storage.memory import MemoryJournal
from flyball_server.verify import verify

GROUPS = (Group("a", 0.1, 0.9), Group("b", 0.01))
POLICIES = [
    {"type": "constant"},
    {"type": "plateau", "patience": 0, "factor": 0.8},
    {"type": "windowed", "window_size": 5, "cooldown_steps": 0},
]


async def a_run(journal, run="r", policy=None, base=None, guard=None):
    """A run with everything in it: gaps, missing and non-finite losses, side signals, receipts, a rewind, an end."""
    clock = count(1_700_000_000_000_000, 1000)
    engine = Engine(journal, rules_of, lambda: next(clock))
    await engine.start()
    service = Service(engine, journal)
    attach = Attach(
        "default", run, "s1", {"k": "v"}, GROUPS, policy or POLICIES[1], base, guard or {}, "absolute", 3, None, False,
        None, None, 0, "", "test",
    )  # fmt: skip
    await service.attach(attach, ANYBODY)

    async def report(session, attempt, steps, end=""):
        losses = [None if s % 7 == 5 else float("nan") if s % 13 == 12 else 2.0 + s % 5 / 10 for s in steps]
        receipts = (Receipt(steps[0] + 1, steps[0], -1, Settings((0.1, 0.01), (0.9, None)), False, "", 1),)
        signals = {"loss": losses, "grad_norm": [0.5] * len(steps)}
        await service.report(Report(run, session, attempt, steps, signals, receipts, (), end), ANYBODY)

    for first in range(0, 60, 6):
        await report("s1", 1, list(range(first, first + 6)))
    await service.add_signals(run, SideReport({"val_loss": float("nan"), "other": 1.0}), caller("b"))
    await report("s1", 1, [60, 70, 80])
    await service.attach(attach._replace(session="s2", resume=True, from_step=33, from_attempt=1), ANYBODY)
    await report("s2", 2, list(range(33, 45)), "finished")
    await engine.close()


def made(**options):
    journal = MemoryJournal()
    asyncio.run(a_run(journal, **options))
    return journal


@pytest.fixture(scope="module")
def real():
    return made()


def copied(journal, change, *, rehash):
    """Another journal with the rows of `journal` after `change(list of rows)`."""
    rows = change(list(journal.rows("r")))
    if rehash:
        previous, anew = GENESIS, []
        for row in rows:
            previous = chained(previous, "r", row)
            anew.append(row._replace(hash=previous))
        rows = anew
    copy = MemoryJournal()
    # Past `append`, which refuses rows out of order.
    copy._stored["r"] = [store(row) for row in rows]
    copy._records["r"] = journal.record("r")
    return copy


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p["type"])
@pytest.mark.parametrize("base", [None, {"type": "one_cycle", "max_lr": 0.2, "total_steps": 50}], ids=["", "one_cycle"])
@pytest.mark.parametrize(
    "guard", [{}, {"max_change": 1.2, "warmup_steps": 9, "max_lr": 0.15, "cooldown_steps": 3}], ids=["", "guard"]
)
def test_a_real_run_matches(policy, base, guard, tmp_path):
    journal = made(policy=policy, base=base, guard=guard)
    found = verify(journal, "r")
    assert found.problem == ""
    assert (found.rows, found.observations) == (journal.record("r").seq, 33 + 12)
    assert found.head == journal.record("r").hash.hex()


def test_a_real_run_in_a_file_matches_before_and_after_it_is_compacted(tmp_path):
    journal = open_journal(f"sqlite:///{tmp_path}/j.db")
    asyncio.run(a_run(journal))
    journal.start(lambda results: None)
    try:
        once = verify(journal, "r")
        journal.compact("r")
        assert verify(journal, "r") == once
        assert once.problem == ""
        assert once.decisions > 0
    finally:
        journal.close()


def test_an_unknown_run_is_no_run():
    assert verify(MemoryJournal(), "r").problem == "no such run"


def observed_rows(rows):
    return [i for i, row in enumerate(rows) if row.kind == "observed"]


def with_column(row, name, change):
    columns = tuple(c._replace(data=change(c.data)) if c.name == name else c for c in row.columns)
    return row._replace(columns=columns)


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


def nth(rows, n, change):
    i = observed_rows(rows)[n]
    return [*rows[:i], change(rows[i]), *rows[i + 1 :]]


FORGERIES = {
    "a loss": lambda rows: nth(rows, 3, lambda r: with_column(r, "loss", flipped)),
    "a decision": lambda rows: nth(rows, 3, lambda r: with_column(r, "=lr", flipped)),
    "a mark": lambda rows: nth(rows, 3, lambda r: r._replace(meta={"marks": []})),
    "an actor": lambda rows: nth(rows, 3, lambda r: r._replace(actor="somebody")),
    "a time": lambda rows: nth(rows, 3, lambda r: r._replace(at=r.at + 1)),
    "a step": lambda rows: nth(rows, 3, lambda r: r._replace(first_step=r.first_step + 1, last_step=r.last_step + 1)),
    "a row removed": lambda rows: nth(rows, 3, lambda r: None),
    "two rows swapped": lambda rows: [*rows[:6], rows[7], rows[6], *rows[8:]],
    "a row twice": lambda rows: [*rows[:6], rows[5], *rows[6:]],
    "the specification": lambda rows: [rows[0]._replace(meta={"spec": {**rows[0].meta["spec"], "seed": 4}}), *rows[1:]],
    "the hash itself": lambda rows: nth(rows, 3, lambda r: r._replace(hash=flipped(r.hash))),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_anything_touched_is_found_and_its_row_named(real, name):
    def change(rows):
        return [row for row in FORGERIES[name](rows) if row is not None]

    rows = list(real.rows("r"))
    changed = change(rows)
    place = next(i for i, (a, b) in enumerate(zip(rows, changed, strict=False)) if a != b) + 1
    problem = verify(copied(real, change, rehash=False), "r").problem
    assert f"row {place} " in problem


def test_rows_cut_off_at_the_end_are_missed(real):
    problem = verify(copied(real, lambda rows: rows[:-1], rehash=False), "r").problem
    assert f"row {real.record('r').seq} " in problem


@pytest.mark.parametrize("name", ["a loss", "a decision", "a mark", "a step"])
def test_a_forged_decision_is_found_even_where_the_chain_was_made_anew(real, name):
    """What was decided must follow from what was observed, whoever computed the hashes."""
    problem = verify(copied(real, FORGERIES[name], rehash=True), "r").problem
    assert "row" in problem
    assert problem.startswith("row ") or "behind row" in problem


BROKEN = {
    "no decisions": lambda r: r._replace(columns=tuple(c for c in r.columns if not c.name.startswith("="))),
    "a change that points nowhere": lambda r: with_column(r, "=at", lambda d: b"\xff" * len(d)),
    "too few settings": lambda r: with_column(r, "=lr", lambda d: d[:8]),
    "no steps": lambda r: r._replace(first_step=None, last_step=None),
    "more steps than losses": lambda r: r._replace(last_step=r.last_step + 1),
    "another kind": lambda r: r._replace(kind="rumour"),
    "columns of text": lambda r: r._replace(columns=(*r.columns, Column("loss?", "I", b"\xff" * 4))),
    "a mark of another shape": lambda r: r._replace(meta={"marks": [[1]]}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_make_no_sense_are_a_verdict_and_no_crash(real, name):
    journal = copied(real, lambda rows: nth(rows, 3, BROKEN[name]), rehash=True)
    assert "row" in verify(journal, "r").problem


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("change", ["payload", "hash", "removed", "swapped", "cut off"])
def test_a_file_changed_in_place_is_found(tmp_path, compacted, change):
    path = tmp_path / "j.db"
    journal = open_journal(f"sqlite:///{path}")
    asyncio.run(a_run(journal))
    if compacted:
        journal.start(lambda results: None)
        journal.compact("r")
        journal.close()
    db = sqlite3.connect(path)
    keys = [seq for (seq,) in db.execute("SELECT seq FROM journal ORDER BY seq")]
    seq = keys[len(keys) // 2]
    if change in ("removed", "cut off"):
        db.execute("DELETE FROM journal WHERE seq = ?", (keys[-1] if change == "cut off" else seq,))
    elif change == "swapped" and len(keys) > 1:
        one, two = keys[-2:]
        contents = "kind, attempt, first_step, last_step, payload, hash"
        rows = {s: db.execute(f"SELECT {contents} FROM journal WHERE seq = ?", (s,)).fetchone() for s in (one, two)}
        for s, row in ((one, rows[two]), (two, rows[one])):
            assert db.execute(
                "UPDATE journal SET kind=?, attempt=?, first_step=?, last_step=?, payload=?, hash=? WHERE seq = ?",
                (*row, s),
            ).rowcount
    else:
        column = "payload" if change == "payload" else "hash"
        (data,) = db.execute(f"SELECT {column} FROM journal WHERE seq = ?", (seq,)).fetchone()
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]
        db.execute(f"UPDATE journal SET {column} = ? WHERE seq = ?", (data, seq))
    db.commit()
    db.close()
    journal = open_journal(f"sqlite:///{path}")
    journal.start(lambda results: None)
    try:
        assert verify(journal, "r").problem != ""
    finally:
        journal.close()
