"""The events of a run, and what folding them brings forth.

Rule of this module: data only. An event is what came in from outside; an outcome is what the fold made of
it. The journal stores both, so that an auditor can fold the events again and compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flyball_server.core.commands import Control
from flyball_server.core.types import Ask, Group, Settings


class Spec(NamedTuple):
    """Everything about a run that never changes. policy, base and guard are fully resolved JSON mappings.

    profile: the server-side profile they came from, or "". shadows: by name, further policies ({"policy", "base"})
    that decide beside it and are recorded, but never applied. asked_guard: the guard that the job asked for, where
    project or service made it stricter.
    """

    run: str
    project: str
    name: str
    labels: Mapping[str, str]
    groups: tuple[Group, ...]
    policy: Mapping[str, Any]
    base: Mapping[str, Any] | None
    guard: Mapping[str, Any]
    mode: str
    seed: int
    profile: str = ""
    shadows: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    asked_guard: Mapping[str, Any] | None = None


class Origin(NamedTuple):
    """Where a run comes from that does not begin at step 0.

    kind: "fork" (of a run in this store) or "token" (a checkpoint of a run that this store does not know). run,
    attempt, step: the line it leaves, and the first step of its own. seq, digest: the row of that run's journal which
    stood for its state then (0 and "" where nobody knows it). state: the dumped state it goes on from; None: its policy
    begins afresh.
    """

    kind: str
    run: str
    attempt: int
    step: int
    seq: int
    digest: str
    state: Mapping[str, Any] | None


class Created(NamedTuple):
    """A run begins to exist."""

    spec: Spec
    origin: Origin | None = None


class Attached(NamedTuple):
    """A driver opens attempt `attempt`, whose first step is `from_step`.

    parent: the attempt whose line it continues (0: none). session: the id of the attached process. restored:
    the run's dumped state as of from_step on the parent's line where that is not simply the newest state, else None.
    claimed: of a checkpoint token that is newer than the journal and was taken at its word, its seq and digest.
    """

    attempt: int
    parent: int
    from_step: int
    session: str
    client: str
    lag: int | None
    restored: Mapping[str, Any] | None
    claimed: Mapping[str, Any] | None = None


class Observed(NamedTuple):
    """The signals of consecutive observations: steps strictly increasing, one list per signal, None = missing."""

    attempt: int
    steps: Sequence[int]
    signals: Mapping[str, Sequence[float | None]]


class Reported(NamedTuple):
    """Signals from another process; the policy sees them with the next observation. step: the newest step then.

    source, number: the reporter and its count, "" and 0 where it does not count. note: words for the record. key: what
    makes a repeated request the same one, or "".
    """

    step: int
    signals: Mapping[str, float]
    source: str = ""
    number: int = 0
    note: str = ""
    key: str = ""


class Receipt(NamedTuple):
    """What was really applied from optimizer step `step` on. decided: the step whose observation decided it.

    ranks, of_ranks: on how many of how many ranks (0: of as many). confirms: the row up to which the job knew what was
    commanded. controls: the values of the declared ones. wanted: the learning rates written before the step, where
    others were read back after it.
    """

    number: int
    step: int
    decided: int
    settings: Settings
    late: bool
    conflict: str
    ranks: int
    confirms: int = 0
    controls: Mapping[str, float] = MappingProxyType({})
    wanted: tuple[float, ...] | None = None
    of_ranks: int = 0


class Applied(NamedTuple):
    """Receipts of the attempt's driver, numbered 1, 2, 3 ... within its session."""

    attempt: int
    receipts: tuple[Receipt, ...]


class DirectiveAnswered(NamedTuple):
    """The driver's answer to a directive: outcome is "done" or "declined". step: its next optimizer step then."""

    attempt: int
    directive: str
    outcome: str
    note: str
    step: int = 0


class Ended(NamedTuple):
    """The driver said goodbye: outcome is "finished" or "failed"."""

    attempt: int
    outcome: str


class Declared(NamedTuple):
    """The driver declared controls: other scalars of its training that may be steered."""

    attempt: int
    controls: tuple[Control, ...]


class Commanded(NamedTuple):
    """Somebody with the right to it gives the run a command. args: checked, with every default filled in.

    key: what makes a repeated request the same command, or "". until: the first step it does not hold for; expires_at:
    microseconds since 1970 UTC. proposal: the id of the one it comes from, or "".
    """

    kind: str
    args: Mapping[str, Any]
    actor: str
    reason: str
    key: str = ""
    until: int | None = None
    expires_at: int | None = None
    proposal: str = ""


class CommandMoved(NamedTuple):
    """A command went on to another status (see `commands`). step, ranks, of_ranks: where it was applied, and on how
    many of how many ranks; -1 and 0 where that says nothing."""

    command: str
    status: str
    step: int = -1
    ranks: int = 0
    of_ranks: int = 0
    note: str = ""


class Proposed(NamedTuple):
    """Somebody proposes a command. needed: how many must approve."""

    kind: str
    args: Mapping[str, Any]
    actor: str
    reason: str
    needed: int
    key: str = ""
    until: int | None = None
    expires_at: int | None = None


class Judged(NamedTuple):
    """A proposal was approved by one more person, or is over: rejected, expired or withdrawn. needed: how many must
    approve, where that is more than when it was proposed; else 0."""

    proposal: str
    verdict: str
    actor: str
    reason: str
    needed: int = 0


Event = (
    Created | Attached | Observed | Reported | Applied | DirectiveAnswered | Ended
    | Declared | Commanded | CommandMoved | Proposed | Judged
)  # fmt: skip
#: What comes from the run's own job.
OF_JOBS = (Attached, Observed, Applied, DirectiveAnswered, Declared, Ended)
#: What belongs to the run and not to a line of its steps.
ASIDE = (DirectiveAnswered, Declared, Commanded, CommandMoved, Proposed, Judged)


class Mark(NamedTuple):
    """A decision that moved something, or a guard that stepped in: the record people ask for.

    before, after: learning rates per group around it. note: the guard's machine string, or "".
    """

    step: int
    phase: str
    code: str
    note: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    fields: Mapping[str, Any] | None


class Outcome(NamedTuple):
    """What folding an Observed brought: the settings by the step that decided them (the first entry is always
    the batch's first step, so that each journal row can be read alone), and the marks.

    shadows: the same for each shadow of the run, in their order. verdict: what became of a command. asks: what the
    policy asked of the job."""

    changes: tuple[tuple[int, Settings], ...]
    marks: tuple[Mark, ...]
    shadows: tuple[Outcome, ...] = ()
    verdict: Mapping[str, Any] | None = None
    asks: tuple[Ask, ...] = ()
