"""A freeze: every active run is on hold, and nobody gives commands, in the whole store or in one project, until a thaw.

Rule of this module: which runs are on hold for a freeze follows from the store's own journal alone. Whoever takes a
turn of a run puts right what differs: the request that freezes for every active run, an attach and a report for their
own. So it survives a crash in the middle, and holds for runs that come later and for other processes.

A project's operators may freeze the project: they could give each of its runs a hold anyway, and more takes an admin.
The hold covers what was overridden before, and ends with the freeze: the overrides go on then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flyball_server import limits, queries, records
from flyball_server.auth.access import ADMIN, OPERATE, VIEW, Caller
from flyball_server.core.errors import Conflict, Denied, Invalid, SteeringError
from flyball_server.core.events import Commanded, CommandMoved, Event
from flyball_server.deletion import check_reason
from flyball_server.engine import Engine
from flyball_server.fleet import many
from flyball_server.fleet.selector import every
from flyball_server.ledger import retried
from flyball_server.live import LiveRun
from flyball_server.names import NAME
from flyball_server.storage.journal import Journal, Row, RunFilter
from flyball_server.tail import Tail

#: The kinds of rows.
FROZEN, THAWED = "frozen", "thawed"
#: The least role that may freeze: what a row means that names none.
OPERATOR = "operator"
#: What may be commanded all the same: nothing of it moves a setting.
ALLOWED = ("note", "hold", "stop", "checkpoint")


class Freeze(NamedTuple):
    """A freeze that is in force, by its row. project: "" where it is everywhere. hash: the row's, which no other store
    has; so a hold that came with an import is known for what it is. role, reach: of whoever froze; reach None: all
    projects."""

    seq: int
    project: str
    actor: str
    at: int
    reason: str
    hash: str
    role: str
    reach: tuple[str, ...] | None


class Freezing:
    """The freezes of a store."""

    def __init__(self, engine: Engine, journal: Journal, tail: Tail) -> None:
        self._engine = engine
        self._journal = journal
        self._tail = tail
        self._frozen: dict[str, Freeze] = {}
        self._thawed: dict[str, tuple[str, str]] = {}
        tail.on(FROZEN, self._learn_frozen)
        tail.on(THAWED, self._learn_thawed)

    async def freeze(self, project: str, reason: str, caller: Caller) -> dict[str, Any]:
        """Freeze a project, or everything (""); the freeze, with how many runs are `held`, and those that `failed`,
        which follow with their next report.

        Raises Denied, Invalid, Conflict where it is frozen already.
        """
        reason = self._checked(project, reason, caller, "say why nothing may be steered now")
        await self._tail.refresh()
        self._check_not_yet(project)
        reach = None if caller.projects is None else sorted(caller.projects)
        meta = {"project": project, "reason": reason, "role": caller.role, "reach": reach}
        row = await self._engine.ledger.append(FROZEN, meta, caller.actor)
        await self._tail.refresh()
        mine = self._frozen.get(project)
        if mine is None or mine.seq != row.seq:  # somebody else was faster
            self._check_not_yet(project)
            raise Conflict("it was frozen and thawed by somebody else at the same time: look, then freeze again")
        return {**_described(mine), **await self._sweep(project)}

    async def thaw(self, project: str, reason: str, caller: Caller) -> dict[str, Any]:
        """End a freeze: the holds it gave are released, no others. Raises Invalid, Conflict where there is none, Denied
        where who froze has a higher role or reaches further."""
        reason = self._checked(project, reason, caller, "say why steering may go on")
        await self._tail.refresh()
        known = self._frozen.get(project)
        if known is None:
            others = ", ".join(sorted(f"project {one}" if one else "everything" for one in self._frozen))
            raise Conflict(
                f"{f'project {project}' if project else 'everything'} is not frozen"
                + (f"; what is: {others}" if others and caller.projects is None else "")
            )
        if not caller.may_undo(known.role, known.reach):
            whose = "all projects" if known.reach is None else "some projects"
            raise Denied(
                f"{known.actor} froze it, who is {known.role} of {whose}: {caller.actor} may not end that, as it takes "
                "at least that role and the same projects"
            )
        meta = {"freeze": known.seq, "project": project, "reason": reason}
        await self._engine.ledger.append(THAWED, meta, caller.actor)
        await self._tail.refresh()
        return {**_described(known), "thawed_by": caller.actor, **await self._sweep(project)}

    async def state(self, caller: Caller) -> list[dict[str, Any]]:
        """The freezes in force, as far as they concern the caller."""
        caller.check_role(VIEW)
        await self._tail.refresh()
        return [_described(one) for one in self._frozen.values() if not one.project or caller.reaches(one.project)]

    async def look(self) -> None:
        """Learn what other processes froze. Raises Busy and Damaged where nobody can know."""
        await self._tail.refresh()

    async def look_if_possible(self) -> None:
        """The same for a training job: what was known before counts where nobody can know."""
        await self._tail.refresh_if_possible()

    def check(self, kind: str, project: str) -> None:
        """Raise Conflict where commands of this kind have to wait for a thaw."""
        found = self._in_force(project)
        if found and kind not in ALLOWED:
            one = next(iter(found.values()))
            what, where = (f"project {one.project}", f" --project {one.project}") if one.project else ("everything", "")
            raise Conflict(
                f"{what} is frozen by {one.actor} since {records.utc(one.at)}: {one.reason}; thaw first "
                f"(`flyball thaw{where}`); until then there are {', '.join(ALLOWED)}"
            )

    async def keep(self, live: LiveRun) -> None:
        """Give the run the holds it lacks and release those that are over; mostly there is nothing to do. Call inside a
        turn."""
        if not self._frozen and not live.run.steering.commands:
            return
        for freeze in self._missing(live):
            args: dict[str, Any] = {"frozen": freeze.seq, "row": freeze.hash}
            hold = Commanded("hold", args, freeze.actor, f"frozen: {freeze.reason}")
            await self._engine.commit(live, [hold], freeze.actor)
        for command, row in await self._over(live):
            actor, reason = self._thawed.get(row, ("service", "the freeze is over, or was in another store"))
            args = {"command": command, "setting": "", "words": {"released": command}}
            release: list[Event] = [CommandMoved(command, "released"), Commanded("release", args, actor, reason)]
            await self._engine.commit(live, release, actor)

    def _missing(self, live: LiveRun) -> list[Freeze]:
        if not self._frozen or live.run.status != "active":
            return []
        held = {command.args.get("row") for command in live.run.steering.commands if "frozen" in command.args}
        return [freeze for row, freeze in self._in_force(live.spec.project).items() if row not in held]

    async def _over(self, live: LiveRun) -> list[tuple[str, str]]:
        """What is held for a freeze that is not in force here. One that is newer than what was read may be, and is
        looked for first: holds follow a durable freeze, so what is not found then never was in this store."""
        if live.run.status != "active":
            return []
        force = self._in_force(live.spec.project)
        held = [c for c in live.run.steering.commands if "frozen" in c.args and c.args.get("row", "") not in force]
        if any(command.args["frozen"] > self._tail.seq for command in held):
            try:
                await self._tail.refresh()
            except SteeringError:  # nobody can know now
                held = [command for command in held if command.args["frozen"] <= self._tail.seq]
            force = self._in_force(live.spec.project)
        return [(c.id, c.args.get("row", "")) for c in held if c.args.get("row", "") not in force]

    def _in_force(self, project: str) -> Mapping[str, Freeze]:
        found = (self._frozen.get(""), self._frozen.get(project))
        return {one.hash: one for one in found if one is not None}

    async def _sweep(self, project: str) -> dict[str, Any]:
        """Put right every active run of the project, or every one; how many are on hold now, and those that failed."""
        where = RunFilter(project=project or None, status="active")
        active = await queries.in_thread(lambda: [record.run for record in every(self._journal, where)])
        done = await many.each(active, self._put_right)
        failed = [_failed(run, found) for run, found in done.items() if isinstance(found, SteeringError)]
        return {"held": sum(found is True for found in done.values()), "failed": failed}

    async def _put_right(self, run: str) -> bool:
        async def once() -> bool:
            live = await self._engine.whole(run)
            async with self._engine.turn(live):
                await self.keep(live)
                return any("frozen" in command.args for command in live.run.steering.commands)

        return await retried(once)

    def _checked(self, project: str, reason: str, caller: Caller, why: str) -> str:
        if not project:
            caller.check_everywhere(ADMIN)
        else:
            if len(project) > limits.NAME_MAX or not NAME.fullmatch(project):
                raise Invalid(f"project is {project!r:.60}: give a project's name, or leave it out for everything")
            caller.check(OPERATE, project)
        if not reason.strip():
            raise Invalid(f"reason is empty: {why}; it stays in the store's journal")
        return check_reason(reason)

    def _check_not_yet(self, project: str) -> None:
        known = self._frozen.get(project)
        if known is not None:
            raise Conflict(
                f"{f'project {project}' if project else 'everything'} is frozen already, by {known.actor} since "
                f"{records.utc(known.at)}: {known.reason}"
            )

    def _learn_frozen(self, row: Row) -> None:
        project = row.meta["project"]
        if project not in self._frozen:  # of two at once the first counts
            reach = row.meta.get("reach", (project,) if project else None)
            self._frozen[project] = Freeze(
                row.seq, project, row.actor, row.at, row.meta["reason"], row.hash.hex(), row.meta.get("role", OPERATOR),
                None if reach is None else tuple(reach),
            )  # fmt: skip

    def _learn_thawed(self, row: Row) -> None:
        known = self._frozen.get(row.meta["project"])
        if known is not None and known.seq == row.meta["freeze"]:
            del self._frozen[row.meta["project"]]
            self._thawed[known.hash] = row.actor, f"thawed: {row.meta['reason']}"
            if len(self._thawed) > limits.THAWS_KEPT:
                del self._thawed[next(iter(self._thawed))]


def _described(freeze: Freeze) -> dict[str, Any]:
    told = {name: getattr(freeze, name) for name in ("seq", "actor", "reason")}
    return {**told, "project": freeze.project or None, "at": records.utc(freeze.at)}


def _failed(run: str, error: SteeringError) -> dict[str, str]:
    return {"run": run, "error": str(error), "code": error.code}
