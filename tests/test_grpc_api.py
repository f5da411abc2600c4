"""Goal: both skins say the same. One scenario through gRPC and through HTTP gives equal answers and equal journals.

Method: the client's own two transports against one real service; for errors a bare channel and a service that fails as
it is told.
"""

import asyncio
import json
import math
from itertools import count

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.callers import Open

import flyball_server
from flyball.errors import Refused
from flyball.over_grpc import GrpcTransport
from flyball.over_http import HttpTransport
from flyball.wire import Answer, Attach, Group, Receipt, Report, Settings
from flyball_proto.v1 import steering_pb2 as pb
from flyball_proto.v1 import steering_pb2_grpc as pb_grpc
from flyball_server import grpc_api, limits
from flyball_server.core import errors
from flyball_server.http_api import problems

names = count()
GROUPS = (Group("a", 0.1, 0.9), Group("plain", 0.01), Group("adam", 0.001, None, (0.8, 0.999)))
PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.5}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture(scope="module")
def stub(service):
    with grpc.insecure_channel(service.grpc.removeprefix("grpc://")) as channel:
        yield pb_grpc.SteeringStub(channel)


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as client:
        yield client


def skins(service):
    return {
        "http": lambda: HttpTransport(service.http, None),
        "grpc": lambda: GrpcTransport(service.grpc.removeprefix("grpc://"), None),
    }


def attach_message(run, session="s1", **fields):
    blank = Attach(
        "default",
        run,
        session,
        {"k": "v"},
        GROUPS,
        PLATEAU,
        None,
        {},
        "absolute",
        0,
        None,
        False,
        None,
        None,
        0,
        "",
        "t",
    )
    return blank._replace(**fields)


def scene(connect, run, base, lag):
    """Attach, report, repeat, resume; what every message was answered with."""
    said = []

    def say(ask, message):
        try:
            answer = ask(message)
            said.append(answer._replace(digest="", **({"run": "r"} if hasattr(answer, "run") else {})))
        except Refused as error:
            said.append((error.code, str(error).replace(run, "r")))

    one, two = connect(), connect()
    try:
        fields = {"base": base, "lag": lag, "policy": PLATEAU}
        say(one.attach, attach_message(run, **fields))
        receipts = (
            Receipt(1, 0, -1, Settings((0.1, 0.01, math.nan), (0.9, None, 0.8), (0.0, 0.5, 1.0)), True, "x", 2),
        )
        signals = {"loss": [1.0, math.nan, None, math.inf, 2.0], "acc/1": [None, None, 0.1, -math.inf, 1e-310]}
        full = Report(run, "s1", 1, [0, 1, 2, 5, 9], signals, receipts, (), "")
        say(one.report, full)
        say(one.report, full)
        say(one.report, full._replace(steps=[10], signals={"loss": [3.0]}, answers=(Answer("d", "done", "n"),)))
        say(one.report, full._replace(steps=[], signals={}))
        say(two.attach, attach_message(run, "s2", **fields))
    finally:
        one.close()
        two.close()
    three = connect()
    try:
        say(three.attach, attach_message(run, "s2", resume=True, from_step=3, from_attempt=1, **fields))
        say(three.report, Report(run, "s2", 2, [3, 6], {"loss": [9.0, 9.0]}, (), (), "finished"))
        say(three.report, Report(run, "s1", 1, [11], {"loss": [1.0]}, (), (), ""))
    finally:
        three.close()
    return said


@pytest.mark.parametrize("skin", ["http", "grpc"])
def test_a_process_that_resumes_is_told_the_runs_own_seed_limits_and_references(service, skin):
    run, guard = f"r{next(names)}", {"max_lr": 0.5, "groups": {"a": {"min_lr": 1e-6}}}
    connect = skins(service)[skin]
    for session, fields in (("s1", {"guard": guard, "seed": -(2**53)}), ("s2", {"resume": True, "policy": {}})):
        transport = connect()
        now = tuple(group._replace(lr=group.lr / 2) if fields.get("resume") else group for group in GROUPS)
        told = transport.attach(attach_message(run, session, groups=now, **fields))
        transport.close()
        assert (told.seed, told.guard, told.reference) == (-(2**53), guard, (0.1, 0.01, 0.001))


def without_times(text):
    data = json.loads(text)
    for decision in data.get("decisions", []):
        decision.pop("at")
    return data


BASES = [None, {"type": "cosine", "T_max": 20}, {"type": "one_cycle", "max_lr": 0.2, "total_steps": 30}]


@pytest.mark.parametrize("base", BASES, ids=["", "cosine", "one_cycle"])
@pytest.mark.parametrize("lag", [None, 0])
def test_one_scenario_is_answered_alike_by_both_skins(service, http, base, lag):
    runs, said = {}, {}
    for name, connect in skins(service).items():
        runs[name] = f"r{next(names)}"
        said[name] = scene(connect, runs[name], base, lag)
    for over_http, over_grpc in zip(said["http"], said["grpc"], strict=True):
        assert repr(over_http) == repr(over_grpc)
    told = [http.get(f"/v1/runs/{run}").json() for run in runs.values()]
    own = ("run", "name", "digest", "created_at", "updated_at", "stale_s")
    assert {k: v for k, v in told[0].items() if k not in own} == {k: v for k, v in told[1].items() if k not in own}
    for path in ("series?signals=loss,acc/1,lr:a,noise_std:plain,momentum:adam,decided_lr:a", "decisions"):
        one, two = (http.get(f"/v1/runs/{run}/{path}").text.replace(run, "r") for run in runs.values())
        assert without_times(one) == without_times(two)


