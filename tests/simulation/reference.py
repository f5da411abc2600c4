"""What ought to have happened: the fold of a journal's own events, one observation at a time and never looking at what
the journal says came of them, and an exact job's whole life without any fault.

Rule of this module: nothing here goes through a session, an engine or a store.
"""

from bisect import bisect_right

from flyball_server import records
from flyball_server.core import run as fold
from flyball_server.core.events import Applied, Attached, Created, Observed, Receipt
from flyball_server.core.run import dump
from flyball_server.core.types import Settings


class Line:
    """One attempt. decided: the settings in force behind each of its steps, and behind the one before its first.
    states: the run behind every event, the attach included. signals: what was recorded, by step."""

    def __init__(self, event):
        self.parent = event.parent
        self.first = event.from_step
        self.session = event.session
        self.decided = {}
        self.states = []
        self.signals = {}
        self.numbers = []
        self._steps = []

    def learn(self, step, settings):
        self._steps.append(step)
        self.decided[step] = settings

    def in_force(self, step):
        """The settings in force behind `step`; None before the attempt."""
        found = bisect_right(self._steps, step)
        return self.decided[self._steps[found - 1]] if found else None


class Record:
    """A run's journal folded twice: as it stands (`states`, by sequence number), and as it ought to be (`lines`, by
    attempt). differs: where the two part, in words."""

    def __init__(self, journal, run_id, ruler):
        self.rows = list(journal.rows(run_id))
        self.spec = records.spec_of(self.rows[0])
        self.rules = ruler(self.spec)
        self.lines = {}
        self.side = []
        self.differs = ""
        self.states = [None]
        run = ought = None
        for row in self.rows:
            event, outcome = records.from_row(row, self.spec.groups)
            if isinstance(event, Created):
                run = ought = fold.create(self.rules)
            else:
                ought = self._fold(ought, event, outcome)
                run, _ = fold.apply(self.rules, run, event)
            self.states.append(run)
            if isinstance(event, Attached) and not self.differs and _bare(run) != _bare(ought):
                self.differs = (
                    f"row {row.seq}: attempt {event.attempt} begins at step {event.from_step} in another state"
                )

    def line_of(self, session):
        """The attempt that a session opened, with its number; (0, None) where it opened none."""
        return next(((n, line) for n, line in self.lines.items() if line.session == session), (0, None))

    def steps_of(self, number):
        """The steps on an attempt's line, with those of the attempts it goes on from, newest first."""
        steps, below = [], float("inf")
        while number > 0:
            line = self.lines[number]
            steps += [step for step in sorted(line.signals, reverse=True) if step < below]
            below, number = min(below, line.first), line.parent
        return steps

    def in_force(self, number, step):
        """The settings in force behind `step` on the line of an attempt; those it began with where the run has none."""
        while step < self.lines[number].first - 1 and self.lines[number].parent > 0:
            number = self.lines[number].parent
        line = self.lines[number]
        return line.in_force(max(step, line.first - 1))

    def _fold(self, run, event, outcome):
        if isinstance(event, Observed):
            return self._observe(run, event, outcome)
        if isinstance(event, Attached):
            restored = None
            if run.attempt > 0 and (event.from_step <= run.through or event.parent != run.attempt):
                restored = dump(self._before(event.parent, event.from_step))
            run, _ = fold.apply(self.rules, run, event._replace(restored=restored))
            self.lines[event.attempt] = line = Line(event)
            line.learn(event.from_step - 1, run.settings)
        else:
            run, _ = fold.apply(self.rules, run, event)
            if isinstance(event, Applied):
                self.lines[event.attempt].numbers += [receipt.number for receipt in event.receipts]
            elif not run.attempt or not hasattr(event, "attempt"):
                self.side.append(event)
        if self.lines:
            self.lines[run.attempt].states.append(run)
        return run

    def _observe(self, run, event, outcome):
        line, changes = self.lines[event.attempt], dict(outcome.changes)
        told = None
        for i, step in enumerate(event.steps):
            signals = {name: column[i] for name, column in event.signals.items()}
            one = Observed(event.attempt, [step], {name: [value] for name, value in signals.items()})
            if step in line.signals or step < line.first:
                self.differs = self.differs or f"step {step} of attempt {event.attempt} is folded twice"
                continue
            run, _ = fold.apply(self.rules, run, one)
            line.signals[step] = signals
            line.learn(step, run.settings)
            line.states.append(run)
            told = changes.get(step, told)
            if told != run.settings and not self.differs:
                self.differs = f"step {step} of attempt {event.attempt}: decided was {told}, ought to be {run.settings}"
        return run

    def _before(self, number, step):
        """The run as it was before it observed `step` on the line of an attempt."""
        while self.lines[number].first > step and self.lines[number].parent > 0:
            number = self.lines[number].parent
        found = self.lines[number].states[0]
        for run in self.lines[number].states:
            if run.through >= step:
                break
            found = run
        return found


