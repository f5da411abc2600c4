"""The REST SDK: what the service knows about runs, from any Python program.

    with flyball.api.Client() as client:
        for run in client.runs(status="active"):
            print(run["run"], run["step"])

Rule of this module: one method per route and no state but the connection. What comes back is the service's own JSON, as
dicts and lists; only the numbers in it that JSON cannot carry (NaN, the infinities) are made floats again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import IO, Any
from urllib.parse import quote

from flyball.api_audit import Record
from flyball.api_commands import Commands
from flyball.api_commands import run_path as _path
from flyball.api_connection import EXCHANGE_S
from flyball.errors import LinkError
from flyball.tables import Table

#: Runs and decisions asked for in one request; more come in further ones.
RUNS_PAGE = 200
DECISIONS_PAGE = 1000


class Client(Commands, Record):
    """The routes of one service; those about commands stand in `api_commands`, those of the record in `api_audit`. How
    to make one, and what its methods raise: see `api_connection.Connection`."""

    def runs(
        self,
        *,
        project: str | None = None,
        status: str | None = None,
        policy: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """All runs that match, newest first. status: created, active, stale, lost, finished, failed or deleted (those
        only then); policy: a name (`windowed`) or one version of it (`windowed@1`); labels: all must match."""
        where: dict[str, Any] = {"project": project, "status": status, "policy": policy, "limit": RUNS_PAGE}
        where["label"] = [f"{key}={value}" for key, value in (labels or {}).items()]
        while True:
            page = self._get("/v1/runs", where)
            yield from page["runs"]
            if not page["cursor"]:
                return
            where["cursor"] = page["cursor"]

    def run(self, run: str) -> dict[str, Any]:
        """One run: status, attempt, step, settings now, newest signals, policy, staleness."""
        found = self._get(_path(run))
        found["signals"] = {name: _number(value) for name, value in found["signals"].items()}
        for group in found["settings"]:
            group["applied_lr"] = _number(group["applied_lr"])
        return found

    def series(
        self,
        run: str,
        signals: Iterable[str] = ("loss",),
        *,
        points: int = 2000,
        from_step: int | None = None,
        to_step: int | None = None,
        attempt: int | None = None,
    ) -> dict[str, Any]:
        """{"run", "attempt", "series": {name: {"step": [...], "value": [...]}}}, each of at most `points` points.

        signals: `loss` and the like by name; `lr:GROUP`, `momentum:GROUP` as applied, `decided_lr:GROUP` as decided.
        from_step, to_step: both included. attempt: whose line of steps; the newest without it.
        """
        names = [signals] if isinstance(signals, str) else signals
        asked = {"signals": ",".join(names), "points": points, "from": from_step, "to": to_step, "attempt": attempt}
        found = self._get(_path(run, "series"), asked)
        for one in found["series"].values():
            one["value"] = [_number(value) for value in one["value"]]
        return found

    def decisions(self, run: str) -> Iterator[dict[str, Any]]:
        """The decisions that moved something, oldest first, with code, reason and the numbers they rest on."""
        after: int | None = 0
        while after is not None:
            page = self._get(_path(run, "decisions"), {"after": after, "limit": DECISIONS_PAGE})
            yield from page["decisions"]
            after = page["next"]

    def newest_decisions(self, run: str, limit: int) -> list[dict[str, Any]]:
        """The last `limit` of them, oldest first."""
        page = self._get(_path(run, "decisions"), {"newest": True, "limit": limit})
        return list(page["decisions"])

    def fork(
        self,
        run: str,
        name: str,
        *,
        step: int | None = None,
        attempt: int | None = None,
        policy: str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Begin the run `name` as a fork of `run` at `step` (None: behind its newest), on the line of `attempt` (None:
        the newest); the new run. Its job loads the checkpoint of that step and attaches with `resume=True`.

        Without a policy it goes on under the other run's, in the state of then. options: project, base, guard, labels,
        seed, shadows, as in `attach`; what is not given is the other run's.
        """
        body = {"name": name, "step": step, "attempt": attempt, "policy": _policy(policy), **options}
        return self._answer("POST", _path(run, "fork"), body={k: v for k, v in body.items() if v is not None})

    def lineage(self, run: str) -> dict[str, Any]:
        """{"run", "ancestors", "forks", "attempts"}: where a run comes from, what left it, its attempts, their gaps."""
        return self._get(_path(run, "lineage"))

    def what_if(self, run: str, policy: str | Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """What another policy would have decided on the signals that `run` recorded, beside what was decided.

        {"run", "policy", "summary", "series", "decisions"}. options: base, guard, seed (the run's own without),
        attempt, points, limit.
        """
        return self._answer("POST", _path(run, "what-if"), body={"policy": _policy(policy), **options})

    def policies(self) -> dict[str, Any]:
        """{"policies": [...], "base_schedules": [...]}: name, summary and the JSON Schema of the parameters of each."""
        return self._get("/v1/policies")

    def report(
        self,
        run: str,
        signals: Mapping[str, float] | None = None,
        /,
        *,
        note: str = "",
        source: str = "",
        number: int | None = None,
        **named: float,
    ) -> int:
        """Give a run signals from here, such as `val_loss=0.31` of an evaluation job, or `{"val/loss": 0.31}`; its
        policy sees them with the next step. Returns the number of the journal's newest row.

        note: words for the record. source: who reports; of a source each number is taken once, and only above its last,
        so that such a report is sent again where the connection was lost. number: without one, the time in us.
        """
        values = {name: _jsonable(float(value)) for name, value in {**(signals or {}), **named}.items()}
        body: dict[str, Any] = {"signals": values}
        if note:
            body["note"] = note
        if source:
            body |= {"source": source, "number": time.time_ns() // 1000 if number is None else number}
        path = _path(run, "signals")
        try:
            return int(self._answer("POST", path, body=body)["seq"])
        except LinkError as error:
            if not source or not self._is_lost(error):
                raise
            return int(self._answer("POST", path, body=body)["seq"])

    def delete(self, run: str, *, reason: str) -> dict[str, Any]:
        """Delete a run for good; its name is not used again. Returns what is left of it: when, by whom, the reason, how
        much it was. Refused for a run that is still being trained."""
        return self._answer("DELETE", _path(run), parameters={"reason": reason})

    def tombstones(self) -> Iterator[dict[str, Any]]:
        """What is left of the deleted runs, oldest first."""
        after: int | None = 0
        while after is not None:
            page = self._get("/v1/tombstones", {"after": after})
            yield from page["tombstones"]
            after = page["next"]

    def store(self) -> dict[str, Any]:
        """What the store takes and may take: bytes, bytes_max, disk_free, disk_free_min, state, and words what to do
        where that is not "ok"."""
        return self._get("/v1/store")

    def export(self, run: str, file: IO[bytes]) -> None:
        """Write a run's export file: its whole journal, signed. `flyball-server verify FILE` checks it, and
        `import_run` gives it to another service."""
        with self._streamed(_path(run, "export"), {}) as answer:
            for piece in answer.iter_bytes():
                file.write(piece)

    def import_run(self, file: IO[bytes]) -> dict[str, Any]:
        """Give the service the run in an export file. {"run", "status", "seq", "digest", "signer"}; status: "imported",
        or "unchanged" where the very same run is there already."""
        headers = {"Content-Type": "application/octet-stream"}
        return self._answer("POST", "/v1/import", content=file, headers=headers, timeout=EXCHANGE_S)

    @contextmanager
    def table(self, run: str, *, attempt: int | None = None) -> Iterator[Table]:
        """Every step of an attempt's line (the newest without it), in full resolution: `with client.table(run) as
        table: table.columns`, and iterating over it gives one list per step, None where there is nothing."""
        with self._streamed(_path(run, "table"), {"attempt": attempt}) as answer:
            lines = answer.iter_lines()
            try:
                head = json.loads(next(lines, ""))
                columns = tuple(head["columns"])
            except (ValueError, KeyError, TypeError) as error:
                raise LinkError(f"{self.server} answered with no table: check the address") from error
            yield Table(head["run"], head["attempt"], columns, (_numbers(json.loads(line)) for line in lines))

    def schedule(self, run: str, *, attempt: int | None = None) -> dict[str, Any]:
        """The learning rates that were applied on an attempt's line: {"run", "attempt", "steps", "groups": {name:
        {"reference_lr", "from_step": [...], "lr": [...]}}}, with "momentum" where that was steered."""
        asked = {} if attempt is None else {"attempt": attempt}
        found = self._answer("GET", _path(run, "schedule"), parameters=asked, timeout=EXCHANGE_S)
        for group in found["groups"].values():
            for kind in group.keys() & {"lr", "momentum"}:
                group[kind] = _numbers(group[kind])
        return found

    def signing_key(self) -> dict[str, Any]:
        """{"public_key": PEM, "fingerprint"} of the key that the service signs exports with."""
        return self._get("/v1/signing-key")

    def create_token(
        self, name: str, role: str, *, projects: Iterable[str] | None, expires_in_s: int | None = None
    ) -> dict[str, Any]:
        """Make a token, which reaches these projects (None: all). Its `secret` is in this answer and never again."""
        reach = None if projects is None else list(projects)
        body = {"name": name, "role": role, "projects": reach, "expires_in_s": expires_in_s}
        return self._answer("POST", "/v1/tokens", body=body)

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens, oldest first, expired and revoked ones included; never a secret."""
        return list(self._get("/v1/tokens")["tokens"])

    def revoke_token(self, token: str, *, reason: str) -> dict[str, Any]:
        """Revoke a token (its id) for good: within a second it opens nothing any more."""
        return self._answer("DELETE", f"/v1/tokens/{quote(token, safe='')}", parameters={"reason": reason})


def _policy(policy: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return {"type": policy} if isinstance(policy, str) else policy


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value


def _numbers(values: Iterable[float | str | None]) -> list[float | None]:
    return [float(value) if isinstance(value, str) else value for value in values]


def _jsonable(value: float) -> float | str:
    """JSON has no NaN: non-finite numbers travel as strings."""
    if isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
