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
from collections.abc import Mapping
from itertools import islice
from typing import Any

from flyball import limits
from flyball.base import Base
from flyball.columns import Signals, columns
from flyball.confirms import Confirms
from flyball.controls import Control, Controls
from flyball.decisions import Decisions, Target
from flyball.directives import Directives
from flyball.notices import Notices
from flyball.rng import noise_seed
from flyball.status import Status
from flyball.wire import Advice, Attach, Attached, Directive, Receipt, Report, Settings


class Session:
    """See the module's head. `attach` is the message to open with; `base` the declared base schedule, if any; or_begin:
    whether a run that is to be resumed, and that the service does not know, is begun."""

    def __init__(
        self, attach: Attach, *, base: Base | None, on_outage: str, now: float, or_begin: bool = False
    ) -> None:
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
        self._or_begin = or_begin
        self._on_outage = on_outage
        self._lock = threading.Lock()
        self._observations: deque[tuple[int, Signals]] = deque()
        self._receipts: deque[Receipt] = deque()
        self.controls = Controls()
        self.directives = Directives()
        self._notices = Notices()
        self._confirms = Confirms(attach.lag)
        #: Optimizer steps that this process has observed.
        self._stepped = 0
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
        #: Since when an answer is due; None where nothing was sent, or only a heartbeat.
        self._due_since: float | None = None
        self._last_answer: float | None = None
        self._away_since: float | None = now
        self._advice: Attached | Advice | None = None
        #: How often the service answered.
        self._answers = 0

    # -- the training thread -------------------------------------------------------------------------

    def arrive(self, step: int, now: float) -> int:
        """Before anything else of an optimizer step. How long that waited, in ns: not at all."""
        self.tick(now)
        return 0

    def skipped(self) -> None:
        """No optimizer step was made: no matter of one process alone."""

    def observe(self, step: int, signals: Signals, weight: float = 1.0) -> bool:
        """Record one step. Returns whether the link should be woken to send. weight: of this process among several."""
        with self._lock:
            buffer = self._observations
            if len(buffer) >= limits.BUFFER_MAX:
                buffer.popleft()
                self._dropped += 1
            buffer.append((step + self._offset, signals))
            self._stepped = step + 1
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

    def to_confirm(self, step: int) -> int:
        """The `confirm` that optimizer `step` is the first to be under, once; 0: none. Ask before `target`."""
        if not self._confirms.waiting:
            return 0
        with self._lock:
            return self._confirms.due(self._decisions.basis(step + self._offset))

    def receipt(
        self,
        step: int,
        decided: int | None,
        settings: Settings,
        late: bool,
        conflict: str,
        ranks: int,
        *,
        confirms: int = 0,
        controls: Mapping[str, float] | None = None,
        wanted_lr: tuple[float, ...] | None = None,
        of_ranks: int = 0,
    ) -> None:
        """Record what was really applied at `step`. decided: a target's; None: nothing was decided yet. confirms: what
        `to_confirm` said, and then the receipt is urgent."""
        with self._lock:
            step += self._offset
            decided = step - 1 if decided is None else decided
            self._receipt_number += 1
            if len(self._receipts) >= limits.RECEIPTS_MAX:
                self._receipts.popleft()
                self._dropped += 1
            self._confirms.given = confirmed = max(self._confirms.given, confirms)
            self._receipts.append(
                Receipt(
                    self._receipt_number, step, decided, settings, late, conflict, ranks, confirmed,
                    controls or {}, wanted_lr, of_ranks,
                )
            )  # fmt: skip
            self._urgent = self._urgent or confirms > 0

    def control(self, name: str, value: Any, low: Any, high: Any) -> Control:
        """Declare a control, or find it again. Raises ValueError where the declaration makes no sense."""
        with self._lock:
            control = self.controls.declare(name, value, low, high)
            self._urgent = self._urgent or bool(self.controls.untold)
            return control

    def directive(self) -> Directive | None:
        """The next directive for the training thread; it is handed out once, and is to be answered."""
        with self._lock:
            return self.directives.next()

    def answer(self, directive: str, outcome: str, note: str, step: int) -> None:
        """Optimizer `step` is the next one, and the directive was carried out ("done") or "declined"."""
        with self._lock:
            self.directives.answer(directive, outcome, note, step + self._offset)
            self._urgent = True

    def end(self, outcome: str) -> None:
        """The job ends: the last report says how ("finished" or "failed"; "" leaves it open)."""
        self._end = outcome
        self._urgent = True

    @property
    def should_stop(self) -> bool:
        """Whether the service asked to stop, or there is an outage and on_outage="stop"."""
        return bool(self.stop_reason)

    @property
    def stop_reason(self) -> str:
        """Why the job should stop; "" where it should not."""
        away = "the service is away, and on_outage is 'stop'" if self._on_outage == "stop" and self.outage else ""
        return self.directives.stop or away

    @property
    def drained(self) -> bool:
        """Whether everything was acknowledged, the end included."""
        answers = self.directives.unanswered
        return not (self._observations or self._receipts or answers or (self._end and not self._ended))

    # -- the link thread -----------------------------------------------------------------------------

    def on_attached(self, message: Attached, to: Attach, now: float) -> None:
        """The service answered the Attach `to`; an answer to one that was given up meanwhile says nothing."""
        with self._lock:
            if self.attach.session != to.session:
                return
            previous = self.attached
            if previous is None or previous.attempt != message.attempt:
                self._decisions.begin(message.from_step)
                self._confirms.begin()
                self.controls.begin()
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
            self.controls.tell_all()
            self.controls.adopt(message.controls)
            self._confirms.ask(message.confirm, message.through, False)
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
            untold = self.controls.untold
            heartbeat = now - self._last_sent >= limits.HEARTBEAT_S
            due = (
                self._urgent
                or waiting >= limits.FLUSH_OBSERVATIONS
                or now - self._last_sent >= limits.FLUSH_INTERVAL_S
                or (self.lag is not None and waiting > 0)
            )
            if untold:
                # By themselves: a declaration that is refused must not take observations with it.
                self._took_all = waiting == 0
                blank = Report(attached.run, self.attach.session, attached.attempt, (), {}, (), (), "")
                return self._send(blank._replace(controls=untold), now)
            if (not due or self.drained) and not heartbeat:
                return None
            head = list(islice(self._observations, limits.BATCH_MAX))
            receipts = tuple(islice(self._receipts, limits.RECEIPTS_BATCH_MAX))
            all_receipts = len(receipts) == len(self._receipts)
            answers = self.directives.answers
        # Columns are built without the lock: the training thread may go on appending meanwhile.
        steps, signals = columns(head)
        self._took_all = len(steps) == waiting
        end = self._end if self._took_all and all_receipts else ""
        if not (steps or receipts or answers or end or heartbeat):
            return None
        self._urgent = False
        session, attempt = self.attach.session, attached.attempt
        return self._send(Report(attached.run, session, attempt, steps, signals, receipts, answers, end), now)

    def pause(self, now: float) -> float:
        """How long the link may sleep before it asks for a report again, if nobody wakes it."""
        with self._lock:
            if self.lag is not None and self._observations:
                return 0.001  # somebody waits for a number that is still on its device
            left = self._last_sent + limits.FLUSH_INTERVAL_S - now
            if left > 0:
                return max(left, 0.001)
            # Overdue, so that what there is has not left its device yet; or there is nothing, perhaps for long.
            return limits.FLUSH_INTERVAL_S if self.drained else limits.DEVICE_POLL_S

    def on_advice(self, message: Advice, now: float) -> None:
        """The service answered the report in flight: everything in it is in the journal."""
        with self._lock:
            report, self._in_flight = self._in_flight, None
            if report is None:  # it belongs to an attempt that was given up meanwhile
                return
            self.directives.sent(report.answers)
            self._ended = self._ended or bool(report.end)
            if message.guard:
                self._decisions.limit(message.guard)
                self.bounds = self._decisions.absolute
            through, known = message.through, None
            if self.lag is not None:
                # Steps that the service has and whose decisions were not told yet are still to be asked for.
                known = self._decisions.through
                through = min(through, report.steps[-1] if report.steps else known)
            error = self._decisions.learn(message.changes, through, known)
            self._acknowledge(through, message.receipts_through)
            self.controls.told(report.controls)
            self.controls.adopt(message.controls)
            if not self._ended:  # behind the end nothing is asked any more, and no answer would be taken
                self.directives.take(message.directives, self._stepped + self._offset)
            self._notices.take((*message.notices, *self.directives.lines))
            self._confirms.ask(message.confirm, message.through, bool(report.steps))
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
            self.directives.sent(report.answers)
            self.controls.told(report.controls, refused=True)
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

    def begin_instead(self, code: str) -> bool:
        """The service said no. Whether that was to resuming a run that is to be begun where it is not known: then the
        next Attach begins it."""
        with self._lock:
            attach = self.attach
            resumes = attach.resume and attach.from_step is None and self.attached is None
            if not (self._or_begin and code == "not_found" and resumes):
                return False
            self.attach = attach._replace(resume=False, on_unknown="refuse")
            return True

    def notices(self) -> list[str]:
        """What people did, for the job's log, each line once."""
        with self._lock:
            return self._notices.new()

    def tick(self, now: float) -> None:
        """Time passes: an answer that is long due makes an outage."""
        away = self._away_since
        if away is not None:
            never = self.attached is None and self.state == "away"
            self.outage = self.outage or never or now - away >= limits.OUTAGE_AFTER_S
        elif self._in_flight is not None:
            if self._due_since is None and not self.drained:
                self._due_since = now  # what waits behind a heartbeat is due as well
            if self._due_since is not None and now - self._due_since >= limits.OUTAGE_AFTER_S:
                self.outage = True

    @property
    def ranks(self) -> int:
        """How many ranks share the run."""
        return 1

    def agree(self, mine: Any) -> list[Any]:
        """What every rank says, by rank; None for one that is through. All of them ask at once."""
        return [mine]

    def common(self, token: Mapping[str, Any]) -> Mapping[str, Any]:
        """The checkpoint token that all ranks go back to."""
        return token

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
            self._stepped = 0
            self._confirms.begin()
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

    def told(self) -> tuple[int, str, str]:
        """How many answers the service gave so far, the newest decision's code, and its reason."""
        advice = self._advice
        return (self._answers, "", "") if advice is None else (self._answers, advice.code, advice.reason)

    def number(self, step: int) -> int | None:
        """The run's own count of this job's step; None where that is not known yet."""
        unknown = self.attached is None and self.attach.resume and self.attach.from_step is None
        return None if unknown else step + self._offset

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

    @property
    def origin(self) -> tuple[int, int]:
        """The seed of gradient noise, and the run's own count of this process's first step."""
        return self._seed, self._offset

    @property
    def newest(self) -> Attached | Advice | None:
        """The service's newest answer."""
        return self._advice

    @property
    def through(self) -> int:
        """The newest step in the service's journal, as far as is known."""
        return self._decisions.through

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
            stop_reason=self.stop_reason,
            **counters,
        )

    # -- leaves --------------------------------------------------------------------------------------

    def _may_wait(self) -> bool:
        open_ = self.state not in ("refused", "superseded", "closed")
        return self.lag is not None and not self.circuit_open and open_

    def _send(self, report: Report, now: float) -> Report:
        self._in_flight, self._last_sent = report, now
        says = report.steps or report.receipts or report.answers or report.controls or report.end
        self._due_since = now if says else None  # nobody waits for the answer to a heartbeat
        return report

    def _heard(self, state: str, now: float) -> None:
        self.state = state
        self._answers += 1
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

    def _acknowledge(self, through: int, receipts_through: int) -> None:
        while self._observations and self._observations[0][0] <= through:
            self._observations.popleft()
        while self._receipts and self._receipts[0].number <= receipts_through:
            self._receipts.popleft()
