"""Goal: a group is what its name says, whatever becomes of the optimizer's list of groups.

Method: real optimizers on a real service under a policy that gives every group another factor each step; what each
parameter's group used is looked up by the parameter.
"""

import copy
import logging

import pytest
import torch


def module():
    """Three layers, all with gradients."""
    layers = {name: torch.nn.Linear(2, 2) for name in ("body", "head", "tail")}
    made = torch.nn.ModuleDict(layers)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    return made


def optimizer_of(made, *names, named=True, tensor=False):
    rates = {"body": 0.1, "head": 0.01, "tail": 0.001}
    groups = [
        {"params": list(made[name].parameters()), "lr": torch.tensor(rates[name]) if tensor else rates[name]}
        | ({"name": name} if named else {})
        for name in names
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def used_by(optimizer, made, governor, loss=1.0):
    """One step: the learning rate that each layer's first parameter was stepped with."""
    used = {}

    def look(*_):
        for group in optimizer.param_groups:
            for name, layer in made.items():
                if any(p is layer.weight for p in group["params"]):
                    used[name] = float(group["lr"])

    spy = optimizer.register_step_pre_hook(look)
    optimizer.step()
    spy.remove()
    governor.step(loss)
    return used


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_groups_that_are_reordered_keep_their_settings(steered, scripted, named, tensor):
    made = module()
    optimizer = optimizer_of(made, "body", "head", named=named, tensor=tensor)
    governor = steered(optimizer, policy=scripted(factor=[1.0, 2.0, 3.0, 4.0]))
    used_by(optimizer, made, governor)
    optimizer.param_groups.reverse()
    assert used_by(optimizer, made, governor) == pytest.approx({"body": 0.2, "head": 0.02})
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("name", None)  # as of a script that did not name them
    optimizer.load_state_dict(state)
    optimizer.param_groups.reverse()
    assert used_by(optimizer, made, governor) == pytest.approx({"body": 0.3, "head": 0.03})
    assert governor.status.settings.lr == pytest.approx((0.3, 0.03))


def test_a_group_that_is_dropped_leaves_the_others_their_own_and_is_told_once(steered, scripted, read, caplog):
    made = module()
    optimizer = optimizer_of(made, "body", "head", "tail")
    governor = steered(optimizer, policy=scripted(factor=[1.0, 2.0, 3.0, 4.0, 5.0]))
    used_by(optimizer, made, governor)
    with caplog.at_level(logging.WARNING, "flyball"):
        del optimizer.param_groups[0]
        assert used_by(optimizer, made, governor) == pytest.approx({"head": 0.02, "tail": 0.002})
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
        assert used_by(optimizer, made, governor) == pytest.approx({"head": 0.03, "tail": 0.003})
    assert optimizer.param_groups[2]["lr"] == 0.5 * 1.5 or optimizer.param_groups[2]["lr"] == pytest.approx(1.5)
    assert [record.getMessage() for record in caplog.records] == [
        "flyball: group body is gone from the optimizer: its settings are nobody's",
        "flyball: group group3 was added after attach with the learning rate 0.5: it gets the first group's factor, "
        "3 now, and the run's record does not show it",
    ]
    governor.close()
    assert governor.status.waiting == governor.status.dropped == 0
    found = read(governor.status.run)
    assert [one["group"] for one in found["settings"]] == ["body", "head", "tail"]


def test_a_group_that_is_unfrozen_later_follows_the_first_ones_factor_from_where_it_began(steered, scripted):
    made = module()
    optimizer = optimizer_of(made, "body", "head")
    governor = steered(optimizer, policy=scripted(factor=[1.0, 2.0, 3.0]), lag=0)
    used_by(optimizer, made, governor)
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": list(made["tail"].parameters())})
    optimizer.param_groups[0].update(name="tail", lr=0.001)
    assert used_by(optimizer, made, governor) == pytest.approx({"body": 0.2, "head": 0.02, "tail": 0.002})
    assert used_by(optimizer, made, governor) == pytest.approx({"body": 0.3, "head": 0.03, "tail": 0.003})
    assert governor.status.conflicts == 0


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
@pytest.mark.parametrize("began", [("head",), ("body", "head")])
def test_a_run_goes_on_from_a_checkpoint_with_the_groups_that_were_unfrozen_in_it(steered, scripted, began, mode):
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    def unfrozen(made, optimizer):
        optimizer.add_param_group({"params": list(made["tail"].parameters()), "lr": 0.001})

    made = module()
    optimizer = optimizer_of(made, *began, named=False)
    governor = steered(optimizer, policy=scripted(factor=factors), lag=0, mode=mode)
    used_by(optimizer, made, governor)
    unfrozen(made, optimizer)
    used_by(optimizer, made, governor)
    token, state = governor.state_dict(), copy.deepcopy(optimizer.state_dict())
    used = [used_by(optimizer, made, governor) for _ in range(3)]
    assert [one["tail"] for one in used] == pytest.approx([0.003, 0.004, 0.005])
    governor.close("")

    made = module()
    optimizer = optimizer_of(made, *began, named=False)
    unfrozen(made, optimizer)
    optimizer.load_state_dict(state)
    governor = steered(optimizer, run=governor.status.run, resume=token, policy=None, lag=0, mode=mode)
    assert [used_by(optimizer, made, governor) for _ in range(3)] == used
    governor.close()
    governor = steered(optimizer, mode=mode)
    assert len(governor._session.attach.groups) == len(began) + 1, "a new run has them all"


def test_a_group_of_a_declared_name_that_comes_back_is_that_group(steered, scripted):
    made = module()
    optimizer = optimizer_of(made, "body", "head")
    governor = steered(optimizer, policy=scripted(factor=[1.0, 2.0, 3.0, 4.0]))
    used_by(optimizer, made, governor)
    gone = optimizer.param_groups.pop(1)
    used_by(optimizer, made, governor)
    optimizer.add_param_group({"params": gone["params"], "name": "head", "lr": 7.0})
    assert used_by(optimizer, made, governor) == pytest.approx({"body": 0.3, "head": 0.03})


def test_one_tensor_that_torch_gave_all_groups_is_parted_where_they_come_to_differ(steered, service):
    made = module()
    lr = torch.tensor(0.1, dtype=torch.float64)
    groups = [{"params": made[name].parameters(), "name": name} for name in ("body", "head")]
    optimizer = torch.optim.Adam(groups, lr=lr)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"] is lr
    policy = {"type": "per_group", "policy": {"type": "constant"}, "groups": {"head": {"scale": 0.5}}}
    governor = steered(optimizer, policy=policy)
    assert [used_by(optimizer, made, governor) for _ in range(3)] == [{"body": 0.1, "head": 0.05}] * 3
    assert optimizer.param_groups[0]["lr"] is lr
    assert governor.status.conflicts == 0


def test_groups_of_named_parameters_are_called_after_their_modules(steered):
    made = torch.nn.Sequential()
    for name in ("encoder", "decoder"):
        made.add_module(name, torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)))
    named = [[(n, p) for n, p in made.named_parameters() if n.startswith(one)] for one in ("encoder", "decoder")]
    governor = steered(torch.optim.SGD([{"params": one} for one in named], lr=0.1))
    assert [group.name for group in governor._session.attach.groups] == ["encoder", "decoder"]
    decay = [[(n, p) for n, p in made.named_parameters() if n.endswith(one)] for one in ("weight", "bias")]
    governor = steered(torch.optim.SGD([{"params": one} for one in decay], lr=0.1))
    assert [group.name for group in governor._session.attach.groups] == ["group0", "group1"]


def test_an_engine_that_puts_its_own_parameters_in_every_group_keeps_their_order(steered, scripted):
    """DeepSpeed's ZeRO and FSDP put flat parameters in the place of a module's."""
    made = module()
    optimizer = optimizer_of(made, "body", "head", named=False)
    governor = steered(optimizer, policy=scripted(factor=[1.0, 2.0]))
    used_by(optimizer, made, governor)
    for i, group in enumerate(optimizer.param_groups):
        optimizer.param_groups[i] = {**group, "params": [torch.nn.Parameter(torch.zeros(6))]}
    optimizer.step()
    governor.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.02]
