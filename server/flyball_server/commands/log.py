"""Commands read back from a run's journal: what was asked, by whom, and what really happened.

Rule of this module: it only reads; every line of a command's history is a row, and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flyball_server import records
from flyball_server.core import commands
from flyball_server.core.errors import NotFound
from flyball_server.core.steering import POLICY
from flyball_server.storage.audit import ASKED, Noted
from flyball_server.storage.journal import Journal, Row


class CommandView(NamedTuple):
    """A command or a proposal, with its history. status: proposed, accepted, clamped, applied, done, declined, expired,
    superseded, released, withdrawn, rejected or approved (a proposal; `command` is then the id of what came of it).

    at: when it was asked for. verdict: what the guard left of it, as learning rates per group and as what is held.
    applied: {"step", "ranks", "of_ranks"} of the receipt that confirmed it. history: one entry per row.
    clamped: whether the guard left less of it than was asked, whatever became of it since; clamped_to: what it left.
    """

    id: str
    run: str
    kind: str
    status: str
    seq: int
    actor: str
    reason: str
    at: str
    args: Mapping[str, Any]
    until_step: int | None
    expires_at: str | None
    verdict: Mapping[str, Any] | None
    applied: Mapping[str, Any] | None
    proposal: str
    command: str
    approvals: tuple[str, ...]
    needed: int
    history: tuple[Mapping[str, Any], ...]
    clamped: bool = False
    clamped_to: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        lasting = self.kind in commands.LASTING and self.status == "applied"
        return not lasting and self.status not in ("proposed", "accepted", "clamped")

    @property
    def settled(self) -> bool:
        """Whether it is applied, or over."""
        return self.over or self.status == "applied"


def commands_of(journal: Journal, run: str, groups: Sequence[str]) -> list[CommandView]:
    """All commands and proposals of a run with these groups, in the order of their rows."""
    return list(_followed(run, journal.audit.of(run), groups).values())


def command_of(journal: Journal, run: str, command: str, groups: Sequence[str]) -> CommandView:
    """One of them. Raises NotFound."""
    number = command[1:].partition(".")[0]
    if command[:1] in ("c", "p", "a") and number.isascii() and number.isdecimal() and 0 < int(number) < 2**53:
        found = _followed(run, journal.audit.of(run, after=int(number) - 1), groups).get(command)
        if found is not None:
            return found
    raise NotFound(f"run {run}: there is no command {command!r:.40}: `flyball commands {run}` lists them")


def _followed(run: str, noted: Iterator[Noted], groups: Sequence[str]) -> dict[str, CommandView]:
    found: dict[str, CommandView] = {}
    for _, _, row in noted:
        if _leaves_asks(row):
            found |= {one: _moot(view, row) for one, view in found.items() if view.actor == POLICY and not view.over}
        if row.kind == "commanded":
            view = _begun(run, row, groups)
            found[view.id] = view
            for one in (view.verdict or {}).get("superseded", ()):
                if one in found:
                    entry = _entry(row, "superseded", by=view.id)
                    found[one] = found[one]._replace(status="superseded", history=(*found[one].history, entry))
            if view.proposal in found:
                found[view.proposal] = found[view.proposal]._replace(command=view.id)
        elif row.kind == "proposed":
            found[f"p{row.seq}"] = _begun(run, row, groups)
        elif row.kind == ASKED:
            for i, ask in enumerate(row.meta["asks"]):
                found[f"a{row.seq}.{i}"] = _asked(run, row, i, ask)
        elif row.kind == "command_moved" and row.meta["command"] in found:
            found[row.meta["command"]] = _moved(found[row.meta["command"]], row)
        elif row.kind == "directive_answered" and row.meta["directive"] in found:
            found[row.meta["directive"]] = _answered(found[row.meta["directive"]], row)
        elif row.kind == "judged" and row.meta["proposal"] in found:
            found[row.meta["proposal"]] = _judged(found[row.meta["proposal"]], row)
    return found


def _leaves_asks(row: Row) -> bool:
    """Whether what the policy asked for before this row is done with: the run goes back, or has another policy."""
    if row.kind == "attached":
        return row.meta["restored"] is not None
    return row.kind == "commanded" and "carried" in (row.meta.get("verdict") or {})


def _moot(view: CommandView, row: Row) -> CommandView:
    return view._replace(status="superseded", history=(*view.history, _entry(row, "superseded")))


def _begun(run: str, row: Row, groups: Sequence[str]) -> CommandView:
    meta = row.meta
    is_command = row.kind == "commanded"
    verdict = meta.get("verdict")
    status = verdict["status"] if verdict else "proposed"
    clamped = status == "clamped"
    if meta["kind"] == "note":
        status = "done"
    args = {name: value for name, value in meta["args"].items() if name not in ("words", "clamped")}
    return CommandView(
        id=f"{'c' if is_command else 'p'}{row.seq}",
        run=run,
        kind=meta["kind"],
        status=status,
        seq=row.seq,
        actor=meta["actor"],
        reason=meta["reason"],
        at=records.utc(row.at),
        args=args,
        until_step=meta["until"],
        expires_at=None if meta["expires_at"] is None else records.utc(meta["expires_at"]),
        verdict=None if verdict is None else {k: v for k, v in verdict.items() if k != "status"} or None,
        applied=None,
        proposal=meta.get("proposal", ""),
        command="",
        approvals=(),
        needed=meta.get("needed", 0),
        history=(_entry(row, status),),
        clamped=clamped,
        clamped_to=commands.clamped_to(meta["args"], verdict.get("held"), groups) if verdict and clamped else "",
    )


def _asked(run: str, row: Row, place: int, ask: Any) -> CommandView:
    kind, args, reason = ask
    return CommandView(
        f"a{row.seq}.{place}", run, kind, "accepted", row.seq, POLICY, reason, records.utc(row.at), args, None, None,
        None, None, "", "", (), 0, (_entry(row, "accepted"),),
    )  # fmt: skip


def _moved(view: CommandView, row: Row) -> CommandView:
    meta, status = row.meta, row.meta["status"]
    more = {name: meta[name] for name in ("step", "note") if meta[name] not in (-1, "")}
    if status == "applied":
        more |= {"ranks": meta["ranks"], "of_ranks": meta["of_ranks"]}
        applied = {"step": meta["step"], "ranks": meta["ranks"], "of_ranks": meta["of_ranks"]}
        view = view._replace(applied=applied)
    return view._replace(status=status, history=(*view.history, _entry(row, status, **more)))


def _answered(view: CommandView, row: Row) -> CommandView:
    outcome = row.meta["outcome"]
    entry = _entry(row, outcome, note=row.meta["note"], step=row.meta.get("step", 0))
    return view._replace(status=outcome, history=(*view.history, entry))


def _judged(view: CommandView, row: Row) -> CommandView:
    verdict = row.meta["verdict"]
    view = view._replace(needed=max(view.needed, row.meta.get("needed", 0)))
    approvals = (*view.approvals, row.meta["actor"]) if verdict == "approved" else view.approvals
    done = verdict != "approved" or len(approvals) >= view.needed
    entry = _entry(row, verdict, actor=row.meta["actor"], reason=row.meta["reason"])
    status = verdict if done else "proposed"
    return view._replace(status=status, approvals=approvals, history=(*view.history, entry))


def _entry(row: Row, status: str, **more: Any) -> dict[str, Any]:
    return {"seq": row.seq, "at": records.utc(row.at), "actor": row.actor, "status": status, **more}
