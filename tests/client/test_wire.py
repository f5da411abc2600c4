"""Goal: one contract in four places: steering.proto, the client's tuples, the service's messages and the HTTP bodies.

Method: each place is read as {field: (class of type, may it be absent)} and compared; what differs on purpose is listed
here, with its reason. Then values: a message through every place comes back equal.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence

import pytest
from google.protobuf.descriptor import FieldDescriptor as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball import over_grpc, wire
from flyball_proto.v1 import steering_pb2 as pb
from flyball_server import grpc_api, messages
from flyball_server.core import events
from flyball_server.core import types as core
from flyball_server.core.commands import Control
from flyball_server.http_api import steer

KINDS = {
    F.CPPTYPE_INT32: "int", F.CPPTYPE_INT64: "int", F.CPPTYPE_UINT32: "int", F.CPPTYPE_DOUBLE: "number",
    F.CPPTYPE_STRING: "text", F.CPPTYPE_BOOL: "bool",
}  # fmt: skip


def of_proto(message, *, renamed=None, own=()):
    """A proto message. `renamed`: JSON text that stands for a mapping; `own`: fields that only proto has."""
    out = {}
    for field in message.DESCRIPTOR.fields:
        name = (renamed or {}).get(field.name, field.name)
        if field.name in own:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            kind = "mapping"
        elif field.message_type is not None:
            kind = "list" if field.is_repeated else "message"
        elif name != field.name:
            kind = "mapping"
        else:
            kind = "list" if field.is_repeated else KINDS[field.cpp_type]
        out[name] = (kind, field.has_presence and field.message_type is None)
    return out


def of_hints(kind):
    """A NamedTuple or a pydantic model."""
    return {name: of_hint(hint) for name, hint in typing.get_type_hints(kind).items() if name != "model_config"}


def of_hint(hint):
    absent = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        absent, hint = len(members) < len(typing.get_args(hint)), members[0]
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return "text", absent
    simple = {int: "int", float: "number", str: "text", bool: "bool"}
    if origin in simple:
        return simple[origin], absent
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping", absent
    if isinstance(origin, type) and (issubclass(origin, Sequence)) and not hasattr(origin, "_fields"):
        return "list", absent
    return "message", absent


def without(fields, *names):
    return {name: kind for name, kind in fields.items() if name not in names}


JSON_TEXTS = {"policy_json": "policy", "base_json": "base", "guard_json": "guard", "shadows_json": "shadows"}
#: An empty text stands for "none" in proto, which has no absent message inside a text.
EMPTY_IS_NONE = {"base": ("mapping", True)}
#: proto says "none" with an empty list.
EMPTY_LISTS = {"betas": ("list", True), "momentum": ("list", True), "noise_std": ("list", True)}


def test_attach_agrees():
    # Whether a message is there is seen by asking for it, in proto.
    proto = of_proto(pb.Attach, renamed=JSON_TEXTS) | EMPTY_IS_NONE | {"fork": ("message", True)}
    assert proto == of_hints(wire.Attach) == of_hints(messages.Attach) == of_hints(steer.AttachBody)


def test_forks_agree():
    proto = of_proto(pb.Fork)
    assert proto == of_hints(messages.Fork) == of_hints(steer.ForkBody)
    # A job that forks always knows from which step it goes on.
    assert of_hints(wire.Fork) == proto | {"step": ("int", False)}


def test_groups_agree():
    proto = of_proto(pb.Group) | {"betas": EMPTY_LISTS["betas"]}
    assert proto == of_hints(wire.Group) == of_hints(core.Group) == of_hints(steer.GroupBody)


def test_attached_agrees():
    proto = of_proto(pb.Attached, renamed=JSON_TEXTS)
    assert proto["changes"] == ("message", False)
    # Tuples hold the rows of Changes as pairs; the service says its one pair in two fields.
    assert of_hints(wire.Attached) == proto | {"changes": ("list", False)}
    assert of_hints(steer.AttachedBody) == proto
    service = of_hints(messages.Attached)
    assert (service.pop("decided"), service.pop("settings")) == (("int", False), ("message", False))
    assert service.pop("earlier") == ("list", False)
    assert service == without(proto, "changes")


def test_report_agrees():
    proto = of_proto(pb.Report)
    assert proto["signals"] == proto["step"] == ("list", False)
    # Columns are a mapping by name everywhere but in proto; the tuples call the column of steps by its plural.
    tuples = without(proto, "step") | {"steps": ("list", False), "signals": ("mapping", False)}
    assert of_hints(wire.Report) == of_hints(messages.Report) == tuples
    # Over HTTP the run stands in the path.
    assert of_hints(steer.ReportBody) == without(proto, "run") | {"signals": ("mapping", False)}


def test_receipts_agree():
    proto = of_proto(pb.Receipt)
    flat = {"lr", "momentum", "noise_std"}
    # The three rows are one field, Settings, in the tuples.
    tuples = without(proto, *flat) | {"settings": ("message", False), "wanted_lr": ("list", True)}
    service = of_hints(events.Receipt)
    service["wanted_lr"] = service.pop("wanted")  # settings are all it is about there
    assert of_hints(wire.Receipt) == service == tuples
    assert of_hints(steer.ReceiptBody) == proto | without(EMPTY_LISTS, "betas") | {"wanted_lr": ("list", True)}
    assert wire.Settings._fields == core.Settings._fields == ("lr", "momentum", "noise_std")
    assert of_hints(wire.Settings) == of_hints(core.Settings)


def test_advice_agrees():
    proto = of_proto(pb.Advice, renamed=JSON_TEXTS)
    assert of_hints(wire.Advice) == of_hints(messages.Advice) == proto | {"changes": ("list", False)}
    assert of_hints(steer.AdviceBody) == proto


def test_changes_answers_directives_and_side_signals_agree():
    assert of_hints(steer.ChangesBody) == of_proto(pb.Changes) | without(EMPTY_LISTS, "betas")
    assert of_proto(pb.DirectiveAnswer) == of_hints(wire.Answer) == of_hints(steer.AnswerBody)
    assert without(of_hints(events.DirectiveAnswered), "attempt") == of_hints(wire.Answer)
    directive = of_proto(pb.Directive, renamed={"args_json": "args"})
    assert directive == of_hints(wire.Directive) == of_hints(messages.Directive) == of_hints(steer.DirectiveBody)
    assert of_proto(pb.Control) == of_hints(wire.Control) == of_hints(Control) == of_hints(steer.ControlBody)
    # HTTP: the run is in the path, the actor is who calls.
    assert without(of_proto(pb.AddSignalsRequest), "run", "actor") == of_hints(steer.SignalsBody)
    assert of_proto(pb.AddSignalsReply) == of_hints(steer.SignalsReply)


def test_tuples_are_in_the_same_order_so_that_they_may_be_handed_over_by_place():
    for mine, theirs in (
        (wire.Attach, messages.Attach),
        (wire.Report, messages.Report),
        (wire.Group, core.Group),
        (wire.Settings, core.Settings),
        (wire.Control, Control),
        (wire.Directive, messages.Directive),
        (wire.Advice, messages.Advice),
    ):
        assert mine._fields == theirs._fields
    assert wire.Receipt._fields == tuple("wanted_lr" if name == "wanted" else name for name in events.Receipt._fields)


def test_what_an_http_body_leaves_out_means_what_proto_leaves_out_means():
    body = steer.AttachBody(run="r", session="s", groups=[])
    empty = grpc_api.read_attach(pb.Attach(run="r", session="s"))
    for name in messages.Attach._fields:
        told = getattr(empty, name)
        assert (getattr(body, name) if name != "groups" else ()) == (told or "default" if name == "project" else told)
    told = grpc_api.read_report(pb.Report(receipts=[pb.Receipt(number=1)])).receipts[0]
    default = steer.ReceiptBody(number=1, step=0, decided=0, lr=[])
    assert (told.late, told.conflict) == (default.late, default.conflict)


# -- values ------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ints = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats()
plain = st.dictionaries(words, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words, max_size=2)


@st.composite
def reports(draw):
    n = draw(st.integers(0, 4))
    g = draw(st.integers(1, 3))
    column = st.lists(st.none() | numbers, min_size=n, max_size=n)
    row = st.tuples(*[numbers] * g)
    rows = st.builds(wire.Settings, row, st.none() | row, st.none() | row)
    receipt = st.builds(
        wire.Receipt, ints, ints, ints, rows, st.booleans(), words, ints.filter(bool), ints,
        st.dictionaries(words, numbers, max_size=2), st.none() | row, ints,
    )  # fmt: skip
    answer = st.builds(wire.Answer, words, st.sampled_from(["done", "declined"]), words, ints)
    control = st.builds(wire.Control, words, *[st.floats(-1e9, 1e9)] * 3)
    return wire.Report(
        draw(words), draw(words), draw(ints), draw(st.lists(ints, min_size=n, max_size=n)),
        draw(st.dictionaries(words, column, max_size=3)), tuple(draw(st.lists(receipt, max_size=2))),
        tuple(draw(st.lists(answer, max_size=2))),
        draw(st.sampled_from(["", "finished", "failed"])), tuple(draw(st.lists(control, max_size=2))),
    )  # fmt: skip


def in_words(value):
    """As text, tuples and lists alike, NaN equal to NaN, of whatever class a tuple is."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k!r}:{in_words(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(in_words, value)) + "]"
    return repr(value)


