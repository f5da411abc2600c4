"""Bugs planted on purpose, to see that the judges see.

Rule of this module: each is one plausible mistake in the session, the engine, the fold or the journal, in as little
code as it takes, and says which judge ought to notice (nothing where several may).
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from flyball.decisions import Decisions
from flyball.guard import Bounds
from flyball.session import Session
from flyball_server import branches, loading, service
from flyball_server.core import run as fold
from flyball_server.core.errors import Busy
from flyball_server.engine import Engine, Turn
from flyball_server.ledger import Lost
from flyball_server.storage.journal import Append
from flyball_server.storage.memory import MemoryJournal


class Mutation(NamedTuple):
    """plant(patch): put the bug in place; `patch` is pytest's monkeypatch."""

    about: str
    judge: str
    plant: Callable[[Any], None]


#: By the name of the function that plants it.
MUTATIONS: dict[str, Mutation] = {}


def planted(about, judge=""):
    """Enter a bug in the table: what is wrong, and which judge ought to notice."""

    def enter(plant):
        MUTATIONS[plant.__name__] = Mutation(about, judge, plant)
        return plant

    return enter


@planted("the answer leaves before the journal has the rows", "persist, then publish")
def answers_early(patch):
    async def append(self, run_id, expected, rows, record, snapshot, told=()):
        self._journal.append(Append(expected, rows, record, snapshot, self._loop.create_future(), told))

    patch.setattr(Engine, "_append", append)


@planted("a failed append counts as written", "persist, then publish")
def takes_busy_for_done(patch):
    real = Engine._append

    async def append(self, *arguments):
        try:
            await real(self, *arguments)
        except Busy:
            return

    patch.setattr(Engine, "_append", append)


@planted("whoever lost the race goes on from its own state")
def goes_on_after_losing(patch):
    real = Engine._append

    async def append(self, *arguments):
        try:
            await real(self, *arguments)
        except Lost:
            return

    patch.setattr(Engine, "_append", append)


@planted("a run in doubt is not folded again from the journal")
def never_reloads(patch):
    async def reload(self, live):
        live.stale = False

    patch.setattr(Engine, "_reload", reload)


@planted("a replica refuses by what it last knew", "no wrong refusal")
def refuses_from_memory(patch):
    async def leave(self, *_):
        self._live.lock.release()
        self._live.waiting -= 1

    patch.setattr(Turn, "__aexit__", leave)


@planted("a late attach of a dead session opens an attempt")
def takes_back_the_relieved(patch):
    async def check(*_):
        pass

    patch.setattr(branches, "check_session", check)


@planted("the snapshot is of the run before the commit")
def snapshots_early(patch):
    real = Engine._snapshot

    def snapshot(self, live, run):
        return real(self, live, live.run._replace(seq=run.seq, observations=run.observations))

    patch.setattr(Engine, "_snapshot", snapshot)


@planted("going back lands one step too early", "decisions equal")
def restores_one_step_early(patch):
    real = Engine.restored

    async def restored(self, live, attempt, step):
        return await real(self, live, attempt, step - 1)

    patch.setattr(Engine, "restored", restored)


@planted("a repeated report is answered without its decisions")
def forgets_resent_decisions(patch):
    async def resent(*_):
        return []

    patch.setattr(Engine, "resent", resent)


@planted("fresh() lets repeated steps through", "none folded twice")
def folds_again(patch):
    patch.setattr(fold, "fresh", lambda run, event: event if event.steps else None)


@planted("repeated receipts are recorded again", "everything arrives")
def takes_receipts_again(patch):
    real = service.new_events
    patch.setattr(service, "new_events", lambda run, *rest: real(run._replace(receipts_through=0), *rest))


@planted("the journal lets the later writer overwrite")
def ignores_expected_seq(patch):
    real = MemoryJournal._add

    def add(self, append):
        del self._stored.get(append.record.run, [])[append.expected_seq :]
        return real(self, append)

    patch.setattr(MemoryJournal, "_add", add)


@planted("what was in flight is gone with the link", "everything arrives")
def forgets_what_was_in_flight(patch):
    real = Session.on_lost

    def on_lost(self, error, now):
        if self._in_flight is not None and self._in_flight.steps:
            self._acknowledge(self._in_flight.steps[-1], -1)
        real(self, error, now)

    patch.setattr(Session, "on_lost", on_lost)


@planted("any answer empties the buffer", "everything arrives")
def acknowledges_everything(patch):
    real = Session._acknowledge
    patch.setattr(Session, "_acknowledge", lambda self, _, receipts: real(self, 2**53, receipts))


@planted("missing() is off by one", "decisions equal")
def waits_one_step_less(patch):
    patch.setattr(
        Decisions,
        "missing",
        lambda self, step: self._lag is not None and self._needed(step - 1, self._lag) > self.through,
    )


@planted("an older decision is taken for a step's own", "applied is decided")
def applies_one_step_early(patch):
    patch.setattr(Decisions, "_needed", lambda self, step, lag: max(step - 2 - lag, self._first))


@planted("decisions of the line that was left stay in force")
def keeps_old_decisions(patch):
    patch.setattr(Decisions, "begin", lambda self, from_step: None)


@planted("each step of an outage waits its whole budget", "wait budget")
def keeps_the_circuit_closed(patch):
    patch.setattr(Session, "missed", lambda self: None)


@planted("going back leaves later observations in the buffer")
def keeps_the_abandoned_future(patch):
    real = Session.reattach

    def reattach(self, *arguments):
        before = list(self._observations)
        real(self, *arguments)
        self._observations.clear()
        self._observations.extend(before)

    patch.setattr(Session, "reattach", reattach)


@planted("going back drops what was not acknowledged", "everything arrives")
def drops_what_waits_when_going_back(patch):
    real = Session.reattach

    def reattach(self, *arguments):
        self._observations.clear()
        real(self, *arguments)

    patch.setattr(Session, "reattach", reattach)


@planted("a resumed job goes on counting from 0")
def forgets_where_it_resumed(patch):
    patch.setattr(Session, "_shift", lambda self, by: None)


@planted("the client applies whatever it is told", "within guard")
def ignores_bounds(patch):
    patch.setattr(Bounds, "within", lambda self, settings: settings)


@planted("a long buffer is cut before it is sent", "everything arrives")
def sends_only_the_newest(patch):
    real = Session.report

    def report(self, now):
        with self._lock:
            while len(self._observations) > 8:
                self._observations.popleft()
        return real(self, now)

    patch.setattr(Session, "report", report)


@planted("going back folds only the first rows", "decisions equal")
def restores_too_little(patch):
    class Short:
        def __init__(self, journal):
            self._journal = journal

        def __getattr__(self, name):
            return getattr(self._journal, name)

        def rows(self, run, **where):
            return islice(self._journal.rows(run, **where), 3)

    real = loading.fold_until
    patch.setattr(loading, "fold_until", lambda journal, *rest: real(Short(journal), *rest))
