"""The whole pipeline at its smallest: repeatable, resumable, and clear about bad input."""

from __future__ import annotations

import json

import pytest
import torch

from dreamgym.core.config import load_config
from dreamgym.core.errors import CheckpointError, ConfigError, DataError, DreamGymError
from dreamgym.training.checkpoints import load_policy, newest_checkpoint
from dreamgym.training.train import main
from dreamgym.training.trainer import DreamGymTrainer, run_iteration, start_arm_loop
from dreamgym.utils.tracking import RunDir

TINY = {
    "environment.data_dir": "generated",
    "environment.num_train_worlds": 6,
    "training.batch_size": 6,
    "training.num_iterations": 2,
    "training.validation_episodes": 3,
    "training.gap_episodes": 3,
    "reasoning_model.train_steps": 8,
    "training.use_tensorboard": False,
}


def config(**more):
    return load_config(None, "alfworld", "smoke", TINY | {key.replace("__", "."): value for key, value in more.items()})


def trainer(folder, **more):
    return DreamGymTrainer(config(**more), folder, progress=lambda line: None)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(folder):
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    return load_policy(found[0]).state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted dream arm."""
    folder = tmp_path_factory.mktemp("whole")
    t = trainer(folder)
    t.fit(t.prepare(), "dream")
    return folder


def test_same_seed_twice_is_the_same_run(whole, tmp_path):
    t = trainer(tmp_path)
    t.fit(t.prepare(), "dream")
    assert metrics(tmp_path / "dream") == metrics(whole / "dream")
    a, b = weights(tmp_path / "dream"), weights(whole / "dream")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_seed_is_another_run(whole, tmp_path):
    t = trainer(tmp_path, training__seed=1)
    t.fit(t.prepare(), "dream")
    assert metrics(tmp_path / "dream") != metrics(whole / "dream")


def test_interrupted_and_continued_is_the_same_run(whole, tmp_path):
    first = trainer(tmp_path)
    with RunDir(tmp_path / "dream") as run:
        loop = start_arm_loop(first.config, first.prepare(), "dream", "cpu", run)
        run_iteration(loop)
        run.log({"iteration": 99})  # written after the checkpoint, as if killed in the next iteration
    again = trainer(tmp_path)
    again.fit(again.prepare(), "dream")
    assert metrics(tmp_path / "dream") == metrics(whole / "dream")
    a, b = weights(tmp_path / "dream"), weights(whole / "dream")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, caplog):
    import shutil

    shutil.copytree(whole / "dream", tmp_path / "dream")
    file = tmp_path / "dream" / "checkpoints" / "iter_0002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    found = newest_checkpoint(tmp_path / "dream" / "checkpoints")
    assert found is not None and found[1]["iteration"] == 1
    assert "model.safetensors" in caplog.text


def test_s2r_counts_its_real_transitions(whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    t = trainer(tmp_path / "run")
    t.fit(t.prepare(), "s2r")
    rows = metrics(tmp_path / "run" / "s2r")
    assert rows[-1]["rollout/source"] == "real" and rows[-1]["rollout/real_transitions"] > 0
    assert metrics(whole / "dream")[-1]["rollout/real_transitions"] == 0


def test_expert_iteration_runs(tmp_path):
    t = trainer(tmp_path, rl__algorithm="rft")
    t.fit(t.prepare(dream=False), "real")
    assert metrics(tmp_path / "real")[-1]["iteration"] == 2


def test_the_folder_of_another_config_is_refused(whole):
    with pytest.raises(CheckpointError, match="another config"):
        trainer(whole, rl__lr=0.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--env", "alfwold"], "did you mean 'alfworld'"),
        (["--env", "webarena"], "not built yet"),
        (["--set", "buffer.capcity=3"], "did you mean 'buffer.capacity'"),
        (["--set", "rl.lr=fast"], "rl.lr: expected"),
        (["--set", "environment.data_dir=no/such/folder"], "no/such/folder"),
        (["--set", "environment.offline_data=no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--config", "no/such/config.yaml"], "no/such/config.yaml"),
    ],
)
def test_bad_input_is_one_clear_error(flags, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--preset", "smoke", "--out-dir", str(out), "--checkpoints", "", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (out / "dream").exists() and not (out / "prepared" / "counts.json").exists()


def test_an_out_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write"):
        trainer(tmp_path / "file" / "run")


def test_truncated_archive(tmp_path):
    (tmp_path / "games.tar.xz").write_bytes(b"\xfd7zXZ\x00\x00\x04 torn")
    with pytest.raises(DreamGymError, match="games.tar.xz") as caught:
        trainer(tmp_path / "run", environment__data_dir=str(tmp_path / "games.tar.xz"))
    assert isinstance(caught.value, DataError) and not (tmp_path / "run").exists()


def test_synthetic_ratio_mixes_real_episodes_into_the_dream(tmp_path):
    t = trainer(tmp_path, buffer__synthetic_ratio=0.5)
    with RunDir(tmp_path / "dream") as run:
        row = run_iteration(start_arm_loop(t.config, t.prepare(), "dream", "cpu", run))
    assert 0 < row["rollout/real_transitions"] < row["rollout/transitions"]


def test_what_is_not_built_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not built yet"):
        trainer(tmp_path, curriculum__synthetic_fraction_max=0.5)
