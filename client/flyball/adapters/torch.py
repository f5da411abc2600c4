"""PyTorch: settings go in just before `optimizer.step()` and are read back just after it.

Rule of this module: after `attach`, nothing here raises into the training loop (but for a first call of
`governor.step` with a loss that is no number), nothing waits beyond its budget, and no device is synchronised.

Order inside one optimizer step: the step-pre-hook writes the newest settings (late, so that nothing between here
and the update can overwrite them), the optimizer steps, the step-post-hook reads back what it really used. A
step that a GradScaler skips runs neither hook and is no step.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from flyball.connect import check_token, connect, new_session
from flyball.link import Link
from flyball.session import Pending, Session, Status, Target
from flyball.wire import Group, Settings

log = logging.getLogger("flyball")


def attach(
    optimizer: torch.optim.Optimizer,
    *,
    run: str,
    project: str = "default",
    policy: str | Mapping[str, Any] = "constant",
    base: Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    server: str | None = None,
    token: str | None = None,
    mode: str = "absolute",
    seed: int = 0,
    lag: int | None = None,
    wait_s: float | None = 0.05,
    on_outage: str = "hold",
    resume: bool | Mapping[str, Any] = False,
    start_wait_s: float = 2.0,
    close_s: float = 5.0,
) -> Governor:
    """Let the service steer `optimizer`; returns the governor, which is told each step's loss.

    Args:
        optimizer: its parameter groups are known by their "name" entry (else group0, group1 ...).
        run: the run's name within `project`.
        policy: a policy's name, or a mapping {"type": NAME, parameters...}.
        base: a schedule that the policy's factors multiply, {"type": "cosine", "T_max": 1000}.
        guard: limits around the policy, {"max_lr": 0.1, "max_change": 2}; also enforced here, without the service.
        labels: words to find the run by.
        server: grpc://host:port or http://host:port; default: FLYBALL_SERVER, then http://127.0.0.1:1788.
        token: the bearer token; default: FLYBALL_TOKEN.
        mode: "absolute" writes values; "multiplier" multiplies what an in-process scheduler set, and restores it.
        seed: the seed of the policy's chance, where it has any.
        lag: None applies the newest decision and never waits; k applies the decision of step t at step t + 1 + k
            exactly, and waits for it if it is not there yet (0: lockstep).
        wait_s: how long one step may wait with lag=k; None: as long as it takes.
        on_outage: while the service is away, "hold" the last settings, follow the "base" schedule, or hold and set
            `governor.should_stop` ("stop").
        resume: True opens a new attempt of an existing run behind its newest step; a checkpoint token (what
            `state_dict` returned) opens one at the token's step, with the policy's state of that moment.
        start_wait_s: how long to wait here for the service's first answer.
        close_s: how long `close` may take to deliver the last reports.

    Raises:
        TypeError: `optimizer` is no torch optimizer.
        ValueError: an option is wrong.
        Refused: the service says no (the run exists, an unknown policy ...) within `start_wait_s`.
        FlyballError: the address is wrong, or gRPC is not installed.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer")
    groups = tuple(_group(name, group) for name, group in zip(_names(optimizer), optimizer.param_groups, strict=True))
    session, link = connect(
        groups=groups,
        run=run,
        project=project,
        policy=policy,
        base=base,
        guard=guard,
        labels=labels,
        server=server,
        token=token,
        mode=mode,
        seed=seed,
        lag=lag,
        on_outage=on_outage,
        resume=resume,
        start_wait_s=start_wait_s,
    )
    return Governor(optimizer, session, link, multiplier=mode == "multiplier", wait_s=wait_s, close_s=close_s)


