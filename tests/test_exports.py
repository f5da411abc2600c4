"""Goal: an export is the whole run, one changed byte is found and placed, and nothing gets in that is not proved.

Method: exports of real runs, each byte flipped in turn, files cut off all along; forgeries signed with a key of the
forger's own; imports over REST into real services.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import re
import sqlite3

import httpx
import pytest
from tests.test_commands import Job
from tests.test_verify import FORGERIES, a_run, copied, flipped, made, with_column
from typer.testing import CliRunner

import flyball_server
from flyball import api
from flyball.errors import FlyballError, Refused
from flyball.exporting import Format, export_run
from flyball_server import limits, signing
from flyball_server.app import signer_of
from flyball_server.cli import cli as server_cli
from flyball_server.core.errors import Damaged, Invalid
from flyball_server.exports.check import check
from flyball_server.exports.form import MAGIC, line, signed_part
from flyball_server.exports.read import ExportedRun, _Followed, scan
from flyball_server.exports.write import written
from flyball_server.settings import Settings
from flyball_server.storage import open_journal
from flyball_server.storage.journal import RunFilter
from flyball_server.storage.packing import compress

SIGNER = signing.new_signer()
PLACE = re.compile(r"(?:bytes? (\d+)(?: to (\d+))?)")


@pytest.fixture(scope="module")
def real():
    return made()


@pytest.fixture
def few_rows(monkeypatch):
    """Parts of at most fourteen rows: the run's 29 make three parts, the last a single row."""
    monkeypatch.setattr(limits, "EXPORT_ROWS_MAX", 14)


def exported(journal, signer=SIGNER, **record):
    found = journal.record("r")._replace(**record)
    return b"".join(written(journal, found, "0.1.0", 1_700_000_000_000_000, signer))


def problem_of(data, folder):
    path = folder / "r.flyball"
    path.write_bytes(data)
    return check(path).verdict.problem


@pytest.mark.parametrize("options", [{}, {"policy": {"type": "windowed", "window_size": 5, "cooldown_steps": 0}}])
def test_an_export_has_every_row_as_it_was(few_rows, tmp_path, options):
    journal = made(**options)
    path = tmp_path / "r.flyball"
    path.write_bytes(exported(journal))
    found = check(path)
    assert found.verdict.problem == ""
    assert found.verdict.head == journal.record("r").hash.hex()
    assert found.signer == signing.fingerprint(SIGNER.public)
    assert len(found.export.parts) == -(-journal.record("r").seq // 14)
    assert list(ExportedRun(scan(path)).rows("r")) == list(journal.rows("r"))
    assert found.export.record == journal.record("r")


def test_one_byte_changed_anywhere_is_found_and_placed(few_rows, real, tmp_path):
    data = exported(real)
    path = tmp_path / "r.flyball"
    path.write_bytes(data)
    parts = scan(path).parts
    ends = [
        data.index(b"\n", data.index(b"\n", 14) + 1) + 1,
        *(part.start + part.size + 1 for part in parts),
        len(data),
    ]
    begins = [14, *ends[:-1]]
    with path.open("r+b", buffering=0) as file:
        for at in range(len(data)):
            file.seek(at)
            file.write(bytes([data[at] ^ (1 << at % 8)]))
            with pytest.raises(Invalid) as caught:
                scan(path)
            low, high = next((int(a), int(b or a)) for a, b in PLACE.findall(str(caught.value)))
            begin, end = next(((b, e) for b, e in zip(begins, ends, strict=True) if b <= at < e), (0, 14))
            assert begin <= low < end, f"byte {at}: {caught.value}"
            assert high >= at or "from byte" in str(caught.value), f"byte {at}: {caught.value}"
            file.seek(at)
            file.write(data[at : at + 1])
    assert check(path).verdict.problem == ""


def test_a_file_cut_off_or_with_something_behind_it_is_refused(few_rows, real, tmp_path):
    data = exported(real)
    path = tmp_path / "r.flyball"
    path.write_bytes(data + b"\n")
    with pytest.raises(Invalid, match=f"byte {len(data)}: something stands behind the last line"):
        scan(path)
    with path.open("r+b") as file:
        for size in sorted(
            {*range(0, len(data), 5), *(at for at, byte in enumerate(data) if byte == 10)}, reverse=True
        ):
            file.truncate(size)
            with pytest.raises(Invalid, match="byte"):
                scan(path)


@pytest.mark.parametrize("name", ["a loss", "a decision", "a mark", "a step"])
def test_a_forged_run_that_its_forger_signed_does_not_fold(real, tmp_path, name):
    forged = copied(real, FORGERIES[name], rehash=True)
    head = list(forged.rows("r"))[-1].hash
    forged._records["r"] = forged._records["r"]._replace(hash=head)
    problem = problem_of(exported(forged, signing.new_signer()), tmp_path)
    assert re.search(r"row \d+", problem), problem


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "active"), ("step", 43), ("step", None), ("attempt", 1), ("project", "other"), ("name", "other"),
        ("policy", "plateau@2"), ("labels", {}), ("created_at", 1), ("updated_at", 1),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_say_what_the_rows_say_is_refused(real, tmp_path, field, value):
    assert f"(manifest): its record's {field} is" in problem_of(exported(real, **{field: value}), tmp_path)


