"""A ready checkpoint of a torch training in the machine's memory: it does what the service asks for.

    governor = flyball.attach(optimizer, run="resnet-7", policy="spike_safe")
    checkpoint = flyball.MemoryCheckpoint(governor, every=500, model=model, optimizer=optimizer, scheduler=scheduler)

From here on `checkpoint`, `restore` and `rewind` are carried out without a line of the script: a playbook goes back
before a spike, a range test leaves no trace. Training after going back is, bit for bit, what it was the first time.

What is kept: everything that is named, and the random numbers of Python, NumPy, torch and every CUDA device. A name may
stand for a module, an optimizer, a `torch.Generator`, anything with `state_dict` and `load_state_dict` (a GradScaler, a
scheduler, a StatefulDataLoader, an average of the weights), or a list of such. Tensors are put back in place, so DDP,
compiled modules and tensor learning rates go on. Gradients are not kept: an iteration makes its own.

Where the data goes on: without `data=`, at the batch where it is, so the batches since the checkpoint are skipped, as
one wants after a spike. With `data=`, an object whose `load_state_dict` decides which batch comes next, at the batch
where it was; where such an object has a method `skip(batches)`, that is called with how many the service wants skipped.
A plain `for batch in loader` does not look at its loader again, and cannot go back.

Limits: the copies stay below `limit_mb`, and die with the process: they do not replace checkpoints on a disk.

Of several ranks that share a run each makes one of these, keeps its own part, and goes back at the same step as the
others: to the newest checkpoint that all of them have. One that fits into the memory of some ranks only is none. Where
not all ranks of the job share the run, this declines.

Rule of this module: what does not fit into the limit is declined before anything is copied, and going back is done
altogether or not at all. (A `load_state_dict` of the script's own that raises on one rank alone is found out too late
for the others: then all decline, and the log says that ranks differ.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flyball.adapters.torch_copies import Chance, Copied, Thing, check_fit, copied, put_all, size_of, thing
from flyball.errors import Declined
from flyball.governor import Governor

log = logging.getLogger("flyball")

_MB = 1e6


class Kept(NamedTuple):
    """A checkpoint. tag: "" of one that nobody named. step: the optimizer step to go on with. size: in bytes.
    line: how often the training had gone back before it."""

    tag: str
    step: int
    size: int
    token: Mapping[str, Any]
    parts: Mapping[str, Copied]
    line: int = 0

    @property
    def key(self) -> tuple[int, str, int]:
        """The same on all ranks."""
        return self.step, self.tag, self.line

    def __str__(self) -> str:
        return f"step {self.step}" + (f" {self.tag!r}" if self.tag else "")


class MemoryCheckpoint:
    """Checkpoints of one training, newest last.

    Args:
        governor: what `attach` returned. Its handlers for checkpoint, restore and rewind are this one's from here on.
        limit_mb: megabytes (of 10^6 bytes) that all copies together may take.
        keep: how many are kept that nobody named; the oldest goes first. One that was named (`{"tag": NAME}`) stays
            until another is saved under its name.
        every: also save one after so many optimizer steps; None: only where the service asks.
        things: what to keep, by name.

    Raises:
        TypeError: a thing that there is no way to keep.
        ValueError: a limit that makes no sense.
    """

    def __init__(
        self, governor: Governor, *, limit_mb: float = 2048, keep: int = 3, every: int | None = None, **things: Any
    ) -> None:
        if isinstance(limit_mb, bool) or not isinstance(limit_mb, int | float) or not limit_mb > 0:
            raise ValueError(f"limit_mb is {limit_mb!r:.80}: give megabytes, more than 0")
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r:.80}: give a number of checkpoints, 1 or more")
        if not things:
            raise ValueError("there is nothing to keep: give model=..., optimizer=... and what else the training has")
        self._governor = governor
        self._limit = int(limit_mb * _MB)
        self._keep = keep
        self._data = things.get("data")
        self._things: dict[str, Thing] = {name: thing(name, value) for name, value in things.items()}
        self._things["random numbers"] = Chance()
        self._kept: list[Kept] = []
        #: Why there was none last.
        self._told = ""
        #: How often the training has gone back.
        self._line = 0
        governor.on("checkpoint", self._checkpoint)
        governor.on("restore", self._restore)
        governor.on("rewind", self._rewind)
        if every is not None:
            governor.every(every, self._regularly)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What there is to go back to, in the order of saving."""
        return tuple(self._kept)

    def save(self, tag: str = "") -> Kept:
        """Copy everything, between two iterations. Raises Declined where that would not fit into the limit."""
        self._check_shared()
        live = {name: one.live() for name, one in self._things.items()}
        size = sum(map(size_of, live.values()))
        # First what there is to give up for it, then the memory for it.
        self._kept = self._room_for(tag, size)
        token = self._governor.state_dict()
        new = Kept(tag, token["step"], size, token, {name: copied(tree) for name, tree in live.items()}, self._line)
        self._kept.append(new)
        return new

    def restore(self, kept: Kept) -> None:
        """Go back to it, and the service, too; of several ranks all at once. Raises Declined where the training is not
        what it was."""
        self._check_shared()
        pairs = [(name, self._things[name], part) for name, part in kept.parts.items()]
        self._together(lambda: check_fit(pairs), "no rank has put anything back")
        self._together(lambda: put_all(pairs), "others have put theirs back, and ranks differ from here on")
        self._line += 1
        self._governor.load_state_dict(kept.token)
        # What nobody named and lies behind it is of a line that was left.
        self._kept = [one for one in self._kept if one.tag or one.step <= kept.step]

    def forget(self) -> None:
        """Let go of all copies."""
        self._kept.clear()

    # -- what the service asks for ---------------------------------------------------------------------

    def _checkpoint(self, args: Mapping[str, Any]) -> str:
        new = self.save(str(args.get("tag", "")))
        used = sum(one.size for one in self._kept)
        return f"{new}: {_mb(new.size)} MB in memory, {_mb(used)} of {_mb(self._limit)} MB used by {len(self._kept)}"

    def _restore(self, args: Mapping[str, Any]) -> str:
        tag, before = args.get("tag"), args.get("before_step")
        if tag:
            return self._go_back(args, [one for one in self._kept if one.tag == tag], f"named {tag!r}")
        if before is not None:
            # The loss of a step tells of the updates before it: one saved just before it has them already.
            older = [one for one in self._kept if one.step < before]
            return self._go_back(args, older, f"from before step {before}")
        return self._go_back(args, self._kept, "at all")

    def _rewind(self, args: Mapping[str, Any]) -> str:
        step = args["step"]
        return self._go_back(args, [one for one in self._kept if one.step <= step], f"at or before step {step}")

    def _go_back(self, args: Mapping[str, Any], fitting: list[Kept], wanted: str) -> str:
        told = self._governor.agree([one.key for one in fitting])
        there = [{tuple(key) for key in keys} for keys in told if keys is not None]
        fitting = [one for one in fitting if all(one.key in keys for keys in there)]
        if not fitting:
            kept = ", ".join(map(str, self._kept)) or "none"
            everywhere = "" if self._governor.ranks == 1 else " of every rank"
            raise Declined(f"there is no checkpoint {wanted} in memory{everywhere}; kept: {kept}")
        # Of those for the same step the newest: an older one may be of a line that was left.
        newest = max(fitting, key=lambda one: (one.step, one.line, one.tag))
        left = self._governor.status.step
        self.restore(newest)
        skip = getattr(self._data, "skip", None)
        batches = args.get("skip_batches", 0)
        if self._data is None:
            data = f"the data goes on where it was, so {left - newest.step} batches are skipped"
        elif batches and callable(skip):
            skip(batches)
            data = f"{batches} batches are skipped"
        else:
            data = "the data went back, too" + (f"; data has no skip(), so none of {batches} is" if batches else "")
        return f"back from step {left} to {newest}; {data}"

    def _room_for(self, tag: str, size: int) -> list[Kept]:
        """What stays beside a new one. Raises Declined where even that is too much."""
        stay = [one for one in self._kept if not tag or one.tag != tag]
        unnamed = [one for one in stay if not one.tag]
        spare = unnamed[: max(0, len(unnamed) - self._keep + 1)] if not tag else []
        while True:
            gone = {id(one) for one in spare}
            left = [one for one in stay if id(one) not in gone]
            used = sum(one.size for one in left)
            if used + size <= self._limit:
                return left
            more = next((one for one in left if not one.tag), None)
            if more is None:
                named = f" beside {_mb(used)} MB of {', '.join(map(str, left))}" if left else ""
                # As many digits as it takes to see the difference.
                digits = next((n for n in range(1, 6) if _mb(used + size, n) != _mb(self._limit, n)), 6)
                raise Declined(
                    f"a checkpoint needs {_mb(size, digits)} MB{named}, and limit_mb allows "
                    f"{_mb(self._limit, digits)} MB: raise it, or keep less"
                )
            spare.append(more)

    def _regularly(self) -> None:
        """What `every` does. Why it cannot is told once, and again where that changes."""
        try:
            self.save()
            self._told = ""
        except Declined as error:
            if str(error) != self._told:
                self._told = str(error)
                log.warning("flyball: no checkpoint is kept any more: %s", error)

    def _together(self, do: Callable[[], None], otherwise: str) -> None:
        """Do it on all ranks. Raises Declined on all of them where it fails on one."""
        failure: Exception | None = None
        try:
            do()
        except Exception as error:
            if self._governor.ranks == 1 and not isinstance(error, ValueError):
                raise
            failure = error
        told = self._governor.agree("" if failure is None else str(failure) or type(failure).__name__)
        for rank, problem in enumerate(told):
            if problem:
                raise Declined(problem if len(told) == 1 else f"rank {rank}: {problem}; {otherwise}") from failure

    def _check_shared(self) -> None:
        there = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            there = torch.distributed.get_world_size()
        if there > self._governor.ranks:
            raise Declined(
                f"this is one of {there} ranks, which would have to go back together, and {self._governor.ranks} of "
                "them share the run: attach on all of them, or save and load on each"
            )


def _mb(size: int, digits: int = 1) -> str:
    number = size / _MB
    return f"{number:.{digits}f}" if number >= 0.1 or not size else f"{number:.{digits + 1}g}"
