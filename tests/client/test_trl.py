"""Goal: a trainer that learns from rewards is steered by them, step by step, and hides no step that went wrong.

Method: TRL's own trainers on a small language model made on the spot, on a real service in lockstep; what was reported
is read from the journal and compared with what the reward function gave.
"""

import math
import string

import httpx
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import flyball_server
from flyball.adapters.transformers import FlyballCallback

LETTERS = string.ascii_lowercase[:8]


@pytest.fixture
def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=32
    )


@pytest.fixture
def model(tmp_path):
    """From a folder, since a trainer that measures the KL to the start reads it there once more."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=10, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
                        pad_token_id=0)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    return GPT2LMHeadModel.from_pretrained(tmp_path / "start")


class Poison(TrainerCallback):
    """Before the 6th step the model is broken; its completions were made before."""

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step == 5:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)


@pytest.mark.parametrize(("config", "trainer"), [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
@pytest.mark.usefixtures("one_thread")
def test_a_step_has_the_reward_found_out_in_it_and_its_own_loss(tmp_path, model, tokenizer, config, trainer):
    given = []

    def reward(completions, **_):
        given.append([-abs(len(text) - 4.0) for text in completions])
        return given[-1]

    args = config(output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                  num_generations=4, steps_per_generation=4, max_completion_length=8, logging_steps=6, use_cpu=True,
                  report_to=[], learning_rate=1e-3, disable_tqdm=True, save_strategy="no", beta=0.05)  # fmt: skip
    data = Dataset.from_list([{"prompt": letter} for letter in LETTERS])
    rule = {"type": "rules", "reward_rule": "trend", "reward_up": 1.25, "reward_down": 0.8}
    with flyball_server.running() as service, httpx.Client(base_url=service.http, trust_env=False) as http:
        callback = FlyballCallback(run="r", policy=rule, lag=0, wait_s=10.0, server=service.http)
        one = trainer(model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer,
                      callbacks=[callback, Poison()])  # fmt: skip
        one.train()
        series = http.get("/v1/runs/r/series?signals=loss,reward,reward_std,kl,lr:group0").json()["series"]
    # Completions are made for two steps at once.
    wanted = [sum(rewards) / len(rewards) for rewards in given]
    assert series["reward"] == {"step": [0, 2, 4], "value": pytest.approx(wanted)}
    assert series["reward_std"]["step"] == [0, 2, 4]
    assert len(series["kl"]["value"]) >= 3
    assert [type(loss) for loss in series["loss"]["value"][:5]] == [float] * 5
    assert series["loss"]["value"][5] == "NaN"
    assert math.isfinite(one.state.log_history[0]["loss"])  # where nothing is to be seen of it
    # The rule of the reward's trend, on what the reward function gave: a step without a reward moves nothing.
    lr = [1e-3, 1e-3 * (1.25 if wanted[1] > wanted[0] else 0.8)]
    told = dict(zip(series["lr:group0"]["step"], series["lr:group0"]["value"], strict=True))
    assert (told[0], told[3]) == pytest.approx(tuple(lr))
