"""`flyball-server token`, beside a running service and without one, and what the service may be started as.

Goal: a token made or revoked on the command line counts within a second, and a secret is seen once. Method: the real
commands on the file of a real service.
"""

import json
import logging
import time
import traceback

import httpx
import pytest
import torch
from tests.command_line import server_command

import flyball
import flyball_server
from flyball.api import Client
from flyball.connect import transport
from flyball.errors import FlyballError
from flyball.wire import Attach, Group
from flyball_server.auth.rates import Rates
from flyball_server.auth.tokens import seconds_of
from flyball_server.core.errors import Busy, Invalid
from flyball_server.settings import Settings
from flyball_server.storage import open_journal
from flyball_server.verify import verify_store

ATTACH = Attach("default", "r", "s", {}, (Group("a", 0.1, None, None),), {}, None, {}, "absolute", 0, None, False, None,
                None, 0, "", "test")  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path / 'flyball.db'}"


def command(*words, store, code=0):
    done = server_command("token", *words, "--store", store)
    assert done.returncode == code, done.stderr
    return done


def status(http, secret):
    return http.get("/v1/runs", headers={"Authorization": f"Bearer {secret}"}).status_code


def within_a_second(found, expected):
    until = time.monotonic() + 1.0
    while (last := found()) != expected and time.monotonic() < until:
        time.sleep(0.02)
    assert last == expected


def test_tokens_of_the_command_line_count_beside_a_running_service(store):
    # The first one before there is any service, or any file.
    words = ("create", "--name", "first", "--role", "admin")
    first = command(*words, store=store).stdout.strip()
    with (
        flyball_server.running(store=store, auth=True) as service,
        httpx.Client(base_url=service.http, trust_env=False) as http,
    ):
        assert status(http, first) == 200
        words = ("create", "--name", "ci", "--role", "driver", "--project", "a", "--project", "b", "--expires", "30d")
        made = json.loads(command(*words, "--json", store=store).stdout)
        assert made["secret"].startswith("fb_")
        assert len(made["secret"]) == len("fb_") + 43, "32 random bytes"
        assert (made["projects"], made["status"]) == (["a", "b"], "valid")
        within_a_second(lambda: status(http, made["secret"]), 200)
        assert (
            command("revoke", made["id"], "--reason", "it leaked", store=store).stdout == "token t2 (ci) is revoked\n"
        )
        within_a_second(lambda: status(http, made["secret"]), 401)
        assert status(http, first) == 200
    listed = command("list", "--json", store=store).stdout
    assert [json.loads(line)["status"] for line in listed.splitlines()] == ["valid", "revoked"]
    shown = command("list", store=store).stdout
    for secret in (first, made["secret"]):
        assert secret not in listed + shown
    assert "it leaked" in shown
    journal = open_journal(store, read_only=True)
    journal.start(lambda _: None)
    assert verify_store(journal) == []
    journal.close()


def test_a_command_that_makes_no_sense_changes_nothing_and_says_why(store):
    command("create", "--name", "first", "--role", "admin", store=store)
    for words, said in (
        (("create", "--name", "x", "--role", "king"), "role is 'king': give one of viewer"),
        (("create", "--name", "x", "--role", "viewer", "--expires", "soon"), "expires is 'soon'"),
        (("create", "--name", "a b", "--role", "viewer"), "name is 'a b'"),
        (("create", "--name", "x", "--role", "viewer", "--project", "a:b"), "projects is 'a:b'"),
        (("revoke", "t9", "--reason", "why"), "token 't9' is not known"),
        (("revoke", "t1", "--reason", " "), "say why the token is revoked"),
    ):
        done = command(*words, store=store, code=1)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert len(command("list", store=store).stdout.splitlines()) == 1


def test_a_store_that_keeps_nothing_has_no_tokens_of_the_command_line():
    assert "nothing is kept" in command("list", store="memory:", code=1).stderr


def test_beyond_this_machine_the_service_asks_for_tokens_or_is_told_not_to():
    for name in ("http", "grpc"):
        with pytest.raises(ValueError, match="say --auth"):
            Settings(**{name: "0.0.0.0:0"})
        Settings(**{name: "0.0.0.0:0"}, auth=True)
        Settings(**{name: "0.0.0.0:0"}, insecure=True)
    with pytest.raises(ValueError, match="requests_per_s"):
        Settings(requests_per_s=0)


def test_a_service_that_nobody_can_use_says_how_to_make_a_token(store, caplog):
    caplog.set_level(logging.WARNING, "flyball_server")
    with flyball_server.running(store=store, auth=True) as service:
        assert "flyball-server token create --name admin --role admin" in caplog.text
        service.new_token()
    caplog.clear()
    with flyball_server.running(store=store, auth=True):
        assert "no token" not in caplog.text


@pytest.mark.parametrize("make", [Client, lambda server, token: transport(server, token)()])
def test_a_token_stands_in_no_message_of_the_client(make):
    for secret in ("fb_hush hush", "fb_hush\r\nX: y", "fb_hushé"):
        with pytest.raises(FlyballError) as caught:
            make("http://127.0.0.1:1", secret)
        assert "hush" not in f"{caught.value!r} {caught.value.__cause__!r}"
    made = make("http://127.0.0.1:1", "fb_hush\n")
    with pytest.raises(FlyballError) as caught:
        made.policies() if isinstance(made, Client) else made.attach(ATTACH)
    assert "hush" not in "".join(traceback.format_exception(caught.value)) + repr(made)
    made.close()


def test_what_is_given_as_a_token_is_not_shown():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="token is a bytes") as caught:
        flyball.attach(optimizer, run="r", token=b"fb_hush")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)]
)
def test_spans_of_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0d", "-1d", "1.5h", "d", "1y", "9" * 12 + "d"])
def test_what_is_no_span_of_time_is_refused(text):
    with pytest.raises(Invalid, match="expires"):
        seconds_of(text)


def test_a_bucket_gives_its_burst_then_its_rate_and_forgets_the_oldest():
    rates = Rates(2.0, 3.0, 2)
    assert [rates.take("a", 10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert rates.take("a", 10.25) == 0.25
    assert rates.take("a", 10.5) == 0.0
    assert rates.take("a", 10.5) == 0.5
    assert rates.take("b", 10.5) == rates.take("c", 10.5) == 0.0  # and a is forgotten
    assert rates.take("a", 10.5) == 0.0
    assert len(rates._known) == 2


def test_two_services_never_own_one_file_and_a_token_does_not_need_to(store):
    with flyball_server.running(store=store):
        with pytest.raises(Busy, match="in use by another"):
            flyball_server.running(store=store).start()
        assert command("create", "--name", "x", "--role", "viewer", store=store).stdout.startswith("fb_")
