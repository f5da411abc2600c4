"""Goal: whoever else writes into the optimizer is named, once, and neither wins nor goes unnoticed.

Method: real optimizers and torch's own schedulers on a real service in lockstep; what a step used is read during the
step, what is told is read from the journal's receipts and the training log.
"""

import gc
import logging
from itertools import count

import pytest
import torch

import flyball
import flyball_server
from flyball import wire
from flyball.adapters.torch_groups import Groups

names = count()
S = torch.optim.lr_scheduler


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def steer(service):
    opened = []

    def attach(optimizer, **options):
        defaults = {"run": f"w{next(names)}", "lag": 0, "wait_s": 10.0, "server": service.grpc, "policy": "constant"}
        opened.append(flyball.attach(optimizer, **(defaults | options)))
        return opened[-1]

    yield attach
    for governor in opened:
        governor.close("")


def optimizer_of(kind=torch.optim.SGD, groups=1, **options):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    for p in parameters:
        p.grad = torch.ones(1)
    return kind([{"params": [p]} for p in parameters], **({"lr": 0.1} | options))


def train(optimizer, governor, n=1, after=lambda: None):
    """The learning rates that n steps used."""
    used = []
    spy = optimizer.register_step_post_hook(lambda *_: used.append(float(optimizer.param_groups[0]["lr"])))
    for _ in range(n):
        optimizer.step()
        governor.step(1.0)
        after()
    spy.remove()
    return used


def receipts_of(governor):
    """Every receipt from here on."""
    told, receipt = [], governor._session.receipt
    governor._session.receipt = lambda *args, **more: (told.append((*args, more)), receipt(*args, **more))
    return told


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "flyball" and r.levelno >= logging.WARNING]


LEFT_RUNNING = {
    "StepLR": lambda o: S.StepLR(o, 2, gamma=0.3),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 17),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.3, total_steps=100),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1), S.ExponentialLR(o, 0.9)], [4]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1), S.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("kind", LEFT_RUNNING)
def test_a_scheduler_left_running_is_named_once_within_ten_steps_and_loses(steer, caplog, kind, tensor):
    optimizer = optimizer_of(groups=2, momentum=0.9, lr=torch.tensor(0.1) if tensor else 0.1)
    schedule = LEFT_RUNNING[kind](optimizer)
    begun = float(optimizer.param_groups[0]["lr"])
    governor = steer(optimizer)
    told = receipts_of(governor)
    used = train(optimizer, governor, 10, lambda: schedule.step(*([1.0] if kind == "ReduceLROnPlateau" else [])))
    assert used == [begun] * 10, "the late write wins"
    (warning,) = warnings_of(caplog)
    assert f"{kind} writes the learning rate of group group0 and 1 more before the step" in warning
    assert f"{begun:.9g}"[:8] in warning
    assert [r[4] for r in told if r[4]] == [warning.removeprefix("flyball: ")], "one receipt says so"
    assert governor.status.conflicts > 0


@pytest.mark.parametrize("kind", ["before its first change", "in its first steps"])
def test_a_scheduler_that_has_not_come_to_its_first_change_is_named_as_well(steer, caplog, kind):
    optimizer = optimizer_of()
    schedule = S.StepLR(optimizer, 30) if kind == "before its first change" else None
    governor = steer(optimizer)
    told = receipts_of(governor)
    train(optimizer, governor, 12, schedule.step if schedule else lambda: None)
    assert [("StepLR runs beside" in r[4]) for r in told if r[4]] == ([True] if schedule else [])
    assert [("StepLR is attached" in one) for one in warnings_of(caplog)] == ([True, False] if schedule else [])