@pytest.mark.parametrize("field", ["project", "name", "run"])
def test_a_name_that_no_job_could_have_is_refused(real, tmp_path, field):
    def renamed(rows):
        return [rows[0]._replace(meta={"spec": {**rows[0].meta["spec"], field: "../x"}}), *rows[1:]]

    forged = copied(real, renamed, rehash=True)
    problem = problem_of(exported(forged, hash=list(forged.rows("r"))[-1].hash), tmp_path)
    assert "'../x'" in problem


def test_a_damaged_run_is_not_signed(real):
    def change(rows):
        return [*rows[:4], with_column(rows[4], "lr" if rows[4].kind == "applied" else "=lr", flipped), *rows[5:]]

    with pytest.raises(Damaged, match=r"run 'r', row 5 is damaged: `flyball-server verify`"):
        exported(copied(real, change, rehash=False))
    with pytest.raises(Damaged, match="ends with row 28, and should with row 29"):
        exported(copied(real, lambda rows: rows[:-1], rehash=False))


def test_an_export_that_the_service_breaks_off_leaves_no_file(tmp_path):
    file = tmp_path / "j.db"
    asyncio.run(a_run(open_journal(f"sqlite:///{file}")))
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("UPDATE journal SET at = at + 1 WHERE seq = 20")
        db.commit()
    with (
        flyball_server.running(store=f"sqlite:///{file}") as service,
        api.Client(service.http) as client,
        pytest.raises(FlyballError, match=r"broke off|damaged"),
    ):
        export_run(client, "r", Format.FLYBALL, tmp_path / "r.flyball")
    assert not list(tmp_path.glob("*r.flyball*"))


def test_another_key_is_another_signer(real, tmp_path):
    path = tmp_path / "r.flyball"
    path.write_bytes(exported(real))
    other = signing.new_signer().public
    assert check(path, SIGNER.public).verdict.problem == ""
    problem = check(path, other).verdict.problem
    assert signing.fingerprint(SIGNER.public) in problem
    assert signing.fingerprint(other) in problem


def test_the_signature_is_checked_against_the_whole_last_line(real, tmp_path):
    body, _, last = exported(real)[:-1].rpartition(b"\n")
    stranger = signing.new_signer()
    end = {**json.loads(last), "key": stranger.public.hex()}
    text = json.dumps(end, sort_keys=True, separators=(",", ":")).encode()
    assert "the signature is not that of the key in the file" in problem_of(body + b"\n" + text + b"\n", tmp_path)


