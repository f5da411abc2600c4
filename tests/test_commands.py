"""Goal: what people ask of a run is accepted, clamped, applied, ended and shown as the journal says, in any order.

Method: a real service over HTTP; the job is spoken for by hand, message by message, so that each receipt is known.
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

import flyball_server
from flyball.api import Client
from flyball.cli import cli
from flyball_server import limits
from flyball_server.audit import wording

GROUPS = [{"name": "body", "lr": 0.1, "momentum": 0.9}, {"name": "head", "lr": 0.01, "momentum": 0.0}]


class Job:
    """A training job, by hand: reports steps, and receipts that confirm what it was asked to."""

    def __init__(self, http, run="r", *, lag=None, **attach):
        self.http, self.run, self.session, self.receipts, self.step = http, run, f"s-{run}", 0, 0
        body = {"run": run, "session": self.session, "groups": GROUPS, "lag": lag, **attach}
        answer = http.post("/v1/attach", json=body)
        assert answer.status_code == 200, answer.text
        self.advice = answer.json()

    def report(self, steps=1, *, confirm=True, loss=1.0, **more):
        """So many more steps under the newest settings; with a receipt that confirms what is asked for."""
        receipts = []
        if confirm and self.advice["confirm"]:
            self.receipts += 1
            lr = self.advice["changes"]["lr"][-1]
            receipts = [
                {"number": self.receipts, "step": self.step, "decided": self.step - 1, "lr": lr,
                 "confirms": self.advice["confirm"], **more.pop("receipt", {})}
            ]  # fmt: skip
        numbers = list(range(self.step, self.step + steps))
        self.step += steps
        body = {
            "session": self.session, "attempt": self.advice["attempt"], "step": numbers,
            "signals": {"loss": [loss] * steps}, "receipts": receipts, **more,
        }  # fmt: skip
        answer = self.http.post(f"/v1/runs/{self.run}/report", json=body)
        assert answer.status_code == 200, answer.text
        self.advice = answer.json()
        return self.advice

    @property
    def lr(self):
        return self.advice["changes"]["lr"][-1]

    def command(self, kind, *, status=201, headers=None, reason="a test", **fields):
        body = {"kind": kind, "reason": reason, **fields}
        answer = self.http.post(f"/v1/runs/{self.run}/commands", json=body, headers=headers or {})
        assert answer.status_code == status, answer.text
        return answer.json()

    def get(self, command):
        return self.http.get(f"/v1/runs/{self.run}/commands/{command}").json()

    def show(self):
        return self.http.get(f"/v1/runs/{self.run}").json()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with flyball_server.running(store=f"sqlite:///{tmp_path_factory.mktemp('commands') / 'f.db'}") as running:
        yield running


@pytest.fixture
def http(service):
    with httpx.Client(base_url=service.http, timeout=30) as client:
        yield client


@pytest.fixture
def job(http, request):
    return Job(http, request.node.name.partition("[")[0][:100])


def test_an_override_holds_until_it_is_released_and_each_stage_is_an_event(job):
    job.report(3)
    given = job.command("override", value=0.05, groups=["body"])
    assert (given["status"], given["verdict"]["held"]["lr"], given["over"]) == ("accepted", [0.05, None], False)
    advice = job.report(confirm=False)
    assert (job.lr, advice["confirm"]) == ([0.05, 0.01], given["seq"])
    assert given["id"] in advice["notices"][0]
    assert "a test" in advice["notices"][0]
    job.report(receipt={"ranks": 4, "of_ranks": 4})
    found = job.get(given["id"])
    assert (found["status"], found["applied"]) == ("applied", {"step": 4, "ranks": 4, "of_ranks": 4})
    assert job.advice["notices"] == []
    released = job.command("release")
    job.report(2)
    job.report()
    assert job.lr == [0.1, 0.01]
    assert [one["status"] for one in job.get(given["id"])["history"]] == ["accepted", "applied", "released"]
    assert job.get(released["id"])["status"] == "applied"
    assert job.show()["commands"] == []


def test_an_override_beyond_the_guard_is_clamped_and_says_so_everywhere(http):
    job = Job(http, "clamped", guard={"max_factor": 2.0})
    job.report()
    given = job.command("override", factor=10)
    assert (given["status"], given["verdict"]["lr"]) == ("clamped", [0.2, 0.02])
    job.report()
    assert job.lr == [0.2, 0.02]
    assert "override" in job.advice["notices"][0]
    assert "lr of all groups: x 10, clamped by the guard to x 2, x 2" in job.advice["notices"][0]
    assert job.show()["commands"][0]["status"] == "clamped"
    mark = http.get("/v1/runs/clamped/decisions").json()["decisions"][-1]
    assert (mark["decision"], mark["guard"]) == ("command_override", "guard_clamped")
    assert "a test" in mark["reason"]


def test_an_override_moves_no_further_than_the_guard_lets_one_decision(http):
    job = Job(http, "slowly", guard={"max_change": 2.0})
    job.report()
    assert job.command("override", value=10.0, groups=["body"])["verdict"]["lr"] == [0.2, 0.01]
    job.report(5)
    assert job.lr == [0.2, 0.01], "clamped once: it does not creep on"
    assert job.command("override", value=0.001, groups=["body"])["verdict"]["lr"] == [0.1, 0.01]


def test_of_two_operators_at_once_one_wins_and_the_other_is_told_the_newer_row(job):
    job.report()
    seen = job.show()["seq"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(
                lambda value: job.http.post(
                    f"/v1/runs/{job.run}/commands",
                    json={"kind": "override", "value": value, "reason": "mine"},
                    headers={"If-Match": f'"{seen}"'},
                ),
                (0.02, 0.03),
            )
        )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201, 412]
    lost = next(answer.json() for answer in answers if answer.status_code == 412)
    won = next(answer.json() for answer in answers if answer.status_code == 201)
    assert lost["code"] == "stale"
    assert f"row {won['seq']}" in lost["detail"]
    job.report(20)  # rows of training alone make nobody's knowledge stale
    job.command("override", value=0.04, headers={"If-Match": str(won["seq"])})
    stale = job.command("override", value=0.05, status=412, headers={"If-Match": str(won["seq"])})
    assert stale["title"] == "Somebody else moved first"
    ahead = job.command("override", value=0.05, status=412, headers={"If-Match": "9999"})
    assert (ahead["code"], ahead["title"]) == ("stale", "There is no such row yet")
    assert "If-Match is row 9999, but the newest is row" in ahead["detail"]


def test_a_repeated_request_is_the_same_command(job):
    headers = {"Idempotency-Key": "k1"}
    first = job.command("override", value=0.02, headers=headers)
    job.report(3)
    again = job.command("override", value=0.02, status=200, headers=headers)
    assert again["id"] == first["id"]
    reused = job.command("hold", status=409, headers=headers)
    assert (reused["code"], reused["title"]) == ("conflict", "The Idempotency-Key was used before")
    assert "was used for another command" in reused["detail"]
    assert "take a new one" in reused["detail"]
    job.command("override", value=0.02, status=200, headers={**headers, "If-Match": "0"})
    for kind, other in (
        ("hold", {}),
        ("override", {"value": 0.02, "for_steps": 3}),
        ("override", {"value": 0.02, "reason": "another"}),
        ("override", {"value": 0.02, "expires_in_s": 60}),
        ("override", {"value": 0.02, "expires_at": "2999-01-01T00:00:00Z"}),
    ):
        refused = job.command(kind, status=409, headers=headers, **other)
        assert "was used for another command" in refused["detail"]
    assert len(job.http.get(f"/v1/runs/{job.run}/commands").json()["commands"]) == 1


def test_a_newer_override_supersedes_an_older_one_of_the_same_groups(job):
    one = job.command("override", value=0.02, groups=["body"])
    other = job.command("override", value=0.5, setting="momentum", groups=["body"])
    part = job.command("override", value=0.03)
    assert job.get(one["id"])["status"] == "superseded"
    assert job.get(other["id"])["status"] == "accepted"
    job.report()
    assert job.lr == [0.03, 0.03]
    assert job.advice["changes"]["momentum"][-1] == [0.5, 0.0]
    first, hold = job.command("hold"), job.command("hold")
    job.command("release", command=part["id"])
    job.report()
    assert (job.lr, job.advice["changes"]["momentum"][-1]) == ([0.03, 0.03], [0.5, 0.0]), "held as it was"
    assert [job.get(one["id"])["status"] for one in (first, other)] == ["superseded", "applied"]
    job.command("release", command=hold["id"])
    job.report()
    assert (job.lr, job.advice["changes"]["momentum"][-1]) == ([0.1, 0.01], [0.5, 0.0]), "what it covered goes on"
    job.command("release")
    job.report()
    assert (job.lr, job.advice["changes"]["momentum"][-1]) == ([0.1, 0.01], [0.9, 0.0]), "momentum goes back as well"


@pytest.mark.parametrize("lag", [None, 0, 3])
def test_an_override_for_n_steps_ends_by_itself_at_its_step(http, lag):
    job = Job(http, f"for-steps-{lag}", lag=lag)
    job.report(10)
    given = job.command("override", value=0.5, groups=["body"], for_steps=5)
    decided = []
    for _ in range(12):
        advice = job.report()
        decided.append(job.lr[0])
    first = 10 if lag is None else 11 + lag
    assert given["until_step"] == first + 5
    found = job.get(given["id"])
    assert (found["status"], found["history"][-1]["step"]) == ("expired", first + 5)
    assert decided[-1] == 0.1
    # The decision of observation t belongs to step t + 1 + lag: five steps are overridden, no more, no less.
    overridden = decided.count(0.5) + (1 if lag is None else 0)
    assert overridden == 5, decided
    assert advice["confirm"] == 0


def test_an_override_until_a_time_ends_without_any_report(job):
    given = job.command("override", value=0.5, expires_in_s=0.3)
    waited = time.monotonic()
    while job.get(given["id"])["status"] != "expired":
        assert time.monotonic() - waited < 10
        time.sleep(0.05)
    job.report()
    assert job.lr == [0.1, 0.01]


def test_a_switch_of_policy_goes_on_from_the_learning_rates_in_force(http):
    job = Job(http, "switch", policy={"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0})
    job.report(4)
    before = list(job.lr)
    assert before[0] < 0.1
    given = job.command("switch_policy", policy={"type": "windowed", "window_size": 3, "cooldown_steps": 0})
    assert "learning rates" in given["verdict"]["carried"]
    assert given["verdict"]["lr"] == before
    job.report()
    shown = job.show()
    assert (shown["policy"], shown["policy_config"]["type"]) == ("windowed@1", "windowed@1")
    assert http.get("/v1/runs", params={"policy": "windowed"}).json()["runs"][0]["run"] == "switch"
    job.report(40, loss=3.0)
    job.report(40, loss=9.0)
    decisions = http.get("/v1/runs/switch/decisions").json()["decisions"]
    assert {"command_switch_policy"} < {one["decision"] for one in decisions}
    assert all(one["reason"] for one in decisions)


def test_bounds_move_the_settings_at_once_and_reach_the_job(job):
    job.report()
    given = job.command("bounds", guard={"max_lr": 0.05})
    advice = job.report(confirm=False)
    assert (job.lr, advice["guard"]) == ([0.05, 0.01], {"max_lr": 0.05})
    job.report()
    assert (job.get(given["id"])["status"], job.advice["guard"]) == ("applied", {})
    assert job.show()["guard"] == {"max_lr": 0.05}
    job.command("bounds", guard={"max_lr": None})
    job.report()
    assert job.lr == [0.1, 0.01]


@pytest.mark.parametrize("outcome", ["done", "declined"])
def test_a_directive_is_asked_for_until_the_job_answers(http, outcome):
    job = Job(http, f"directive-{outcome}")
    given = job.command("checkpoint", args={"name": "before"})
    for _ in range(2):
        assert job.report()["directives"] == [{"id": given["id"], "kind": "checkpoint", "args": {"name": "before"}}]
    answer = {"directive": given["id"], "outcome": outcome, "note": "at /tmp/x", "step": 2}
    job.report(answers=[answer])
    assert job.advice["directives"] == []
    found = job.get(given["id"])
    assert (found["status"], found["history"][-1]["note"]) == (outcome, "at /tmp/x")
    job.report(answers=[answer])
    assert len(job.get(given["id"])["history"]) == 2, "a repeated answer changes nothing"


def test_waiting_for_a_command_ends_when_its_receipt_comes(job):
    given = job.command("override", value=0.02)
    job.report(confirm=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            lambda: httpx.get(
                f"{job.http.base_url}/v1/runs/{job.run}/commands/{given['id']}", params={"wait_s": 20}, timeout=30
            ).json()
        )
        time.sleep(0.2)
        assert not waiting.done()
        started = time.monotonic()
        job.report()
        assert waiting.result(10)["status"] == "applied"
        assert time.monotonic() - started < 5


def test_commands_outlive_a_rewind_and_a_restart(tmp_path):
    store = f"sqlite:///{tmp_path / 'f.db'}"
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        job = Job(http, "r", policy={"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0}, guard={})
        job.report(6)
        job.command("override", value=0.033, groups=["head"])
        job.command("switch_policy", policy={"type": "constant"})
        job.command("bounds", guard={"max_lr": 0.06})
        for _ in range(4):
            job.report()
        before = job.show()
    with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
        after = http.get("/v1/runs/r").json()
        assert {k: after[k] for k in after if k != "stale_s"} == {k: before[k] for k in before if k != "stale_s"}
        body = {"run": "r", "session": "again", "groups": GROUPS, "resume": True, "from_step": 3, "from_attempt": 1}
        attached = http.post("/v1/attach", json=body).json()
        assert (attached["policy"], attached["guard"]) == ("constant@1", {"max_lr": 0.06})
        lr = attached["changes"]["lr"][-1]
        # Step 3 was under plateau, at 0.1 x 0.5 x 0.5; the switch made since is made there again.
        assert lr == [0.025, 0.033]
    from flyball_server.storage import open_journal
    from flyball_server.verify import verify

    journal = open_journal(store, read_only=True)
    journal.start(lambda _: None)
    assert verify(journal, "r").problem == ""
    journal.close()


def test_declared_controls_are_steered_within_their_bounds(job):
    job.report(controls=[{"name": "kl_coef", "value": 0.1, "min": 0.0, "max": 1.0}])
    assert job.advice["controls"] == {"kl_coef": 0.1}
    given = job.command("override", setting="kl_coef", value=3.0)
    assert (given["status"], given["verdict"]["held"]["controls"]) == ("clamped", {"kl_coef": 1.0})
    job.report(confirm=False)
    assert job.advice["controls"] == {"kl_coef": 1.0}
    assert " kl_coef: 3, clamped" in job.advice["notices"][0]
    job.report(receipt={"controls": {"kl_coef": 1.0}})
    shown = job.show()["controls"][0]
    assert (shown["value"], shown["applied"], shown["declared"]) == (1.0, 1.0, 0.1)
    job.command("release", setting="kl_coef")
    job.report()
    assert job.advice["controls"] == {"kl_coef": 0.1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "overide", "value": 1}, "override"),
        ({"kind": "override"}, "value or factor"),
        ({"kind": "override", "value": 1, "factor": 2}, "value or factor"),
        ({"kind": "override", "value": -1}, "0 or more"),
        ({"kind": "override", "value": 1, "groups": ["tail"]}, "body, head"),
        ({"kind": "override", "value": 1, "setting": "lrr"}, "lr"),
        ({"kind": "override", "value": 1.5, "setting": "momentum"}, "[0, 1)"),
        ({"kind": "override", "value": 1, "for_steps": 2, "until_step": 9}, "give one"),
        ({"kind": "override", "value": 1, "reason": " "}, "reason is empty"),
        ({"kind": "override", "value": 1, "expires_at": "tomorrow"}, "2027-01-31T12:00:00Z"),
        ({"kind": "override", "value": 1, "expires_in_s": -1}, "expires_in_s"),
        ({"kind": "hold", "value": 1}, "takes no such field"),
        ({"kind": "bounds", "guard": {"max_lrr": 1}}, "max_lr"),
        ({"kind": "bounds", "guard": {"min_lr": 2, "max_lr": 1}}, "greater than"),
        ({"kind": "switch_policy", "policy": "windowd"}, "windowed"),
        ({"kind": "set_profile", "profile": "vision"}, "no such profile"),
        ({"kind": "stop", "args": {"x": "y" * 5000}}, "bytes"),
        ({"kind": "bounds", "guard": {"max_lrr": None}}, "max_lr"),
        ({"kind": "bounds", "guard": {"\ud800": None}}, "surrogate"),
        ({"kind": "switch_policy", "policy": {"type": "x" * limits.COMMAND_BYTES_MAX}}, "bytes"),
    ],
)
def test_a_wrong_command_is_refused_with_the_remedy_and_changes_nothing(http, fields, words):
    job = Job(http, "wrong", resume=True) if http.get("/v1/runs/wrong").is_success else Job(http, "wrong")
    seq = job.show()["seq"]
    body = json.dumps({"reason": "why", **fields})
    answer = http.post("/v1/runs/wrong/commands", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]
    assert job.show()["seq"] == seq


def test_what_has_ended_takes_notes_only(job):
    job.report(end="finished")
    assert "finished" in job.command("override", value=1, status=409)["detail"]
    assert job.command("note")["status"] == "done"


def test_what_a_policy_asks_for_is_over_when_it_is_answered_and_when_the_run_goes_back(http, request):
    policy = {"type": "spike_guard", "policy": "constant", "confirm": 1, "cooldown_steps": 2, "memory_steps": 90}
    policy |= {"max_cuts": 0, "max_rewarms": 0, "max_restores": 3}
    job = Job(http, request.node.name[-20:], policy=policy)
    job.report(5)
    asked = job.report(loss="NaN")["directives"]
    assert [(one["kind"], one["args"]) for one in asked] == [("restore", {"skip_batches": 200, "before_step": 5})]
    assert (job.get(asked[0]["id"])["status"], job.get(asked[0]["id"])["actor"]) == ("accepted", "policy")
    job.report(answers=[{"directive": asked[0]["id"], "outcome": "declined", "note": "no checkpoint"}])
    assert job.get(asked[0]["id"])["status"] == "declined"
    (again,) = job.report(loss="NaN")["directives"]
    groups = {"run": job.run, "groups": GROUPS, "resume": True}
    answer = http.post("/v1/attach", json={**groups, "session": "t", "from_step": 3})
    assert answer.status_code == 200, answer.text
    assert (job.get(again["id"])["status"], job.get(again["id"])["over"]) == ("superseded", True)
    job.session, job.step, job.advice = "t", 3, answer.json()
    (third,) = job.report(3, loss="NaN")["directives"]
    assert third["id"] != again["id"]
    job.command("switch_policy", policy="steady")
    assert job.get(third["id"])["status"] == "superseded"
    assert job.report()["directives"] == []


def test_reports_from_beside_are_taken_once_by_number_and_reach_the_policy_with_the_next_step(http, service):
    job = Job(http, "beside")
    job.report()
    with Client(service.http) as client:
        first = client.report("beside", {"val/loss": 0.5}, source="eval", number=7)
        assert client.report("beside", {"val/loss": 0.9}, source="eval", number=7) == first, "repeated"
        assert client.report("beside", {"val/loss": 0.9}, source="eval", number=3) == first, "overtaken"
        assert client.report("beside", val_loss=0.25, note="on the held-out set", source="eval") == first + 1
    called = CliRunner().invoke(cli, ["report", "beside", "reward=2", "--source", "rl", "--server", service.http])
    assert (called.exit_code, called.output) == (0, f"beside: row {first + 2}\n")
    refused = CliRunner().invoke(cli, ["report", "beside", "--number", "1", "--server", service.http])
    assert refused.exit_code == 2
    headers, body = {"Idempotency-Key": "once"}, {"signals": {"val_loss": 0.2}}
    sent = [http.post("/v1/runs/beside/signals", json=body, headers=headers).json()["seq"] for _ in range(2)]
    assert sent == [first + 3] * 2
    job.report()
    assert job.show()["signals"] == {"loss": 1.0, "val/loss": 0.5, "val_loss": 0.2, "reward": 2.0}
    rows = http.get("/v1/runs/beside/journal", params={"kind": "reported"}).json()["rows"]
    assert [row["meta"].get("note") for row in rows] == [None, "on the held-out set", None, None]


def test_a_job_can_only_answer_what_it_was_asked(job):
    hold, capped = job.command("hold"), job.command("bounds", guard={"max_lr": 0.05})
    forged = [{"directive": one, "outcome": "done"} for one in (hold["id"], capped["id"], "c9999", hold["id"])]
    job.report(confirm=False, answers=forged)
    assert [one["id"] for one in job.show()["commands"]] == [hold["id"], capped["id"]]
    assert len(job.get(hold["id"])["history"]) == 1


def test_a_reporter_leaves_room_for_the_drivers_signals(job):
    job.report()
    names = {f"mine{i}": 1.0 for i in range(limits.SIGNALS_MAX)}
    few = dict(list(names.items())[: limits.SIGNALS_MAX - limits.DRIVER_SIGNALS - 1])
    url = f"/v1/runs/{job.run}/signals"
    assert job.http.post(url, json={"signals": names}).status_code == 422
    assert job.http.post(url, json={"signals": few}).status_code == 200
    assert job.http.post(url, json={"signals": {"one_more": 1.0}}).status_code == 422
    body = {"session": job.session, "attempt": 1, "step": [1], "signals": {"grad_norm": [1.0], "loss": [1.0]}}
    assert job.http.post(f"/v1/runs/{job.run}/report", json=body).status_code == 200


def test_what_others_do_to_a_run_is_no_news_of_its_job(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "STALE_AFTER_S", 0.4)
    for store in ("memory:", f"sqlite:///{tmp_path / 'f.db'}"):
        with flyball_server.running(store=store) as service, httpx.Client(base_url=service.http, timeout=30) as http:
            job = Job(http, "r")
            job.report()
            time.sleep(0.6)
            job.command("note")
            http.post("/v1/runs/r/signals", json={"signals": {"val_loss": 1.0}})
            assert job.show()["status"] == "stale"
            assert [one["run"] for one in http.get("/v1/runs", params={"status": "stale"}).json()["runs"]] == ["r"]
            job.report()
            assert job.show()["status"] == "active", "it carries on as if nothing had been"
            assert http.get("/v1/runs", params={"status": "stale"}).json()["runs"] == []


def test_what_there_is_to_choose_from_is_said_once(job):
    for said in (
        job.command("overide", value=1, status=422)["detail"],
        job.command("override", value=1, setting="momentumm", status=422)["detail"],
    ):
        for name in ("override", "hold", "switch_policy") if "command" in said else ("lr", "momentum", "noise_std"):
            assert re.findall(r"[a-z_]+", said.partition("give one of")[2]).count(name) == 1
    assert wording.text("token_revoked", {"token": 3, "reason": "it leaked"}) == "token t3 revoked: it leaked"
