"""Goal: several optimizers are one run, or one each, and every one of them uses what was decided.

Method: real optimizers on a real service in lockstep; what each step used is looked at from outside, in its hook.
"""

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR


def weight(size=2):
    made = torch.nn.Parameter(torch.ones(size, size))
    made.grad = torch.ones(size, size)
    return made


def pair():
    hidden, other = weight(), [weight(), weight()]
    muon = torch.optim.Muon([hidden], lr=0.02)
    adamw = torch.optim.AdamW([{"params": other[:1], "name": "embed"}, {"params": other[1:], "name": "head"}], lr=0.001)
    return muon, adamw


def spied(*optimizers):
    """Each step's learning rates, as (which optimizer, rates)."""
    used = []
    for k, one in enumerate(optimizers):
        one.register_step_pre_hook(lambda it, *_, k=k: used.append((k, tuple(float(g["lr"]) for g in it.param_groups))))
    return used


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_of_the_run_is_a_step_of_the_last_one_listed(steered, scripted, read, by_name):
    muon, adamw = pair()
    given = {"hidden": muon, "rest": adamw} if by_name else [muon, adamw]
    governor = steered(given, policy=scripted(factor=[1.0, 2.0, 3.0]))
    used = spied(muon, adamw)
    for loss in (3.0, 2.0, 1.0):
        muon.step()
        adamw.step()
        governor.step(loss)
    one, two, three = ((0, (0.02 * f,)) for f in (1, 2, 3))
    ones, twos, threes = ((1, (0.001 * f, 0.001 * f)) for f in (1, 2, 3))
    assert used == [one, ones, two, twos, three, threes]
    names = ["hidden/default", "rest/embed", "rest/head"] if by_name else ["muon/default", "adamw/embed", "adamw/head"]
    governor.close()
    found = read(governor.status.run)
    assert [group["group"] for group in found["settings"]] == names
    assert [group["applied_lr"] for group in found["settings"]] == pytest.approx([0.06, 0.003, 0.003])
    assert found["step"] == 2


def test_optimizers_of_one_class_are_numbered(steered):
    governor = steered([torch.optim.SGD([weight()], lr=0.1), torch.optim.SGD([weight()], lr=0.1)])
    assert [group.name for group in governor._session.attach.groups] == ["sgd0/default", "sgd1/default"]


def test_optimizers_by_what_is_no_text_are_named_by_their_place(steered):
    """One per parameter, by the parameter, as they step within the backward pass."""
    governor = steered({p: torch.optim.SGD([p], lr=0.1) for p in (weight(), weight())})
    assert [group.name for group in governor._session.attach.groups] == ["optimizer0/default", "optimizer1/default"]


def test_one_that_steps_more_often_is_steered_each_time_and_one_that_rests_is_told_as_it_stands(
    steered, scripted, read
):
    critic, actor = torch.optim.SGD([weight()], lr=0.1), torch.optim.SGD([weight()], lr=0.01)
    governor = steered({"critic": critic, "actor": actor}, policy=scripted(factor=[1.0, 2.0, 3.0, 4.0]))
    used = spied(critic, actor)
    for critics in (3, 0, 1):
        for _ in range(critics):
            critic.step()
        actor.step()
        governor.step(1.0)
    assert used == [
        *[(0, (0.1,))] * 3, (1, (0.01,)),
        (1, (0.02,)),
        (0, (pytest.approx(0.3),)), (1, (0.03,)),
    ]  # fmt: skip
    governor.close()
    series = read(f"{governor.status.run}/series?signals=lr:critic/default")["series"]["lr:critic/default"]
    assert dict(zip(series["step"], series["value"], strict=True))[1] == 0.2, "it rested, but stands there"
    assert governor.status.conflicts == 0


def test_schedulers_between_the_steps_see_their_own_values_in_multiplier_mode(steered, scripted):
    def build():
        made = pair()
        return made, [ExponentialLR(one, 0.5) for one in made]

    (muon, adamw), schedules = build()
    governor = steered([muon, adamw], policy=scripted(factor=[1.0, 3.0]), mode="multiplier")
    alone, its = build()
    used, wanted = spied(muon, adamw), spied(*alone)
    for step in range(4):
        for one, schedule, twin, twins in zip((muon, adamw), schedules, alone, its, strict=True):
            one.step()
            schedule.step()
            twin.step()
            twins.step()
            assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in twin.param_groups]
            assert used[-1][1] == tuple((1.0, 3.0)[step % 2] * lr for lr in wanted[-1][1])
        governor.step(1.0)
    assert governor.status.conflicts == 0