@pytest.mark.parametrize("form", [{"separators": (", ", ":")}, {"sort_keys": False}], ids=["spaces", "order"])
def test_a_line_written_in_another_way_is_refused_though_it_says_the_same(real, tmp_path, form):
    body, _, last = exported(real)[:-1].rpartition(b"\n")
    end = dict(reversed(json.loads(last).items()))
    text = json.dumps(end, **{"sort_keys": True, "separators": (",", ":"), **form}).encode()
    assert "not the canonical JSON" in problem_of(body + b"\n" + text + b"\n", tmp_path)


def assembled(parts):
    """A file of these parts (header, bytes), all checksums right, signed by its maker."""
    data = MAGIC
    for header, payload in parts:
        header = {**header, "bytes": len(payload)}
        data += line({**header, "sha256": hashlib.sha256(line(header) + payload).hexdigest()}) + payload + b"\n"
    head, stranger = parts[-1][0], signing.new_signer()
    end = {
        "part": "end", "bytes": len(data), "rows": head["last"], "head": head["hash"],
        "sha256": hashlib.sha256(data).hexdigest(), "key": stranger.public.hex(),
    }  # fmt: skip
    return data + line({**end, "signature": stranger.sign(signed_part(end)).hex()})


def dissected(data):
    """The parts of a file: what `assembled` takes."""
    parts, at = [], len(MAGIC)
    while True:
        end = data.index(b"\n", at)
        header = json.loads(data[at:end])
        if header["part"] == "end":
            return parts
        at = end + 1 + header["bytes"] + 1
        parts.append(({k: v for k, v in header.items() if k not in ("bytes", "sha256")}, data[end + 1 : at - 1]))


def test_parts_may_be_put_together_by_anybody_but_not_otherwise(few_rows, real, tmp_path):
    manifest, *rows = dissected(exported(real))
    assert problem_of(assembled([manifest, *rows]), tmp_path) == ""
    (one, first), (two, _), (three, _) = rows
    other = dissected(exported(made(guard={"max_lr": 1})))[1][1]
    wrong = {
        "part 3 .*behind row 14 comes row 15": [manifest, rows[0], rows[2]],
        "its specification is not the one in row 1": [manifest, (one, other), rows[1], rows[2]],
        "at most 14 rows": [manifest, ({**one, "last": 15}, first), rows[1], rows[2]],
        "row 15 is missing": [
            manifest,
            rows[0],
            (two, first),
            rows[2],
        ],
        "unpacked it claims 70000000 bytes": [manifest, rows[0], (two, compress([bytes(70_000_000)])), rows[2]],
        "rows 29 to 29 are damaged: it says that it holds 14": [manifest, rows[0], rows[1], (three, first)],
        "no manifest": rows,
        "part 1 .*has nothing; it must have": [(manifest[0], b"{}"), *rows],
        "neither rows nor the end": [manifest, rows[0], manifest, rows[1], rows[2]],
    }
    for told, parts in wrong.items():
        problem = problem_of(assembled(parts), tmp_path)
        assert re.search(told, problem), (told, problem)


# Imports, over REST


@pytest.fixture
def here(tmp_path):
    with flyball_server.running(store=f"sqlite:///{tmp_path}/here.db") as service, api.Client(service.http) as client:
        yield client


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_an_import_is_the_same_run_and_comes_once(few_rows, real, tmp_path, kind):
    store = "memory:" if kind == "memory" else f"sqlite:///{tmp_path}/there.db"
    data = exported(real)
    with flyball_server.running(store=store) as service, api.Client(service.http) as client:
        found = client.import_run(io.BytesIO(data))
        head = real.record("r").hash.hex()
        assert found == {
            "run": "r", "status": "imported", "seq": 29, "digest": head, "signer": signing.fingerprint(SIGNER.public)
        }  # fmt: skip
        assert client.import_run(io.BytesIO(data)) == {**found, "status": "unchanged"}
        assert client.run("r")["digest"] == head
        assert list(client.decisions("r"))
        assert [run["run"] for run in client.runs(labels={"k": "v"})] == ["r"]
        again = io.BytesIO()
        client.export("r", again)
        client.report("r", val_loss=0.5)
        with pytest.raises(Refused, match=rf"is 30 with the hash .*the export's is 29 with {head}") as caught:
            client.import_run(io.BytesIO(data))
        assert caught.value.code == "conflict"
    path = tmp_path / "again.flyball"
    path.write_bytes(again.getvalue())
    assert list(ExportedRun(scan(path)).rows("r")) == list(real.rows("r"))
    if kind == "sqlite":
        journal = open_journal(store)
        journal.start(lambda _: None)
        assert list(journal.rows("r"))[:-1] == list(real.rows("r"))
        assert journal.records(RunFilter(), after=None, limit=9) == [journal.record("r")]
        journal.close()


