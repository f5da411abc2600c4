"""DeepSpeed's real engine, where it is installed: ZeRO 2 and 3 on the CPU, one process, no service at all.

Goal: one optimizer step of the engine is one step of ours, whatever ZeRO makes of it. Method: the declared base
schedule moves the learning rates at every step while the service is away, and the optimizer itself is asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tests.e2e.processes import free_port

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

SCRIPT = """
import json, sys
import torch, deepspeed
import deepspeed.comm.torch
# It would compile a shared-memory collective at every first start, which one process has no use for.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from flyball.adapters.deepspeed import attach

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)).bfloat16()
body, head = model[0].parameters(), model[1].parameters()
groups = [{"params": body, "name": "body"}, {"params": head, "name": "head", "lr": 0.01}]
optimizer = torch.optim.SGD(groups, lr=0.1)
config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
config |= {"zero_optimization": {"stage": int(sys.argv[1])}, "zero_allow_untested_optimizer": True}
config |= {"zero_force_ds_cpu_optimizer": False}
engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
base = {"type": "cosine", "T_max": 10}
governor = attach(engine, run="zero", server="http://127.0.0.1:9", start_wait_s=0.3, close_s=0.1, base=base,
                  on_outage="base")
seen = []
for i in range(10):
    loss = engine(torch.ones(2, 4).bfloat16()).float().square().mean()
    engine.backward(loss)
    engine.step()
    if i % 2:
        governor.step(loss.detach())
        seen.append([governor.status.step, *(group["lr"] for group in wrapped.param_groups)])
conflicts = governor.status.conflicts
governor.close()
engine.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
try:
    refusal = str(attach(engine, run="zero"))
except ValueError as error:
    refusal = str(error)
print(json.dumps({"seen": seen, "conflicts": conflicts, "refusal": refusal}))
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_is_steered_once_per_step_and_refused_with_a_scheduler(stage: int) -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **one, "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(stage)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert [step for step, *_ in said["seen"]] == [1, 2, 3, 4, 5]
    lrs = [lr for _, lr, _ in said["seen"]]
    assert lrs == pytest.approx([0.1, 0.0975528, 0.0904508, 0.0793893, 0.0654508], rel=1e-5)
    assert [head for *_, head in said["seen"]] == pytest.approx([lr / 10 for lr in lrs])
    assert said["conflicts"] == 0
    assert said["refusal"].startswith("the engine's scheduler LambdaLR owns the learning rate: ")
