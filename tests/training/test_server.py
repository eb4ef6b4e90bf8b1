"""The trainer with a server that speaks vLLM's protocol: the same run as in one process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import metrics, trainer, weights

from dreamgym.core.errors import ConfigError
from dreamgym.training.checkpoints import load_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))
from test_generators import Served  # noqa: E402

LLAMA = {"policy_model__architecture": "Llama", "policy_model__max_new_tokens": 12, "training__num_iterations": 2}


def fit(folder, **more):
    t = trainer(folder, **LLAMA, **more)
    t.fit(t.prepare(dream=False), "real")
    return metrics(folder / "real")


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_on_a_server_is_the_run_in_one_process(lora, tmp_path):
    if lora:
        pytest.importorskip("peft")
    expected = fit(tmp_path / "here", policy_model__lora_rank=lora)
    shutil.copytree(tmp_path / "here" / "prepared", tmp_path / "there" / "prepared")
    served = Served(load_policy(tmp_path / "there" / "prepared" / "policy_iter_0000.json").language_model)
    try:
        found = fit(tmp_path / "there", policy_model__lora_rank=lora, policy_model__server=served.url)
    finally:
        served.shutdown()
        served.server_close()
    assert served.calls.count("/collective_rpc") == 2 and served.calls.count("/v1/completions") > 50
    for a, b in zip(expected, found, strict=True):
        numbers = [key for key in a if isinstance(a[key], (int, float))]
        assert all(abs(a[key] - b[key]) < 1e-4 for key in numbers), {k: (a[k], b[k]) for k in numbers}
    one, two = weights(tmp_path / "here" / "real"), weights(tmp_path / "there" / "real")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert not list((tmp_path / "there" / "real" / "weights").iterdir())  # they were on their way only


def test_a_model_that_vllm_does_not_know(tmp_path):
    t = trainer(tmp_path, policy_model__server="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="policy_model.server: vLLM does not know SmallLM"):
        t.fit(t.prepare(dream=False), "real")