@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_a_scheduler_that_stands_still_is_nobodys_conflict_and_is_told_in_a_line(steer, caplog, mode):
    """As one that steps once an epoch does, for thousands of steps."""
    optimizer = optimizer_of(groups=2)
    schedule = S.StepLR(optimizer, 1)
    governor = steer(optimizer, mode=mode)
    train(optimizer, governor, 12)
    assert (governor.status.conflicts, schedule.last_epoch) == (0, 0)
    line = (
        "flyball: StepLR is attached to the optimizer: what it writes as the learning rate is replaced before each "
        'step. The service\'s settings count from 0.1 (first group); mode="multiplier" keeps StepLR in charge'
    )
    assert warnings_of(caplog) == ([line] if mode == "absolute" else [])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("options", [{}, {"policy": None}, {"mode": "multiplier"}])
def test_a_warm_up_that_begins_at_zero_freezes_nothing(steer, caplog, options, tensor):
    optimizer = optimizer_of(groups=2, lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1)
    schedule = S.LambdaLR(optimizer, lambda t: min(1.0, t / 4))
    assert float(optimizer.param_groups[0]["lr"]) == 0.0
    governor = steer(optimizer, **options)
    assert [group.lr for group in governor._session.attach.groups] == [0.1, 0.1]
    multiplied = options.get("mode") == "multiplier"
    wanted = [0.0, 0.025, 0.05] if multiplied else [0.1] * 3
    assert train(optimizer, governor, 3, schedule.step) == pytest.approx(wanted)
    assert not any("nothing will train" in one for one in warnings_of(caplog))


def test_a_learning_rate_of_zero_in_all_groups_is_told_at_attach(steer, caplog):
    steer(optimizer_of(groups=2, lr=0.0))
    assert ["nothing will train" in one for one in warnings_of(caplog)] == [True]
    frozen = optimizer_of(groups=2)
    frozen.param_groups[1]["lr"] = 0.0
    assert train(frozen, steer(frozen), 2) == [0.1, 0.1]
    assert frozen.param_groups[1]["lr"] == 0.0
    assert len(warnings_of(caplog)) == 1


def test_a_hand_written_loop_is_told_by_what_it_wrote(steer, caplog):
    optimizer = optimizer_of(groups=2)
    governor = steer(optimizer)

    def by_hand():
        optimizer.param_groups[1]["lr"] *= 0.9

    assert train(optimizer, governor, 10, by_hand) == [0.1] * 10
    (warning,) = warnings_of(caplog)
    assert "somebody else writes the learning rate of group group1 before the step: 0.09 was found" in warning
    assert governor.status.conflicts == 9


class Trainer:
    """What a training script may have: it holds the optimizer, and sets learning rates itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (2 + epoch)


class SlottedWarmup:
    __slots__ = ("optimizer",)


class NoamWarmup:
    """A scheduler that torch knows nothing of."""

    def __init__(self, optimizer):
        self.held, self.t = optimizer, 1

    def get_lr(self):
        return 0.1 / self.t

    def step(self):
        self.t += 1
        self.held.param_groups[0]["lr"] = self.get_lr()


class ScaledOptimizer:
    """An optimizer around an optimizer, as Accelerate and Lightning have them."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self):
        self.param_groups[0]["lr"] = 0.7
        self.inner.step()


class Engine(ScaledOptimizer):
    """It makes the gradients, too, so it may well set learning rates."""

    def backward(self, loss):
        """Not called here."""


def test_who_cannot_be_proven_to_have_written_is_named_as_a_guess(steer, caplog):
    optimizer = optimizer_of()
    other = SlottedWarmup()
    other.optimizer = optimizer
    trainer, governor = Trainer(optimizer), steer(optimizer)
    train(optimizer, governor, 3, lambda: trainer.step(0))
    assert "somebody else (perhaps Trainer)" in warnings_of(caplog)[0]
    noam = NoamWarmup(optimizer)
    train(optimizer, governor, 8, noam.step)
    assert "somebody else (perhaps NoamWarmup)" in warnings_of(caplog)[1], "who comes later is found later"
    wrapped = optimizer_of()
    outer, governor = ScaledOptimizer(wrapped), steer(wrapped)
    for _ in range(3):
        outer.step()
        governor.step(1.0)
    assert "somebody else writes" in warnings_of(caplog)[2], "a wrapper is around every optimizer of its library"
    engine = Engine(optimizer_of())
    governor = steer(engine.inner)
    for _ in range(3):
        engine.step()
        governor.step(1.0)
    assert "somebody else (perhaps Engine)" in warnings_of(caplog)[3]
    assert len(warnings_of(caplog)) == 4