@settings(max_examples=150, deadline=None)
@given(message=reports())
def test_a_report_arrives_as_it_was_sent_over_both_wires(message):
    over_proto = grpc_api.read_report(pb.Report.FromString(over_grpc._report(message).SerializeToString()))
    body = steer.ReportBody.model_validate(json.loads(json.dumps(wire.report_json(message), allow_nan=False)))
    told = [in_words(tuple(r)) for r in over_proto.receipts]
    assert told == [in_words(tuple(steer._receipt(r))) for r in body.receipts]
    assert told == [in_words(tuple(r)) for r in message.receipts]
    for name in ("session", "attempt", "signals", "end"):
        assert in_words(getattr(over_proto, name)) == in_words(getattr(message, name)) == in_words(getattr(body, name))
    assert in_words(over_proto.steps) == in_words(message.steps) == in_words(body.step)
    assert [a[1:] for a in over_proto.answers] == [tuple(a) for a in message.answers]
    assert [tuple(a.model_dump().values()) for a in body.answers] == [tuple(a) for a in message.answers]
    assert [tuple(c) for c in over_proto.controls] == [tuple(c) for c in message.controls]
    assert [tuple(c.model_dump().values()) for c in body.controls] == [tuple(c) for c in message.controls]


@given(
    groups=st.lists(
        st.builds(
            wire.Group,
            words,
            st.floats(0, 1e9),
            st.none() | st.floats(0, 1),
            st.none() | st.tuples(*[st.floats(0, 1)] * 2),
            st.booleans(),
        ),
        max_size=3,
    ),
    texts=st.tuples(*[words] * 5),
    maps=st.tuples(st.dictionaries(words, words, max_size=2), plain, st.none() | plain, plain),
    optional=st.tuples(*[st.none() | ints] * 3),
    seed=ints,
    resume=st.booleans(),
    new=st.tuples(
        st.dictionaries(words, plain, max_size=2),
        st.none() | st.builds(wire.Fork, words, st.none() | ints, ints, ints, words),
        st.sampled_from(["refuse", "import"]),
    ),
)
def test_an_attach_arrives_as_it_was_sent_over_both_wires(groups, texts, maps, optional, seed, resume, new):
    project, run, session, digest, client = texts
    message = wire.Attach(
        project, run, session, maps[0], tuple(groups), maps[1], maps[2], maps[3], "absolute", seed, optional[0], resume,
        optional[1], optional[2], seed, digest, client, *new,
    )  # fmt: skip
    over_proto = grpc_api.read_attach(pb.Attach.FromString(over_grpc._attach(message).SerializeToString()))
    body = steer.AttachBody.model_validate(json.loads(json.dumps(wire.attach_json(message), allow_nan=False)))
    for name in messages.Attach._fields:
        told = getattr(body, name) if name != "groups" else [tuple(g.model_dump().values()) for g in body.groups]
        if name == "fork" and told is not None:
            told = tuple(told.model_dump().values())
        assert in_words(getattr(over_proto, name)) == in_words(getattr(message, name)) == in_words(told)


