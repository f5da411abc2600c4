"""What the client raises: only from `attach`, and to itself; and what a handler raises.

FlyballError
├── Refused    the service answered and said no; `code` is its word (invalid, not_found, conflict, denied)
├── LinkError  the service could not be reached or asks for patience; the link tries again by itself
└── Declined   raised by a handler: it does not do what it is asked for, and the message says why
"""

from __future__ import annotations


class FlyballError(Exception):
    """Base of everything this package raises on purpose."""


class Refused(FlyballError):
    """The service said no. Trying the same again will not help."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class LinkError(FlyballError):
    """No answer this time. `retry_after_s`: how long the service asked to wait, 0 where it did not."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Declined(FlyballError):
    """Raise it in a handler that does not do what it is asked for: the message is the answer's note."""