def test_a_scheduler_is_not_said_to_be_replaced_where_the_service_was_never_heard(steer, caplog):
    optimizer = optimizer_of()
    schedule = S.StepLR(optimizer, 1, gamma=0.5)
    governor = steer(optimizer, server="http://127.0.0.1:9", lag=None, start_wait_s=0.0)
    assert train(optimizer, governor, 12, schedule.step)[-1] < 0.001, "nothing replaces what it writes"
    first, warning = [one for one in warnings_of(caplog) if "StepLR" in one]
    fate = "what it writes as the learning rate holds until the service's settings come, and not after"
    assert warning.endswith(fate)
    assert fate in first


def test_a_scheduler_beside_a_trainer_is_proven_by_what_it_wrote(steer, caplog):
    optimizer = optimizer_of()
    schedule, trainer = S.ExponentialLR(optimizer, 0.9), Trainer(optimizer)
    governor = steer(optimizer)
    train(optimizer, governor, 3, schedule.step)
    train(optimizer, governor, 3, lambda: trainer.step(5))
    first, second = warnings_of(caplog)
    assert first.startswith("flyball: ExponentialLR writes")
    assert second.startswith("flyball: somebody else (perhaps Trainer) writes")


def test_a_checkpoint_with_other_values_is_named_and_does_not_win(steer, caplog):
    optimizer = optimizer_of(momentum=0.9)
    governor = steer(optimizer)
    train(optimizer, governor, 2)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.025
    optimizer.load_state_dict(state)
    assert train(optimizer, governor, 2) == [0.1, 0.1]
    (warning,) = warnings_of(caplog)
    assert "optimizer.load_state_dict (a checkpoint) writes the learning rate of group default" in warning
    assert "0.025 was found where 0.1 stood" in warning
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, governor, 2)
    assert governor.status.conflicts == 1, "the same values are no conflict"
    schedule = S.ExponentialLR(optimizer, 0.9)
    train(optimizer, governor, 2, schedule.step)
    assert "ExponentialLR" in warnings_of(caplog)[1], "and the checkpoint is not to blame for what comes later"


