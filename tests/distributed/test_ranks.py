"""Ranks that share a run: real torchrun jobs of four and two processes, a real service that rank 0 kills and freezes.

Goal: the same bits at the same optimizer step on every rank, whatever happens. Method: one job of four ranks and one of
two make all scenarios (tests/distributed/ranks.py) in turn; each test here judges one of them, and the journal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.processes import ROOT, story_of
from tests.e2e.training import fixed_loss

from flyball_server import records
from flyball_server.storage import open_journal

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

FOUR = (
    "server_never_there", "killed", "unequal_batches", "joined", "one_rank_skips", "skips_in_a_row", "slow_rank",
    "asked_to_stop", "meddled_with", "attach_refused", "fully_sharded", "flat_parameters", "lockstep", "goes_back",
    "noise_scale", "handler_on_rank_0", "post_local",
    "gone",
)  # fmt: skip
TWO = ("resumed", "kept_in_memory", "long_pause")
JOB_S = 110


class Jobs:
    """Both jobs, on the same store one after the other, and what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "f.db"  # as story_of wants it
        self.found = {**self._run(4, FOUR), **self._run(2, TWO)}

    def _run(self, ranks: int, scenarios: tuple[str, ...]) -> dict[str, list[Any]]:
        """What each rank saw, by scenario."""
        code, log = self.job(ranks, scenarios)
        assert code == 0, f"{ranks} ranks ended with {code} after at most {JOB_S} s:\n{log[-6000:]}"
        found: dict[str, list[Any]] = json.loads((self.folder / f"found-{ranks}.json").read_text())
        return found

    def job(self, ranks: int, scenarios: tuple[str, ...]) -> tuple[int, str]:
        """How a job ended (-1: not by itself), and what it printed."""
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        command = [sys.executable, *torchrun, str(ROOT / "tests/distributed/ranks.py"), str(self.folder), *scenarios]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with (self.folder / f"log-{ranks}.txt").open("w+") as log:
            # A group of its own: where it hangs, the ranks and the service end with it.
            job = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True)
            try:
                code = job.wait(JOB_S)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                if job.poll() is None:
                    job.terminate()
                    try:
                        job.wait(10)
                    except subprocess.TimeoutExpired:
                        os.killpg(job.pid, signal.SIGKILL)
                        job.wait(10)
            log.seek(0)
            return code, log.read()

    def of(self, scenario: str) -> list[Any]:
        seen = self.found[scenario]
        errors = [rank["error"] for rank in seen if isinstance(rank, dict) and "error" in rank]
        assert not errors, errors[0]
        return seen

    def receipts(self, run: str) -> list[Any]:
        journal = open_journal(f"sqlite:///{self.file}")
        journal.start(lambda _: None)
        try:
            rows = list(journal.rows(run))
            groups = records.spec_of(rows[0]).groups
            events = [records.from_row(row, groups)[0] for row in rows]
        finally:
            journal.close()
        return [receipt for event in events for receipt in getattr(event, "receipts", ())]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("ranks"))


def alike(lists: list[Any]) -> list[Any]:
    """What all ranks saw, which is the same."""
    for rank, one in enumerate(lists):
        assert one == lists[0], f"rank {rank} differs from rank 0"
    found: list[Any] = lists[0]
    return found


def by_number(ranks: list[dict[str, str]]) -> dict[int, str]:
    """The learning rate of each step number, which no two ranks tell differently."""
    merged: dict[int, str] = {}
    for rank, seen in enumerate(ranks):
        for step, lr in seen.items():
            assert merged.setdefault(int(step), lr) == lr, f"step {step} on rank {rank}"
    return merged


def test_all_ranks_use_the_same_bits_while_the_server_is_killed_and_comes_back(jobs: Jobs) -> None:
    seen = jobs.of("killed")
    lrs = alike([rank["lrs"] for rank in seen])
    assert len(set(lrs)) > 3
    assert lrs[250:280] == [lrs[250]] * 30  # held while it was away
    assert {rank["state"] for rank in seen} == {"steering"}


