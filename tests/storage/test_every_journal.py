"""What every journal keeps: one suite over all of them.

Goal: the promises of `storage.journal.Journal`. Method: the same tests on memory and on an SQLite file; rows partly
made by hypothesis, and each compared field by field with what was appended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.storage.making import (
    AT,
    SIGNALS,
    Results,
    append,
    chain,
    joined,
    joined_blocks,
    keep,
    observed,
    record,
    row,
    rows_of_any_kind,
    started,
)

from flyball_server.core.errors import Busy, Conflict, Invalid
from flyball_server.storage import open_journal, outbox
from flyball_server.storage.audit import AuditFilter, Noted, noted
from flyball_server.storage.blocks import Stored, pack_segment, store
from flyball_server.storage.journal import (
    DELETED,
    GENESIS,
    STORE,
    Deletion,
    Heard,
    Journal,
    Note,
    Row,
    RunFilter,
    RunRecord,
    Snapshot,
    chained,
)
from flyball_server.storage.outbox import Delivery

KINDS = ["memory", "sqlite"]
_numbers = itertools.count()


def make(kind: str, folder: Path) -> Journal:
    return open_journal("memory:" if kind == "memory" else f"sqlite:///{folder}/{next(_numbers)}.db")


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Journal, Results]]:
    with started(make(request.param, tmp_path)) as both:
        yield both


@pytest.fixture(params=KINDS, scope="module")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Journal, Results]]:
    """One journal for many examples, each with a run of its own."""
    with started(make(request.param, tmp_path_factory.mktemp("journal"))) as both:
        yield both


@given(rows=rows_of_any_kind, cuts=st.lists(st.integers(1, 11), max_size=3), compact=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_back_as_they_were_appended(
    shared: tuple[Journal, Results], rows: list[Row], cuts: list[int], compact: bool
) -> None:
    journal, results = shared
    run = f"run-{next(_numbers)}"
    rows = chain(run, rows)
    for start, end in itertools.pairwise([0, *sorted({c for c in cuts if c < len(rows)}), len(rows)]):
        assert keep(journal, results, append(run, rows[start:end])) == [None]
        if compact:
            journal.compact(run)
    assert list(journal.rows(run)) == rows
    middle = len(rows) // 2
    assert list(journal.rows(run, after=middle)) == rows[middle:]
    assert list(journal.rows(run, until=middle)) == rows[:middle]
    assert list(journal.rows(run, after=1, until=len(rows) - 1)) == rows[1:-1]
    assert joined_blocks(list(journal.blocks(run, ["loss", "=lr"]))) == joined(rows, ["loss", "=lr"])


def test_an_append_that_expects_another_newest_row_conflicts_and_touches_nothing(
    opened: tuple[Journal, Results],
) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 2))
    kept = append("r", rows[:2], labels={"team": "a"})
    assert keep(journal, results, kept) == [None]
    other = chain("r", [row("ended")], after=rows[0])
    late = append("r", other, labels={"team": "b"}, snapshot=Snapshot(2, 1, 3, "late"), status="failed")
    early = append("r", rows[2:])._replace(expected_seq=5)
    for wrong in (late, early._replace(rows=()), append("r", rows[:1])):
        assert [type(e) for e in keep(journal, results, wrong)] == [Conflict]
    assert list(journal.rows("r")) == rows[:2]
    assert journal.record("r") == kept.record
    assert journal.snapshot("r") is None
    assert journal.records(RunFilter(labels={"team": "b"}), after=None, limit=9) == []
    assert keep(journal, results, append("r", rows[2:])) == [None]
    assert list(journal.rows("r")) == rows


def test_of_two_appends_to_the_same_place_one_wins_and_others_are_untouched(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    a, b = chain("a", observed(2, 2)), chain("b", observed(2, 2))
    rival = chain("a", observed(1, 3))
    errors = keep(
        journal,
        results,
        append("a", a[:1]),
        append("b", b[:1]),
        append("a", rival),
        append("b", b[1:]),
        append("a", a[1:]),
    )
    assert [type(e) for e in errors] == [type(None), type(None), Conflict, type(None), type(None)]
    assert list(journal.rows("a")) == a
    assert list(journal.rows("b")) == b


def test_rows_out_of_number_are_refused(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 1))
    gap = append("r", [rows[0], rows[2]])
    assert [type(e) for e in keep(journal, results, gap)] == [Invalid]
    assert journal.record("r") is None


def test_every_append_has_one_result_with_its_token_in_order(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(50, 1))
    bad = append("other", [row(seq=1, meta={"x": float("inf")})], token="bad")
    appends = [append("r", rows[i : i + 1], token=object()) for i in range(50)]
    sent = [*appends[:20], bad, *appends[20:]]
    errors = keep(journal, results, *sent)
    assert [item.token for item, _ in results.all] == [item.token for item in sent]
    assert [type(e) for e in errors] == [type(None)] * 20 + [Invalid] + [type(None)] * 30


def test_rows_of_unknown_runs_are_none(opened: tuple[Journal, Results]) -> None:
    journal, _ = opened
    assert journal.record("r") is None
    assert journal.snapshot("r") is None
    assert list(journal.rows("r")) == []
    assert list(journal.blocks("r", ["loss"])) == []
    journal.compact("r")


def left_of(record: RunRecord, tombstone: Row) -> RunRecord:
    return record._replace(status=DELETED, labels={}, seq=tombstone.seq, hash=tombstone.hash)


def test_a_deletion_leaves_a_record_and_a_tombstone_and_the_name_is_not_used_again(
    opened: tuple[Journal, Results],
) -> None:
    journal, results = opened
    a, b = chain("a", observed(6, 2)), chain("b", observed(3, 2))
    kept = append("b", b, labels={"team": "x"})
    first = append("a", a[:3], labels={"team": "x"}, snapshot=Snapshot(3, 1, 5, "{}"))
    assert keep(journal, results, first, kept) == [None, None]
    journal.compact("a")
    assert keep(journal, results, append("a", a[3:5], labels={"team": "x"})) == [None]
    (stone,) = chain(STORE, [row("deleted", meta={"run": "a"})])
    deletion = Deletion(5, stone, left_of(first.record, stone), "token")

    def delete(item: Deletion) -> Exception | None:
        before = len(results.all)
        journal.delete(item)
        return results.wait(before + 1)[-1]

    wrong = [deletion._replace(expected_seq=4), deletion._replace(row=stone._replace(seq=2))]
    for item in wrong:
        assert type(delete(item)) is Conflict
    assert list(journal.rows("a")) == a[:5], "a deletion that comes too late touches nothing"
    assert list(journal.rows(STORE)) == []
    assert delete(deletion) is None
    assert results.all[-1][0].token == "token"
    assert list(journal.rows("a")) == []
    assert (journal.snapshot("a"), journal.snapshots("a")) == (None, [])
    assert journal.record("a") == deletion.record
    assert list(journal.rows(STORE)) == [stone]
    assert journal.records(RunFilter(), after=None, limit=9) == [kept.record]
    assert journal.records(RunFilter(labels={"team": "x"}), after=None, limit=9) == [kept.record]
    assert journal.records(RunFilter(status=DELETED), after=None, limit=9) == [deletion.record]
    assert journal.names() == [STORE, "a", "b"]
    assert journal.check() == []
    errors = keep(journal, results, append("a", a[:1]), append("a", a[5:]))
    assert [type(error) for error in errors] == [Conflict, Conflict]
    assert type(delete(deletion._replace(row=chain(STORE, [stone], after=stone)[0]))) is Conflict, "deleted once"
    assert list(journal.rows("b")) == b
    (second,) = chain(STORE, [row("deleted", meta={"run": STORE})], after=stone)
    assert type(delete(Deletion(None, second, left_of(record(STORE, stone), second), None))) is Invalid
    assert list(journal.rows(STORE)) == [stone], "the store's own journal is no run"


def test_a_note_follows_the_newest_row_of_the_stores_journal_and_changes_no_run(
    opened: tuple[Journal, Results],
) -> None:
    journal, results = opened
    kept = append("a", chain("a", observed(2, 2)))
    assert keep(journal, results, kept) == [None]
    first, second, third = chain(STORE, [row(f"kind {i}", meta={"i": i}) for i in range(3)])

    def note(one: Row) -> Exception | None:
        before = len(results.all)
        journal.note(Note(one, one.seq))
        return results.wait(before + 1)[-1]

    assert note(first) is None
    assert results.all[-1][0].token == 1
    for late_or_early in (first, third):
        assert type(note(late_or_early)) is Conflict
    before = len(results.all)
    journal.delete(Deletion(2, second, left_of(kept.record, second), None))
    assert results.wait(before + 1)[-1] is None
    assert note(third) is None
    assert list(journal.rows(STORE)) == [first, second, third]
    journal.compact(STORE)
    assert list(journal.rows(STORE, after=1)) == [second, third]
    (fourth,) = chain(STORE, [row("kind 4")], after=third)
    assert note(fourth) is None
    assert [one.seq for one in journal.rows(STORE)] == [1, 2, 3, 4]
    assert journal.check() == []


def test_a_damaged_run_may_be_deleted_whatever_is_left_of_it(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("a", observed(3, 2))
    kept = append("a", rows)
    (stone,) = chain(STORE, [row("deleted", meta={"run": "a"})])
    assert keep(journal, results, kept) == [None]
    journal.delete(Deletion(None, stone, left_of(kept.record, stone), None))
    assert results.wait(2)[-1] is None
    assert list(journal.rows("a")) == []


def test_snapshots_are_listed_newest_first(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 1))
    for i, one in enumerate(rows):
        assert keep(journal, results, append("r", [one], snapshot=Snapshot(i + 1, 1, i, str(i)))) == [None]
    assert journal.snapshots("r") == [3, 2, 1]
    assert journal.snapshots("other") == []


def test_an_append_may_bring_a_snapshot_and_no_rows(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(1, 1))
    assert keep(journal, results, append("r", rows)) == [None]
    only = append("r", rows)._replace(expected_seq=1, rows=(), snapshot=Snapshot(1, 1, 0, "{}"))
    assert keep(journal, results, only) == [None]
    assert journal.snapshot("r") == Snapshot(1, 1, 0, "{}")
    assert list(journal.rows("r")) == rows


def test_records_follow_their_runs(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 1))
    for i, one in enumerate(rows):
        item = append("r", [one], step=i, labels={"n": str(i), "é": "ü"}, status="active" if i < 2 else "finished")
        assert keep(journal, results, item) == [None]
        assert journal.record("r") == item.record
        for n in range(3):
            found = journal.records(RunFilter(labels={"n": str(n)}), after=None, limit=9)
            assert found == ([item.record] if n == i else [])


FILTERS: list[tuple[RunFilter, Callable[[int], bool]]] = [
    (RunFilter(), lambda i: True),
    (RunFilter(project="p1"), lambda i: i % 2 == 1),
    (RunFilter(project="P1"), lambda i: False),
    (RunFilter(status="finished"), lambda i: i % 3 == 0),
    (RunFilter(status="active"), lambda i: i % 3 != 0),
    (RunFilter(status="active", stale_before=AT + 10), lambda i: i % 3 != 0 and i >= 10),
    (RunFilter(status="stale", stale_before=AT + 10), lambda i: i % 3 != 0 and i < 10),
    (RunFilter(status="stale"), lambda i: False),
    (RunFilter(status="stale", stale_before=AT + 10, lost_before=AT + 5), lambda i: i % 3 != 0 and 5 <= i < 10),
    (RunFilter(status="lost", stale_before=AT + 10, lost_before=AT + 5), lambda i: i % 3 != 0 and i < 5),
    (RunFilter(policy="plateau"), lambda i: i % 4 in (0, 1)),
    (RunFilter(policy="plateau@2"), lambda i: i % 4 == 1),
    (RunFilter(policy="plat"), lambda i: False),
    (RunFilter(policy="plateau%"), lambda i: False),
    (RunFilter(policy="Plateau"), lambda i: i % 4 == 3),
    (RunFilter(labels={"team": "t1"}), lambda i: i % 5 == 1),
    (RunFilter(labels={"team": "t1", "odd": "yes"}), lambda i: i % 5 == 1 and i % 2 == 1),
    (RunFilter(labels={}), lambda i: True),
    (RunFilter(project="p0", labels={"team": "t2"}, policy="plateau"), lambda i: i % 20 == 12),
]


def test_a_sign_of_life_keeps_a_run_from_being_stale(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", [row("created")])
    assert keep(journal, results, append("r", rows, status="active", updated_at=AT)) == [None]

    def status() -> list[str]:
        filters = (RunFilter(status=s, stale_before=AT + 10, lost_before=AT + 5) for s in ("active", "stale", "lost"))
        return [str(f.status) for f in filters if journal.records(f, after=None, limit=9)]

    assert status() == ["lost"]
    for at, wanted in ((AT + 6, "stale"), (AT + 11, "active")):
        journal.hear("r", Heard(at))
        journal.compact("r")  # waits for the writer
        assert journal.heard(["r", "other"]) == {"r": Heard(at)}
        assert status() == [wanted]
    journal.hear("r", Heard(AT + 6, AT))
    journal.compact("r")
    assert status() == ["stale"], "the newest row is somebody else's"


def test_records_are_filtered_and_paged_newest_first(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    policies = ["plateau@1", "plateau@2", "other@1", "Plateau@1"]
    records = []
    for i in range(24):
        rows = chain(f"r{i}", [row("created")])
        item = append(
            f"r{i}",
            rows,
            project=f"p{i % 2}",
            status="active" if i % 3 else "finished",
            policy=policies[i % 4],
            labels={"team": f"t{i % 5}", **({"odd": "yes"} if i % 2 else {})},
            created_at=AT + i // 4,  # several runs of one age
            updated_at=AT + i,
        )
        records.append(item.record)
        assert keep(journal, results, item) == [None]
    for where, matches in FILTERS:
        expected = sorted(
            (r for i, r in enumerate(records) if matches(i)), key=lambda r: (r.created_at, r.run), reverse=True
        )
        found, after = [], None
        while page := journal.records(where, after=after, limit=3):
            assert len(page) <= 3
            found += page
            after = (page[-1].created_at, page[-1].run)
        assert found == expected, where


def test_the_newest_snapshot_up_to_a_row_is_found(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(6, 1))
    for i in (2, 4, 6):
        snapshot = Snapshot(i, 1, i - 1, f'{{"seq":{i},"é":"ü"}}')
        assert keep(journal, results, append("r", rows[i - 2 : i], snapshot=snapshot)) == [None]
    for until, seq in ((None, 6), (9, 6), (6, 6), (5, 4), (4, 4), (2, 2)):
        found = journal.snapshot("r", until=until)
        assert found == Snapshot(seq, 1, seq - 1, f'{{"seq":{seq},"é":"ü"}}')
    assert journal.snapshot("r", until=1) is None


def test_compacting_changes_nothing_that_is_read(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", [*observed(40, 8), row("ended", meta={"outcome": "finished"})])
    assert keep(journal, results, *(append("r", rows[i : i + 1]) for i in range(41))) == [None] * 41
    before = journal.record("r"), joined_blocks(list(journal.blocks("r", SIGNALS)))
    journal.compact("r")
    assert list(journal.rows("r")) == rows
    assert list(journal.rows("r", after=17, until=23)) == rows[17:23]
    assert (journal.record("r"), joined_blocks(list(journal.blocks("r", SIGNALS)))) == before
    more = chain("r", observed(5, 8), after=rows[-1])
    assert keep(journal, results, append("r", more)) == [None]
    journal.compact("r")
    journal.compact("r")
    assert list(journal.rows("r")) == rows + more
    previous = GENESIS
    for one in journal.rows("r"):
        previous = chained(previous, "r", one)
        assert one.hash == previous


def test_long_runs_read_the_same_in_pages(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(700, 2))
    for start in range(0, 700, 100):
        assert keep(journal, results, append("r", rows[start : start + 100])) == [None]
        if start == 200:
            journal.compact("r")
    assert list(journal.rows("r")) == rows
    assert list(journal.rows("r", after=250, until=650)) == rows[250:650]
    blocks = list(journal.blocks("r", ["loss"]))
    assert joined_blocks(blocks) == joined(rows, ["loss"])
    assert len(blocks) < 20


def test_reading_goes_on_while_rows_are_merged_and_added(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(500, 1))
    assert keep(journal, results, append("r", rows[:400])) == [None]
    reading, blocks = journal.rows("r"), journal.blocks("r", ["loss"])
    read = list(itertools.islice(reading, 50))
    seen = [next(blocks)]
    journal.compact("r")
    assert keep(journal, results, append("r", rows[400:])) == [None]
    read += reading
    seen += blocks
    assert read[:400] == rows[:400]
    assert read == rows[: len(read)]
    values, counts = joined_blocks(seen)["observed", 1, "loss"]
    expected, _ = joined(rows, ["loss"])["observed", 1, "loss"]
    assert len(counts) >= 400
    assert values == expected[: len(values)]


def test_an_append_made_while_delivering_is_kept(opened: tuple[Journal, Results], tmp_path: Path) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 1))
    todo = [append("r", [one]) for one in rows]
    errors: list[Exception | None] = []
    inner = results.__call__

    def deliver(delivered: list) -> None:
        errors.extend(error for _, error in delivered)
        if todo:
            again.append(todo.pop(0))
        inner(delivered)

    again = make("memory" if "Memory" in type(journal).__name__ else "sqlite", tmp_path)
    again.start(deliver)
    again.append(todo.pop(0))
    results.wait(3)
    again.close()
    assert errors == [None, None, None]


def test_a_closed_journal_takes_no_appends(opened: tuple[Journal, Results]) -> None:
    journal, _ = opened
    journal.close()
    journal.close()
    with pytest.raises(Busy):
        journal.append(append("r", chain("r", observed(1, 1))))


@pytest.mark.parametrize(
    "store", ["", "memory", "postgresql://h/d", "sqlite://", "sqlite:///", "sqlite:///:memory:", "a.db"]
)
def test_another_store_is_refused_with_what_is_allowed(store: str) -> None:
    with pytest.raises(Invalid, match=r"'memory:'.*'sqlite:///FILE'"):
        open_journal(store)


def segments(rows: list[Row], *sizes: int) -> list[Stored]:
    """The rows as segments of these sizes."""
    out, start, previous = [], 0, GENESIS
    for size in sizes:
        part = [store(one) for one in rows[start : start + size]]
        out.append(pack_segment(previous, part) if size > 1 else part[0])
        start, previous = start + size, part[-1].hash
    return out


def test_a_whole_run_is_inserted_and_goes_on_like_any_other(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(7, 3))
    wanted = record("r", rows[-1], labels={"team": "a"}, step=20)
    journal.insert(wanted, iter(segments(rows, 4, 2, 1)))
    assert list(journal.rows("r")) == rows
    assert list(journal.rows("r", after=3, until=6)) == rows[3:6]
    assert joined_blocks(list(journal.blocks("r", SIGNALS))) == joined(rows, SIGNALS)
    assert journal.record("r") == wanted
    assert journal.records(RunFilter(labels={"team": "a"}), after=None, limit=9) == [wanted]
    more = chain("r", observed(2, 3, first=21), after=rows[-1])
    assert keep(journal, results, append("r", more)) == [None]
    journal.compact("r")
    assert list(journal.rows("r")) == rows + more


def test_an_insert_of_a_run_that_exists_or_breaks_off_leaves_no_trace(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows, other = chain("r", observed(2, 2)), chain("r", observed(4, 1))
    assert keep(journal, results, append("r", rows)) == [None]
    with pytest.raises(Conflict, match="'r' exists already"):
        journal.insert(record("r", other[-1]), segments(other, 4))
    assert list(journal.rows("r")) == rows
    assert journal.record("r") == record("r", rows[-1])

    def broken() -> Iterator[Stored]:
        yield from segments(chain("s", observed(2, 2)), 2)
        raise Invalid("the file ends here")

    with pytest.raises(Invalid, match="the file ends here"):
        journal.insert(record("s", rows[-1]), broken())
    assert journal.record("s") is None
    assert list(journal.rows("s")) == []
    again = chain("s", observed(2, 2))
    assert keep(journal, results, append("s", again)) == [None]
    assert list(journal.rows("s")) == again


def test_a_closed_journal_takes_no_inserts(opened: tuple[Journal, Results]) -> None:
    journal, _ = opened
    journal.close()
    rows = chain("r", observed(2, 1))
    with pytest.raises(Busy):
        journal.insert(record("r", rows[-1]), segments(rows, 2))


# -- rows by kind, noted rows, deliveries --------------------------------------------------------------------


def eventful(run: str, times: int = 3) -> list[Row]:
    """A run's rows with observations between those that people ask for."""
    rows = [row("created", attempt=0, meta={"spec": run}), row("attached", meta={"session": "s"})]
    for i in range(times):
        rows += observed(9, 4, seed=i, first=36 * i)
        rows[-1] = rows[-1]._replace(meta={"asks": [["stop", {}, "why not"]], "marks": []})
        rows.append(row("commanded", attempt=0, actor=f"actor {i}", at=AT + i, meta={"kind": "hold", "i": i}))
        rows.append(row("reported", attempt=0, first_step=i, last_step=i))
    return chain(run, [*rows, row("ended", meta={"outcome": "finished"})])


