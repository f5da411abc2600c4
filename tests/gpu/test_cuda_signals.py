"""Goal: what is measured around a step, and every number that the script hands over on its device, costs no wait for
the device. Method: torch raises at each synchronisation while whole steps run; what arrived is compared afterwards.
"""

import httpx
import pytest
import torch

import flyball
import flyball_server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ALL = ("grad_norm", "update_norm", "distance", "inner_product")


@pytest.fixture
def no_wait():
    """Steps inside: a synchronisation raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


def series(service, governor, *names):
    governor.close()
    assert (governor.status.waiting, governor.status.dropped, governor.status.bad_values) == (0, 0, 0)
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        url = f"/v1/runs/{governor.status.run}/series?signals={','.join(names)}"
        return http.get(url).raise_for_status().json()["series"]


def network(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)).to("cuda", dtype)


@pytest.mark.parametrize("kind", ["foreach", "fused", "capturable", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(request, kind, dtype):
    model = network(dtype)
    if kind == "sparse":
        rows = torch.nn.Embedding(100, 16, sparse=True, device="cuda", dtype=dtype)
        optimizer = torch.optim.SGD([*model.parameters(), *rows.parameters()], lr=0.01)
    else:
        lr = torch.tensor(0.01, device="cuda") if kind == "capturable" else 0.01
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **{kind: True})
    data = torch.randn(32, 64, device="cuda", dtype=dtype)
    asked = torch.randint(0, 100, (32,), device="cuda")
    with flyball_server.running() as service:
        governor = flyball.attach(optimizer, run="r", policy="windowed", server=service.http, signals=ALL)

        def step():
            optimizer.zero_grad()
            loss = model(data).square().mean()
            if kind == "sparse":
                loss = loss + rows(asked).square().mean()
            loss.backward()
            optimizer.step()
            governor.step(loss, reward=-loss.detach(), mine=loss.detach() * 2)

        step()  # torch makes its state at the first one
        request.getfixturevalue("no_wait")
        for _ in range(50):
            step()
        torch.cuda.set_sync_debug_mode("default")
        found = series(service, governor, "loss", "reward", "mine", *ALL)
    assert all(len(one["value"]) == 51 for one in found.values()), {name: len(o["value"]) for name, o in found.items()}
    assert found["reward"]["value"] == [-one for one in found["loss"]["value"]]


def test_the_numbers_are_those_of_the_same_training_on_the_cpu():
    told = {}
    with flyball_server.running() as service:
        for device in ("cpu", "cuda"):
            model = network(torch.float64).to(device)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            governor = flyball.attach(optimizer, run=device, policy="constant", server=service.http, signals=ALL)
            data = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
            for _ in range(10):
                optimizer.zero_grad()
                loss = model(data).square().mean()
                loss.backward()
                optimizer.step()
                governor.step(loss)
            told[device] = series(service, governor, *ALL)
    for name in ALL:
        assert told["cuda"][name]["value"] == pytest.approx(told["cpu"][name]["value"], rel=1e-9), name


def test_a_norm_that_clipping_returns_is_handed_over_without_a_wait(request):
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    data = torch.randn(32, 64, device="cuda")
    with flyball_server.running() as service:
        governor = flyball.attach(optimizer, run="r", policy="constant", server=service.http, signals=("update_norm",))

        def step():
            optimizer.zero_grad()
            with torch.autocast("cuda"):
                loss = model(data).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            governor.step(loss, grad_norm=norm)

        step()
        request.getfixturevalue("no_wait")
        for _ in range(30):
            step()
        torch.cuda.set_sync_debug_mode("default")
        found = series(service, governor, "grad_norm", "update_norm")
    assert len(found["grad_norm"]["value"]) == len(found["update_norm"]["value"]) == 31
