"""What a training script does between two optimizer steps because the service, or its own plan, asks for it.

Rule of this module: handlers run inside `governor.step`, on the thread that trains, behind the observation of an
optimizer step; what one raises declines, and never ends the training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flyball.directives import KINDS
from flyball.errors import Declined
from flyball.sides import Line, Side

log = logging.getLogger("flyball")

#: What answers a directive: it gets the arguments, and returns a note or nothing.
Handler = Callable[[Mapping[str, Any]], str | None]
_H = TypeVar("_H", bound=Handler)


class Handlers:
    """What a governor has of them."""

    _session: Side
    _link: Line

    def __init__(self, session: Side, link: Line) -> None:
        self._session = session
        self._link = link
        #: Optimizer steps of this process, from 0; the session knows where the run's own count stood then.
        self._next_step = 0
        #: How often it went back to a checkpoint.
        self._returns = 0
        self._handlers: dict[str, Handler] = {}
        #: [steps between, steps left, what to do]
        self._regular: list[list[Any]] = []

    def on(self, kind: str, handler: Handler) -> None:
        """Have `handler` called where the service asks for a `checkpoint`, `restore`, `rewind`, `evaluate` or `stop`.

        It gets the arguments, runs inside `governor.step` on the thread that trains, and may take its time; what it
        returns is the answer's note. One that raises declines (`flyball.Declined("why")` does so without a traceback
        in the log). Without a handler a stop sets `should_stop`, and all else is declined. `on_checkpoint` and so on
        are the same as decorators:

            @governor.on_checkpoint
            def save(args):
                torch.save({"model": model.state_dict(), "flyball": governor.state_dict()}, "latest.pt")

        `flyball.MemoryCheckpoint` is a ready set of handlers. Call `governor.step` last in an iteration, behind
        `scaler.update()` and `scheduler.step()`, so that what a handler saves or restores is between two iterations.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r:.80}: give one of {', '.join(KINDS)}")
        if not callable(handler):
            raise TypeError(f"handler is {handler!r:.80}: give a function that takes the arguments, a mapping")
        self._handlers[kind] = handler
        self._session.directives.handle(kind)

    def on_checkpoint(self, handler: _H) -> _H:
        """Save everything, `governor.state_dict()` with it. args: what was asked for with it; policies give a `tag`
        that they will ask to go back to."""
        self.on("checkpoint", handler)
        return handler

    def on_restore(self, handler: _H) -> _H:
        """Go back to a checkpoint: load it, and `governor.load_state_dict(token)`, with which the service goes back,
        too. args: perhaps the `tag` of one, or `before_step` (one from before that optimizer step) and `skip_batches`.
        """
        self.on("restore", handler)
        return handler

    def on_rewind(self, handler: _H) -> _H:
        """Go back to a step, in the same way. args: `step`, the optimizer step to go on with."""
        self.on("rewind", handler)
        return handler

    def on_evaluate(self, handler: _H) -> _H:
        """Evaluate; tell what came of it with the next `governor.step(loss, val_loss=...)`, or in the note."""
        self.on("evaluate", handler)
        return handler

    def on_stop(self, handler: _H) -> _H:
        """Prepare to stop. From here on that is the handler's matter: `governor.should_stop` is not set by a stop."""
        self.on("stop", handler)
        return handler

    def every(self, steps: int, do: Callable[[], object]) -> None:
        """Have `do` called inside `governor.step` after so many optimizer steps, again and again. What it raises is
        logged."""
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps is {steps!r:.80}: give a number of optimizer steps, 1 or more")
        self._regular.append([steps, steps, do])

    @property
    def ranks(self) -> int:
        """How many ranks of the job share the run; 1 where it is this process's alone."""
        return self._session.ranks

    def agree(self, mine: Any) -> list[Any]:
        """For handlers, which run on all ranks at the same step: what each of them says, by rank (None: it is through
        with its training). Every rank calls it at once. mine: plain JSON values."""
        return self._session.agree(mine)

    def _between_steps(self) -> None:
        """Behind an optimizer step: what the service asked for, then what is due."""
        if not self._link.is_ours:
            return  # a forked child: what was asked is its parent's to do
        if self._session.directives.pending and self._carry_out():
            for one in self._regular:  # it went back: what is due is counted from there
                one[1] = one[0]
            return
        for one in self._regular:
            one[1] -= 1
            if one[1] <= 0:
                one[1] = one[0]
                try:
                    one[2]()
                except Exception as error:
                    log.warning("flyball: what is due every %d steps failed: %s", one[0], error)

    def _carry_out(self) -> bool:
        """Call the handlers of what the service asked for. Whether one of them went back to a checkpoint."""
        session, returns = self._session, self._returns
        while (asked := session.directive()) is not None:
            outcome, note = "done", None
            try:
                note = self._handlers[asked.kind](asked.args)
            except Declined as error:
                outcome, note = "declined", str(error)
                log.warning("flyball: %s was declined: %s", asked.kind, error)
            except Exception as error:
                outcome, note = "declined", f"{type(error).__name__}: {error}"
                log.warning("flyball: %s was declined: its handler failed", asked.kind, exc_info=True)
            # A handler may have gone back to a checkpoint: what step it is, is asked afterwards.
            session.answer(asked.id, outcome, "" if note is None else str(note), self._next_step)
            self._link.wake()
        return self._returns != returns