@pytest.mark.parametrize("compact", [False, True])
def test_rows_of_some_kinds_are_those_among_all(opened: tuple[Journal, Results], compact: bool) -> None:
    journal, results = opened
    rows = eventful("r")
    assert keep(journal, results, *(append("r", rows[i : i + 1]) for i in range(len(rows)))) == [None] * len(rows)
    if compact:
        journal.compact("r")
    for kinds in ({"commanded"}, {"created", "ended"}, {"reported"}, {"observed", "ended"}, {"nothing"}, set()):
        wanted = [one for one in rows if one.kind in kinds]
        assert list(journal.rows("r", kinds=frozenset(kinds))) == wanted
        some = journal.rows("r", after=5, until=len(rows) - 1, kinds=frozenset(kinds))
        assert list(some) == [one for one in wanted if 5 < one.seq < len(rows)]


def test_what_people_ask_for_is_noted_with_the_rows_and_goes_with_them(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    a, b = eventful("a"), eventful("b", 1)
    late = chain("a", [row("ended")], after=a[3])
    errors = keep(journal, results, append("a", a), append("a", late), append("b", b, project="nlp"))
    assert [type(error) for error in errors] == [type(None), Conflict, type(None)]
    right = [one for one in map(noted, a) if one]
    assert [one.kind for one in right].count("asked") == 3
    assert list(journal.audit.of("a")) == [Noted("a", "vision", one) for one in right]
    assert [one.row for one in journal.audit.of("a", after=2, until=30)] == [r for r in right if 2 < r.seq <= 30]
    journal.compact("a")
    assert list(journal.audit.of("a")) == [Noted("a", "vision", one) for one in right], "made again, the same"
    assert len(journal.audit.newest(AuditFilter(project="nlp"), before=None, limit=99)) == 5
    first, stone = chain(STORE, [row("frozen", meta={}), row("deleted", meta={"run": "a", "project": "vision"})])
    journal.note(Note(first, None))
    journal.delete(Deletion(len(a), stone, left_of(record("a", a[-1]), stone), None))
    assert results.wait(5)[3:] == [None, None]
    assert list(journal.audit.of("a")) == []
    assert list(journal.audit.of(STORE)) == [Noted(STORE, "", first), Noted(STORE, "vision", stone)]


AUDITED: list[tuple[AuditFilter, Callable[[Noted], bool]]] = [
    (AuditFilter(), lambda one: True),
    (AuditFilter(run="a"), lambda one: one.run == "a"),
    (AuditFilter(project="vision"), lambda one: one.project == "vision"),
    (AuditFilter(projects=frozenset({"nlp", ""})), lambda one: one.project in ("nlp", "")),
    (AuditFilter(projects=frozenset()), lambda one: False),
    (AuditFilter(kinds=frozenset({"asked", "frozen"})), lambda one: one.row.kind in ("asked", "frozen")),
    (AuditFilter(without=frozenset({"asked"})), lambda one: one.row.kind != "asked"),
    (AuditFilter(actor="actor 1"), lambda one: one.row.actor == "actor 1"),
    (AuditFilter(from_us=AT + 1, until_us=AT + 3), lambda one: AT + 1 <= one.row.at < AT + 3),
    (AuditFilter(store_kinds=frozenset({"thawed"})), lambda one: one.run != STORE or one.row.kind == "thawed"),
]


def test_noted_rows_of_all_runs_come_newest_first_in_pages(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    for run, project in (("a", "vision"), ("b", "nlp"), ("c", "vision")):
        assert keep(journal, results, append(run, eventful(run), project=project)) == [None]
    for one in chain(STORE, [row("frozen", at=AT + 1), row("thawed", at=AT + 2, meta={"project": "nlp"})]):
        journal.note(Note(one, None))
    assert results.wait(5)[3:] == [None, None]
    everything = [one for run in ("a", "b", "c", STORE) for one in journal.audit.of(run)]
    everything.sort(key=lambda one: (one.row.at, one.run, one.row.seq), reverse=True)
    for where, matches in AUDITED:
        found, before = [], None
        while page := journal.audit.newest(where, before=before, limit=4):
            assert len(page) <= 4
            found += page
            before = (page[-1].row.at, page[-1].run, page[-1].row.seq)
        assert found == [one for one in everything if matches(one)], where


def delivery(n: int, hook: str = "h") -> Delivery:
    return Delivery(f"{hook}-{n}", hook, "ended", "r", "vision", n, AT + n, f'{{"n":{n}}}')


def test_deliveries_come_with_their_rows_or_not_at_all_and_once(opened: tuple[Journal, Results]) -> None:
    journal, results = opened
    rows = chain("r", observed(3, 1))
    with_one = append("r", rows[:1])._replace(deliveries=(delivery(1), delivery(1, "other")))
    late = append("r", rows[:1])._replace(deliveries=(delivery(2),))
    again = append("r", rows[1:2])._replace(deliveries=(delivery(1), delivery(3)))
    assert [type(e) for e in keep(journal, results, with_one, late, again)] == [type(None), Conflict, type(None)]
    journal.outbox.add([delivery(4), delivery(3)])
    found = journal.outbox.pending("h", 9)
    assert [one.seq for one in found] == [1, 3, 4]
    assert [one.number for one in found] == sorted({one.number for one in found})
    assert [one._replace(number=0) for one in found] == [delivery(1), delivery(3), delivery(4)]
    assert journal.outbox.pending("h", 2) == found[:2]
    assert journal.outbox.waiting() == {"h": 3, "other": 1}


def test_what_became_of_a_delivery_is_kept_and_old_ones_are_forgotten(
    opened: tuple[Journal, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, _ = opened
    monkeypatch.setattr(outbox, "OVER_KEPT", 3)
    journal.outbox.add([delivery(n) for n in range(8)])
    first, *rest = journal.outbox.pending("h", 9)
    journal.outbox.settle(first._replace(attempts=1, next_at=AT + 99, error="no answer"))
    assert journal.outbox.pending("h", 1) == [first._replace(attempts=1, next_at=AT + 99, error="no answer")]
    for one in rest[:5]:
        journal.outbox.settle(one._replace(status="delivered", attempts=2, done_at=AT + 7))
    assert [one.seq for one in journal.outbox.pending("h", 9)] == [0, 6, 7]
    over = journal.outbox.newest(None, "delivered", before=None, limit=9)
    assert [(one.seq, one.attempts, one.done_at, one.body) for one in over] == [(n, 2, AT + 7, "") for n in (5, 4, 3)]
    assert [one.seq for one in journal.outbox.newest("h", None, before=over[0].number, limit=3)] == [4, 3, 0]
    assert journal.outbox.newest("other", None, before=None, limit=3) == []
