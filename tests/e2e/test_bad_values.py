"""Losses that are not finite, not there, or no numbers at all.

Goal: the first call says what is wrong with a type; after that nothing is ever raised, and the journal shows what was
measured. Method: one training per transport that reports every odd value, then REST and the journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

ODD = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
complaints = []
for value in ("0.5", [0.5], torch.ones(2), {}, object(), True):
    try:
        governor.step(value)
    except TypeError as error:
        complaints.append(str(error))
nan, inf = float("nan"), float("inf")
values = [1.0, nan, inf, -inf, 1e300, -1e300, None]
values += [torch.tensor(nan), torch.tensor(inf), torch.tensor([0.25]), lambda: 0.75]
wrong = ["0.5", [0.5], torch.ones(2), {}, object(), True, lambda: 1 / 0, 10**400, 1j]
for value in [*values, *wrong]:
    train(0)
    governor.step(value, reward=value, extra=value)
for i in range(200):
    train(i)
    governor.step(0.5)
say(complaints=complaints, settled=delivered(governor), status=governor.status._asdict())
governor.close()
"""


def test_odd_losses_are_recorded_and_never_raised(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    trainers = {f"odd-{t}": trainer(ODD, run_name=f"odd-{t}", url=calm_server.url(t)) for t in TRANSPORTS}
    for name, one in trainers.items():
        complaints, settled, status = one.hear("complaints", "settled", "status")
        one.finish()
        assert len(complaints) == 6
        for complaint, kind in zip(complaints, ("str", "list", "Tensor", "dict", "object", "bool"), strict=True):
            assert complaint.startswith(f"loss is {kind} ")
            assert "give a float, or a tensor with one element" in complaint
        assert settled
        assert status["dropped"] == 0
        assert status["bad_values"] == 9 * 3
        assert all(math.isfinite(lr) and lr > 0 for lr in status["settings"][0])
        story = story_of(calm_server, name)
        assert story.steps == {1: list(range(220))}
        assert story.problem == ""
        nan, inf = math.nan, math.inf
        recorded = [1.0, nan, inf, -inf, 1e300, -1e300, None, nan, inf, 0.25, 0.75, *[None] * 9]
        for signal in ("loss", "reward", "extra"):
            assert repr(story.signals[1][signal][:20]) == repr(recorded)
        shown = calm_server.get(f"/v1/runs/{name}/series", signals="loss", to=19)["series"]["loss"]
        assert shown["step"] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
        assert shown["value"] == [1.0, "NaN", "Infinity", "-Infinity", 1e300, -1e300, "NaN", "Infinity", 0.25, 0.75]


UNNAMEABLE = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
run(governor, optimizer, train, 0, 300, 0.0003)
train(300)
governor.step(1.0, **{name: 1.0})
run(governor, optimizer, train, 301, 900, 0.0003)
say(settled=delivered(governor, 5), status=governor.status._asdict())
governor.close()
"""


def test_a_signal_the_service_refuses_costs_no_other_step(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    trainers = {
        f"refused-{t}": trainer(UNNAMEABLE, run_name=f"refused-{t}", url=calm_server.url(t), name="no name")
        for t in TRANSPORTS
    }
    for name, one in trainers.items():
        settled, status = one.hear("settled", "status")
        one.finish()
        steps = story_of(calm_server, name).steps[1]
        assert status["state"] == "steering", status["last_error"]
        assert settled
        assert steps[-1] == 899, name
        # What shared its report may be lost, and is counted then (receipts are counted, too); nothing else is.
        assert 900 - len(steps) <= status["dropped"] <= 100, name
