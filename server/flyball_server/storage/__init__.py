"""Where runs are kept. `open_journal` turns the setting `store` into a journal; `journal` is the contract.

Rule of this package: everything that is stored is derived from, or is, the journal's rows.
"""

from __future__ import annotations

from flyball_server import limits
from flyball_server.core.errors import Invalid
from flyball_server.storage.journal import Journal
from flyball_server.storage.memory import MemoryJournal
from flyball_server.storage.sql import SqlJournal

__all__ = ["open_journal"]


def open_journal(
    store: str,
    *,
    read_only: bool = False,
    beside: bool = False,
    bytes_max: int | None = None,
    disk_free_min: int = limits.DISK_FREE_MIN_BYTES,
) -> Journal:
    """The journal that `store` names, not started yet: "memory:" or "sqlite:///FILE".

    read_only: beside a service that writes it. beside: so, too, but to add notes to it.
    bytes_max, disk_free_min: beyond them appends are refused.
    """
    if store == "memory:":
        return MemoryJournal()
    if store.startswith("sqlite:///") and not store.endswith(("/", ":memory:")):
        return SqlJournal(store, read_only=read_only, beside=beside, bytes_max=bytes_max, disk_free_min=disk_free_min)
    raise Invalid(
        f"store is {store!r}; allowed are 'memory:' (nothing is kept), 'sqlite:///FILE' (relative) "
        "and 'sqlite:////DIRECTORY/FILE' (absolute)"
    )