@pytest.mark.parametrize("skin", ["http", "grpc"])
@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"policy": {"type": "nothing"}}, "invalid", "nothing"),
        ({"groups": ()}, "invalid", "groups"),
        ({"policy": {"type": "plateau", "min_lr": [0.1]}}, "invalid", "min_lr"),
        ({"guard": {"max_lr": -1}}, "invalid", "max_lr"),
        ({"mode": "both"}, "invalid", "mode"),
        ({"lag": -1}, "invalid", "lag"),
        ({"resume": True}, "not_found", "resume"),
    ],
)
def test_a_refused_attach_is_refused_for_good_by_either_skin(service, skin, fields, code, word):
    transport = skins(service)[skin]()
    try:
        with pytest.raises(Refused, match=word) as caught:
            transport.attach(attach_message(f"r{next(names)}", **fields))
    finally:
        transport.close()
    assert caught.value.code == code


def test_both_tables_of_statuses_cover_every_kind_of_error():
    kinds = {kind.code for kind in [errors.SteeringError, *errors.SteeringError.__subclasses__()]}
    assert set(grpc_api.STATUS) == set(problems.STATUS) == kinds | {errors.Limited.code, errors.Stale.code}
    assert len(set(grpc_api.STATUS.values())) == len(kinds), "a status tells the kind"
    assert grpc_api.STATUS["stale"] == grpc_api.STATUS["conflict"], "and a stale one is a conflict"
    assert grpc_api.STATUS["limited"] == grpc_api.STATUS["busy"], "it is one kind of being busy"


