"""What a request must be: every bad one is refused here, before anything is folded.

Rule of this module: a refusal names the field, the value and the remedy, and nothing has happened yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

from flyball_server import limits
from flyball_server.core.commands import Control
from flyball_server.core.errors import Invalid
from flyball_server.core.events import Receipt, Spec
from flyball_server.core.run import ANSWERS_KEPT, Run
from flyball_server.core.types import Group
from flyball_server.guards import expanded, joined, limits_of
from flyball_server.messages import Attach, Report, SideReport
from flyball_server.names import NAME, check_signal_name, run_id
from flyball_server.policy_files import resolve
from flyball_server.profiles import Profile, use_profile
from flyball_server.projects import NOWHERE, Projects


def check_room(run: Run, signals: Iterable[str], left: int = 0) -> None:
    """A run has at most SIGNALS_MAX signals, however they come; left: those that are kept for somebody else."""
    known, most = run.last.keys() | run.side.keys(), limits.SIGNALS_MAX - left
    if not known >= set(signals) and len(known | set(signals)) > most:
        raise Invalid(f"signals: the run would have more than {most} different ones")


def checked_receipt(receipt: Receipt, groups: Sequence[Group]) -> Receipt:
    """A receipt in the fold's form: no momentum for a group without one, whatever filled its place on the wire."""
    settings = receipt.settings
    for name, row in settings._asdict().items():
        if row is not None and len(row) != len(groups):
            raise Invalid(f"receipts: {name} has {len(row)} values, but the run has {len(groups)} groups")
    if receipt.wanted is not None and len(receipt.wanted) != len(groups):
        raise Invalid(f"receipts: wanted_lr has {len(receipt.wanted)} values, but the run has {len(groups)} groups")
    if settings.momentum is None:
        return receipt
    has = (g.momentum is not None or g.betas is not None for g in groups)
    momentum = tuple(m if h else None for m, h in zip(settings.momentum, has, strict=True))
    return receipt._replace(settings=settings._replace(momentum=momentum))


def spec_from(request: Attach, profiles: Mapping[str, Profile], projects: Projects = NOWHERE) -> Spec:
    """The run's specification as it goes into the journal: checked, with every default filled in, and with a guard as
    strict as project and service want it."""
    project = request.project or "default"
    for field, value in (("project", project), ("run", request.run), ("session", request.session)):
        if len(value) > limits.NAME_MAX or not NAME.fullmatch(value):
            raise Invalid(
                f"{field} is {value!r:.60}: use 1 to {limits.NAME_MAX} letters, digits, '.', '_' or '-', "
                "beginning with a letter or digit"
            )
    if len(request.labels) > limits.LABELS_MAX:
        raise Invalid(f"labels: {len(request.labels)} are too many; at most {limits.LABELS_MAX}")
    for key, text in request.labels.items():
        if not key or len(key) > limits.NAME_MAX or len(text) > limits.NAME_MAX:
            raise Invalid(f"labels: {key!r:.60}={text!r:.60} is empty or longer than {limits.NAME_MAX} characters")
    _check_groups(request.groups)
    _check_sizes(request)
    if request.lag is not None and not 0 <= request.lag <= limits.INTEGER_MAX:
        raise Invalid(f"lag is {request.lag}: give 0 or more optimizer steps, or leave it out")
    check_seed(request.seed)
    policy = dict(request.policy) or {"type": "constant"}
    guard = expanded(request.guard)
    profile = profiles.get(str(policy.get("type")))
    if profile is not None:
        policy, guard = use_profile(profile, policy), joined(profile.guard, guard, profile.name)
    if request.base is not None:
        if policy.get("base") is not None:
            where = "in the policy" if profile is None else f"in the profile {profile.name!r}"
            raise Invalid(f"base is given twice, {where} and beside it: give it once")
        policy["base"] = request.base
    resolved = resolve(policy, profiles).spec()
    base = resolved.pop("base", None)
    seed = request.seed if resolved.get("seed") is None else resolved["seed"]
    check_seed(seed)
    if len(request.shadows) > limits.SHADOWS_MAX:
        raise Invalid(f"shadows: {len(request.shadows)} are too many; at most {limits.SHADOWS_MAX}")
    names = [g.name for g in request.groups]
    unknown = limits_of(guard).groups.keys() - set(names)
    if unknown:
        raise Invalid(f"guard.groups: there is no group {', '.join(sorted(unknown))}; give the optimizer's own names")
    capped = projects.capped(project, guard, names)
    spec = Spec(
        run=run_id(project, request.run),
        project=project,
        name=request.run,
        labels=dict(request.labels),
        groups=request.groups,
        policy=resolved,
        base=base,
        guard=capped,
        mode=request.mode,
        seed=seed,
        profile="" if profile is None else profile.name,
        # In the order in which a stored row gives them back.
        shadows={name: _shadow(name, asked, base, profiles) for name, asked in sorted(request.shadows.items())},
        asked_guard=None if capped == guard else guard,
    )
    _check_text(spec)
    return spec


