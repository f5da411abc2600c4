"""Goal: an event and its outcome come back from a journal row bit for bit, and always as the same bytes.

Method: events of every kind from hypothesis, there and back; one row's hash written down here, so that the format
cannot change without somebody noticing.
"""

import json
import math
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball_server import records
from flyball_server.core.commands import Control
from flyball_server.core.events import (
    Applied,
    Attached,
    Commanded,
    CommandMoved,
    Created,
    Declared,
    DirectiveAnswered,
    Ended,
    Judged,
    Mark,
    Observed,
    Origin,
    Outcome,
    Proposed,
    Receipt,
    Reported,
    Spec,
)
from flyball_server.core.run import NOTHING
from flyball_server.core.types import Group, Settings
from flyball_server.records import Entry, from_row, spec_of, to_entry, utc
from flyball_server.storage.journal import GENESIS, Row, canonical, chained

GROUPS = (Group("body", 0.1, 0.9), Group("head", 0.01, None, (0.9, 0.999)), Group("bias", 0.5))

words = st.text(max_size=6)
finite = st.floats(allow_nan=False, allow_infinity=False)
steps_ = st.integers(0, 2**62)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
mappings = st.dictionaries(words, plain, max_size=3)
#: Every name that the service takes as a signal's, among them those of the row's own columns.
names = st.sampled_from(["loss", "reward", "grad_norm", "acc/top-1", "lr", "momentum", "late", "number"])
momenta = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99), st.none())
settings_ = st.builds(
    Settings,
    lr=st.tuples(finite, finite, finite),
    momentum=st.none() | momenta,
    noise_std=st.none() | st.tuples(*[st.floats(0, 10)] * 3),
)


def row_of(entry, seq=2):
    """The entry as a row, after the trip through JSON that every store makes."""
    meta = json.loads(json.dumps(entry.meta, allow_nan=False))
    return Row(seq, *entry[:4], "driver", 1_700_000_000_000_000, meta, entry.columns, b"")


def there_and_back(event, outcome=NOTHING):
    entry = to_entry(event, outcome)
    row = row_of(entry)
    again, told = from_row(row, GROUPS)
    assert canonical("r", row_of(to_entry(again, told))) == canonical("r", row)
    return again, told


def same(one, other):
    """Equal bit for bit: NaN is NaN, and -0.0 is not 0.0."""
    return repr(one) == repr(other)


@st.composite
def observations(draw):
    n = draw(st.integers(1, 12))
    if draw(st.booleans()):
        steps = sorted(draw(st.sets(steps_, min_size=n, max_size=n)))
    else:
        first = draw(st.integers(0, 1000))
        steps = list(range(first, first + n))
    values = draw(st.sampled_from([st.floats(), st.none() | st.floats(), st.floats(width=32), st.none()]))
    columns = {
        name: draw(st.lists(values, min_size=n, max_size=n)) for name in draw(st.lists(names, unique=True, max_size=4))
    }
    at = sorted(draw(st.sets(st.sampled_from(steps), min_size=1)) | {steps[0]})
    changes = tuple((step, draw(settings_)) for step in at)
    three = st.tuples(finite, finite, finite)
    marks = st.builds(Mark, st.sampled_from(steps), words, words, words, three, three, st.none() | mappings)
    return Observed(draw(st.integers(1, 9)), steps, columns), Outcome(changes, tuple(draw(st.lists(marks, max_size=2))))


@settings(max_examples=200, deadline=None)
@given(pair=observations())
def test_observations_with_their_decisions_come_back_bit_for_bit(pair):
    event, outcome = pair
    again, told = there_and_back(event, outcome)
    assert (again.attempt, list(again.steps)) == (event.attempt, list(event.steps))
    assert same(dict(sorted(again.signals.items())), dict(sorted(event.signals.items())))
    assert same(told, outcome)


