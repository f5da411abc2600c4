from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientMessage(_message.Message):
    __slots__ = ("attach", "report")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    report: Report
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("attached", "advice")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    advice: Advice
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., advice: _Optional[_Union[Advice, _Mapping]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "lr", "momentum", "betas", "lr_free")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    BETAS_FIELD_NUMBER: _ClassVar[int]
    LR_FREE_FIELD_NUMBER: _ClassVar[int]
    name: str
    lr: float
    momentum: float
    betas: _containers.RepeatedScalarFieldContainer[float]
    lr_free: bool
    def __init__(self, name: _Optional[str] = ..., lr: _Optional[float] = ..., momentum: _Optional[float] = ..., betas: _Optional[_Iterable[float]] = ..., lr_free: bool = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("project", "run", "session", "labels", "groups", "policy_json", "base_json", "guard_json", "mode", "seed", "lag", "resume", "from_step", "digest", "seq", "client", "shadows_json", "fork", "on_unknown", "from_attempt")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    POLICY_JSON_FIELD_NUMBER: _ClassVar[int]
    BASE_JSON_FIELD_NUMBER: _ClassVar[int]
    GUARD_JSON_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_JSON_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    ON_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    FROM_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    project: str
    run: str
    session: str
    labels: _containers.ScalarMap[str, str]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    policy_json: str
    base_json: str
    guard_json: str
    mode: str
    seed: int
    lag: int
    resume: bool
    from_step: int
    digest: str
    seq: int
    client: str
    shadows_json: str
    fork: Fork
    on_unknown: str
    from_attempt: int
    def __init__(self, project: _Optional[str] = ..., run: _Optional[str] = ..., session: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., policy_json: _Optional[str] = ..., base_json: _Optional[str] = ..., guard_json: _Optional[str] = ..., mode: _Optional[str] = ..., seed: _Optional[int] = ..., lag: _Optional[int] = ..., resume: bool = ..., from_step: _Optional[int] = ..., digest: _Optional[str] = ..., seq: _Optional[int] = ..., client: _Optional[str] = ..., shadows_json: _Optional[str] = ..., fork: _Optional[_Union[Fork, _Mapping]] = ..., on_unknown: _Optional[str] = ..., from_attempt: _Optional[int] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("run", "attempt", "step", "seq", "digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    seq: int
    digest: str
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., seq: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("run", "attempt", "from_step", "through", "receipts_through", "seq", "digest", "policy", "changes", "phase", "code", "reason", "reference", "seed", "guard_json", "controls", "confirm")
    class ControlsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FROM_STEP_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_THROUGH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GUARD_JSON_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    from_step: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    policy: str
    changes: Changes
    phase: str
    code: str
    reason: str
    reference: _containers.RepeatedScalarFieldContainer[float]
    seed: int
    guard_json: str
    controls: _containers.ScalarMap[str, float]
    confirm: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., from_step: _Optional[int] = ..., through: _Optional[int] = ..., receipts_through: _Optional[int] = ..., seq: _Optional[int] = ..., digest: _Optional[str] = ..., policy: _Optional[str] = ..., changes: _Optional[_Union[Changes, _Mapping]] = ..., phase: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., reference: _Optional[_Iterable[float]] = ..., seed: _Optional[int] = ..., guard_json: _Optional[str] = ..., controls: _Optional[_Mapping[str, float]] = ..., confirm: _Optional[int] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("name", "value", "min", "max")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    min: float
    max: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "value", "missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: _containers.RepeatedScalarFieldContainer[float]
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Iterable[float]] = ..., missing: _Optional[_Iterable[int]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("run", "session", "attempt", "step", "signals", "receipts", "answers", "end", "controls")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    run: str
    session: str
    attempt: int
    step: _containers.RepeatedScalarFieldContainer[int]
    signals: _containers.RepeatedCompositeFieldContainer[Column]
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    answers: _containers.RepeatedCompositeFieldContainer[DirectiveAnswer]
    end: str
    controls: _containers.RepeatedCompositeFieldContainer[Control]
    def __init__(self, run: _Optional[str] = ..., session: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[_Iterable[int]] = ..., signals: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[DirectiveAnswer, _Mapping]]] = ..., end: _Optional[str] = ..., controls: _Optional[_Iterable[_Union[Control, _Mapping]]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("number", "step", "decided", "lr", "momentum", "noise_std", "late", "conflict", "ranks", "confirms", "controls", "wanted_lr", "of_ranks")
    class ControlsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NOISE_STD_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CONFIRMS_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    WANTED_LR_FIELD_NUMBER: _ClassVar[int]
    OF_RANKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    step: int
    decided: int
    lr: _containers.RepeatedScalarFieldContainer[float]
    momentum: _containers.RepeatedScalarFieldContainer[float]
    noise_std: _containers.RepeatedScalarFieldContainer[float]
    late: bool
    conflict: str
    ranks: int
    confirms: int
    controls: _containers.ScalarMap[str, float]
    wanted_lr: _containers.RepeatedScalarFieldContainer[float]
    of_ranks: int
    def __init__(self, number: _Optional[int] = ..., step: _Optional[int] = ..., decided: _Optional[int] = ..., lr: _Optional[_Iterable[float]] = ..., momentum: _Optional[_Iterable[float]] = ..., noise_std: _Optional[_Iterable[float]] = ..., late: bool = ..., conflict: _Optional[str] = ..., ranks: _Optional[int] = ..., confirms: _Optional[int] = ..., controls: _Optional[_Mapping[str, float]] = ..., wanted_lr: _Optional[_Iterable[float]] = ..., of_ranks: _Optional[int] = ...) -> None: ...

class DirectiveAnswer(_message.Message):
    __slots__ = ("directive", "outcome", "note", "step")
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    directive: str
    outcome: str
    note: str
    step: int
    def __init__(self, directive: _Optional[str] = ..., outcome: _Optional[str] = ..., note: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Changes(_message.Message):
    __slots__ = ("decided", "lr", "momentum", "noise_std")
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NOISE_STD_FIELD_NUMBER: _ClassVar[int]
    decided: _containers.RepeatedScalarFieldContainer[int]
    lr: _containers.RepeatedScalarFieldContainer[float]
    momentum: _containers.RepeatedScalarFieldContainer[float]
    noise_std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, decided: _Optional[_Iterable[int]] = ..., lr: _Optional[_Iterable[float]] = ..., momentum: _Optional[_Iterable[float]] = ..., noise_std: _Optional[_Iterable[float]] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("id", "kind", "args_json")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    args_json: str
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., args_json: _Optional[str] = ...) -> None: ...

class Advice(_message.Message):
    __slots__ = ("attempt", "through", "receipts_through", "seq", "digest", "changes", "phase", "code", "reason", "directives", "confirm", "controls", "guard_json", "notices")
    class ControlsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    THROUGH_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_THROUGH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVES_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    GUARD_JSON_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    through: int
    receipts_through: int
    seq: int
    digest: str
    changes: Changes
    phase: str
    code: str
    reason: str
    directives: _containers.RepeatedCompositeFieldContainer[Directive]
    confirm: int
    controls: _containers.ScalarMap[str, float]
    guard_json: str
    notices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, attempt: _Optional[int] = ..., through: _Optional[int] = ..., receipts_through: _Optional[int] = ..., seq: _Optional[int] = ..., digest: _Optional[str] = ..., changes: _Optional[_Union[Changes, _Mapping]] = ..., phase: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., directives: _Optional[_Iterable[_Union[Directive, _Mapping]]] = ..., confirm: _Optional[int] = ..., controls: _Optional[_Mapping[str, float]] = ..., guard_json: _Optional[str] = ..., notices: _Optional[_Iterable[str]] = ...) -> None: ...

class AddSignalsRequest(_message.Message):
    __slots__ = ("run", "signals", "actor", "source", "number", "note")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    run: str
    signals: _containers.ScalarMap[str, float]
    actor: str
    source: str
    number: int
    note: str
    def __init__(self, run: _Optional[str] = ..., signals: _Optional[_Mapping[str, float]] = ..., actor: _Optional[str] = ..., source: _Optional[str] = ..., number: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class AddSignalsReply(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("project", "status", "policy", "labels", "limit", "cursor")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    project: str
    status: str
    policy: str
    labels: _containers.ScalarMap[str, str]
    limit: int
    cursor: str
    def __init__(self, project: _Optional[str] = ..., status: _Optional[str] = ..., policy: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., limit: _Optional[int] = ..., cursor: _Optional[str] = ...) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs", "cursor")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    cursor: str
    def __init__(self, runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ..., cursor: _Optional[str] = ...) -> None: ...

class GroupSettings(_message.Message):
    __slots__ = ("group", "lr", "momentum", "noise_std")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NOISE_STD_FIELD_NUMBER: _ClassVar[int]
    group: str
    lr: float
    momentum: float
    noise_std: float
    def __init__(self, group: _Optional[str] = ..., lr: _Optional[float] = ..., momentum: _Optional[float] = ..., noise_std: _Optional[float] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "project", "name", "status", "policy", "attempt", "step", "settings", "stale_s", "seq", "labels", "digest")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    STALE_S_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    project: str
    name: str
    status: str
    policy: str
    attempt: int
    step: int
    settings: _containers.RepeatedCompositeFieldContainer[GroupSettings]
    stale_s: float
    seq: int
    labels: _containers.ScalarMap[str, str]
    digest: str
    def __init__(self, run: _Optional[str] = ..., project: _Optional[str] = ..., name: _Optional[str] = ..., status: _Optional[str] = ..., policy: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., settings: _Optional[_Iterable[_Union[GroupSettings, _Mapping]]] = ..., stale_s: _Optional[float] = ..., seq: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ..., digest: _Optional[str] = ...) -> None: ...
