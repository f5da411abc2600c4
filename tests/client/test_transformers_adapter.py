"""Goal: a Trainer that was given one callback trains with what the service decides, and reports what it really did.

Method: real Trainers on small models and a real service, in lockstep (lag=0) so that every test is exact; what was
applied is read from the optimizer during the step, and what was reported from the journal.
"""

import copy
import json
import logging
import math
import pickle
from itertools import count

import httpx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import flyball_server
from flyball import FlyballError
from flyball.adapters.trainer import StandIn
from flyball.adapters.transformers import FlyballCallback

names = count()
#: Cuts by half at every step whose loss is no better than the best.
HALVING = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def http(service):
    with httpx.Client(base_url=f"{service.http}/v1/runs/", trust_env=False, timeout=20) as http:
        yield http


@pytest.fixture
def read(http):
    return lambda path: http.get(path).raise_for_status().json()


@pytest.fixture
def flyball_callback(service):
    """A callback with the defaults of these tests."""
    made = []

    def make(**options):
        defaults = {"run": f"t{next(names)}", "lag": 0, "wait_s": 10.0, "server": service.http}
        made.append(FlyballCallback(**(defaults | options)))
        return made[-1]

    yield make
    for one in made:
        one._end("")


class Told(torch.nn.Module):
    """A model whose loss is what it is told: the value in each batch (the mean over its examples)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.bias = torch.nn.Parameter(torch.ones(2))

    def forward(self, value):
        return {"loss": (1 + 0 * (self.weight + self.bias).sum()) * value.mean(), "logits": value}


class Data(torch.utils.data.IterableDataset):
    """Examples in the order given, over and over."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        while True:
            yield from self.examples


class Spy(TrainerCallback):
    """What others see: learning rates (before the update, in it), and logs. `then`: called at each step's beginning."""

    def __init__(self, then=lambda step, optimizer: None):
        self.before, self.used, self.logs, self.then = [], [], [], then

    def on_train_begin(self, args, state, control, optimizer, **_):
        inner = optimizer.optimizer
        inner.register_step_pre_hook(lambda *_: self.used.append([float(g["lr"]) for g in inner.param_groups]))

    def on_step_begin(self, args, state, control, optimizer, **_):
        self.then(state.global_step, optimizer)

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        self.before.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(dict(logs))


def told(losses):
    return Data([{"value": torch.tensor(float(loss))} for loss in losses])


