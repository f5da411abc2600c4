"""Every error the service answers with, sorted by what the caller should do.

SteeringError (never raised itself)
├── Invalid    the request is wrong: correct the named field
├── NotFound   no such run or policy: check the name
├── Conflict   not possible as things are, perhaps since somebody else moved first: read again, then decide
│   ├── KeyReused  the idempotency key stands for another request: take a new one
│   └── Stale      the caller did not know of the newest command: look, then decide
│       └── Ahead      the caller claims to know a row that is not written yet: look, then decide
├── Unauthenticated nobody knows who asks: send a valid token
├── Denied     not allowed: ask for the role
├── Busy       a stated limit is full: come back later
│   └── Limited    this caller asks too often: come back later
└── Damaged    the stored record is not what was written: restore it

Each skin (gRPC, HTTP) maps `code` to its own status in one table.
"""

from __future__ import annotations


class SteeringError(Exception):
    """Base of all errors that reach a caller; `code` names the kind on every wire."""

    code = "internal"


class Invalid(SteeringError):
    """The request is wrong. The message names the field, the value and the remedy."""

    code = "invalid"


class NotFound(SteeringError):
    """There is no such run, attempt, step or policy."""

    code = "not_found"


class Conflict(SteeringError):
    """The run is not in the state the caller believed; read it again and decide."""

    code = "conflict"


class Stale(Conflict):
    """The caller decided without knowing the run's newest command; the message names its row."""

    code = "stale"


class Ahead(Stale):
    """The caller claims to know a row that is not written yet: it is mistaken, or looked at another store."""


class KeyReused(Conflict):
    """The idempotency key stands for another request; a new request takes a new key."""


class Unauthenticated(SteeringError):
    """The request carries no valid token. One wording for every reason: the answer tells nothing about tokens."""

    code = "unauthenticated"


class Denied(SteeringError):
    """The caller may not do this."""

    code = "denied"


class Busy(SteeringError):
    """A stated limit is full. Nothing was lost: repeat after `retry_after_s` seconds."""

    code = "busy"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Limited(Busy):
    """The caller alone asks more often than one caller may. Nothing was done: repeat after `retry_after_s` seconds."""

    code = "limited"


class Damaged(SteeringError):
    """The stored record is not what was written; the message names the run and the row.

    Restore the store from a backup; nothing is written to it meanwhile.
    """

    code = "damaged"