def test_a_deleted_run_neither_leaves_nor_comes_back(here, real):
    data = exported(real)
    here.import_run(io.BytesIO(data))
    here.delete("r", reason="a test")
    for ask in (lambda: here.export("r", io.BytesIO()), lambda: here.import_run(io.BytesIO(data))):
        with pytest.raises(Refused, match=r"deleted.*a test"):
            ask()
    assert list(here.runs()) == []


def test_what_does_not_verify_leaves_nothing_behind(here, real, tmp_path):
    data = exported(real)
    wrong = {
        "bytes": data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
        "file ends": data[:-1],
        "first line": b"{}",
        "its record's status": exported(real, status="active"),
    }
    for told, bad in wrong.items():
        with pytest.raises(Refused, match=told) as caught:
            here.import_run(io.BytesIO(bad))
        assert caught.value.code == "invalid"
    assert list(here.runs()) == []
    assert here.import_run(io.BytesIO(data))["status"] == "imported"


def test_only_an_import_may_be_larger_than_other_bodies(here, real, monkeypatch):
    """A megabyte more than a report may have, and then more than an import may have."""
    data = b"x" * (limits.BODY_BYTES_MAX + (1 << 20))
    with pytest.raises(Refused, match="no export"):
        here.import_run(io.BytesIO(data))
    with pytest.raises(Refused, match="4194304 bytes: send fewer observations"):
        here._answer("POST", "/v1/runs/r/report", content=data)
    monkeypatch.setattr(limits, "IMPORT_BYTES_MAX", 100)
    with (
        flyball_server.running() as service,
        api.Client(service.http) as small,
        pytest.raises(Refused, match="more than 100 bytes: such a file is not taken"),
    ):
        small.import_run(io.BytesIO(exported(real)))


def test_an_active_run_and_one_without_a_step_come_as_they_are(here):
    here._answer("POST", "/v1/attach", body={"run": "bare", "session": "s", "groups": [{"name": "g", "lr": 0.1}]})
    file = io.BytesIO()
    here.export("bare", file)
    with flyball_server.running() as service, api.Client(service.http) as there:
        there.import_run(io.BytesIO(file.getvalue()))
        bare, again = here.run("bare"), there.run("bare")
        assert (again["status"], again["step"]) == ("active", None)
        assert {**again, "stale_s": 0} == {**bare, "stale_s": 0}


PROFILES = "{careful: {policy: {type: plateau, patience: 3}, guard: {max_lr: 0.3}}}"


