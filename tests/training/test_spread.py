"""The trainer under FSDP2 and under DeepSpeed, on two CPU ranks: it trains, saves and continues like one process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from rl_toys import ZERO, end_rank, run_two_ranks
from safetensors.torch import load_file
from test_trainer import TINY, metrics

from dreamgym.core.config import load_config
from dreamgym.core.errors import ConfigError, MissingExtra
from dreamgym.training import scale
from dreamgym.training.checkpoints import read_manifest
from dreamgym.training.preparation import check_algorithm
from dreamgym.training.scale import make_accelerator
from dreamgym.training.trainer import DreamGymTrainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAYERS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "SmallLayer"}
SETTINGS = {  # six AdamW updates; one minibatch an epoch, since ranks compose smaller ones differently
    "training.num_iterations": 3,
    "training.keep_last": 9,
    "training.device": "cpu",
    "rl.minibatch": 100_000,
    "rl.value_warmup": 0,
    "rl.lr": 3e-4,
    "policy_model.layers": 2,
}


def fit(folder):
    """A real arm, or what is left of it."""
    trainer = DreamGymTrainer(load_config(None, "alfworld", "smoke", TINY | SETTINGS), folder, lambda line: None)
    trainer.fit(trainer.prepare(dream=False), "real")
    return trainer


def forget_last(folder):
    """As if killed before the last checkpoint."""
    checkpoints = folder / "real" / "checkpoints"
    (checkpoints / "policy_iter_0003.json").unlink()
    shutil.rmtree(checkpoints / "iter_0003")


def worker(folder):
    """One of two ranks: a whole run, then one that lost its last checkpoint and goes on."""
    torch.set_num_threads(1)
    accelerator = fit(folder / "whole").accelerator
    assert scale.state_is_spread(accelerator) and accelerator.num_processes == 2
    if accelerator.is_main_process:
        shutil.copytree(folder / "whole", folder / "resumed")
        forget_last(folder / "resumed")
    accelerator.wait_for_everyone()
    last = fit(folder / "resumed")
    end_rank(last.accelerator)


def tensors(folder, iteration=3):
    """Weights and optimiser state of a checkpoint."""
    manifest = folder / "real" / "checkpoints" / f"policy_iter_{iteration:04d}.json"
    place = manifest.parent / read_manifest(manifest)["folder"]
    names = ("model", "value_head", "optimizer")
    return {f"{name}.{key}": value for name in names for key, value in load_file(place / f"{name}.safetensors").items()}


@pytest.fixture(scope="module", params=["FSDP2", "DeepSpeed"])
def two_ranks(request, tmp_path_factory):
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'dreamgym[deepspeed]'")
    folder = tmp_path_factory.mktemp("spread")
    run_two_ranks(__file__, folder, **(FSDP | LAYERS if request.param == "FSDP2" else ZERO))
    return folder


def test_one_rank_equals_two_spread_ranks_after_6_updates(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "whole" / "prepared", tmp_path / "prepared")
    fit(tmp_path)
    one, two = tensors(tmp_path), tensors(two_ranks / "whole")
    assert one.keys() == two.keys() and int(two["optimizer.0.step"]) == 6
    assert all(one[name].shape == two[name].shape for name in one)
    largest = max((one[name].float() - two[name].float()).abs().max() for name in one)
    moved = max((one[name].float() - value.float()).abs().max() for name, value in tensors(tmp_path, 1).items())
    assert largest <= 1e-5 and moved > 1e-4
    for a, b in zip(metrics(tmp_path / "real"), metrics(two_ranks / "whole" / "real"), strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[key] - b[key]) < 1e-4 for key in a if isinstance(a[key], (int, float)))


def test_a_spread_run_continues_exactly(two_ranks):
    whole, resumed = tensors(two_ranks / "whole"), tensors(two_ranks / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics(two_ranks / "whole" / "real") == metrics(two_ranks / "resumed" / "real")


def test_a_spread_run_is_continued_by_one_rank(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "whole", tmp_path / "run")
    forget_last(tmp_path / "run")
    fit(tmp_path / "run")
    one, two = tensors(tmp_path / "run"), tensors(two_ranks / "whole")
    assert max((one[name].float() - two[name].float()).abs().max() for name in one) <= 1e-5


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_other_engines_are_refused(engine, said, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **engine}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{said}.*--fsdp_version 2"):
        make_accelerator(load_config(None, overrides="training.device=cpu").training)


def test_deepspeed_is_missed_by_name(monkeypatch):
    monkeypatch.setattr(scale, "find_spec", lambda name: None)
    for name, value in {"WORLD_SIZE": "2", **ZERO}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingExtra, match=r"dreamgym\[deepspeed\]"):
        make_accelerator(load_config(None, overrides="training.device=cpu").training)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage 0"),
        ({"zero_optimization": {"stage": 3}}, "stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16"),
    ],
)
def test_a_deepspeed_that_would_not_resume_exactly_is_refused(config, said):
    with pytest.raises(ConfigError, match=f"{said}.*expected stage 1 or 2"):
        scale.set_up_zero(config, "no")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_expert_iteration_wants_whole_weights(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match="rft.*torchrun"):
        check_algorithm(load_config(None, overrides="rl.algorithm=rft"))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
