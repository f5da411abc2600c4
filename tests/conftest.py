"""Options of the test run, and torch on one thread for those who train.

Rule of this module: an option only adds something to do; without one every test checks.
"""

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rewrite-traces`: tests/core/test_golden.py writes its recorded traces anew and says what moved."""
    parser.addoption(
        "--rewrite-traces", action="store_true", help="write tests/traces/*/own.json anew, and print what moved"
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads wait by spinning, and there are hardly more cores than a service and a test need."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
