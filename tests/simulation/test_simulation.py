"""Goal: no world breaks what is promised, whatever goes wrong in it; and the judges that say so would notice.

Method: many small worlds, each from its seed alone. Repeat one that failed, with what happened in it, by
`python -m tests.simulation --seed N`.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.simulation.__main__ import main, problem_of
from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import World

ROOT = Path(__file__).resolve().parents[2]
WORLDS = 250
#: How many worlds a planted bug may survive.
SURVIVED_MAX = 250
#: What must have gone wrong somewhere in all these worlds; each is counted where it happens.
FAULTS = {
    "answer timed out",
    "append came second",
    "append lost in a crash",
    "append written, but never told",
    "another future's checkpoint",
    "base followed in an outage",
    "decision missed",
    "disk failed",
    "disk full",
    "disk slow",
    "message lost",
    "no server",
    "partition",
    "process crashed",
    "process lingers",
    "process rewinds",
    "request cut off",
    "request late",
    "request twice",
    "server crashed",
    "side signal",
    "snapshots deleted",
}


@pytest.mark.timeout(600)
def test_no_world_breaks_a_promise():
    counts, kinds, broken = Counter(), Counter(), []
    for seed in range(WORLDS):
        world = World(seed)
        if problem := problem_of(world):
            broken.append(f"seed {seed}: {problem}\n  python -m tests.simulation --seed {seed}")
        counts += world.counts
        kinds.update((job.plan.lag, job.plan.exact, job.plan.ranks > 1) for job in world.jobs)
    assert not broken, "\n".join(broken)
    assert min(counts[fault] for fault in FAULTS) >= 5, counts
    assert counts.keys() == FAULTS, "a fault that is counted stands in FAULTS"
    assert {lag for lag, _, _ in kinds} == {None, 0, 1, 3}
    assert {exact for _, exact, _ in kinds} == {ranks for _, _, ranks in kinds} == {True, False}


def history(seed):
    world = World(seed)
    world.run()
    return world.digest()


def test_the_same_seed_gives_the_same_history():
    seeds = range(5)
    here = [history(seed) for seed in seeds]
    assert len(set(here)) == len(here)
    assert here == [history(seed) for seed in seeds]
    # In a process where sets and dictionaries of text have another order, too.
    code = f"from tests.simulation.test_simulation import history; print(*[history(seed) for seed in {list(seeds)}])"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == here


def applied(seed, *, faults):
    """What the exact jobs of a world applied, by job."""
    world = World(seed, faults=faults)
    world.run()
    return {
        job.plan.name: [(made.model, made.lr) for story in job.stories for made in story.steps[: story.kept]]
        for job in world.jobs
        if job.plan.exact and not any(job.lost(world.record(job.plan.name)))
    }


def test_exact_jobs_apply_the_same_bits_with_faults_and_without():
    compared = 0
    for seed in range(16):
        rough, calm = applied(seed, faults=True), applied(seed, faults=False)
        for name in rough.keys() & calm.keys():
            assert rough[name] == calm[name], (seed, name)
            compared += 1
    assert compared >= 5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_planted_bug_is_found(mutation, monkeypatch):
    mutation.plant(monkeypatch)
    found = next(filter(None, (problem_of(World(seed)) for seed in range(SURVIVED_MAX))), "")
    assert found, f"{SURVIVED_MAX} worlds did not notice that {mutation.about}"
    assert found.startswith(mutation.judge), f"noticed otherwise than thought: {found}"


def test_a_broken_world_is_told_with_the_command_that_repeats_it(monkeypatch, capsys):
    MUTATIONS["answers_early"].plant(monkeypatch)
    assert main(["--seeds", "2", "--first", "5"]) == 1
    told = capsys.readouterr().out
    assert "seed 5: persist, then publish" in told
    assert "python -m tests.simulation --seed 5" in told
    assert "2 worlds in" in told
    assert main(["--seed", "5"]) == 1
    assert "BROKEN persist, then publish" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["--seed", "5"]) == 0
