"""Goal: micro-batches make one step, whose loss is what the whole batch's would have been.

Method: real torch loops on a real service, read back from its journal; and the sum itself with values that arrive in
any order.
"""

import math
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyball import limits
from flyball.accumulation import Total


def sgd():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return torch.optim.SGD([weight], lr=0.1)


def told(read, governor, name="loss"):
    governor.close()
    return read(f"{governor.status.run}/series?signals={name}")["series"][name]


def test_the_loss_of_a_step_is_the_weighted_mean_of_its_micro_batches(steered, read):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="mean")
    for losses, weights in (((1.0, 4.0), (3.0, 1.0)), ((2.0, torch.tensor(6.0)), (1, torch.tensor(3)))):
        governor.step(losses[0], weights[0], reward=1.0)
        optimizer.step()
        governor.step(losses[1], weights[1], reward=5.0)
    governor.step(7.0)  # of a step that is never made
    assert governor.status.step == 2
    assert governor.status.skipped == 0
    assert told(read, governor) == {"step": [0, 1], "value": [1.75, 5.0]}
    assert told(read, governor, "reward")["value"] == [2.0, 4.0]


def test_losses_that_are_divided_already_are_added(steered, read):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="sum")
    for step in range(3):
        for micro in range(4):
            if micro == 3:
                optimizer.step()
            governor.step(torch.tensor(step / 4), 17.0)
    assert told(read, governor)["value"] == [0.0, 1.0, 2.0]


def test_one_bad_micro_batch_is_not_hidden_by_the_others_and_not_handed_on(steered, read):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="mean")
    for losses in ((1.0, nan), (inf, 1.0), (inf, -inf), (1.0, 2.0), (None, 3.0), (None, None)):
        governor.step(losses[0])
        optimizer.step()
        governor.step(losses[1])
    found = told(read, governor)
    assert found == {"step": [0, 1, 2, 3, 4], "value": ["NaN", "Infinity", "NaN", 1.5, 3.0]}


def test_a_micro_batch_without_tokens_has_no_say(steered, read):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="mean")
    governor.step(nan, 0)
    optimizer.step()
    governor.step(2.0, 8)
    assert told(read, governor)["value"] == [2.0]


@pytest.mark.parametrize("knows", [False, True])
def test_micro_batches_of_a_step_that_a_grad_scaler_skips_count_to_the_next_unless_skip_is_called(steered, read, knows):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="mean")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for cycle in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            loss = (optimizer.param_groups[0]["params"][0] * (inf if cycle == 1 else 1.0)).sum()
            scaler.scale(loss).backward()
            if micro == 1:
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
            governor.step(float(cycle))
        if knows and scaler.get_scale() < scale:
            governor.skip()
    assert governor.status.step == 2
    assert governor.status.skipped == knows
    assert told(read, governor)["value"] == [0.0, 2.0 if knows else 1.5]


def test_going_back_to_a_checkpoint_forgets_a_half_done_step(steered, read):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="mean")
    optimizer.step()
    governor.step(1.0)
    token = governor.state_dict()
    governor.step(100.0)
    governor.load_state_dict(token)
    optimizer.step()
    governor.step(3.0)
    assert told(read, governor)["value"] == [1.0, 3.0]


def test_a_way_to_accumulate_that_there_is_not_is_refused(steered):
    with pytest.raises(ValueError, match=r"accumulate is 'average': give one of None, 'mean', 'sum'"):
        steered(sgd(), accumulate="average")


class Late:
    """A value that arrives when it is told to."""

    def __init__(self, number):
        self.number, self.here = number, False

    def ready(self):
        return self.here

    def value(self):
        assert self.here, "asked for before it was there"
        return self.number


