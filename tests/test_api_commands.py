"""Goal: the SDK's commands say what their names say, wait for what they are told to, and survive a lost connection.

Method: a real service; the job is spoken for by hand; the connection is cut by a relay between, after the request.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from tests.test_commands import Job

import flyball_server
from flyball import Refused, api
from flyball.errors import LinkError


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as running:
        yield running


@pytest.fixture
def client(service):
    with api.Client(service.http) as one:
        yield one


@pytest.fixture
def job(service, request):
    with httpx.Client(base_url=service.http, timeout=30) as http:
        yield Job(http, request.node.name.partition("[")[0][:100])


class Cutting:
    """A relay to the service that hangs up instead of passing on the first `cuts` answers."""

    def __init__(self, address, cuts):
        self._to, self.cuts, self.answers = (urlsplit(address).hostname, urlsplit(address).port), cuts, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.http = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                taken, _ = self._listening.accept()
            except OSError:
                return
            with taken, socket.create_connection(self._to) as onward:
                while self._passed(taken, onward):
                    pass

    def _passed(self, taken, onward):
        """Pass something on, whoever said it; False where somebody hung up, or the answer is to be swallowed."""
        for one in select.select([taken, onward], [], [])[0]:
            data = one.recv(1 << 20)
            if one is onward and data:
                self.answers += 1
            if not data or (one is onward and self.answers <= self.cuts):
                return False
            (taken if one is onward else onward).sendall(data)
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listening.close()


def test_every_kind_of_command_has_a_method(client, job):
    job.report(5)
    run = job.run
    given = [
        client.override(run, value=0.02, groups="head", for_steps=9, reason="why"),
        client.override(run, factor=0.5, setting="momentum", groups=["body"], reason="why", expires_in_s=60.0),
        client.hold(run, reason="why"),
        client.release(run, reason="why"),
        client.bounds(run, {"max_lr": 0.5}, reason="why"),
        client.switch_policy(run, "plateau", reason="why", base={"type": "cosine", "T_max": 100}),
        client.switch_policy(run, "plateau", reason="why", base=None),
        client.checkpoint(run, reason="why", args={"name": "x"}),
        client.restore(run, reason="why"),
        client.rewind(run, step=2, reason="why"),
        client.evaluate(run, reason="why"),
        client.stop(run, reason="why"),
        client.note(run, "why"),
    ]
    kinds = ["override", "override", "hold", "release", "bounds", *["switch_policy"] * 2]
    kinds += ["checkpoint", "restore", "rewind", "evaluate", "stop", "note"]
    assert [one["kind"] for one in given] == kinds
    assert {one["reason"] for one in given} == {"why"}
    assert given[0]["until_step"] == 14
    assert given[9]["args"] == {"step": 2}
    assert client.run(run)["base"] is None
    assert [one["id"] for one in client.commands(run)] == [one["id"] for one in given]
    assert [one["kind"] for one in client.commands(run, open_only=True)] == kinds[3:12]
    with pytest.raises(Refused, match="no such profile") as refused:
        client.set_profile(run, "none", reason="why")
    assert refused.value.code == "invalid"


def test_a_stale_row_is_refused_and_a_key_of_ones_own_is_used(client, job):
    seen = client.run(job.run)["seq"]
    first = client.hold(job.run, reason="why", if_match=seen, idempotency_key="mine")
    assert client.hold(job.run, reason="why", if_match=seen, idempotency_key="mine")["id"] == first["id"]
    with pytest.raises(Refused, match="came since") as refused:
        client.hold(job.run, reason="why", if_match=seen)
    assert refused.value.code == "stale"


def test_waiting_follows_a_command_until_it_is_applied_or_the_time_is_over(client, job):
    given = client.override(job.run, value=0.02, reason="why")
    assert client.wait(job.run, given["id"], 0.2)["status"] == "accepted"
    told = []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait, job.run, given["id"], 20, on_change=lambda view: told.append(view["status"]))
        time.sleep(0.2)
        job.report(confirm=False)
        job.report()
        assert waiting.result(10)["applied"] == {"step": 1, "ranks": 1, "of_ranks": 1}
    assert told == ["accepted", "applied"]
    released = client.override(job.run, value=0.03, reason="why")
    client.override(job.run, value=0.04, reason="why")
    assert client.wait(job.run, released["id"], 20)["status"] == "superseded"


def test_a_command_whose_answer_was_lost_is_sent_once_more_and_given_once(service, job):
    with Cutting(service.http, cuts=1) as relay, api.Client(relay.http) as client:
        given = client.override(job.run, value=0.02, reason="why")
        assert relay.answers == 2
        assert [one["id"] for one in client.commands(job.run)] == [given["id"]]
        many = client.fleet(f"run={job.run}", "hold", reason="why")
        assert many["counts"] == {"accepted": 1}
    with Cutting(service.http, cuts=2) as relay, api.Client(relay.http) as client:
        with pytest.raises(LinkError):
            client.note(job.run, "lost twice")
        assert relay.answers == 2
    with api.Client(service.http) as client:
        assert [one["kind"] for one in client.commands(job.run)] == ["override", "hold", "note"]


def test_many_runs_freezes_and_canaries_over_the_sdk(service, client):
    with httpx.Client(base_url=service.http, timeout=30) as http:
        for name in ("m1", "m2"):
            Job(http, name, project="many")
    tried = client.fleet("project=many", "override", factor=0.5, reason="why", dry_run=True)
    assert [one["would"]["after"]["body"] for one in tried["results"]] == [0.05, 0.05]
    assert client.freeze(project="many", reason="why")["held"] == 2
    assert [one["project"] for one in client.frozen()] == ["many"]
    assert client.thaw(project="many", reason="why")["held"] == 0
    assert client.frozen() == []
    started = client.canary_start("project=many", policy="plateau", share=1, reason="why")
    assert client.canary(started["id"])["members"]
    assert [one["id"] for one in client.canaries()] == [started["id"]]
    back = client.canary_back(started["id"], reason="why")
    assert {one["status"] for one in back["results"]} == {"accepted"}
    other = client.canary_start("project=many", policy="plateau", share=0.5, reason="why")
    assert len(client.canary_promote(other["id"], reason="why")["results"]) == len(other["controls"])
