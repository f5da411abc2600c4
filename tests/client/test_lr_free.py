"""Goal: an optimizer that finds its own step size is known as one: its lr multiplies, and what comes of it is told.

Method: the real libraries on a real service, whose journal says what was reported; people's commands over REST.
"""

import dadaptation
import prodigyopt
import pytest
import schedulefree
import torch

from flyball.api import Client
from flyball.errors import Refused

MADE = {
    "prodigy": lambda groups: prodigyopt.Prodigy(groups, lr=1.0),
    "d-adaptation": lambda groups: dadaptation.DAdaptAdam(groups, lr=1.0),
    "d-adaptation, sgd": lambda groups: dadaptation.DAdaptSGD(groups, lr=1.0),
    "schedule-free": lambda groups: schedulefree.AdamWScheduleFree(groups, lr=0.1, warmup_steps=4),
    "schedule-free, sgd": lambda groups: schedulefree.SGDScheduleFree(groups, lr=0.1, warmup_steps=4),
    "schedule-free, wrapped": lambda groups: schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(groups, lr=0.1), momentum=0.9
    ),
}


def weights(n=1):
    return [torch.nn.Parameter(torch.full((4,), 2.0)) for _ in range(n)]


def train(optimizer, governor, steps):
    """How much lr was used at each step, and what the optimizer made of it."""
    made = []
    getattr(optimizer, "train", lambda: None)()
    for _ in range(steps):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = (weight - 1).detach()
        group = optimizer.param_groups[0]
        optimizer.step()
        made.append((group["lr"], group.get("scheduled_lr", group.get("d", 1.0) * group["lr"])))
        governor.step(1.0)
    return made


def test_a_schedule_free_optimizer_that_wants_a_closure_is_lr_free_as_well(steered, scripted, read):
    (weight,) = weights()
    optimizer = schedulefree.AdamWScheduleFreeClosure([weight], lr=0.1)
    governor = steered(optimizer, policy=scripted(factor=[1.0, 0.5]))
    assert governor._session.attach.groups[0].lr_free

    def closure():
        weight.grad = (weight - 1).detach()
        return 1.0

    for _ in range(4):
        governor.step(optimizer.step(closure))
    governor.close()
    found = read(f"{governor.status.run}/series?signals=effective_lr")["series"]["effective_lr"]
    assert found["value"] == [0.1, 0.05, 0.1, 0.05]


@pytest.mark.parametrize("kind", MADE)
def test_the_lr_of_an_lr_free_optimizer_multiplies_and_its_effective_lr_is_told(steered, scripted, read, kind):
    (weight,) = weights()
    optimizer = MADE[kind]([weight])
    first = optimizer.param_groups[0]["lr"]
    governor = steered(optimizer, policy=scripted(factor=[1.0, 0.5]))
    assert governor._session.attach.groups[0].lr_free
    made = train(optimizer, governor, 6)
    assert [lr for lr, _ in made] == [first, first / 2] * 3
    governor.close()
    found = read(f"{governor.status.run}/series?signals=effective_lr")["series"]["effective_lr"]
    assert found["value"] == pytest.approx([float(effective) for _, effective in made])
    assert len(set(found["value"])) > 1


def test_several_groups_and_optimizers_are_told_apart(steered, read):
    groups = [{"params": weights(), "name": name} for name in ("body of it", "head")]
    free, bound = prodigyopt.Prodigy(groups, lr=1.0), torch.optim.SGD(weights(), lr=0.1)
    governor = steered({"free": free, "bound": bound})
    for _ in range(2):
        for one in (free, bound):
            for group in one.param_groups:
                group["params"][0].grad = torch.ones(4)
            one.step()
        governor.step(1.0, mine=3.0)
    governor.close()
    names = "effective_lr/free/body_of_it,effective_lr/free/head,effective_lr/bound/default,mine"
    found = read(f"{governor.status.run}/series?signals={names}")["series"]
    assert [len(found[name]["value"]) for name in names.split(",")] == [2, 2, 0, 2]


def test_people_give_it_factors_and_a_value_only_by_force(steered, service):
    free, bound = prodigyopt.Prodigy(weights(), lr=1.0), torch.optim.SGD(weights(), lr=0.1)
    governor = steered({"free": free, "bound": bound}, policy="constant", lag=None)
    with Client(service.http) as client:
        wanted = r"value is 0\.001, but group free/default finds its own step size, and its lr \(1 at attach\)"
        for groups in (None, ["free/default"], ["bound/default", "free/default"]):
            with pytest.raises(Refused, match=wanted + r".*give a factor, or force: true"):
                client.override(governor.status.run, value=0.001, groups=groups, reason="as for Adam")
        for said in ({"factor": 0.5}, {"value": 0.01, "groups": "bound/default"}, {"value": 0.001, "force": True}):
            view = client.override(governor.status.run, reason="meant", **said)
            assert view["status"] in ("accepted", "clamped")
        assert view["args"]["force"] is True, "it is on record"
