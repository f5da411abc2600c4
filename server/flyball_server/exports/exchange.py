"""The use cases of what leaves and enters: export, import, table, schedule, the key.

Rule of this module: nothing is written before all of it is proved.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flyball_server import limits
from flyball_server.audit.heads import Heads
from flyball_server.auth.access import OPERATE, VIEW, Caller
from flyball_server.core.errors import Busy, Conflict, Invalid
from flyball_server.engine import Engine
from flyball_server.exports.check import check
from flyball_server.exports.imports import put_on_record
from flyball_server.exports.read import Export, ExportedRun
from flyball_server.exports.schedule import schedule
from flyball_server.exports.table import table
from flyball_server.exports.write import written
from flyball_server.live import LiveRun
from flyball_server.loading import load
from flyball_server.names import project_of
from flyball_server.rules import rules_of
from flyball_server.signing import Signer, fingerprint, pem
from flyball_server.storage.journal import DELETED, Journal, RunRecord

_log = logging.getLogger(__name__)


class Proved(NamedTuple):
    """A file that is right in every way."""

    export: Export
    run: ExportedRun
    signer: str


class Exchange:
    """Exports and imports over one engine and its journal."""

    def __init__(
        self, engine: Engine, journal: Journal, signer: Signer, version: str, heads: Heads | None = None
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._signer = signer
        self._version = version
        self._heads = heads
        self._importing = 0

    async def export(self, run: str, caller: Caller) -> Iterator[bytes]:
        """The run's export file, in pieces to be read outside the event loop. Raises NotFound, Damaged."""
        record = (await self._whole(run, caller)).record
        if self._heads is not None:
            await self._heads.sign_exported(run)
        return written(self._journal, record, self._version, self._engine.now_us(), self._signer)

    def may_import(self, caller: Caller) -> None:
        """Raise Denied where the caller's role does not suffice to import anything."""
        caller.check_role(OPERATE)

    async def import_file(self, path: Path, caller: Caller) -> dict[str, Any]:
        """Take the run in an export file. Raises Invalid, with the place, where anything in it is wrong; NotFound where
        its project is out of the caller's reach; Conflict where there is another run of its name; Busy where
        IMPORTS_MAX are under way."""
        self.may_import(caller)
        if self._importing >= limits.IMPORTS_MAX:
            raise Busy(f"{limits.IMPORTS_MAX} imports are under way already; try again", 5.0)
        self._importing += 1
        try:
            found, is_here = await asyncio.to_thread(self._proved, path, caller)
            record = found.export.record
            answer = {"run": record.run, "seq": record.seq, "digest": record.hash.hex(), "signer": found.signer}
            if is_here:
                await self._whole(record.run, caller)  # that it is there says nothing about how it is
                return {**answer, "status": "unchanged"}
            await put_on_record(self._engine.ledger, record, found.signer, caller.actor)
            return {**answer, "status": await asyncio.to_thread(self._insert, found)}
        finally:
            self._importing -= 1

    async def table(self, run: str, attempt: int | None, caller: Caller) -> Iterator[bytes]:
        """The run's table as JSON lines, in pieces to be read outside the event loop. Raises NotFound."""
        live = await self._whole(run, caller)
        pieces = table(self._journal, live.spec, live.run, attempt)
        # The first piece comes now: what is wrong about the request shall be an answer, and no broken stream.
        first = await asyncio.to_thread(next, pieces)
        return _behind(first, pieces)

    async def schedule(self, run: str, attempt: int | None, caller: Caller) -> dict[str, Any]:
        """The settings applied, as a static schedule. Raises NotFound, Invalid."""
        live = await self._whole(run, caller)
        return await asyncio.to_thread(schedule, self._journal, live.spec, live.run, attempt)

    async def _whole(self, run: str, caller: Caller) -> LiveRun:
        """The run; raises Damaged where it is, as a part of it would pass for all."""
        caller.check_run(VIEW, run)
        live = await self._engine.find(run)
        self._engine.damage.check(run)
        return live

    def signing_key(self, caller: Caller) -> dict[str, str]:
        """The public key that exports are signed with."""
        caller.check_role(VIEW)
        return {"public_key": pem(self._signer.public), "fingerprint": fingerprint(self._signer.public)}

    def _proved(self, path: Path, caller: Caller) -> tuple[Proved, bool]:
        """What is in the file, and whether it is all here already."""
        checked = check(path)
        if checked.verdict.problem or checked.export is None or checked.run is None:
            raise Invalid(f"the export is not right: {checked.verdict.problem}")
        record = checked.export.record
        if project_of(record.run) != record.project:  # access goes by the id, before anything is read
            raise Invalid(f"the export is not right: run {record.run!r} cannot be of project {record.project!r}")
        caller.check(OPERATE, record.project)
        return Proved(checked.export, checked.run, checked.signer), self._is_here(record)

    def _insert(self, proved: Proved) -> str:
        record = proved.export.record
        try:
            self._journal.insert(record, proved.run.segments())
        except Conflict:
            if not self._is_here(record):
                raise
            return "unchanged"
        _log.info("run %s imported (%d rows), signed by %s", record.run, record.seq, proved.signer)
        return "imported"

    def _is_here(self, record: RunRecord) -> bool:
        """Whether the very run is; raises Conflict where another one is, and Deleted where one was."""
        here = self._journal.record(record.run)
        if here is None:
            return False
        _refuse_deleted(self._journal, here)
        if (here.seq, here.hash) != (record.seq, record.hash):
            raise Conflict(_other(here, record))
        return True


def _refuse_deleted(journal: Journal, record: RunRecord) -> None:
    """What is left of a deleted run neither leaves nor is written over: raises Deleted, which tells who and why."""
    if record.status == DELETED:
        load(journal, rules_of, record.run)


def _other(here: RunRecord, record: RunRecord) -> str:
    return (
        f"run {record.run!r} is there already and another one: its newest row is {here.seq} with the hash "
        f"{here.hash.hex()}, the export's is {record.seq} with {record.hash.hex()}; nothing was changed"
    )


def _behind(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
