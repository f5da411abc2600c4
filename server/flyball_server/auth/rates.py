"""So many a second for each of those who ask.

Rule of this module: no clock and bounded memory; who was forgotten begins anew with a full bucket.
"""

from __future__ import annotations

from collections import OrderedDict


class Rates:
    """Token buckets: `per_s` requests a second for each key, and `burst` at once; `keys_max` keys are remembered."""

    def __init__(self, per_s: float, burst: float, keys_max: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._keys_max = keys_max
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now: float) -> float:
        """Take one request at the time `now`; 0.0 where there was one, else the seconds until there will be."""
        left, at = self._known.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_s)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) / self._per_s
        self._known[key] = (left if wait_s else left - 1.0, now)
        if len(self._known) > self._keys_max:
            self._known.popitem(last=False)
        return wait_s
