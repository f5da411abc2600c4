"""Who may do what, tried from outside: every route and every method, with every role and every kind of bad token.

Goal: nothing slips through and nothing leaks, not even that a run of another project exists. Method: a real service,
and a table with a row for each route; a route without a row fails the test. Runs of another project must be answered
for as runs that nobody ever began: byte for byte, but for the name.
"""

import json
import logging
import queue
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import grpc
import httpx
import pytest
from starlette.routing import Route
from tests.callers import Open

import flyball_server
from flyball.api import Client
from flyball.errors import Refused
from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc
from flyball_server import http_api, limits
from flyball_server.auth.access import ADMIN, DRIVE, OPERATE, PROPOSE, REPORT, ROLES, VIEW, Caller

GROUPS = [{"name": "a", "lr": 0.1}]
#: Runs of a project that the tokens here do not reach: one that exists, one that was deleted, one that never was.
THEIRS = ("theirs:hidden", "theirs:deleted", "theirs:never")
OURS = "ours:known"


class Row(NamedTuple):
    """What a route asks for (None: nothing, it is open), what it answers who may, and what to send it for a run."""

    right: str | None
    status: int
    send: Mapping = MappingProxyType({})


def attach_body(run):
    project, _, name = run.partition(":")
    return {"project": project, "run": name, "session": "s9", "groups": GROUPS}


VERDICT = {"verdict": "approved", "reason": "a test"}
FLEET = {"selector": "run=nobody", "dry_run": True, "command": {"kind": "hold", "reason": "a test"}}
CANARY = {"selector": "run=nobody", "share": 0.5, "reason": "", "policy": "constant"}
REPORT_BODY = {"session": "another", "attempt": 1, "step": [99], "signals": {"loss": [1.0]}}
ROUTES = {
    "GET /healthz": Row(None, 200),
    "GET /readyz": Row(None, 200),
    "GET /openapi.json": Row(None, 200),
    "HEAD /openapi.json": Row(None, 200),
    "POST /v1/attach": Row(DRIVE, 409, {"json": attach_body}),
    "POST /v1/runs/{run}/report": Row(DRIVE, 409, {"json": lambda _: REPORT_BODY}),
    "POST /v1/runs/{run}/signals": Row(REPORT, 200, {"json": lambda _: {"signals": {"val_loss": 0.5}}}),
    "POST /v1/runs/{run}/fork": Row(DRIVE, 409, {"json": lambda _: {"name": "known", "project": "ours"}}),
    "POST /v1/runs/{run}/what-if": Row(VIEW, 200, {"json": lambda _: {"policy": {"type": "constant"}}}),
    "GET /v1/runs": Row(VIEW, 200),
    "GET /v1/runs/{run}": Row(VIEW, 200),
    "GET /v1/runs/{run}/series": Row(VIEW, 200),
    "GET /v1/runs/{run}/decisions": Row(VIEW, 200),
    "GET /v1/runs/{run}/episodes": Row(VIEW, 200),
    "GET /v1/runs/{run}/lineage": Row(VIEW, 200),
    "GET /v1/runs/{run}/export": Row(VIEW, 200),
    "GET /v1/runs/{run}/table": Row(VIEW, 200),
    "GET /v1/runs/{run}/schedule": Row(VIEW, 200),
    "GET /v1/policies": Row(VIEW, 200),
    "GET /v1/signing-key": Row(VIEW, 200),
    "GET /v1/tombstones": Row(VIEW, 200),
    "POST /v1/import": Row(OPERATE, 422, {"content": lambda _: b"no export"}),
    "GET /v1/store": Row(ADMIN, 200),
    "DELETE /v1/runs/{run}": Row(ADMIN, 422),
    "GET /v1/tokens": Row(ADMIN, 200),
    "POST /v1/tokens": Row(ADMIN, 422, {"json": lambda _: {"name": "", "role": "viewer", "projects": ["ours"]}}),
    "DELETE /v1/tokens/{token}": Row(ADMIN, 422),
    "POST /v1/runs/{run}/commands": Row(PROPOSE, 409, {"json": lambda _: {"kind": "hold", "reason": "a test"}}),
    "GET /v1/runs/{run}/commands": Row(VIEW, 200),
    "GET /v1/runs/{run}/commands/{command}": Row(VIEW, 404),
    "POST /v1/runs/{run}/proposals/{proposal}": Row(OPERATE, 404, {"json": lambda _: VERDICT}),
    "GET /v1/runs/{run}/journal": Row(VIEW, 200),
    "GET /v1/audit": Row(VIEW, 200),
    "GET /v1/heads": Row(VIEW, 200),
    "GET /v1/webhooks/deliveries": Row(ADMIN, 403),  # for an admin of all projects only, which none of these is
    "POST /v1/fleet/commands": Row(PROPOSE, 200, {"json": lambda _: FLEET}),
    "GET /v1/freeze": Row(VIEW, 200),
    "POST /v1/freeze": Row(OPERATE, 422, {"json": lambda _: {"reason": "", "project": "ours"}}),
    "POST /v1/thaw": Row(OPERATE, 422, {"json": lambda _: {"reason": "", "project": "ours"}}),
    "GET /v1/canaries": Row(VIEW, 200),
    "POST /v1/canaries": Row(OPERATE, 422, {"json": lambda _: CANARY}),
    "GET /v1/canaries/{canary}": Row(VIEW, 404),
    "POST /v1/canaries/{canary}/promote": Row(OPERATE, 404, {"json": lambda _: {"reason": "a test"}}),
    "POST /v1/canaries/{canary}/back": Row(OPERATE, 404, {"json": lambda _: {"reason": "a test"}}),
}
METHODS = {
    "GetRun": Row(VIEW, "OK"),
    "ListRuns": Row(VIEW, "OK"),
    "AddSignals": Row(REPORT, "OK"),
    "Steer": Row(DRIVE, "ABORTED"),
}
#: The same for every reason, and for every route.
NOT_A_TOKEN = [None, "", "Bearer", "Bearer fb_wrong", "Basic fb_wrong", "Bearer é", "bearer\tfb_wrong"]


