"""Goal: receivers hear of what was committed, in order and signed, whatever they or the service go through; training
hears nothing of them.

Method: real services and real receivers on loopback, both stores, restarts in between.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.server
import json
import re
import socketserver
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from tests.callers import ANYBODY
from tests.storage.stores import attach_message
from tests.test_commands import Job
from tests.test_tls import Authority

import flyball_server
from flyball_server import limits
from flyball_server.audit import webhooks
from flyball_server.audit.hook_events import told
from flyball_server.audit.hook_files import EVENTS, load_hooks
from flyball_server.core.errors import Invalid
from flyball_server.core.events import Mark, Observed, Outcome, Receipt
from flyball_server.core.types import Settings
from flyball_server.engine import Engine
from flyball_server.messages import Report
from flyball_server.rules import rules_of
from flyball_server.service import Service
from flyball_server.storage import open_journal
from flyball_server.storage.outbox import Delivery

SECRET = "0123456789abcdef-secret"


class Receiver:
    """A real HTTP server that keeps what it is sent. answers: statuses for the next requests, 200 behind them."""

    def __init__(self, port=0):
        self.got, self.answers, self.hang_s = [], [], 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.hang_s:
                    time.sleep(outer.hang_s)
                status = outer.answers.pop(0) if outer.answers else 200
                outer.got.append(SimpleNamespace(path=self.path, headers=dict(self.headers), raw=body, status=status))
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def taken(self):
        """The bodies of what was answered with 200, in order."""
        return [json.loads(one.raw) for one in self.got if one.status == 200]

    def wait(self, count, within_s=20.0):
        until = time.monotonic() + within_s
        while len(self.taken) < count:
            assert time.monotonic() < until, f"{len(self.taken)} of {count}: {self.taken}"
            time.sleep(0.02)
        return self.taken

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    one = Receiver()
    yield one
    one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(limits, "HOOK_BACKOFF_S", 0.02)
    monkeypatch.setattr(limits, "HOOK_SWEEP_S", 0.1)


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'f.db'}"


def hooks_file(folder, port, name="hooks.json", **hooks):
    """A file of hooks, each to its own path of the receiver; without any, one that wants everything."""
    (folder / "secret").write_text(SECRET + "\n")
    hooks = hooks or {"ops": {}}
    full = {
        hook: {"url": f"http://127.0.0.1:{port}/{hook}", "secret_file": "secret", "events": list(EVENTS), **more}
        for hook, more in hooks.items()
    }
    (folder / name).write_text(json.dumps(full))
    return str(folder / name)


@contextmanager
def serving(store, file, **settings):
    with (
        flyball_server.running(store=store, webhooks=file, **settings) as service,
        httpx.Client(base_url=service.http, timeout=30) as http_,
    ):
        yield http_


def log_of(http_, **parameters):
    return http_.get("/v1/webhooks/deliveries", params=parameters).json()["deliveries"]


def settled(http_, count, status="delivered"):
    until = time.monotonic() + 20
    while len(found := log_of(http_, status=status)) < count:
        assert time.monotonic() < until, log_of(http_)
        time.sleep(0.02)
    return found


def test_what_happens_to_a_run_is_told_in_order_and_signed(store, tmp_path, receiver):
    with serving(store, hooks_file(tmp_path, receiver.port)) as http_:
        job = Job(http_, "r", labels={"team": "a"})
        job.report(3)
        given = job.command("override", value=0.02, reason="too high")
        job.report()
        job.report()
        wrong = {"number": 2, "step": job.step, "decided": 1, "lr": [9.0, 9.0], "conflict": "StepLR wrote lr of body"}
        job.report(receipts=[wrong])
        job.report(receipts=[{**wrong, "number": 3}])
        job.report(end="finished")
        events = receiver.wait(4)
        time.sleep(0.2)
        assert [(one["event"], one.get("status")) for one in receiver.taken] == [
            ("command", "accepted"), ("command", "applied"), ("conflict", None), ("ended", None)
        ]  # fmt: skip
        first, applied, conflict, ended = events
        assert (first["command"], first["reason"], first["seq"]) == (given["id"], "too high", given["seq"])
        assert first["text"] == "override of lr of all groups: 0.02, accepted: too high"
        assert (applied["kind"], applied["ranks"], applied["of_ranks"]) == ("override", 1, 1)
        assert conflict["conflict"] == "StepLR wrote lr of body"
        assert (ended["outcome"], ended["run"], ended["project"]) == ("finished", "r", "default")
        assert all(one["labels"] == {"team": "a"} and one["at"].endswith("Z") for one in events)
        for one in receiver.got:
            body, timestamp = one.raw, one.headers["Flyball-Timestamp"]
            right = hmac.new(SECRET.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
            assert one.headers["Flyball-Signature"] == f"sha256={right}"
            assert one.headers["Flyball-Id"] == json.loads(body)["id"]
            assert abs(int(timestamp) - time.time()) < 60
        found = settled(http_, 4)
        assert [one["event"] for one in found] == ["ended", "conflict", "command", "command"]
        assert {(one["attempts"], one["error"], one["next_at"]) for one in found} == {(1, "", None)}
        assert SECRET not in json.dumps(found)
        page = http_.get("/v1/webhooks/deliveries", params={"limit": 3}).json()
        assert [one["event"] for one in log_of(http_, before=page["next"])] == ["command"]
        assert log_of(http_, hook="nobody") == []


def test_a_clamped_command_is_told_with_what_the_guard_left_also_when_it_is_applied(store, tmp_path, receiver):
    with serving(store, hooks_file(tmp_path, receiver.port)) as http_:
        job = Job(http_, "r", guard={"max_lr": 0.2})
        job.report(3)
        job.command("override", value=5.0, groups=["body"], reason="too low")
        job.report()
        job.report()
        given, applied = receiver.wait(2)
        assert given["text"] == "override of lr of body: 5, clamped to 0.2: too low"
        assert "applied at step 4 on 1/1 ranks, clamped to 0.2" in applied["text"]
        assert [one["clamped_to"] for one in (given, applied)] == ["0.2", "0.2"]


def test_the_page_shows_how_a_delivery_is_verified():
    text = (Path(__file__).parent.parent / "docs" / "audit.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "hmac" in block)
    found: dict = {}
    exec(code, found)
    body, now = b'{"id": "x"}', str(int(time.time()))
    headers = {"Flyball-Timestamp": now, "Flyball-Signature": "sha256=" + webhooks.signature(b"s" * 16, now, body)}
    assert found["is_genuine"](b"s" * 16, headers, body)
    assert not found["is_genuine"](b"t" * 16, headers, body)
    assert not found["is_genuine"](b"s" * 16, headers, body + b" ")
    old = str(int(time.time()) - 3600)
    headers = {"Flyball-Timestamp": old, "Flyball-Signature": "sha256=" + webhooks.signature(b"s" * 16, old, body)}
    assert not found["is_genuine"](b"s" * 16, headers, body)


def test_a_receiver_that_fails_gets_the_same_delivery_again_and_the_others_behind_it(store, tmp_path, receiver):
    receiver.answers = [500, 503, 429]
    with serving(store, hooks_file(tmp_path, receiver.port)) as http_:
        job = Job(http_, "r")
        for n in range(3):
            job.command("note", reason=f"note {n}")
        assert [one["reason"] for one in receiver.wait(3)] == ["note 0", "note 1", "note 2"]
        assert len({json.loads(one.raw)["id"] for one in receiver.got[:4]}) == 1
        assert [one["attempts"] for one in settled(http_, 3)] == [1, 1, 4]


def test_a_receiver_that_says_no_is_not_asked_for_ever_and_redirects_are_not_followed(store, tmp_path, receiver):
    receiver.answers = [302] * limits.HOOK_REFUSED_TRIES + [404] * limits.HOOK_REFUSED_TRIES
    with serving(store, hooks_file(tmp_path, receiver.port)) as http_:
        job = Job(http_, "r")
        for n in range(3):
            job.command("note", reason=f"note {n}")
        assert [one["reason"] for one in receiver.wait(1)] == ["note 2"]
        assert [one["error"] for one in settled(http_, 2, "failed")] == ["answered 404", "answered 302"]
        assert {one.path for one in receiver.got} == {"/ops"}


def test_a_receiver_whose_certificate_nobody_vouches_for_is_told_nothing(tmp_path, receiver):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*Authority(tmp_path, "nobody").issue("receiver"))
    receiver.server.socket = tls.wrap_socket(receiver.server.socket, server_side=True)
    hook = {"url": f"https://127.0.0.1:{receiver.port}/ops"}
    with serving("memory:", hooks_file(tmp_path, receiver.port, ops=hook)) as http_:
        Job(http_, "r").command("note")
        until = time.monotonic() + 20
        while not (found := log_of(http_))[0]["error"]:
            assert time.monotonic() < until, found
            time.sleep(0.02)
        assert "CERTIFICATE_VERIFY_FAILED" in found[0]["error"]
        assert receiver.got == []


def test_what_was_not_delivered_is_delivered_by_the_next_process(tmp_path):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    first = Receiver()
    file = hooks_file(tmp_path, first.port)
    first.close()
    with serving(store, file) as http_:
        job = Job(http_, "r")
        for n in range(5):
            job.command("note", reason=f"note {n}")
        until = time.monotonic() + 20
        while not (found := log_of(http_))[-1]["error"]:
            assert time.monotonic() < until, found
            time.sleep(0.02)
        assert {one["status"] for one in found} == {"pending"}
        assert "ConnectError" in found[-1]["error"]
    again = Receiver(first.port)
    try:
        with serving(store, file) as http_:
            assert [one["reason"] for one in again.wait(5)] == [f"note {n}" for n in range(5)]
            assert len(settled(http_, 5)) == 5
        with serving(store, hooks_file(tmp_path, first.port, other={})) as http_:
            time.sleep(0.3)
            assert len(again.taken) == 5
    finally:
        again.close()


def test_deliveries_of_a_hook_that_is_gone_are_over(tmp_path, receiver):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    with serving(store, hooks_file(tmp_path, 9)) as http_:  # nobody is there
        Job(http_, "r").command("note")
    with serving(store, hooks_file(tmp_path, receiver.port, other={})) as http_:
        (one,) = settled(http_, 1, "failed")
        assert (one["hook"], one["error"]) == ("ops", "no such webhook any more")
    assert receiver.got == []


def test_a_hook_hears_of_its_events_projects_and_labels_only(store, tmp_path, receiver):
    file = hooks_file(
        tmp_path,
        receiver.port,
        ended={"events": ["ended"]},
        vision={"projects": ["vision"]},
        team={"labels": {"team": "a"}, "events": ["command"]},
    )
    with serving(store, file) as http_:
        for name, project, labels in (("a", "vision", {}), ("b", "nlp", {"team": "a", "x": "y"})):
            job = Job(http_, name, project=project, labels=labels)
            job.run = f"{project}:{name}"
            job.command("note")
            job.report(end="failed")
        receiver.wait(5)
        time.sleep(0.2)
        heard = sorted((one.path, json.loads(one.raw)["event"], json.loads(one.raw)["run"]) for one in receiver.got)
        assert heard == [
            ("/ended", "ended", "nlp:b"), ("/ended", "ended", "vision:a"), ("/team", "command", "nlp:b"),
            ("/vision", "command", "vision:a"), ("/vision", "ended", "vision:a"),
        ]  # fmt: skip


def test_a_run_that_goes_silent_is_told_once_stale_and_once_lost(store, tmp_path, receiver, monkeypatch):
    with serving(store, hooks_file(tmp_path, receiver.port, ops={"events": ["stale", "lost"]})) as http_:
        Job(http_, "r").report()
        Job(http_, "done").report(end="finished")
        monkeypatch.setattr(limits, "STALE_AFTER_S", 0.3)
        receiver.wait(1)
        monkeypatch.setattr(limits, "LOST_AFTER_S", 0.6)
        receiver.wait(2)
        time.sleep(0.5)
        assert [(one["event"], one["run"]) for one in receiver.taken] == [("stale", "r"), ("lost", "r")]


def test_damage_is_told_once(tmp_path, receiver):
    path = tmp_path / "f.db"
    with serving(f"sqlite:///{path}", hooks_file(tmp_path, receiver.port)) as http_:
        job = Job(http_, "r", labels={"team": "a"})
        job.report()
        job.report()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE journal SET actor = 'x' WHERE run = 'r' AND seq = 3")
    with serving(f"sqlite:///{path}", hooks_file(tmp_path, receiver.port)) as http_:
        for _ in range(2):
            assert http_.get("/v1/runs/r").json()["status"] == "damaged"
        (one,) = receiver.wait(1)
        time.sleep(0.3)
        assert (one["event"], one["run"], one["labels"], len(receiver.taken)) == ("damaged", "r", {"team": "a"}, 1)
        assert "row 3" in one["problem"]


def test_spikes_are_the_marks_that_say_so():
    settled_ = (0.1,)
    marks = (
        Mark(7, "cut", "spike_cut", "", settled_, (0.05,), {"z": 9.0}),
        Mark(8, "track", "reduce", "", settled_, settled_, None),
    )
    before = SimpleNamespace(seq=4)
    (one,) = told(before, [Observed(1, [7, 8], {})], [Outcome((), marks)])
    assert (one.event, one.seq, one.text) == ("spike", 5, "spike_cut at step 7")
    assert (one.data["lr_after"], one.data["fields"]) == ([0.05], {"z": 9.0})


@pytest.mark.parametrize(("store", "reports"), [("memory", 10_000), ("sqlite", 1_000)], indirect=["store"])
def test_a_receiver_that_hangs_costs_training_nothing(store, reports, tmp_path, receiver, monkeypatch):
    most = reports // 50
    monkeypatch.setattr(limits, "HOOK_TIMEOUT_S", 5.0)
    monkeypatch.setattr(limits, "HOOK_PENDING_MAX", most)
    receiver.hang_s = 20.0
    hooks = load_hooks(hooks_file(tmp_path, receiver.port), {})

    async def main():
        journal = open_journal(store)
        herald = webhooks.Hooks(hooks, journal, now_us)
        engine = Engine(journal, rules_of, now_us, herald)
        await engine.start()
        sending = asyncio.create_task(herald.run())
        service = Service(engine, journal)
        await service.attach(attach_message("r"), ANYBODY)
        slowest = 0.0
        for n in range(reports):
            receipts = (receipt(n, f"cause {n}"),) if n % 10 == 0 else ()
            began = time.perf_counter()
            await service.report(Report("r", "s1", 1, [n], {"loss": [1.0]}, receipts, (), ""), ANYBODY)
            slowest = max(slowest, time.perf_counter() - began)
        page = await herald.listed(None, None, None, 1000, ANYBODY)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await engine.close()
        return slowest, page

    slowest, page = asyncio.run(main())
    assert slowest < limits.HOOK_TIMEOUT_S, "no report waited for the receiver"
    assert {one["status"] for one in page["deliveries"]} == {"pending"}
    assert most <= len(page["deliveries"]) <= most + 5, "what is under way is not counted yet"
    assert page["dropped"]["ops"] == reports // 10 - len(page["deliveries"])


def now_us():
    return time.time_ns() // 1000


def receipt(n, conflict):
    return Receipt(n + 1, n, n - 1, Settings((0.1, 0.01), None, None), False, conflict, 1)


def test_waits_double_up_to_a_limit_and_differ_between_deliveries(monkeypatch):
    monkeypatch.setattr(limits, "HOOK_BACKOFF_S", 1.0)
    first, second = (
        [webhooks.backoff_s(Delivery(id_ * 32, "h", "e", "r", "p", 1, 1, "", attempts=n)) for n in range(1, 40)]
        for id_ in ("a", "b")
    )
    for n, wait_s in enumerate(first):
        longest = min(2.0**n, limits.HOOK_BACKOFF_MAX_S)
        assert longest / 2 <= wait_s <= longest
    assert first != second


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ({"url": "ftp://x/"}, "ops.url is no address: give https://HOST/PATH"),
        ({"url": "https://me:pw@x/"}, "leave them out"),
        ({"url": None}, "ops.url is no address"),
        ({"secret": SECRET}, "does not belong into this file"),
        ({"secret_env": "OPS_SECRET"}, "either secret_env"),
        ({"secret_file": "nowhere"}, "nowhere cannot be read"),
        ({"secret_file": None, "secret_env": "SHORT"}, "holds 5 bytes"),
        ({"secret_file": None, "secret_env": "UNSET"}, "holds 0 bytes"),
        ({"events": ["spikes"]}, "did you mean 'spike'"),
        ({"events": []}, "give a list of spike"),
        ({"projects": "vision"}, "give a list of projects"),
        ({"labels": {"team": 1}}, "give a mapping of texts"),
        ({"event": []}, "has no such key"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_without_the_secret(tmp_path, hook, words):
    file = hooks_file(tmp_path, 1, ops=hook)
    with pytest.raises(Invalid) as caught:
        load_hooks(file, {"SHORT": "12345"})
    assert words in str(caught.value)
    assert file in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_secret_is_shown_nowhere(tmp_path):
    (hook,) = load_hooks(hooks_file(tmp_path, 1), {}).values()
    assert hook.secret.value == SECRET.encode()
    assert SECRET not in f"{hook!r} {hook}"
    given = load_hooks(hooks_file(tmp_path, 1, ops={"secret_file": None, "secret_env": "OPS"}), {"OPS": SECRET})
    assert given["ops"].secret.value == SECRET.encode()


class Echo(socketserver.StreamRequestHandler):
    """Gives what it is asked for back as its status line, which is no HTTP."""

    def handle(self):
        self.wfile.write(self.rfile.readline())


def test_of_the_address_of_a_hook_only_the_host_is_ever_shown(tmp_path, receiver):
    hush = "services/T0/hush-hush"
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        ports = {"good": receiver.port, "echo": echo.server_address[1], "away": 1}
        hooks = {name: {"url": f"http://127.0.0.1:{port}/{hush}?key=hush"} for name, port in ports.items()}
        file = hooks_file(tmp_path, 1, **hooks)
        command = [sys.executable, "-m", "flyball_server.cli", "serve", "--json", "--store", "memory:"]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--webhooks", file]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            with httpx.Client(base_url=json.loads(process.stdout.readline())["http"]) as http_:
                Job(http_, "r").command("note")
                receiver.wait(1)
                until = time.monotonic() + 20
                while not all(one["error"] or one["status"] == "delivered" for one in log_of(http_)):
                    assert time.monotonic() < until, log_of(http_)
                    time.sleep(0.02)
                listed = log_of(http_)
            process.terminate()
            _, log = process.communicate(timeout=30)
        echo.shutdown()
    errors = {one["hook"]: one["error"] for one in listed}
    assert errors["good"] == ""
    assert errors["away"].startswith("http://127.0.0.1:1: ConnectError")
    assert errors["echo"].startswith(f"http://127.0.0.1:{ports['echo']}: RemoteProtocolError")
    assert receiver.got[0].path.startswith(f"/{hush}"), "it was really sent there"
    (hook,) = load_hooks(hooks_file(tmp_path, 1, ops=hooks["good"]), {}).values()
    for shown in (log, json.dumps(listed), repr(hook)):
        assert "hush" not in shown


@pytest.mark.parametrize("line", ["url: [https://x/hush", "url: htps://x/hush"])
def test_a_file_that_cannot_be_read_is_refused_without_quoting_an_address(tmp_path, line):
    (tmp_path / "hooks.yaml").write_text(f"ops:\n  {line}\n  events: [spike]\n")
    with pytest.raises(Invalid) as caught:
        load_hooks(tmp_path / "hooks.yaml", {})
    assert "hush" not in str(caught.value)
