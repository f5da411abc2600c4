"""Who asks, and what they may do: roles, rights, and the projects they reach.

Rule of this module: one check for both skins. What lies outside a caller's projects does not exist for them: the answer
is the very one for a run that nobody ever began.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from flyball_server.core.errors import Denied, NotFound
from flyball_server.names import is_run_id, project_of

#: What may be asked for, and the roles that may. A driver may not propose, and a proposer not drive: who took a run
#: over could end it, or take it back, without anybody's approval.
VIEW = "view"  #: look at runs
REPORT = "report"  #: add signals and notes to a run
DRIVE = "drive"  #: be a run's training job: attach, report, fork
PROPOSE = "propose"  #: propose a command, for somebody else to approve
OPERATE = "operate"  #: give commands, approve and reject proposals, import
ADMIN = "administer"  #: tokens, freeze, deleting runs, what concerns the whole store

_RIGHTS = {
    "viewer": (VIEW,),
    "reporter": (VIEW, REPORT),
    "driver": (VIEW, REPORT, DRIVE),
    "proposer": (VIEW, REPORT, PROPOSE),
    "operator": (VIEW, REPORT, DRIVE, PROPOSE, OPERATE),
    "admin": (VIEW, REPORT, DRIVE, PROPOSE, OPERATE, ADMIN),
}
ROLES = tuple(_RIGHTS)


class Caller(NamedTuple):
    """Whoever asks. actor: for the record; role: one of ROLES; projects: those they reach, None: all."""

    actor: str
    role: str
    projects: frozenset[str] | None = None

    def reaches(self, project: str) -> bool:
        """Whether the project lies in the caller's scope."""
        return self.projects is None or project in self.projects

    def may(self, right: str) -> bool:
        """Whether the caller's role has the right."""
        return right in _RIGHTS[self.role]

    def check(self, right: str, project: str, run: str = "") -> None:
        """Raise Denied where the role does not suffice, NotFound where the project is out of reach.

        The role comes first: what it answers is the same for every project. run: the id of the run that is asked for,
        where it is one; the answer about it is that of an unknown run.
        """
        self.check_role(right)
        if not self.reaches(project):
            raise unknown_run(run) if run else unknown_project(project)

    def check_run(self, right: str, run: str) -> None:
        """`check` of a run by its id, before anybody looks whether there is one; what is no id is an unknown run."""
        self.check_role(right)
        if not is_run_id(run):
            raise unknown_run(run)
        self.check(right, project_of(run), run)

    def check_role(self, right: str) -> None:
        """Raise Denied where the role does not suffice, whatever the project."""
        if not self.may(right):
            wanted = ", ".join(role for role, rights in _RIGHTS.items() if right in rights)
            raise Denied(f"{self.actor} is {self.role} and may not {right}: that takes one of the roles {wanted}")

    def may_undo(self, role: str, projects: Collection[str] | None) -> bool:
        """Whether the caller's role and reach are at least these."""
        reaches = self.projects is None or (projects is not None and self.projects.issuperset(projects))
        return reaches and ROLES.index(self.role) >= ROLES.index(role)

    def check_everywhere(self, right: str) -> None:
        """For what concerns the whole store: raise Denied where the role does not suffice or only for some projects."""
        self.check_role(right)
        if self.projects is not None:
            raise Denied(f"{self.actor} may {right} in {', '.join(sorted(self.projects))} only, and this concerns all")


def unknown_project(project: str) -> NotFound:
    """The answer about a project out of reach, whether or not there is anything in it."""
    return NotFound(f"project {project!r:.60} is not known to your token: an admin can give you one that reaches it")


def unknown_run(run: str) -> NotFound:
    """The answer about a run that is not known, or not to this caller."""
    return NotFound(f"run {run!r:.300} is not known: `flyball runs` lists those that are")
