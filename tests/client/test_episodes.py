"""Goal: `aees` over a real service steers a real training as PulseOpt does in-process, leaves an external schedule
alone, and learns only from what was really applied.

Method: the digits of scikit-learn, the same network trained twice, side by side with the PulseOpt package; a job whose
receipts say that it applies decisions late.
"""

from itertools import count, pairwise

import httpx
import pulseopt
import pytest
import torch
from sklearn.datasets import load_digits

import flyball
import flyball_server

names = (f"e{i}" for i in count())
EPISODES, LENGTH = 200, 4
CANDIDATES = {"lr_candidates": [0.5, 1.0, 1.7], "noise_candidates": [0.0]}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def training(digits):
    """A network, its optimizer with an external schedule, and its batches: the same every time."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPISODES * LENGTH)
    x, y = digits
    order = torch.Generator().manual_seed(7)

    def loss():
        rows = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        value.backward()
        return value

    return model, optimizer, schedule, loss


def decisions(service, run):
    params = {"limit": 10_000}
    return httpx.get(f"{service.http}/v1/runs/{run}/decisions", params=params, trust_env=False).json()["decisions"]


@pytest.mark.parametrize("context", ["none", "trend"])
def test_pulseopt_and_the_service_train_alike_for_200_episodes(service, digits, context):
    model, optimizer, schedule, loss = training(digits)
    aees = pulseopt.AEES(
        optimizer, **CANDIDATES, episode_length=LENGTH, lr_scheduler=schedule, seed=3, context_mode=context
    )
    theirs = []
    hook = optimizer.register_step_pre_hook(lambda *_: theirs.append(optimizer.param_groups[0]["lr"]))
    for step in range(EPISODES * LENGTH):
        aees.step_start(step)
        aees.step_end(loss())
    hook.remove()
    aees.finalize()
    log, weights = aees.get_logs(), [p.detach().clone() for p in model.parameters()]

    model, optimizer, schedule, loss = training(digits)
    policy = {"type": "aees", **CANDIDATES, "episode_length": LENGTH, "version": "0.3", "rng": "pulseopt", "seed": 3}
    run, ours = next(names), []
    with flyball.attach(
        optimizer,
        run=run,
        policy=policy | {"context_mode": context},
        mode="multiplier",
        lag=0,
        wait_s=10.0,
        server=service.grpc,
    ) as governor:
        hook = optimizer.register_step_pre_hook(lambda *_: ours.append(optimizer.param_groups[0]["lr"]))
        for _ in range(EPISODES * LENGTH):
            value = loss()
            optimizer.step()
            schedule.step()
            governor.step(value)
        hook.remove()
    assert ours == theirs  # to the last bit
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))
    closed = [d["fields"] for d in decisions(service, run) if d["decision"] == "episode_closed"]
    assert len(closed) == EPISODES
    assert [f["closed_lr_index"] for f in closed] == log["selected_lr_indices"]
    assert [f["reward"] for f in closed] == pytest.approx(log["episode_rewards"], rel=1e-12)
    if context == "trend":
        assert [f["closed_bucket"] for f in closed] == log["context_buckets"]


def attach(service, run, **policy):
    spec = {"type": "aees", **CANDIDATES, "episode_length": LENGTH, **policy}
    body = {"run": run, "session": "s", "groups": [{"name": "all", "lr": 0.1}], "policy": spec, "lag": 1}
    assert httpx.post(f"{service.http}/v1/attach", json=body, trust_env=False).status_code == 200


def report(service, run, steps, receipts=(), **fields):
    signals = {"loss": [1.0 / (1 + step) for step in steps]}
    body = {"session": "s", "attempt": 1, "step": list(steps), "signals": signals, "receipts": list(receipts), **fields}
    answer = httpx.post(f"{service.http}/v1/runs/{run}/report", json=body, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def receipt(number, step, decided):
    return {"number": number, "step": step, "decided": decided, "lr": [0.1]}


def test_an_episode_most_of_which_ran_under_another_candidate_teaches_nothing(service):
    """The receipts that come with a report count for its observations: candidate 1 is decided at step 3."""
    late, prompt = next(names), next(names)
    for run, applied in ((late, 6), (prompt, 4)):
        attach(service, run)
        report(service, run, range(4), [receipt(1, 0, -1)])
        report(service, run, range(4, 8), [receipt(2, applied, 3)])
        report(service, run, range(8, 10), [receipt(3, 8, 7)], end="finished")
    # Two of four losses are less than the 80 % asked for, four of four are not.
    assert [d["decision"] for d in decisions(service, late)] == ["episode_closed", "episode_stale", "episode_closed"]
    assert [d["decision"] for d in decisions(service, prompt)] == ["episode_closed"] * 3
    assert decisions(service, late)[1]["fields"]["used"] == 2
    assert decisions(service, late)[1]["fields"]["lr_updates"] == 1
    assert decisions(service, prompt)[1]["fields"]["lr_updates"] == 2


def test_the_episode_a_run_ends_in_is_told_and_changes_nothing(service):
    run = next(names)
    attach(service, run)
    report(service, run, range(6), end="finished")
    *_, last = decisions(service, run)
    assert (last["step"], last["decision"], last["fields"]["final"], last["fields"]["losses"]) == (
        5,
        "episode_closed",
        True,
        2,
    )
    assert last["lr_before"] == last["lr_after"]
    found = httpx.get(f"{service.http}/v1/runs/{run}/episodes", trust_env=False).json()
    assert found["episodes"]["episode_start_steps"] == [0, 4]
    assert found["episodes"]["episode_end_steps"] == [3, 5]


def test_what_the_job_applies_late_is_found_out_from_its_own_receipts(service, digits):
    """lag=3 with episodes of 4: only one loss of an episode belongs to its candidate, so none teaches anything."""
    _, optimizer, _, loss = training(digits)
    policy = {"type": "aees", "lr_candidates": [0.5, 1.0, 1.7], "episode_length": LENGTH}
    run = next(names)
    with flyball.attach(optimizer, run=run, policy=policy, lag=3, wait_s=10.0, server=service.grpc) as governor:
        for _ in range(40):
            value = loss()
            optimizer.step()
            governor.step(value)
    found = [d for d in decisions(service, run) if not d["fields"].get("final")]
    moved = [d for before, d in pairwise(found) if before["lr_after"] != before["lr_before"]]
    assert len(moved) >= 3
    assert {d["decision"] for d in moved} == {"episode_stale"}
