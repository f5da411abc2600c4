"""Mean and variance of a sliding window, at a cost that does not grow with the window.

Rule of this module: the numbers are those of the exact window contents. They are updated by differences (after
Welford 1962, for a value that leaves as another comes), all taken from a shift near the values so that a large mean
costs no digits, and made anew once per window length, and at once where the spread falls so far below what it was
that rounding would show.
"""

from __future__ import annotations

from math import fsum
from typing import NamedTuple

#: Below this part of the largest spread since they were made, differences are not trusted.
LARGEST_FALL = 1e-4


class Moments(NamedTuple):
    """values: oldest first. shift: what the rest is relative to. excess: mean - shift. m2: sum of squared distances
    from the mean. peak: the largest m2, and age: the number of values, since all were made anew."""

    values: tuple[float, ...]
    shift: float
    excess: float
    m2: float
    peak: float
    age: int


EMPTY = Moments((), 0.0, 0.0, 0.0, 0.0, 0)


#: Half the cost of calling the class.
_new = tuple.__new__


def push(moments: Moments, x: float, size: int) -> Moments:
    """The window with `x` (at most 1e100 in size) as its newest value; the oldest leaves where `size` are in it."""
    values, shift, excess, m2, peak, age = moments
    n = len(values)
    if n < size:
        values = (*values, x)
        distance = x - shift - excess
        excess += distance / (n + 1)
        m2 += distance * (x - shift - excess)
    else:
        oldest = values[0]
        values = (*values[1:], x)
        change, distance = x - oldest, oldest - shift - excess
        excess += change / n
        m2 += change * (x - shift - excess + distance)
    if m2 > peak:
        peak = m2
    if n and age + 1 < size and m2 >= LARGEST_FALL * peak:
        return _new(Moments, (values, shift, excess, m2, peak, age + 1))
    return _anew(values)


def _anew(values: tuple[float, ...]) -> Moments:
    n = len(values)
    shift = fsum(values) / n
    distances = [value - shift for value in values]
    excess = fsum(distances) / n
    m2 = fsum([(d - excess) * (d - excess) for d in distances])
    return Moments(values, shift, excess, m2, m2, 0)


def mean_and_variance(moments: Moments) -> tuple[float, float]:
    """Mean and sample variance (n - 1); 0 where there are no values, or fewer than two."""
    values, shift, excess, m2, _, _ = moments
    n = len(values)
    return shift + excess, (m2 / (n - 1) if n > 1 else 0.0)


def variance(moments: Moments) -> float:
    """The sample variance (n - 1); 0 for fewer than two values."""
    return mean_and_variance(moments)[1]
