"""A session that all ranks of a job have part in: what a governor on any rank holds instead of its own.

Rules of this module
--------------------
1. All ranks make the same exchanges in the same order, whatever happens to the service, to rank 0's link or to a loss.
2. Rank 0's own governor goes by what was agreed, too, and never by what its session knows earlier.
3. Where an exchange fails (a rank is gone, or was waited for longer than `EXCHANGE_S`), every setting holds on this
   rank from there on, and on the others from their next exchange on; nothing is raised and nothing waits. What holds
   may then be one exchange apart between ranks.
4. A rank that fails begins no exchange, waits for none, and says so in the store of the process group.

Without a lag an exchange is begun every `every` optimizer steps and ended that many steps later, so that it lies beside
training: what rank 0 says in it holds from its end on. A rank that alone skips steps makes its exchanges as if it had
made them, and goes by a word once its count of steps has come to where the others heard it. With lag=k every step has
one for its losses, and then one, or as many as it takes, for the decision: a pause is many short exchanges, and none of
them outlives a watchdog.

Whoever is through with its training (`leave`), goes back to a checkpoint (`common`), or is out of batches before others
are (`stand_aside`, `resync`) says so in its slot, and goes on exchanging until all ranks say so.

Longer than 400 lines because the whole protocol between ranks stands in one place.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping
from math import inf
from typing import Any

from flyball import limits
from flyball.columns import Signals
from flyball.controls import Control, Controls
from flyball.decisions import Target
from flyball.errors import Declined
from flyball.link import Link
from flyball.ranks import Broken, Exchange
from flyball.session import Session
from flyball.sharing.answers import Answers, Asked
from flyball.sharing.slots import DONE, JOINED, LOAD, STEP, SYNC, Head, Row, Slot, head_of, pack, unpack
from flyball.sharing.tally import Tally, Used
from flyball.sharing.word import Agreed, Words
from flyball.sides import Named
from flyball.status import Status
from flyball.wire import Directive, Group, Settings

log = logging.getLogger("flyball")

#: Signals whose values all ranks share; all others are rank 0's own.
SQUARES = ("local_grad_sq", "mean_grad_sq")

#: What a rank that waits in an exchange waits for, by what it says in it.
_WAITING_FOR = {
    STEP: "an exchange with a rank that has not come so far: every rank makes optimizer steps and calls governor.step, "
    "or closes its governor",
    DONE: "all ranks to be through: every rank must close its governor",
    LOAD: "all ranks to go back to a checkpoint: every rank must call load_state_dict",
    JOINED: "all ranks to leave Join",
    SYNC: "all ranks to leave Join",
}


class Shared:
    """See the module's head. own: rank 0's session and link; None on all other ranks."""

    def __init__(
        self,
        exchange: Exchange,
        attach: Named,
        groups: tuple[Group, ...],
        own: tuple[Session, Link] | None,
        *,
        lag: int | None,
        wait_s: float | None,
    ) -> None:
        self.attach = attach
        self.controls = Controls()
        self.directives = Asked(None if own is None else own[0].directives)
        #: No governor waits by itself: the exchanges do.
        self.lag = None
        self._exchange = exchange
        self._own = own
        self._lockstep = lag is not None
        self._wait_s = wait_s
        self._agreed = Agreed(groups)
        self._words = Words()
        self._answers = Answers(exchange.ranks)
        self._outcome = ""
        self._missed = self._bad_weights = 0
        self._broken = False
        #: What all ranks gave to the exchange ended last.
        self._heard: list[bytes] = []
        self._aside: threading.Thread | None = None
        self._pid = os.getpid()
        self._begin()

    def _begin(self) -> None:
        """An attempt begins, or the ranks' counts were put together anew."""
        self._tally = Tally(self._exchange.ranks)
        #: The step that this rank makes or made last, in the count that all ranks share, and how far that is ahead of
        #: this rank's own.
        self._step, self._shift = -1, 0
        #: The step before which the next exchange is due; whether one is under way.
        self._point, self._under_way = 0, False
        self._skips, self._calls, self._all_call, self._heard = 0, False, False, 0
        #: Words heard, and from which step on they hold.
        self._due: deque[tuple[int, dict[str, Any]]] = deque()
        self._rows: deque[tuple[int, Any, Signals]] = deque()
        self._used: list[Used] = []
        self._told_used: list[Used] = []

    def word(self, first: int) -> dict[str, Any] | None:
        """Rank 0: its word on the steps from `first` on; None on all others."""
        if self._own is None:
            return None
        session, link = self._own
        asked = self._answers.to_ask(session, link)
        return self._words.compose(session, first, 1 if self._lockstep else self._exchange.every, asked)

    def hear(self, word: dict[str, Any]) -> None:
        """From this rank's next step on, all ranks go by rank 0's word."""
        self._agreed.hear(word, self._step)
        if controls := word.get("controls"):
            self.controls.know({name for name, (_, known) in controls.items() if known})
            self.controls.adopt({name: value for name, (value, _) in controls.items()})
        self.directives.take(word.get("asked", ()))

    # -- around an optimizer step --------------------------------------------------------------------

    def arrive(self, step: int, now: float) -> int:
        """Before anything else of this optimizer step: exchange, if it is time. How long that waited, in ns."""
        self._step = step = step + self._shift
        if self._own is not None:
            self._own[0].tick(now)
        if self._due:
            self._hear_due(step)
        position = step + (self._skips if self._counts_skips else 0)
        if (position < self._point and not self._lockstep) or self._broken or os.getpid() != self._pid:
            return 0
        waited = self._exchange.waited_ns
        try:
            if self._lockstep:
                self._round(STEP)
            else:
                self._pass(position)
        except Exception as error:
            self._break(error)
        return self._exchange.waited_ns - waited

    def skipped(self) -> None:
        """governor.step was called, and no optimizer step was made: another rank may have made one, and wait."""
        position = self._step + 1 + self._skips
        self._skips += 1
        self._calls = True
        due = self._all_call if self._lockstep else self._counts_skips and position >= self._point
        if not due or self._broken or os.getpid() != self._pid:
            return
        try:
            self._step += 1
            if self._lockstep:
                self._round(STEP)
            else:
                self._pass(position)
        except Exception as error:
            self._break(error)
        finally:
            self._step -= 1

    @property
    def _counts_skips(self) -> bool:
        """Whether every rank tells of steps that it skips. The first two exchanges begin before it can have told any:
        until the third it is taken for granted."""
        return self._all_call or self._heard < 3

    def observe(self, step: int, signals: Signals, weight: Any = 1.0) -> bool:
        """See `Session.observe`."""
        self._calls = True
        step += self._shift
        if self._broken:
            return self._own is not None and self._own[0].observe(step, signals)
        self._rows.append((step, weight, signals))
        if len(self._rows) > limits.BUFFER_MAX:
            self._rows.popleft()
        return False

    def target(self, step: int) -> Target | None:
        """See `Session.target`."""
        return self._agreed.at(step + self._shift)

    def to_confirm(self, step: int) -> int:
        """See `Session.to_confirm`."""
        return self._agreed.confirm(step + self._shift)

    def noise_seed(self, step: int) -> int:
        """See `Session.noise_seed`."""
        return self._agreed.noise_seed(step + self._shift)

    def missing(self, _: int) -> bool:
        """The exchange has waited already."""
        return False

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
    ) -> None:
        """See `Session.receipt`; it is given once it is known on how many ranks it holds."""
        used = Used(step + self._shift, settings, conflict, wanted_lr, decided, late, confirms, controls or {})
        if not self._broken:
            self._used.append(used)
        elif self._own is not None:
            self._give_receipt(self._own[0], used, ranks, self._exchange.ranks)

    @property
    def reference(self) -> tuple[float, ...]:
        """See `Session`."""
        return self._agreed.reference

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """See `Session`."""
        return self._agreed.bounds

    # -- besides steps -------------------------------------------------------------------------------

    def control(self, name: str, value: Any, low: Any, high: Any) -> Control:
        """See `Session.control`. Its value changes on all ranks at the same step."""
        control = self.controls.declare(name, value, low, high)
        if self._own is not None:
            self._own[0].control(name, value, low, high)
        return control

    def directive(self) -> Directive | None:
        """See `Session.directive`. All ranks have it, at the same step."""
        return self.directives.next()

    def answer(self, directive: str, outcome: str, note: str, step: int) -> None:
        """See `Session.answer`: it is done where it is done on all ranks."""
        self._answers.own(directive, outcome, note, step + self._shift)

    def end(self, outcome: str) -> None:
        """See `Session.end`: it ended well where it did on all ranks."""
        self._outcome = outcome

    @property
    def should_stop(self) -> bool:
        """See `Session.should_stop`."""
        return bool(self._agreed.stop)

    @property
    def attached(self) -> object | None:
        """Whether there is an attempt; on other ranks than 0 no question, since they do not wait for one."""
        return self if self._own is None else self._own[0].attached

    @property
    def state(self) -> str:
        """See `Session`."""
        return str(self._agreed.status.get("state", "connecting"))

    @property
    def drained(self) -> bool:
        """See `Session.drained`."""
        return self._own is None or self._own[0].drained

    def unsettled(self) -> bool:
        """See `Session.unsettled`; only rank 0 ever waits for it."""
        return self._own is not None and self._own[0].unsettled()

    def missed(self) -> None:
        """See `Session.missed`."""
        if self._own is not None:
            self._own[0].missed()

    def token(self, step: int) -> dict[str, Any]:
        """See `Session.token`: no exchange is made for it. On other ranks than 0 it is as of the last one."""
        if self._own is not None:
            return self._own[0].token(step + self._shift)
        said = self._agreed.status
        return {
            "run": self.attach.run,
            "project": self.attach.project,
            "attempt": said.get("attempt"),
            "step": step + self._shift + self._agreed.offset,
            "seq": said.get("seq", 0),
            "policy": said.get("policy", ""),
            "digest": said.get("digest", ""),
        }

    def number(self, step: int) -> int | None:
        """See `Session.number`. Only rank 0 shows the run elsewhere."""
        return None if self._own is None else self._own[0].number(step + self._shift)

    def told(self) -> tuple[int, str, str]:
        """See `Session.told`."""
        return (0, "", "") if self._own is None else self._own[0].told()

    def status(self, step: int, now: float, **counters: Any) -> Status:
        """See `Session.status`. On other ranks than 0 it tells of the service what rank 0 said last."""
        counters["missed"] += self._missed
        counters["bad_values"] += self._bad_weights
        said, stop = self._agreed.status, self._agreed.stop
        if self._own is not None:
            status = self._own[0].status(step + self._shift, now, **counters)
            return status._replace(should_stop=bool(stop), stop_reason=stop, settings=self._agreed.settings)
        return Status(
            run=said.get("run", self.attach.run),
            state=self.state,
            attempt=said.get("attempt"),
            step=step + self._shift + self._agreed.offset,
            through=said.get("through", -1),
            waiting=len(self._rows),
            dropped=0,
            outage=said.get("outage", False),
            circuit_open=said.get("circuit_open", False),
            stale_s=None,
            settings=self._agreed.settings,
            decision=said.get("decision", ""),
            reason=said.get("reason", ""),
            last_error=said.get("last_error", ""),
            should_stop=bool(stop),
            stop_reason=stop,
            **counters,
        )

    # -- together ------------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """See `Session.ranks`."""
        return self._exchange.ranks

    def agree(self, mine: Any) -> list[Any]:
        """See `Session.agree`. mine: JSON values. Raises Declined where the ranks cannot exchange anything any more."""
        try:
            if self._broken:
                raise Broken("they broke off before")
            self._step += 1
            self._until(LOAD, {LOAD, DONE}, None, says=mine)
            self._step -= 1
            return [unpack(data).more.get("says") for data in self._heard]
        except Exception as error:
            self._break(error)
            raise Declined(f"the ranks exchange nothing any more: {error}") from error

    def common(self, token: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rank 0's checkpoint token, on every rank; all of them ask at once."""
        if self._broken:
            return token
        mine: Any = None
        try:
            mine = json.loads(json.dumps(dict(token)))
        except (TypeError, ValueError):
            log.debug("flyball: no token can be told to the other ranks: %r", token)  # and so all of them refuse it
        try:
            self._step += 1
            first = self._until(LOAD, {LOAD, DONE}, None, token=mine)[1]
            told: Mapping[str, Any] = first.more.get("token")  # type: ignore[assignment]  # what it is, is checked next
            return told
        except Exception as error:
            self._break(error)
            return token

    def reattach(self, session: str, from_attempt: int | None, step: int, seq: int, digest: str) -> None:
        """See `Session.reattach`."""
        self._begin()
        if self._own is not None:
            self._own[0].reattach(session, from_attempt, step, seq, digest)

    def leave(self, within_s: float) -> None:
        """This rank is through: go on exchanging until all are, so that no other rank waits for this one in vain.

        A rank that leaves the run open waits `within_s` at most, and one that failed not at all.
        """
        if os.getpid() == self._pid and self._outcome == "failed":
            self._exchange.tell_failed()
            self._abandon()
        elif os.getpid() == self._pid and self._broken and self._outcome == "finished" and self._exchange.failed():
            self._outcome = "failed"
        if not self._broken and os.getpid() == self._pid:
            try:
                self._step += 1
                self._until(DONE, {DONE}, None if self._outcome == "finished" else within_s, outcome=self._outcome)
            except Exception as error:
                self._break(error)
                if self._outcome == "finished" and self._exchange.failed():
                    self._outcome = "failed"
            self._broken = True
        if self._own is not None:
            self._own[0].end(self._outcome)

    def stand_aside(self) -> None:
        """This rank is out of batches while others are not: take part without it, until `resync`."""
        if self._aside is None and not self._broken:
            self._step += 1
            self._aside = threading.Thread(target=self._wait_aside, name="flyball-aside", daemon=True)
            self._aside.start()

    def resync(self) -> None:
        """All ranks are here: they count on from the farthest one's step."""
        if self._aside is not None:
            self._aside.join()
            self._aside = None
        elif not self._broken:
            self._step += 1
            self._put_together(SYNC)

    def _wait_aside(self) -> None:
        self._put_together(JOINED)

    def _put_together(self, tag: int) -> None:
        try:
            heads, _ = self._until(tag, {JOINED, SYNC, DONE}, None)
            ahead = max(head.step for head in heads) - self._step
            self._shift += ahead
            self._step += ahead - 1
            self._skips = 0
        except Exception as error:
            self._break(error)

    def _until(self, tag: int, tags: set[int], within_s: float | None, **more: Any) -> tuple[list[Head], Slot]:
        """Exchange, saying `tag`, until all ranks say one of `tags`; Broken where that waits longer than `within_s`."""
        began = self._exchange.waited_ns
        while True:
            left = None if within_s is None else max(0.0, within_s - (self._exchange.waited_ns - began) / 1e9)
            if self._lockstep:
                heads, first = self._round(tag, left, **more)
            else:
                if self._under_way:
                    self._hear(self._finish(left, tag))
                    self._point += self._exchange.every
                self._give(tag, self._point, **more)
                heads, first = self._hear(self._finish(left, tag))
                self._point += self._exchange.every
            self._hear_due(None)
            if all(head.tag in tags for head in heads):
                self._point = 0  # whoever trains on begins with the next step
                return heads, first

    # -- exchanges -----------------------------------------------------------------------------------

    def _pass(self, position: int) -> None:
        """The point where one exchange ends and the next one begins. position: this rank's count of steps, with those
        that it skipped and another rank may have made."""
        every = self._exchange.every
        if not self._under_way:
            self._point = position
            self._give(STEP, position)
        self._hear(self._finish(self._exchange.patience_s, STEP))
        self._point += every
        self._give(STEP, self._point)

    def _round(self, tag: int, within_s: float | None = None, **more: Any) -> tuple[list[Head], Slot]:
        """Lockstep: the losses of the step before, and then the decision for this one."""
        self._settle()
        self._give(tag, None, **more)
        if tag == STEP:
            within_s = self._exchange.patience_s
        heads, first = self._hear(self._finish(within_s, tag))
        training = [head.step for head in heads if head.tag == STEP]
        waited = 0
        while training:
            word = self._decided(max(training), waited) if self._own is not None else {}
            self._start(Slot(heads[self._exchange.rank], (), word))
            word = dict(unpack(self._finish(within_s, STEP)[0]).more)
            if "word" in word:
                self.hear(word["word"])
                break
            waited += 1
            if waited % limits.PAUSES_PER_LOG == 0 and self._own is not None:
                log.warning(
                    "flyball: all ranks have waited %.0f s for the decision for step %d (%s)",
                    waited * limits.PAUSE_S, max(training), self._own[0].last_error,
                )  # fmt: skip
        return heads, first

    def _decided(self, step: int, waited: int) -> dict[str, Any]:
        """Rank 0: its word, or {} where it is still to be waited for."""
        assert self._own is not None
        session, link = self._own
        if session.missing(step):
            left = None if self._wait_s is None else self._wait_s - waited * limits.PAUSE_S
            pause = limits.PAUSE_S if left is None else min(left, limits.PAUSE_S)
            there = self._exchange.timed(
                lambda: link.wait(lambda: not session.missing(step), pause, f"the decision for step {step}")
            )
            if not there and session.missing(step):
                if left is None or left > limits.PAUSE_S:
                    return {}
                self._missed += 1
                session.missed()
        return {"word": self.word(step)}

    def _settle(self) -> None:
        """Lockstep: a loss that is still on its device is waited for, within the budget."""
        left = limits.PAUSE_S if self._wait_s is None else self._wait_s
        while left > 0 and any(not _is_ready(row) for row in self._rows):
            self._exchange.timed(lambda: self._exchange.pause(limits.SETTLE_S))
            left -= limits.SETTLE_S

    def _give(self, tag: int, first: int | None, **more: Any) -> None:
        """Begin an exchange: what this rank saw and did since the last one; rank 0: its word on the steps from `first`
        on (None: it has none yet)."""
        rows, through = self._told_rows()
        self._told_used, self._used = self._used, []
        if self._own is None and self._told_used:
            more["receipts"] = [[one.step, one.settings, one.conflict, one.wanted_lr] for one in self._told_used]
        if answers := self._answers.to_tell():
            more["answers"] = answers
        if handles := self.directives.to_tell():
            more["handles"] = handles
        if first is not None and (word := self.word(first)) is not None:
            more["word"] = word
        self._start(Slot(Head(tag, through, self._step, self._skips, self._calls), rows, more))

    def _start(self, slot: Slot) -> None:
        self._exchange.start(pack(slot))
        self._under_way = True

    def _finish(self, within_s: float | None, tag: int) -> list[bytes]:
        told = list(self._exchange.finish(within_s, _WAITING_FOR.get(tag, "")))
        self._under_way = False
        return told

    def _told_rows(self) -> tuple[tuple[Row, ...], int]:
        """What can be told now, and through which step that is all."""
        rows: list[Row] = []
        while self._rows and len(rows) < limits.BATCH_MAX:
            step, weight, signals = self._rows[0]
            if not _is_ready(self._rows[0]):
                return tuple(rows), step - 1
            self._rows.popleft()
            weight = self._weight(weight)
            loss, reward, grad_norm, others = signals
            others = others or {}
            rows.append(Row(step, weight, *(_value(v) for v in (loss, reward, grad_norm, *map(others.get, SQUARES)))))
            if self._own is not None:
                own = {name: _value(value) for name, value in others.items() if name not in SQUARES}
                self._tally.own(step, {name: value for name, value in own.items() if value is not None})
        return tuple(rows), self._step - 1

    def _hear(self, told: list[bytes]) -> tuple[list[Head], Slot]:
        """End an exchange: what all ranks said."""
        heads, first = [head_of(data) for data in told], unpack(told[0])
        self._heard = told
        self._all_call = all(head.calls for head in heads)
        self._heard += 1
        self._catch_up(heads)
        if "word" in first.more:
            self._due.append((self._step if self._lockstep else self._point, first.more["word"]))
            self._hear_due(self._step)
        if self._own is not None:
            slots = [first, *map(unpack, told[1:])]
            for rank, slot in enumerate(slots):
                used = [_used_of(one) for one in slot.more.get("receipts", ())] if rank else self._told_used
                self._tally.take(rank, slot, used)
                if slot.more.get("outcome") == "failed":
                    self._outcome = "failed"
            self._tell(*self._own)
            self._answers.collect(slots, *self._own)
        return heads, first

    def _catch_up(self, heads: list[Head]) -> None:
        """A rank that alone skipped a step counts on with the others: settings belong to the numbers of steps. A step
        that all skipped is none, and forgotten."""
        mine = heads[self._exchange.rank]
        training = [head.skips for head in heads if head.calls and head.tag == STEP]
        if not training:
            return
        together = min(training)
        if mine.calls and mine.tag == STEP:
            behind = mine.skips - together
            self._shift += behind
            self._step += behind
            self._skips -= behind
        if self._all_call and not self._lockstep:
            self._point -= together
            if mine.tag == STEP:
                self._skips -= together

    def _hear_due(self, step: int | None) -> None:
        """Go by the words that hold from this step on; None: by all."""
        while self._due and (step is None or self._due[0][0] <= step):
            self.hear(self._due.popleft()[1])

    def _tell(self, session: Session, link: Link) -> None:
        """Rank 0: to the service, what all ranks have told."""
        for step, signals, receipts in self._tally.tell():
            for used, ranks, of_ranks in receipts:
                self._give_receipt(session, used, ranks, of_ranks)
                if used.confirms:
                    link.wake()
            if signals is not None and session.observe(step, signals):
                link.wake()

    def _give_receipt(self, session: Session, used: Used, ranks: int, of_ranks: int) -> None:
        session.receipt(
            used.step, used.decided, used.settings, used.late, used.conflict, ranks, of_ranks=of_ranks,
            confirms=used.confirms, controls=used.controls, wanted_lr=used.wanted_lr,
        )  # fmt: skip

    def _break(self, error: Exception) -> None:
        """Nothing can be agreed on any more: what holds goes on holding."""
        if self._broken:
            return
        reason = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        log.warning(
            "flyball: rank %d: the ranks exchange nothing any more, and all settings hold (%.400s)",
            self._exchange.rank, reason,
        )  # fmt: skip
        self._abandon()

    def _abandon(self) -> None:
        """Rank 0 tells the service what it has seen and used itself."""
        if self._broken:
            return
        self._broken = True
        if self._own is None:
            self._rows.clear()
            return
        self._tally.abandon()
        self._tell(*self._own)
        while self._rows:
            step, _, signals = self._rows.popleft()
            self._own[0].observe(step, signals)

    def _weight(self, weight: Any) -> float:
        """What has arrived; 0 where it is no weight, so that this rank has no part in the mean."""
        if isinstance(weight, float):  # its reader has said so already where it is none
            return weight if 0 <= weight < inf else 0.0
        arrived = _value(weight)
        if arrived is not None and 0 <= arrived < inf:
            return arrived
        self._bad_weights += 1
        if self._bad_weights == 1:
            log.warning("flyball: weight is %s: a rank has no part in the mean of such a step", arrived)
        return 0.0


def _is_ready(row: tuple[int, Any, Signals]) -> bool:
    _, weight, signals = row
    values: tuple[Any, ...] = (weight, *signals[:3], *(signals[3] or {}).values())
    return all(value is None or isinstance(value, float) or value.ready() for value in values)


def _value(value: Any) -> float | None:
    return value if value is None or isinstance(value, float) else float(value.value())


def _used_of(told: list[Any]) -> Used:
    step, (lr, momentum, noise), conflict, wanted = told
    rows = (tuple(lr), None if momentum is None else tuple(momentum), None if noise is None else tuple(noise))
    return Used(step, Settings(*rows), conflict, None if wanted is None else tuple(wanted))
