"""Goal: mean and variance of a sliding window are those of its exact contents, whatever has been in it before.

Method: exact fractions over the window after every push, on ordinary and hostile values; each rule of renewal alone.
"""

import json
import random
from fractions import Fraction

import pytest

from flyball_server.core.moments import EMPTY, Moments, _anew, mean_and_variance, push, variance


def exact(values):
    """Mean and sample variance as fractions."""
    numbers = [Fraction(value) for value in values]
    middle = sum(numbers) / len(numbers)
    return middle, sum((one - middle) ** 2 for one in numbers) / max(1, len(numbers) - 1)


def ordinary(chance, i):
    return 3.0 * 0.99**i + 0.1 * chance.gauss(0, 1)


def trending(chance, i):
    return 100.0 - i + 0.01 * chance.random()


def far_from_zero(chance, i):
    return 1e9 + 1e-3 * chance.gauss(0, 1)


def grainy(chance, i):
    return 1e9 + 2.0**-23 * chance.choice([0, 0, 0, 1, 2])


def spiked(chance, i):
    return 1e12 * chance.random() if i % 37 == 0 else chance.random()


def calming(chance, i):
    return 1.0 + chance.gauss(0, 1) * 10.0 ** -(i // 25)


def huge(chance, i):
    return chance.choice([1e100, -1e100, 1.0]) if i < 60 else 2.0 + chance.random()


@pytest.mark.parametrize("size", [1, 2, 5, 20])
@pytest.mark.parametrize("kind", [ordinary, trending, far_from_zero, grainy, spiked, calming, huge])
def test_mean_and_variance_are_those_of_the_exact_contents(kind, size):
    chance, moments, values = random.Random(size), EMPTY, []
    for i in range(150):
        values.append(kind(chance, i))
        moments = push(moments, values[-1], size)
        assert moments.values == tuple(values[-size:])
        middle, expected = exact(moments.values)
        largest = max(map(abs, moments.values))
        assert mean_and_variance(moments)[0] == pytest.approx(float(middle), rel=1e-12, abs=1e-12 * largest)
        assert mean_and_variance(moments)[1] == variance(moments) == pytest.approx(float(expected), rel=1e-9, abs=0), i


def test_a_constant_window_has_no_spread_at_all():
    moments = EMPTY
    for _ in range(70):
        moments = push(moments, 0.1, 20)
        assert variance(moments) == 0.0
        assert mean_and_variance(moments)[0] == pytest.approx(0.1, rel=1e-15)
    for value in (5e8, *[0.1] * 20):
        moments = push(moments, value, 20)
    assert variance(moments) < 1e-32


def test_fewer_than_two_values_have_no_variance():
    assert mean_and_variance(EMPTY) == (0.0, 0.0)
    assert mean_and_variance(push(EMPTY, 3.0, 5)) == (3.0, 0.0)
    assert mean_and_variance(push(push(EMPTY, 3.0, 5), 5.0, 5)) == (4.0, 2.0)
    assert mean_and_variance(push(push(EMPTY, 3.0, 1), 5.0, 1)) == (5.0, 0.0)


def test_everything_is_made_anew_once_per_window_length():
    chance, moments, ages = random.Random(0), EMPTY, []
    for _ in range(41):
        moments = push(moments, chance.random(), 20)
        ages.append(moments.age)
    assert ages == [*range(20), *range(20), 0]


def test_everything_is_made_anew_where_the_spread_falls_below_a_ten_thousandth_of_its_peak():
    kept = push(Moments((0.0,) * 4, 0.0, 0.0, 1.0, 10_000.0, 0), 0.0, 4)
    assert (kept.m2, kept.peak, kept.age) == (1.0, 10_000.0, 1)
    anew = push(Moments((0.0,) * 4, 0.0, 0.0, 0.999, 10_000.0, 0), 0.0, 4)
    assert (anew.m2, anew.peak, anew.age) == (0.0, 0.0, 0)
    wider = push(Moments((0.0,) * 4, 0.0, 0.0, 0.0, 0.0, 0), 2.0, 4)
    assert (wider.m2, wider.peak, wider.age) == (3.0, 3.0, 1)


def test_the_sum_of_squares_is_the_nearest_float_where_the_grain_of_the_values_shows():
    moments = EMPTY
    for value in (2, 10, 10):
        moments = push(moments, 2.0**53 + value, 3)
    assert _anew(moments.values).m2 == 128 / 3


def test_a_window_that_came_through_json_goes_on_bit_for_bit():
    chance, moments = random.Random(3), EMPTY
    for _ in range(100):
        values, *rest = json.loads(json.dumps(moments))
        x = chance.gauss(0, 1)
        carried, moments = push((tuple(values), *rest), x, 7), push(moments, x, 7)
        assert repr(carried) == repr(moments)
