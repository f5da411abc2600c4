"""One attached job's side of the conversation, as a state machine without I/O.

Rules of this module
--------------------
1. It does nothing by itself: no thread, no socket, no clock. Time is an argument (seconds of any monotonic clock).
2. Nothing here raises after construction, and nothing here waits.
3. What was not acknowledged is kept and sent again; the service folds a step once, so repeating is always safe.
4. Everything is bounded. What does not fit is dropped oldest first, and counted.
5. The training thread writes observations and receipts and reads settings; the link thread does all else. A lock
   is held for a few appends at most, so neither ever waits for the other's I/O.

States: connecting -> steering <-> away -> ... -> closed; or refused (the service said no), or superseded (another
process drives the run now). While `away` is an outage, `on_outage` says which settings hold: the last ones
(hold), those of the declared base schedule under the last known factor (base), or the last ones with
`should_stop` set (stop).

Longer than 400 lines because the whole state machine stands in one place.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice
from typing import Any

from flyball import limits
from flyball.base import Base
from flyball.columns import Signals, columns
from flyball.decisions import Decisions, Target
from flyball.rng import noise_seed
from flyball.status import Status
from flyball.wire import Advice, Answer, Attach, Attached, Receipt, Report, Settings


class Session:
    """See the module's head. `attach` is the message to open with; `base` the declared base schedule, if any."""

    def __init__(self, attach: Attach, *, base: Base | None, on_outage: str, now: float) -> None:
        self.attach = attach
        self.lag = attach.lag
        self.state = "connecting"
        self.outage = False
        self.circuit_open = False
        self.last_error = ""
        self.attached: Attached | None = None
        self._decisions = Decisions(attach, base)
        #: The learning rate per group that the run's factors multiply, as recorded once that is known.
        self.reference = self._decisions.reference
        #: The lowest and the highest learning rate per group.
        self.bounds = self._decisions.absolute
        self._seed = attach.seed
        self._on_outage = on_outage
        self._lock = threading.Lock()
        self._observations: deque[tuple[int, Signals]] = deque()
        self._receipts: deque[Receipt] = deque()
        self._answers: deque[Answer] = deque(maxlen=64)
        #: The job counts its steps from 0; the run counts on from here. Not known before the first Attached where a
        #: run is resumed "after its newest step".
        self._offset = attach.from_step or (attach.fork.step if attach.fork else 0)
        #: The attempt on whose line everything before the offset was observed, where this process went back to it.
        self._origin: int | None = None
        self._dropped = 0
        self._in_flight: Report | None = None
        self._took_all = False
        self._urgent = False
        self._receipt_number = 0
        self._end = ""
        self._ended = False
        self._last_sent = now
        self._last_answer: float | None = None
        self._away_since: float | None = now
        self._advice: Attached | Advice | None = None

    # -- the training thread -------------------------------------------------------------------------

    def observe(self, step: int, signals: Signals) -> bool:
        """Record one step. Returns whether the link should be woken to send."""
        with self._lock:
            buffer = self._observations
            if len(buffer) >= limits.BUFFER_MAX:
                buffer.popleft()
                self._dropped += 1
            buffer.append((step + self._offset, signals))
            return len(buffer) % limits.FLUSH_OBSERVATIONS == 0 or (self.lag is not None and not self.outage)

    def target(self, step: int) -> Target | None:
        """The settings to apply at optimizer `step`; None where there are none to apply (the optimizer's own stay).

        With lag = k and a decision that has not come, this is the newest one, late; `missing` tells beforehand.
        """
        step += self._offset
        if self.outage and self._on_outage == "base":
            return self._decisions.on_base(step)
        if self.lag is None:
            return self._decisions.at(step)
        with self._lock:
            return self._decisions.at(step)

    def missing(self, step: int) -> bool:
        """Whether optimizer `step` ought to wait: lag = k, its decision is not here, and waiting makes sense."""
        return self._may_wait() and (self.attached is None or self._decisions.missing(step + self._offset))

    def unsettled(self) -> bool:
        """Whether a checkpoint ought to wait: lag = k, steps before it are not in the journal yet, and waiting makes
        sense. A process that goes on from it would never send them."""
        return self._may_wait() and bool(self._observations)

    def noise_seed(self, step: int) -> int:
        """What gradient noise of optimizer `step` is drawn from: the run's seed and count, whichever process steps."""
        return noise_seed(self._seed, step + self._offset)

    def missed(self) -> None:
        """A step waited in vain: no further step waits until the link is healthy."""
        self.circuit_open = True

    def hurry(self) -> None:
        """Somebody waits: the next report leaves at once."""
        self._urgent = True

    def receipt(
        self, step: int, decided: int | None, settings: Settings, late: bool, conflict: str, ranks: int
    ) -> None:
        """Record what was really applied at `step`. decided: a target's; None: nothing was decided yet."""
        with self._lock:
            step += self._offset
            decided = step - 1 if decided is None else decided
            self._receipt_number += 1
            if len(self._receipts) >= limits.RECEIPTS_MAX:
                self._receipts.popleft()
                self._dropped += 1
            self._receipts.append(Receipt(self._receipt_number, step, decided, settings, late, conflict, ranks))

    def end(self, outcome: str) -> None:
        """The job ends: the last report says how ("finished" or "failed"; "" leaves it open)."""
        self._end = outcome
        self._urgent = True

    @property
    def should_stop(self) -> bool:
        """on_outage="stop", and there is an outage."""
        return self._on_outage == "stop" and self.outage

    @property
    def drained(self) -> bool:
        """Whether everything was acknowledged, the end included."""
        return not (self._observations or self._receipts or self._answers or (self._end and not self._ended))

    # -- the link thread -----------------------------------------------------------------------------

    def on_attached(self, message: Attached, to: Attach, now: float) -> None:
        """The service answered the Attach `to`; an answer to one that was given up meanwhile says nothing."""
        with self._lock:
            if self.attach.session != to.session:
                return
            previous = self.attached
            if previous is None or previous.attempt != message.attempt:
                self._decisions.begin(message.from_step)
            if previous is None and to.resume and to.from_step is None:
                self._shift(message.from_step - self._offset)
            # From now on this is a reconnect: if another process resumes the run meanwhile, it is not taken back.
            self.attach = to._replace(
                resume=False, from_step=None, from_attempt=None, seq=0, digest="", fork=None, on_unknown="refuse"
            )
            self.attached = message
            self._in_flight = None
            self._seed = message.seed
            error = self._decisions.adopt(message.guard, message.reference)
            self.reference, self.bounds = self._decisions.reference, self._decisions.absolute
            if message.through < message.from_step or self.lag is None:
                # Nothing observed yet, or only the newest counts: these are the settings to go on with.
                self._decisions.reach_back(message.changes[0][0] if message.changes else message.through)
                self._decisions.learn(message.changes, message.through)
            if self.lag is None:
                self._acknowledge(message.through, message.receipts_through)
            else:
                # Steps the service knows are sent once more: their recorded decisions are still wanted here.
                self._acknowledge(message.from_step - 1, message.receipts_through)
        self._advice = message
        self._heard("steering", now)
        self.last_error = error
        if not self._observations:
            self.circuit_open = False

    def report(self, now: float) -> Report | None:
        """The report that is due now, or None. It stays the one in flight until `on_advice` or `on_lost`."""
        attached = self.attached
        if attached is None or self._in_flight is not None or self.state != "steering":
            return None
        with self._lock:
            waiting = len(self._observations)
            due = (
                self._urgent
                or waiting >= limits.FLUSH_OBSERVATIONS
                or now - self._last_sent >= limits.FLUSH_INTERVAL_S
                or (self.lag is not None and waiting > 0)
            )
            if not due or self.drained:
                return None
            head = list(islice(self._observations, limits.BATCH_MAX))
            receipts = tuple(islice(self._receipts, limits.RECEIPTS_BATCH_MAX))
            all_receipts = len(receipts) == len(self._receipts)
            answers = tuple(self._answers)
        # Columns are built without the lock: the training thread may go on appending meanwhile.
        steps, signals = columns(head)
        self._took_all = len(steps) == waiting
        end = self._end if self._took_all and all_receipts else ""
        if not (steps or receipts or answers or end):
            return None
        self._urgent = False
        self._last_sent = now
        self._in_flight = Report(
            attached.run, self.attach.session, attached.attempt, steps, signals, receipts, answers, end
        )
        return self._in_flight

    def pause(self, now: float) -> float:
        """How long the link may sleep before it asks for a report again, if nobody wakes it."""
        with self._lock:
            if self.lag is not None and self._observations:
                return 0.001  # somebody waits for a loss that is still on its device
            return min(limits.FLUSH_INTERVAL_S, max(0.001, self._last_sent + limits.FLUSH_INTERVAL_S - now))

    def on_advice(self, message: Advice, now: float) -> None:
        """The service answered the report in flight: everything in it is in the journal."""
        with self._lock:
            report, self._in_flight = self._in_flight, None
            if report is None:  # it belongs to an attempt that was given up meanwhile
                return
            self._drop_answers(report)
            self._ended = self._ended or bool(report.end)
            error = self._decisions.learn(message.changes, message.through)
            self._acknowledge(message.through, message.receipts_through)
            for directive in message.directives:
                note = f"this client has no handler for {directive.kind}"
                self._answers.append(Answer(directive.id, "declined", note))
        self._advice = message
        self._heard("steering", now)
        self.last_error = error
        if self._took_all:
            self.circuit_open = False

    def on_lost(self, error: str, now: float) -> None:
        """The link is down: what was in flight is kept and goes again after the next Attached."""
        self._in_flight = None
        self.last_error = error
        if self.state in ("steering", "connecting"):
            self.state = "away"
        if self._away_since is None:
            self._away_since = now
        self.tick(now)

    def on_rejected(self, error: str) -> None:
        """The service calls the report in flight invalid: sending it again would never end, so it is dropped."""
        with self._lock:
            report, self._in_flight = self._in_flight, None
            self.last_error = error
            if report is None:
                return
            self._drop_answers(report)
            if report.steps:
                self._dropped += len(report.steps)
                self._acknowledge(report.steps[-1], -1)
                # No decision will come for these; a step that waits for one goes on with the last there was.
                self._decisions.learn((), report.steps[-1])
            if report.receipts:
                self._dropped += len(report.receipts)
                self._acknowledge(-1, report.receipts[-1].number)
            self._ended = self._ended or bool(report.end)

    def on_refused(self, code: str, error: str, now: float) -> None:
        """The service said no, for good."""
        self.last_error = error
        self.state = "superseded" if code == "conflict" and self.attached is not None else "refused"
        self._in_flight = None
        self.outage = True
        if self._away_since is None:
            self._away_since = now

    def tick(self, now: float) -> None:
        """Time passes: an answer that is long due makes an outage."""
        away = self._away_since
        if away is not None:
            never = self.attached is None and self.state == "away"
            self.outage = self.outage or never or now - away >= limits.OUTAGE_AFTER_S
        elif self._in_flight is not None and now - self._last_sent >= limits.OUTAGE_AFTER_S:
            self.outage = True

    def reattach(self, session: str, from_attempt: int | None, step: int, seq: int, digest: str) -> None:
        """Go back to a checkpoint taken before optimizer `step`, under a new session id: the job counts from there.

        Observations from `step` on, and those of another line than the checkpoint's, belong to a past that did not
        happen, and are dropped. Those before it that are not acknowledged stay: the new attempt begins with the first
        of them, so that none is missed.
        """
        with self._lock:
            known = self.attached is not None or self.attach.resume
            if self.attached is None and self.attach.resume and self.attach.from_step is None:
                self._dropped += len(self._observations) + len(self._receipts)
                self._observations.clear()  # numbered from 0, as it is not known from where this job resumed
                self._receipts.clear()
            if self.attached is not None and from_attempt == self._origin and step <= self._offset:
                # This attempt's line has all of the checkpoint's, with what only arrived since.
                from_attempt = self.attached.attempt
            kept = [entry for entry in self._observations if entry[0] < step and self._is_of(from_attempt, entry[0])]
            self._dropped += len(self._observations) - len(kept)
            self._observations = deque(kept)
            receipts = [r for r in self._receipts if r.step < step and self._is_of(from_attempt, r.step)]
            self._receipts = deque(r._replace(number=i) for i, r in enumerate(receipts, 1))
            self._receipt_number = len(receipts)
            if from_attempt is not None:
                self._origin = from_attempt
            elif self.attached is not None:
                self._origin = self.attached.attempt
            self._in_flight = None
            self.attached = None
            self._decisions.newest = None
            self._offset = step
            first = kept[0][0] if kept else step
            self._decisions.begin(first)
            self.attach = self.attach._replace(
                session=session,
                resume=known,
                from_attempt=from_attempt if known else None,
                from_step=first if known else None,
                seq=seq if known else 0,
                digest=digest if known else "",
            )
        self.state = "connecting"

    def after_fork(self) -> None:
        """In a forked child: the lock may have been held by a thread that is not there."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """The conversation is over."""
        if self.state not in ("refused", "superseded"):
            self.state = "closed"

    # -- telling -------------------------------------------------------------------------------------

    def token(self, step: int) -> dict[str, Any]:
        """The checkpoint token: where this run stands, before optimizer `step`. Plain JSON values."""
        attached, advice = self.attached, self._advice
        return {
            "run": self.attach.run,
            "project": self.attach.project,
            "attempt": None if attached is None else attached.attempt,
            "step": step + self._offset,
            "seq": 0 if advice is None else advice.seq,
            "policy": "" if attached is None else attached.policy,
            "digest": "" if advice is None else advice.digest,
        }

    def status(self, step: int, now: float, **counters: Any) -> Status:
        """The status, with the counters of the adapter."""
        advice, newest, attached = self._advice, self._decisions.newest, self.attached
        return Status(
            run=self.attach.run if attached is None else attached.run,
            state=self.state,
            attempt=None if attached is None else attached.attempt,
            step=step + self._offset,
            through=self._decisions.through,
            waiting=len(self._observations),
            dropped=self._dropped,
            outage=self.outage,
            circuit_open=self.circuit_open,
            stale_s=None if self._last_answer is None else max(0.0, now - self._last_answer),
            settings=None if newest is None else newest.settings,
            decision="" if advice is None else advice.code,
            reason="" if advice is None else advice.reason,
            last_error=self.last_error,
            should_stop=self.should_stop,
            **counters,
        )

    # -- leaves --------------------------------------------------------------------------------------

    def _may_wait(self) -> bool:
        open_ = self.state not in ("refused", "superseded", "closed")
        return self.lag is not None and not self.circuit_open and open_

    def _heard(self, state: str, now: float) -> None:
        self.state = state
        self.outage = False
        self.last_error = ""
        self._away_since = None
        self._last_answer = now

    def _shift(self, by: int) -> None:
        """Number what was recorded before the run's own count was known."""
        if by:
            self._offset += by
            self._observations = deque((step + by, signals) for step, signals in self._observations)
            self._receipts = deque(r._replace(step=r.step + by, decided=r.decided + by) for r in self._receipts)

    def _is_of(self, attempt: int | None, step: int) -> bool:
        """Whether what happened at `step` lies on the line of an attempt (None: the one that is not known yet)."""
        own = None if self.attached is None else self.attached.attempt
        return attempt in (None, own) or (attempt == self._origin and step < self._offset)

    def _drop_answers(self, report: Report) -> None:
        for _ in range(min(len(report.answers), len(self._answers))):
            self._answers.popleft()

    def _acknowledge(self, through: int, receipts_through: int) -> None:
        while self._observations and self._observations[0][0] <= through:
            self._observations.popleft()
        while self._receipts and self._receipts[0].number <= receipts_through:
            self._receipts.popleft()
