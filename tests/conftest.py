"""Options of the test run.

Rule of this module: an option only adds something to do; without one every test checks.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rewrite-traces`: tests/core/test_golden.py writes its recorded traces anew and says what moved."""
    parser.addoption(
        "--rewrite-traces", action="store_true", help="write tests/traces/*/own.json anew, and print what moved"
    )