def alternative(
    asked: Mapping[str, Any], base: Mapping[str, Any] | None, profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    """Another policy for a run on the schedule `base`, on which it stands unless it names a base of its own (or none):
    {"policy", "base"} with every default filled in. Raises Invalid."""
    if not asked:
        raise Invalid("policy is {}: give {'type': NAME, parameters ...}")
    policy = dict(asked)
    profile = profiles.get(str(policy.get("type")))
    if profile is not None:
        policy = use_profile(profile, policy)
    resolved = resolve(policy, profiles).spec()
    own = resolved.pop("base", None)
    return {"policy": resolved, "base": own if own is not None or "base" in policy else base}


def _shadow(
    name: str, asked: Mapping[str, Any], base: Mapping[str, Any] | None, profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    if len(name) > limits.NAME_MAX or not NAME.fullmatch(name):
        raise Invalid(f"shadows: the name {name!r:.60} is no good; use letters, digits, '.', '_' or '-'")
    try:
        return alternative(asked, base, profiles)
    except Invalid as error:
        raise Invalid(f"shadows.{name}: {error}") from error


def check_spec(spec: Spec) -> None:
    """Raise Invalid where a specification cannot be steered: no group, a name twice, two owners of the base."""
    if not spec.groups:
        raise Invalid("groups is empty: an optimizer has at least one parameter group")
    names = [g.name for g in spec.groups]
    for name in names:
        if names.count(name) > 1:
            raise Invalid(f"groups: the name {name!r} stands twice; give each parameter group its own name")
    if spec.mode not in ("absolute", "multiplier"):
        raise Invalid(f"mode is {spec.mode!r}: give 'absolute' or 'multiplier'")
    if spec.mode == "multiplier" and spec.base is not None:
        raise Invalid(
            "base is given in multiplier mode: the in-process scheduler owns the base there; drop base, or use "
            "mode='absolute' and remove the scheduler"
        )


def _check_sizes(request: Attach) -> None:
    """What an attach says becomes a row of its run, and is folded, forked and told again."""
    for field in ("policy", "base", "guard", "shadows"):
        try:
            text = json.dumps(getattr(request, field), default=dict, ensure_ascii=False)
        except RecursionError:
            raise Invalid(f"{field} is nested too deeply") from None
        check_text(field, text)
        if len(text.encode()) > limits.SPEC_BYTES_MAX:
            raise Invalid(f"{field} has {len(text.encode())} bytes as JSON: give at most {limits.SPEC_BYTES_MAX}")


def check_seed(seed: int) -> None:
    """Raise Invalid where a seed does not fit the wire."""
    if abs(seed) > limits.INTEGER_MAX:
        raise Invalid(f"seed is {seed}: give a number between -{limits.INTEGER_MAX} and {limits.INTEGER_MAX}")


def check_resumption(request: Attach) -> None:
    """Whatever can be wrong about going back is refused before a run is begun."""
    if request.on_unknown not in ("refuse", "import"):
        raise Invalid(f"on_unknown is {request.on_unknown!r}: give 'refuse' or 'import'")
    if request.fork is not None and request.resume:
        raise Invalid("fork and resume are both given: a fork begins a new run, resume goes on with an existing one")
    for field in ("from_step", "from_attempt"):
        value = getattr(request, field)
        if value is not None and not request.resume:
            raise Invalid(f"{field} is {value} without resume: say resume to go on with an existing run")
        if value is not None and not 0 <= value <= limits.INTEGER_MAX:
            raise Invalid(f"{field} is {value}: give 0 to {limits.INTEGER_MAX}")
    check_words("client", request.client, limits.NAME_MAX)
    for where, token in (("", request), ("fork.", request.fork)):
        if token is not None:
            check_words(where + "digest", token.digest, limits.NAME_MAX)
            if not 0 <= token.seq <= limits.INTEGER_MAX:
                raise Invalid(f"{where}seq is {token.seq}: give 0 to {limits.INTEGER_MAX}")


def _check_text(spec: Spec) -> None:
    """Text that is no Unicode (half a surrogate pair) could be stored, and never be told to anybody."""
    for field, value in spec._asdict().items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Invalid(f"{field} holds text that is no Unicode: {value!r:.80}") from None


def _check_groups(groups: Sequence[Group]) -> None:
    if len(groups) > limits.GROUPS_MAX:
        raise Invalid(f"groups: {len(groups)} are too many; at most {limits.GROUPS_MAX}")
    for group in groups:
        if not group.name or len(group.name) > limits.NAME_MAX or "," in group.name or not group.name.isprintable():
            raise Invalid(
                f"groups: the name {group.name!r:.60} is no good; give 1 to {limits.NAME_MAX} printable characters "
                "without a comma"
            )
        if not (isfinite(group.lr) and group.lr >= 0):
            raise Invalid(f"groups: {group.name}.lr is {group.lr!r}: give a finite number, 0 or more")
        for name, value in (("momentum", group.momentum), *(("betas", b) for b in group.betas or ())):
            if value is not None and not (isfinite(value) and 0 <= value < 1):
                raise Invalid(f"groups: {group.name}.{name} is {value!r}: give a number in [0, 1)")


def check_same(recorded: Spec, spec: Spec, request: Attach) -> None:
    """A resumed run goes on under its recorded rules; a script that asks for others is told so."""
    names, now = [g.name for g in recorded.groups], [g.name for g in spec.groups]
    if names != now:
        raise Invalid(
            f"groups: the run was begun with {names!s:.200}, this process has {now!s:.200}: they must be the same; "
            "those that were added after attach are known once the optimizer's checkpoint is loaded, so load it first"
        )
    # What the process does not say, it takes from the record; and a profile may have changed since, but not for it.
    same = spec.profile != "" and spec.profile == recorded.profile
    said = ["mode", *(("policy", "base", "seed") if request.policy and not same else ())]
    said += ["guard"] if request.guard and not same else []
    said += ["shadows"] if request.shadows else []
    for field in said:
        old, new = getattr(recorded, field), getattr(spec, field)
        if field == "guard":  # what project and service added, then or now, is not the process's matter
            old, new = (one.guard if one.asked_guard is None else one.asked_guard for one in (recorded, spec))
        if field == "shadows":  # what they stand on is the run's own
            old, new = ({name: one["policy"] for name, one in shadows.items()} for shadows in (old, new))
        if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            raise Invalid(
                f"{field}: {_difference(old, new)}; resume with what is recorded (or say nothing about it), or begin a "
                "run of another name"
            )


def _difference(old: Any, new: Any) -> str:
    """What differs, in words: only the keys that do."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        keys = ["type"] if "type" in keys else keys  # another policy altogether: the rest follows
        return ", ".join(
            f"{key} is recorded as {old.get(key)!r}, this process asks for {new.get(key)!r}" for key in keys
        )
    return f"recorded is {old!r}, this process asks for {new!r}"


#: The least that a receipt's numbers may be.
_LEAST = {"number": -1, "step": -1, "decided": -1, "ranks": 1, "confirms": 0, "of_ranks": 0}


def check_report(request: Report) -> None:
    n = len(request.steps)
    if n > limits.BATCH_MAX:
        raise Invalid(f"step: {n} observations in one report are too many; at most {limits.BATCH_MAX}")
    if len(request.receipts) > limits.RECEIPTS_MAX:
        raise Invalid(f"receipts: {len(request.receipts)} are too many; at most {limits.RECEIPTS_MAX}")
    if any(a.number >= b.number for a, b in pairwise(request.receipts)):
        raise Invalid("receipts: their numbers must rise strictly")
    for receipt in request.receipts:
        for name, least in _LEAST.items():
            value = getattr(receipt, name)
            if not least <= value <= limits.INTEGER_MAX:
                raise Invalid(f"receipts: {name} is {value}; give {max(0, least)} to {limits.INTEGER_MAX}")
        if 0 < receipt.of_ranks < receipt.ranks:
            raise Invalid(
                f"receipts: ranks is {receipt.ranks} of_ranks {receipt.of_ranks}; give no more than there are"
            )
        check_words("receipts: conflict", receipt.conflict, limits.CONFLICT_MAX)
        if len(receipt.controls) > limits.CONTROLS_MAX:
            raise Invalid(f"receipts: {len(receipt.controls)} controls are too many; at most {limits.CONTROLS_MAX}")
        for name in receipt.controls:
            check_signal_name(name)
    check_controls(request.controls)
    for answer in request.answers:
        if answer.outcome not in ("done", "declined"):
            raise Invalid(f"answers: outcome is {answer.outcome!r:.60}: give 'done' or 'declined'")
        check_words("answers: directive", answer.directive, limits.NAME_MAX)
        check_words("answers: note", answer.note, limits.REASON_MAX)
        if not -1 <= answer.step <= limits.INTEGER_MAX:
            raise Invalid(f"answers: step is {answer.step}; give 0 to {limits.INTEGER_MAX}")
    if len(request.answers) > ANSWERS_KEPT:
        raise Invalid(f"answers: {len(request.answers)} are too many; at most {ANSWERS_KEPT}")
    steps = request.steps
    # Consecutive steps are the rule, and comparing whole lists is the cheap way to see it.
    consecutive = not n or steps == list(range(steps[0], steps[0] + n))
    if n and steps[-1] > limits.INTEGER_MAX:
        raise Invalid(f"step: {steps[-1]} is too large; at most {limits.INTEGER_MAX}")
    if n and (steps[0] < 0 or (not consecutive and any(a >= b for a, b in pairwise(steps)))):
        raise Invalid("step: the steps of a report must be 0 or more and rise strictly")
    check_signal_names(request.signals)
    for name, column in request.signals.items():
        if len(column) != n:
            raise Invalid(f"signals: {name} has {len(column)} values for {n} steps")
    if request.end not in ("", "finished", "failed"):
        raise Invalid(f"end is {request.end!r}: give 'finished' or 'failed', or leave it out")


def check_side_report(said: SideReport) -> None:
    """Raise Invalid for a report from beside the driver that says nothing, or cannot be."""
    if not said.signals and not said.note:
        raise Invalid("signals is empty: name at least one, such as val_loss, or give a note")
    check_signal_names(said.signals)
    check_words("note", said.note, limits.REASON_MAX)
    if said.source and (len(said.source) > limits.NAME_MAX or not NAME.fullmatch(said.source)):
        raise Invalid(f"source is {said.source!r:.60}: use letters, digits, '.', '_' or '-'")
    if bool(said.source) != bool(said.number) or not 0 <= said.number <= limits.INTEGER_MAX:
        raise Invalid(f"number is {said.number} and source {said.source!r:.60}: give both, counting from 1, or neither")


def check_words(field: str, text: str, most: int) -> None:
    """`check_text` of a text of at most so many characters."""
    if len(text) > most:
        raise Invalid(f"{field} has {len(text)} characters: give at most {most}")
    check_text(field, text)


def check_text(field: str, text: str) -> None:
    """Half a surrogate pair could be stored, and never be told to anybody: raise Invalid."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise Invalid(f"{field} holds half of a surrogate pair, which is no text: send it as UTF-8")


def check_controls(controls: Sequence[Control]) -> None:
    """Raise Invalid for a control that cannot be."""
    if len(controls) > limits.CONTROLS_MAX:
        raise Invalid(f"controls: {len(controls)} are too many; at most {limits.CONTROLS_MAX}")
    for name, value, low, high in controls:
        check_signal_name(name)
        if name in ("lr", "momentum", "noise_std"):
            raise Invalid(f"controls: {name} is a setting of every run: choose another name")
        if not (isfinite(low) and isfinite(high) and low <= value <= high):
            raise Invalid(
                f"controls: {name} is {value!r} within [{low!r}, {high!r}]: give finite numbers in this order"
            )


def check_signal_names(signals: Mapping[str, Any]) -> None:
    if len(signals) > limits.SIGNALS_MAX:
        raise Invalid(f"signals: {len(signals)} are too many; at most {limits.SIGNALS_MAX}")
    for name in signals:
        check_signal_name(name)
