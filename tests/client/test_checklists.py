"""Goal: what the published schedulers' own documents promise to check, item by item, each as a test of that name.

Method: the policies on made-up signals where an item is about a rule; scikit-learn's digits, a real network, a real
service and real steps of a torch optimizer where it is about training.
"""

import json
import random
import statistics
from itertools import count, pairwise

import httpx
import pytest
import torch
from sklearn.datasets import load_digits

import flyball
import flyball_server
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Group, Observation
from flyball_server.policy_files import resolve

GROUPS = (Group("body", 0.1, 0.9), Group("head", 0.01), Group("adam", 1e-3, None, (0.9, 0.999)), Group("off", 0.1, 0.0))
WILD = [
    {"type": "adaptive", "use_reward": True, "use_cosine": True, "up_factor": 2.0, "down_factor": 0.1},
    {
        "type": "rules",
        "lr_rule": "trend",
        "momentum_rule": "exp",
        "reward_rule": "scaling",
        "lr_up": 3.0,
        "lr_down": 0.2,
    },
    {
        "type": "rules",
        "lr_rule": "loss_decay",
        "momentum_rule": "relative",
        "reward_rule": "trend",
        "relative_rate": 1.0,
    },
    {"type": "windowed", "window_size": 3, "cooldown_steps": 0, "increase_factor": 9.0, "max_change_per_step": 9.0},
    {"type": "cycle", "window_size": 4, "patience": 3, "smoothing": 0.0, "explore_noise": 1.0},
    {"type": "greedy", "patience": 0, "factor": 0.2},
]
names = (f"c{i}" for i in count())


def run(spec, seen, groups=GROUPS):
    policy, config, _ = resolve(spec)
    state, decision = policy.init(config, groups, 0)
    decisions = [decision]
    for one in seen:
        state, decision = policy.step(config, state, one)
        decisions.append(decision)
    return decisions


def signals(n, seed=1):
    chance = random.Random(seed)
    return [Observation(i, chance.gauss(1, 2), chance.gauss(0, 3), abs(chance.gauss(1, 9))) for i in range(n)]


def losses(values):
    return [Observation(step, value) for step, value in enumerate(values)]


# ---- the rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", WILD, ids=lambda spec: spec["type"])
def test_learning_rate_and_momentum_never_leave_their_bounds(spec):
    whole = resolve(spec)
    decisions = run(spec, signals(3000))
    # The defaults: between a hundredth and twenty times the learning rate at attach, whatever the policy.
    for decision in decisions:
        assert all(group.lr / 100.01 <= lr <= 20.01 * group.lr for lr, group in zip(decision.lr, GROUPS, strict=True))
        if decision.momentum is not None:
            assert 0.45 <= decision.momentum[0] <= 0.999
    assert min(d.lr[0] for d in decisions) < 0.5 * max(d.lr[0] for d in decisions), "nothing was tried"
    assert whole.policy.name == spec["type"]


@pytest.mark.parametrize("spec", WILD[:3], ids=["adaptive", "rules", "rules"])
def test_momentum_moves_only_where_the_optimizer_has_it(spec):
    decisions = run(spec, signals(500))
    assert len({d.momentum[0] for d in decisions}) > 1
    assert {d.momentum[1:] for d in decisions} == {(None, 0.9, 0.0)}
    beta1 = run({**spec, "momentum_target": "beta1"}, signals(500))
    assert len({d.momentum[2] for d in beta1}) > 1
    assert {(d.momentum[1], d.momentum[3]) for d in beta1} == {(None, 0.0)}
    assert {d.momentum for d in run(spec, signals(50), GROUPS[1:2])} == {None}


@pytest.mark.parametrize(
    ("reward", "factor"), [(-2.0, 0.02), (3.0, 1.0), (8.0, 2.0), (5.5, 1.5), (100.0, 2.0), (-50.0, 0.02)]
)
def test_reward_scaling_maps_centre_and_span_to_nothing_and_twice_the_base(reward, factor):
    spec = {"type": "rules", "reward_rule": "scaling", "reward_center": 3.0, "reward_span": 5.0}
    last = run(spec, [Observation(0, None, reward)])[-1]
    assert last.lr[0] == pytest.approx(0.1 * factor)  # at the lower end: min_lr, a fiftieth


