"""Flyball's service: holds the state and the policy of every run, steers it and audits every move.

with flyball_server.running(store="sqlite:///flyball.db") as service:
    print(service.http, service.grpc)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flyball_server.app import Running as Running
    from flyball_server.app import running as running

__all__ = ["Running", "running"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the pure core can then be imported without the libraries of the service.
    if name in __all__:
        from flyball_server import app

        return getattr(app, name)
    raise AttributeError(f"module 'flyball_server' has no attribute {name!r}")
