"""Requests that may be repeated: the same key from the same caller is the same request.

Rule of this module: a key is kept as a hash, together with whose it is and what was asked.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from flyball_server import limits
from flyball_server.auth.access import Caller
from flyball_server.core.errors import Invalid, KeyReused
from flyball_server.core.run import Run


def key_of(key: str, content: Any, caller: Caller) -> str:
    """An Idempotency-Key as a run keeps it; "" where there is none. Raises Invalid for one that is too long."""
    if not key:
        return ""
    if len(key) > limits.NAME_MAX:
        raise Invalid(f"Idempotency-Key has {len(key)} characters: give at most {limits.NAME_MAX}")
    whose = hashlib.sha256(f"{caller.actor}\n{key}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return f"{whose}:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]}"


def repeated(run: Run, key: str, run_id: str) -> str:
    """What an earlier request with the same key brought forth, by its id; "" where there is none. Raises KeyReused
    where that was another request."""
    if not key:
        return ""
    for other, found in run.steering.keys:
        if other.partition(":")[0] == key.partition(":")[0]:
            if other == key:
                return found
            raise KeyReused(f"run {run_id}: this Idempotency-Key was used for another command, {found}: take a new one")
    return ""