numbers = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(numbers, st.floats(0.1, 100), st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from(["mean", "sum"]),
)
def test_the_total_is_the_same_to_the_bit_however_late_each_value_arrives(micros, random, how):
    at_once, total, late = Total(how), Total(how), []
    for value, weight, value_late, weight_late in micros:
        at_once.add(value, weight)
        pair = [Late(one) if is_late else one for one, is_late in ((value, value_late), (weight, weight_late))]
        late += [one for one in pair if isinstance(one, Late)]
        total.add(*pair)
        if late and random.random() < 0.5:
            random.choice(late).here = True
    wanted, found = at_once.close(), total.close()
    total.add(1e9, 1.0)  # the next step's
    if isinstance(found, Total):
        for one in late:
            assert found.ready() == all(other.here for other in late)
            one.here = True
        assert found.ready()
        found = found.value()
    assert found == wanted
    if how == "mean":
        by_hand = math.fsum(v * w for v, w, _, _ in micros) / math.fsum(w for _, w, _, _ in micros)
        assert found == pytest.approx(by_hand, abs=1e-6)


def test_a_step_that_never_comes_needs_no_memory_without_end():
    total = Total("mean")
    for _ in range(limits.MICRO_PENDING_MAX + 10):
        total.add(Late(1.0), 1.0)
    assert len(total._waiting) == limits.MICRO_PENDING_MAX
    for one, _ in total._waiting:
        one.here = True
    assert math.isnan(total.close()), "not all of it is known"


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_where_the_number_of_micro_batches_is_known_those_of_a_skipped_step_are_dropped_and_counted(steered, read, how):
    optimizer = sgd()
    governor = steered(optimizer, accumulate=(how, 4))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    micros = [(cycle, 4) for cycle in range(6)] + [(6, 2)]  # the epoch's last step has fewer
    for cycle, count in micros:
        optimizer.zero_grad()
        for micro in range(count):
            loss = (optimizer.param_groups[0]["params"][0] * (inf if cycle in (2, 3) else 1.0)).sum()
            scaler.scale(loss).backward()
            if micro == count - 1:
                scaler.step(optimizer)
                scaler.update()
            governor.step(float(cycle) / (4 if how == "sum" else 1))
    assert (governor.status.step, governor.status.skipped) == (5, 2)
    assert told(read, governor)["value"] == [0.0, 1.0, 4.0, 5.0, 6.0 if how == "mean" else 3.0]


def test_a_sum_over_a_skipped_step_is_told_once(steered, caplog):
    optimizer = sgd()
    governor = steered(optimizer, accumulate="sum")
    for count in (4, 4, 8, 4, 8):
        for micro in range(count):
            if micro == count - 1:
                optimizer.step()
            governor.step(1.0)
    assert caplog.text.count("accumulate=('sum', 4)") == 1


@pytest.mark.parametrize("micros", [2, 4])
def test_micro_batches_that_nobody_declared_are_told_once(steered, caplog, micros):
    optimizer = sgd()
    governor = steered(optimizer)
    for call in range(60):
        if call % micros == micros - 1:
            optimizer.step()
        governor.step(1.0)
    lines = [line for line in caplog.messages if "came without an optimizer step" in line]
    assert len(lines) == 1
    assert "attach with accumulate='mean' or 'sum'" in lines[0]
    assert governor.status.last_error == ""


def test_an_optimizer_whose_step_is_never_called_is_told_once(steered, caplog):
    governor = steered(sgd())
    for _ in range(40):
        governor.step(1.0)
    assert caplog.text.count("no optimizer step seen in 16 calls of governor.step") == 1


def test_steps_that_a_grad_scaler_skips_while_it_starts_are_no_news(steered, caplog):
    optimizer = sgd()
    governor = steered(optimizer)
    for call in range(200):
        if not (call < 7 or call % 50 == 0):
            optimizer.step()
        governor.step(1.0)
    assert governor.status.skipped == 10
    assert caplog.text == ""


@pytest.mark.parametrize("wrong", [("sum", 0), ("sum", True), ("average", 4), ("sum",), ("sum", 4.0)])
def test_a_number_of_micro_batches_that_makes_no_sense_is_refused(steered, wrong):
    with pytest.raises(ValueError, match=r"give \('mean', N\) or \('sum', N\)"):
        steered(sgd(), accumulate=wrong)
