"""The governor: what a training script holds, whatever library it trains with.

Rule of this module: after `attach`, nothing here raises into the training loop (but for a first call of
`governor.step` with a loss that is no number), and nothing waits beyond its budget.

Order inside one optimizer step: `before_step` writes the newest settings (late, so that nothing between here and
the update can overwrite them), the optimizer steps, `after_step` reads back what it really used. The library's part,
writing and reading its optimizer, is behind `optimizer.Optimizer`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from flyball import limits
from flyball.accumulation import micro_batches
from flyball.connect import check_token, new_session
from flyball.controls import Control
from flyball.ending import midway, watch
from flyball.handlers import Handlers
from flyball.measured import Measured
from flyball.optimizer import Conflict, Optimizer
from flyball.pending import Pending
from flyball.reading import Reading
from flyball.sides import Line, Side
from flyball.sinks import Shown
from flyball.status import Status
from flyball.wire import Settings

log = logging.getLogger("flyball")


class Governor(Handlers):
    """One steered optimizer. Made by `attach`; a context manager that closes itself."""

    def __init__(
        self,
        optimizer: Optimizer,
        session: Side,
        link: Line,
        *,
        wait_s: float | None,
        close_s: float,
        accumulate: str | tuple[str, int] | None = None,
        shown: Shown | None = None,
    ) -> None:
        super().__init__(session, link)
        self._optimizer = optimizer
        self._wait_s = wait_s
        self._close_s = close_s
        self._reported = -1
        self._decided: int | None = None
        self._late = False
        self._conflict: Conflict | None = None
        self._confirm = 0
        self._controls: Mapping[str, float] = session.controls.values
        self._receipted: tuple[Settings, Settings | None, bool, Mapping[str, float]] | None = None
        self._wanted: Settings | None = None
        self._causes: set[str] = set()
        #: Where micro-batches make a step.
        self._micro = None if accumulate is None else micro_batches(accumulate)
        self._reading = Reading(optimizer)
        self._measured = Measured()
        self._closed = False
        self._skipped = self._missed = self._conflicts = 0
        self._busy_ns = self._waited_ns = self._steps_here = 0
        self._shown = Shown((), session, ()) if shown is None else shown
        watch(self)

    # -- for the training script ---------------------------------------------------------------------

    def step(
        self, loss: Any = None, weight: Any = 1.0, *, reward: Any = None, grad_norm: Any = None, **signals: Any
    ) -> None:
        """Report the signals of the optimizer step just made; call it after `optimizer.step()`.

        loss, reward, grad_norm (what `clip_grad_norm_` returned, say) and signals under names of your own: each a
        float, a tensor with one element on any device, or a callable that returns one. What is on a device is fetched
        without waiting, and reported once it has arrived. A value that is no number is recorded as not
        measured, except in the very first call, which raises TypeError: then nothing has been harmed yet.

        With `accumulate` call it once per micro-batch, and behind the optimizer step where there was one: that call
        closes the step. Loss and reward are those of all its micro-batches; `weight` says how many samples or tokens
        this one's are a mean of (0: it had none, and no loss); what several ranks saw is averaged by it, too (there one
        still on its device counts as 1). Other signals are those of the closing call. One NaN among the losses
        makes the step's NaN. The micro-batches of a step that a GradScaler skipped count to the next step, unless
        `skip` is called, or accumulate=("mean", N) says how many make a step: then they are dropped by themselves.
        """
        started = time.monotonic_ns()
        reading = self._reading
        if type(loss) is not float:
            loss = reading.number("loss", loss)
        if type(reward) is not float:
            reward = reading.number("reward", reward)
        if type(grad_norm) is not float:
            grad_norm = reading.number("grad_norm", grad_norm)
        others: dict[str, Any] | None = None
        if signals:
            others = {
                name: number
                for name, value in signals.items()
                if reading.is_name(name) and (number := reading.number(name, value)) is not None
            }
        step = self._next_step - 1
        if type(weight) is not float or weight != 1.0:
            weight = reading.weight(weight)
        if self._micro is not None:
            self._micro.add(loss, reward, weight)
        reading.first = False
        if step == self._reported:
            # No optimizer step since the last call: a skipped AMP step, or a micro-batch.
            if self._micro is None:
                self._skipped += 1
                self._session.skipped()
                reading.unstepped(self._skipped, self._steps_here)
            elif self._micro.full:
                self.skip()
        else:
            self._reported = step
            if self._micro is not None:
                loss, reward, weight = self._micro.close()
            if self._measured.any:
                grad_norm, others = self._measured.added(step, grad_norm, others, reading.is_name)
            if self._session.observe(step, (loss, reward, grad_norm, others), weight):
                self._link.wake()
            self._busy_ns += time.monotonic_ns() - started
            if self._session.directives.pending or self._regular:
                self._between_steps()
            return
        self._busy_ns += time.monotonic_ns() - started

    def skip(self) -> None:
        """With `accumulate`: the micro-batches reported since the last step lead to none (a GradScaler skipped it, or
        the gradients were thrown away). Their losses are dropped, and counted in `status.skipped`."""
        if self._micro is not None and self._next_step - 1 == self._reported:
            self._skipped += 1
            self._micro.begin()
            self._session.skipped()

    def control(self, name: str, value: float, *, min: float, max: float) -> Control:
        """Declare a scalar of this training that people may steer: read `.value` of what this returns wherever it is
        used. It begins with `value`, stays between `min` and `max`, and keeps the last value while the service is away.

        Raises ValueError for a name, value or bounds that make no sense, a name that is declared with others, and more
        than CONTROLS_MAX controls.
        """
        control = self._session.control(name, value, min, max)
        self._link.wake()
        return control

    @property
    def status(self) -> Status:
        """How it stands: see `Status`. Costs a few microseconds."""
        return self._session.status(
            self._next_step,
            time.monotonic(),
            added_us=self._busy_ns / 1000 / self._steps_here if self._steps_here else 0.0,
            waited_s=self._waited_ns / 1e9,
            bad_values=self._reading.bad_values,
            skipped=self._skipped,
            missed=self._missed,
            conflicts=self._conflicts,
            unshown=self._shown.lost,
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
        self._returns += 1
        self._receipted = self._wanted = self._decided = self._conflict = None
        self._confirm = 0
        self._measured = Measured()
        if self._micro is not None:
            self._micro.begin()
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
        until = time.monotonic() + self._close_s
        self._shown.end(self._next_step - 1, time.time())
        delivered = self._link.close(self._close_s)
        self._shown.wait(max(0.0, until - time.monotonic()))
        if left := midway(self._session):
            log.warning("flyball: run %r is closed while %s", self._session.attach.run, left)
        if not delivered:
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

    def prepare_step(self) -> None:
        """Write the coming step's settings already, for a library that lets others look at them before its update.

        `before_step` writes them once more, as late as it can, and adds the gradient noise. An update that is not made
        after all (a skipped AMP step) is given up with `abandon_step`.
        """
        self._settings_in(noisy=False)

    def abandon_step(self) -> None:
        """The step that was prepared is not made: what must not outlast a step (multiplier mode) is undone."""
        try:
            self._optimizer.read_back()
        except Exception as error:
            self._reading.once(f"settings could not be read back: {error!r}")

    def before_step(self) -> None:
        """Just before the optimizer steps: wait if the lag asks for it, and write the settings."""
        self._settings_in(noisy=True)

    def _settings_in(self, *, noisy: bool) -> None:
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
                drawn = noisy and wanted.noise_std is not None and any(wanted.noise_std)
                seed = session.noise_seed(step) if drawn else None
                conflict = self._optimizer.write(wanted, session.reference, session.bounds, seed)
            if conflict is not None:
                self.note(conflict)
        except Exception as error:  # whatever goes wrong here must not end the training job
            self._reading.once(f"settings could not be applied: {error!r}")
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
            elif self._next_step >= self._shown.again_at:
                self._show(used)
            # A control may be read at any time, so what it changed to in mid-step holds from the next one on.
            self._controls = self._session.controls.values
        except Exception as error:
            self._reading.once(f"settings could not be read back: {error!r}")
        self._next_step += 1
        self._steps_here += 1
        if self._steps_here == limits.UNREPORTED_STEPS and self._reading.first:
            self._reading.once(f"{self._steps_here} optimizer steps without a call of governor.step: no loss is known")
        self._busy_ns += time.monotonic_ns() - started

    def aside(self, do: Callable[[], Conflict | None]) -> None:
        """What an adapter does around an update that is a part of a step only (one of several optimizers'), between
        `before_step` and `after_step`. It may return a conflict."""
        started = time.monotonic_ns()
        try:
            conflict = do()
            if conflict is not None:
                self.note(conflict)
        except Exception as error:
            self._reading.once(f"settings could not be applied or read back: {error!r}")
        self._busy_ns += time.monotonic_ns() - started

    def measure(self, work: Callable[[], Mapping[str, float | Pending] | None]) -> None:
        """Have an adapter measure something around the step under way, before its `after_step`: what `work` returns,
        signals by name, goes with the report of this step."""
        started = time.monotonic_ns()
        try:
            found = work()
            if found is not None:
                self._measured.take(self._next_step, found)
        except Exception as error:
            self._reading.once(f"signals could not be measured: {error!r}")
        self._busy_ns += time.monotonic_ns() - started

    def measured(self, signals: Mapping[str, float]) -> None:
        """Signals that the adapter knows behind `after_step`: they go with the report of the step just made, too."""
        self._measured.take(self._next_step - 1, signals)

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
        self._show(used, conflict)

    def _noticed(self, line: str) -> None:
        self._shown.noticed(self._next_step, time.time(), line)

    def _show(self, used: Settings, conflict: str = "") -> None:
        self._shown.applied(self._next_step, time.time(), used, self._wanted, self._controls, conflict)
