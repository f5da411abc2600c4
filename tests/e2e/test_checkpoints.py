"""Training goes back to a checkpoint, in the same process and in a new one.

Goal: the policy goes back with it, both branches stay in the journal, and no outage makes a checkpoint unusable.
Method: a loss trace that depends on the step alone, so that the decisions after going back must equal those of a
run that never did.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

GO_BACK = """
import flyball
from tests.e2e.training import *

def attach(name, **options):
    optimizer, train = tiny()
    governor = flyball.attach(
        optimizer, run=name, policy=POLICY, server=url, lag=0, wait_s=None, **options
    )
    return governor, optimizer, train

governor, optimizer, train = attach(run_name + "-straight")
straight = run(governor, optimizer, train, 0, 600)
governor.close()

governor, optimizer, train = attach(run_name)
used = run(governor, optimizer, train, 0, 300)
token = governor.state_dict()
run(governor, optimizer, train, 300, 500)
governor.load_state_dict(token)
status = governor.status._asdict()
back = run(governor, optimizer, train, 300, 600)
governor.close("")
say(straight=straight, used=used, back=back, token=token, status=status)
"""

RESUME = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(
    optimizer, run=token["run"], policy=POLICY, server=url, lag=0, wait_s=None, resume=token
)
status = governor.status._asdict()
say(resumed=run(governor, optimizer, train, token["step"], 600), status=status)
governor.close()
"""


def test_going_back_to_a_checkpoint_rewinds_the_policy(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    first = {t: trainer(GO_BACK, run_name=f"rewind-{t}", url=calm_server.url(t)) for t in TRANSPORTS}
    second, straights = {}, {}
    for transport, one in first.items():
        straight, used, back, token, status = one.hear("straight", "used", "back", "token", "status")
        one.finish()
        assert token["step"] == 300
        assert status["attempt"] == 2
        assert status["step"] == 300
        assert used == straight[:300]
        assert back == straight[300:]
        second[transport] = trainer(RESUME, url=calm_server.url(transport), token=token)
        straights[transport] = straight
    for transport, two in second.items():
        resumed, status = two.hear("resumed", "status")
        two.finish()
        assert status["attempt"] == 3
        assert status["step"] == 300
        assert resumed == straights[transport][300:]
        story = story_of(calm_server, f"rewind-{transport}")
        assert story.from_step == {1: 0, 2: 300, 3: 300}
        assert story.steps[2] == story.steps[3] == list(range(300, 600))
        # The report of the abandoned line's last step may have been under way.
        assert story.steps[1] in (list(range(499)), list(range(500)))
        assert story.problem == ""


def test_going_back_at_once_keeps_the_steps_before_the_checkpoint(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    url = calm_server.url("grpc")
    one = trainer(
        """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run="at-once", policy=POLICY, server=url)
run(governor, optimizer, train, 0, 290)
delivered(governor)
run(governor, optimizer, train, 290, 300)
governor.load_state_dict(governor.state_dict())
run(governor, optimizer, train, 300, 400)
governor.close()
say(done=1)
""",
        url=url,
    )
    one.hear("done")
    one.finish()
    story = story_of(calm_server, "at-once")
    assert story.steps == {1: list(range(300)), 2: list(range(300, 400))}


def test_going_back_is_no_outage(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    script = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, on_outage="stop")
run(governor, optimizer, train, 0, 50)
token, stops = governor.state_dict(), set()
for _ in range(20):
    for i in range(50, 150):  # a report is under way most of the time
        train(i)
        governor.step(1.0)
    governor.load_state_dict(token)
    for _ in range(10):
        if governor.should_stop:
            stops.add(governor.status.last_error)
        time.sleep(0.001)
until = time.monotonic() + 15
while governor.status.state == "connecting" and time.monotonic() < until:
    time.sleep(0.01)
say(stops=sorted(stops), status=governor.status._asdict())
governor.close()
"""
    trainers = [trainer(script, run_name=f"no-outage-{t}", url=calm_server.url(t)) for t in TRANSPORTS]
    for one in trainers:
        stops, status = one.hear("stops", "status")
        one.finish()
        assert stops == []
        assert status["state"] == "steering"


def test_a_checkpoint_ahead_of_the_service_leaves_a_gap(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    url = calm_server.url("http")
    one = trainer(
        """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run="gap", policy=POLICY, server=url)
run(governor, optimizer, train, 0, 200)
delivered(governor)
say(token=governor.state_dict())
""",
        url=url,
    )
    token = one.hear("token")
    one.finish()
    two = trainer(RESUME, url=url, token={**token, "step": 450})
    status = two.hear("status")
    two.finish()
    assert status["attempt"] == 2
    assert status["step"] == 450
    story = story_of(calm_server, "gap")
    assert story.steps == {1: list(range(200)), 2: list(range(450, 600))}
    assert story.problem == ""


WITHOUT_SERVER = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url, start_wait_s=0.2)
run(governor, optimizer, train, 0, 300)
token = governor.state_dict()
run(governor, optimizer, train, 300, 500)
governor.load_state_dict(token)
run(governor, optimizer, train, 300, 600)
say(trained=1)
listen()
until = time.monotonic() + 15
while governor.status.state not in ("steering", "refused") and time.monotonic() < until:
    time.sleep(0.01)
say(delivered=delivered(governor, 5), status=governor.status._asdict())
governor.close()
"""


def test_going_back_before_there_was_a_server_loses_nothing_of_the_line(
    server: Server, trainer: Callable[..., Trainer]
) -> None:
    one = trainer(WITHOUT_SERVER, run_name="never", url=server.url("http"))
    one.hear("trained")
    server.start()
    one.tell()
    _, status = one.hear("delivered", "status")
    assert status["state"] == "steering", status["last_error"]
    one.finish()
    story = story_of(server, "never")
    line = [step for attempt in sorted(story.steps) for step in story.steps[attempt]]
    assert line[-300:] == list(range(300, 600))


AWAY_RESUME = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run="late", policy=POLICY, server=url, resume=True, start_wait_s=0.2)
for i in range(300):
    train(i)
    governor.step(2.0)