@pytest.mark.parametrize("first", ["optimizer", "governor"])
def test_a_job_that_goes_back_to_a_checkpoint_is_in_conflict_with_nobody(steer, caplog, first):
    optimizer = optimizer_of()
    governor = steer(optimizer, policy={"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0})
    train(optimizer, governor, 2)
    token, state = governor.state_dict(), optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.1
    used = train(optimizer, governor, 4)
    for which in (first, "governor" if first == "optimizer" else "optimizer"):
        (optimizer.load_state_dict if which == "optimizer" else governor.load_state_dict)(
            state if which == "optimizer" else token
        )
    assert train(optimizer, governor, 4) == used
    assert (governor.status.conflicts, warnings_of(caplog)) == (0, [])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("mode", ["absolute", "multiplier"])
def test_what_is_written_between_our_write_and_the_step_is_noticed_and_told(steer, caplog, mode, tensor):
    optimizer = optimizer_of(lr=torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1)
    governor = steer(optimizer, mode=mode)
    told = receipts_of(governor)
    train(optimizer, governor, 2)

    def late(*_):
        group = optimizer.param_groups[0]
        if tensor:
            group["lr"].fill_(0.3)
        else:
            group["lr"] = 0.3

    spy = optimizer.register_step_pre_hook(late)
    assert train(optimizer, governor, 5) == ([0.3] * 5 if mode == "absolute" else [0.1] * 5)
    spy.remove()
    assert train(optimizer, governor, 2) == [0.1, 0.1], "and is overcome as soon as it ends"
    (warning,) = warnings_of(caplog)
    assert warning == (
        "flyball: somebody else writes the learning rate of group default within the step: "
        "the step used 0.3 instead of 0.1"
    )
    assert governor.status.conflicts == 5
    assert [(r[2].lr, bool(r[4]), r[-1]["wanted_lr"]) for r in told] == [
        ((0.1,), False, None),
        ((0.3,), True, (0.1,)),
        ((0.1,), False, None),
    ]


def test_momentum_that_is_steered_and_written_by_somebody_else_is_told_and_any_other_is_not(steer, caplog):
    optimizer = optimizer_of(torch.optim.AdamW, lr=0.01)
    governor = steer(optimizer, policy="constant", base={"type": "one_cycle", "max_lr": 0.01, "total_steps": 40})

    def late(*_):
        optimizer.param_groups[0]["betas"] = (0.5, 0.999)

    train(optimizer, governor, 2)
    spy = optimizer.register_step_pre_hook(late)
    train(optimizer, governor, 3)
    spy.remove()
    (warning,) = warnings_of(caplog)
    assert "somebody else writes the momentum of group default within the step: the step used 0.5" in warning
    free = optimizer_of(torch.optim.AdamW)
    other = steer(free)
    free.register_step_pre_hook(lambda *_: free.param_groups[0].update(betas=(0.5, 0.999)))
    train(free, other, 3)
    assert (other.status.conflicts, len(warnings_of(caplog))) == (0, 1)


def test_in_multiplier_mode_a_scheduler_is_no_conflict(steer, caplog):
    optimizer = optimizer_of(groups=2)
    schedule = S.ExponentialLR(optimizer, 0.9)
    governor = steer(optimizer, mode="multiplier")
    train(optimizer, governor, 12, schedule.step)
    assert (governor.status.conflicts, warnings_of(caplog)) == (0, [])


def test_the_search_for_a_writer_is_taken_a_few_times_at_most_and_keeps_nobody_alive(steer, monkeypatch):
    optimizer = optimizer_of()
    governor = steer(optimizer, lag=None)
    walks, look = [], gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *things: walks.append(1) or look(*things))

    def by_hand():
        optimizer.param_groups[0]["lr"] *= 0.9

    train(optimizer, governor, 300, by_hand)
    assert governor.status.conflicts == 299
    assert 0 < len(walks) <= 4 * 9, "at the 1st, 2nd, 4th ... 256th time"
    schedule = S.ExponentialLR(optimizer, 0.9)
    train(optimizer, governor, 300, schedule.step)
    seen = len(walks)
    train(optimizer, governor, 50, schedule.step)
    assert len(walks) == seen, "known by now"
    schedule = None
    gc.collect()
    assert all(ref() is None for ref in optimizer_writers(governor)._proven)


def optimizer_writers(governor):
    return governor._optimizer._writers


def test_a_learning_rate_on_a_device_is_watched_without_asking_the_device():
    """A meta tensor has no value at all: whoever reads it fails."""
    lr = torch.tensor(0.1, device="meta")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1, device="meta"))], lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    steered = Groups(optimizer, (wire.Group("default", 0.1),), False)
    wanted = wire.Settings((0.05,))
    for _ in range(2):
        assert steered.write(wanted, (0.1,), ((0.0, 1.0),), None) is None
        used, conflict = steered.read_back()
        assert (used.lr, conflict) == ((0.05,), None)
    lr.mul_(2)
    before = steered.write(wanted, (0.1,), ((0.0, 1.0),), None)
    assert "before the step: a value on its device was found where 0.05 stood" in before.text
    lr.mul_(2)
    used, within = steered.read_back()
    assert "the step used a value on its device instead of 0.05" in within.text
    assert (str(used.lr), within.wanted_lr) == ("(nan,)", (0.05,))
    assert optimizer.param_groups[0]["lr"] is lr
