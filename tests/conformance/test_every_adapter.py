"""Goal: whatever ecosystem trains, the same losses give the same learning rates, and what a user relies on holds.

Method: one suite over every loop of `tests/conformance/loops/`. Each trains for real against a service in a process of
its own, and is compared with what the pure core decides on the same losses, and with the run's journal.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from tests.conformance.ecosystems import ALL, ASKED, POLICIES, expected, loop_of, losses
from tests.conformance.loop import AFTER_CLOSE_LR, MAY_LACK, Trained
from tests.e2e.processes import Server, free_port, story_of

STEPS = 60
#: The service dies just before this step.
DIES_AT = 25
MEDDLE_AT = 20


@pytest.fixture(scope="module", params=ASKED or ALL)
def loop(request: pytest.FixtureRequest) -> Any:
    """The module of one ecosystem."""
    return loop_of(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """torch's threads wait by spinning, and loops may start processes that have their own."""
    patch = pytest.MonkeyPatch()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        patch.setenv(name, "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that nothing happens to."""
    server = Server(tmp_path_factory.mktemp("conformance")).start()
    yield server
    server.end()


@pytest.fixture
def lockstep(service: Server) -> dict[str, Any]:
    """What to attach with, for settings that only depend on the losses. The run's name is new in every test."""
    return options(service.url("http"), lag=0, wait_s=None)


def options(url: str, **more: Any) -> dict[str, Any]:
    return {"run": f"run-{uuid.uuid4().hex[:12]}", "server": url, "policy": POLICIES["windowed"], **more}


def applies(loop: Any, what: str) -> bool:
    """Whether the loop can do this; where it says that it cannot, it must say why."""
    reasons = getattr(loop, "CANNOT", {})
    assert set(reasons) <= set(MAY_LACK)
    assert all(len(reason.split()) > 3 for reason in reasons.values()), "CANNOT gives a reason, in a sentence"
    return what not in reasons


def groups_of(trained: Trained) -> int:
    return len(trained.lrs[0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_the_same_losses_give_the_settings_of_the_core(loop: Any, service: Server, policy: str, transport: str) -> None:
    if transport == "grpc" and not applies(loop, "grpc"):
        return
    trace = losses(STEPS)
    given = options(service.url(transport), lag=0, wait_s=None, policy=POLICIES[policy])
    trained = loop.train(trace, given)
    wanted = expected(POLICIES[policy], trace, loop, groups_of(trained))
    assert len(set(wanted)) > (3 if policy == "windowed" else STEPS / 2)
    assert trained.lrs == wanted
    assert trained.status.conflicts == trained.status.missed == trained.status.bad_values == 0


def test_the_journal_holds_every_loss_and_what_every_step_used(
    loop: Any, service: Server, lockstep: dict[str, Any]
) -> None:
    trace = losses(STEPS)
    trained = loop.train(trace, lockstep)
    story = story_of(service, lockstep["run"])
    assert (story.problem, story.steps) == ("", {1: list(range(STEPS))})
    assert story.signals[1]["loss"] == trace
    receipts = story.receipts[1]
    assert [one.step for one in receipts] == sorted({one.step for one in receipts})
    by_step = {one.step: one.settings.lr for one in receipts}
    applied = [by_step[max(step for step in by_step if step <= i)] for i in range(STEPS)]
    assert applied == trained.lrs
    assert all(one.ranks >= 1 and one.of_ranks in (0, one.ranks) for one in receipts)
    assert not any(one.late or one.conflict or one.wanted for one in receipts)
    assert all(one.decided == one.step - 1 for one in receipts)


def test_a_loss_that_is_no_number_arrives_as_it_is(loop: Any, service: Server, lockstep: dict[str, Any]) -> None:
    trace = losses(STEPS)
    trace[10], trace[20], trace[21] = math.nan, math.inf, math.nan
    trained = loop.train(trace, lockstep)
    assert trained.lrs == expected(lockstep["policy"], trace, loop, groups_of(trained))
    assert repr(story_of(service, lockstep["run"]).signals[1]["loss"]) == repr(trace)


def test_a_service_that_is_killed_in_mid_training_holds_the_settings(loop: Any, tmp_path: Any) -> None:
    server = Server(tmp_path).start()
    trace = losses(STEPS)
    try:
        given = options(server.url("http"), lag=0, wait_s=2.0, close_s=0.2)
        trained = loop.train(trace, given, before=lambda i: server.kill() if i == DIES_AT else None)
    finally:
        server.end()
    wanted = expected(given["policy"], trace, loop, groups_of(trained))
    assert len(trained.lrs) == STEPS
    assert trained.lrs[:DIES_AT] == wanted[:DIES_AT]
    # The answer to the last step before may have been on its way.
    assert trained.lrs[DIES_AT] in wanted[DIES_AT - 1 : DIES_AT + 1]
    assert set(trained.lrs[DIES_AT:]) == {trained.lrs[DIES_AT]}
    assert trained.status.state == "away"
    assert trained.status.waiting >= STEPS - DIES_AT
    assert trained.status.missed == 1


def test_without_a_service_training_keeps_its_own_settings(loop: Any) -> None:
    given = options(f"http://127.0.0.1:{free_port()}", start_wait_s=0.1, close_s=0.1)
    trained = loop.train(losses(STEPS), given)
    own = expected(given["policy"], [1.0], loop, groups_of(trained))
    assert trained.lrs == own * STEPS
    assert (trained.status.state, trained.status.waiting, trained.status.through) == ("away", STEPS, -1)


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    loop: Any, service: Server, lockstep: dict[str, Any]
) -> None:
    trace, half = losses(STEPS), STEPS // 2
    first = loop.train(trace[:half], lockstep)
    strayed = loop.train(trace[:10], {**lockstep, "resume": first.token})
    second = loop.train(trace[half:], {**lockstep, "resume": first.token})
    assert first.lrs + second.lrs == expected(lockstep["policy"], trace, loop, groups_of(first))
    assert strayed.lrs != second.lrs[:10]
    assert (first.token["step"], second.token["step"], second.token["attempt"]) == (half, STEPS, 3)
    story = story_of(service, lockstep["run"])
    assert (story.problem, story.from_step) == ("", {1: 0, 2: half, 3: half})


def test_another_writer_is_named_and_overwritten(loop: Any, service: Server, lockstep: dict[str, Any]) -> None:
    trace = losses(STEPS)
    if not applies(loop, "meddle"):
        return
    trained = loop.train(trace, lockstep, meddle_at=MEDDLE_AT)
    assert trained.lrs == expected(lockstep["policy"], trace, loop, groups_of(trained))
    assert trained.status.conflicts >= 1
    told = [one for one in story_of(service, lockstep["run"]).receipts[1] if one.conflict]
    assert [one.step for one in told] == [MEDDLE_AT]
    halved = trained.lrs[MEDDLE_AT - 1][0] / 2
    assert any(near(word, halved) for word in told[0].conflict.replace(",", " ").split()), told[0].conflict


def near(word: str, value: float) -> bool:
    """Whether a word is the number, as text for people gives it."""
    try:
        return math.isclose(float(word.strip("()[]:;.")), value, rel_tol=1e-3)
    except ValueError:
        return False


def test_closing_leaves_the_optimizer_to_its_owner(loop: Any, lockstep: dict[str, Any]) -> None:
    if not applies(loop, "after_close"):
        return
    trained = loop.train(losses(10), lockstep)
    assert trained.after_close == (AFTER_CLOSE_LR,) * groups_of(trained)
    assert len(trained.lrs) == 10


def test_training_twice_in_one_process_is_two_runs(loop: Any, service: Server) -> None:
    trace = losses(12)
    both = [options(service.url("http")) for _ in range(2)]
    assert [len(loop.train(trace, given).lrs) for given in both] == [12, 12]
    assert [story_of(service, given["run"]).steps for given in both] == [{1: list(range(12))}] * 2
