"""Goal: over HTTP everything is one clear answer: JSON where it went well, an RFC 9457 problem where not, never a 500.

Method: a real service on a free port and plain requests; tables of bad bodies and bad queries.
"""

import json
import logging
import math
from itertools import count

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.callers import Open

import flyball_server
from flyball_server import checks, http_api, limits
from flyball_server.commands import checks as command_checks
from flyball_server.core import errors
from flyball_server.core.policies import POLICIES
from flyball_server.http_api import problems
from flyball_server.policy_files import resolve

names = count()
PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.5}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Two threads that format tracebacks at once can end the interpreter's parser (CPython 3.11): what a service says
    of its own failures is left out, every test looks at the answer."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def run():
    return f"r{next(names)}"


def attach_body(run, /, **fields):
    groups = [{"name": "a", "lr": 0.1}, {"name": "b", "lr": 0.01}]
    return {"run": run, "session": "s1", "groups": groups} | fields


def report_body(steps, **fields):
    steps = list(steps)
    return {"session": "s1", "attempt": 1, "step": steps, "signals": {"loss": [1.0] * len(steps)}, **fields}


def attach(http, run, **fields):
    answer = http.post("/v1/attach", json=attach_body(run, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def report(http, run, steps, **fields):
    answer = http.post(f"/v1/runs/{run}/report", json=report_body(steps, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def problem(answer, status, *words):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status
    assert {"type", "title", "detail", "code"} <= document.keys()
    for word in words:
        assert word in document["detail"]
    return document


def test_a_job_attaches_reports_repeats_resumes_and_is_replaced(http, run):
    begun = attach(http, run, policy=PLATEAU, lag=0)
    assert (begun["run"], begun["attempt"], begun["from_step"], begun["through"]) == (run, 1, 0, -1)
    assert begun["changes"] == {"decided": [-1], "lr": [[0.1, 0.01]], "momentum": None, "noise_std": None}
    assert begun["reference"] == [0.1, 0.01]
    advice = report(http, run, [0, 1])
    assert advice["through"] == 1
    assert advice["changes"]["decided"] == [0, 1]
    assert advice["changes"]["lr"] == [[0.1, 0.01], [0.05, 0.005]]
    assert advice["code"] == "reduce"
    assert "cut from 0.1 to 0.05" in advice["reason"]
    assert report(http, run, [0, 1]) == advice
    assert attach(http, run, policy=PLATEAU, lag=0)["through"] == 1, "the same session is a reconnect"
    problem(http.post("/v1/attach", json=attach_body(run, session="s2", policy=PLATEAU)), 409, "exists already", run)
    resumed = attach(http, run, session="s2", policy=PLATEAU, resume=True, from_step=1)
    assert (resumed["attempt"], resumed["from_step"], resumed["through"]) == (2, 1, 0)
    assert resumed["changes"]["lr"] == [[0.1, 0.01]]
    problem(http.post(f"/v1/runs/{run}/report", json=report_body([2])), 409, "attempt 1", "(2)", "not heard")


def test_numbers_that_json_has_not_travel_as_strings(http, run):
    attach(http, run)
    report(http, run, range(5), signals={"loss": ["NaN", "Infinity", "-Infinity", None, 2.0], "x": [None] * 5})
    series = http.get(f"/v1/runs/{run}/series", params={"signals": "loss,x"}).json()["series"]
    assert series["loss"] == {"step": [0, 1, 2, 4], "value": ["NaN", "Infinity", "-Infinity", 2.0]}
    assert series["x"] == {"step": [], "value": []}
    report(http, run, [5], signals={"loss": ["NaN"]})
    assert http.get(f"/v1/runs/{run}").json()["signals"] == {"loss": "NaN"}


def test_side_signals_are_answered_with_their_row(http, run):
    seq = attach(http, run)["seq"]
    answer = http.post(f"/v1/runs/{run}/signals", json={"signals": {"val_loss": "NaN", "acc": 0.5}})
    assert answer.json() == {"seq": seq + 1}
    report(http, run, [0])
    assert http.get(f"/v1/runs/{run}").json()["signals"] == {"loss": 1.0, "val_loss": "NaN", "acc": 0.5}


def test_a_run_tells_what_is_decided_and_what_was_applied(http, run):
    attach(http, run, project="vision", labels={"k": "v"}, policy=PLATEAU, guard={"max_lr": 1.0})
    receipt = {"number": 1, "step": 0, "decided": -1, "lr": [0.1, "NaN"]}
    report(http, f"vision:{run}", [0, 1], receipts=[receipt])
    told = http.get(f"/v1/runs/vision:{run}").json()
    assert (told["name"], told["project"], told["status"], told["step"]) == (run, "vision", "active", 1)
    assert [g["lr"] for g in told["settings"]] == [0.05, 0.005]
    assert [g["applied_lr"] for g in told["settings"]] == [0.1, "NaN"]
    assert [g["reference_lr"] for g in told["settings"]] == [0.1, 0.01]
    assert told["policy_config"] == resolve(PLATEAU).spec()
    assert (told["decision"], told["decided_step"], told["applied_step"]) == ("reduce", 1, 0)
    report(http, f"vision:{run}", [2], end="failed")
    assert http.get(f"/v1/runs/vision:{run}").json()["status"] == "failed"


# -- errors ------------------------------------------------------------------------------------------------------


class Failing:
    """A service whose every use case raises what it is told: the only way to see every kind of error."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        async def fail(*_, **__):
            raise self._error

        return fail


def built(service, *, is_ready=True):
    parts = http_api.Parts(*[None] * len(http_api.Parts._fields))._replace(service=service, many=(None, None, None))
    return http_api.build(parts, door=Open(), version="1", is_ready=lambda: is_ready)


def kinds():
    found, todo = [], [errors.SteeringError]
    while todo:
        todo += (kind := todo.pop()).__subclasses__()
        found.append(kind)
    return found


def test_the_table_of_statuses_covers_every_kind_of_error():
    assert {kind.code for kind in kinds()} == set(problems.STATUS)
    statuses = {
        "invalid": 422,
        "not_found": 404,
        "conflict": 409,
        "stale": 412,
        "unauthenticated": 401,
        "denied": 403,
        "busy": 503,
        "limited": 429,
        "damaged": 500,
        "internal": 500,
    }
    assert {code: status for code, (status, _) in problems.STATUS.items()} == statuses


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_is_a_problem_document(kind):
    app = built(Failing(kind("loss is 'x': give a number")))
    answer = TestClient(app).get("/v1/runs/r")
    document = problem(answer, problems.STATUS[kind.code][0], "loss is 'x'")
    assert document["code"] == kind.code
    assert ("retry-after" in answer.headers) == issubclass(kind, errors.Busy)
    assert ("www-authenticate" in answer.headers) == (kind is errors.Unauthenticated)


def test_an_error_nobody_thought_of_is_a_problem_document_without_its_inside():
    app = built(Failing(RuntimeError("secret")))
    answer = TestClient(app, raise_server_exceptions=False).get("/v1/runs/r")
    document = problem(answer, 500)
    assert "secret" not in json.dumps(document)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/runs/nobody", 404),
        ("GET", "/v1/runs/nobody/series", 404),
        ("GET", "/v1/runs/nobody/decisions", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/runs/", 404),
        ("GET", "/v1/runs/%00%F0%9F%98%80", 404),
        ("GET", "/v1/attach", 405),
        ("DELETE", "/v1/runs", 405),
    ],
)
def test_what_is_not_there_is_a_problem_document(http, method, path, status):
    answer = http.request(method, path, headers={"Host": "evil.example"})
    problem(answer, status)
    assert "location" not in answer.headers


def test_a_body_beyond_the_limit_is_too_large_with_and_without_a_length(http, run):
    attach(http, run)
    big = b'{"session": "' + b"x" * limits.BODY_BYTES_MAX + b'"}'
    for content in (big, iter([big[i : i + 65536] for i in range(0, len(big), 65536)])):
        answer = http.post(f"/v1/runs/{run}/report", content=content, headers={"content-type": "application/json"})
        problem(answer, 413, str(limits.BODY_BYTES_MAX))
    assert report(http, run, [0])["through"] == 0


#: Half of a surrogate pair, which JSON can say and no text can hold.
HALF = "\ud800"
RECEIPT = {"number": 1, "step": 0, "decided": -1, "lr": [0.1, 0.01]}
ODD = [None, True, 0, -1, 1.5, 2**63, 10**400, "", "x", "é\u0000", [], [None], {}, {"a": None}, [[]], "NaN", 1e308]


def changed(body, path, value):
    """A copy of `body` with the value at `path` replaced."""
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def paths(body, here=()):
    yield here
    for key in body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ():
        yield from paths(body[key], (*here, key))


def raw(body):
    # Written by hand: NaN and lone surrogates go out as they are.
    return {"content": json.dumps(body).encode(), "headers": {"content-type": "application/json"}}


FULL_ATTACH = {
    "run": "full", "session": "s1", "groups": [{"name": "a", "lr": 0.1, "momentum": 0.9, "betas": [0.9, 0.99]}],
    "project": "p", "labels": {"k": "v"}, "policy": {"type": "plateau", "min_lr": [0.0]},
    "base": {"type": "cosine", "T_max": 10}, "guard": {"max_lr": 1.0, "groups": {"a": {"scale": 2.0}}},
    "mode": "absolute", "seed": 0, "lag": 0, "resume": False, "from_step": None, "from_attempt": None, "digest": "",
    "client": "c",
}  # fmt: skip
FULL_REPORT = {
    "session": "s1", "attempt": 1, "step": [0, 2], "signals": {"loss": [1.0, None]},
    "receipts": [{"number": 1, "step": 0, "decided": -1, "lr": [0.1, 0.01], "momentum": [None, 0.9],
                  "noise_std": [0.0, 0.0], "late": False, "conflict": "", "ranks": 1}],
    "answers": [{"directive": "d", "outcome": "done", "note": ""}], "end": "",
}  # fmt: skip


@pytest.mark.parametrize("path", list(paths(FULL_ATTACH)), ids=lambda p: ".".join(map(str, p)))
def test_no_value_in_any_place_of_an_attach_breaks_the_service(http, path):
    for i, value in enumerate(ODD):
        body = changed({**FULL_ATTACH, "run": f"o{next(names)}"}, path, value)
        answer = http.post("/v1/attach", **raw(body))
        assert answer.status_code < 500, (i, value, answer.text)
        if answer.status_code != 200:
            assert problem(answer, answer.status_code)["detail"]


@pytest.mark.parametrize("path", list(paths(FULL_REPORT)), ids=lambda p: ".".join(map(str, p)))
def test_no_value_in_any_place_of_a_report_breaks_the_service_or_the_run(http, run, path):
    attach(http, run)
    last = 0
    for value in ODD:
        body = changed(FULL_REPORT, path, value)
        answer = http.post(f"/v1/runs/{run}/report", **raw(body))
        assert answer.status_code < 500, (value, answer.text)
        if answer.status_code != 200:
            assert problem(answer, answer.status_code)["detail"]
        elif body.get("end"):
            return
        last = max(last, http.get(f"/v1/runs/{run}").json()["step"] or 0)
    assert http.get(f"/v1/runs/{run}/series?signals=loss,lr:a,decided_lr:b").status_code == 200
    if last < 2**62:
        assert report(http, run, [last + 1])["through"] == last + 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"run": ""}, "run"),
        ({"run": "a/b"}, "run"),
        ({"run": "x" * 129}, "run"),
        ({"session": "a b"}, "session"),
        ({"project": "-p"}, "project"),
        ({"groups": []}, "groups"),
        ({"groups": [{"name": "a", "lr": 0.1}, {"name": "a", "lr": 0.1}]}, "groups"),
        ({"groups": [{"name": "a", "lr": -1}]}, "a.lr"),
        ({"groups": [{"name": "a", "lr": 1, "betas": [0.9, 1.0]}]}, "a.betas"),
        ({"groups": [{"name": "a", "lr": 1, "wd": 1}]}, "wd"),
        ({"groups": [{"name": f"g{i}", "lr": 1} for i in range(limits.GROUPS_MAX + 1)]}, str(limits.GROUPS_MAX)),
        ({"labels": {f"l{i}": "" for i in range(limits.LABELS_MAX + 1)}}, str(limits.LABELS_MAX)),
        ({"policy": {"type": "platau"}}, "did you mean 'plateau'"),
        ({"policy": {"type": "plateau", "factor": 2}}, "factor"),
        ({"policy": {"type": "plateau", "min_lr": [0.1]}}, "min_lr"),
        ({"policy": {"type": "plateau", "min_lr": [0.1] * 3}}, "min_lr"),
        ({"base": {"type": "cosine"}}, "T_max"),
        (
            {"base": {"type": "cosine", "T_max": 9}, "policy": {"type": "constant", "base": {"type": "constant"}}},
            "base",
        ),
        ({"base": {"type": "cosine", "T_max": 9}, "mode": "multiplier"}, "base"),
        ({"guard": {"max_change": 0.5}}, "max_change"),
        ({"guard": {"groups": {"nobody": {"scale": 2.0}}}}, "nobody"),
        ({"mode": "both"}, "mode"),
        ({"lag": -1}, "lag"),
        ({"from_step": -5}, "from_step"),
        ({"unknown": 1}, "unknown"),
        ({"client": HALF}, "client"),
        ({"client": "x" * (limits.NAME_MAX + 1)}, "client"),
        ({"digest": HALF}, "digest"),
        ({"digest": "a" * (limits.NAME_MAX + 1)}, "digest"),
        ({"session": HALF}, "session"),
        ({"labels": {HALF: "v"}}, "labels"),
        ({"policy": {"type": "plateau", "metric": HALF}}, "policy"),
        ({"fork": {"run": "nobody", "digest": HALF}}, "fork.digest"),
        ({"seq": -1, "digest": "ab"}, "seq"),
        ({"seq": 2**63, "digest": "ab"}, "seq"),
        ({"policy": {"type": "x" * limits.SPEC_BYTES_MAX}}, str(limits.SPEC_BYTES_MAX)),
        ({"guard": {"x" * limits.SPEC_BYTES_MAX: None}}, str(limits.SPEC_BYTES_MAX)),
        ({"shadows": {"s": {"type": "x" * limits.SPEC_BYTES_MAX}}}, str(limits.SPEC_BYTES_MAX)),
        ({HALF: 1}, "unicode"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_a_wrong_attach_is_refused_naming_the_field_and_leaves_nothing(http, run, fields, word):
    problem(http.post("/v1/attach", **raw(attach_body(run, **fields))), 422, word)
    assert http.get(f"/v1/runs/{run}").status_code == 404


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"step": [1, 1]}, "step"),
        ({"step": [-1, 0]}, "step"),
        ({"signals": {"loss": [1.0]}}, "loss"),
        ({"signals": {"no!": [1.0, 1.0]}}, "no!"),
        ({"signals": {f"s{i}": [1.0, 1.0] for i in range(limits.SIGNALS_MAX + 1)}}, str(limits.SIGNALS_MAX)),
        ({"step": list(range(limits.BATCH_MAX + 1)), "signals": {}}, str(limits.BATCH_MAX)),
        ({"receipts": [{"number": 1, "step": 0, "decided": 0, "lr": [0.1]}]}, "receipts"),
        ({"end": "done"}, "end"),
        ({"answers": [{"directive": "d", "outcome": "maybe"}]}, "outcome"),
        ({"answers": [{"directive": HALF, "outcome": "done"}]}, "directive"),
        ({"answers": [{"directive": "d" * (limits.NAME_MAX + 1), "outcome": "done"}]}, "directive"),
        ({"answers": [{"directive": "d", "outcome": "done", "note": HALF}]}, "note"),
        ({"answers": [{"directive": "d", "outcome": "done", "note": "x" * (limits.REASON_MAX + 1)}]}, "note"),
        ({"answers": [{"directive": "d", "outcome": "done", "step": 2**63}]}, "answers: step"),
        ({"receipts": [RECEIPT | {"conflict": HALF}]}, "conflict"),
        ({"receipts": [RECEIPT | {"conflict": "x" * (limits.CONFLICT_MAX + 1)}]}, "conflict"),
        ({"receipts": [RECEIPT | {"controls": {HALF: 1.0}}]}, "signals"),
        ({"receipts": [RECEIPT | {"controls": {"x" * (limits.NAME_MAX + 1): 1.0}}]}, "signals"),
        ({"receipts": [RECEIPT | {"ranks": 0}]}, "ranks"),
        ({"receipts": [RECEIPT | {"ranks": -1}]}, "ranks"),
        ({"receipts": [RECEIPT | {"of_ranks": -1}]}, "of_ranks"),
        ({"receipts": [RECEIPT | {"ranks": 3, "of_ranks": 2}]}, "of_ranks"),
        ({"controls": [{"name": HALF, "value": 1, "min": 0, "max": 1}]}, "signals"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_report_is_refused_naming_the_field_and_changes_nothing(http, run, fields, word):
    attach(http, run)
    before = http.get(f"/v1/runs/{run}").json()["seq"]
    problem(http.post(f"/v1/runs/{run}/report", **raw(report_body([0, 1]) | fields)), 422, word)
    assert http.get(f"/v1/runs/{run}").json()["seq"] == before


def test_a_run_has_no_more_signals_than_the_limit_however_they_come(http, run):
    attach(http, run)
    for first in (0, 40):
        signals = {f"s{first + i}": [1.0] for i in range(40)}
        answer = http.post(f"/v1/runs/{run}/report", json=report_body([first], signals=signals))
    problem(answer, 422, str(limits.SIGNALS_MAX))


def test_text_that_is_no_unicode_is_refused_or_comes_back(http, run):
    """Half a surrogate pair is allowed in JSON and nowhere else."""
    broken = "\ud800"
    for body in (
        attach_body(run, labels={"k": broken}),
        attach_body(run, groups=[{"name": broken, "lr": 0.1}]),
        attach_body(run, client=broken),
        attach_body(run, policy={"type": "plateau", "metric": broken}),
    ):
        answer = http.post("/v1/attach", **raw(body | {"run": f"{run}-{next(names)}"}))
        assert answer.status_code < 500, answer.text
    assert http.get("/v1/runs").status_code == 200


def test_what_is_no_unicode_and_is_stored_already_is_told_with_a_question_mark(http, run, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(checks, "check_text", lambda *_: None)  # as it was, or is elsewhere
        attach(http, run)
        answers = [{"directive": "a9.0", "outcome": "done", "note": f"n{HALF}"}]
        body = report_body([0], receipts=[RECEIPT | {"conflict": f"c{HALF}"}], answers=answers)
        assert http.post(f"/v1/runs/{run}/report", **raw(body)).status_code == 200
        override = {"kind": "override", "value": 0.01, "reason": f"r{HALF}\U0001f600"}
        with monkeypatch.context() as also:
            also.setattr(command_checks, "check_text", lambda *_: None)
            assert http.post(f"/v1/runs/{run}/commands", **raw(override)).status_code == 201
    assert report(http, run, [1])["notices"][0].endswith("r?\U0001f600")
    told = {
        "": "c?", "/commands": "r?\U0001f600", "/journal": "n?", "/journal?format=csv": "n?", "/lineage": "",
        "/journal?format=jsonl": "n?",
    }  # fmt: skip
    for path, words in told.items():
        answer = http.get(f"/v1/runs/{run}{path}")
        text = answer.text if "csv" in path else "".join(map(str, map(json.loads, answer.text.splitlines())))
        assert (answer.status_code, words in text, HALF in text) == (200, True, False), path
    for form in ("json", "csv", "jsonl"):
        assert "r?" in http.get(f"/v1/audit?run={run}&format={form}").text
    assert http.get(f"/v1/runs/{run}/export").status_code == 200


# -- lists, series, decisions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(http):
    for i in range(9):
        name = f"m{i}"
        attach(
            http, name, project="many", labels={"parity": str(i % 2), "i": str(i)},
            policy=PLATEAU if i % 3 else {"type": "constant"},
        )  # fmt: skip
        if i % 4 == 0:
            report(http, f"many:{name}", [0], end="finished" if i else "failed")
    return {f"many:m{i}" for i in range(9)}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, range(9)),
        ({"status": "finished"}, [4, 8]),
        ({"status": "failed"}, [0]),
        ({"status": "active"}, [1, 2, 3, 5, 6, 7]),
        ({"status": "stale"}, []),
        ({"policy": "plateau"}, [1, 2, 4, 5, 7, 8]),
        ({"policy": "constant@1"}, [0, 3, 6]),
        ({"label": "parity=1"}, [1, 3, 5, 7]),
        ({"label": ["parity=1", "i=3"]}, [3]),
        ({"label": "parity=1", "policy": "plateau", "status": "active"}, [1, 5, 7]),
        ({"project": "nobody"}, []),
    ],
)
@pytest.mark.parametrize("limit", [2, 50])
def test_runs_are_filtered_and_come_in_pages_newest_first(http, many, query, wanted, limit):
    found, cursor = [], ""
    while cursor is not None:
        page = http.get("/v1/runs", params={"project": "many", "limit": limit, "cursor": cursor} | query).json()
        assert len(page["runs"]) <= limit
        found += page["runs"]
        cursor = page["cursor"]
    assert [run["run"] for run in found] == [f"many:m{i}" for i in sorted(wanted, reverse=True)]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1/runs?limit=0", "limit"),
        ("/v1/runs?limit=501", "limit"),
        ("/v1/runs?limit=x", "limit"),
        ("/v1/runs?limit=" + "9" * 40, "limit"),
        ("/v1/runs?cursor=x", "cursor"),
        ("/v1/runs?cursor=%C2%B2~r", "cursor"),
        ("/v1/runs?label=x", "label"),
        ("/v1/runs?label==x", "label"),
        (
            "/v1/runs?" + "&".join(f"label=l{i}=x" for i in range(limits.LABELS_MAX + 1)),
            f"more than {limits.LABELS_MAX}",
        ),
        ("/v1/runs?status=sleeping", "status"),
        ("/v1/runs/RUN/series?signals=", "signals"),
        ("/v1/runs/RUN/series?signals=lr:nobody", "nobody"),
        ("/v1/runs/RUN/series?signals=lr:", "lr:"),
        ("/v1/runs/RUN/series?signals=foo:a", "foo:a"),
        ("/v1/runs/RUN/series?signals=loss%3F", "loss?"),
        ("/v1/runs/RUN/series?signals=%3Dlr", "=lr"),
        ("/v1/runs/RUN/series?signals=%3Dat", "=at"),
        ("/v1/runs/RUN/series?signals=" + ",".join(f"s{i}" for i in range(33)), "32"),
        ("/v1/runs/RUN/series?points=1", "points"),
        ("/v1/runs/RUN/series?points=99999999", "points"),
        ("/v1/runs/RUN/series?from=x", "from"),
        ("/v1/runs/RUN/decisions?limit=0", "limit"),
    ],
)
@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_wrong_query_is_refused_naming_the_field(request, http, store, path, word):
    if store == "file":
        http = request.getfixturevalue("http_on_file")
    run = f"q{next(names)}"
    attach(http, run)
    report(http, run, [0, 1, 2], signals={"loss": [1.0, None, 2.0]})
    answer = http.get(path.replace("RUN", run))
    problem(answer, 422, word)


@pytest.mark.parametrize("number", ["9" * 40, "-" + "9" * 40, str(2**63)])
@pytest.mark.parametrize("store", ["memory", "file"])
def test_a_number_beyond_any_machines_is_an_answer_too(request, http, store, number):
    if store == "file":
        http = request.getfixturevalue("http_on_file")
    run = f"q{next(names)}"
    attach(http, run)
    for path in ("series?from=N", "series?to=N", "series?attempt=N", "decisions?after=N", "?cursor=N~r"):
        answer = http.get(f"/v1/runs/{run}/{path}".replace(f"/{run}/?", "?").replace("N", number))
        assert answer.status_code in (200, 404, 422), (path, answer.text)


@pytest.fixture(scope="module")
def http_on_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "j.db"
    with (
        flyball_server.running(f"sqlite:///{path}") as service,
        httpx.Client(base_url=service.http, trust_env=False, timeout=20) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def long(http):
    """1 000 steps in batches, one loss in 100 missing, one NaN; rewound to 600 and again along another line."""
    attach(http, "long", policy=PLATEAU)

    def losses(steps, attempt):
        return [None if s % 100 == 50 else "NaN" if s == 700 else s + 10_000.0 * attempt for s in steps]

    for first in range(0, 1000, 50):
        steps = range(first, first + 50)
        report(http, "long", steps, signals={"loss": losses(steps, 1)})
    for attempt, start in ((2, 600), (3, 400)):
        session = f"s{attempt}"
        attach(http, "long", policy=PLATEAU, session=session, resume=True, from_step=start, from_attempt=attempt - 1)
        steps = range(start, start + 100)
        fields = {"session": session, "attempt": attempt, "signals": {"loss": losses(steps, attempt)}}
        report(http, "long", steps, **fields)
    return "long"


def series(http, run, **query):
    answer = http.get(f"/v1/runs/{run}/series", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["series"]


def test_a_series_follows_the_cutoffs_its_attempt(http, long):
    for attempt, parts in (
        (1, [(1, 0, 1000)]),
        (2, [(1, 0, 600), (2, 600, 700)]),
        (3, [(1, 0, 400), (3, 400, 500)]),
        ("", [(1, 0, 400), (3, 400, 500)]),
    ):
        found = series(http, long, points=20000, **({"attempt": attempt} if attempt else {}))["loss"]
        wanted = [(s, s + 10_000.0 * a) for a, low, high in parts for s in range(low, high) if s % 100 != 50]
        wanted = [(s, "NaN" if s == 700 else v) for s, v in wanted]
        assert list(zip(found["step"], found["value"], strict=True)) == wanted
    assert problem(http.get(f"/v1/runs/{long}/series?attempt=4"), 404, "attempt 4")


def test_a_series_follows_a_line_that_skips_an_abandoned_attempt(http, run):
    attach(http, run)
    report(http, run, range(100), signals={"loss": [1.0] * 100})
    for attempt, start, parent in ((2, 50, 1), (3, 70, 1)):
        fields = {"session": f"s{attempt}", "resume": True, "from_step": start, "from_attempt": parent}
        attach(http, run, **fields)
        fields = {"session": f"s{attempt}", "attempt": attempt, "signals": {"loss": [float(attempt)] * 30}}
        report(http, run, range(start, start + 30), **fields)
    found = series(http, run)["loss"]
    assert found["step"] == list(range(100))
    assert found["value"] == [1.0] * 70 + [3.0] * 30


@pytest.mark.parametrize("points", [2, 3, 7, 100, 5000])
def test_a_series_has_at_most_the_points_asked_for_and_keeps_its_extremes(http, long, points):
    found = series(http, long, attempt=1, points=points)["loss"]
    assert 0 < len(found["step"]) <= points
    assert found["step"] == sorted(set(found["step"]))
    values = [v for v in found["value"] if v != "NaN"]
    assert min(values) == 10_000.0
    if points > 2:
        assert max(values) == 10_999.0
        assert "NaN" in found["value"]


def test_a_series_is_cut_to_the_steps_asked_for_with_both_ends(http, long):
    found = series(http, long, attempt=1, **{"from": 100, "to": 110})["loss"]
    assert found["step"] == list(range(100, 111))
    assert series(http, long, **{"from": 110, "to": 100})["loss"]["step"] == []
    assert series(http, long, **{"from": 10**7})["loss"]["step"] == []


def test_decided_settings_are_a_series_too(http, run):
    attach(http, run, policy=PLATEAU)
    receipts = [{"number": 1, "step": 0, "decided": -1, "lr": [0.1, 0.01]}]
    receipts += [{"number": 2, "step": 2, "decided": 1, "lr": [0.05, 0.005]}]
    report(http, run, range(3), receipts=receipts)
    found = series(http, run, signals="decided_lr:b,lr:a")
    pairs = dict(zip(found["decided_lr:b"]["step"], found["decided_lr:b"]["value"], strict=True))
    assert pairs == {0: 0.01, 1: 0.005, 2: 0.0025}
    assert (found["lr:a"]["step"], found["lr:a"]["value"]) == ([0, 2], [0.1, 0.05])


def test_decisions_come_in_pages_and_tell_code_reason_and_numbers(http, run):
    attach(http, run, policy=PLATEAU)
    for step in range(12):
        report(http, run, [step])
    found, after = [], 0
    while after is not None:
        page = http.get(f"/v1/runs/{run}/decisions", params={"after": after, "limit": 4}).json()
        found += page["decisions"]
        after = page["next"]
    assert found == http.get(f"/v1/runs/{run}/decisions").json()["decisions"]
    assert [d["step"] for d in found] == list(range(1, 12))
    first = found[0]
    assert first["decision"] == "reduce"
    assert first["lr_before"] == {"a": 0.1, "b": 0.01}
    assert first["lr_after"] == {"a": 0.05, "b": 0.005}
    assert first["fields"]["best"] == 1.0
    assert "cut from 0.1 to 0.05" in first["reason"]
    assert found[-1]["seq"] > first["seq"]
    assert math.isclose(found[-1]["lr_after"]["a"], 0.1 * 0.5**11)


# -- probes and descriptions -------------------------------------------------------------------------------------


def test_probes_answer_and_readiness_is_withdrawn(http):
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready", "store": "ok"}
    app = built(Failing(RuntimeError()), is_ready=False)
    assert TestClient(app).get("/readyz").status_code == 503


def test_the_openapi_document_names_every_route(http):
    document = http.get("/openapi.json").json()
    assert {
        "/v1/attach", "/v1/policies", "/v1/runs", "/v1/runs/{run}", "/v1/runs/{run}/decisions",
        "/v1/runs/{run}/report", "/v1/runs/{run}/series", "/v1/runs/{run}/signals", "/v1/store", "/v1/tombstones",
    } <= document["paths"].keys()  # fmt: skip
    assert document["info"]["title"] == "Flyball"


def test_every_policy_has_a_schema_that_its_own_defaults_satisfy(http):
    told = http.get("/v1/policies").json()
    assert {p["name"] for p in told["policies"]} == set(POLICIES)
    for entry in told["policies"]:
        schema = entry["schema"]
        inner = {"policy": "steady"} if "policy" in schema["properties"] else {"stages": [{"policy": "steady"}]}
        spec = resolve({"type": entry["name"], **(inner if POLICIES[entry["name"]].parts else {})}).spec()
        assert schema["properties"].keys() >= spec.keys()
        for name, value in spec.items():
            if name == "type":
                assert value.partition("@")[0] == schema["properties"][name]["const"]
            else:
                assert fits(value, schema["properties"][name], schema), (entry["name"], name, value)
                if "default" in schema["properties"][name] and value is None:
                    assert schema["properties"][name]["default"] is None
        assert entry["summary"]
    assert all(entry["schema"]["properties"]["type"] for entry in told["base_schedules"])


KINDS = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict}


def fits(value, schema, root):
    """Is `value` allowed by the few words of JSON Schema that are used here?"""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    if kind == "null":
        return value is None
    return isinstance(value, KINDS[kind]) and (kind == "boolean") == isinstance(value, bool)
