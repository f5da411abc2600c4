"""What ranks tell one another, as bytes and as one: the parts that need no process group.

Goal: nothing is lost or rounded on the way, and N ranks count as N. Method: slots and tallies made by hand.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.ranks import Ranks
from flyball.sharing.noise_scale import NoiseScale
from flyball.sharing.slots import DONE, STEP, Head, Row, Slot, head_of, pack, unpack
from flyball.sharing.tally import Tally, Used
from flyball.wire import Settings

numbers = st.none() | st.floats()
rows = st.builds(Row, st.integers(0, 2**40), st.floats(0, 1e9), numbers, numbers, numbers, numbers, numbers)
heads = st.builds(
    Head, st.integers(0, 4), st.integers(-1, 2**40), st.integers(-1, 2**40), st.integers(0, 9), st.booleans()
)


def bits(row: Row) -> list[str]:
    return [str(value) if value is None else float(value).hex() for value in row]


@given(heads, st.lists(rows, max_size=20), st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False)))
def test_a_slot_comes_out_as_it_went_in(head: Head, given_rows: list[Row], more: dict[str, float]) -> None:
    found = unpack(pack(Slot(head, tuple(given_rows), more)))
    assert (found.head, found.more, head_of(pack(found))) == (head, more, head)
    assert list(map(bits, found.rows)) == list(map(bits, given_rows))


def told(tally: Tally, *losses: tuple[float | None, float] | None, step: int = 0) -> list[float | None]:
    """The loss of what the tally tells after every rank gave its loss and weight of a step (None: it is through)."""
    for rank, one in enumerate(losses):
        slot = Slot(Head(DONE, step, step, 0, True)) if one is None else slot_of(step, Row(step, one[1], one[0]))
        tally.take(rank, slot, ())
    return [t.signals[0] if t.signals else None for t in tally.tell()]


def slot_of(step: int, *given_rows: Row) -> Slot:
    return Slot(Head(STEP, step, step + 1, 0, True), given_rows)


@pytest.mark.parametrize(
    ("losses", "mean"),
    [
        (((1.0, 1.0), (4.0, 2.0)), 3.0),
        (((0.1, 1.0), (0.1, 3.0)), 0.1),  # no rounding where all say the same
        (((1.0, 1.0), (None, 2.0)), 1.0),
        (((1.0, 1.0), (math.nan, 0.0)), 1.0),  # a mean of no samples
        (((1.0, 1.0), (math.inf, 2.0)), math.inf),
        (((1.0, 1.0), None), 1.0),
    ],
)
def test_a_loss_is_the_mean_by_weight(losses: tuple[tuple[float, float] | None, ...], mean: float) -> None:
    assert told(Tally(2), *losses) == [mean]


def test_a_loss_that_is_no_number_on_one_rank_is_none_on_all() -> None:
    assert math.isnan(told(Tally(2), (1.0, 1.0), (math.nan, 1.0))[0] or 0)


def test_a_step_is_told_when_the_last_rank_has_told_it() -> None:
    tally = Tally(2)
    tally.take(0, slot_of(2, *(Row(step, 1.0, 1.0) for step in range(3))), ())
    tally.take(1, slot_of(0, Row(0, 1.0, 3.0)), ())
    assert [one.step for one in tally.tell()] == [0]
    tally.take(1, slot_of(2, Row(1, 1.0, 3.0), Row(2, 1.0, 5.0)), ())
    assert [(one.step, one.signals and one.signals[0]) for one in tally.tell()] == [(1, 2.0), (2, 3.0)]
    assert list(tally.tell()) == []


def test_receipts_say_on_how_many_ranks() -> None:
    tally, slot = Tally(3), slot_of(5, *(Row(step, 1.0, 1.0) for step in range(6)))
    good, bad = Settings((0.1,)), Settings((0.2,))
    tally.take(0, slot, [Used(0, good, decided=-1), Used(4, bad, wanted_lr=(0.1,), conflict="x wrote")])
    tally.take(1, slot, [Used(0, good)])
    tally.take(2, slot, [Used(0, good), Used(2, bad, "y wrote"), Used(3, good)])
    found = {one.step: one.used for one in tally.tell() if one.used}
    assert {step: (ranks, of) for step, ((_, ranks, of),) in found.items()} == {
        0: (3, 3),
        2: (2, 3),
        3: (3, 3),
        4: (2, 3),
    }
    assert [used[0][0].conflict for used in found.values()] == [
        "",
        "rank 2 used 0.2 instead of 0.1: y wrote",
        "",
        "x wrote",
    ]


def test_the_noise_scale_of_noise_free_gradients_is_zero_and_an_overflow_leaves_no_trace() -> None:
    scale = NoiseScale()
    assert scale.take([(4.0, 8.0), (4.0, 8.0)], 4.0) == 0
    assert scale.take([(math.inf, 8.0), (4.0, 8.0)], 4.0) is None
    assert scale.take([(4.0, 8.0), (4.0, 8.0)], 4.0) == 0
    assert scale.take([(4.0, 8.0)], 4.0) is None


@pytest.mark.parametrize(("field", "value"), [("every", 0), ("every", True), ("timeout_s", 0), ("timeout_s", "5")])
def test_wrong_ranks_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"ranks: {field} is"):
        Ranks(**{field: value})
