"""Goal: a Trainer's own features (accumulation, schedulers, checkpoints, several optimizers) and steering get along.

Method: real fits on a real service, in lockstep; what a step used is read in the optimizer's hook.
"""

import copy
import logging
import pickle
from itertools import count

import httpx
import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import flyball
import flyball_server
from flyball.adapters.lightning import FlyballCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
names = (f"l{i}" for i in count())
#: Halves at every step whose loss is no better than the best.
HALVING = {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.0}


@pytest.fixture(scope="module")
def service():
    with flyball_server.running() as service:
        yield service


@pytest.fixture
def read(service):
    with httpx.Client(base_url=service.http, trust_env=False, timeout=20) as http:
        yield lambda path: http.get(f"/v1/runs/{path}").raise_for_status().json()


@pytest.fixture
def steer(service):
    return lambda **options: FlyballCallback(
        **{"run": next(names), "policy": HALVING, "lag": 0, "wait_s": 10.0, "server": service.http, **options}
    )


def losses_of(read, run):
    return read(f"{run}/series?signals=loss")["series"]["loss"]["value"]


class Model(pl.LightningModule):
    """The batch is the loss."""

    def __init__(self, scheduler=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.used = []
        self.scheduler = scheduler

    def training_step(self, batch, index):
        return 0 * self.layer(torch.ones(1, 1)).sum() + batch.mean()

    def validation_step(self, batch, index):
        self.log("val_loss", batch.mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: self.used.append(optimizer.param_groups[0]["lr"]))
        return self.scheduler(optimizer) if self.scheduler else optimizer


def fit(model, callback, losses, *more, trainer=None, ckpt_path=None, validate=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = trainer or pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, *more], **options
    )
    loader = DataLoader(torch.tensor(losses))
    trainer.fit(model, loader, None if validate is None else DataLoader(torch.tensor(validate)), ckpt_path=ckpt_path)
    return trainer


