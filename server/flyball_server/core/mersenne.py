"""Python's Mersenne Twister as pure functions, for policies that repeat what a published class drew from it.

Rule of this module: the whole state of a generator goes in and comes out as a tuple of integers; nothing is kept
here. Policies of our own draw from `rng.py`, which needs no state.
"""

from __future__ import annotations

from random import Random


def seeded(seed: int) -> tuple[int, ...]:
    """The state of `random.Random(seed)`."""
    state: tuple[int, ...] = Random(seed).getstate()[1]
    return state


def below(n: int, state: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """An index in 0 .. n-1 as `choice` and `randrange` draw it (for n = 1, too), and the state after it.

    Raises ValueError where `state` is not one that `seeded` or `below` gave.
    """
    generator = Random(0)
    generator.setstate((Random.VERSION, state, None))
    index = generator.randrange(n)
    return index, generator.getstate()[1]
