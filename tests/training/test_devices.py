"""Rollout, updates and the whole trainer on a CPU and on a GPU, $DREAMGYM_TEST_GPU; without it one is pretended."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from pretended_gpu import pretended_gpu
from rl_toys import new_policy
from test_trainer import metrics, trainer, weights

from dreamgym.core.config import TrainingConfig
from dreamgym.core.data_structures import Task
from dreamgym.core.errors import ConfigError
from dreamgym.core.generators import SamplingParams, TransformersGenerator
from dreamgym.environments.base_env import CountingEnv
from dreamgym.training.checkpoints import rng_tensors
from dreamgym.training.grpo import GRPOSettings, grpo_update, make_group_batch
from dreamgym.training.policy import TurnCodec
from dreamgym.training.ppo import PPOSettings, make_batch, ppo_update
from dreamgym.training.rollout import RolloutConfig, rollout
from dreamgym.training.scale import check_device, make_accelerator

TASKS = [Task(f"t{i}", str(2 + i), seed=i) for i in range(4)] * 2


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    with nullcontext() if request.param == "cpu" or torch.cuda.is_available() else pretended_gpu():
        yield request.param


@pytest.fixture
def gpu():
    with nullcontext() if torch.cuda.is_available() else pretended_gpu():
        yield


def play(policy, generator=None):
    """Conversations of different lengths, with the cache carried on."""
    config = RolloutConfig(slots=8, max_new_tokens=4, context_length=64)
    generator = generator or TransformersGenerator(policy.language_model)
    return rollout(generator, CountingEnv(8), TASKS, policy.codec, config, seed=3)


def talkative(device, family):
    policy = new_policy(family=family)
    policy.codec = TurnCodec(policy.tokenizer, context="conversation")
    return policy.to(device)


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rollout_and_updates(device, family, precision):
    policy = talkative(device, family)
    start, reference = copy.deepcopy(policy.state_dict()), copy.deepcopy(policy)
    with torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext():
        played = play(policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        found = ppo_update(policy, optimizer, make_batch(played, policy, reference), PPOSettings(token_budget=200))
        again = make_group_batch(played, policy, reference)
        more = grpo_update(policy, optimizer, again, GRPOSettings(token_budget=200, kl_stop=9.0))
    assert all(map(math.isfinite, [*found.values(), *more.values()])) and found["policy/updates"] > 0
    assert found["policy/mismatch_max"] < (0.2 if precision == "bf16" else 1e-4)
    assert {p.device.type for p in policy.parameters()} == {device} and {p.dtype for p in policy.parameters()} == {
        torch.float32
    }
    assert any(not torch.equal(start[name], tensor) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("family", ["SmallLM", "Llama"])
def test_a_gpu_says_what_the_cpu_says(family, gpu):
    """Greedy, float32: the same tokens and log-probabilities; with and without the cache carried on."""
    policy = talkative("cpu", family)
    prompts = policy.codec.prompts(["door 1", "nothing here nothing here", "door 3"])
    greedy = SamplingParams(8, temperature=0.0)
    here = TransformersGenerator(policy.language_model).generate(prompts, greedy)
    policy.to("cuda")
    there = TransformersGenerator(policy.language_model).generate(prompts, greedy, sessions=range(3))
    for a, b in zip(here, there, strict=True):
        assert a.ids == b.ids and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


def test_the_trainer_on_a_gpu(tmp_path, gpu):
    """bfloat16 by default; its checkpoints are read on a CPU and hold the GPU's random state."""
    more = {"reasoning_model__votes": 3, "reasoning_model__refresh_every": 1, "reasoning_model__refresh_steps": 2}
    t = trainer(tmp_path, training__num_iterations=1, **more)
    assert t.device.startswith("cuda") and t.accelerator.mixed_precision == "bf16"
    ready = t.prepare()
    assert {model.device.type for model in (ready.policy.model, ready.model.client.language_model.model)} == {"cuda"}
    t.fit(ready, "dream")
    rows = metrics(tmp_path / "dream")
    assert rows[-1]["policy/updates"] > 0 and 1e-4 < rows[-1]["policy/mismatch_max"] < 0.3
    assert {tensor.device.type for tensor in weights(tmp_path / "dream").values()} == {"cpu"}
    assert any(name.startswith("cuda") for name in rng_tensors())


def test_an_agent_by_trl_on_a_gpu(tmp_path, gpu):
    t = trainer(tmp_path, rl__algorithm="dpo")
    agent = t.fit(t.prepare(dream=False), "dpo")
    assert agent.model.device.type == "cuda" and metrics(tmp_path / "dpo")[-1]["policy/loss"] > 0


def test_a_gpu_holds_what_it_is_given(gpu):
    """Also where it is pretended: else the tests above could not fail."""
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    layer = torch.nn.Linear(3, 1).to("cuda")
    layer(there * there[here > 0] + torch.tensor(1.0)).sum().backward()
    assert {t.device.type for t in (there[None], there.double(), layer.weight, layer.weight.grad)} == {"cuda"}
    assert {t.device.type for t in (here, there.cpu(), here + there.to("cpu"))} == {"cpu"}
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    for mixed in (
        lambda: here + there,
        lambda: here[there > 0],
        lambda: layer(here),
        lambda: torch.multinomial(there, 1, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError):
            mixed()


def test_a_gpu_that_is_not_there_is_no_silent_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds 0 CUDA devices here; set it to 'auto' or 'cpu'"):
        make_accelerator(TrainingConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == "cuda:1" and check_device("auto") == "cuda"
    with pytest.raises(ConfigError, match="finds 2 CUDA devices"):
        check_device("cuda:2")
