"""The options that every adapter's `attach` takes: a wrong one is refused by name, before anything is sent.

Rule of this module: only what an option may look like is checked here. The service checks the rest.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Required, TypedDict

from flyball.sinks import Sink

#: What an adapter can measure around a step.
SIGNALS = ("grad_norm", "update_norm", "distance", "inner_product")


class Options(TypedDict, total=False):
    """What `attach` takes in every ecosystem; only `run` must be given.

    run: the run's name within `project` (default "default").
    policy: a policy's name, or {"type": NAME, parameters...}; without one a new run keeps its settings, and a
        resumed run goes on under its own policy, base and seed.
    base: a schedule that the policy's factors multiply, {"type": "cosine", "T_max": 1000}.
    guard: limits around the policy to begin with, {"max_lr": 0.1, "max_change": 2}; also enforced here, without the
        service. Operators may widen or tighten them (`bounds`) within what project and service allow.
    labels: words to find the run by.
    server: grpc://host:port or http://host:port; default: FLYBALL_SERVER, then http://127.0.0.1:1788.
    token: the bearer token; default: FLYBALL_TOKEN.
    mode: "absolute" (default) writes values; "multiplier" multiplies what an in-process scheduler set, and restores
        it. It counts a group's "initial_lr" (schedulers set it) as 1, else the learning rate it has.
    seed: the seed of the policy's chance and of gradient noise, where there is any; default 0.
    lag: None (default) applies the newest decision and never waits; k applies that of step t at step t + 1 + k
        exactly, and waits for it if it is not there yet (0: lockstep).
    wait_s: how long one step may wait with lag=k (default 0.05); None: as long as it takes.
    accumulate: where several micro-batches make one optimizer step, each reported by a call of `governor.step`: "mean",
        where each loss is the mean of its micro-batch (the step's is their mean, weighted by `weight`), or "sum", where
        each is divided by their number already. ("mean", N) and ("sum", N) say how many make a step (an epoch's last
        may have fewer), so that those of a step which a GradScaler skips are dropped, and counted. Default None: every
        call is a step, and one without an optimizer step is counted in `status.skipped` and its loss dropped.
    on_outage: while the service is away (from the start, or for more than OUTAGE_AFTER_S in mid-training), "hold"
        (default) the last settings, follow the "base" schedule, or hold and set `governor.should_stop` ("stop").
    resume: True opens a new attempt of an existing run after its newest step, and takes the run over where another
        process drives it; "auto" does so where the service knows the run, and else begins it; a checkpoint token (what
        `state_dict` returned) opens one at the token's step, with the policy's state of that moment. False (default)
        and None begin a new run.
    on_unknown: where the service does not know the run or the token that `resume` names (another store, or an older
        backup): "refuse" (default), or "import": go on from the token's step and record the token.
    fork: begin as a fork of another run: its checkpoint token, or {"run": NAME, "step": STEP}. Without a policy of
        its own the run goes on under the other's, in the state of then.
    shadows: up to three policies by name that decide beside the run's own; recorded, never applied.
    signals: what to measure around each optimizer step, some of "grad_norm", "update_norm", "distance" (from where the
        parameters were at attach) and "inner_product" (of gradient and step); PyTorch only. Default: nothing.
        What `governor.step` is given under the same name wins. See `flyball.adapters.signals` for what they cost.
    signals_every: measure only every so many steps; default 1.
    report_to: where else to show the settings that were applied and what moved them, such as
        [TensorBoardWriter("runs/1")]; see `flyball.sinks.Sink`.
    ranks: who shares the run: "auto" (default): all ranks of torch.distributed, where it is initialized; None: this
        process alone; a torch ProcessGroup: its ranks; `flyball.ranks.Ranks`: how often they exchange, too. All of
        them attach at once.
    start_wait_s: how long to wait here for the service's first answer; default 2.
    close_s: how long `close` may take to deliver the last reports; default 5.
    """

    run: Required[str]
    project: str
    policy: str | Mapping[str, Any] | None
    base: Mapping[str, Any] | None
    guard: Mapping[str, Any] | None
    labels: Mapping[str, str] | None
    server: str | None
    token: str | None
    mode: str
    seed: int
    lag: int | None
    wait_s: float | None
    accumulate: str | tuple[str, int] | None
    on_outage: str
    resume: bool | str | Mapping[str, Any] | None
    on_unknown: str
    fork: Mapping[str, Any] | None
    shadows: Mapping[str, str | Mapping[str, Any]] | None
    signals: Sequence[str]
    signals_every: int
    report_to: Sequence[Sink]
    ranks: Any
    start_wait_s: float
    close_s: float


def checked(options: Mapping[str, Any]) -> Options:
    """The options, complete. Raises TypeError for one that there is not, and ValueError for a wrong value."""
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, 1)
            hint = f"do you mean {near[0]!r}?" if near else f"there are {', '.join(Options.__annotations__)}"
            raise TypeError(f"attach has no option {name!r}: {hint}")
    if "run" not in options:
        raise TypeError("attach needs run=..., the run's name")
    whole = Options(
        run=options["run"],
        project=options.get("project", "default"),
        policy=options.get("policy"),
        base=options.get("base"),
        guard=options.get("guard"),
        labels=options.get("labels"),
        server=options.get("server"),
        token=options.get("token"),
        mode=options.get("mode", "absolute"),
        seed=options.get("seed", 0),
        lag=options.get("lag"),
        wait_s=options.get("wait_s", 0.05),
        accumulate=options.get("accumulate"),
        on_outage=options.get("on_outage", "hold"),
        resume=options.get("resume") or False,
        on_unknown=options.get("on_unknown", "refuse"),
        fork=options.get("fork"),
        shadows=options.get("shadows"),
        signals=options.get("signals", ()),
        signals_every=options.get("signals_every", 1),
        report_to=options.get("report_to", ()),
        ranks=options.get("ranks", "auto"),
        start_wait_s=options.get("start_wait_s", 2.0),
        close_s=options.get("close_s", 5.0),
    )
    _check(whole)
    return whole


def measured(options: Options) -> tuple[tuple[str, ...], int, Options]:
    """Which signals to measure and every how many steps, and the other options: for an adapter that measures them.

    Raises ValueError for a signal that there is not.
    """
    names, every = options.get("signals", ()), options.get("signals_every", 1)
    if isinstance(names, str) or not isinstance(names, Sequence) or not set(names) <= set(SIGNALS):
        raise ValueError(f"signals is {names!r:.80}: give some of {SIGNALS!r}")
    check("signals_every", every, int, wanted="a number of optimizer steps, 1 or more")
    if every < 1:
        raise ValueError(f"signals_every is {every}: give a number of optimizer steps, 1 or more")
    rest = options.copy()
    rest.pop("signals", None)
    rest.pop("signals_every", None)
    return tuple(dict.fromkeys(names)), every, rest


def _check(one: Options) -> None:
    check_seconds("wait_s", one["wait_s"], or_none=True)
    check_seconds("close_s", one["close_s"])
    check_choice("on_outage", one["on_outage"], "hold", "base", "stop")
    _check_accumulate(one["accumulate"])
    check_choice("mode", one["mode"], "absolute", "multiplier")
    check_choice("on_unknown", one["on_unknown"], "refuse", "import")
    check("run", one["run"], str, wanted="the run's name")
    check("project", one["project"], str, wanted="the project's name")
    check("seed", one["seed"], int, wanted="an integer")
    check("server", one["server"], str, type(None), wanted="its address, such as http://127.0.0.1:1788")
    if not isinstance(one["token"], str | None):  # whatever it is, it may be one, so it is not shown
        raise ValueError(f"token is a {type(one['token']).__name__}: give the bearer token as text")
    if one["resume"] != "auto":
        check("resume", one["resume"], bool, Mapping, wanted="True, False, 'auto' or what state_dict() returned")
    lag = one["lag"]
    check("lag", lag, int, type(None), wanted="a number of optimizer steps, 0 or more, or None")
    if lag is not None and lag < 0:
        raise ValueError(f"lag is {lag}: give a number of optimizer steps, 0 or more, or None")
    check_mapping("policy", one["policy"], "a policy's name, or {'type': NAME, parameters ...}", or_text=True)
    check_mapping("base", one["base"], "{'type': NAME, parameters ...}")
    check_mapping("guard", one["guard"], "limits, such as {'max_lr': 0.1}")
    check_mapping("labels", one["labels"], "text by name, such as {'team': 'vision'}")
    check_mapping("shadows", one["shadows"], "policies by name, such as {'bold': {'type': 'windowed'}}")
    _check_sinks(one["report_to"])
    if isinstance(one["ranks"], str):
        check_choice("ranks", one["ranks"], "auto")
    if one["fork"] is not None and one["resume"]:
        raise ValueError("fork and resume are both given: a fork begins a new run, resume goes on with an existing one")
    check_seconds("start_wait_s", one["start_wait_s"])
    if one["signals"]:
        raise ValueError(
            f"signals is {one['signals']!r:.80}, but only a PyTorch optimizer's are measured: give governor.step what "
            "you measure yourself, governor.step(loss, grad_norm=...)"
        )


def _check_accumulate(value: Any) -> None:
    if not isinstance(value, tuple | list):
        return check_choice("accumulate", value, None, "mean", "sum")
    how, each = value if len(value) == 2 else (None, None)
    if how not in ("mean", "sum") or isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise ValueError(f"accumulate is {value!r:.80}: give ('mean', N) or ('sum', N), N micro-batches make one step")


def _check_sinks(sinks: Any) -> None:
    check("report_to", sinks, Sequence, wanted="a list of writers, such as [TensorBoardWriter('runs/1')]")
    for sink in sinks:
        if not all(callable(getattr(sink, name, None)) for name in ("settings", "marker", "close")):
            raise ValueError(
                f"report_to holds {sink!r:.80}: give objects with settings, marker and close (see flyball.sinks.Sink)"
            )


def check(name: str, value: Any, *kinds: type, wanted: str) -> None:
    """Raise ValueError where `value` is of none of the kinds. True and False are no numbers here."""
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r:.80}: give {wanted}")


def check_mapping(name: str, value: Any, wanted: str, *, or_text: bool = False) -> None:
    """Raise ValueError where `value` is neither None nor a mapping (or text) that JSON can carry."""
    if value is None or (or_text and isinstance(value, str)):
        return
    check(name, value, Mapping, wanted=wanted)
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {value!r:.80}, which is no plain JSON ({error}): give {wanted}") from error


def check_seconds(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise ValueError where `value` is no time."""
    if value is None and or_none:
        return
    wanted = "seconds, 0 or more" + (", or None" if or_none else "")
    check(name, value, int, float, wanted=wanted)
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value!r}: give {wanted}")


def check_choice(name: str, value: Any, *choices: str | None) -> None:
    """Raise ValueError where `value` is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.80}: give one of {', '.join(repr(choice) for choice in choices)}")