def test_a_run_that_was_given_every_kind_of_command_verifies_and_goes_on_elsewhere(tmp_path):
    profiles, file = tmp_path / "profiles.yaml", tmp_path / "r.flyball"
    profiles.write_text(PROFILES)
    with flyball_server.running(profiles=str(profiles)) as service, httpx.Client(base_url=service.http) as http:
        job = Job(http, lag=1, policy={"type": "windowed", "base": {"type": "cosine", "T_max": 100}})
        given = (
            ("override", {"factor": 0.5, "groups": ["body"]}),
            ("hold", {"for_steps": 2}),
            ("release", {}),
            ("bounds", {"guard": {"max_lr": 0.4, "cooldown_steps": 3}}),
            ("switch_policy", {"policy": {"type": "plateau"}}),
            ("rewind", {"step": 2}),
            ("checkpoint", {}),
            ("restore", {}),
            ("evaluate", {}),
            ("stop", {}),
            ("note", {}),
            ("set_profile", {"profile": "careful"}),
            ("switch_policy", {"policy": {"type": "spike_guard", "policy": {"type": "constant"}}, "base": None}),
            ("bounds", {"guard": {"max_lr": None}}),
        )
        for kind, fields in given:
            job.report(3)
            job.command(kind, **fields)
        job.report(3)
        before = job.show()
        file.write_bytes(http.get("/v1/runs/r/export").content)
    told = CliRunner().invoke(server_cli, ["verify", str(file)])
    assert told.exit_code == 0, told.output
    with flyball_server.running() as service, httpx.Client(base_url=service.http) as http:
        answer = http.post("/v1/import", content=file.read_bytes())
        assert answer.status_code == 200, answer.text
        job.http = http
        after = job.show()
        assert {**after, "stale_s": 0} == {**before, "stale_s": 0}
        assert after["policy"] == "spike_guard@1"
        again = Job(http, session="elsewhere", resume=True, lag=1)
        again.session = "elsewhere"
        again.step, again.receipts = again.advice["from_step"], again.advice["receipts_through"]
        assert again.report(3)["through"] == before["step"] + 3


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"seed": 7}, "must have policy, base, guard, profile"),
        ({"policy": {"type": "none"}}, "'none' is no policy"),
        ({"guard": {"max_lr": -1}}, "max_lr"),
    ],
)
def test_a_command_that_nobody_could_have_given_is_refused(plan, told):
    """A forger chains and signs what they like, so it is the contents that are refused."""
    rows = list(made().rows("r"))
    spec = rows[0].meta["spec"]
    plan = {**{name: spec[name] for name in ("policy", "base", "guard", "profile")}, **plan}
    meta = {"kind": "bounds", "args": {"plan": plan}, "actor": "x", "reason": "x", "key": "", "until": None,
            "expires_at": None, "proposal": "", "verdict": {"status": "accepted"}}  # fmt: skip
    followed = _Followed()
    followed.take(rows[0])
    with pytest.raises(Invalid, match=told):
        followed.take(rows[1]._replace(kind="commanded", meta=meta))


def test_the_key_lies_beside_the_store_for_its_owner_alone(tmp_path):
    store = f"sqlite:///{tmp_path}/j.db"
    key = tmp_path / "j.db.signing-key"
    with flyball_server.running(store=store) as service, api.Client(service.http) as client:
        first = client.signing_key()
    assert key.stat().st_mode & 0o777 == 0o600
    with flyball_server.running(store=store) as service, api.Client(service.http) as client:
        assert client.signing_key() == first
    assert signing.fingerprint(signing.open_signer(key, make=False).public) == first["fingerprint"]
    with flyball_server.running() as service, api.Client(service.http) as client:
        assert client.signing_key() != first
    (tmp_path / "public.pem").write_text(first["public_key"] + first["fingerprint"])
    assert signing.fingerprint(signing.read_public_key(tmp_path / "public.pem")) == first["fingerprint"]
    settings = Settings(store="memory:", signing_key=str(key))
    assert signing.fingerprint(signer_of(settings).public) == first["fingerprint"]
    with pytest.raises(Invalid, match=r"signing_key .*none cannot be read.*openssl genpkey"):
        signer_of(Settings(store="memory:", signing_key=str(tmp_path / "none")))
    key.write_text("no key")
    with pytest.raises(Invalid, match=r"signing_key .*j\.db\.signing-key holds no private key"):
        flyball_server.running(store=store).start()


def test_a_journal_that_never_held_the_run_exports_nothing(here):
    for route in ("export", "table", "schedule"):
        with pytest.raises(Refused, match="'nobody' is not known") as caught:
            here._answer("GET", f"/v1/runs/nobody/{route}")
        assert caught.value.code == "not_found"