def test_the_journal_has_every_step_once_and_n_of_n_receipts(jobs: Jobs) -> None:
    story, receipts = story_of(jobs, "killed"), jobs.receipts("killed")  # type: ignore[arg-type]
    assert (story.steps, story.problem) == ({1: list(range(900))}, "")
    assert {(receipt.ranks, receipt.of_ranks, receipt.conflict) for receipt in receipts} == {(4, 4, "")}
    lrs = jobs.of("killed")[0]["lrs"]
    for receipt in receipts:  # applied where it says, and not a step before
        assert lrs[receipt.step] == receipt.settings.lr[0].hex()
        assert receipt.step == 0 or lrs[receipt.step - 1] != lrs[receipt.step]


def test_the_loss_is_the_sum_over_ranks_by_their_weights(jobs: Jobs) -> None:
    seen = jobs.of("killed")
    expected = []
    for losses in zip(*(rank["losses"] for rank in seen), strict=True):
        total = weights = 0.0
        for loss, weight in losses:
            total, weights = total + loss * weight, weights + weight
        expected.append(total / weights)
    assert story_of(jobs, "killed").signals[1]["loss"] == expected  # type: ignore[arg-type]


def test_without_a_service_from_the_start_all_ranks_follow_the_base_schedule(jobs: Jobs) -> None:
    lrs = alike(jobs.of("server_never_there"))
    assert len(set(lrs)) == 60


def test_ranks_with_fewer_batches_go_on_exchanging_until_all_are_through(jobs: Jobs) -> None:
    seen = jobs.of("unequal_batches")
    assert [len(lrs) for lrs in seen] == [40, 47, 54, 61]
    merged = by_number([dict(enumerate(lrs)) for lrs in seen])
    assert len(set(merged.values())) > 1
    story = story_of(jobs, "unequal")  # type: ignore[arg-type]
    assert story.steps == {1: list(range(61))}
    alone = fixed_loss(60) * (1 + 0.1 * 3)
    assert story.signals[1]["loss"][60] == alone  # only the last rank has got there


@pytest.mark.parametrize("lag", ["None", "0"])
def test_join_lets_ranks_run_out_of_batches_and_puts_their_counts_together(jobs: Jobs, lag: str) -> None:
    seen = [rank[lag] for rank in jobs.of("joined")]
    by_number([rank["lrs"] for rank in seen])
    assert [rank["epochs"] for rank in seen] == [[21, 42]] * 4


@pytest.mark.parametrize("lag", ["None", "0"])
def test_a_step_that_one_rank_alone_skips_never_sets_the_ranks_apart(jobs: Jobs, lag: str) -> None:
    seen = [rank[lag] for rank in jobs.of("one_rank_skips")]
    assert len(set(by_number([rank["lrs"] for rank in seen]).values())) > 3
    for rank in seen:  # at every call a rank is at most one exchange (4 steps) behind
        assert all(0 <= ahead - own <= 4 for ahead, own in zip(seen[0]["steps"], rank["steps"], strict=True))


def test_skips_in_a_row_neither_hold_up_the_ranks_nor_set_them_apart(jobs: Jobs) -> None:
    seen = jobs.of("skips_in_a_row")
    assert len(set(by_number([rank["lrs"] for rank in seen]).values())) > 3
    assert [rank["steps"][-1] for rank in seen] == [79] * 4  # what all skipped is no step
    # The weight of rank 3 is NaN at every step: it has no part in the mean, and is counted.
    assert [rank["bad"] > 0 for rank in seen] == [False, False, False, True]


def test_a_directive_without_a_handler_on_every_rank_is_begun_on_none(jobs: Jobs) -> None:
    seen = jobs.of("handler_on_rank_0")
    assert [rank["called"] for rank in seen] == [[]] * 4
    told = seen[0]["told"]
    assert (told["status"], told["history"][-1]["note"]) == ("declined", "no handler for checkpoint on rank 1, 2, 3")


