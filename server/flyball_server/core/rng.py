"""Chance without a generator: every random number is a function of (seed, stream, step, draw).

Rule of this module: nothing is stored between calls, so a replay, a rewind or a second replica draws the
same numbers, and no policy has generator state to save. The mixer is the finaliser of SplitMix64 (Steele,
Lea & Flood 2014, "Fast splittable pseudorandom number generators"; constants of Stafford's variant 13),
applied once per word.
"""

from __future__ import annotations

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15  # 2^64 / golden ratio, the increment of SplitMix64


def mix(z: int) -> int:
    """Scramble the 64-bit word `z`: a bijection in which every input bit reaches every output bit."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


def u64(seed: int, stream: int, step: int, draw: int = 0) -> int:
    """64 random bits of the `draw`-th draw at `step`; any integers are taken, modulo 2^64.

    seed: the run's seed. stream: which use of chance this is (a constant of the policy). step: the
    optimizer step. draw: 0, 1, 2 ... where one step needs several numbers.
    """
    z = _GOLDEN
    for word in (seed, stream, step, draw):
        z = mix((z ^ (word & _MASK)) + _GOLDEN)
    return z


def uniform(seed: int, stream: int, step: int, draw: int = 0) -> float:
    """A float in [0, 1), uniform over the multiples of 2^-53."""
    return (u64(seed, stream, step, draw) >> 11) * 2.0**-53


def choice(n: int, seed: int, stream: int, step: int, draw: int = 0) -> int:
    """An index in 0 .. n-1, for n of at least 1."""
    return int(uniform(seed, stream, step, draw) * n)


#: The stream of the gradient noise that clients add.
NOISE_STREAM = 0x0300


def noise_seed(seed: int, step: int) -> int:
    """The seed of the gradient noise of the optimizer step `step`, below 2^63: every generator takes it."""
    return u64(seed, NOISE_STREAM, step) >> 1