def test_a_micro_batch_is_no_step_and_the_loss_is_the_mean_before_lightning_divided_it(steer, read):
    callback, model = steer(run="accumulated"), Model()
    fit(model, callback, [1.0, 2.0, 3.0, 4.0, 8.0], accumulate_grad_batches=4)
    assert losses_of(read, "accumulated") == [2.5, 8.0], "the last step of an epoch has fewer"
    assert model.used == [0.1, 0.1]
    assert read("accumulated")["status"] == "finished"


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_factor_multiplies_what_lightnings_scheduler_sets_and_leaves_it_alone(steer, interval):
    plain = lambda optimizer: {  # noqa: E731
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1), "interval": interval},
    }
    model = Model(plain)
    trainer = fit(model, steer(mode="multiplier"), [1.0] * 2, max_epochs=2)
    scheduled = [0.1, 0.01, 0.001, 0.0001] if interval == "step" else [0.1, 0.1, 0.01, 0.01]
    assert model.used == pytest.approx([lr * f for lr, f in zip(scheduled, [1, 1, 0.5, 0.25], strict=True)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(scheduled[-1] * 0.1)


def test_a_scheduler_left_running_is_overwritten_and_named_and_plateau_gets_its_monitor(steer, caplog):
    plateau = lambda optimizer: {  # noqa: E731
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
            "monitor": "val_loss",
        },
    }
    model = Model(plateau)
    fit(model, steer(policy="constant"), [1.0] * 2, validate=[1.0], max_epochs=4)
    assert model.used == [0.1] * 8
    assert "ReduceLROnPlateau" in caplog.text


def test_a_checkpoint_goes_on_with_the_run_from_its_step(steer, read, tmp_path):
    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if not first.exists():
                trainer.save_checkpoint(first)

    def train(**options):
        model, checkpoint = Model(), options.pop("ckpt_path", None)
        fit(model, steer(**options), [1.0] * 2, Saves(), max_epochs=2, ckpt_path=checkpoint)
        return model.used

    first = tmp_path / "first.ckpt"
    assert train(run="checkpointed") == [0.1, 0.1, 0.05, 0.025]
    assert train(run="checkpointed", ckpt_path=first) == [0.05, 0.025]
    assert read("checkpointed")["attempt"] == 2
    with pytest.raises(ValueError, match=r"belongs to run 'checkpointed'.*fork="):
        train(run="another", ckpt_path=first)
    assert train(run="anew", resume=False, ckpt_path=first) == [0.1, 0.1]
    fork = {"run": "checkpointed", "attempt": 1, "step": 2}
    assert train(run="forked", policy=None, fork=fork, ckpt_path=first) == [0.05, 0.025]


class Two(Model):
    """Two parts, trained in turns: one twice per batch, the other every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        generator, critic = self.optimizers()
        for part in range(2):
            critic.zero_grad()
            for half in (0.25, 0.75):  # real and fake, each back-propagated by itself
                self.manual_backward(0 * self.critic.weight.sum() + half * batch.mean() + part)
            critic.step()
        if index % 2:
            generator.zero_grad()
            self.manual_backward(0 * self.generator.weight.sum() + 10 * batch.mean())
            generator.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]


def test_optimizers_that_step_in_turns_are_runs_of_their_own_with_their_own_losses(steer, read):
    callback = steer(run="gan", each={"generator": {"policy": "constant"}})
    fit(Two(), callback, [1.0, 2.0, 3.0])
    assert losses_of(read, "gan-critic") == [1.0, 3.0, 2.0, 4.0, 3.0, 5.0]
    assert losses_of(read, "gan-generator") == [20.0]
    assert (read("gan-critic")["policy"], read("gan-generator")["policy"]) == ("plateau@1", "constant@1")
    with pytest.raises(ValueError, match="each names discriminator: the optimizers are generator, critic"):
        fit(Two(), steer(each={"discriminator": {}}), [1.0])


def test_what_validation_logs_comes_with_the_next_step_and_sanity_checking_with_none(steer, read):
    callback = steer(run="validated")
    fit(Model(), callback, [1.0] * 3, validate=[5.0], max_epochs=2)
    assert read("validated/series?signals=val_loss")["series"]["val_loss"] == {"step": [3], "value": [5.0]}


def test_a_trial_run_of_lightnings_own_leaves_no_run_behind(steer, service):
    fit(Model(), steer(run="trial"), [1.0] * 3, fast_dev_run=True)
    assert httpx.get(f"{service.http}/v1/runs/trial", trust_env=False).status_code == 404


def test_the_service_stops_training_and_a_failure_is_recorded_as_one(steer, read, service):
    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                command = {"kind": "stop", "reason": "enough"}
                httpx.post(f"{service.http}/v1/runs/stopped/commands", json=command, trust_env=False).raise_for_status()

    model = Model()
    fit(model, steer(run="stopped"), [1.0] * 50, Asks())
    assert len(model.used) < 10

    class Fails(Model):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("out of memory")
            return super().training_step(batch, index)

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Fails(), steer(run="broken"), [1.0] * 5)
    assert read("broken")["status"] == "failed"


def test_a_second_fit_with_the_same_callback_goes_on_with_the_run(steer, read):
    callback, model = steer(run="again"), Model()
    fit(model, callback, [1.0] * 3)
    fit(model, callback, [1.0] * 2)
    assert model.used == [0.1, 0.1, 0.05, 0.025, 0.0125]
    assert read("again")["attempt"] == 2
    with pytest.raises(flyball.FlyballError, match="0 governors"):
        _ = callback.governor


def test_a_monitor_of_learning_rates_shows_what_was_applied(steer, tmp_path):
    monitor, model = pl.callbacks.LearningRateMonitor("step"), Model()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(model, steer(), [1.0] * 4, monitor, logger=logger, log_every_n_steps=1)
    logged = [float(row["lr-SGD"]) for row in logger.experiment.metrics if "lr-SGD" in row]
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split()
    seen = logged or [float(line.split(",")[0]) for line in text[1:]]
    assert seen[1:] == model.used[:-1]


class Skips(Model):
    """A batch of less than nothing is left out, as a training step may do."""

    def training_step(self, batch, index):
        return None if batch.mean() < 0 else super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_left_out_has_no_loss_rather_than_the_one_before(steer, read):
    fit(Skips(), steer(run="left-out", policy="constant"), [1.0, -1.0, 3.0])
    series = read("left-out/series?signals=loss")["series"]["loss"]
    assert (series["step"], series["value"]) == ([0, 2], [1.0, 3.0])


def test_accumulation_that_changes_by_epoch_leaves_each_loss_the_mean(steer, read):
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    fit(Model(), steer(run="scheduled", policy="constant"), [1.0, 2.0, 3.0, 6.0, 9.0], schedule, max_epochs=3)
    first, second, third = [1.0, 2.0, 3.0, 6.0, 9.0], [1.5, 4.5, 9.0], [2.0, 7.5]
    assert losses_of(read, "scheduled") == pytest.approx([*first, *second, *third]), "a partial window, too"


def test_a_checkpoint_from_before_the_service_came_is_resumed_with_it(steer, read, tmp_path):
    away = {"server": "http://127.0.0.1:9", "start_wait_s": 0.0, "wait_s": 0.01, "close_s": 0.0, "policy": None}
    first = tmp_path / "first.ckpt"

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if not first.exists():
                trainer.save_checkpoint(first)

    fit(Model(), steer(run="came-late", **away), [1.0] * 2, Saves(), max_epochs=2)
    with pytest.raises(flyball.Refused, match="is not known"):
        fit(Model(), steer(run="came-late", on_unknown="refuse"), [1.0] * 2, max_epochs=2, ckpt_path=first)
    fit(Model(), steer(run="came-late", policy=None), [1.0] * 2, max_epochs=2, ckpt_path=first)
    assert (read("came-late")["step"], read("came-late")["policy"]) == (3, "constant@1")


def test_after_a_failure_the_same_callback_goes_on_and_a_copy_of_it_does_not(steer, read):
    class Fails(Model):
        def training_step(self, batch, index):
            if index == 2:
                copies.append(pickle.loads(pickle.dumps(callback)))
                raise RuntimeError("out of memory")
            return super().training_step(batch, index)

    callback, copies = steer(run="mended"), []
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Fails(), callback, [1.0] * 5)
    fit(Model(), callback, [1.0] * 2)
    told = read("mended")
    assert (told["attempt"], told["step"], told["status"]) == (2, 3, "finished")
    for one in (*copies, copy.deepcopy(callback)):
        with pytest.raises(flyball.Refused, match="exists already"):
            fit(Model(), one, [1.0])


def test_manual_optimisation_without_a_loss_is_warned_of_once_and_what_is_measured_arrives(steer, read, caplog):
    class Silent(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            loss.backward()
            self.optimizers().step()

    fit(Silent(), steer(run="silent", policy="constant", signals=["update_norm"]), [1.0] * 25)
    (warning,) = [line for line in caplog.messages if "has had no loss" in line]
    assert "run 'silent' has had no loss in 10 steps: call self.manual_backward(loss)" in warning
    assert len(read("silent/series?signals=update_norm")["series"]["update_norm"]["value"]) == 25
