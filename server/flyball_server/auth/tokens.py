"""Tokens: who was given access, and to what, as rows of the store's own journal.

Rule of this module: a secret is shown once, to whoever made the token, and only its sha256 is kept. It is 32 random
bytes, which nobody finds by trying, so the hash need not be slow: slow hashes are for what people think up.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from flyball_server import limits, records
from flyball_server.auth.access import ADMIN, ROLES, Caller
from flyball_server.core.errors import Conflict, Denied, Invalid, NotFound
from flyball_server.deletion import check_reason
from flyball_server.ledger import Ledger
from flyball_server.names import NAME
from flyball_server.storage.journal import Row
from flyball_server.tail import Tail

#: The kinds of rows.
CREATED, REVOKED = "token_created", "token_revoked"
#: What a secret begins with, so that scanners of code and logs know one.
PREFIX = "fb_"
SECRET_BYTES = 32
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Token(NamedTuple):
    """A token, by its row `seq`. projects: those it reaches, None: all. Times are microseconds since 1970 UTC."""

    seq: int
    name: str
    role: str
    projects: frozenset[str] | None
    created_at: int
    created_by: str
    expires_at: int | None
    digest: str
    revoked_at: int | None = None
    revoked_by: str = ""
    reason: str = ""

    @property
    def id(self) -> str:
        """What people call it by."""
        return f"t{self.seq}"

    @property
    def caller(self) -> Caller:
        """Whoever holds it."""
        return Caller(f"token:{self.id} {self.name}", self.role, self.projects)

    def status(self, now: int) -> str:
        """valid, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "valid" if self.expires_at is None or now < self.expires_at else "expired"


