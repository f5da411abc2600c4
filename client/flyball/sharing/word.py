"""Rank 0's word to all ranks, itself included: what holds at the steps to come.

Rule of this module: a word says only what changed since the last one, and all ranks hear every one, so that all of them
know the same at the same step.
"""

from __future__ import annotations

from typing import Any

from flyball.decisions import Target
from flyball.rng import noise_seed
from flyball.session import Session
from flyball.wire import Group, Settings


class Words:
    """Rank 0's side: composes words out of its session."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}

    def compose(self, session: Session, first: int, count: int, asked: list[list[Any]]) -> dict[str, Any]:
        """The word on the steps from `first` on, `count` of them; the last settings hold until the next word. asked:
        the directives that all ranks are asked for."""
        seed, offset = session.origin
        attach, advice = session.attach, session.newest
        word: dict[str, Any] = {
            "rows": _rows(session, first, count),
            "reference": list(session.reference),
            "bounds": [list(pair) for pair in session.bounds],
            "seed": seed,
            "offset": offset,
            "stop": session.stop_reason,
            "controls": {name: list(value) for name, value in session.controls.snapshot().items()},
            "status": {
                "run": attach.run if session.attached is None else session.attached.run,
                "state": session.state,
                "attempt": None if session.attached is None else session.attached.attempt,
                "through": session.through,
                "outage": session.outage,
                "circuit_open": session.circuit_open,
                "decision": "" if advice is None else advice.code,
                "reason": "" if advice is None else advice.reason,
                "last_error": session.last_error,
                "policy": "" if session.attached is None else session.attached.policy,
                "seq": 0 if advice is None else advice.seq,
                "digest": "" if advice is None else advice.digest,
            },
        }
        changed = {key: value for key, value in word.items() if self._said.get(key) != value}
        self._said = word
        if len(word["rows"]) > 1:
            self._said = {**word, "rows": None}  # the last of them holds on: the next word's first may differ from it
        confirm = session.to_confirm(first)
        if confirm:
            changed["confirm"] = [first, confirm]
        if asked:
            changed["asked"] = asked
        return changed


def _rows(session: Session, first: int, count: int) -> list[list[Any]]:
    """[step, lr, momentum, noise_std, decided, late] wherever that changes; [step] where nothing is to be written."""
    rows: list[list[Any]] = []
    before: Target | None = None
    for step in range(first, first + count):
        target = session.target(step)
        if rows and target is before:
            continue
        before = target
        # The first row holds from the word on, whatever step that is.
        at = None if step == first else step
        rows.append([at] if target is None else [at, *target.settings, target.decided, target.late])
    return rows


class Agreed:
    """Every rank's side: what holds, by the words heard so far."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.reference = tuple(group.lr for group in groups)
        self.bounds: tuple[tuple[float, float], ...] = tuple((0.0, float("inf")) for _ in groups)
        self.offset = 0
        self.stop = ""
        self.status: dict[str, Any] = {}
        self.settings: Settings | None = None
        self._seed = 0
        self._confirm: list[int] | None = None
        self._targets: list[tuple[int, Target | None]] = []

    def hear(self, word: dict[str, Any], step: int) -> None:
        """A word, in force from this rank's `step` on."""
        if (rows := word.get("rows")) is not None:
            self._targets = [(step if row[0] is None else row[0], self._target(row)) for row in rows]
        if (reference := word.get("reference")) is not None:
            self.reference = tuple(reference)
        if (bounds := word.get("bounds")) is not None:
            self.bounds = tuple((low, high) for low, high in bounds)
        self._seed = word.get("seed", self._seed)
        self.offset = word.get("offset", self.offset)
        self.stop = word.get("stop", self.stop)
        self.status = word.get("status", self.status)
        self._confirm = word.get("confirm", self._confirm)

    def at(self, step: int) -> Target | None:
        """What is to be written before this step."""
        targets = self._targets
        while len(targets) > 1 and targets[1][0] <= step:
            del targets[0]
        return targets[0][1] if targets else None

    def confirm(self, step: int) -> int:
        """See `Session.to_confirm`."""
        if self._confirm is None or step < self._confirm[0]:
            return 0
        (_, number), self._confirm = self._confirm, None
        return number

    def noise_seed(self, step: int) -> int:
        """See `Session.noise_seed`."""
        return noise_seed(self._seed, step + self.offset)

    def _target(self, row: list[Any]) -> Target | None:
        if len(row) == 1:
            return None
        _, lr, momentum, noise, decided, late = row
        told = Settings(tuple(lr), momentum and tuple(momentum), noise and tuple(noise))
        # The same object as long as nothing changes: that is how adapters know that there is nothing to write.
        if told != self.settings:
            self.settings = told
        assert self.settings is not None
        return Target(self.settings, decided, late)