@settings(max_examples=100, deadline=None)
@given(
    attempt=st.integers(1, 9),
    receipts=st.lists(
        st.builds(
            Receipt,
            steps_,
            steps_,
            st.integers(-1, 2**62),
            settings_,
            st.booleans(),
            words,
            st.integers(0, 512),
            st.integers(0, 2**53),
            st.dictionaries(words, st.floats(), max_size=3),
            st.none() | st.tuples(st.floats(), st.floats(), st.floats()),
            st.integers(0, 512),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_receipts_come_back_bit_for_bit(attempt, receipts):
    event = Applied(attempt, tuple(receipts))
    again, told = there_and_back(event)
    assert same(again, event)
    assert told is NOTHING


def in_order(signals):
    return dict(sorted(signals.items()))


@given(
    event=st.one_of(
        st.builds(
            Attached,
            st.integers(1, 9),
            st.integers(0, 8),
            steps_,
            words,
            words,
            st.none() | steps_,
            st.none() | mappings,
            claimed=st.none() | mappings,
        ),
        st.builds(DirectiveAnswered, st.integers(1, 9), words, st.sampled_from(["done", "declined"]), words, steps_),
        st.builds(Declared, st.integers(1, 9), st.lists(st.builds(Control, words, finite, finite, finite)).map(tuple)),
        st.builds(CommandMoved, words, words, st.integers(-1, 2**53), st.integers(0, 9), st.integers(0, 9), words),
        st.builds(Judged, words, words, words, words),
        st.builds(Commanded, words, mappings, words, words, words, st.none() | steps_, st.none() | steps_, words),
        st.builds(
            Proposed, words, mappings, words, words, st.integers(1, 3), words, st.none() | steps_, st.none() | steps_
        ),
        st.builds(Ended, st.integers(1, 9), st.sampled_from(["finished", "failed"])),
        st.builds(
            Reported,
            steps_,
            st.dictionaries(names, st.floats(), min_size=1).map(lambda d: dict(sorted(d.items()))),
            words,
            st.integers(0, 2**53),
            words,
        ),
    )
)
def test_all_other_events_come_back_equal(event):
    again, told = there_and_back(event)
    assert same(again, event)
    assert told is NOTHING


@given(
    labels=st.dictionaries(words, words, max_size=3),
    policy=mappings,
    base=st.none() | mappings,
    guard=mappings,
    seed=st.integers(-(2**63), 2**63 - 1),
    shadows=st.dictionaries(words, mappings, max_size=2),
    origin=st.none()
    | st.builds(
        Origin, st.sampled_from(["fork", "token"]), words, steps_, steps_, steps_, words, state=st.none() | mappings
    ),
)
def test_a_specification_comes_back_equal(labels, policy, base, guard, seed, shadows, origin):
    spec = Spec("p:r", "p", "r", labels, GROUPS, policy, base, guard, "absolute", seed, "", shadows)
    again, _ = there_and_back(Created(spec, origin))
    assert again == Created(spec, origin)
    assert spec_of(row_of(to_entry(Created(spec), NOTHING))).groups == GROUPS


def test_a_group_says_that_it_is_lr_free_only_where_it_is_so_that_older_rows_are_the_same_bytes():
    groups = (Group("body", 0.1, 0.9), Group("free", 1.0, None, (0.9, 0.999), True))
    spec = Spec("p:r", "p", "r", {}, groups, {}, None, {}, "absolute", 0, "", {})
    entry = to_entry(Created(spec), NOTHING)
    assert entry.meta["spec"]["groups"] == [["body", 0.1, 0.9, None], ["free", 1.0, None, (0.9, 0.999), True]]
    assert spec_of(row_of(entry)).groups == groups


def observed(**signals):
    n = len(next(iter(signals.values())))
    settings_now = Settings((0.1, 0.01, 0.5))
    return to_entry(Observed(1, list(range(n)), signals), Outcome(((0, settings_now),), ()))


def types(entry):
    return {c.name: c.type for c in entry.columns if not c.name.startswith("=")}


def test_a_column_is_float32_only_where_nothing_is_lost():
    narrow = array("f", [0.1, 1e-40, -3.5]).tolist()
    assert types(observed(loss=narrow)) == {"loss": "f"}
    for wide in ([0.1], [1e300], [1e-300], [math.nan], [2.0**24 + 1]):
        assert types(observed(loss=wide)) == {"loss": "d"}
    for value in (math.inf, -math.inf, -0.0):
        (again, _) = from_row(row_of(observed(loss=[value])), GROUPS)
        assert same(again.signals["loss"], [value])


def test_not_measured_is_no_nan():
    entry = observed(loss=[None, math.nan, 1.0, None])
    assert types(entry) == {"loss": "d", "loss?": "I"}
    again, _ = from_row(row_of(entry), GROUPS)
    assert same(again.signals, {"loss": [None, math.nan, 1.0, None]})


def test_consecutive_steps_cost_nothing_and_others_are_kept():
    outcome = Outcome(((5, Settings((0.1, 0.01, 0.5))),), ())
    assert [c.name for c in to_entry(Observed(1, [5, 6, 7], {}), outcome).columns] == ["=at", "=lr"]
    entry = to_entry(Observed(1, [5, 7, 70], {}), outcome)
    assert (entry.first_step, entry.last_step) == (5, 70)
    assert list(from_row(row_of(entry), GROUPS)[0].steps) == [5, 7, 70]


def test_a_signal_may_be_named_like_a_column_of_the_row():
    for name in ("step", "at", "lr", "meta"):
        event = Observed(1, [3, 4], {name: [0.5, None]})
        again, _ = there_and_back(event, Outcome(((3, Settings((0.1, 0.01, 0.5))),), ()))
        assert (list(again.steps), dict(again.signals)) == (event.steps, event.signals)


def test_the_order_in_which_signals_are_named_does_not_show():
    assert observed(loss=[1.0], reward=[2.0]) == observed(reward=[2.0], loss=[1.0])


def test_the_format_of_a_row_has_not_changed():
    """Journals of released versions are read with these bytes: a change here needs a new kind, never a new hash."""
    event = Observed(3, [5, 6, 9], {"loss": [1.5, None, 0.1], "grad_norm": [0.5, math.nan, math.inf]})
    changes = (
        (5, Settings((0.1, 0.01, 0.5), (0.9, 0.8, None))),
        (9, Settings((0.05, 0.01, 0.5), None, (0.0, 0.0, 1.0))),
    )
    marks = (Mark(9, "track", "reduce", "guard_max", (0.1, 0.01, 0.5), (0.05, 0.01, 0.5), {"best": 0.25, "n": None}),)
    entry = to_entry(event, Outcome(changes, marks))
    assert isinstance(entry, Entry)
    assert chained(GENESIS, "vision:r", row_of(entry, 7)).hex() == GOLDEN_OBSERVED
    receipt = Receipt(4, 6, 5, Settings((0.1, 0.01, 0.5), (0.9, 0.8, None)), True, "somebody else", 2)
    assert chained(GENESIS, "vision:r", row_of(to_entry(Applied(3, (receipt,)), NOTHING), 8)).hex() == GOLDEN_APPLIED


GOLDEN_OBSERVED = "4d68f94ec248330a0ec476b5dc7d940fef210adb65b9e87afe71edae4f3e0def"
GOLDEN_APPLIED = "ce79fa0b1a456c6f43023bb0b194d1a475a9dade24e16b17d25808edf6162515"


@pytest.mark.parametrize(
    ("at", "text"), [(0, "1970-01-01T00:00:00Z"), (1_700_000_000_123_456, "2023-11-14T22:13:20.123456Z")]
)
def test_times_for_people_are_utc(at, text):
    assert utc(at) == text
    assert records.utc is utc
