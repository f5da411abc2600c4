"""What an adapter measures around an optimizer step, until the script's own call for that step takes it along.

Rule of this module: what the script gives itself counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flyball.pending import Pending

Found = Mapping[str, float | Pending]


class Measured:
    """One step's signals by name. any: whether there are some."""

    def __init__(self) -> None:
        self.any = False
        self._step = -1
        self._found: Found = {}

    def take(self, step: int, found: Found) -> None:
        """Signals of a step, beside those that there are of it already."""
        self._found = {**self._found, **found} if self.any and step == self._step else found
        self._step, self.any = step, True

    def added(self, step: int, grad_norm: Any, others: Any, is_name: Callable[[str], bool]) -> tuple[Any, Any]:
        """The grad_norm and the other signals that the script gave for `step`, with what was measured of it."""
        found, self._found, self.any = self._found, {}, False
        if step != self._step:
            return grad_norm, others
        named = {name: value for name, value in found.items() if is_name(name)}
        own = named.pop("grad_norm", None)
        return own if grad_norm is None else grad_norm, ({**named, **(others or {})} or None)
