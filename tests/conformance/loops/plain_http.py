"""A loop that knows nothing of Flyball's client: JSON over HTTP, as any language can send it (docs/wire.md)."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.conformance.loop import Trained

from flyball.status import Status

CANNOT = {
    "grpc": "it speaks HTTP and nothing else",
    "meddle": "the learning rate is a variable of the loop, which nobody else can write",
    "after_close": "there is no optimizer that could be let go of",
}
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def train(
    trace: Sequence[float],
    options: Mapping[str, Any],
    *,
    before: Callable[[int], None] = lambda i: None,
    meddle_at: int | None = None,
) -> Trained:
    """See `tests.conformance.loop.Loop`."""
    job = Job(options)
    used: list[tuple[float, ...]] = []
    for i, value in enumerate(trace):
        before(i)
        used.append(job.lr)
        job.step(value, last=i == len(trace) - 1)
    return Trained(used, job.token(), job.status())


class Job:
    """What such a loop has to keep: what holds, and what was not acknowledged."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._server, self._run, self._session = options["server"], options["run"], uuid.uuid4().hex
        self.lr: tuple[float, ...] = (0.1, 0.01)
        self._decided, self._used = -1, ()
        self._waiting: list[tuple[int, Any]] = []
        self._receipts: list[dict[str, Any]] = []
        self._number = self._missed = 0
        self._newest: dict[str, Any] = {"attempt": None, "through": -1, "seq": 0, "digest": ""}
        token = options.get("resume") or {}
        self._step = token.get("step", 0)
        groups = [{"name": name, "lr": lr} for name, lr in zip(("body", "head"), self.lr, strict=True)]
        body = {"run": self._run, "session": self._session, "groups": groups, "policy": options["policy"]}
        if token:
            body |= {"resume": True, "from_step": token["step"], "from_attempt": token["attempt"]}
            body |= {"seq": token["seq"], "digest": token["digest"]}
        self._hear(self._post("/v1/attach", {**body, "lag": options.get("lag")}))

    def step(self, loss: float, *, last: bool) -> None:
        """Report a step, and take over what holds for the next one."""
        if self.lr != self._used:
            self._used, self._number = self.lr, self._number + 1
            receipt = {"number": self._number, "step": self._step, "decided": self._decided, "lr": self.lr}
            self._receipts.append(receipt)
        self._waiting.append((self._step, loss if math.isfinite(loss) else _in_words(loss)))
        self._step += 1
        report = {"session": self._session, "attempt": self._newest["attempt"], "receipts": self._receipts}
        report |= {
            "step": [step for step, _ in self._waiting],
            "signals": {"loss": [value for _, value in self._waiting]},
        }
        self._hear(self._post(f"/v1/runs/{self._run}/report", {**report, "end": "finished" if last else ""}))

    def token(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        newest = {name: self._newest[name] for name in ("attempt", "seq", "digest")}
        return {"run": self._run, "project": "default", "step": self._step, **newest}

    def status(self) -> Status:
        """In the words of the client."""
        return Status(
            run=self._run, state="away" if self._missed else "steering", attempt=self._newest["attempt"],
            step=self._step, through=self._newest["through"], waiting=len(self._waiting), dropped=0,
            outage=bool(self._missed), circuit_open=bool(self._missed), stale_s=None, settings=None, decision="",
            reason="", last_error="", bad_values=0, skipped=0, missed=self._missed, conflicts=0, should_stop=False,
            stop_reason="", added_us=0.0, waited_s=0.0,
        )  # fmt: skip

    def _hear(self, answer: dict[str, Any] | None) -> None:
        if answer is None:
            self._missed = 1  # from then on nothing was waited for
            return
        self._newest = answer
        self._waiting = [one for one in self._waiting if one[0] > answer["through"]]
        self._receipts = [one for one in self._receipts if one["number"] > answer["receipts_through"]]
        changes = answer["changes"]
        if changes["decided"]:
            self.lr, self._decided = tuple(changes["lr"][-1]), changes["decided"][-1]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None where there is none, and training goes on."""
        data = json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(self._server + path, data, {"Content-Type": "application/json"})
        try:
            with _WITHOUT_PROXY.open(request, timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error
        except OSError:
            return None


def _in_words(value: float) -> str:
    """JSON has no such numbers."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
