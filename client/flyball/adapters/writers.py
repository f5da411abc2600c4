"""Who else writes into an optimizer: the best name that can be found for a value that is not ours.

Rule of this module: it looks and never touches; nothing of another library is wrapped. A look walks through all objects
of the process, so it is taken once per new cause, and a few times at most.

A scheduler or an engine holds the optimizer it works on as an attribute. One that remembers what it wrote last
(`_last_lr`, as torch's schedulers do) proves itself by that value; any other is only a guess, and called so.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any

from flyball import limits
from flyball.adapters.standing import Change
from flyball.optimizer import Conflict

CHECKPOINT = "optimizer.load_state_dict (a checkpoint)"
UNKNOWN = "somebody else"
#: What may refer to an optimizer without working on it.
_NO_HOLDERS = (
    dict, list, tuple, set, types.FrameType, types.ModuleType, types.MethodType, types.FunctionType, types.CellType,
    weakref.ref,
)  # fmt: skip
#: Libraries whose trainers hold the optimizer and leave its settings to schedulers.
_TRAINERS = ("transformers", "trl", "accelerate", "lightning", "pytorch_lightning")


class Writers:
    """The others that work on one optimizer.

    loaded: whether its state was loaded since somebody last looked. named: whether anybody was ever found to write.
    """

    def __init__(self, optimizer: Any, groups: tuple[str, ...]) -> None:
        self.loaded = self.named = False
        self._groups = groups
        self._optimizer = optimizer
        self._proven: list[weakref.ref[Any]] = []
        #: By what was written: how often nobody could be proven to have, and the guess.
        self._guesses: dict[tuple[str, int], tuple[int, str]] = {}
        self._searches = 0

    def conflict(self, found: list[Change], when: str, words: str) -> Conflict | None:
        """What to say about these changes, if there are any. words: with {found} and {wanted} in it."""
        if not found:
            return None
        self.named = True
        what, index, wanted, value = found[0]
        writer = self._name(what, index, value)
        group = self._groups[index] if index < len(self._groups) else f"group{index}"
        others = len({change.group for change in found}) - 1
        where = f"group {group}" + (f" and {others} more" if others else "")
        told = words.format(found="a value on its device" if value is None else f"{value:.9g}", wanted=f"{wanted:.9g}")
        # Of somebody unknown no more can be told than the place.
        cause = f"{when}: {what} by {writer}" + (f" in {group}" if writer.startswith(UNKNOWN) else "")
        return Conflict(cause, f"{writer} writes the {what} of {where} {when}: {told}")

    def is_named(self, writer: Any) -> bool:
        """Whether this very one was proven to have written."""
        return any(known() is writer for known in self._proven)

    def _name(self, what: str, index: int, value: float | None) -> str:
        """Who wrote `value` (None: not known) as the `what` ("learning rate", "momentum") of the group at `index`."""
        if self.loaded:
            return CHECKPOINT
        for known in self._proven:
            writer = known()
            if writer is not None and _wrote(writer, what, index, value):
                return _class(writer)
        count, guess = self._guesses.get((what, index), (0, UNKNOWN))
        count += 1
        # Whoever came later is found later: at the 1st, 2nd, 4th, 8th ... time.
        if count & (count - 1) == 0 and self._searches < limits.WRITER_SEARCHES_MAX:
            self._searches += 1
            found = _outermost(holders(self._optimizer))
            for writer in found:
                if _wrote(writer, what, index, value):
                    self._proven = [*self._proven[-7:], weakref.ref(writer)]
                    return _class(writer)
            likely = [writer for writer in found if _rank(writer) < 3 and not _is_around(writer, self._optimizer)]
            guess = f"{UNKNOWN} (perhaps {_class(min(likely, key=_rank))})" if likely else UNKNOWN
        self._guesses[what, index] = count, guess
        return guess


def schedulers(optimizer: Any) -> list[Any]:
    """What looks like a scheduler of the optimizer, those that hold others first."""
    return _outermost(one for one in holders(optimizer) if _rank(one) in (0, 3))


def holders(optimizer: Any) -> list[Any]:
    """The objects that have the optimizer, or a wrapper of it, as an attribute; no frames, containers or our own."""
    found = _attributes_of(optimizer)
    wrappers = [one for one in found if _is_optimizer(one)]
    if wrappers:
        ids = {id(one) for one in found} | {id(optimizer)}
        found += [one for one in _attributes_of(*wrappers) if id(one) not in ids]
    return found


def _attributes_of(*things: Any) -> list[Any]:
    direct = gc.get_referrers(*things)
    fields = [one for one in direct if isinstance(one, dict)]
    # Where an object's fields are in a dict of their own, it is the dict's owner that counts.
    ids = {id(one) for one in fields}
    owners = [one for one in gc.get_referrers(*fields) if id(_fields(one)) in ids] if fields else []
    out: dict[int, Any] = {}
    for one in (*direct, *owners):
        if isinstance(one, (*_NO_HOLDERS, type)) or type(one).__module__.partition(".")[0] == "flyball":
            continue
        attributes = _fields(one)
        if attributes is not None and any(value is thing for value in attributes.values() for thing in things):
            out[id(one)] = one
    return [one for one in out.values() if all(one is not thing for thing in things)]


def _fields(thing: Any) -> Any:
    try:
        return object.__getattribute__(thing, "__dict__")
    except Exception:
        return None


def _outermost(found: Iterable[Any]) -> list[Any]:
    """Schedulers of schedulers first: it is they that the training script knows."""
    return sorted(found, key=lambda one: not (_fields(one) or {}).get("_schedulers"))


def _wrote(writer: Any, what: str, index: int, value: float | None) -> bool:
    try:
        if what != "learning rate":
            return bool((_fields(writer) or {}).get("cycle_momentum"))
        return value is not None and float(_fields(writer)["_last_lr"][index]) == value
    except Exception:  # it remembers nothing, or not in this form
        return False


def _rank(holder: Any) -> int:
    """The smaller, the likelier: a scheduler whose writes cannot be checked, an engine, anything else, and a scheduler
    that says it wrote something else."""
    name, fields = type(holder).__name__, _fields(holder) or {}
    if "_last_lr" in fields:
        return 3
    if name.endswith("LR") or "sched" in name.lower() or hasattr(type(holder), "get_lr"):
        return 0
    return 1 if hasattr(type(holder), "backward") else 2


def _is_around(holder: Any, optimizer: Any) -> bool:
    """Whether it is around every optimizer of its library, and writes nothing: a wrapper that only shows the groups and
    passes steps on (Lightning's has the optimizer's own class), or a library's trainer. An engine also back-propagates.
    """
    if hasattr(type(holder), "backward"):
        return False
    library = type(holder).__module__.partition(".")[0]
    return _is_optimizer(holder) or isinstance(holder, type(optimizer)) or (library in _TRAINERS and _rank(holder) == 2)


def _is_optimizer(thing: Any) -> bool:
    return callable(getattr(type(thing), "step", None)) and (
        "param_groups" in (_fields(thing) or {}) or hasattr(type(thing), "param_groups")
    )


def _class(writer: Any) -> str:
    return type(writer).__name__
