"""The REST SDK against a real service: pages, numbers that JSON has not, and every way to be told no."""

from __future__ import annotations

import http.server
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import flyball_server
from flyball import FlyballError, Refused, api, api_connection
from flyball.errors import LinkError


@pytest.fixture(scope="module")
def client() -> Iterator[api.Client]:
    with flyball_server.running() as service, api.Client(service.http) as client:
        yield client


def begin(client: api.Client, run: str, **options: Any) -> None:
    """A run, begun over the wire as a training job does."""
    body = {"run": run, "session": "s", "groups": [{"name": "default", "lr": 0.1}], **options}
    client._answer("POST", "/v1/attach", body=body)


def report(client: api.Client, run: str, steps: list[int], losses: list[Any]) -> None:
    body = {"session": "s", "attempt": 1, "step": steps, "signals": {"loss": losses}}
    client._answer("POST", api._path(run, "report"), body=body)


def test_runs_come_in_pages_and_all_of_them(client: api.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "RUNS_PAGE", 3)
    for i in range(8):
        begin(client, f"p{i}", project="pages", labels={"odd": str(i % 2)})
    assert [run["name"] for run in client.runs(project="pages")] == [f"p{i}" for i in reversed(range(8))]
    assert [run["name"] for run in client.runs(project="pages", labels={"odd": "1"})] == ["p7", "p5", "p3", "p1"]
    assert not list(client.runs(project="pages", policy="windowed"))


def test_decisions_come_in_pages_and_all_of_them(client: api.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "DECISIONS_PAGE", 1)
    begin(client, "d", policy={"type": "plateau", "patience": 0, "factor": 0.5})
    for step in range(6):
        report(client, "d", [step], [1.0])
    assert [one["step"] for one in client.decisions("d")] == [1, 2, 3, 4, 5]


def test_a_run_in_a_project_is_found_by_its_id(client: api.Client) -> None:
    begin(client, "inside", project="proj.ect")
    assert client.run("proj.ect:inside")["project"] == "proj.ect"


def test_what_json_cannot_carry_are_floats_again(client: api.Client) -> None:
    begin(client, "hostile")
    report(client, "hostile", [0, 1, 2, 3], [1.0, "NaN", "-Infinity", None])
    assert client.run("hostile")["signals"] == {"loss": -math.inf}
    found = client.series("hostile", ["loss", "lr:default"])
    assert found["series"]["loss"]["step"] == [0, 1, 2]
    assert str(found["series"]["loss"]["value"]) == "[1.0, nan, -inf]"
    assert found["series"]["lr:default"] == {"step": [], "value": []}
    assert client.series("hostile", "loss", from_step=2, to_step=2)["series"]["loss"]["step"] == [2]


def test_signals_from_another_process_reach_the_policy(client: api.Client) -> None:
    begin(client, "evaluated", policy={"type": "plateau", "metric": "val/loss", "patience": 0})
    for step, value in enumerate([1.0, 2.0, math.nan]):
        assert client.report("evaluated", **{"val/loss": value, "run": 7}) > 0
        report(client, "evaluated", [step], [1.0])
    assert [one["step"] for one in client.decisions("evaluated")] == [1]
    signals = client.run("evaluated")["signals"]
    assert math.isnan(signals["val/loss"])
    assert signals["run"] == 7


def test_policies_have_schemas(client: api.Client) -> None:
    found = client.policies()
    assert {one["name"] for one in found["policies"]} >= {"constant", "plateau", "windowed"}
    assert all(one["schema"]["properties"] for kind in ("policies", "base_schedules") for one in found[kind])


def test_a_refusal_has_the_services_code_and_names_the_server(client: api.Client) -> None:
    begin(client, "known")
    asked: list[tuple[str, Callable[[], Any]]] = [
        ("not_found", lambda: client.run("unknown")),
        ("not_found", lambda: client.run("../../é?#")),
        ("not_found", lambda: client.series("known", attempt=9)),
        ("invalid", lambda: client.series("known", points=1)),
        ("invalid", lambda: client.report("known", **{"no name": 1.0})),
    ]
    for code, ask in asked:
        with pytest.raises(Refused, match=client.server) as caught:
            ask()
        assert caught.value.code == code
    with pytest.raises(FlyballError, match="flyball runs"):
        client.run("")


def test_a_service_that_is_away_is_named_with_the_remedy() -> None:
    with api.Client("http://127.0.0.1:9") as away, pytest.raises(LinkError, match=r"127\.0\.0\.1:9.*flyball-server"):
        away.policies()


class Stranger(http.server.BaseHTTPRequestHandler):
    """No Flyball service."""

    def do_GET(self) -> None:
        """Answer like a proxy."""
        body = b"<html>404</html>" if "policies" in self.path else b'{"detail": "later", "code": "busy"}'
        self.send_response(404 if "policies" in self.path else 503)
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_what_does_not_answer_like_the_service_is_no_refusal() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with api.Client(f"http://127.0.0.1:{server.server_port}/") as client:
            with pytest.raises(LinkError, match="check the address"):
                client.policies()
            with pytest.raises(LinkError, match="later") as caught:
                client.run("x")
            assert caught.value.retry_after_s == 7
        server.shutdown()


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLYBALL_SERVER", raising=False)
    assert api_connection.rest_address(None) == "http://127.0.0.1:1788"
    monkeypatch.setenv("FLYBALL_SERVER", "https://steer.example/flyball/")
    assert api_connection.rest_address(None) == "https://steer.example/flyball"
    assert api_connection.rest_address("http://other:1") == "http://other:1"
    monkeypatch.setenv("FLYBALL_SERVER", "grpc://steer.example:1789")
    with pytest.raises(FlyballError, match=r"FLYBALL_SERVER is 'grpc://.*http://steer\.example:1788"):
        api.Client()
    with pytest.raises(FlyballError, match=r"server is 'localhost:1788': give http://HOST:PORT"):
        api.Client("localhost:1788")


def test_the_environment_gives_the_token_and_no_proxy(client: api.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYBALL_TOKEN", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with api.Client(client.server) as other:
        assert other._http.headers["Authorization"] == "Bearer secret"
        assert other.policies()


def test_without_httpx_the_pip_command_is_named() -> None:
    code = "import sys; sys.modules['httpx'] = None; import flyball.api; flyball.api.Client()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'flyball[cli]'" in done.stderr.splitlines()[-1]
