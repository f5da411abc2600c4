"""The gradient noise scale from what ranks know of their gradients.

Rule of this module: two running means, one quotient; the quotient of two single estimates would be biased.

McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1. A gradient over B samples has E|g|^2 = |G|^2 + S / B. Rank r's
is over w_r samples, and what all of N ranks step with is the mean of theirs, as torch's DDP makes it: so with
a = mean(1 / w_r) the mean of the local |g_r|^2 is |G|^2 + S a, and the square of the mean gradient |G|^2 + S a / N.
The noise scale is S / |G|^2, in samples (or whatever weights count): the batch size at which noise and gradient are
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

#: Weight of the past in the running means: about the last hundred steps count.
DECAY = 0.99


class NoiseScale:
    """Told the squares of each step. Begins anew with every attempt."""

    def __init__(self) -> None:
        self._noise = self._signal = 0.0

    def take(self, local: Sequence[tuple[float, float]], mean_sq: float) -> float | None:
        """The noise scale as of this step; None where it cannot be told. local: (|g_r|^2, w_r) of each rank."""
        n = len(local)
        if n < 2 or any(weight <= 0 for _, weight in local):
            return None
        local_sq = sum(square for square, _ in local) / n
        per_weight = sum(1 / weight for _, weight in local) / n
        noise = (local_sq - mean_sq) / (per_weight * (1 - 1 / n))
        signal = (n * mean_sq - local_sq) / (n - 1)
        if not (isfinite(noise) and isfinite(signal)):
            return None  # a step with an overflow says nothing, and must not stay in the means
        self._noise += (1 - DECAY) * (noise - self._noise)
        self._signal += (1 - DECAY) * (signal - self._signal)
        return self._noise / self._signal if self._signal > 0 else None
