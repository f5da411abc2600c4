"""Commands to many runs at once: tried in memory first, given to each run, told run by run.

Rule of this module: each run is asked by the same code as a single one, and what was asked of the fleet stands in the
store's own journal before the first run hears of it, with the runs that were meant. So a request that comes again under
its Idempotency-Key means the same runs, whatever they have become since, and commands none of them twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flyball_server import limits, queries
from flyball_server.auth.access import PROPOSE, Caller
from flyball_server.commands.checks import check_envelope
from flyball_server.commands.commanding import Commanding, Given
from flyball_server.core.errors import Invalid, KeyReused, NotFound, SteeringError
from flyball_server.engine import Engine
from flyball_server.fleet import many
from flyball_server.fleet.selector import Selector, parsed, selected
from flyball_server.messages import CommandRequest
from flyball_server.storage.journal import STORE, Journal, Row, RunRecord
from flyball_server.tail import Tail

#: The kinds of rows: what was asked and of which runs, and what came of it.
ASKED, DONE = "fleet", "fleet_done"


class FleetRequest(NamedTuple):
    """What somebody asks of the runs that a selector means. command: its `run` says nothing. key: see `Commanding`."""

    selector: str
    command: CommandRequest
    dry_run: bool = False
    key: str = ""


class Fleet:
    """The use cases over many runs of one store."""

    def __init__(self, engine: Engine, journal: Journal, commanding: Commanding, tail: Tail) -> None:
        self._engine = engine
        self._journal = journal
        self._commanding = commanding
        self._tail = tail
        #: Whose key: the content asked for under it, and the row of it.
        self._keys: OrderedDict[str, tuple[str, int]] = OrderedDict()
        tail.on(ASKED, self._learn)

    async def command(self, request: FleetRequest, caller: Caller) -> dict[str, Any]:
        """Give every selected run a command, or with `dry_run` tell what that would change.

        {"fleet": id or None, "selector", "dry_run", "matched", "counts": {status: n}, "results": [{"run", "status",
        "id", "clamped_to", "carried", "error", "code", "would"}]}. What one run refuses is its result. Raises Invalid,
        Denied, Conflict.
        """
        caller.check_role(PROPOSE)
        command = check_envelope(request.command)
        said = as_said(command)
        selector = parsed(request.selector)
        if request.dry_run:
            runs = [record.run for record in await self.select(selector, caller)]
            return await self._tried(selector.text, command, runs, caller)
        fleet, runs = await self._planned(selector, said, whose_key(caller, request.key), caller)
        command = command._replace(key=f"fleet:{fleet}")
        given = await many.each(runs, lambda run: self._commanding.give(command._replace(run=run), caller))
        results = [_result(run, found) for run, found in given.items()]
        counts = _counts(results)
        await self._engine.ledger.append(DONE, {"fleet": fleet, "counts": counts}, caller.actor)
        return _answer(selector.text, results, f"f{fleet}")

    async def select(self, selector: Selector, caller: Caller) -> list[RunRecord]:
        """The runs it means, of those the caller reaches, newest first. Raises Invalid beyond FLEET_MAX."""
        return await queries.in_thread(selected, self._journal, selector, caller, self._engine.now_us())

    async def give(self, request: CommandRequest, caller: Caller) -> tuple[str, str]:
        """Id and status of the command as one run has it."""
        view = (await self._commanding.give(request, caller)).view
        return view.id, view.status

    async def _tried(self, text: str, command: CommandRequest, runs: Sequence[str], caller: Caller) -> dict[str, Any]:
        found = await many.each(runs, lambda run: self._commanding.preview(command._replace(run=run), caller))
        results = [
            _refused(run, one)
            if isinstance(one, SteeringError)
            else _told(run, one.pop("status"), None, one.pop("clamped_to"), one.get("carried", ())) | {"would": one}
            for run, one in found.items()
        ]
        return _answer(text, results, None)

    async def _planned(
        self, selector: Selector, said: Mapping[str, Any], whose: str, caller: Caller
    ) -> tuple[int, list[str]]:
        """The row that says what is asked of which runs: this request's, or that of an earlier one with its key."""
        content = hashlib.sha256(json.dumps([selector.text, said], sort_keys=True).encode()).hexdigest()[:16]
        await self._tail.refresh()
        if whose not in self._keys:
            runs = [record.run for record in await self.select(selector, caller)]
            if not runs:
                raise NotFound(f"selector {selector.text!r:.100} means no run: `flyball runs` lists those there are")
            meta = {"selector": selector.text, "command": said, "runs": runs, "key": whose, "content": content}
            row = await self._engine.ledger.append(ASKED, meta, caller.actor)
            await self._tail.refresh()
            if not whose:
                return row.seq, runs
        known, seq = self._keys[whose]  # of two at once the first counts
        if known != content:
            raise KeyReused(f"this Idempotency-Key was used for another fleet command, f{seq}: take a new one")
        row_known = await queries.in_thread(queries.row, self._journal, STORE, seq)
        assert row_known is not None
        # Somebody's reach may have shrunk since: `give` checks every run again.
        return seq, list(row_known.meta["runs"])

    def _learn(self, row: Row) -> None:
        whose = row.meta["key"]
        if whose and whose not in self._keys:
            self._keys[whose] = row.meta["content"], row.seq
            if len(self._keys) > limits.FLEET_KEYS_KEPT:
                self._keys.popitem(last=False)


def as_said(command: CommandRequest) -> dict[str, Any]:
    """A command without its run, as the store's own journal holds it. Raises Invalid where that cannot be."""
    ends = {"expires_in_s": command.expires_in_s, "expires_at": command.expires_at}
    said = {name: value for name, value in ends.items() if value is not None}
    said = {"kind": command.kind, "reason": command.reason, **command.fields, **said}
    try:
        json.dumps(said, allow_nan=False)
    except ValueError:
        raise Invalid("command: a number in it is not finite: give one that is") from None
    return said


def whose_key(caller: Caller, key: str) -> str:
    """An idempotency key together with whose it is; "" where there is none. Raises Invalid."""
    if len(key) > limits.NAME_MAX:
        raise Invalid(f"Idempotency-Key has {len(key)} characters: give at most {limits.NAME_MAX}")
    return hashlib.sha256(f"{caller.actor}\n{key}".encode()).hexdigest() if key else ""


def _result(run: str, found: Given | SteeringError) -> dict[str, Any]:
    if isinstance(found, SteeringError):
        return _refused(run, found)
    view = found.view
    return _told(run, view.status, view.id, view.clamped_to, (view.verdict or {}).get("carried", ()))


def _refused(run: str, error: SteeringError) -> dict[str, Any]:
    return _told(run, "refused", None, "", ()) | {"error": str(error), "code": error.code}


def _told(run: str, status: str, id_: str | None, clamped_to: str, carried: Sequence[str]) -> dict[str, Any]:
    return {
        "run": run, "status": status, "id": id_, "clamped_to": clamped_to, "carried": list(carried), "error": None,
        "code": None, "would": None,
    }  # fmt: skip


def _counts(results: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(one["status"] for one in results).items()))


def _answer(selector: str, results: list[dict[str, Any]], fleet: str | None) -> dict[str, Any]:
    return {
        "fleet": fleet,
        "selector": selector,
        "dry_run": fleet is None,
        "matched": len(results),
        "counts": _counts(results),
        "results": results,
    }