def test_an_optimizer_that_steps_through_the_one_it_holds_is_steered(jobs: Jobs) -> None:
    assert len(set(alike(jobs.of("post_local")))) > 3


def test_a_slow_rank_gets_what_all_others_get(jobs: Jobs) -> None:
    assert len(set(alike(jobs.of("slow_rank")))) > 3


def test_directives_controls_and_a_stop_come_to_all_ranks_at_one_step(jobs: Jobs) -> None:
    seen = jobs.of("asked_to_stop")
    alike([{name: rank[name] for name in ("steps", "saved", "controls", "why")} for rank in seen])
    assert len(seen[0]["saved"]) == 2
    assert "asks to stop" in seen[0]["why"]
    kept, failed, control, stop = seen[0]["commands"]
    assert (kept["status"], kept["history"][-1]["note"]) == ("done", "kept")
    assert (failed["status"], failed["history"][-1]["note"]) == ("declined", "rank 2: OSError: disk full")
    applied = control["applied"]
    assert (applied["ranks"], applied["of_ranks"], stop["status"]) == (4, 4, "done")
    # As they stood behind each step: the one it was applied at was the first to begin with the new value.
    assert seen[0]["controls"][applied["step"] - 2 : applied["step"]] == [0.5, 0.25]


def test_a_rank_that_used_something_else_is_named(jobs: Jobs) -> None:
    jobs.of("meddled_with")
    receipts = {receipt.step: receipt for receipt in jobs.receipts("meddled")}
    assert (receipts[0].ranks, receipts[30].ranks, receipts[31].ranks) == (4, 3, 4)
    assert receipts[30].conflict.startswith("rank 2 used 0.01 instead of 0.1: ")
    assert {receipt.of_ranks for receipt in receipts.values()} == {4}


def test_what_one_rank_is_refused_for_is_refused_on_all(jobs: Jobs) -> None:
    seen = jobs.of("attach_refused")
    unknown, group, lag, base = alike([rank[:4] for rank in seen])
    assert unknown[0] == "Refused"
    assert "group default begins with [0.2" in group[1]
    assert "on rank 1" in group[1]
    assert lag == ["ValueError", "lag is 1 on rank 1 and 0 on rank 0: give every rank the same"]
    assert base[0] == "ValueError"
    option, optimizer, missing = zip(*(rank[4:] for rank in seen), strict=True)
    assert [one[0] for one in option] == ["FlyballError", "TypeError", "FlyballError", "FlyballError"]
    assert "rank 1: TypeError: attach has no option 'laag'" in option[0][1]
    assert "rank 2: TypeError: optimizer" in optimizer[0][1]
    assert missing[0] == ["none"]
    assert all("for rank 0 to attach: every rank must call attach" in one[1] for one in missing[1:])


def test_fully_sharded_models_are_steered_and_each_rank_draws_its_own_noise(jobs: Jobs) -> None:
    seen = jobs.of("fully_sharded")
    assert len(set(alike([rank["lrs"] for rank in seen]))) > 1
    alike([rank["plain"] for rank in seen])
    assert len({json.dumps(rank["shards"]) for rank in seen}) == 4
    assert all(abs(value) > 0 for rank in seen for shard in rank["shards"] for value in shard)


def test_flat_parameters_get_noise_only_where_it_is_known_which_part_is_where(jobs: Jobs) -> None:
    seen = jobs.of("flat_parameters")
    for original in ("False", "True"):
        alike([rank[original]["lrs"] for rank in seen])
    assert [rank["False"]["added"] for rank in seen] == [[1.0]] * 4
    assert [rank["True"]["added"] for rank in seen] == [None] * 4


def test_lockstep_equals_one_process_with_the_same_mean_losses(jobs: Jobs) -> None:
    seen = jobs.of("lockstep")
    together = alike([rank["together"] for rank in seen])
    assert together == seen[0]["alone"]
    assert len(set(together)) > 3