class Failing:
    """A service whose every use case raises what it is told: the only way to see every kind of error."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        async def fail(*_, **__):
            raise self._error

        return fail


@pytest.mark.parametrize(
    "error",
    [
        errors.Invalid,
        errors.NotFound,
        errors.Conflict,
        errors.Stale,
        errors.Denied,
        errors.Unauthenticated,
        errors.Busy,
        errors.Limited,
        errors.SteeringError,
        RuntimeError,
    ],
)
def test_every_error_of_every_call_has_its_status(error):
    async def scenario():
        server, port = grpc_api.serve(Failing(error("the reason")), "127.0.0.1:0", door=Open(), credentials=None)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return [await failure(call) for call in calls(pb_grpc.SteeringStub(channel))]
        finally:
            await server.stop(None)

    async def failure(call):
        try:
            await call
        except grpc.aio.AioRpcError as found:
            return found.code(), found.details()

    async def steer(stub, message):
        return await stub.Steer(iter([message])).read()

    def calls(stub):
        yield stub.GetRun(pb.GetRunRequest(run="r"))
        yield stub.ListRuns(pb.ListRunsRequest())
        yield stub.AddSignals(pb.AddSignalsRequest(run="r", signals={"a": 1.0}))
        yield steer(stub, pb.ClientMessage(attach=pb.Attach(run="r", session="s")))
        yield steer(stub, pb.ClientMessage(report=pb.Report(run="r")))

    found = asyncio.run(scenario())
    if error is RuntimeError:
        assert {code for code, _ in found} == {grpc.StatusCode.INTERNAL}
        assert not any("the reason" in details for _, details in found), "a caller sees no inside"
    else:
        assert found == [(grpc_api.STATUS[error.code], "the reason")] * 5


def steer(stub, *messages):
    return list(stub.Steer(iter(messages)))


def proto_attach(run, **fields):
    return pb.ClientMessage(
        attach=pb.Attach(run=run, session="s1", groups=[pb.Group(name="a", lr=0.1)], mode="absolute", **fields)
    )


def proto_report(run, **fields):
    return pb.ClientMessage(report=pb.Report(run=run, session="s1", attempt=1, **fields))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"step": [1, 1]}, "step"),
        ({"step": [-1]}, "step"),
        ({"step": [0, 1], "signals": [pb.Column(name="loss", value=[1.0])]}, "loss"),
        ({"step": [0], "signals": [pb.Column(name="loss", value=[1.0], missing=[7])]}, "missing"),
        ({"step": [0], "signals": [pb.Column(name="", value=[1.0])]}, "signals"),
        ({"step": [0], "signals": [pb.Column(name="a", value=[1.0]), pb.Column(name="a", value=[2.0])]}, "a"),
        ({"receipts": [pb.Receipt(number=1, lr=[])]}, "receipts"),
        ({"receipts": [pb.Receipt(number=1, lr=[0.1], momentum=[0.1, 0.2])]}, "momentum"),
        ({"receipts": [pb.Receipt(number=2, lr=[0.1]), pb.Receipt(number=1, lr=[0.1])]}, "receipts"),
        ({"answers": [pb.DirectiveAnswer(directive="d", outcome="maybe")]}, "outcome"),
        ({"receipts": [pb.Receipt(number=1, lr=[0.1], ranks=-1)]}, "ranks"),
        ({"receipts": [pb.Receipt(number=1, lr=[0.1], ranks=1, of_ranks=-1)]}, "of_ranks"),
        ({"end": "done"}, "end"),
        ({"step": range(limits.BATCH_MAX + 1)}, str(limits.BATCH_MAX)),
    ],
)
def test_a_wrong_report_is_an_invalid_argument_naming_the_field(stub, fields, word):
    run = f"r{next(names)}"
    with pytest.raises(grpc.RpcError) as caught:
        steer(stub, proto_attach(run), proto_report(run, **fields))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert word in caught.value.details()
    assert stub.GetRun(pb.GetRunRequest(run=run)).seq == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"policy_json": "{"}, "policy_json"),
        ({"policy_json": "[1]"}, "policy_json"),
        ({"policy_json": "[" * 100_000}, "policy_json"),
        ({"base_json": "1"}, "base_json"),
        ({"guard_json": '{"max_lr": NaN}'}, "max_lr"),
        ({"guard_json": '{"a": 1}'}, "guard.a"),
        ({"lag": -1}, "lag"),
        ({"from_step": -1}, "from_step"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_attach_is_an_invalid_argument_naming_the_field(stub, fields, word):
    run = f"r{next(names)}"
    with pytest.raises(grpc.RpcError) as caught:
        steer(stub, proto_attach(run, **fields))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert word in caught.value.details()


def test_a_receipt_that_does_not_say_on_how_many_ranks_is_of_one(stub, http):
    run = f"r{next(names)}"
    steer(stub, proto_attach(run))
    given = {"kind": "override", "value": 0.01, "reason": "a test"}
    command = http.post(f"/v1/runs/{run}/commands", json=given).json()["id"]
    receipt = pb.Receipt(number=1, step=1, lr=[0.01], confirms=9)
    steer(stub, proto_attach(run), proto_report(run, step=[0]), proto_report(run, step=[1], receipts=[receipt]))
    found = http.get(f"/v1/runs/{run}/commands/{command}").json()
    assert found["applied"] == {"step": 1, "ranks": 1, "of_ranks": 1}


def test_a_message_of_a_newer_client_is_refused(stub):
    with pytest.raises(grpc.RpcError) as caught:
        steer(stub, pb.ClientMessage())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=60, deadline=None)
@given(
    run=st.text(max_size=4),
    session=st.text(max_size=3),
    groups=st.lists(
        st.builds(pb.Group, name=st.text(max_size=3), lr=st.floats(), betas=st.lists(st.floats(), max_size=3)),
        max_size=2,
    ),
    ints=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 4),
    texts=st.tuples(*[st.sampled_from(["", "{}", "x", '{"type":"plateau"}', "null", '{"type":null}'])] * 3),
)
def test_no_attach_whatever_its_fields_breaks_the_service(stub, run, session, groups, ints, texts):
    message = pb.Attach(
        run=run, session=session, groups=groups, seed=ints[0], lag=ints[1], from_step=ints[2], from_attempt=ints[3],
        policy_json=texts[0], base_json=texts[1], guard_json=texts[2], resume=ints[0] % 2 == 0,
    )  # fmt: skip
    try:
        steer(stub, pb.ClientMessage(attach=message))
    except grpc.RpcError as error:
        code = error.code()
    else:
        code = grpc.StatusCode.OK
    allowed = {grpc_api.STATUS[kind] for kind in ("invalid", "not_found", "conflict")}
    assert code in allowed | {grpc.StatusCode.OK}


def test_other_processes_add_signals_and_read_over_grpc(stub, http):
    run = f"r{next(names)}"
    steer(stub, proto_attach(run, labels={"team": "x"}, project="p"), proto_report(f"p:{run}", step=[0]))
    assert stub.AddSignals(pb.AddSignalsRequest(run=f"p:{run}", signals={"val_loss": math.nan})).seq == 4
    one = stub.GetRun(pb.GetRunRequest(run=f"p:{run}"))
    told = http.get(f"/v1/runs/p:{run}").json()
    for name in ("run", "project", "name", "status", "policy", "attempt", "step", "seq", "digest"):
        assert getattr(one, name) == told[name]
    assert [(g.group, g.lr) for g in one.settings] == [(g["group"], g["lr"]) for g in told["settings"]]
    page = stub.ListRuns(pb.ListRunsRequest(labels={"team": "x"}, project="p", limit=1))
    assert [r.run for r in page.runs] == [f"p:{run}"]
    assert page.cursor == ""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListRuns(pb.ListRunsRequest(cursor="x"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_beyond_the_limit_is_refused(service):
    with grpc.insecure_channel(service.grpc.removeprefix("grpc://")) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.SteeringStub(channel).GetRun(pb.GetRunRequest(run="r" * limits.BODY_BYTES_MAX), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
