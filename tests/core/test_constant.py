"""Goal: `constant` moves nothing, whatever is observed, and says so.

Method: whole states and decisions, as literals, over usable, missing and unusable losses.
"""

import math

import pytest

from flyball_server.core.policies import POLICIES
from flyball_server.core.state import dump_state
from flyball_server.core.types import Decision, Group, Observation

CONSTANT = POLICIES["constant"]
GROUPS = (Group("body", 0.5, 0.9), Group("frozen", 0.0))


def test_it_begins_with_the_learning_rates_as_attached():
    state, first = CONSTANT.init(CONSTANT.config(), GROUPS, 3)
    assert dump_state(state) == [[0.5, 0.0]]
    assert first == Decision((0.5, 0.0), None, None, "constant", "initial")
    assert CONSTANT.explain(CONSTANT.config(), first) == "Starting with the learning rates of the optimizer."


@pytest.mark.parametrize(
    ("loss", "code", "sentence"),
    [
        (1.0, "keep", "A constant policy keeps the learning rates."),
        (None, "keep", "A constant policy keeps the learning rates."),
        (1e100, "keep", "A constant policy keeps the learning rates."),
        (math.nan, "nonfinite_hold", "The loss is not a usable number; a constant policy keeps the learning rates."),
        (1e101, "nonfinite_hold", "The loss is not a usable number; a constant policy keeps the learning rates."),
    ],
)
def test_no_observation_moves_anything_and_an_unusable_loss_is_named(loss, code, sentence):
    config = CONSTANT.config()
    state, _ = CONSTANT.init(config, GROUPS, 0)
    after, decision = CONSTANT.step(config, state, Observation(0, loss))
    assert after is state
    assert decision == Decision((0.5, 0.0), None, None, "constant", code)
    assert decision.lr is state.lr
    assert CONSTANT.explain(config, decision) == sentence
