"""`python -m dreamgym.training.train` and `evaluate`: help, exit statuses, what they write."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
from test_trainer import TINY

from dreamgym.core.config import load_config, save_config
from dreamgym.core.data_structures import Trajectory
from dreamgym.core.errors import CheckpointError, ConfigError, MissingExtra
from dreamgym.environments import base_env
from dreamgym.training import checkpoints, evaluate, play, train, trainer
from dreamgym.training.arm_loop import trained_on
from dreamgym.training.checkpoints import manifest_name, prune_checkpoints
from dreamgym.training.play import Evaluation


def flags(tmp_path, *more):
    settings = [f"{key}={value}" for key, value in (TINY | {"training.num_iterations": 1}).items()]
    place = ["--out-dir", str(tmp_path / "run"), "--checkpoints", str(tmp_path / "kept")]
    return ["--preset", "smoke", *place, *more, "--set", *settings]


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (train, ["--env", "--algorithm", "gigpo", "--mode", "--resume", "--use-wandb", "offline", "--num-iterations"]),
        (evaluate, ["--checkpoint", "--num-episodes", "--temperature", "0 is greedy", "--output"]),
    ],
)
def test_help(room, said, capsys):
    with pytest.raises(SystemExit) as stop:
        room.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and not [word for word in said if word not in shown]


def test_train_then_evaluate(tmp_path, capsys):
    assert train.main(flags(tmp_path, "--mode", "real", "--algorithm", "grpo", "--batch-size", "6", "--seed", "3")) == 2
    assert "rl.group_size" in capsys.readouterr().err
    more = ["--mode", "real", "--algorithm", "ppo", "--seed", "3"]
    assert train.main(flags(tmp_path, *more)) == 0
    manifest, result = tmp_path / "kept" / "policy_iter_0001.json", tmp_path / "result.json"
    command = ["--checkpoint", str(manifest), "--num-episodes", "2", "--output", str(result)]
    assert evaluate.main([*command, "--set", "environment.data_dir=generated"]) == 0
    assert json.loads(result.read_text())["n"] == 2


@pytest.mark.parametrize(("kind", "status"), [(KeyboardInterrupt, 130), (trainer.Terminated, 143)])
def test_exit_status_of_a_stop(kind, status, monkeypatch, capsys):
    def stopped(arguments):
        raise kind

    monkeypatch.setattr(train, "train", stopped)
    assert train.main(["--preset", "smoke"]) == status and "continues" in capsys.readouterr().err


def test_sigterm_ends_a_process_within_5_seconds(tmp_path):
    command = [sys.executable, "-m", "dreamgym.training.train", *flags(tmp_path, "--mode", "real")]
    process = subprocess.Popen([*command, "training.num_iterations=99"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "real iteration 1" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143
    assert (tmp_path / "run" / "real" / "checkpoints" / "policy_iter_0001.json").is_file()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed(package, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=f"pip install .*{package}"):
        trainer.make_trackers(load_config(None, overrides={f"training.use_{package}": True}), "run", "dream")


def test_two_ranks_train_like_one(tmp_path):
    """Under torchrun, on CPUs; one minibatch an epoch, since ranks compose smaller ones differently."""
    more = ["--mode", "real", "--checkpoints", ""]
    settings = ["training.device=cpu", "rl.minibatch=100000", "rl.value_warmup=0", "training.num_iterations=2"]
    settings += ["rl.algorithm=grpo", "rl.group_size=2"]
    settings += [
        "training.validation_episodes=0"
    ]  # the last iteration is the best: ranks read what one has just written
    rows = []
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if ranks == 2 else []
        place = tmp_path / str(ranks)
        command = [sys.executable, *launch, "-m", "dreamgym.training.train", *flags(place, *more), *settings]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (place / "run" / "real" / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines])
    one, two = rows
    assert [row["iteration"] for row in two] == [0, 1, 2] and two[-1]["policy/updates"] > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        numbers = [key for key in a if isinstance(a[key], (int, float)) and key != "policy/flat_groups"]
        assert all(abs(a[key] - b[key]) < 1e-4 for key in numbers), {k: (a[k], b[k]) for k in numbers}


def test_a_yaml_file_alone_names_its_environment(tmp_path):
    config, folder = train.resolve(train.TrainArguments(config="configs/webshop.yaml"))
    assert config.environment.name == "webshop" and folder.name == "webshop-seed0"
    config, folder = train.resolve(train.TrainArguments())
    assert config.environment.name == "alfworld" and folder.name == "alfworld-seed0"


def test_the_mode_of_the_config_counts(tmp_path, monkeypatch):
    seen = []

    class Stub:
        main, accelerator = False, None

        def __init__(self, config, folder):
            pass

        def prepare(self, dream):
            seen.append(dream)

        def fit(self, ready, arm, keep):
            seen.append(arm)

    monkeypatch.setattr(trainer, "DreamGymTrainer", Stub)
    for more in (("training.mode=real",), ()):
        train.train(train.TrainArguments(preset="smoke", set=more, out_dir=str(tmp_path)))
    assert seen == [False, "real", True, "dream"]


def test_a_resumed_run_takes_no_other_settings(tmp_path):
    save_config(load_config(None, "alfworld", "smoke"), tmp_path / "config.yaml")
    assert train.resolve(train.TrainArguments(resume=str(tmp_path), mode="real", checkpoints=""))[1] == tmp_path
    for more in ({"num_iterations": 50}, {"set": ("rl.lr=1",)}, {"preset": "gpu"}):
        with pytest.raises(ConfigError, match="--resume continues a run as it is; leave out --"):
            train.resolve(train.TrainArguments(resume=str(tmp_path), **more))


def test_published_checkpoints_are_those_that_the_arm_keeps(tmp_path):
    source, target = tmp_path / "arm", tmp_path / "kept"
    for number in range(1, 6):
        (source / f"iter_{number:04d}").mkdir(parents=True)
        facts = {"iteration": number, "folder": f"iter_{number:04d}", "files": {}}
        (source / manifest_name(number)).write_text(json.dumps(facts))
        prune_checkpoints(source, 2, 1)
        train.publish(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in source.iterdir())


def test_a_policy_is_judged_in_the_world_that_it_was_trained_in(tmp_path, monkeypatch, caplog):
    config = load_config(None, "alfworld", "smoke", "environment.size=full environment.data_dir=generated")
    facts, asked = {"files": {}, "folder": "x"} | trained_on(config, ""), []

    def played(policy, env, tasks, *_):
        asked.append((env.name, env.max_turns))
        return Evaluation([Trajectory([], task, 0, "real", 0, True, False, success=True) for task in tasks], 0.0)

    monkeypatch.setattr(checkpoints, "load_policy", lambda path, device, mapper: None)
    monkeypatch.setattr(checkpoints, "read_manifest", lambda path: facts)
    monkeypatch.setattr(play, "evaluate_policy", played)
    more = {"checkpoint": "policy_iter_0001.json", "num_episodes": 1}
    evaluate.evaluate(evaluate.EvaluateArguments(**more))
    assert not caplog.records
    facts["data"] = "ab12"
    evaluate.evaluate(evaluate.EvaluateArguments(**more))
    assert "other data" in caplog.text and asked.pop() == asked[0]
    facts["world"]["name"] = "webshop"
    evaluate.evaluate(evaluate.EvaluateArguments(**more))
    evaluate.evaluate(evaluate.EvaluateArguments(**more, env="alfworld", set=("environment.data_dir=generated",)))
    assert asked[0] == ("alfworld-generated", 50) and asked[1][0] == "webshop-generated"
    assert asked[2] == ("alfworld-generated", 30)  # another world's sizes mean nothing here
    facts["world"]["name"] = "alfworld"
    file = tmp_path / "small.yaml"
    file.write_text("environment: {size: small, data_dir: generated}")
    evaluate.evaluate(evaluate.EvaluateArguments(**more, config=str(file)))
    assert asked[3] == ("alfworld-generated", 30)  # what a file says is stronger than the checkpoint
    real = base_env.make_environment
    monkeypatch.setattr(base_env, "make_environment", lambda *told: replace(real(*told), tasks=lambda split: []))
    with pytest.raises(ConfigError, match="no games in the split"):
        evaluate.evaluate(evaluate.EvaluateArguments(**more))


def test_an_evaluation_of_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    def aborted(policy, env, tasks, *_):
        games = [Trajectory([], task, 0, "real", 0, False, False, aborted="browser lost") for task in tasks]
        return Evaluation(games, 0.0)

    monkeypatch.setattr(checkpoints, "load_policy", lambda path, device, mapper: None)
    monkeypatch.setattr(checkpoints, "read_manifest", lambda path: {"files": {}, "folder": "x"})
    monkeypatch.setattr(play, "evaluate_policy", aborted)
    told = ["--checkpoint", "policy_iter_0001.json", "--num-episodes", "3", "--output", str(tmp_path / "result.json")]
    assert evaluate.main([*told, "--set", "environment.data_dir=generated"]) == 2
    assert "all 3 games were aborted, the first because: browser lost" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_s2r_asks_for_the_dream_before_anything_is_prepared(tmp_path, capsys):
    assert train.main(flags(tmp_path, "--mode", "s2r")) == 2
    said = capsys.readouterr().err
    assert "mode s2r continues a finished dream arm" in said and "--mode dream first" in said
    assert not (tmp_path / "run").exists()
    config = load_config(None, "alfworld", "smoke", {"training.num_iterations": 3})
    for arm, facts, ready in (
        ("dream", {"iteration": 2}, False),
        ("dream", {"iteration": 2, "stopped": True}, True),
        ("dream", {"iteration": 3}, True),
        ("s2r", {"iteration": 4}, True),
    ):
        folder = tmp_path / f"{arm}{len(list(tmp_path.iterdir()))}"
        (folder / arm / "checkpoints").mkdir(parents=True)
        manifest = folder / arm / "checkpoints" / manifest_name(facts["iteration"])
        manifest.write_text(json.dumps(facts | {"folder": "x", "files": {}}))
        with nullcontext() if ready else pytest.raises(CheckpointError, match="--mode dream first"):
            train.check_dream(config, folder)


@pytest.mark.parametrize("command", [train, evaluate])
def test_calls_to_a_server_are_not_told_one_by_one(command, caplog, tmp_path):
    caplog.set_level(logging.INFO)  # as the command sets it where nobody has
    caplog.set_level(logging.NOTSET, "httpx2")
    asked = ["--checkpoint", str(tmp_path / "none.json")] if command is evaluate else ["--env", "nowhere"]
    assert command.main(asked) == 2
    client = logging.getLogger("httpx2")
    assert not client.isEnabledFor(logging.INFO) and client.isEnabledFor(logging.WARNING)
