"""Goal: a selector means exactly the runs it names, and what means nothing is refused with what would."""

import pytest

from flyball_server.auth.access import Caller
from flyball_server.core.errors import Invalid
from flyball_server.fleet.selector import parsed, selected
from flyball_server.storage.journal import RunFilter, RunRecord

ANYBODY = Caller("me", "admin")


class Records:
    """A store's listing; it remembers what it was asked for."""

    def __init__(self, *records):
        self._records = records

    def records(self, where, *, after, limit):
        self.where = where
        found = [one for one in self._records if after is None or (one.created_at, one.run) < after]
        return found[:limit]


def record(run, status="active", project="default", at=1):
    return RunRecord(run, project, run.rpartition(":")[2], status, "constant@1", {}, 1, 0, at, at, 1, b"")


def test_a_selector_is_what_the_store_can_filter_by_and_patterns_of_names():
    found = parsed(
        'project=vision, label.team=a,label.note="x, \\"y\\"", policy=windowed@1,status=stale,run=ab-*,run=*7'
    )
    assert found.where == RunFilter("vision", "stale", "windowed@1", {"team": "a", "note": 'x, "y"'})
    assert found.globs == ("ab-*", "*7")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" ", "run=\\* means every run"),
        ("projct=vision", "did you mean 'project'"),
        ("label=a", "label.NAME"),
        ("label.=a", "lacks its label"),
        ("project=", "lacks its value"),
        ("project=a,project=b", "given twice"),
        ("label.team=a,label.team=b", "given twice"),
        ("status=activ", "did you mean 'active'"),
        ("project=a,,run=b", "is no condition"),
        ("vision", "give NAME=VALUE"),
        ('label.a="x', "is no condition"),
        ("project=\ud800", "is none"),
        ("label.a=\x00", "is none"),
        ("run=" + "x" * 3000, "3004 characters"),
    ],
)
def test_what_means_nothing_is_refused_with_the_remedy(text, words):
    with pytest.raises(Invalid, match=words):
        parsed(text)


def test_without_a_status_only_what_has_not_ended_is_meant_and_only_what_the_caller_reaches():
    records = Records(
        record("a", at=9), record("b", "finished", at=8), record("v:c", "created", "v", at=7), record("d", "damaged")
    )
    names = [one.run for one in selected(records, parsed("run=*"), ANYBODY, 5)]
    assert names == ["a", "v:c"]
    assert [one.run for one in selected(records, parsed("run=*"), Caller("x", "viewer", frozenset("v")), 5)] == ["v:c"]
    assert [one.run for one in selected(records, parsed("run=v:*"), ANYBODY, 5)] == ["v:c"]
    assert [one.run for one in selected(records, parsed("run=c"), ANYBODY, 5)] == ["v:c"], "by its name in the project"
    selected(records, parsed("status=active"), ANYBODY, 5)
    assert records.where.stale_before < 5, "counted back from now"


def test_more_runs_than_one_command_may_mean_are_refused(monkeypatch):
    from flyball_server import limits

    monkeypatch.setattr(limits, "FLEET_MAX", 1200)
    many = Records(*(record(f"r{at:04}", at=at) for at in range(1201, 0, -1)))
    assert len(selected(many, parsed("run=r0*"), ANYBODY, 0)) == 999, "read in pages"
    with pytest.raises(Invalid, match="more than 1200 runs: add a condition"):
        selected(many, parsed("run=*"), ANYBODY, 0)
