"""Goal: `flyball` gives commands, tells what becomes of them, and its exit codes can be relied on.

Method: the real command, most of it inside this process; the job is spoken for by hand.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.test_commands import Job
from typer.testing import CliRunner

import flyball_server
from flyball.cli import cli
from flyball_server.auth.access import Caller
from flyball_server.http_api import commands as http_commands


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as running:
        yield running


@pytest.fixture
def job(service, request):
    with httpx.Client(base_url=service.http, timeout=30) as http:
        job = Job(http, request.node.name.partition("[")[0][:100], project="cli", guard={"max_factor": 2.0})
        job.run = job.advice["run"]
        job.report(3)
        yield job


@pytest.fixture
def say(service):
    """Run a command line; what it said, after checking its exit code."""

    def run(*words, code=0, **options):
        done = CliRunner().invoke(cli, [str(word) for word in words], env={"FLYBALL_SERVER": service.http}, **options)
        assert done.exit_code == code, (done.output, done.exception)
        return done

    return run


def test_a_value_for_an_lr_free_optimizer_takes_force(service, say):
    with httpx.Client(base_url=service.http, timeout=30) as http:
        run = Job(http, "free", project="cli", groups=[{"name": "all", "lr": 1.0, "lr_free": True}]).advice["run"]
    refused = say("override", run, "lr=0.01", "--reason", "a test", code=1)
    assert "group all finds its own step size" in refused.stderr
    say("override", run, "lr=0.5", "--factor", "--reason", "a test")
    assert "override lr 0.01: accepted" in say("override", run, "lr=0.01", "--force", "--reason", "a test").stdout


def test_each_command_says_in_one_line_what_came_of_it(job, say):
    run = job.run
    for words, told in (
        (["override", run, "lr=5", "--group", "head", "--for", "2h"], "override lr 5 of head: clamped by the guard; "
         "lr: body 0.1, head 0.02"),
        (["override", run, "lr=0.5", "--factor"], "override lr x 0.5: accepted; lr: body 0.05, head 0.005"),
        (["hold", run, "--for-steps", 10], "hold: accepted; lr: body 0.05, head 0.005"),
        (["release", run], "release: accepted; lr: body 0.1, head 0.01"),
        (["bounds", run, "max_lr=0.05", "max_factor=none"], "bounds max_factor=none max_lr=0.05: accepted; "
         "lr: body 0.05, head 0.01"),
        (["switch-policy", run, '{"type": "plateau"}'], "switch_policy to plateau@1: accepted; "
         "lr: body 0.05, head 0.01; carried over: learning rates, guard state"),
        (["checkpoint", run, "--arg", "name=x"], "checkpoint: accepted"),
        (["rewind", run, 1], "rewind: accepted"),
    ):  # fmt: skip
        done = say(*words, "--reason", "a test")
        assert re.match(r"c\d+ ", done.stdout)
        assert told in done.stdout
        assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert say("note", run, "so it was").stdout.endswith("note: done\n")
    listed = say("commands", run).stdout.splitlines()
    assert len(listed) == 10
    assert "superseded" in listed[1]
    assert "so it was" in listed[-1]
    assert [one["kind"] for one in json.loads(say("commands", run, "--open", "--json").stdout)] == [
        "release", "bounds", "switch_policy", "checkpoint", "rewind"
    ]  # fmt: skip


def test_show_tells_what_people_and_others_have_a_hand_in(job, say):
    say("override", job.run, "lr=0.03", "--until-step", 90, "--reason", "flat")
    controls = [{"name": "kl_coef", "value": 0.1, "min": 0.0, "max": 1.0}]
    job.report(confirm=False, controls=controls)
    job.report(receipt={"conflict": "StepLR wrote lr of body: 0.03 -> 0.3"})
    shown = say("show", job.run).stdout
    command = r"override, clamped to body 0.03, head 0.02 +applied +http:127.0.0.1 +step 90 +flat"
    assert re.search(rf"\ncommands\n.*\nc\d+ +{command}\n", shown)
    assert re.search(r"\ncontrols\n.*\nkl_coef +0.1 +- +0.1 +0 +1\n", shown)
    assert re.search(r"\nconflicts\n.*\n4 +1 +StepLR wrote lr of body: 0.03 -> 0.3\n", shown)


def test_a_clamped_command_says_to_what_also_when_it_is_applied(job, say):
    controls = [{"name": "kl_coef", "value": 0.1, "min": 0.0, "max": 1.0}]
    job.report(confirm=False, controls=controls)
    told = say("override", job.run, "kl_coef=7", "--reason", "a test").stdout
    assert told.endswith(" override kl_coef 7: clamped by the guard; kl_coef 1\n"), "its value, and no learning rates"
    say("override", job.run, "lr=9", "--group", "head", "--reason", "a test")
    job.report()
    job.report()
    listed = say("commands", job.run).stdout
    assert re.search(r"override kl_coef 7, clamped to 1 +applied at step \d+ on 1/1 ranks", listed)
    assert re.search(r"override lr 9 of head, clamped to 0.02 +applied at step \d+ on 1/1 ranks", listed)
    shown = say("show", job.run).stdout
    assert "overrides kl_coef: 7, clamped by the guard" in shown
    marks = [line for line in shown.splitlines() if "overrides lr of head" in line]
    assert [line.split()[1:5] for line in marks] == [["head", "0.01", "->", "0.02"]], "only the group it is about"
    rest = [(one["clamped"], one["clamped_to"]) for one in json.loads(say("commands", job.run, "--json").stdout)]
    assert rest == [(True, "1"), (True, "0.02")]


def test_wait_tells_each_stage_and_its_exit_code_how_it_ended(job, say):
    with ThreadPoolExecutor(1) as pool:
        words = ["override", job.run, "lr=5", "--reason", "a test", "--wait", "--timeout", "20"]
        waiting = pool.submit(subprocess.run, [sys.executable, "-m", "flyball.cli", *words], text=True,
                              env={**os.environ, "FLYBALL_SERVER": str(job.http.base_url)}, capture_output=True,
                              timeout=60)  # fmt: skip
        while not job.show()["commands"]:
            assert not waiting.done(), waiting.result()
        job.report(confirm=False)
        job.report(receipt={"ranks": 3, "of_ranks": 4})
        done = waiting.result(30)
    command = job.show()["commands"][0]["id"]
    assert (done.returncode, done.stdout) == (
        0,
        f"{command} override lr 5, clamped to body 0.2, head 0.02: applied at step 4 on 3/4 ranks\n",
    )
    assert done.stderr.splitlines() == [
        f"{command} clamped by the guard; lr: body 0.2, head 0.02", f"{command} applied at step 4 on 3/4 ranks"
    ]  # fmt: skip
    late = say("hold", job.run, "--reason", "a test", "--wait", "--timeout", 0.2, code=3)
    assert "is still accepted after 0.2 s" in late.stderr
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(say, "evaluate", job.run, "--reason", "a test", "--wait", "--timeout", 20, code=1)
        job.report()
        while not job.advice["directives"]:
            job.report()
        number = job.advice["directives"][0]["id"]
        job.report(answers=[{"directive": number, "outcome": "declined", "note": "no data", "step": 9}])
        assert f"{number} declined at step 9: no data" in asked.result(30).stderr


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["override", "{run}", "lr"], "give SETTING=NUMBER", 2),
        (["override", "{run}", "lr=x"], "give SETTING=NUMBER", 2),
        (["override", "{run}", "lr=1", "--for", "soon"], "such as 2h", 2),
        (["bounds", "{run}", "max_lr"], "give NAME=VALUE", 2),
        (["switch-policy", "{run}", "gone.yaml"], "gone.yaml cannot be read", 2),
        (["override", "{run}", "lr=1", "--if-match", "2"], "--if-match; `flyball commands", 1),
        (["override", "{run}", "lr=1", "--for-steps", "1", "--until-step", "9"], "give one", 1),
        (["override", "nobody", "lr=1"], "run 'nobody' is not known", 1),
        (["set-profile", "{run}", "none"], "no such profile", 1),
        (["approve", "{run}", "p9"], "p9", 1),
        (["fleet", "run={run}", "hold"], "look with --dry-run, then say --yes", 1),
        (["fleet", "run={run}", "hodl"], "give one of override", 2),
        (["fleet", "projct=a", "hold", "--yes"], "did you mean 'project'", 1),
        (["canary", "start", "run={run}"], "give a policy or --profile", 2),
        (["canary", "promote", "k99"], "canary 'k99' is not known", 1),
        (["thaw"], "everything is not frozen", 1),
    ],
)
def test_a_wrong_command_is_refused_in_words(job, say, words, told, code):
    job.command("note")
    job.command("hold")
    done = say(*(word.replace("{run}", job.run) for word in words), "--reason", "a test", code=code)
    said = re.sub(r"[│\s]+", " ", done.stderr)
    assert told in said
    if code == 1:
        assert (done.stderr.count("\n"), done.stderr[:9]) == (1, "flyball: ")


def test_a_policy_comes_from_a_name_json_or_a_file(job, say, tmp_path):
    for name, text in (
        ("p.yaml", "type: plateau\npatience: 3\n"),
        ("p.toml", 'type = "plateau"\npatience = 3\n'),
        ("p.json", '{"type": "plateau", "patience": 3}'),
    ):
        (tmp_path / name).write_text(text)
        say("switch-policy", job.run, "constant", "--reason", "a test")
        say("switch-policy", job.run, tmp_path / name, "--reason", "a test")
        assert job.show()["policy_config"]["patience"] == 3
    (tmp_path / "bad.yaml").write_text("- 1\n")
    assert "holds no policy" in re.sub(
        r"[│\s]+", " ", say("switch-policy", job.run, tmp_path / "bad.yaml", "--reason", "x", code=2).stderr
    )


def test_a_proposal_is_listed_judged_and_taken_back(job, say, monkeypatch):
    roles = {"bot": "proposer", "ann": "operator"}

    def by_token(request):
        name = request.headers["Authorization"].removeprefix("Bearer ")
        return Caller(name, roles[name])

    monkeypatch.setattr(http_commands, "caller_of", by_token)
    why = ["--reason", "it is flat", "--token"]
    ids = []
    for _ in range(3):
        asked = say("override", job.run, "lr=0.5", "--factor", *why, "bot").stdout
        assert "override lr x 0.5: proposed, approved by 0 of 1" in asked
        ids.append(asked.split()[0])
    listed = say("proposals", job.run, "--token", "ann").stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == ids
    assert "may not operate" in say("approve", job.run, ids[0], *why, "bot", code=1).stderr
    assert "proposals (flyball approve)" in say("show", job.run, "--token", "ann").stdout
    rejected = say("reject", job.run, ids[0], "--reason", "no", "--token", "ann").stdout
    assert "rejected by ann: no" in rejected
    assert "withdrawn by bot: it is flat" in say("withdraw", job.run, ids[1], *why, "bot").stdout
    approved = say("approve", job.run, ids[2], *why, "ann").stdout
    assert "override lr x 0.5: accepted; lr: body 0.05, head 0.005" in approved
    job.report()
    assert job.lr == [0.05, 0.005]
    assert say("proposals", job.run, "--token", "ann").stdout.count("\n") == 1


def test_many_runs_are_shown_before_and_after(job, say):
    words = ["fleet", f"run={job.run}", "override", "lr=4", "--factor", "--reason", "a test"]
    tried = say(*words, "--dry-run").stdout
    assert re.search(r"clamped +- +clamped to x 2; body 0.1 -> 0.2, head 0.01 -> 0.02\n", tried)
    assert tried.endswith("dry run, nothing changed: 1 clamped\n")
    found = json.loads(say(*words, "--yes", "--json").stdout)
    assert (found["counts"], found["dry_run"]) == ({"clamped": 1}, False)
    again = say("fleet", f"run={job.run}", "release", "--reason", "a test", "--yes")
    assert again.stdout.endswith("1 accepted\n")
    refused = say("fleet", f"run={job.run}", "override", "kl=1", "--reason", "a test", "--yes", code=1)
    assert "give one of lr, momentum, noise_std" in refused.stdout


def test_at_a_terminal_many_runs_are_commanded_after_a_look_and_a_yes(job, say):
    words = [sys.executable, "-m", "flyball.cli", "fleet", f"run={job.run}", "hold", "--reason", "a test"]
    environment = {**os.environ, "FLYBALL_SERVER": str(job.http.base_url)}
    for typed, code, open_ in ((b"n\n", 1, 0), (b"y\n", 0, 1)):
        ours, theirs = pty.openpty()
        os.write(ours, typed)
        done = subprocess.run(words, stdin=theirs, env=environment, capture_output=True, text=True, timeout=60)
        os.close(ours)
        os.close(theirs)
        assert done.returncode == code, done.stderr
        assert "dry run, nothing changed: 1 accepted" in done.stdout
        assert len(job.show()["commands"]) == open_


def test_a_fleet_command_ends_when_it_is_told_and_a_switch_says_to_what_and_what_it_carried_over(job, say):
    fleet = ["fleet", f"run={job.run.partition(':')[2]}", "--reason", "a test", "--yes"]
    assert say(*fleet, "hold", "--until-step", 90).stdout.endswith("1 accepted\n"), "by its name in the project"
    say(*fleet, "override", "lr=0.05", "--until", "2999-01-01T00:00:00Z", code=1)
    assert [(c["kind"], c["until_step"]) for c in job.show()["commands"]] == [("hold", 90)]
    switched = say(*fleet, "switch-policy", "plateau").stdout
    assert "switch_policy to plateau; carried over: learning rates" in switched
    assert "switch_policy to plateau" in say("commands", job.run).stdout


def test_freeze_and_canary_from_the_command_line(job, say):
    frozen = say("freeze", "--project", "cli", "--reason", "a fire").stdout
    assert re.match(r"frozen: cli; \d+ active runs are on hold\n", frozen)
    assert re.search(r"\nproject cli +\S+ +\S+ +a fire\n", say("frozen").stdout)
    assert "`flyball frozen`" in say("runs").stderr
    assert "project cli is frozen by" in say("override", job.run, "lr=1", "--reason", "x", code=1).stderr
    assert "a fire" in say("thaw", "--project", "cli", "--reason", "out").stdout
    assert (say("frozen").stdout, say("runs").stderr) == ("nothing is frozen\n", "")
    started = say("canary", "start", f"run={job.run}", "plateau", "--share", "1", "--reason", "try").stdout
    number = started.split()[0]
    assert f"{number} open: 1 of 1 runs, try" in started
    job.report(70)
    job.report(70, loss=0.5)
    assert "decided by a hash" in say("canary", "show", number).stdout
    assert say("canary", "back", number, "--reason", "no").stdout.endswith(f"{number}: back\n")
    assert json.loads(say("canary", "list", "--json").stdout)[0]["status"] == "back"
