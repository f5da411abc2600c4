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

Limits: the copies stay below `limit_mb`, and die with the process: they do not replace checkpoints on a disk. Of
several ranks each would have to go back at the same step; so in a job of several, this declines.

Rule of this module: what does not fit into the limit is declined before anything is copied, and going back is done
altogether or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from flyball.adapters.torch_copies import Chance, Copied, Thing, copied, put_all, size_of, thing
from flyball.errors import Declined
from flyball.governor import Governor

_MB = 1e6


class Kept(NamedTuple):
    """A checkpoint. tag: "" of one that nobody named. step: the optimizer step to go on with. size: in bytes."""

    tag: str
    step: int
    size: int
    token: Mapping[str, Any]
    parts: Mapping[str, Copied]

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
        governor.on("checkpoint", self._checkpoint)
        governor.on("restore", self._restore)
        governor.on("rewind", self._rewind)
        if every is not None:
            governor.every(every, self.save)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What there is to go back to, in the order of saving."""
        return tuple(self._kept)

    def save(self, tag: str = "") -> Kept:
        """Copy everything, between two iterations. Raises Declined where that would not fit into the limit."""
        _check_alone()
        live = {name: one.live() for name, one in self._things.items()}
        size = sum(map(size_of, live.values()))
        # First what there is to give up for it, then the memory for it.
        self._kept = self._room_for(tag, size)
        token = self._governor.state_dict()
        new = Kept(tag, token["step"], size, token, {name: copied(tree) for name, tree in live.items()})
        self._kept.append(new)
        return new

    def restore(self, kept: Kept) -> None:
        """Go back to it, and the service, too. Raises Declined where the training is not what it was."""
        _check_alone()
        try:
            put_all([(name, self._things[name], part) for name, part in kept.parts.items()])
        except ValueError as error:
            raise Declined(str(error)) from error
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
        if not fitting:
            there = ", ".join(map(str, self._kept)) or "none"
            raise Declined(f"there is no checkpoint {wanted} in memory; kept: {there}")
        # Of those for the same step the newest: an older one may be of a line that was left.
        newest = max(enumerate(fitting), key=lambda pair: (pair[1].step, pair[0]))[1]
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
                raise Declined(
                    f"a checkpoint needs {_mb(size)} MB{named}, and limit_mb allows {_mb(self._limit)} MB: raise it, "
                    "or keep less"
                )
            spare.append(more)


def _check_alone() -> None:
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if ranks > 1:
        raise Declined(f"this is one of {ranks} ranks, which would have to go back together: save and load on each")


def _mb(size: int) -> str:
    return f"{size / _MB:.1f}"
