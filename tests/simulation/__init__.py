"""Whole worlds from one seed: jobs, links, services and one journal in one thread, with everything going wrong.

Rule of this package: what happens in a world follows from its seed alone. Nothing here reads a clock or starts a
thread, and everything that is not the network, the disk, the clock or the training loop is the product's own code.

    python -m tests.simulation --seeds 500      # many worlds
    python -m tests.simulation --seed 7         # one, with what happened in it
"""
