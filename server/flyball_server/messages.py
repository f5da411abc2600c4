"""What the skins and the service say to each other, whatever the wire.

Rule of this module: data only. gRPC and HTTP parse into these values and write from them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flyball_server.core.commands import Control
from flyball_server.core.events import DirectiveAnswered, Receipt
from flyball_server.core.types import Group, Settings


class Fork(NamedTuple):
    """Where a new run leaves an existing one: the run's id, the attempt whose line it is (None: the newest), the new
    run's first step (None: behind the newest), and the checkpoint token's journal row ("": there is no token)."""

    run: str
    attempt: int | None
    step: int | None
    seq: int = 0
    digest: str = ""


class Attach(NamedTuple):
    """A training job asks to be steered. See Attach in steering.proto, whose names these are."""

    project: str
    run: str
    session: str
    labels: Mapping[str, str]
    groups: tuple[Group, ...]
    policy: Mapping[str, Any]
    base: Mapping[str, Any] | None
    guard: Mapping[str, Any]
    mode: str
    seed: int
    lag: int | None
    resume: bool
    from_step: int | None
    from_attempt: int | None
    seq: int
    digest: str
    client: str
    shadows: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    fork: Fork | None = None
    on_unknown: str = "refuse"


class WhatIfRequest(NamedTuple):
    """Which run to fold again, under which policy; base None, guard {} and seed None: the run's own."""

    run: str
    policy: Mapping[str, Any]
    base: Mapping[str, Any] | None
    guard: Mapping[str, Any]
    seed: int | None
    attempt: int | None


class Attached(NamedTuple):
    """The answer: which attempt this is, and the settings to begin with."""

    run: str
    attempt: int
    from_step: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    policy: str
    decided: int
    settings: Settings
    phase: str
    code: str
    reason: str
    reference: tuple[float, ...]
    seed: int
    guard: Mapping[str, Any]
    #: With a lag: what was decided on the line before, for steps whose own decisions lie before the attempt.
    earlier: Sequence[tuple[int, Settings]] = ()
    controls: Mapping[str, float] = MappingProxyType({})
    confirm: int = 0


class Report(NamedTuple):
    """What the driver saw and did since its last report."""

    run: str
    session: str
    attempt: int
    steps: Sequence[int]
    signals: Mapping[str, Sequence[float | None]]
    receipts: tuple[Receipt, ...]
    answers: tuple[DirectiveAnswered, ...]
    end: str
    controls: tuple[Control, ...] = ()


class SideReport(NamedTuple):
    """What a process beside the driver has to say. source, number: the reporter and its count 1, 2, 3 ..., "" and 0
    where it does not count. note: words for the record. key: of a request that may be repeated, or ""."""

    signals: Mapping[str, float]
    source: str = ""
    number: int = 0
    note: str = ""
    key: str = ""


class Directive(NamedTuple):
    """What the service asks of the job besides settings."""

    id: str
    kind: str
    args: Mapping[str, Any]


class Advice(NamedTuple):
    """The answer to a report, sent only once the journal has it: the acknowledgement and the newest settings.

    confirm: a command up to this row awaits its receipt (0: none does). guard: the run's limits, where a command that
    is not confirmed yet changed them. notices: lines for the job's log, until a receipt confirms them.
    """

    attempt: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    changes: Sequence[tuple[int, Settings]]
    phase: str
    code: str
    reason: str
    directives: tuple[Directive, ...] = ()
    confirm: int = 0
    controls: Mapping[str, float] = MappingProxyType({})
    guard: Mapping[str, Any] = MappingProxyType({})
    notices: tuple[str, ...] = ()


class CommandRequest(NamedTuple):
    """What somebody asks of a run. fields: what stands beside the kind (see `command_checks`). expected_seq: the newest
    row the caller knew, None: whatever there is. key: of a request that may be repeated, or "". expires_in_s,
    expires_at: when it ends by itself, in seconds from now or as an ISO 8601 time."""

    run: str
    kind: str
    reason: str
    fields: Mapping[str, Any]
    expected_seq: int | None = None
    key: str = ""
    expires_in_s: float | None = None
    expires_at: str | None = None
