"""The governor: what a training script holds, whatever library it trains with.

Rule of this module: after `attach`, nothing here raises into the training loop (but for a first call of
`governor.step` with a loss that is no number), and nothing waits beyond its budget.

Order inside one optimizer step: `before_step` writes the newest settings (late, so that nothing between here and
the update can overwrite them), the optimizer steps, `after_step` reads back what it really used. The library's part,
writing and reading its optimizer, is behind `optimizer.Optimizer`.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from flyball import limits
from flyball.connect import check_token, connect, new_session
from flyball.controls import NAME, Control
from flyball.directives import KINDS
from flyball.optimizer import Conflict, Optimizer
from flyball.options import checked
from flyball.ranks import across
from flyball.sides import Line, Side
from flyball.status import Status
from flyball.wire import Group, Settings

log = logging.getLogger("flyball")

#: What answers a directive: it gets the arguments, and returns a note or nothing.
Handler = Callable[[Mapping[str, Any]], str | None]


class Governor:
    """One steered optimizer. Made by `attach`; a context manager that closes itself."""

    def __init__(
        self, optimizer: Optimizer, session: Side, link: Line, *, wait_s: float | None, close_s: float
    ) -> None:
        self._optimizer = optimizer
        self._session = session
        self._link = link
        self._wait_s = wait_s
        self._close_s = close_s
        #: Optimizer steps of this process, from 0; the session knows where the run's own count stood then.
        self._next_step = 0
        self._reported = -1
        self._decided: int | None = None
        self._late = False
        self._conflict: Conflict | None = None
        self._confirm = 0
        self._controls: Mapping[str, float] = session.controls.values
        self._handlers: dict[str, Handler] = {}
        self._receipted: tuple[Settings, Settings | None, bool, Mapping[str, float]] | None = None
        self._wanted: Settings | None = None
        self._warned: set[str] = set()
        self._causes: set[str] = set()
        self._names: set[str] = set()
        self._first_call = True
        self._closed = False
        self._bad_values = self._skipped = self._missed = self._conflicts = 0
        self._busy_ns = self._waited_ns = self._steps_here = 0
        _governors.add(self)

    # -- for the training script ---------------------------------------------------------------------

    def step(
        self, loss: Any = None, *, reward: Any = None, grad_norm: Any = None, weight: Any = 1.0, **signals: Any
    ) -> None:
        """Report the signals of the optimizer step just made; call it after `optimizer.step()`.

        loss: a float, a tensor with one element on any device, or a callable that returns one. A device's loss is
        fetched without waiting and reported once it has arrived. A value that is no number is recorded as not
        measured, except in the very first call, which raises TypeError: then nothing has been harmed yet.
        weight: how many samples or tokens the loss is a mean of; what several ranks saw is averaged by it.
        """
        started = time.monotonic_ns()
        if type(loss) is not float:
            loss = self._number("loss", loss, True)
        if type(reward) is not float:
            reward = self._number("reward", reward, False)
        if type(grad_norm) is not float:
            grad_norm = self._number("grad_norm", grad_norm, False)
        if type(weight) is not float:
            weight = self._number("weight", weight, False)
        others = None
        if signals:
            others = {
                name: number
                for name, value in signals.items()
                if (name in self._names or self._is_name(name))
                and (number := self._number(name, value, False)) is not None
            }
        self._first_call = False
        step = self._next_step - 1
        if step == self._reported:
            # No optimizer step since the last call: a skipped AMP step, or a micro-batch.
            self._skipped += 1
            self._session.skipped()
        else:
            self._reported = step
            if self._session.observe(step, (loss, reward, grad_norm, others), weight):
                self._link.wake()
            self._busy_ns += time.monotonic_ns() - started
            if self._session.directives.pending:
                self._carry_out()
            return
        self._busy_ns += time.monotonic_ns() - started

    def control(self, name: str, value: float, *, min: float, max: float) -> Control:
        """Declare a scalar of this training that people may steer: read `.value` of what this returns wherever it is
        used. It begins with `value`, stays between `min` and `max`, and keeps the last value while the service is away.

        Raises ValueError for a name, value or bounds that make no sense, a name that is declared with others, and more
        than CONTROLS_MAX controls.
        """
        control = self._session.control(name, value, min, max)
        self._link.wake()
        return control

    def on(self, kind: str, handler: Handler) -> None:
        """Have `handler` called where the service asks for a `checkpoint`, `restore`, `rewind`, `evaluate` or `stop`.

        It gets the arguments, runs inside `governor.step` on the thread that trains, and may take its time; what it
        returns is the answer's note. One that raises declines. Without a handler a stop sets `should_stop`, and all
        else is declined.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r:.80}: give one of {', '.join(KINDS)}")
        if not callable(handler):
            raise TypeError(f"handler is {handler!r:.80}: give a function that takes the arguments, a mapping")
        self._handlers[kind] = handler
        self._session.directives.handle(kind)

    @property
    def status(self) -> Status:
        """How it stands: see `Status`. Costs a few microseconds."""
        return self._session.status(
            self._next_step,
            time.monotonic(),
            added_us=self._busy_ns / 1000 / self._steps_here if self._steps_here else 0.0,
            waited_s=self._waited_ns / 1e9,
            bad_values=self._bad_values,
            skipped=self._skipped,
            missed=self._missed,
            conflicts=self._conflicts,
        )

    @property
    def joinable(self) -> Any:
        """For torch's `Join([ddp, governor.joinable])`, where ranks have unequal numbers of batches."""
        from flyball.adapters.ranks import joinable

        return joinable(self._session)

    @property
    def should_stop(self) -> bool:
        """Whether training should end here: the service asked for it, or is away with on_outage="stop". The reason is
        in `status.stop_reason`."""
        return self._session.should_stop

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint token: plain JSON values, to be saved with the model.

        With lag=k it waits, as a step does, until the service has every step before it: whoever goes on from this
        checkpoint, in another process too, then misses none. With lag=None it never waits, and a process killed right
        after saving may leave its last steps out of the record.
        """
        session = self._session
        if session.unsettled():
            self._wait(lambda: not session.unsettled(), "the steps before a checkpoint")
        return session.token(self._next_step)

    def load_state_dict(self, token: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: a new attempt begins at the token's step, with the policy as it was then.

        What was reported before is delivered first, so that the line left behind is in the record whole. Waits for
        that, and for the new attempt, up to `wait_s` each (at most a second where that is None). Raises ValueError
        where it is no token of this run.
        """
        token = self._session.common(token)
        step, attempt, seq, digest = check_token(token, self._session.attach.run, self._session.attach.project)
        wait_s = 1.0 if self._wait_s is None else self._wait_s
        if self._session.state == "steering":
            self._link.wait(lambda: self._session.drained, wait_s, "what was reported before")
        self._session.reattach(new_session(), attempt, step, seq, digest)
        self._next_step, self._reported = 0, -1
        self._receipted = self._wanted = self._decided = self._conflict = None
        self._confirm = 0
        self._optimizer.forget()
        self._link.restart()
        self._link.wait(lambda: self._session.attached is not None, wait_s, "the new attempt")

    def close(self, outcome: str = "finished") -> None:
        """Deliver what waits (at most `close_s` seconds), say how the job ended, and let go of the optimizer.

        outcome: "finished" or "failed"; "" leaves the run open for a later resume. May be called twice.
        """
        if self._closed:
            return
        self._closed = True
        self._optimizer.detach()
        if not self._link.is_ours:  # a forked child: the run is its parent's
            return
        self._session.end(outcome)
        if not self._link.close(self._close_s):
            status = self.status
            log.warning(
                "flyball: %d observations of run %r were not delivered, %d were dropped before (%s)",
                status.waiting,
                status.run,
                status.dropped,
                status.last_error or "no time left",
            )

    def __enter__(self) -> Governor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    # -- for the adapter -----------------------------------------------------------------------------

    def before_step(self) -> None:
        """Just before the optimizer steps: wait if the lag asks for it, and write the settings."""
        started = time.monotonic_ns()
        session, step = self._session, self._next_step
        try:
            # Here as well as in the link, which may itself be waiting for an answer that does not come.
            waited = session.arrive(step, started / 1e9)
            self._waited_ns += waited
            started += waited
            if session.lag is not None and session.missing(step):
                started += self._wait(lambda: not session.missing(step), f"the decision for step {step}")
            confirm = session.to_confirm(step)
            if confirm:
                self._confirm = confirm
            target = session.target(step)
            if target is None:
                conflict = self._optimizer.write(None, session.reference, session.bounds, None)
            else:
                wanted, self._decided, self._late = target
                self._wanted = wanted
                noisy = wanted.noise_std is not None and any(wanted.noise_std)
                seed = session.noise_seed(step) if noisy else None
                conflict = self._optimizer.write(wanted, session.reference, session.bounds, seed)
            if conflict is not None:
                self.note(conflict)
        except Exception as error:  # whatever goes wrong here must not end the training job
            self._once(f"settings could not be applied: {error!r}")
        self._busy_ns += time.monotonic_ns() - started

    def after_step(self) -> None:
        """Just after the optimizer stepped: read back, and write a receipt where something changed."""
        started = time.monotonic_ns()
        try:
            used, conflict = self._optimizer.read_back()
            if conflict is not None:
                self.note(conflict)
            seen = (used, self._wanted, self._late, self._controls)
            confirms = self._confirm
            if confirms and self._controls is not self._session.controls.values:
                confirms = 0  # a control was set in mid-step: the next step is the first that is under the command
            if seen != self._receipted or self._conflict is not None or confirms:
                self._receipted = seen
                self._receipt(used, confirms, None if conflict is None else conflict.wanted_lr)
            # A control may be read at any time, so what it changed to in mid-step holds from the next one on.
            self._controls = self._session.controls.values
        except Exception as error:
            self._once(f"settings could not be read back: {error!r}")
        self._next_step += 1
        self._steps_here += 1
        self._busy_ns += time.monotonic_ns() - started

    def note(self, conflict: Conflict) -> None:
        """Count a conflict; the first one of its cause is logged, and rides in the next receipt."""
        self._conflicts += 1
        if conflict.cause not in self._causes and len(self._causes) < limits.CAUSES_MAX:
            self._causes.add(conflict.cause)
            log.warning("flyball: %s", conflict.text)
            self._conflict = conflict

    # -- leaves --------------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool], waiting_for: str) -> int:
        """Wait within the budget; how long that took, in nanoseconds. After a wait in vain none waits for a while."""
        started = time.monotonic_ns()
        if not self._link.wait(done, self._wait_s, waiting_for):
            self._missed += 1
            self._session.missed()
        waited = time.monotonic_ns() - started
        self._waited_ns += waited
        return waited

    def _receipt(self, used: Settings, confirms: int, wanted_lr: tuple[float, ...] | None) -> None:
        conflict, self._conflict = "" if self._conflict is None else self._conflict.text[: limits.CONFLICT_CHARS], None
        self._session.receipt(
            self._next_step, self._decided, used, self._late, conflict, 1,
            confirms=confirms, controls=self._controls, wanted_lr=wanted_lr,
        )  # fmt: skip
        if confirms:
            self._confirm = 0
            self._link.wake()

    def _carry_out(self) -> None:
        """Call the handlers of what the service asked for."""
        session = self._session
        while (asked := session.directive()) is not None:
            outcome, note = "done", None
            try:
                note = self._handlers[asked.kind](asked.args)
            except Exception as error:
                outcome, note = "declined", f"{type(error).__name__}: {error}"
                log.warning("flyball: %s was declined: its handler failed", asked.kind, exc_info=True)
            # A handler may have gone back to a checkpoint: what step it is, is asked afterwards.
            session.answer(asked.id, outcome, "" if note is None else str(note), self._next_step)
            self._link.wake()

    def _number(self, name: str, value: Any, may_pend: bool) -> Any:
        """`value` as a float (or a Pending one, where that may be); None where it is none."""
        if value is None:
            return None
        try:
            return self._optimizer.number(value() if callable(value) else value, may_pend)
        except Exception as error:
            message = (
                f"{name} is {type(value).__name__} {value!r:.60}: give a float, or a tensor with one element ({error})"
            )
            if self._first_call:
                raise TypeError(message) from error
            self._bad_values += 1
            self._once(f"recorded as not measured: {message}")
            return None

    def _is_name(self, name: str) -> bool:
        """Whether the service takes a signal of this name: it would refuse the whole report otherwise."""
        if len(name) <= limits.NAME_MAX and NAME.fullmatch(name) and len(self._names) < limits.SIGNALS_MAX:
            self._names.add(name)
            return True
        message = (
            f"signal {name!r} is not reported: a run has at most {limits.SIGNALS_MAX} signals, whose names are "
            "letters, digits and any of _ . / @ % + -"
        )
        if self._first_call:
            raise ValueError(message)
        self._bad_values += 1
        self._once(message)
        return False

    def _once(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < limits.CAUSES_MAX:
            self._warned.add(message)
            log.warning("flyball: %s", message)


def govern(optimizer: Optimizer, groups: tuple[Group, ...], options: Mapping[str, Any]) -> Governor:
    """What every adapter's `attach` ends with: a governor of its optimizer, whose groups are declared as given.

    options: see `flyball.options.Options`. Raises what `attach` says it raises.
    """
    whole = checked(options)
    exchange = across(whole["ranks"])
    session: Side
    link: Line
    if exchange is None:
        session, link = connect(groups, whole)
    else:
        from flyball.sharing.attach import share

        session, link = share(exchange, groups, whole)
    return Governor(optimizer, session, link, wait_s=whole["wait_s"], close_s=whole["close_s"])


_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


def _at_exit() -> None:
    """A script that forgot to close: give the last reports a moment, and leave the run open."""
    for governor in list(_governors):
        if governor._link.is_ours:
            governor._close_s = min(governor._close_s, limits.EXIT_S)
            governor.close("")


atexit.register(_at_exit)
