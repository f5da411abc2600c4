"""What the service asks of the job besides settings, and the job's answers.

Rule of this module: a directive is carried out at most once, however often the service repeats it; its answer is kept
until it is acknowledged. What a handler does is run by whoever calls `next`: the training thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from flyball import limits
from flyball.wire import Answer, Directive

#: What there are handlers for.
KINDS = ("checkpoint", "evaluate", "restore", "rewind", "stop")


class Directives:
    """Not locked: the session does that. stop: why the job shall stop, "" as long as it shall not."""

    def __init__(self) -> None:
        self.stop = ""
        #: Those for the training thread.
        self.pending: deque[Directive] = deque()
        self._handled: set[str] = set()
        self._in_vain: dict[str, str] = {}
        #: The newest ids, with the answer where there is one already, and how often that may still be sent.
        self._seen: dict[str, tuple[Answer | None, int]] = {}
        self._answers: dict[str, Answer] = {}

    def handle(self, kind: str) -> None:
        """From now on there is a handler for this kind."""
        self._handled.add(kind)

    def take(self, asked: tuple[Directive, ...], next_step: int) -> None:
        """The service asks, perhaps for what it asked for before."""
        for directive in asked:
            seen = self._seen.get(directive.id)
            if seen is not None:
                self._again(directive.id, *seen)
                continue
            self._remember(directive.id, None)
            declined = self._why_not(directive)
            if declined:
                self.answer(directive.id, "declined", declined, next_step)
            elif directive.kind in self._handled:
                self.pending.append(directive)
            else:
                reason = directive.args.get("reason")
                self.stop = f"the service asks to stop: {reason!s:.400}" if reason else "the service asks to stop"
                self.answer(directive.id, "done", "governor.should_stop is set", next_step)

    @property
    def lines(self) -> tuple[str, ...]:
        """For the job's log: that it shall stop, and what it was asked for in vain."""
        return tuple(filter(None, (self.stop, *self._in_vain.values())))

    def next(self) -> Directive | None:
        """The next one to carry out, handed out once; None where there is none."""
        return self.pending.popleft() if self.pending else None

    def answer(self, directive: str, outcome: str, note: str, next_step: int) -> None:
        """How it ended."""
        answer = Answer(directive, outcome, note[: limits.NOTE_CHARS], next_step)
        self._remember(directive, answer)
        self._answers[directive] = answer

    @property
    def answers(self) -> tuple[Answer, ...]:
        """What is to be sent."""
        return tuple(self._answers.values())

    @property
    def unanswered(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._answers)

    def sent(self, answers: tuple[Answer, ...]) -> None:
        """These need not be sent again: the service has them, or refused them."""
        for answer in answers:
            if self._answers.get(answer.directive) == answer:
                del self._answers[answer.directive]

    def _why_not(self, directive: Directive) -> str:
        if not isinstance(directive.args, Mapping):
            return f"its arguments are {directive.args!r:.80}, which is no mapping"
        kind = directive.kind
        if kind not in self._handled and kind != "stop":
            why = f"this client has no handler for {kind}"
            ready = "" if kind == "evaluate" else "; flyball.MemoryCheckpoint is one"
            if kind in KINDS:
                self._in_vain[kind] = (
                    f"the service asks for {kind}, which is declined: {why}{ready}. What needs it is off (as "
                    "a range test is without a checkpoint)"
                )
            return why
        if len(self.pending) >= limits.DIRECTIVES_PENDING_MAX:
            return f"{len(self.pending)} others wait already"
        return ""

    def _remember(self, directive: str, answer: Answer | None) -> None:
        self._seen.pop(directive, None)
        self._seen[directive] = (answer, limits.ANSWERS_AGAIN)
        if len(self._seen) > limits.DIRECTIVES_MAX:
            # Never one that waits or is being carried out: those are far fewer.
            del self._seen[next(name for name, (answered, _) in self._seen.items() if answered is not None)]

    def _again(self, directive: str, answer: Answer | None, left: int) -> None:
        """The service has not got the answer, so it goes once more; not for ever, as it may be what is refused."""
        if answer is not None and directive not in self._answers and left:
            self._seen[directive] = (answer, left - 1)
            self._answers[directive] = answer