class World:
    """A service that asks for tokens, with runs in two projects, and tokens of every kind."""

    def __init__(self, service, store):
        self.service, self.store = service, store
        self.admin = service.new_token("admin")
        self.secrets = [self.admin]
        self.http = httpx.Client(base_url=service.http, trust_env=False, timeout=20)
        self.channel = grpc.insecure_channel(service.grpc.removeprefix("grpc://"))
        self.stub = pb_grpc.SteeringStub(self.channel)
        self.of = {role: self.token(role, ["ours"])["secret"] for role in ROLES}
        expiring = self.token("admin", None, expires_in_s=1)
        revoked = self.token("admin", None)
        for run in ("ours:known", "theirs:hidden", "theirs:deleted"):
            self.make(run)
        for path in ("runs/theirs:deleted", f"tokens/{revoked['id']}"):
            assert self.ask(self.admin, "DELETE", f"/v1/{path}?reason=a+test").status_code == 200
        while self.ask(self.admin, "GET", "/v1/tokens").json()["tokens"][-2]["status"] != "expired":
            time.sleep(0.05)
        self.gone = [f"Bearer {one['secret']}" for one in (expiring, revoked)]

    def ask(self, secret, method, path, **send):
        return self.http.request(method, path, headers={"Authorization": f"Bearer {secret}"}, **send)

    def token(self, role, projects, **fields):
        body = {"name": f"{role}-x", "role": role, "projects": projects, **fields}
        made = self.ask(self.admin, "POST", "/v1/tokens", json=body)
        assert made.status_code == 201, made.text
        self.secrets.append(made.json()["secret"])
        return made.json()

    def make(self, run, end="finished", **fields):
        body = {**attach_body(run), "session": "s1", **fields}
        assert self.ask(self.admin, "POST", "/v1/attach", json=body).status_code == 200
        receipts = [{"number": 1, "step": 0, "decided": -1, "lr": [0.1]}]
        body = {"session": "s1", "attempt": 1, "step": [0, 1], "signals": {"loss": [1.0, 2.0]}}
        body |= {"receipts": receipts, "end": end}
        assert self.ask(self.admin, "POST", f"/v1/runs/{run}/report", json=body).status_code == 200

    def call(self, authorization, method, run):
        """The status and the words that a gRPC method answers with."""
        metadata = () if authorization is None else (("authorization", authorization),)
        request = {
            "GetRun": pb.GetRunRequest(run=run),
            "ListRuns": pb.ListRunsRequest(),
            "AddSignals": pb.AddSignalsRequest(run=run, signals={"val_loss": 1.0}),
        }
        try:
            if method != "Steer":
                getattr(self.stub, method)(request[method], metadata=metadata, timeout=10)
                return "OK", ""
            body = attach_body(run)
            groups = [pb.Group(name="a", lr=0.1)]
            attach = pb.Attach(project=body["project"], run=body["run"], session="s9", groups=groups)
            report = pb.Report(run=run, session="another", attempt=1, step=[99])
            said = [self._steered(message, metadata) for message in ({"attach": attach}, {"report": report})]
            assert said[0][0] == said[1][0], "an attach and a report are two ways to drive a run"
            return said[0][0], f"{said[0][1]} / {said[1][1]}"
        except grpc.RpcError as error:
            return error.code().name, error.details()

    def _steered(self, message, metadata):
        try:
            list(self.stub.Steer(iter([pb.ClientMessage(**message)]), metadata=metadata, timeout=10))
        except grpc.RpcError as error:
            return error.code().name, error.details()
        return "OK", ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = f"sqlite:///{tmp_path_factory.mktemp('access') / 'flyball.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "FAILURES_MAX", 10**6)  # here they all come from one address
        with flyball_server.running(store=store, auth=True) as service:
            world = World(service, store)
            yield world
            world.http.close()
            world.channel.close()


