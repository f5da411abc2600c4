"""One run shared by the ranks of a training job: rank 0 speaks to the service, and all ranks know what it knows.

Rule of this package: nothing is known to one rank alone. What rank 0 learned from the service takes effect on every
rank at one and the same optimizer step, its own included, and no rank decides by its own clock.
"""