finite = st.floats(0, 1e9)


@given(
    rows=st.lists(
        st.tuples(
            ints,
            st.builds(
                core.Settings,
                st.tuples(finite, finite),
                st.none() | st.tuples(st.floats(0, 0.99), st.none() | st.floats(0, 0.99)),
                st.none() | st.tuples(finite, finite),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    asked=st.tuples(
        st.lists(st.builds(messages.Directive, words, words, plain), max_size=2).map(tuple),
        ints,
        st.dictionaries(words, st.floats(-1e9, 1e9), max_size=2),
        plain,
        st.lists(words, max_size=2).map(tuple),
    ),
)
def test_an_advice_comes_back_alike_over_both_wires(rows, asked):
    message = messages.Advice(1, 2, 3, 4, "d", rows, "p", "c", "r", *asked)
    over_proto = over_grpc._advice(pb.Advice.FromString(grpc_api.write_advice(message).SerializeToString()))
    over_http = wire.advice_of(json.loads(steer._advice(message).model_dump_json()))
    assert over_http == over_proto
    assert in_words(over_http.changes) == in_words(rows)
    assert in_words(over_http[9:]) == in_words(asked)


@given(
    guard=plain,
    seed=ints,
    reference=st.lists(finite, min_size=2, max_size=2).map(tuple),
    now=st.builds(core.Settings, st.tuples(finite, finite), st.none() | st.tuples(st.none(), finite), st.none()),
)
def test_an_attached_comes_back_alike_over_both_wires(guard, seed, reference, now):
    message = messages.Attached("r", 1, 2, 3, 4, 5, "d", "p@1", 3, now, "p", "c", "why", reference, seed, guard)
    over_proto = over_grpc._attached(pb.Attached.FromString(grpc_api.write_attached(message).SerializeToString()))
    over_http = wire.attached_of(json.loads(steer._attached(message).model_dump_json()))
    assert over_http == over_proto
    assert (over_http.seed, over_http.guard, over_http.reference) == (seed, guard, reference)


def test_an_attached_of_an_older_service_is_one_too():
    message = messages.Attached(
        "r", 1, 2, 3, 4, 5, "d", "p@1", 3, core.Settings((0.1,)), "", "", "", (0.1,), 7, {"a": 1}
    )
    body = steer._attached(message).model_dump()
    newer = ("seed", "guard", "controls", "confirm")
    older = wire.attached_of({name: value for name, value in body.items() if name not in newer})
    assert (older.seed, older.guard, older.controls, older.confirm) == (0, {}, {}, 0)
    assert older._replace(seed=7, guard={"a": 1}) == wire.attached_of(body)


def test_a_guard_that_is_no_json_does_not_lose_the_answer():
    assert over_grpc._attached(pb.Attached(run="r", guard_json="{no")).guard == "{no"


@pytest.mark.parametrize("broken", [{}, {"attempt": 1}, []])
def test_an_answer_that_is_none_is_noticed(broken):
    for read in (wire.attached_of, wire.advice_of):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read(broken)