def test_somebody_who_writes_between_the_two_steps_is_named_with_the_group(steered, read):
    muon, adamw = pair()
    governor = steered([muon, adamw])
    governor_used = spied(muon, adamw)
    muon.register_step_pre_hook(lambda it, *_: it.param_groups[0].update(lr=7.0))
    muon.step()
    adamw.step()
    governor.step(1.0)
    assert governor_used == [(0, (0.02,)), (1, (0.001, 0.001))]
    assert governor.status.conflicts == 1
    governor.close()
    found = read(governor.status.run)
    assert [group["applied_lr"] for group in found["settings"]] == [7.0, 0.001, 0.001]


def test_momentum_and_noise_reach_each_its_own(steered, scripted):
    one, two = torch.optim.SGD([weight()], lr=0.1, momentum=0.9), torch.optim.Adam([weight()], lr=0.1)
    noise = ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
    governor = steered([one, two], policy=scripted(momentum=0.5, noise=noise))
    for step in range(3):
        for optimizer, wanted in zip((one, two), noise[step], strict=True):
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = torch.ones(2, 2)
            optimizer.step()
            assert torch.equal(parameter.grad, torch.ones(2, 2)) == (wanted == 0)
        governor.step(1.0)
    assert one.param_groups[0]["momentum"] == 0.5
    assert two.param_groups[0]["betas"] == (0.5, 0.999)
    first, second = (torch.zeros(2, 2) for _ in range(2))
    for grad in (first, second):  # two steps within one step of the run
        one.param_groups[0]["params"][0].grad = grad
        one.step()
    assert not torch.equal(first, second)


def test_a_generator_and_a_discriminator_may_be_two_runs(steered, scripted):
    generator, discriminator = torch.optim.Adam([weight()], lr=0.1), torch.optim.Adam([weight()], lr=0.2)
    up, down = (steered(one, policy=scripted(factor=[1.0, f])) for one, f in ((generator, 2.0), (discriminator, 0.5)))
    used = spied(generator, discriminator)
    for _ in range(2):
        generator.step()
        up.step(1.0)
        discriminator.step()
        down.step(2.0)
    assert used == [(0, (0.1,)), (1, (0.2,)), (0, (0.2,)), (1, (0.1,))]
    assert up.status.step == down.status.step == 2


def test_a_checkpoint_of_several_goes_back_for_all(steered):
    muon, adamw = pair()
    halving = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}
    governor = steered([muon, adamw], policy=halving)
    used = spied(muon, adamw)

    def train():
        for _ in range(3):
            muon.step()
            adamw.step()
            governor.step(1.0)

    train()
    token = governor.state_dict()
    train()
    first = used[6:]
    governor.load_state_dict(token)
    train()
    assert used[12:] == first


class Wrapper:
    """As accelerate's: the real one is inside, and its groups are shown."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self):
        self.optimizer.step()


def test_a_wrapped_optimizer_is_steered_where_it_really_steps(steered, scripted):
    inner = torch.optim.SGD([weight()], lr=0.1)
    outer = Wrapper(Wrapper(inner))
    governor = steered(outer, policy=scripted(factor=[1.0, 0.5]))
    used = spied(inner)
    for _ in range(2):
        outer.step()
        governor.step(1.0)
    assert used == [(0, (0.1,)), (0, (0.05,))]
    for again in (inner, outer, [torch.optim.SGD([weight()], lr=1.0), Wrapper(inner)]):
        with pytest.raises(ValueError, match="steered by another governor"):
            steered(again)
    governor.close()
    steered(outer)


def test_what_is_no_set_of_optimizers_is_refused_by_name(steered):
    one = torch.optim.SGD([weight()], lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a ExponentialLR"):
        steered(ExponentialLR(one, 0.5))
    with pytest.raises(TypeError, match="optimizer 'b' is a int"):
        steered({"a": one, "b": 1})
    with pytest.raises(ValueError, match="given twice"):
        steered({"a": one, "b": Wrapper(one)})
    with pytest.raises(ValueError, match="optimizer is empty"):
        steered([])