say(trained=1)
listen()
until = time.monotonic() + 15
while governor.status.state != "steering" and time.monotonic() < until:
    time.sleep(0.01)
say(delivered=delivered(governor, 5), status=governor.status._asdict())
governor.close()
"""


def test_resuming_while_the_server_is_away_loses_no_step(server: Server, trainer: Callable[..., Trainer]) -> None:
    server.start()
    one = trainer(
        """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run="late", policy=POLICY, server=url)
run(governor, optimizer, train, 0, 200)
governor.close()
say(done=1)
""",
        url=server.url("http"),
    )
    one.hear("done")
    one.finish()
    server.kill()
    two = trainer(AWAY_RESUME, url=server.url("http"))
    two.hear("trained")
    server.start()
    two.tell()
    _, status = two.hear("delivered", "status")
    two.finish()
    story = story_of(server, "late")
    assert story.steps[1] == list(range(200))
    assert len(story.steps[2]) == 300 - status["dropped"] == 300
    assert story.steps[2][0] >= 200, "it goes on behind the newest step"


FORK = """
import flyball
from tests.e2e.training import *

def attach(name, **options):
    optimizer, train = tiny()
    governor = flyball.attach(optimizer, run=name, server=url, lag=0, wait_s=None, **options)
    return governor, optimizer, train

governor, optimizer, train = attach(run_name, policy=POLICY, shadows={"still": "constant"})
used = run(governor, optimizer, train, 0, 300)
token = governor.state_dict()
used += run(governor, optimizer, train, 300, 450)
governor.close()

governor, optimizer, train = attach(run_name + "-fork", fork=token)
forked = run(governor, optimizer, train, 300, 450)
governor.close()
say(used=used, forked=forked, token=token)
"""


def test_a_fork_goes_on_under_the_other_runs_policy_in_its_state(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    trainers = {t: trainer(FORK, run_name=f"left-{t}", url=calm_server.url(t)) for t in TRANSPORTS}
    for transport, one in trainers.items():
        used, forked, token = one.hear("used", "forked", "token")
        one.finish()
        assert forked == used[300:]
        assert len(set(forked)) > 3
        story = story_of(calm_server, f"left-{transport}-fork")
        assert story.steps == {1: list(range(300, 450))}
        assert story.problem == ""
        lineage = calm_server.get(f"/v1/runs/left-{transport}-fork/lineage")
        assert [(a["run"], a["step"], a["digest"]) for a in lineage["ancestors"]] == [
            (f"left-{transport}", 300, token["digest"])
        ]
        shadow = calm_server.get(f"/v1/runs/left-{transport}/series", signals="shadow:still:lr:default")
        assert set(shadow["series"]["shadow:still:lr:default"]["value"]) == {0.1}


ELSEWHERE = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
options = dict(run=token["run"], policy=POLICY, server=url, lag=0, wait_s=None, resume=token)
try:
    flyball.attach(optimizer, **options)
    refused = ""
except flyball.Refused as error:
    refused = str(error)
governor = flyball.attach(optimizer, on_unknown="import", **options)
used = run(governor, optimizer, train, token["step"], 500)
governor.close()
say(refused=refused, used=used, status=governor.status._asdict())
"""


def test_a_checkpoint_of_a_run_that_the_service_never_knew_is_refused_or_imported(
    calm_server: Server, trainer: Callable[..., Trainer]
) -> None:
    digest = {t: f"{i}b" * 32 for i, t in enumerate(TRANSPORTS)}
    trainers = {}
    for t in TRANSPORTS:
        token = {"run": f"else-{t}", "project": "default", "attempt": 4, "step": 300, "seq": 70, "digest": digest[t]}
        trainers[t] = trainer(ELSEWHERE, token=token, url=calm_server.url(t))
    for transport, one in trainers.items():
        refused, used, status = one.hear("refused", "used", "status")
        one.finish()
        assert "not known" in refused
        assert "on_unknown='import'" in refused
        assert (status["attempt"], status["step"], len(used)) == (1, 500, 200)
        story = story_of(calm_server, f"else-{transport}")
        assert story.steps == {1: list(range(300, 500))}
        [origin] = calm_server.get(f"/v1/runs/else-{transport}/lineage")["ancestors"]
        assert (origin["kind"], origin["known"], origin["digest"]) == ("token", False, digest[transport])
