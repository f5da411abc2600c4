"""What surrounds a training process: forks, data loaders, and images without gRPC.

Goal: a forked child says nothing and never hangs; HTTP needs the standard library alone. Method: real forks under load,
an import blocker.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

FORKS = """
import os
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
i = hung = 0
for _ in range(80):
    run(governor, optimizer, train, i, i + 20)
    i += 20
    child = os.fork()
    if child == 0:
        # What a child might do with the governor it has inherited.
        for _ in range(30):
            train(i)
            governor.step(-1.0)
        governor.status, governor.state_dict()
        governor.close()
        os._exit(0)
    until = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
            os.waitpid(child, 0)
            hung += 1
            break
        run(governor, optimizer, train, i, i + 1)
        i += 1
    if hung:
        break
say(hung=hung, settled=delivered(governor), steps=i)
governor.close()
"""


def test_forked_children_are_silent_and_never_hang(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    trainers = {f"forks-{t}": trainer(FORKS, run_name=f"forks-{t}", url=calm_server.url(t)) for t in TRANSPORTS}
    for name, one in trainers.items():
        hung, settled, steps = one.hear("hung", "settled", "steps")
        one.finish()
        assert hung == 0
        assert settled
        story = story_of(calm_server, name)
        assert story.steps == {1: list(range(steps))}
        assert -1.0 not in story.signals[1]["loss"]


LOADER = """
import os, sys
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
governor = flyball.attach(optimizer, run=run_name, policy=POLICY, server=url)
i = 0
for epoch in range(4):
    loader = torch.utils.data.DataLoader(
        list(range(200)), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    for batch in loader:
        train(i)
        governor.step(float(batch[0]))
        i += 1
child = os.fork()
if child == 0:
    sys.exit(0)  # through every atexit handler
assert os.waitpid(child, 0)[1] == 0
say(settled=delivered(governor), steps=i)
governor.close()
"""


def test_data_loader_workers_do_not_disturb(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    trainers = {f"loader-{t}": trainer(LOADER, run_name=f"loader-{t}", url=calm_server.url(t)) for t in TRANSPORTS}
    for name, one in trainers.items():
        settled, steps = one.hear("settled", "steps")
        one.finish()
        assert settled
        assert steps == 400
        assert story_of(calm_server, name).steps == {1: list(range(steps))}


WITHOUT_GRPC = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("grpc", "flyball_proto") or name.startswith("google.protobuf"):
            raise ImportError(f"no module {name} here")

sys.meta_path.insert(0, Blocker())
assert not {"grpc", "google.protobuf"} & set(sys.modules)
import flyball
from tests.e2e.training import *

optimizer, train = tiny()
try:
    flyball.attach(optimizer, run="no-grpc", server="grpc://127.0.0.1:1")
except flyball.FlyballError as error:
    say(error=str(error))
with flyball.attach(optimizer, run="no-grpc", policy=POLICY, server=url, lag=0, wait_s=None) as governor:
    used = run(governor, optimizer, train, 0, 200)
say(used=used, loaded=sorted(name for name in sys.modules if name.startswith(("grpc", "google"))))
"""


def test_http_needs_neither_grpc_nor_protobuf(calm_server: Server, trainer: Callable[..., Trainer]) -> None:
    one = trainer(WITHOUT_GRPC, url=calm_server.url("http"))
    assert "pip install 'flyball[grpc]'" in one.hear("error")
    used, loaded = one.hear("used", "loaded")
    one.finish()
    assert len(set(used)) > 5
    assert loaded == []
    assert story_of(calm_server, "no-grpc").steps == {1: list(range(200))}
