"""`python -m tests.simulation`: many worlds, or one with what happened in it."""

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulation.judges import Broken
from tests.simulation.world import World


def main(arguments=None):
    """Run the worlds that were asked for; 1 where one of them is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many worlds (2000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seed", type=int, help="one world, with what happened in it")
    asked = parser.parse_args(arguments)
    if asked.seed is not None:
        return _one(asked.seed)
    counts, broken, started = Counter(), 0, time.monotonic()
    for seed in range(asked.first, asked.first + asked.seeds):
        problem = problem_of(world := World(seed))
        counts += world.counts
        if problem:
            broken += 1
            print(f"\rseed {seed}: {problem}\n  python -m tests.simulation --seed {seed}", flush=True)
        if sys.stdout.isatty():
            print(f"\r{seed - asked.first + 1} of {asked.seeds} worlds, {broken} broken", end="", flush=True)
    print(f"\r{asked.seeds} worlds in {time.monotonic() - started:.0f} s, {broken} broken")
    print(", ".join(f"{what} {times}" for what, times in sorted(counts.items())))
    return 1 if broken else 0


def problem_of(world):
    """What is wrong with a world, in words; "" where nothing is."""
    try:
        world.run()
    except Broken as error:
        return str(error)
    except Exception as error:  # not even a judge could tell what to make of it
        world.note("", "".join(traceback.format_exception(error)))
        return repr(error)
    return ""


def _one(seed):
    world = World(seed)
    for job in world.jobs:
        print(job.plan._replace(noise=()))
    problem = problem_of(world)
    for at, who, what in world.history:
        print(f"{at - 1000.0:9.4f}  {who:8}  {what}")
    print(problem or "nothing is wrong")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
