"""Goal: commands bend what leaves the guard and nothing else, and any fold of them can be repeated, cut and stored.

Method: random lives of a run, commands among observations in any batches; compared with the same life without commands,
in other batches, through JSON, and with the bounds of the guard.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.specs import SPECS
from tests.core.test_run import BASES, GROUPS, GUARDS, begun, spec, text

from flyball_server.core import commands
from flyball_server.core import run as fold
from flyball_server.core.errors import Conflict
from flyball_server.core.events import (
    Applied,
    Attached,
    Commanded,
    CommandMoved,
    Declared,
    DirectiveAnswered,
    Observed,
    Receipt,
)
from flyball_server.core.types import Settings
from flyball_server.rules import plan_of, rules_of

POLICIES = [SPECS[name] for name in ("windowed, short", "adaptive, all on", "rules, trend", "aees, contexts")]
NAMES = [group.name for group in GROUPS]
#: What says where a run stands, but for its commands.
BESIDE = ("seq", "steering", "settings", "decided")


def command(kind, until=None, **args):
    return Commanded(kind, args, "ann", "to see", until=until)


def override(value=None, factor=None, setting="lr", groups=(), until=None):
    number = {"value": value} if factor is None else {"factor": factor}
    return command("override", until, setting=setting, groups=list(groups), **number)


def folded(rules, run, events):
    for event in events:
        run, _ = fold.apply(rules, run, event)
    return run


def settings_of(rules, run, events):
    """The settings in force at every step that was observed, by step, and the run at the end."""
    found = {}
    for event in events:
        run, outcome = fold.apply(rules, run, event)
        if isinstance(event, Observed):
            changes = [*outcome.changes, (event.steps[-1] + 1, None)]
            for (decided, now), (following, _) in pairwise(changes):
                found.update(dict.fromkeys(range(decided, following), now))
    return found, run


def observed(steps, losses=None):
    steps = list(steps)
    return Observed(1, steps, {"loss": losses or [2 + math.sin(0.7 * s) + 0.01 * (s % 5) for s in steps]})


numbers = st.floats(0, 10) | st.sampled_from([0.0, 1e-9, 1e9])
lasting = st.one_of(
    st.builds(override, value=numbers, groups=st.lists(st.sampled_from(NAMES), unique=True)),
    st.builds(override, factor=numbers, groups=st.lists(st.sampled_from(NAMES), unique=True)),
    st.just(command("hold")),
)


class Open(str):
    """The id of a command that is not over, with what was asked."""

    event: Commanded


def beside(open_, event, seq):
    """The open commands once `event` is given in row `seq`: those it supersedes are over."""
    known = [
        commands.Command(one, one.event.kind, 0, "", "", "", one.event.args, held=commands.Held()) for one in open_
    ]
    over = commands.superseded(known, event.kind, event.args)
    new = Open(f"c{seq}")
    new.event = event
    return [*(one for one in open_ if one not in over), new]


@st.composite
def lives(draw):
    """Rules, and batches of observations with lasting commands between them; each command may be released later."""
    rules = rules_of(spec(draw(st.sampled_from(POLICIES)), draw(st.sampled_from(BASES)), draw(st.sampled_from(GUARDS))))
    lag = draw(st.sampled_from([None, 0, 2]))
    events, step, seq, open_ = [], 0, 2, []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 12))
        events.append(observed(range(step, step + length)))
        step, seq = step + length, seq + 1
        if open_ and draw(st.booleans()):
            events.append(CommandMoved(open_.pop(draw(st.integers(0, len(open_) - 1))), "released"))
            seq += 1
        elif draw(st.booleans()):
            one = draw(lasting)
            events.append(one._replace(until=draw(st.none() | st.integers(step + 1, step + 20))))
            seq += 1
            open_ = beside(open_, one, seq)
    events += [CommandMoved(one, "released") for one in open_]
    events.append(observed(range(step, step + 5)))
    return rules, lag, events


def attached(rules, lag):
    return fold.apply(rules, fold.create(rules), Attached(1, 0, 0, "s", "c", lag, None))[0]


@settings(max_examples=60, deadline=None)
@given(lives())
def test_commands_leave_policy_and_guard_as_they_would_be_without(life):
    rules, lag, events = life
    start = attached(rules, lag)
    steered = folded(rules, start, events)
    alone = folded(rules, start, [event for event in events if isinstance(event, Observed)])
    assert text(steered, *BESIDE) == text(alone, *BESIDE)
    if not steered.steering.whole:
        assert steered.settings == alone.settings, "once all is released, the policy has the word again"


@settings(max_examples=60, deadline=None)
@given(lives(), st.data())
def test_a_run_with_commands_goes_through_json_and_other_batches_unchanged(life, data):
    rules, lag, events = life
    whole, ended = settings_of(rules, attached(rules, lag), events)
    cut = data.draw(st.integers(0, len(events)))
    before = folded(rules, attached(rules, lag), events[:cut])
    loaded = fold.load(rules, json.loads(json.dumps(fold.dump(before), allow_nan=False)))
    assert text(loaded) == text(before)
    assert text(folded(rules, loaded, events[cut:])) == text(ended)
    single, run = {}, attached(rules, lag)
    for event in events:
        parts = [observed([s]) for s in event.steps] if isinstance(event, Observed) else [event]
        # The commands' ids are their rows' numbers, which count the batches.
        parts = [p._replace(command=run.steering.commands[_place(ended, events, p)].id)
                 if isinstance(p, CommandMoved) else p for p in parts]  # fmt: skip
        found, run = settings_of(rules, run, parts)
        single |= found
    assert single == whole


def _place(ended, events, moved):
    """Where among the open commands the one stands that `moved` ends, whatever it is called."""
    seq, open_ = 2, []
    for event in events:
        if event is moved:
            return open_.index(moved.command)
        seq += 1
        if isinstance(event, CommandMoved):
            open_.remove(event.command)
        elif isinstance(event, Commanded):
            open_ = beside(open_, event, seq)
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(lives())
def test_no_command_crosses_a_bound_of_the_guard(life):
    rules, lag, events = life
    found, _ = settings_of(rules, attached(rules, lag), events)
    limits = rules.limits
    for now in found.values():
        for group, lr in zip(GROUPS, now.lr, strict=True):
            own = limits.groups.get(group.name)
            highs = [limits.max_lr, limits.max_factor and limits.max_factor * group.lr, own and own.max_lr]
            lows = [limits.min_lr, limits.min_factor and limits.min_factor * group.lr, own and own.min_lr]
            assert math.isfinite(lr)
            assert all(lr <= high for high in highs if high is not None)
            assert all(lr >= low for low in lows if low is not None) or group.lr == 0


@pytest.mark.parametrize("lag", [None, 0, 3])
def test_with_a_lag_a_command_shows_with_the_next_observation(lag):
    rules = rules_of(spec())
    run = folded(rules, attached(rules, lag), [observed(range(4))])
    after = folded(rules, run, [override(value=0.5)])
    assert (after.settings.lr[0] == 0.5) == (lag is None)
    following, outcome = fold.apply(rules, after, observed([4]))
    assert outcome.changes[-1][1].lr[0] == 0.5
    assert following.settings.lr[0] == 0.5


@pytest.mark.parametrize("base", BASES[:2])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_take_over_from_every_other_where_it_stands(policy, base):
    for other in POLICIES:
        before = spec(policy, base)
        rules = rules_of(before)
        run = folded(rules, begun(rules), [observed(range(40))])
        plan = {**plan_of(before), "policy": other}
        after, outcome = fold.apply(rules, run, command("switch_policy", plan=plan, words={"before": "", "after": ""}))
        # A bandit pulls an arm at once, a multiplier of where it begins.
        arm = after.settings.lr[0] / run.settings.lr[0]
        assert arm == pytest.approx(1.0, rel=1e-12) or (other["type"] == "aees" and arm in other["lr_candidates"])
        assert ("carried" in outcome.verdict) == (other != policy)
        assert fold.ruling(rules, after).config == rules_of(before._replace(policy=other)).config
        again = fold.load(rules, json.loads(json.dumps(fold.dump(after))))
        more = [observed(range(40, 60))]
        assert text(folded(rules, again, more)) == text(folded(rules, after, more))


def test_going_back_leaves_the_limits_and_the_policy_that_were_commanded_since():
    before = spec(POLICIES[0])
    rules = rules_of(before)
    early = folded(rules, begun(rules), [observed(range(10))])
    plan = {**plan_of(before), "policy": {"type": "constant"}, "guard": {"max_lr": 5e-4}}
    run = folded(
        rules, early, [observed(range(10, 30)), command("switch_policy", plan=plan, words={}), observed(range(30, 33))]
    )
    back, _ = fold.apply(rules, run, Attached(2, 1, 10, "s2", "c", None, json.loads(json.dumps(fold.dump(early)))))
    assert fold.ruling(rules, back).policy.name == "constant"
    assert max(back.settings.lr) <= 5e-4
    assert back.policy_state == folded(rules, early, [command("switch_policy", plan=plan, words={})]).policy_state
    assert back.through == 9


def test_receipts_conflicts_and_controls_are_kept_within_their_numbers():
    rules = rules_of(spec())
    run = begun(rules)
    controls = (commands.Control("kl", 0.1, 0.0, 1.0),)
    run = folded(rules, run, [Declared(1, controls), Declared(1, (controls[0]._replace(max=0.5),))])
    assert run.steering.controls == (commands.Control("kl", 0.1, 0.0, 0.5),)
    for i in range(20):
        receipt = Receipt(i + 1, i, i - 1, Settings((0.1, 0.1, 0.1)), False, f"writer {i}", 1, 7, {"kl": math.nan})
        run = folded(rules, run, [Applied(1, (receipt,))])
    assert [words for words, *_ in run.steering.conflicts] == [f"writer {i}" for i in range(12, 20)]
    assert run.steering.confirmed == 7
    assert text(fold.load(rules, json.loads(json.dumps(fold.dump(run), allow_nan=False)))) == text(run)


def test_what_is_over_cannot_move():
    rules = rules_of(spec())
    run = folded(rules, begun(rules), [command("stop")])
    run = folded(rules, run, [DirectiveAnswered(1, run.steering.commands[0].id, "done", "")])
    assert run.steering.commands == ()
    with pytest.raises(Conflict, match="over already"):
        fold.apply(rules, run, CommandMoved("c3", "expired"))