def test_smoothing_is_an_exponential_average_that_begins_at_the_first_value():
    values, average = [3.0, 1.0, 4.0, 1.0, 5.0], None
    found = run({"type": "adaptive", "loss_beta": 0.75}, losses(values))[1:]
    smoothed = run({"type": "rules", "lr_rule": "trend", "ema_loss_beta": 0.75}, losses(values))[1:]
    for value, one, other in zip(values, found, smoothed, strict=True):
        average = value if average is None else 0.75 * average + 0.25 * value
        assert one.fields["loss_ema"] == pytest.approx(average, rel=1e-15)
        assert other.fields["loss_s"] == pytest.approx(average, rel=1e-15)


@pytest.mark.parametrize("spec", WILD, ids=lambda spec: spec["type"])
def test_a_state_that_was_saved_and_loaded_goes_on_the_same(spec):
    policy, config, _ = resolve(spec)
    seen = signals(400)
    state, _ = policy.init(config, GROUPS, 0)
    for one in seen[:237]:
        state, _ = policy.step(config, state, one)
    loaded = load_state(policy, json.loads(json.dumps(dump_state(state))))
    for one in seen[237:]:
        state, a = policy.step(config, state, one)
        loaded, b = policy.step(config, loaded, one)
        assert repr(a) == repr(b)


def test_the_metrics_of_a_window_are_mean_spread_trend_and_improvement():
    values = [2.0, 1.5, 1.8, 1.2, 1.0, 0.9, 1.1, 0.6]
    fields = run({"type": "windowed", "window_size": 4, "cooldown_steps": 0}, losses(values))[-1].fields
    assert fields["loss_avg"] == pytest.approx(statistics.fmean(values[4:]))
    assert fields["prev_avg"] == pytest.approx(statistics.fmean(values[:4]))
    assert fields["cv"] == pytest.approx(statistics.pstdev(values[4:]) / statistics.fmean(values[4:]))
    assert fields["trend"] == pytest.approx(statistics.linear_regression(range(4), values[4:]).slope)
    assert fields["improvement_rate"] == pytest.approx(1 - statistics.fmean(values[4:]) / statistics.fmean(values[:4]))


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ([1.0] * 4, [0.9, 0.85, 0.8, 0.75], "increase"),
        ([1.0] * 4, [1.5] * 4, "spike_decrease"),
        ([1.0] * 4, [0.1, 2.0, 0.1, 1.6], "unstable_decrease"),
        ([1.0] * 4, [1.0] * 4, "plateau_decrease"),
        ([1.0] * 4, [0.99] * 4, "hold"),
    ],
)
def test_each_path_of_a_decision_is_taken(before, after, code):
    spec = {"type": "windowed", "window_size": 4, "cooldown_steps": 0, "patience": 1}
    assert run(spec, losses(before + after))[-1].code == code


def test_the_bounds_for_mixtures_of_experts_hold():
    for lr, low, high in ((5e-5, 1e-5, 1e-3), (1.5e-3, 1.5e-5, 2e-3)):
        for values in ([0.99**i for i in range(1400)], [1.01**i for i in range(8000)]):
            found = [d.lr[0] for d in run({"type": "moe", "window_size": 10}, losses(values), (Group("experts", lr),))]
            assert low <= min(found)
            assert max(found) <= high
            assert found[-1] == pytest.approx(high if values[-1] < 1 else low)


def test_one_decision_changes_the_rate_by_no_more_than_the_limit():
    spec = {"type": "windowed", "window_size": 4, "cooldown_steps": 0, "decrease_factor": 0.1, "patience": 1}
    assert run(spec, losses([1.0] * 8))[-1].lr[0] == pytest.approx(0.1 * 0.7)
    limited = run({**spec, "rate_limit_spike": True, "spike_factor": 0.1}, losses([1.0] * 4 + [9.0] * 4))
    assert limited[-1].lr[0] == pytest.approx(0.1 * 0.7)


def test_a_cooldown_keeps_the_rate_for_as_long_as_it_says():
    spec = {"type": "windowed", "window_size": 4, "cooldown_steps": 9, "patience": 1}
    found = run(spec, losses([1.0] * 24))
    changed = [i for i, (a, b) in enumerate(pairwise(found)) if a.lr != b.lr]
    assert changed == [11, 23]  # the first window that ends 9 or more losses after a start or a change
    assert {found[i].code for i in (16, 20)} == {"cooldown"}


def test_a_warm_up_hands_over_at_the_full_rate():
    spec = {"type": "windowed", "window_size": 4, "warmup_steps": 5}
    found = run(spec, losses([1.0] * 9))
    assert [d.lr[0] for d in found[:6]] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert [d.phase for d in found[:6]] == ["warmup"] * 5 + ["adaptive"]
    assert found[5].code == "warmup_done"
    assert found[9].code == "baseline_window"


# ---- real training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


