"""What the skins and the service say to each other, whatever the wire.

Rule of this module: data only. gRPC and HTTP parse into these values and write from them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

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


class Advice(NamedTuple):
    """The answer to a report, sent only once the journal has it: the acknowledgement and the newest settings."""

    attempt: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    changes: Sequence[tuple[int, Settings]]
    phase: str
    code: str
    reason: str
