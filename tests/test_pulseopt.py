"""Goal: given the same losses and seed, `aees` with rng="pulseopt" is the published package, arm for arm.

Method: the package drives real training (scikit-learn's digits, SGD under an external cosine schedule) for 200
episodes; the policy sees the losses and update norms, once straight through and once through JSON now and then.
"""

import json

import pytest
import torch
from pulseopt import AEES
from sklearn.datasets import load_digits

from flyball_server.core.policies import POLICIES
from flyball_server.core.policies.aees import episode_log
from flyball_server.core.state import dump_state, load_state
from flyball_server.core.types import Group, Observation

POLICY = POLICIES["aees"]
EPISODES, LENGTH = 200, 3
STEPS = EPISODES * LENGTH + 2  # the last episode stays open
GROUPS = (Group("weights", 0.05), Group("biases", 0.1))
LRS, NOISES = [0.5, 1.0, 2.0], [0.0, 0.01, 0.05]
CASES = {
    "lr only": {"lr_candidates": LRS},
    "noise only": {"noise_candidates": NOISES, "reward_instability_lambda": 0.3},
    "independent": {"lr_candidates": LRS, "noise_candidates": NOISES, "ema_alpha": 0.4},
    "conditional": {
        "lr_candidates": LRS,
        "noise_candidates": NOISES,
        "structured_control_mode": "conditional",
        "reward_clip_max": 0.01,
    },
    "trend": {
        "lr_candidates": LRS,
        "noise_candidates": NOISES,
        "context_mode": "trend",
        "context_trend_epsilon": 0.05,
        "structured_control_mode": "conditional",
    },
    "random": {"lr_candidates": LRS, "noise_candidates": NOISES, "control_mode": "random", "context_mode": "trend"},
}


def train(parameters, seed):
    """(loss and update norm of every step, candidate and LR per group in force at it, the package's log)."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 10)
    groups = [{"params": [one], "lr": group.lr} for one, group in zip(model.parameters(), GROUPS, strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    used, signals, candidates = [], [], []
    optimizer.register_step_pre_hook(lambda one, *_: used.append([group["lr"] for group in one.param_groups]))
    aees = AEES(optimizer, episode_length=LENGTH, lr_scheduler=schedule, seed=seed, **parameters)
    for step in range(STEPS):
        base = [group["lr"] for group in optimizer.param_groups]
        candidates.append((aees.step_start(step), base))
        batch = torch.randint(len(inputs), (64,))
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        before = [one.detach().clone() for one in model.parameters()]
        aees.step_end(loss)
        moved = zip(model.parameters(), before, strict=True)
        squares = [float((one.detach() - old).pow(2).sum()) for one, old in moved]
        signals.append((loss.item(), sum(squares) ** 0.5))
    aees.finalize()
    return signals, candidates, used, aees.get_logs()


def compare(signals, candidates, used, log, config, carried):
    """Step the policy beside what the package did; carried: through JSON now and then."""
    state, decision = POLICY.init(config, GROUPS, 0)
    closed = []
    for step, (loss, norm) in enumerate(signals):
        candidate, base = candidates[step]
        assert decision.fields["candidate"] == candidate.name, step
        assert decision.fields["noise_std"] == candidate.noise_std
        multiplier = decision.fields["lr_multiplier"]
        assert used[step] == [lr * multiplier for lr in base], step
        assert decision.lr == tuple(group.lr * multiplier for group in GROUPS)
        if carried and step % 10 == 1:
            state = load_state(POLICY, json.loads(json.dumps(dump_state(state), allow_nan=False)))
        state, decision = POLICY.step(config, state, Observation(step, loss, update_norm=norm))
        if decision.milestone:
            closed.append(decision.fields)
    ours = episode_log([*closed, POLICY.finish(config, state).fields])
    assert len(ours["episode_rewards"]) == EPISODES + 1
    assert set(log) <= set(ours)
    for key, values in log.items():
        if isinstance(values[0], float):
            assert ours[key] == pytest.approx(values, rel=1e-12, abs=1e-12), key
        else:
            assert ours[key] == values, key
    assert len(set(log["selected_combined_names"])) >= 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_the_package_and_the_policy_choose_and_reward_alike(name):
    parameters, seed = CASES[name], 17
    done = train(parameters, seed)
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    config = POLICY.config(episode_length=LENGTH, version="0.3", rng="pulseopt", guard=False, seed=seed, **tuples)
    compare(*done, config, carried=False)
    compare(*done, config, carried=True)