class Tokens:
    """All tokens of a store, and the use cases about them. chance: so many random bytes."""

    def __init__(self, ledger: Ledger, tail: Tail, now_us: Callable[[], int], chance: Callable[[int], bytes]) -> None:
        self._ledger = ledger
        self._now_us = now_us
        self._chance = chance
        #: Learn what was written since, here or by another process. Raises Busy, and Damaged where rows are.
        self.refresh = tail.refresh
        tail.on(CREATED, self._learn)
        tail.on(REVOKED, self._learn)
        self._by_seq: dict[int, Token] = {}
        self._by_digest: dict[str, int] = {}

    def find(self, secret: str) -> tuple[Token | None, str]:
        """The valid token of this secret, or None and why not, for the record (the caller is not told)."""
        digest = digest_of(secret)
        token = self._by_seq.get(self._by_digest.get(digest, 0))
        # What is compared are hashes, of which nobody chooses the first bytes; and no comparison ends early.
        if token is None or not hmac.compare_digest(token.digest, digest):
            return None, "unknown token"
        status = token.status(self._now_us())
        return (token, "") if status == "valid" else (None, f"{status} token {token.id}")

    def lapsed(self, actor: str) -> str:
        """Why what an actor asked for is not done in their name any more; "" where their token is valid, or they never
        had one."""
        token = self.of(actor)
        status = "valid" if token is None else token.status(self._now_us())
        return "" if token is None or status == "valid" else f"token {token.id} of {actor} is {status}"

    def makers(self, actor: str) -> list[str]:
        """Who made the token of this actor, who made theirs, and so on; [] for who has none."""
        found: list[str] = []
        while (token := self.of(actor)) is not None:
            actor = token.created_by
            found.append(actor)
        return found

    def of(self, actor: str) -> Token | None:
        """The token that an actor is named after; None for who has none."""
        number = re.match(r"token:t([0-9]{1,15}) ", actor)
        token = None if number is None else self._by_seq.get(int(number[1]))
        return token if token is not None and token.caller.actor == actor else None

    def any_valid(self) -> bool:
        """Whether there is a token that opens anything."""
        now = self._now_us()
        return any(token.status(now) == "valid" for token in self._by_seq.values())

    async def create(
        self, name: str, role: str, projects: Collection[str] | None, expires_in_s: int | None, caller: Caller
    ) -> dict[str, Any]:
        """Make a token; what `listed` tells of it, and the `secret`, which is told never again.

        Raises Invalid, and Denied where it would reach further than its maker does.
        """
        caller.check_role(ADMIN)
        _check(name, role, projects, expires_in_s)
        if caller.projects is not None and (projects is None or not caller.projects.issuperset(projects)):
            raise Denied(
                f"{caller.actor} reaches {', '.join(sorted(caller.projects))} only: name some of these projects"
            )
        await self.refresh()
        now = self._now_us()
        if sum(token.status(now) == "valid" for token in self._by_seq.values()) >= limits.TOKENS_MAX:
            raise Conflict(f"{limits.TOKENS_MAX} tokens are valid: revoke those that nobody uses")
        secret = PREFIX + urlsafe_b64encode(self._chance(SECRET_BYTES)).rstrip(b"=").decode()
        meta = {
            "name": name,
            "role": role,
            "projects": None if projects is None else sorted(set(projects)),
            "expires_at": None if expires_in_s is None else now + expires_in_s * 1_000_000,
            "sha256": digest_of(secret),
        }
        row = await self._ledger.append(CREATED, meta, caller.actor)
        await self.refresh()
        return {**self._described(self._by_seq[row.seq]), "secret": secret}

    async def revoke(self, token_id: str, reason: str, caller: Caller) -> dict[str, Any]:
        """Take a token back for good; what `listed` tells of it. Raises NotFound, Invalid, Conflict where it was."""
        caller.check_role(ADMIN)
        reason = check_reason(reason, "say why the token is revoked")
        await self.refresh()
        known = {token.id: token for token in self._seen_by(caller)}
        if token_id not in known:
            raise NotFound(f"token {token_id!r:.40} is not known: `flyball-server token list` lists those that are")
        token = known[token_id]
        if token.revoked_at is not None:
            raise Conflict(f"token {token_id} was revoked at {records.utc(token.revoked_at)} by {token.revoked_by}")
        await self._ledger.append(REVOKED, {"token": token.seq, "reason": reason}, caller.actor)
        await self.refresh()
        return self._described(self._by_seq[token.seq])

    async def listed(self, caller: Caller) -> list[dict[str, Any]]:
        """The tokens that reach no further than the caller does, oldest first; never a secret."""
        caller.check_role(ADMIN)
        await self.refresh()
        return [self._described(token) for token in self._seen_by(caller)]

    def _seen_by(self, caller: Caller) -> list[Token]:
        reach = caller.projects
        tokens = self._by_seq.values()
        return [t for t in tokens if reach is None or (t.projects is not None and reach.issuperset(t.projects))]

    def _described(self, token: Token) -> dict[str, Any]:
        return {
            "id": token.id,
            "name": token.name,
            "role": token.role,
            "projects": None if token.projects is None else sorted(token.projects),
            "status": token.status(self._now_us()),
            "created_at": records.utc(token.created_at),
            "created_by": token.created_by,
            "expires_at": None if token.expires_at is None else records.utc(token.expires_at),
            "revoked_at": None if token.revoked_at is None else records.utc(token.revoked_at),
            "revoked_by": token.revoked_by,
            "reason": token.reason,
        }

    def _learn(self, row: Row) -> None:
        meta = row.meta
        if row.kind == CREATED:
            projects = None if meta["projects"] is None else frozenset(meta["projects"])
            self._by_seq[row.seq] = Token(
                row.seq, meta["name"], meta["role"], projects, row.at, row.actor, meta["expires_at"], meta["sha256"]
            )
            self._by_digest[meta["sha256"]] = row.seq
        elif row.kind == REVOKED and (token := self._by_seq.get(meta["token"])) and token.revoked_at is None:
            self._by_seq[token.seq] = token._replace(revoked_at=row.at, revoked_by=row.actor, reason=meta["reason"])


def digest_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def seconds_of(text: str) -> int:
    """A span of time such as 12h, 30d or 8w, in seconds. Raises Invalid."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", text.strip())
    if found is None:
        raise Invalid(f"expires is {text!r:.40}: give a number and one of s, m, h, d, w, such as 12h or 30d")
    return int(found[1]) * _UNITS[found[2]]


def _check(name: str, role: str, projects: Collection[str] | None, expires_in_s: int | None) -> None:
    """Raise Invalid where no token can be like this."""
    if role not in ROLES:
        raise Invalid(f"role is {role!r:.40}: give one of {', '.join(ROLES)}")
    if projects is not None and not 1 <= len(projects) <= limits.TOKEN_PROJECTS_MAX:
        raise Invalid(
            f"projects has {len(projects)} names: give 1 to {limits.TOKEN_PROJECTS_MAX}, or none at all for all"
        )
    for field, value in (("name", name), *(("projects", project) for project in projects or ())):
        if len(value) > limits.NAME_MAX or not NAME.fullmatch(value):
            raise Invalid(
                f"{field} is {value!r:.60}: use 1 to {limits.NAME_MAX} letters, digits, '.', '_' or '-', beginning "
                "with a letter or digit"
            )
    if expires_in_s is not None and not 1 <= expires_in_s <= limits.TOKEN_LIFE_MAX_S:
        raise Invalid(f"expires_in_s is {expires_in_s}: give 1 to {limits.TOKEN_LIFE_MAX_S} seconds, or none: never")