def test_all_ranks_go_back_to_rank_0s_checkpoint(jobs: Jobs) -> None:
    seen = jobs.of("goes_back")
    lrs, again = alike([rank["lrs"] for rank in seen]), alike([rank["again"] for rank in seen])
    assert again == lrs[50:]
    assert [rank["status"] for rank in seen] == [2] * 4
    assert "another" in alike([rank["wrong"] for rank in seen])[1]


def test_fewer_ranks_go_on_from_the_checkpoint_of_more(jobs: Jobs) -> None:
    seen = jobs.of("resumed")
    alike([rank["lrs"] for rank in seen])
    assert [(rank["first"], rank["attempt"]) for rank in seen] == [(70, 3)] * 2
    story = story_of(jobs, "back")  # type: ignore[arg-type]
    assert story.problem == ""
    assert story.steps[3][-20:] == list(range(70, 90))
    assert {receipt.of_ranks for receipt in jobs.receipts("back")} == {2, 4}


def test_a_pause_longer_than_the_groups_timeout_is_many_short_collectives(jobs: Jobs) -> None:
    seen = jobs.of("long_pause")
    alike([rank["lrs"] for rank in seen])
    for rank in seen:
        assert rank["took"] > 9
        assert rank["missed"] == 0
        assert not [line for line in rank["lines"] if "exchange nothing" in line]


def test_when_a_rank_is_gone_the_others_hold_and_are_not_disturbed(jobs: Jobs) -> None:
    seen = jobs.of("gone")
    assert [len(rank["lrs"]) for rank in seen] == [80, 40, 80, 80]
    by_number([dict(enumerate(rank["lrs"])) for rank in seen])
    said = [len([line for line in rank["lines"] if "the ranks exchange nothing any more" in line]) for rank in seen]
    assert said == [1, 0, 1, 1]


def test_a_rank_that_raises_ends_the_job_and_the_run_is_failed(jobs: Jobs) -> None:
    code, log = jobs.job(2, ("raises",))
    assert code == 1, log[-3000:]  # by itself: its process could exit
    assert "boom" in (jobs.folder / "raised-1").read_text()
    assert "Connection closed" in (jobs.folder / "raised-0").read_text()
    journal = open_journal(f"sqlite:///{jobs.file}")
    journal.start(lambda _: None)
    try:
        ends = [row.payload for row in journal.rows("raises")]
    finally:
        journal.close()
    assert b"failed" in ends[-1] or "failed" in str(ends[-1])


def test_the_noise_scale_is_that_of_the_gradients(jobs: Jobs) -> None:
    jobs.of("noise_scale")
    scales = story_of(jobs, "noise-scale").signals[1]["noise_scale"]  # type: ignore[arg-type]
    late = [scale for scale in scales[300:] if scale is not None]
    assert len(late) == 100
    assert sum(late) / len(late) == pytest.approx(9, rel=0.3)


def test_all_ranks_go_back_to_checkpoints_in_memory_together_or_none_does(jobs: Jobs) -> None:
    first, second = jobs.of("kept_in_memory")
    assert [told[1:4] for told in first[:4]] == [told[1:4] for told in second[:4]]
    assert [told[3] for told in first] == [told[3] for told in second] == [1, 2, 2, 2, 2, 2]  # attempts
    (saved, kept), (back, how) = (told[5] for told in first[:2])
    assert (saved, back) == ("done", "done")
    step = kept.split()[1]
    assert f"to step {step} 'a'" in how
    assert first[1][1] == first[0][1]  # the same weight after the same steps
    for told, words in zip(
        first[2:],
        (
            "rank 1: a checkpoint needs",
            "there is no checkpoint named 'b' in memory of every rank",
            "rank 1: rank 1's own; others have put theirs back, and ranks differ from here on",
            "rank 1: optimizer is not what it was at the checkpoint",
        ),
        strict=True,
    ):
        assert told[5][0] == "declined"
        assert words in told[5][1]
