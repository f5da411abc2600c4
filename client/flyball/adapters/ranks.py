"""torch.distributed: how ranks that share a run exchange bytes, on the CPU and beside the job's own collectives.

Rule of this module: all ranks call the same things in the same order; no device is touched, and nothing is unpickled.

`flyball.attach(optimizer, run=...)` on every rank of a torchrun job, DDP or FSDP, is all there is to do: where
torch.distributed has a process group of more than one rank, its ranks share the run. Rank 0 alone speaks to the
service; all of them use the same settings at the same optimizer step, exchanged over a gloo group of our own every 8
steps (the option `ranks=flyball.ranks.Ranks(every=...)`), while training goes on. `ranks=None` leaves a process alone.

- Call `governor.step(loss, weight=samples)` on every rank, with the rank's own loss: the service gets the mean over the
  ranks by weight. reward and grad_norm likewise; all other signals are rank 0's. A rank that does not call it has no
  part in the mean. With lag=k call it on every rank.
- What the service decides takes effect at the same step everywhere, about 2 to 4 times `every` steps after the loss it
  rests on; with lag=k exactly then, at the cost of two short exchanges a step.
- Settings, `should_stop`, controls and directives change on all ranks at the same step. A handler given to
  `governor.on` on every rank is called on every rank; the directive is done where all of them did it.
- `attach`, `load_state_dict` and `close` are called on all ranks; `state_dict` and `status` on any. A rank that closes
  waits for the others to close, so that those with more batches can go on. With torch's Join give
  `Join([ddp, governor.joinable])`, which also puts the counts of the ranks together at its end.
- A rank that dies ends the job's own collectives; ours end with the error, or the timeout, of their gloo group. What
  holds then goes on holding, one line in the log says so, and nothing is raised.
- The gradient noise scale: give `local_grad_sq` (the square of this rank's gradient before ranks are averaged) and
  `mean_grad_sq` (of the averaged one) to `governor.step`, and the service gets the signal `noise_scale`; with DDP
  `squares = watch_gradients(ddp)` measures both, `governor.step(loss, **squares())` reports them.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook

from flyball import limits
from flyball.adapters.meeting import meet
from flyball.adapters.meeting import refuse as refuse_all
from flyball.ranks import Broken, Exchange, Ranks
from flyball.sharing.session import Shared
from flyball.sharing.slots import room

log = logging.getLogger("flyball")

T = TypeVar("T")


def exchange(ranks: Ranks) -> Exchange | None:
    """The exchange between these ranks; None where there is only one, or this process is none of them."""
    members = _members(ranks)
    if not members:
        return None
    patience_s = limits.EXCHANGE_S if ranks.timeout_s is None else ranks.timeout_s
    meet(members, patience_s)
    timeout = None if ranks.timeout_s is None else datetime.timedelta(seconds=ranks.timeout_s)
    # A part of all ranks makes its group without the others. Such a group's name follows from its ranks, and torch
    # would give it out again, and find the old one's addresses, if it were ever destroyed.
    part = len(members) < dist.get_world_size()
    group = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=part)
    return _Gloo(group, ranks.every, patience_s, keep=part)


def _members(ranks: Ranks) -> list[int]:
    """These ranks; none where there is only one, or this process is none of them."""
    group = ranks.group
    if isinstance(group, type(dist.GroupMember.NON_GROUP_MEMBER)) and group == dist.GroupMember.NON_GROUP_MEMBER:
        return []
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        wanted = "'auto', None, a torch ProcessGroup or flyball.ranks.Ranks"
        raise ValueError(f"ranks is {group!r:.80}: give {wanted}")
    members: list[int] = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    return [] if len(members) < 2 or dist.get_rank() not in members else members


def refuse(ranks: Ranks, error: Exception) -> None:
    """This rank cannot attach, and the others shall not wait for it. Raises nothing."""
    try:
        if members := _members(ranks):
            refuse_all(members, error)
    except Exception:
        log.debug("flyball: the other ranks could not be told: %s", error, exc_info=True)


class _Gloo:
    """See `ranks.Exchange`."""

    def __init__(self, group: Any, every: int, patience_s: float, *, keep: bool) -> None:
        self.rank, self.ranks, self.every = dist.get_rank(group), dist.get_world_size(group), every
        self.waited_ns = 0
        self.patience_s = patience_s
        self._group = group
        self._keep = keep
        # The group's end joins gloo's threads, and one of those may wait for a rank that never comes: the process could
        # not exit then. So the group has no end but the one that `close` gives it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._idle = True
        self._failed = f"flyball/failed/{group.group_name}"
        self._room = room(every)
        self._work: Any = None
        self._mine = b""
        # gloo writes into tensors; these lie over bytes that Python reads without a copy, and without NumPy.
        self._bytes = [bytearray(limits.SLOT_HEAD + self._room) for _ in range(self.ranks)]
        self._tensors = [torch.frombuffer(one, dtype=torch.uint8) for one in self._bytes]

    def start(self, mine: bytes) -> None:
        self._mine = mine
        given = len(mine).to_bytes(limits.SLOT_HEAD, "little") + mine[: self._room]
        self._work = self._gather(self._tensors, given.ljust(limits.SLOT_HEAD + self._room, b"\0"))

    def finish(self, within_s: float | None = None, waiting_for: str = "") -> list[bytes]:
        return self.timed(lambda: self._finish(within_s, waiting_for))

    def _finish(self, within_s: float | None, waiting_for: str) -> list[bytes]:
        self._await(within_s, waiting_for)
        head = limits.SLOT_HEAD
        lengths = [int.from_bytes(one[:head], "little") for one in self._bytes]
        if max(lengths) <= self._room:
            return [bytes(one[head : head + length]) for one, length in zip(self._bytes, lengths, strict=True)]
        # Somebody has more to say than usual: all ranks see that, and do it once more with enough room.
        wide = [bytearray(max(lengths)) for _ in lengths]
        tensors = [torch.frombuffer(one, dtype=torch.uint8) for one in wide]
        self._work = self._gather(tensors, self._mine.ljust(max(lengths), b"\0"))
        self._await(within_s, waiting_for)
        return [bytes(one[:length]) for one, length in zip(wide, lengths, strict=True)]

    def _gather(self, into: list[Any], given: bytes) -> Any:
        try:
            mine = torch.frombuffer(bytearray(given), dtype=torch.uint8)
            self._idle = False
            return dist.all_gather(into, mine, group=self._group, async_op=True)
        except Exception as error:  # gloo has one kind of error for everything
            raise Broken(str(error)) from error

    def _await(self, within_s: float | None, waiting_for: str) -> None:
        work, self._work = self._work, None
        began, next_log = time.monotonic(), limits.WAIT_LOG_S
        try:
            while not work.is_completed():
                waited = time.monotonic() - began
                if within_s is not None and waited >= within_s:
                    raise Broken(f"the other ranks were waited for for {waited:.1f} s")
                if waited >= next_log:
                    text = waiting_for or "all ranks"
                    log.warning("flyball: rank %d has waited %.0f s for %s", self.rank, waited, text)
                    next_log += limits.WAIT_LOG_AGAIN_S
                self._wait(work, next_log - waited if within_s is None else min(next_log, within_s) - waited)
            work.wait()
        except RuntimeError as error:
            raise Broken(str(error)) from error
        self._idle = True

    def _wait(self, work: Any, seconds: float) -> None:
        """Until it has ended, or so long."""
        try:
            work.wait(datetime.timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            if work.is_completed():
                raise

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def timed(self, do: Callable[[], T]) -> T:
        started = time.monotonic_ns()
        try:
            return do()
        finally:
            self.waited_ns += time.monotonic_ns() - started

    def tell_failed(self) -> None:
        try:
            dist.distributed_c10d._get_default_store().set(self._failed, str(self.rank))
        except Exception:
            log.debug("flyball: rank %d could not tell that it failed", self.rank, exc_info=True)

    def failed(self) -> bool:
        try:
            return bool(dist.distributed_c10d._get_default_store().check([self._failed]))
        except Exception:
            return False

    def close(self) -> None:
        if not self._idle or self._keep:
            return
        try:
            dist.destroy_process_group(self._group)
        except Exception:
            self._work = None  # the job has destroyed all groups already
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._group))


def joinable(side: object) -> Joinable:
    """For torch's Join: a governor's part in it. Does nothing where no ranks share the run."""
    return _Joinable(side if isinstance(side, Shared) else None)


class _Joinable(Joinable):  # type: ignore[misc]  # torch is not followed
    def __init__(self, shared: Shared | None) -> None:
        super().__init__()
        self._shared = shared

    def join_hook(self, **_: Any) -> JoinHook:
        return _Hook(self._shared)

    @property
    def join_device(self) -> torch.device:
        return torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")

    @property
    def join_process_group(self) -> Any:
        return dist.group.WORLD


class _Hook(JoinHook):  # type: ignore[misc]  # torch is not followed
    def __init__(self, shared: Shared | None) -> None:
        self._shared = shared

    def main_hook(self) -> None:
        if self._shared is not None:
            self._shared.stand_aside()

    def post_hook(self, is_last_joiner: bool) -> None:
        if self._shared is not None:
            self._shared.resync()


def watch_gradients(ddp: Any) -> Callable[[], dict[str, Any]]:
    """Measure a DDP model's gradients before and after they are averaged. Returns what gives, after each backward pass,
    the signals `local_grad_sq` and `mean_grad_sq`.

    Takes DDP's communication hook, which a model has only one of, and adds two sums of squares to each bucket; nothing
    is synchronised, and no more is sent than before.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    local: dict[int, Any] = {}
    mean: dict[int, Any] = {}

    def hook(group: Any, bucket: Any) -> Any:
        index = bucket.index()
        local[index] = _square(bucket.buffer())

        return allreduce_hook(group, bucket).then(lambda done: _one(done, mean, index))

    hook.__annotations__.clear()  # they are text here, and DDP compares them with types
    ddp.register_comm_hook(None, hook)
    return lambda: {"local_grad_sq": sum(local.values()), "mean_grad_sq": sum(mean.values())} if mean else {}


def _square(gradients: Any) -> Any:
    wide = gradients.detach().float()
    return torch.dot(wide, wide)


def _one(done: Any, mean: dict[int, Any], index: int) -> Any:
    averaged = done.value()
    averaged = averaged[0] if isinstance(averaged, list) else averaged
    mean[index] = _square(averaged)
    return averaged