def _bare(run):
    """A run without its place in the journal, which differs where batches do."""
    return {name: value for name, value in dump(run).items() if name not in ("seq", "attempts")}


def undisturbed(spec, rules, plan, lost):
    """The learning rates that an exact job applies in a world without faults: (its own step, one per group), in order.

    lost: by incident, how many of the steps before the checkpoint never left the crashed process; a fault can do
    that to a process that dies right behind its checkpoint, and to nobody else.
    """
    run = fold.create(rules)
    states, checkpoints, incidents = {}, [0], list(plan.incidents)
    out, step, attempt = [], 0, 0

    def attach(at, state):
        nonlocal run, attempt
        attempt += 1
        event = Attached(attempt, attempt - 1, at, "s", "", plan.lag, None if state is None else dump(state))
        run, _ = fold.apply(rules, run, event)
        # What belongs to the first steps was decided before: from `first - 1` on it is told again.
        first = max(at - 1 - plan.lag, 0)
        told, since = {}, first - 1
        for one in range(first - 1, at - 1):
            known = max(s for s in decided if s <= one)
            if one >= first and known == one and decided[one][0] != told[one - 1][0]:
                since = one
            told[one] = (decided[known][0], since)
        return {**decided, **told, at - 1: (run.settings, at - 1)}

    decided = {-1: (run.settings, -1)}
    decided, receipted, number = attach(0, None), None, 0
    while step < plan.steps:
        if incidents and incidents[0].at <= step:
            incident = incidents.pop(0)
            del checkpoints[max(1, len(checkpoints) - incident.back) :]
            step = checkpoints[-1]
            missing = lost[len(plan.incidents) - len(incidents) - 1]
            state = states[step - missing] if step - missing else fold.create(rules)
            decided = {s: one for s, one in decided.items() if s < max(step - missing, 0)}  # -1 always stays
            decided, receipted, number = attach(step, state), None, 0
            continue
        if step % plan.every == 0 and step > checkpoints[-1]:
            checkpoints.append(step)
        settings, since = decided[max(step - 1 - plan.lag, -1)]
        out.append((step, settings.lr))
        momentum = settings.momentum
        if momentum is None:
            momentum = tuple(g.momentum for g in spec.groups)
        used = Settings(settings.lr, None if set(momentum) == {None} else momentum, settings.noise_std)
        if (used, settings) != receipted:
            receipted, number = (used, settings), number + 1
            receipt = Receipt(number, step, since, used, False, "", plan.ranks)
            run, _ = fold.apply(rules, run, Applied(attempt, (receipt,)))
        loss, reward, grad_norm, others = plan.signals(step, settings.lr[0])
        signals = {"loss": loss, "reward": reward, "grad_norm": grad_norm, **(others or {})}
        columns = {name: [value] for name, value in signals.items() if value is not None}
        run, _ = fold.apply(rules, run, Observed(attempt, [step], columns))
        before = decided.get(step - 1, (None, step))
        decided[step] = before if before[0] == run.settings else (run.settings, step)
        step += 1
        states[step] = run
    return out