def path_of(route, run):
    method, _, path = route.partition(" ")
    # The one run that tests go on with is to stay: of it a deletion without a reason is asked for.
    reason = "?reason=a+test" if method == "DELETE" and run != OURS else ""
    return (
        path.replace("{run}", run)
        .replace("{token}", "t1")
        .replace("{command}", "c9999")
        .replace("{proposal}", "p9999")
        .replace("{canary}", "k9999")
        + reason
    )


def answer(world, secret, route, run):
    """What the route says about a run: everything of it but the name and the time."""
    send = {kind: make(run) for kind, make in ROUTES[route].send.items()}
    found = world.ask(secret, route.partition(" ")[0], path_of(route, run), **send)
    headers = {k: v for k, v in found.headers.items() if k not in ("date", "content-length")}
    return found.status_code, found.text.replace(run, "RUN").replace(run.partition(":")[2], "NAME"), headers


def routes_in(router):
    """Every route, those of included routers, too. One of another kind (a mounted application, say) is not passed
    over: the test then fails for want of its path."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is None:
            assert isinstance(route, Route), f"{route}: how to list what it answers?"
            yield route
        else:
            yield from routes_in(inner)


def test_every_route_and_every_method_has_a_row():
    nobody = http_api.Parts(*[None] * len(http_api.Parts._fields))._replace(many=(None, None, None))
    app = http_api.build(nobody, door=Open(), version="1", is_ready=lambda: True)
    assert {f"{method} {route.path}" for route in routes_in(app) for method in route.methods} == set(ROUTES)
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} == set(METHODS)


def test_a_role_may_what_it_may_and_nothing_else(world):
    wrong = []
    for route, row in ROUTES.items():
        for role in ROLES:
            allowed = row.right is None or Caller("", role).may(row.right)
            found = answer(world, world.of[role], route, OURS)
            if found[0] != (row.status if allowed else 403):
                wrong.append((route, role, *found[:2]))
    for method, row in METHODS.items():
        for role in ROLES:
            found = world.call(f"Bearer {world.of[role]}", method, OURS)
            if found[0] != (row.status if Caller("", role).may(row.right) else "PERMISSION_DENIED"):
                wrong.append((method, role, *found))
    assert not wrong


def test_runs_of_another_project_are_answered_for_like_runs_that_never_were(world):
    wrong = []
    about_a_run = [route for route in ROUTES if "{run}" in route or route == "POST /v1/attach"]
    for role in ROLES:
        for route in about_a_run:
            expected = 404 if Caller("", role).may(ROUTES[route].right) else 403
            found = [answer(world, world.of[role], route, run) for run in THEIRS]
            if found[0][0] != expected or any(one != found[0] for one in found):
                wrong.append((route, role, found))
            # Nor is it another answer than about an unknown run of one's own project.
            if "{run}" in route and (own := answer(world, world.of[role], route, "ours:never")) != found[0]:
                wrong.append((route, role, own, found[0]))
        for method in METHODS.keys() - {"ListRuns"}:
            expected = "NOT_FOUND" if Caller("", role).may(METHODS[method].right) else "PERMISSION_DENIED"
            found = [world.call(f"Bearer {world.of[role]}", method, run) for run in THEIRS]
            said = [(code, words.replace(run, "RUN")) for (code, words), run in zip(found, THEIRS, strict=True)]
            if said[0][0] != expected or any(one != said[0] for one in said):
                wrong.append((method, role, found))
    assert not wrong


def test_the_stores_own_journal_is_no_run_to_anybody(world):
    secrets = [world.admin, world.token("admin", ["default"])["secret"]]
    kept = world.ask(world.admin, "GET", "/v1/tombstones").json()["tombstones"]
    assert kept
    wrong = []
    for route in [route for route in ROUTES if "{run}" in route]:
        for run in ("%23store", "default:%23store", "a:b:c", "%00", "x" * 300):
            send = {kind: make("known") for kind, make in ROUTES[route].send.items()}
            path = path_of(route, run)
            found = [world.ask(secret, route.partition(" ")[0], path, **send).status_code for secret in secrets]
            if found != [404, 404]:
                wrong.append((route, run, found))
    assert not wrong
    assert world.ask(secrets[1], "GET", "/v1/audit?run=%23store").status_code == 404
    assert world.ask(world.admin, "GET", "/v1/tombstones").json()["tombstones"] == kept
    assert world.ask(world.of["viewer"], "GET", "/v1/runs").status_code == 200, "the tokens are still known"


def test_no_token_a_wrong_an_expired_and_a_revoked_one_are_one_and_the_same(world):
    answers, calls = set(), set()
    for authorization in [*NOT_A_TOKEN, *world.gone]:
        for route, row in ROUTES.items():
            headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
            found = world.http.request(route.partition(" ")[0], path_of(route, OURS), headers=headers)
            if row.right is None:
                assert found.status_code == 200
            else:
                answers.add((found.status_code, found.text, found.headers["www-authenticate"]))
        for method in METHODS:
            if authorization is None or (authorization.isascii() and authorization.isprintable()):
                calls.add(world.call(authorization, method, OURS))
    headers = [("Authorization", f"Bearer {world.admin}"), ("Authorization", "Bearer fb_wrong")]
    found = world.http.get("/v1/runs", headers=headers)
    answers.add((found.status_code, found.text, found.headers["www-authenticate"]))
    ((status, text, challenge),) = answers
    assert (status, json.loads(text)["code"], challenge) == (401, "unauthenticated", 'Bearer realm="flyball"')
    assert {code for code, _ in calls} == {"UNAUTHENTICATED"}
    assert {half for _, words in calls for half in words.split(" / ")} == {json.loads(text)["detail"]}


def test_bytes_that_are_no_message_are_refused_like_any_other_request_without_a_token(world):
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    for method in METHODS:
        kind = world.channel.stream_stream if method == "Steer" else world.channel.unary_unary
        call = kind(f"/{service.full_name}/{method}")
        for secret, code in (("fb_wrong", "UNAUTHENTICATED"), (world.admin, "INVALID_ARGUMENT")):
            broken = iter([b"\xff\xff"]) if method == "Steer" else b"\xff\xff"
            with pytest.raises(grpc.RpcError) as caught:
                list(call(broken, metadata=(("authorization", f"Bearer {secret}"),), timeout=10))
            assert caught.value.code().name == code, method


def test_paths_that_are_no_routes_tell_nothing_without_a_token(world):
    for path in ("/", "/v1", "/v1/none", "/docs", "/healthz/", "//healthz", "/HEALTHZ", "/v1/runs/"):
        assert world.http.get(path).status_code == 401, path
    assert world.ask(world.admin, "GET", "/v1/none").status_code == 404


def test_lists_hold_what_the_caller_reaches(world):
    viewer = world.of["viewer"]
    for i in range(3):
        world.make(f"theirs:more{i}")
        world.make(f"ours:more{i}")
    seen, cursor = [], ""
    while cursor is not None:
        page = world.ask(viewer, "GET", f"/v1/runs?limit=2{cursor and '&cursor=' + cursor}").json()
        seen += [run["run"] for run in page["runs"]]
        cursor = page["cursor"]
    assert len(seen) >= 4
    assert all(run.startswith("ours:") for run in seen)
    for where in ("project=theirs", "project=never", "status=deleted"):
        assert world.ask(viewer, "GET", f"/v1/runs?{where}").json() == {"runs": [], "cursor": None}
    assert world.ask(viewer, "GET", "/v1/tombstones").json() == {"tombstones": [], "next": None}
    (stone,) = world.ask(world.admin, "GET", "/v1/tombstones").json()["tombstones"]
    assert stone["run"] == "theirs:deleted"
    metadata = (("authorization", f"Bearer {viewer}"),)
    listed = world.stub.ListRuns(pb.ListRunsRequest(limit=99), metadata=metadata, timeout=10).runs
    assert {run.project for run in listed} == {"ours"}


def test_neither_a_forks_parent_nor_its_forks_are_shown_across_projects(world):
    fork = {"name": "child", "project": "ours"}
    made = world.ask(world.admin, "POST", "/v1/runs/theirs:hidden/fork", json=fork)
    assert made.status_code == 201, made.text
    back = {"name": "grandchild", "project": "theirs"}
    world.ask(world.admin, "POST", "/v1/attach", json={**attach_body("ours:child"), "resume": True})
    report = {"session": "s9", "attempt": 1, "step": [2], "signals": {"loss": [1.0]}}
    assert world.ask(world.admin, "POST", "/v1/runs/ours:child/report", json=report).status_code == 200
    assert world.ask(world.admin, "POST", "/v1/runs/ours:child/fork", json=back).status_code == 201
    whole = world.ask(world.admin, "GET", "/v1/runs/ours:child/lineage").json()
    assert ([a["run"] for a in whole["ancestors"]], len(whole["forks"])) == (["theirs:hidden"], 1)
    seen = world.ask(world.of["viewer"], "GET", "/v1/runs/ours:child/lineage").json()
    assert seen == {**whole, "ancestors": [], "forks": []}
    for path, body in (
        ("/v1/runs/ours:known/fork", {"name": "hidden", "project": "theirs"}),
        ("/v1/runs/ours:known/fork", {"name": "never", "project": "theirs"}),
        ("/v1/attach", {**attach_body("ours:new"), "fork": {"run": "theirs:hidden", "step": 1}}),
        ("/v1/attach", {**attach_body("ours:new"), "fork": {"run": "theirs:never", "step": 1}}),
    ):
        refused = world.ask(world.of["admin"], "POST", path, json=body)
        assert refused.status_code == 404, refused.text
        assert "not known" in refused.json()["detail"]


def test_an_import_goes_into_projects_that_the_caller_reaches(world):
    world.make("theirs:moved")
    files = {run: world.ask(world.admin, "GET", f"/v1/runs/{run}/export").content for run in ("theirs:moved", OURS)}
    assert world.ask(world.admin, "DELETE", "/v1/runs/theirs:moved?reason=a+test").status_code == 200
    files["theirs:hidden"] = world.ask(world.admin, "GET", "/v1/runs/theirs:hidden/export").content
    operator = world.of["operator"]
    said = {run: world.ask(operator, "POST", "/v1/import", content=file) for run, file in files.items()}
    assert (said[OURS].status_code, said[OURS].json()["status"]) == (200, "unchanged")
    assert said["theirs:hidden"].status_code == 404
    assert said["theirs:hidden"].content == said["theirs:moved"].content


def test_an_admin_gives_no_more_than_they_have(world):
    limited = world.of["admin"]

    def make(role, projects):
        body = {"name": "x", "role": role, "projects": projects}
        return world.ask(limited, "POST", "/v1/tokens", json=body)

    for projects in (None, ["theirs"], ["ours", "theirs"]):
        assert make("viewer", projects).status_code == 403
    assert make("nobody", ["ours"]).status_code == 422
    assert make("viewer", []).status_code == 422
    assert make("admin", ["ours"]).status_code == 201
    both = world.token("viewer", ["ours", "theirs"])
    seen = world.ask(limited, "GET", "/v1/tokens").json()["tokens"]
    assert {tuple(token["projects"]) for token in seen} == {("ours",)}
    assert not any("secret" in token for token in seen)
    hidden, unknown = (
        world.ask(limited, "DELETE", f"/v1/tokens/{token}?reason=why").json()["detail"]
        for token in (both["id"], "t999")
    )
    assert hidden.replace(both["id"], "ID") == unknown.replace("t999", "ID")
    assert world.ask(world.admin, "DELETE", f"/v1/tokens/{both['id']}?reason=why").json()["status"] == "revoked"
    again = world.ask(world.admin, "DELETE", f"/v1/tokens/{both['id']}?reason=why")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")


def test_the_sdk_makes_lists_and_revokes_tokens(world):
    with Client(world.service.http, world.admin) as client:
        made = client.create_token("sdk", "viewer", projects=["ours"], expires_in_s=3600)
        world.secrets.append(made["secret"])
        with Client(world.service.http, made["secret"]) as other:
            assert list(other.runs(project="ours"))
            with pytest.raises(Refused, match="is viewer and may not administer") as caught:
                other.tokens()
            assert caught.value.code == "denied"
            assert client.revoke_token(made["id"], reason="done")["reason"] == "done"
            with pytest.raises(Refused, match="no valid token") as caught:
                list(other.runs())
            assert caught.value.code == "unauthenticated"
        assert made["id"] in [token["id"] for token in client.tokens() if token["status"] == "revoked"]


def test_a_stream_ends_when_its_token_is_revoked(world):
    driver = world.token("driver", ["ours"])
    metadata = (("authorization", f"Bearer {driver['secret']}"),)
    attach = pb.Attach(project="ours", run="streamed", session="s1", groups=[pb.Group(name="a", lr=0.1)])
    messages = queue.SimpleQueue()
    answers = world.stub.Steer(iter(messages.get, None), metadata=metadata, timeout=20)
    messages.put(pb.ClientMessage(attach=attach))
    assert next(answers).attached.run == "ours:streamed"
    reports = [pb.Report(run="ours:streamed", session="s1", attempt=1, step=[step]) for step in range(2)]
    messages.put(pb.ClientMessage(report=reports[0]))
    assert next(answers).advice.through == 0
    assert world.ask(world.admin, "DELETE", f"/v1/tokens/{driver['id']}?reason=why").status_code == 200
    messages.put(pb.ClientMessage(report=reports[1]))
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert world.ask(world.admin, "GET", "/v1/runs/ours:streamed").json()["step"] == 0


def test_a_stream_reports_only_to_runs_it_may_drive(world):
    metadata = (("authorization", f"Bearer {world.of['driver']}"),)
    attach = pb.Attach(project="ours", run="mine", session="s1", groups=[pb.Group(name="a", lr=0.1)])
    report = pb.Report(run="theirs:hidden", session="s1", attempt=1, step=[7])
    messages = [pb.ClientMessage(attach=attach), pb.ClientMessage(report=report)]
    answers = world.stub.Steer(iter(messages), metadata=metadata, timeout=20)
    next(answers)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_record_names_the_token_and_no_secret_is_kept_anywhere(world):
    world.make("ours:signed")
    (attempt,) = world.ask(world.admin, "GET", "/v1/runs/ours:signed/lineage").json()["attempts"]
    assert attempt["actor"] == "token:t1 local"
    world.ask(world.of["viewer"], "POST", f"/v1/runs/{OURS}/signals", json={"signals": {"x": 1.0}})
    file = world.store.removeprefix("sqlite:///")
    kept = b"".join(Path(file + end).read_bytes() for end in ("", "-wal"))
    assert b"token_created" in kept
    assert b"and may not report" in kept, "what a role may not is on record"
    assert not [secret for secret in world.secrets if secret.encode() in kept]
    exported = world.ask(world.admin, "GET", "/v1/runs/ours:signed/export").content
    assert not [secret for secret in world.secrets if secret.encode() in exported]


def test_answers_tell_browsers_to_keep_out(world):
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    asked = [
        world.http.get("/healthz", headers=origin),
        world.http.options("/v1/runs", headers=origin),
        world.http.get("/v1/runs", headers={**origin, "Authorization": f"Bearer {world.admin}"}),
        world.http.get("/v1/none", headers={**origin, "Authorization": f"Bearer {world.admin}"}),
    ]
    for found in asked:
        assert not [name for name in found.headers if name.startswith("access-control")]
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["x-frame-options"] == "DENY"
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["content-security-policy"].startswith("default-src 'none'")
        assert found.headers.get("cache-control") == ("no-store" if "/v1" in str(found.url) else None)
        assert not {"server", "strict-transport-security"} & found.headers.keys()


def test_failed_attempts_are_limited_counted_and_no_reason_to_refuse_others(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(limits, "FAILURES_MAX", 3)
    store = f"sqlite:///{tmp_path / 'flyball.db'}"
    caplog.set_level(logging.WARNING, "flyball_server")
    with flyball_server.running(store=store, auth=True) as service:
        assert "no token is valid" in caplog.text
        good = {"Authorization": f"Bearer {service.new_token('viewer')}"}
        with httpx.Client(base_url=service.http, trust_env=False) as http:
            bad = {"Authorization": "Bearer fb_guess"}
            found = [http.get("/v1/runs", headers=bad) for _ in range(5)]
            assert [one.status_code for one in found] == [401, 401, 401, 429, 429]
            assert found[-1].json()["code"] == "limited"
            assert 1 <= int(found[-1].headers["retry-after"]) <= limits.FAILURES_WITHIN_S
            assert http.get("/v1/runs", headers=good).status_code == 200
    refused = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
    assert refused == ["refused 127.0.0.1 (1×): unknown token", "refused 127.0.0.1 (4×): unknown token"]
    assert "fb_guess" not in caplog.text
    with flyball_server.running(store=store, auth=True) as service:
        assert service.new_token("viewer")  # the store's journal is whole, and goes on


def test_who_asks_too_often_is_told_when_to_come_again_and_others_are_not(tmp_path):
    with flyball_server.running(auth=True, requests_per_s=3.0) as service:
        one, two = ({"Authorization": f"Bearer {service.new_token('driver', name=name)}"} for name in ("one", "two"))
        with httpx.Client(base_url=service.http, trust_env=False) as http:
            found = [http.get("/v1/runs", headers=one) for _ in range(8)]
            assert {200, 429} == {answer.status_code for answer in found}
            assert found[-1].headers["retry-after"] == "1"
            assert http.get("/v1/runs", headers=two).status_code == 200
        with grpc.insecure_channel(service.grpc.removeprefix("grpc://")) as channel:
            stub = pb_grpc.SteeringStub(channel)
            metadata = (("authorization", two["Authorization"]),)
            calls = [stub.ListRuns.future(pb.ListRunsRequest(), metadata=metadata, timeout=10) for _ in range(8)]
            with pytest.raises(grpc.RpcError) as caught:
                [call.result() for call in calls]
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            time.sleep(0.5)
            attach = pb.Attach(run="r", session="s", groups=[pb.Group(name="a", lr=0.1)])
            reports = [pb.Report(run="r", session="s", attempt=1, step=[step]) for step in range(3)]
            messages = [pb.ClientMessage(attach=attach), *(pb.ClientMessage(report=report) for report in reports)]
            # A training job's messages wait: to end its stream would cost both sides more.
            assert len(list(stub.Steer(iter(messages), metadata=metadata, timeout=20))) == 4


def test_a_project_out_of_reach_is_unknown_to_the_token_whether_or_not_there_is_one(world):
    driver = world.token("driver", ["ours"])["secret"]
    said = {}
    for project in ("theirs", "never"):
        answer = world.ask(driver, "POST", "/v1/attach", json={**attach_body("x"), "project": project})
        assert answer.status_code == 404
        said[project] = answer.json()["detail"].replace(project, "PROJECT")
    assert said["theirs"] == said["never"]
    assert said["never"].startswith("project 'PROJECT' is not known to your token: an admin can give you one")
