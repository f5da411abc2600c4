"""Training starts before there is any server.

Goal: each on_outage mode does what it says from the first step on, and the service gets the whole backlog when it
appears. Method: attach to ports where nobody listens, train, start the server, read the journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e.processes import TRANSPORTS, Server, Trainer, story_of

SCHEDULE = {"type": "cosine", "T_max": 1000, "eta_min": 0.001}

ALONE = """
import flyball
from tests.e2e.training import *

optimizer, train = tiny(0.05)
governor = flyball.attach(optimizer, run=run_name, server=url, on_outage=on_outage, base=base, start_wait_s=0.3)
before = governor.status._asdict()
stop_before = governor.should_stop
used = run(governor, optimizer, train, 0, 300)
say(used=used, before=before, stop_before=stop_before, status=governor.status._asdict())
listen()
i = 300
while governor.status.state != "steering" or governor.status.outage:
    run(governor, optimizer, train, i, i + 10, 0.005)
    i += 10
say(delivered=delivered(governor), after=governor.status._asdict())
governor.close()
say(steps=i)
"""


def cosine(step: int, lr: float = 0.05) -> float:
    """torch's CosineAnnealingLR, in closed form."""
    return 0.001 + (lr - 0.001) * (1 + math.cos(math.pi * step / 1000)) / 2


def test_each_outage_mode_trains_without_a_server_and_the_backlog_arrives(
    server: Server, trainer: Callable[..., Trainer]
) -> None:
    trainers = {
        f"{mode}-{transport}": trainer(
            ALONE,
            run_name=f"{mode}-{transport}",
            url=server.url(transport),
            on_outage=mode,
            base=SCHEDULE if mode == "base" else None,
        )
        for mode in ("hold", "base", "stop")
        for transport in TRANSPORTS
    }
    alone: dict[str, tuple[list[float], dict[str, Any], bool, dict[str, Any]]] = {
        name: each.hear("used", "before", "stop_before", "status") for name, each in trainers.items()
    }
    server.start()
    for each in trainers.values():
        each.tell()
    for name, each in trainers.items():
        arrived, after = each.hear("delivered", "after")
        steps = each.hear("steps")
        each.finish()
        assert arrived
        assert after["state"] == "steering"
        assert after["last_error"] == ""
        assert not after["outage"]
        story = story_of(server, name)
        assert story.steps == {1: list(range(steps))}
        assert story.problem == ""
    for name, (used, before, stop_before, status) in alone.items():
        assert before["outage"], name
        assert status["outage"], name
        assert status["state"] == "away", name
        assert status["last_error"], name
        assert status["waiting"] == 300
        assert status["through"] == -1
        assert stop_before == status["should_stop"] == name.startswith("stop"), name
        if name.startswith("base"):
            assert used == pytest.approx([cosine(i) for i in range(300)], rel=1e-12)
        else:
            assert set(used) == {0.05}
