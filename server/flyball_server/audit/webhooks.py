"""Webhooks: what happened to runs, told to other programs, signed.

Rule of this module: it costs training nothing. What is to be told is written with the rows that tell it, in the same
transaction, and sent by a task per hook, in order, as often as it takes; a receiver that is away, slow or hostile
delays its own deliveries only. A process that ends forgets nothing, and may send a delivery twice: its id says so.
docs/audit.md has the form of a delivery and how its signature is checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from flyball_server import limits, queries, records
from flyball_server.audit.hook_events import told
from flyball_server.audit.hook_files import Hook
from flyball_server.auth.access import ADMIN, Caller
from flyball_server.core import rng
from flyball_server.core.errors import Damaged, Invalid, SteeringError
from flyball_server.core.events import Event, Outcome
from flyball_server.core.run import Run
from flyball_server.names import project_of
from flyball_server.staleness import aged
from flyball_server.storage.journal import Heard, Journal, RunFilter, RunRecord, newest_news
from flyball_server.storage.outbox import DELIVERED, FAILED, PENDING, Delivery

_log = logging.getLogger("flyball_server")
#: Answers that say "not now"; other refusals are tried HOOK_REFUSED_TRIES times.
_LATER = frozenset({408, 425, 429})
#: The use of chance that spreads retries.
_JITTER = 1


class _Fact(NamedTuple):
    """What a delivery is made of. unique: what tells this event from the next of its kind and run."""

    event: str
    record: RunRecord
    seq: int
    unique: str
    at: int
    text: str
    data: Mapping[str, Any]


class Hooks:
    """The hooks of one service. All of it belongs to one event loop."""

    def __init__(self, hooks: Mapping[str, Hook], journal: Journal, now_us: Callable[[], int]) -> None:
        self._hooks = dict(hooks)
        self._journal = journal
        self._outbox = journal.outbox
        self._now_us = now_us
        self._wanted = frozenset().union(*(hook.events for hook in hooks.values()))
        self._wake = {name: asyncio.Event() for name in hooks}
        self._waiting: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._damaged: dict[str, str] = {}

    # -- what is to be told ----------------------------------------------------------------------------------

    def outgoing(
        self, record: RunRecord, before: Run, events: Sequence[Event], outcomes: Sequence[Outcome], at: int
    ) -> tuple[Delivery, ...]:
        """What the events, which are about to be written, have to tell. Never raises: no commit fails for it."""
        if not self._hooks:
            return ()
        try:
            facts = (
                _Fact(one.event, record, one.seq, f"{one.seq}.{one.place}", at, one.text, one.data)
                for one in told(before, events, outcomes)
            )
            return tuple(self._deliveries(facts))
        except Exception:
            _log.exception("what webhooks are to be told of run %s could not be said", record.run)
            return ()

    def added(self, deliveries: Iterable[Delivery]) -> None:
        """These are written."""
        for one in deliveries:
            self._wake[one.hook].set()

    def damaged(self, run: str, words: str) -> None:
        """A run was found damaged; the next sweep tells."""
        if "damaged" in self._wanted and len(self._damaged) < limits.HOOK_PENDING_MAX:
            self._damaged[run] = words

    def _deliveries(self, facts: Iterable[_Fact]) -> Iterator[Delivery]:
        for fact in facts:
            record = fact.record
            for hook in self._hooks.values():
                if not hook.wants(fact.event, record.project, record.labels):
                    continue
                if self._waiting.get(hook.name, 0) >= limits.HOOK_PENDING_MAX:
                    self._drop(hook.name)
                    continue
                self._waiting[hook.name] = self._waiting.get(hook.name, 0) + 1
                yield _delivery(hook, fact)

    def _drop(self, hook: str) -> None:
        if hook not in self._dropped:
            _log.warning("webhook %s: %d deliveries wait already; events are dropped", hook, limits.HOOK_PENDING_MAX)
        self._dropped[hook] = self._dropped.get(hook, 0) + 1

    # -- sending ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is pending and what comes, and look for runs that went silent; for as long as the service runs."""
        await self._forget_others()
        if not self._hooks:
            return
        # The system's certificates, and no proxy: what the environment says is for other programs.
        client = httpx.AsyncClient(
            verify=ssl.create_default_context(), follow_redirects=False, trust_env=False, timeout=limits.HOOK_TIMEOUT_S
        )
        async with client, asyncio.TaskGroup() as tasks:
            for hook in self._hooks.values():
                tasks.create_task(self._forever(lambda hook=hook: self._send_all(hook, client)))  # type: ignore[misc]
            tasks.create_task(self._forever(self._sweep))

    async def _forever(self, work: Callable[[], Any]) -> None:
        while True:
            try:
                await work()
            except SteeringError as error:  # a full store, say
                _log.warning("webhooks wait: %s", error)
                await asyncio.sleep(limits.HOOK_SWEEP_S)
            except Exception:
                _log.exception("webhooks failed; they go on")
                await asyncio.sleep(limits.HOOK_SWEEP_S)

    async def _send_all(self, hook: Hook, client: httpx.AsyncClient) -> None:
        wake = self._wake[hook.name]
        wake.clear()
        pending = await queries.in_thread(self._outbox.pending, hook.name, limits.HOOK_BATCH)
        if not pending:
            await wake.wait()
            return
        for delivery in pending:
            wait_s = (delivery.next_at - self._now_us()) / 1e6
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, limits.HOOK_BACKOFF_MAX_S))
            after = await self._send(hook, delivery, client)
            await queries.in_thread(self._outbox.settle, after)
            if after.status == PENDING:
                return  # what comes behind it waits, so that order is kept
            self._waiting[hook.name] = max(self._waiting.get(hook.name, 0) - 1, 0)

    async def _send(self, hook: Hook, delivery: Delivery, client: httpx.AsyncClient) -> Delivery:
        """Try once; what became of the delivery."""
        body = delivery.body.encode()
        timestamp = str(self._now_us() // 1_000_000)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "flyball",
            "Flyball-Id": delivery.id,
            "Flyball-Timestamp": timestamp,
            "Flyball-Signature": "sha256=" + signature(hook.secret.value, timestamp, body),
        }
        status, error = 0, ""
        try:
            async with asyncio.timeout(limits.HOOK_TIMEOUT_S):
                async with client.stream("POST", hook.url, content=body, headers=headers) as answer:
                    status = answer.status_code  # what else it says is not read
        except (TimeoutError, httpx.TimeoutException):
            error = f"no answer within {limits.HOOK_TIMEOUT_S:.0f} s"
        except (httpx.NetworkError, OSError) as found:
            error = f"{hook.place}: {type(found).__name__}: {found}"[:200]
        except (httpx.HTTPError, httpx.InvalidURL) as found:
            # Their words may quote what was sent, or what a receiver says back: the path of the address is secret.
            error = f"{hook.place}: {type(found).__name__}: its answer is no HTTP"
        return self._judged(delivery._replace(attempts=delivery.attempts + 1), status, error)

    def _judged(self, delivery: Delivery, status: int, error: str) -> Delivery:
        now = self._now_us()
        if 200 <= status < 300:
            return delivery._replace(status=DELIVERED, next_at=0, error="", done_at=now)
        error = error or f"answered {status}"
        refused = 300 <= status < 500 and status not in _LATER
        if (refused and delivery.attempts >= limits.HOOK_REFUSED_TRIES) or (
            now - delivery.at > limits.HOOK_GIVE_UP_S * 1e6
        ):
            _log.warning("webhook %s: delivery %s given up: %s", delivery.hook, delivery.id, error)
            return delivery._replace(status=FAILED, next_at=0, error=error, done_at=now)
        return delivery._replace(next_at=now + int(backoff_s(delivery) * 1e6), error=error)

    async def _forget_others(self) -> None:
        """Deliveries for hooks that are not named any more are over."""
        waiting = await queries.in_thread(self._outbox.waiting)
        self._waiting = {name: count for name, count in waiting.items() if name in self._hooks}
        for name in waiting.keys() - self._hooks.keys():
            while pending := await queries.in_thread(self._outbox.pending, name, limits.HOOK_BATCH):
                for one in pending:
                    over = one._replace(status=FAILED, error="no such webhook any more", done_at=self._now_us())
                    await queries.in_thread(self._outbox.settle, over)

    # -- what nobody commits ---------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Tell of runs that went silent, and of those found damaged."""
        await asyncio.sleep(limits.HOOK_SWEEP_S)
        await self._count()
        damaged, self._damaged = self._damaged, {}
        if not damaged and not self._wanted & {"stale", "lost"}:
            return
        facts = await queries.in_thread(self._silent_and_damaged, damaged)
        deliveries = list(self._deliveries(facts))
        try:
            await queries.in_thread(self._outbox.add, deliveries)
        except SteeringError:
            self._damaged = damaged | self._damaged
            raise
        await self._count()  # most of them were told before
        self.added(deliveries)

    async def _count(self) -> None:
        """What was counted as waiting may not have been written after all."""
        waiting = await queries.in_thread(self._outbox.waiting)
        self._waiting = {name: waiting.get(name, 0) for name in self._hooks}

    def _silent_and_damaged(self, damaged: Mapping[str, str]) -> list[_Fact]:
        now, facts = self._now_us(), []
        for run, words in damaged.items():
            unique = hashlib.sha256(words.encode()).hexdigest()
            facts.append(_Fact("damaged", _record(self._journal, run), 0, unique, now, words, {"problem": words}))
        for event in sorted(self._wanted & {"stale", "lost"}):
            where = aged(RunFilter(status=event), now)
            facts += self._silent(event, where, now)
        return facts

    def _silent(self, event: str, where: RunFilter, now: int) -> Iterator[_Fact]:
        after = None
        while page := self._journal.records(where, after=after, limit=limits.PAGE_MAX):
            heard = self._journal.heard([record.run for record in page])
            for record in page:
                news = newest_news(record, heard.get(record.run, Heard()))
                if now - news <= limits.HOOK_GIVE_UP_S * 1e6:  # what is older was told by whoever ran then
                    said = {"last_news": records.utc(news), "silent_s": (now - news) // 1_000_000}
                    text = f"{event}: nothing was heard of its job for {said['silent_s']} s"
                    yield _Fact(event, record, record.seq, str(news), now, text, said)
            after = (page[-1].created_at, page[-1].run)

    # -- looking ---------------------------------------------------------------------------------------------

    async def listed(
        self, hook: str | None, status: str | None, before: int | None, limit: int, caller: Caller
    ) -> dict[str, Any]:
        """A page of deliveries, newest first; `next` is the value of `before` for the page behind it, None at the end.
        Never a secret, a url or a body. For admins of the whole store."""
        caller.check_everywhere(ADMIN)
        if not 1 <= limit <= limits.DELIVERIES_MAX:
            raise Invalid(f"limit is {limit}: give 1 to {limits.DELIVERIES_MAX}")
        found = await queries.in_thread(self._outbox.newest, hook, status, before=before, limit=limit + 1)
        page = found[:limit]
        following = page[-1].number if len(found) > limit else None
        return {"deliveries": [_described(one) for one in page], "next": following, "dropped": dict(self._dropped)}


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """What proves a delivery: HMAC-SHA256 over the timestamp, a dot and the body."""
    return hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def backoff_s(delivery: Delivery) -> float:
    """How long to wait behind the newest attempt: doubling, up to a limit, spread over the upper half."""
    longest = min(limits.HOOK_BACKOFF_S * 2.0 ** min(delivery.attempts - 1, 30), limits.HOOK_BACKOFF_MAX_S)
    return longest * (0.5 + 0.5 * rng.uniform(int(delivery.id[:16], 16), _JITTER, delivery.attempts))


def _delivery(hook: Hook, fact: _Fact) -> Delivery:
    event, record, seq, unique, at, text, data = fact
    id_ = hashlib.sha256(f"{hook.name}\n{event}\n{record.run}\n{unique}".encode()).hexdigest()[:32]
    body = {
        **data, "id": id_, "event": event, "run": record.run, "project": record.project,
        "labels": dict(record.labels), "seq": seq, "at": records.utc(at), "text": text,
    }  # fmt: skip
    return Delivery(id_, hook.name, event, record.run, record.project, seq, at, json.dumps(body, allow_nan=False))


def _record(journal: Journal, run: str) -> RunRecord:
    """A damaged run's record, as far as it can be read."""
    try:
        found = journal.record(run)
    except Damaged:
        found = None
    if found is not None and found.status != "damaged":
        return found
    return RunRecord(run, project_of(run), run, "damaged", "", {}, 0, None, 0, 0, 0, b"")


def _described(one: Delivery) -> dict[str, Any]:
    names = ("id", "number", "hook", "event", "run", "project", "seq", "status", "attempts", "error")
    moments = {name: records.utc(at) if (at := getattr(one, name)) else None for name in ("next_at", "done_at")}
    return {**{name: getattr(one, name) for name in names}, "at": records.utc(one.at), **moments}
