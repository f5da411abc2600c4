"""How the reference traces under tests/traces are read."""


def unrolled(rows, n):
    """Run-length rows [[step, value], ...] as one value per step."""
    values = []
    for (step, value), (end, _) in zip(rows, [*rows[1:], (n, None)], strict=True):
        values += [value] * (end - step)
    return values