class Digits:
    """A small network on the digits; `step` makes one optimizer step and returns its loss."""

    def __init__(self, lr, momentum=0.9, **groups):
        torch.manual_seed(0)
        found = load_digits()
        self.x, self.y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
        self.body, self.head = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
        parts = [{"params": self.body.parameters(), "name": "body"}, {"params": self.head.parameters(), "name": "head"}]
        for part in parts:
            part["lr"] = groups.get(part["name"], lr)
        self.optimizer = torch.optim.SGD(parts, lr=lr, momentum=momentum)
        self.order = torch.Generator().manual_seed(0)

    def step(self):
        rows = torch.randint(len(self.x), (64,), generator=self.order)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.head(torch.relu(self.body(self.x[rows]))), self.y[rows])
        loss.backward()
        self.optimizer.step()
        return loss.item()


def train(service, model, policy, steps, **options):
    """(losses, learning rates of the first group) of `steps` steps in lockstep, and the run's decisions."""
    run, seen, rates = next(names), [], []
    with flyball.attach(
        model.optimizer, run=run, policy=policy, lag=0, wait_s=10.0, server=service.grpc, **options
    ) as governor:
        for _ in range(steps):
            seen.append(model.step())
            rates.append(model.optimizer.param_groups[0]["lr"])
            governor.step(seen[-1])
    answer = httpx.get(f"{service.http}/v1/runs/{run}/decisions", params={"limit": 10_000}, trust_env=False)
    return seen, rates, [d["decision"] for d in answer.json()["decisions"]]


def test_healthy_training_speeds_up_and_learns(service):
    slow = {"type": "windowed", "window_size": 20, "cooldown_steps": 0}
    steered, rates, codes = train(service, Digits(0.005), slow, 400)
    constant, _, _ = train(service, Digits(0.005), "constant", 400)
    assert codes.count("increase") >= 3
    assert rates[-1] > 1.3 * rates[0]
    assert statistics.fmean(steered[-50:]) < statistics.fmean(constant[-50:])


def test_stuck_training_is_slowed_down(service):
    """A rate so small that nothing moves is a plateau; patience runs out and the rate is cut, within its bounds."""
    policy = {"type": "windowed", "window_size": 10, "patience": 3, "cooldown_steps": 0}
    _, rates, codes = train(service, Digits(1e-9), policy, 300)
    assert "plateau_decrease" in codes
    assert min(rates) >= 1e-11


def test_diverging_training_is_cut_and_recovers(service):
    """At a rate of 1 the loss jumps and the network is lost; steered, the rate is cut and the network learns."""
    policy = {"type": "windowed", "window_size": 5, "cooldown_steps": 0, "patience": 2}
    steered, rates, codes = train(service, Digits(1.0), policy, 300)
    constant, _, _ = train(service, Digits(1.0), "constant", 300)
    assert "spike_decrease" in codes
    assert rates[-1] < 0.1 * rates[0]
    assert statistics.fmean(constant[-50:]) > 2
    assert statistics.fmean(steered[-50:]) < 1


def test_training_with_a_router_stays_within_the_bounds_for_mixtures_of_experts(service):
    model = Digits(1e-3, head=5e-4)
    policy = {"type": "moe", "window_size": 10, "cooldown_steps": 0, "increase_threshold": 0.001}
    _, rates, codes = train(service, model, policy, 400, guard={"preset": "moe"})
    assert rates[-1] > rates[0]
    assert min(rates) >= 1e-5
    assert max(rates) <= 2e-3
    assert "increase" in codes
    assert model.optimizer.param_groups[1]["lr"] == pytest.approx(rates[-1] / 2)


def test_training_resumed_from_a_checkpoint_decides_the_same_again(service):
    policy = {"type": "adaptive", "use_reward": True, "patience": 7, "cooldown": 9}
    run, rates, token = next(names), [], {}

    def steer(model, steps, **options):
        with flyball.attach(model.optimizer, lag=0, wait_s=10.0, server=service.grpc, **options) as governor:
            for _ in range(steps):
                if len(rates) == 50:
                    token.update(json.loads(json.dumps(governor.state_dict())))
                loss = model.step()
                rates.append(model.optimizer.param_groups[0]["lr"])
                governor.step(loss, reward=-loss)

    steer(Digits(0.02), 120, run=run, policy=policy)
    # The same 50 steps once more bring model, optimizer and batches to where the checkpoint was taken.
    again = Digits(0.02)
    steer(again, 50, run=next(names), policy=policy)
    assert rates[120:] == rates[:50]
    steer(again, 70, run=run, resume=token)
    assert rates[170:] == rates[50:120]
    assert len(set(rates)) > 50