def arguments(folder, **options):
    defaults = {
        "max_steps": 5, "per_device_train_batch_size": 1, "learning_rate": 0.1, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "optim": "sgd",
        "label_names": ["value"],
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def trainer(folder, callbacks, *, losses=(1.0,), model=None, given=None, **options):
    parts = {"train_dataset": told(losses), "model": model or Told(), **(given or {})}
    return Trainer(args=arguments(folder, **options), callbacks=callbacks, **parts)


def reported(read, callback, *signals):
    run = callback.governor.status.run
    series = read(f"{run}/series?signals={','.join(signals)}")["series"]
    return [series[name]["value"] for name in signals]


def test_a_trainer_uses_what_was_decided_from_before_its_update_on(tmp_path, flyball_callback, read):
    callback, spy = flyball_callback(policy=HALVING), Spy()
    trainer(tmp_path, [spy, callback]).train()
    wanted = [0.1, 0.1, 0.05, 0.025, 0.0125]
    assert [lr[0] for lr in spy.used] == wanted
    assert spy.before == spy.used
    assert reported(read, callback, "loss") == [[1.0] * 5]
    # Another callback, which was there before, logs what was applied; so does the Trainer's own history.
    assert [line["learning_rate"] for line in spy.logs if "learning_rate" in line] == wanted
    assert read(callback.governor.status.run)["status"] == "finished"
    assert callback.governor.status.conflicts == 0


def test_the_history_holds_the_learning_rate_of_every_group(tmp_path, flyball_callback):
    model = Told()
    groups = [{"params": [model.weight], "name": "body", "lr": 0.1}, {"params": [model.bias], "name": "head"}]
    given = {"optimizers": (torch.optim.SGD(groups, lr=0.01), None)}
    one = trainer(tmp_path, [flyball_callback(policy=HALVING)], model=model, given=given, max_steps=3)
    one.train()
    newest = [line for line in one.state.log_history if "learning_rate" in line][-1]
    assert (newest["learning_rate"], newest["learning_rate/body"], newest["learning_rate/head"]) == (0.05, 0.05, 0.005)


@pytest.mark.parametrize("batches", [1, 4])
def test_every_steps_loss_is_that_of_its_gradient(tmp_path, flyball_callback, read, batches):
    """Micro-batches have different numbers of tokens: neither their mean nor their sum is the step's loss."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0,
                                       embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0))  # fmt: skip
    tokens = torch.randint(11, (12, 8))
    labels = tokens.clone()
    for i, row in enumerate(labels):
        row[: i % 7] = -100
    examples = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    size = 4 // batches
    # The Trainer divides by all labels of the step, those of the first positions (which nothing predicts) included.
    wanted = [loss[4 * i : 4 * i + 4].sum() / (labels[4 * i : 4 * i + 4] != -100).sum() for i in range(3)]
    callback = flyball_callback(policy="constant")
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "max_steps": 3}
    trainer(tmp_path, [callback], model=model, given={"train_dataset": Data(examples)}, learning_rate=1e-12,
            **sizes).train()  # fmt: skip
    assert reported(read, callback, "loss")[0] == pytest.approx([float(one) for one in wanted], rel=1e-5)
    assert len(reported(read, callback, "grad_norm")[0]) == 3


def test_a_nan_loss_is_reported_though_the_trainer_logs_none(tmp_path, flyball_callback, read):
    callback = flyball_callback(policy={**HALVING, "bad_limit": 1})
    one = trainer(tmp_path, [callback], losses=[1.0, math.nan, 3.0], max_steps=3, logging_steps=3)
    one.train()
    assert math.isfinite(one.state.log_history[0]["loss"])  # as though nothing had happened
    losses = reported(read, callback, "loss")[0]
    assert losses[0] == 1.0
    assert losses[1] == "NaN"
    decisions = read(f"{callback.governor.status.run}/decisions")["decisions"]
    assert "nonfinite_backoff" in json.dumps(decisions[0])


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau", "greedy"])
def test_a_neutralised_scheduler_neither_writes_nor_counts_as_somebody_else(tmp_path, flyball_callback, kind, caplog):
    callback, spy = flyball_callback(policy=HALVING), Spy()
    plateau = kind != "linear"
    given = {"eval_dataset": [{"value": torch.tensor(2.0)}]}
    own = {"factor": 0.1, "patience": 0} if plateau else {}
    extra = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "lr_scheduler_kwargs": own}
    one = trainer(tmp_path, [callback, spy], given=given, lr_scheduler_type=kind, max_steps=12,
                  **({} if kind != "linear" else {"warmup_steps": 6}), **(extra if plateau else {}))  # fmt: skip
    one.train()
    # The reference is the learning rate that was asked for, not the 0 that a warm-up begins with.
    assert [lr[0] for lr in spy.used] == [0.1] + [0.1 * 0.5**i for i in range(11)]
    assert callback.governor.status.conflicts == 0
    assert "is attached to the optimizer" not in caplog.text
    assert not isinstance(one.lr_scheduler, StandIn)
    assert "last_epoch" in one.lr_scheduler.state_dict()


def test_multiplied_the_trainers_schedule_and_the_factor_are_applied_and_logged(tmp_path, flyball_callback):
    callback, spy = flyball_callback(policy=HALVING, scheduler="multiply"), Spy()
    one = trainer(tmp_path, [callback, spy], lr_scheduler_type="linear", max_steps=4)
    one.train()
    wanted = [0.1, 0.075, 0.05 * 0.5, 0.025 * 0.25]
    assert [lr[0] for lr in spy.used] == pytest.approx(wanted)
    assert spy.before == spy.used
    assert [line["learning_rate"] for line in spy.logs if "learning_rate" in line] == pytest.approx(wanted)
    assert one.optimizer.param_groups[0]["lr"] == 0.0  # the schedule's own end, untouched by the factor


def test_another_writer_is_named_and_does_not_win(tmp_path, flyball_callback):
    def meddle(step, optimizer):
        if step == 2:
            optimizer.param_groups[0]["lr"] *= 0.5

    callback, spy = flyball_callback(policy="constant"), Spy(meddle)
    trainer(tmp_path, [callback, spy], max_steps=4).train()
    assert [lr[0] for lr in spy.used] == [0.1] * 4
    assert callback.governor.status.conflicts == 1


@pytest.mark.parametrize("scheduler", ["neutralise", "multiply"])
def test_a_step_that_amp_skips_is_no_step_and_leaves_nothing_behind(tmp_path, flyball_callback, read, scheduler):
    callback, spy = flyball_callback(policy=HALVING, scheduler=scheduler), Spy()
    one = trainer(tmp_path, [callback, spy], losses=[1.0, math.inf, 3.0], max_steps=3, max_grad_norm=0.0,
                  lr_scheduler_type="constant")  # fmt: skip
    one.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    one.train()
    assert len(spy.used) == 2
    assert reported(read, callback, "loss") == [[1.0, 3.0]]
    assert callback.governor.status.skipped == 1
    assert callback.governor.status.conflicts == 0
    if scheduler == "multiply":
        assert one.optimizer.param_groups[0]["lr"] == 0.1


def resumable(folder, callback, steps=6, losses=(1.0, 1.0, 0.5, 1.0, 1.0, 1.0), **options):
    spy = Spy()
    saves = {"save_strategy": "steps", "save_steps": 3}
    return trainer(folder, [callback, spy], losses=losses, max_steps=steps, **saves, **options), spy


def test_a_resumed_trainer_goes_on_as_though_it_had_never_stopped(tmp_path, flyball_callback, read):
    callback = flyball_callback(policy=HALVING)
    first, straight = resumable(tmp_path, callback)
    first.train()
    again, spy = resumable(tmp_path, flyball_callback(run=callback.governor.status.run))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert spy.used == straight.used[3:]
    told = read(callback.governor.status.run)
    assert (told["attempt"], told["step"], told["status"]) == (2, 5, "finished")


def test_a_callback_made_anew_from_a_checkpoint_keeps_the_scripts_options(tmp_path, service, http, flyball_callback):
    callback = flyball_callback(policy=HALVING, token="a-secret")
    first, straight = resumable(tmp_path, callback)
    first.train()
    kept = (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
    assert "a-secret" not in kept
    run = callback.governor.status.run
    again, spy = resumable(tmp_path, flyball_callback(run=run), restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert spy.used == straight.used[3:]


def test_under_another_name_a_resumed_trainer_is_a_fork(tmp_path, flyball_callback, read):
    callback = flyball_callback(policy=HALVING)
    first, straight = resumable(tmp_path, callback)
    first.train()
    fork = flyball_callback()
    again, spy = resumable(tmp_path, fork)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert spy.used == straight.used[3:]
    origin = read(f"{fork.governor.status.run}/lineage")["ancestors"][0]
    assert (origin["run"], origin["step"]) == (callback.governor.status.run, 3)


def test_a_checkpoint_from_before_flyball_can_be_resumed_and_saved_again(tmp_path, flyball_callback):
    trainer(tmp_path, [], max_steps=3, save_strategy="steps", save_steps=3).train()
    callback = flyball_callback(policy="constant")
    again, _ = resumable(tmp_path, callback)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    kept = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["FlyballCallback"]["attributes"]["checkpoint"]["step"] == 3  # of the run, which began at step 3


def test_a_training_that_failed_and_begins_anew_goes_back_to_its_beginning(tmp_path, flyball_callback, read):
    """What `auto_find_batch_size` does after running out of memory, and a person in a notebook."""

    def fail(step, _):
        if step == 2 and not failed:
            failed.append(step)
            raise RuntimeError("as it may happen")

    failed = []
    callback, spy = flyball_callback(policy=HALVING), Spy(fail)
    one = trainer(tmp_path, [callback, spy], max_steps=4)
    with pytest.raises(RuntimeError, match="as it may"):
        one.train()
    spy.used.clear()
    one.train()
    told = read(callback.governor.status.run)
    assert (told["attempt"], told["step"], told["status"]) == (2, 3, "finished")
    assert "training_step" not in vars(one)


def command(http, callback, kind, **fields):
    answer = http.post(f"{callback._options['run']}/commands", json={"kind": kind, "reason": "a test", **fields})
    answer.raise_for_status()


def test_the_service_may_ask_for_a_checkpoint_an_evaluation_and_the_end(tmp_path, flyball_callback, http, read):
    def ask(step, _):
        for kind in {2: ["checkpoint", "evaluate"], 5: ["stop"]}.get(step, []):
            command(http, callback, kind)

    callback, spy = flyball_callback(policy="constant"), Spy(ask)
    given = {"eval_dataset": [{"value": torch.tensor(2.5)}]}
    one = trainer(tmp_path, [callback, spy], given=given, max_steps=50, save_strategy="steps", save_steps=50)
    one.train()
    saved = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert saved[0] in (3, 4)
    assert one.state.global_step in (6, 7)
    assert saved[-1] == one.state.global_step  # stopped, it saves
    assert reported(read, callback, "val_loss") == [[2.5]]
    assert read(callback.governor.status.run)["status"] == "active"  # to be resumed


def test_an_evaluation_that_the_trainer_cannot_make_is_declined(tmp_path, flyball_callback, http, read):
    def ask(step, _):
        if step == 1:
            command(http, callback, "evaluate")

    callback = flyball_callback(policy="constant")
    trainer(tmp_path, [callback, Spy(ask)]).train()
    assert callback.governor.status.state == "closed"
    assert "no handler for evaluate" in json.dumps(read(f"{callback.governor.status.run}/commands"))


def test_training_goes_on_while_the_service_is_away(tmp_path, flyball_callback, caplog):
    callback, spy = flyball_callback(server="http://127.0.0.1:9", start_wait_s=0.0, wait_s=0.01, close_s=0.0), Spy()
    with caplog.at_level(logging.ERROR):
        trainer(tmp_path, [callback, spy], max_steps=20, warmup_steps=5).train()
    assert [lr[0] for lr in spy.used] == [0.1] * 20


def test_what_was_saved_while_the_service_was_away_is_resumed_with_it(tmp_path, flyball_callback, read, caplog):
    away = {"server": "http://127.0.0.1:9", "start_wait_s": 0.0, "wait_s": 0.01, "close_s": 0.0}
    resumable(tmp_path, flyball_callback(run="away", **away), steps=3)[0].train()
    last = str(tmp_path / "checkpoint-3")
    with pytest.raises(FlyballError, match="is not known"):
        resumable(tmp_path, flyball_callback(run="away", on_unknown="refuse"))[0].train(resume_from_checkpoint=last)
    with pytest.raises(FlyballError, match="is not known"):
        resumable(tmp_path, flyball_callback(run="away", resume=True))[0].train(resume_from_checkpoint=last)
    resumable(tmp_path, flyball_callback(run="away"))[0].train(resume_from_checkpoint=last)
    assert (read("away")["step"], read("away")["policy"]) == (5, "constant@1")
    # What the user says is what happens, beside a checkpoint too.
    resumable(tmp_path, flyball_callback(run="away", resume=True))[0].train(resume_from_checkpoint=last)
    assert (read("away")["step"], read("away")["attempt"]) == (8, 2)


def test_a_second_training_goes_on_with_the_run_and_a_new_callback_is_told_how_to(tmp_path, flyball_callback, read):
    callback, spy = flyball_callback(policy=HALVING), Spy()
    one = trainer(tmp_path, [callback, spy], max_steps=3)
    one.train()
    one.remove_callback(spy)
    one.train()
    run = callback.governor.status.run
    told = read(run)
    assert (told["attempt"], told["step"], told["status"]) == (2, 5, "finished")
    for again in (flyball_callback(run=run, policy=HALVING), copy.deepcopy(callback)):
        with pytest.raises(FlyballError, match=r"exists already.*FlyballCallback\(\.\.\., resume=True\)"):
            trainer(tmp_path, [again], max_steps=3).train()
    trainer(tmp_path, [flyball_callback(run=run, resume=True)], max_steps=3).train()
    assert read(run)["step"] == 8


def test_a_callback_can_be_copied_during_and_after_a_training(tmp_path, flyball_callback):
    callback, copies = flyball_callback(policy="constant"), []
    trainer(tmp_path, [callback, Spy(lambda *_: copies.append(pickle.loads(pickle.dumps(callback))))]).train()
    assert [one.governor for one in copies] == [None] * 5
    assert copy.deepcopy(callback)._options == callback._options


def test_the_trainers_own_groups_have_names_and_keep_them(tmp_path, flyball_callback, read):
    def model():
        torch.manual_seed(0)
        one = Told()
        one.layer = torch.nn.Linear(1, 1)  # biases do not decay
        return one

    def lrs(run):
        return set(read(f"{run}/series?signals=lr:decay,lr:no_decay")["series"])

    callback = flyball_callback(policy="constant")
    resumable(tmp_path, callback, model=model(), weight_decay=0.1)[0].train()
    assert callback.groups == ["decay", "no_decay"]
    run = callback.governor.status.run
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FlyballCallback"]["attributes"]["groups"] == ["decay", "no_decay"]
    again = flyball_callback(run=run)
    resumed = resumable(tmp_path, again, model=model(), weight_decay=0.1)[0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.groups == ["decay", "no_decay"]
    assert lrs(run) == {"lr:decay", "lr:no_decay"}
    plain = flyball_callback(policy="constant")
    trainer(tmp_path, [plain], model=model(), weight_decay=0.0).train()
    assert plain.groups == ["group0", "group1"], "nothing tells them apart"


def test_what_is_asked_to_be_measured_is(tmp_path, flyball_callback, read):
    callback = flyball_callback(policy="constant", signals=["update_norm"])
    trainer(tmp_path, [callback]).train()
    assert len(reported(read, callback, "update_norm")[0]) == 5
    with pytest.raises(ValueError, match="signals is"):
        FlyballCallback(run="x", signals=["update"])


def test_two_callbacks_on_one_trainer_are_refused_by_the_name_of_the_first(tmp_path, flyball_callback):
    first, second = flyball_callback(run="one-of-two"), flyball_callback()
    with pytest.raises(ValueError, match="another governor already, that of run 'one-of-two'"):
        trainer(tmp_path, [first, second]).train()


def test_what_makes_no_sense_is_refused_before_training():
    with pytest.raises(ValueError, match="scheduler is 'keep'"):
        FlyballCallback(run="x", scheduler="keep")
    with pytest.raises(ValueError, match="give one of them"):
        FlyballCallback(run="x", scheduler="neutralise", mode="multiplier")
    with pytest.raises(TypeError, match="no option 'polcy'"):
        FlyballCallback(run="x", polcy="constant")
    with pytest.raises(FlyballError, match="finds no trainer"):
        FlyballCallback(run="x").on_train_begin(None, None, None)
