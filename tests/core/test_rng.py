"""Goal: the counter-based random numbers never change. Method: fixed vectors, and coarse statistics."""

import pytest

from flyball_server.core import rng

VECTORS = [
    ((0, 1, 0, 0), 0xB8115D8A54E88DFF),
    ((0, 1, 1, 0), 0xBD45E52D3A220324),
    ((7, 0x100, 50, 0), 0x74511C0DB6332A75),
    ((-1, 0x300, 123456789, 3), 0x734CC47C6B1EEDB4),
    ((2**63, 0x20100, 0, 1), 0x036558373B6014CB),
]


@pytest.mark.parametrize(("words", "expected"), VECTORS)
def test_the_same_words_give_the_same_bits_for_ever(words, expected):
    assert rng.u64(*words) == expected
    assert rng.uniform(*words) == (expected >> 11) / 2**53


def test_a_choice_is_the_scaled_uniform():
    assert rng.choice(3, 7, 0x100, 50, 0) == 1
    assert {rng.choice(4, 0, 1, step) for step in range(100)} == {0, 1, 2, 3}
    assert {rng.choice(1, 0, 1, step) for step in range(100)} == {0}


def test_mixing_is_a_bijection_on_64_bits_and_negative_words_wrap():
    assert rng.mix(0) == 0
    assert len({rng.mix(z) for z in range(10_000)}) == 10_000
    assert rng.u64(-1, 0, 0) == rng.u64(2**64 - 1, 0, 0)


def test_uniforms_fill_the_unit_interval_evenly_along_each_word():
    for words in (lambda i: (i, 1, 0), lambda i: (0, i, 0), lambda i: (0, 1, i), lambda i: (0, 1, 0, i)):
        values = [rng.uniform(*words(i)) for i in range(4000)]
        assert all(0 <= value < 1 for value in values)
        for tenth in range(10):
            assert 300 < sum(tenth <= value * 10 < tenth + 1 for value in values) < 500