class Governor:
    """One steered optimizer. Made by `attach`; a context manager that closes itself."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        session: Session,
        link: Link,
        *,
        multiplier: bool,
        wait_s: float | None,
        close_s: float,
    ) -> None:
        self._optimizer = optimizer
        self._session = session
        self._link = link
        self._multiplier = multiplier
        self._wait_s = wait_s
        self._close_s = close_s
        self._groups = session.attach.groups
        attached = session.attached
        self._next_step = 0 if attached is None else attached.from_step
        self._reported = self._next_step - 1
        self._target: Target | None = None
        self._known: list[float] | None = None
        self._restore: list[Any] = []
        self._receipted: tuple[Any, ...] | None = None
        self._conflict = ""
        self._warned: set[str] = set()
        self._first_call = True
        self._closed = False
        self._counters = {"bad_values": 0, "skipped": 0, "missed": 0, "conflicts": 0}
        self._busy_ns = 0
        self._waited_ns = 0
        self._steps_here = 0
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        _governors.add(self)

    # -- for the training script ---------------------------------------------------------------------

    def step(
        self, loss: Any = None, *, reward: Any = None, grad_norm: Any = None, **signals: Any
    ) -> None:
        """Report the signals of the optimizer step just made; call it after `optimizer.step()`.

        loss: a float, a tensor with one element on any device, or a callable that returns one. A device's loss is
        fetched without waiting and reported once it has arrived. A value that is no number is recorded as not
        measured, except in the very first call, which raises TypeError: then nothing has been harmed yet.
        """
        started = time.perf_counter_ns()
        if type(loss) is not float:
            loss = self._number("loss", loss, may_wait=True)
        if reward is not None and type(reward) is not float:
            reward = self._number("reward", reward)
        if grad_norm is not None and type(grad_norm) is not float:
            grad_norm = self._number("grad_norm", grad_norm)
        others = None
        if signals:
            others = {n: v for n, value in signals.items() if (v := self._number(n, value)) is not None}
        self._first_call = False
        step = self._next_step - 1
        if step == self._reported:
            # No optimizer step since the last call: a skipped AMP step, or a micro-batch.
            self._counters["skipped"] += 1
        else:
            self._reported = step
            if self._session.observe(step, (loss, reward, grad_norm, others)):
                self._link.wake()
        self._busy_ns += time.perf_counter_ns() - started

    @property
    def status(self) -> Status:
        """How it stands: see `Status`. Costs a few microseconds."""
        per_step = self._busy_ns / 1000 / self._steps_here if self._steps_here else 0.0
        return self._session.status(
            self._next_step,
            time.monotonic(),
            added_us=per_step,
            waited_s=self._waited_ns / 1e9,
            **self._counters,
        )

    @property
    def should_stop(self) -> bool:
        """Whether training should end here (on_outage="stop", and the service is away)."""
        return self._session.should_stop

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint token: plain JSON values, to be saved with the model."""
        return self._session.token(self._next_step)

    def load_state_dict(self, token: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: a new attempt begins at the token's step, with the policy as it was then.

        Waits up to `wait_s` for the service's answer, not longer. Raises ValueError where it is no token of this run.
        """
        step, attempt, digest = check_token(token, self._session.attach.run)
        self._session.reattach(new_session(), attempt, step, digest)
        self._next_step, self._reported = step, step - 1
        self._target = self._known = self._receipted = None
        self._link.restart()
        self._link.wait(lambda: self._session.attached is not None, self._wait_s, "the new attempt")

    def close(self, outcome: str = "finished") -> None:
        """Deliver what waits (at most `close_s` seconds), say how the job ended, and let go of the optimizer.

        outcome: "finished" or "failed"; "" leaves the run open for a later resume. May be called twice.
        """
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self._session.end(outcome)
        if not self._link.close(self._close_s):
            status = self.status
            log.warning(
                "flyball: %d observations of run %r were not delivered (%s)",
                status.waiting,
                status.run,
                status.last_error or "no time left",
            )

    def __enter__(self) -> Governor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    # -- around optimizer.step() ---------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        started = time.perf_counter_ns()
        try:
            if self._session.missing(self._next_step):
                waited = time.perf_counter_ns()
                self._wait()
                waited = time.perf_counter_ns() - waited
                self._waited_ns += waited
                started += waited
            self._write(self._session.target(self._next_step))
        except Exception as error:  # whatever goes wrong here must not end the training job
            self._once(f"settings could not be applied: {error!r}")
        self._busy_ns += time.perf_counter_ns() - started

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        started = time.perf_counter_ns()
        try:
            self._read_back()
            if self._restore:
                self._put_back()
        except Exception as error:
            self._once(f"settings could not be read back: {error!r}")
        self._next_step += 1
        self._steps_here += 1
        self._busy_ns += time.perf_counter_ns() - started

    def _wait(self) -> None:
        step, session = self._next_step, self._session
        if not self._link.wait(lambda: not session.missing(step), self._wait_s, f"the decision for step {step}"):
            self._counters["missed"] += 1
            session.missed()

    def _write(self, target: Target | None) -> None:
        groups = self._optimizer.param_groups
        if self._multiplier:
            self._multiply(target, groups)
            return
        now = [group["lr"] for group in groups]
        wanted = None if target is None else target.settings
        if self._known is not None and len(now) == len(self._known):
            for i, (value, known) in enumerate(zip(now, self._known, strict=True)):
                if value != known and not _on_device(value):
                    self._found(i, float(known), float(value))
        if wanted is not None:
            for i, (group, lr) in enumerate(zip(groups, self._spread(wanted.lr, len(groups)), strict=True)):
                if now[i] != lr or _on_device(now[i]):
                    _set_lr(group, lr)
            if wanted.momentum is not None and (self._target is None or wanted.momentum != self._target.settings.momentum):
                self._set_momentum(groups, wanted.momentum)
        self._target = target

    def _spread(self, lr: tuple[float, ...], count: int) -> tuple[float, ...]:
        """Values for all groups: one that was added after attach follows the first group's factor."""
        if count == len(lr):
            return lr
        if count < len(lr):
            return lr[:count]
        factor = lr[0] / self._groups[0].lr if self._groups[0].lr > 0 else 1.0
        for group in self._optimizer.param_groups[len(lr) :]:
            group.setdefault("flyball_reference_lr", _plain(group["lr"]))
            lr = (*lr, group["flyball_reference_lr"] * factor)
        return lr

    def _multiply(self, target: Target | None, groups: list[dict[str, Any]]) -> None:
        """Multiplier mode: the scheduler's value times the policy's factor, until the step is done."""
        self._target = target
        if target is None:
            return
        references = [group.lr for group in self._groups]
        self._restore = []
        for i, group in enumerate(groups):
            j = min(i, len(references) - 1) if i < len(references) else 0
            factor = target.settings.lr[j] / references[j] if references[j] > 0 else 1.0
            lr = group["lr"]
            self._restore.append(lr.clone() if isinstance(lr, torch.Tensor) else lr)
            _set_lr(group, lr * factor)

    def _put_back(self) -> None:
        restore, self._restore = self._restore, []
        for group, lr in zip(self._optimizer.param_groups, restore, strict=False):
            _set_lr(group, lr)

    def _set_momentum(self, groups: list[dict[str, Any]], momentum: tuple[float | None, ...]) -> None:
        for group, declared, value in zip(groups, self._groups, momentum, strict=False):
            if value is None:
                continue
            if declared.momentum is not None and "momentum" in group:
                group["momentum"] = value
            elif declared.betas is not None and "betas" in group:
                group["betas"] = (value, *group["betas"][1:])

    def _read_back(self) -> None:
        """What the optimizer really used; a receipt goes out when that, or its origin, has changed."""
        groups = self._optimizer.param_groups
        lr = [group["lr"] for group in groups]
        if any(isinstance(value, torch.Tensor) for value in lr):
            # Reading a device's value would wait for the device; what was filled in is what it will use.
            wanted = None if self._target is None else self._spread(self._target.settings.lr, len(groups))
            lr = [
                (wanted[i] if wanted is not None else float("nan")) if _on_device(value) else _plain(value)
                for i, value in enumerate(lr)
            ]
        self._known = lr if not self._multiplier else None
        target = self._target
        late = target is not None and target.late
        seen = (tuple(lr), None if target is None else target.settings, late, self._conflict)
        if seen == self._receipted:
            return
        self._receipted = (*seen[:3], "")
        declared = len(self._groups)
        momentum = tuple(_momentum(group, known) for group, known in zip(groups, self._groups, strict=False))
        self._session.receipt(
            self._next_step,
            self._next_step - 1 if target is None else target.decided,
            Settings(tuple(lr[:declared]), momentum if any(m is not None for m in momentum) else None, None),
            late,
            self._conflict,
            1,
        )
        self._conflict = ""

    def _found(self, index: int, expected: float, found: float) -> None:
        """Somebody else wrote a learning rate since our last step."""
        self._counters["conflicts"] += 1
        name = self._groups[index].name if index < len(self._groups) else f"group{index}"
        cause = f"somebody else writes the learning rate of group {name}"
        if cause not in self._warned:
            self._conflict = f"{cause}: {found!r} was found, not {expected!r}"
            self._once(cause)

    def _number(self, name: str, value: Any, may_wait: bool = False) -> Any:
        """`value` as a float (or a Pending one, where that is possible); None where it is no number."""
        try:
            if callable(value) and not isinstance(value, torch.Tensor):
                value = value()
            if value is None:
                return None
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise TypeError(f"a tensor of shape {tuple(value.shape)}")
                if may_wait and value.is_cuda:
                    return _FromDevice(value.detach())
                return float(value.item())
            if isinstance(value, str | bytes | bool):
                raise TypeError(f"{value!r}")
            return float(value)
        except Exception as error:
            if self._first_call:
                raise TypeError(
                    f"{name} is {error}: give a float, or a tensor with one element"
                    if isinstance(error, TypeError)
                    else f"{name} is a {type(value).__name__}, no number ({error}): give a float, or a tensor with "
                    "one element"
                ) from error
            self._counters["bad_values"] += 1
            self._once(f"a {name} that is no number was recorded as not measured: {error}")
            return None

    def _once(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < 1000:
            self._warned.add(message)
            log.warning("flyball: %s", message)


class _FromDevice(Pending):
    """A loss copied from a CUDA device without waiting: into pinned memory, with an event behind the copy."""

    def __init__(self, value: torch.Tensor) -> None:
        self._host = torch.empty((), dtype=torch.float64, pin_memory=True)
        self._host.copy_(value.reshape(()).to(torch.float64), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return bool(self._event.query())

    def value(self) -> float:
        """The value; no wait once ready."""
        return float(self._host.item())


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    """A name for every group: its own, else default (a single one) or its place."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [str(groups[0].get("name") or "default")]
    names = [str(group.get("name") or f"group{i}") for i, group in enumerate(groups)]
    if len(set(names)) < len(names):
        raise ValueError(f"the parameter groups' names are {names}: give each its own")
    return names


def _group(name: str, group: Mapping[str, Any]) -> Group:
    momentum = group.get("momentum")
    betas = group.get("betas")
    return Group(
        name,
        _plain(group["lr"]),
        float(momentum) if momentum else None,
        (float(betas[0]), float(betas[1])) if betas is not None and len(betas) == 2 else None,
    )


def _plain(value: Any) -> float:
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def _on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    """Write a learning rate. A tensor is filled in place: replacing it would recompile a compiled step."""
    current = group["lr"]
    if isinstance(current, torch.Tensor):
        current.copy_(lr) if isinstance(lr, torch.Tensor) else current.fill_(lr)
    else:
        group["lr"] = lr


def _momentum(group: Mapping[str, Any], declared: Group) -> float | None:
    if declared.momentum is not None:
        return float(group.get("momentum", 0.0))
    betas = group.get("betas")
    return float(betas[0]) if declared.betas is not None and betas else None


_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


def _at_exit() -> None:
    """A script that forgot to close: give the last reports a moment, and leave the run open."""
    for governor in list(_governors):
        if governor._link.is_ours:
            governor._close_s = min(governor._close_s, 2.0)
            governor.close("")


atexit.register(_at_exit)
