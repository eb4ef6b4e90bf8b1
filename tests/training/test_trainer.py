"""The whole pipeline at its smallest: repeatable, resumable, and clear about bad input."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dreamgym.core.config import BufferConfig, load_config
from dreamgym.core.data_structures import Experience, Trajectory, Turn, to_row
from dreamgym.core.errors import CheckpointError, ConfigError, DataError, DreamGymError
from dreamgym.core.generators import ServerError
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.core.llm import GeneratorClient
from dreamgym.environments.base_env import Environment
from dreamgym.models.experience_sft import encode_examples, example_loss
from dreamgym.models.reasoning_model import ExperiencePrompts, Query
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, read_rows
from dreamgym.training import arms, preparation
from dreamgym.training import trainer as trainer_module
from dreamgym.training.arm_loop import finished
from dreamgym.training.baselines import DEMONSTRATORS
from dreamgym.training.checkpoints import load_policy, manifest_name, newest_checkpoint, prune_checkpoints
from dreamgym.training.evaluate import main as evaluation
from dreamgym.training.fine_tuning import own_copy
from dreamgym.training.play import Evaluation
from dreamgym.training.preparation import (
    clone_policy,
    cloning_examples,
    demonstration_rows,
    make_policy,
    offline_data,
)
from dreamgym.training.train import main
from dreamgym.training.trainer import (
    DreamGymTrainer,
    check_alone,
    claim_folder,
    describe,
    run_iteration,
    start_arm_loop,
)
from dreamgym.training.trl_baselines import accelerate_as_before
from dreamgym.utils.tracking import RunDir

TINY = {
    "environment.data_dir": "generated",
    "environment.num_train_worlds": 6,
    "training.batch_size": 6,
    "training.num_iterations": 2,
    "training.validation_episodes": 3,
    "training.gap_episodes": 3,
    "reasoning_model.train_steps": 8,
    "rl.lr_warmup": 1,
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


def test_a_new_critic_learns_first_and_from_the_same_episodes(whole, tmp_path, monkeypatch):
    """In the first iteration the head learns, then head and policy by the values that it gives; later both at once."""
    calls, update = [], arms.ppo_update

    def watched(policy, optimizer, batch, settings, *more):
        calls.append((settings.values_only, [row.ids for row in batch.rows], batch.old_values.clone()))
        return update(policy, optimizer, batch, settings, *more)

    monkeypatch.setattr(arms, "ppo_update", watched)
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    t = trainer(tmp_path, rl__value_warmup=1, rl__invalid_action_penalty=0.1)  # something to predict
    t.fit(t.prepare(), "dream")
    (first, rows, untrained), (second, again, trained), (third, *_) = calls
    assert [first, second, third] == [True, False, False]
    assert rows == again and not torch.equal(untrained, trained)


def test_few_worlds_are_all_that_a_dream_knows_and_all_that_is_counted(whole, tmp_path):
    """The clone stays; buffer, dreamt tasks and counts are those of the first worlds, demonstrations elsewhere added."""
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    shutil.rmtree(tmp_path / "prepared" / "experience_model")
    t = trainer(tmp_path, reasoning_model__train_worlds=2, policy_model__bc_demonstrations=24)
    everything = t.prepare(dream=False)
    ready = t.prepare()
    rows = [e for _, e in read_rows(everything.buffer.db, "1")]
    known = {task.id for task in everything.tasks[:2]}
    shown = demonstration_rows(rows, 24)
    assert len(everything.tasks) == 6 and [task.id for task in ready.tasks] == [t.id for t in everything.tasks[:2]]
    assert [e for _, e in read_rows(ready.buffer.db, "1")] == [e for e in rows if e.task_id in known]
    counted = [e for e in rows if e.task_id in known or e in shown]
    turns = [max(e.turn for e in counted if e.episode_id == name) + 1 for name in {e.episode_id for e in counted}]
    assert len(counted) <= ready.real_transitions == sum(turns) < everything.real_transitions
    assert ready.clone_transitions == everything.clone_transitions
    for name, weight in everything.policy.state_dict().items():
        assert torch.equal(weight, ready.policy.state_dict()[name])


def test_a_pretrained_policy_has_read_what_actions_do(whole, tmp_path):
    """The recorded data stay; the clone still knows more of what follows an action than one that never saw it."""
    t, plain = trainer(tmp_path, policy_model__pretrain_steps=40), load_policy(whole / "prepared" / manifest_name(0))
    ready = t.prepare(dream=False)
    rows = [e for _, e in read_rows(ready.buffer.db, "policy != 'cloned'")]
    recorded = read_rows(ExperienceReplayBuffer(t.config.buffer, whole / "prepared" / "experience.db").db, "1")
    assert rows == [e for _, e in recorded if e.policy != "cloned"]
    assert ready.clone_transitions == ready.counts["offline"] == len(rows)
    prompts = ExperiencePrompts(t.config.reasoning_model, mapper=t.env.mapper)
    few = encode_examples(rows[:64], prompts, plain.language_model.tokenizer)
    assert ready.policy.language_model.tokenizer.get_vocab() == plain.language_model.tokenizer.get_vocab()
    with torch.no_grad():
        before, after = (example_loss(p.language_model.model, few).item() for p in (plain, ready.policy))
    assert after < 0.8 * before


def test_a_dream_that_is_too_good_ends_and_s2r_goes_on_from_it(whole, tmp_path, monkeypatch):
    """The gap of the first iteration is above the limit; the same command again, and s2r, know that it ended there."""

    def measured(loop, row, dreams):
        row["dream/gap"] = 0.5

    monkeypatch.setattr(arms, "measure_dream", measured)
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    limits = {"training__gap_stop": 0.4, "training__s2r_iterations": 1, "training__mode": "s2r"}
    for _ in range(2):
        t = trainer(tmp_path, **limits)
        t.fit(t.prepare(), "dream")
        assert [row["iteration"] for row in metrics(tmp_path / "dream")] == [0, 1]
    t.fit(t.prepare(), "s2r")
    assert [row["rollout/source"] for row in metrics(tmp_path / "s2r")[1:]] == ["real"]


def test_a_gap_below_the_limit_stops_nothing(whole, tmp_path):
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    t = trainer(tmp_path, training__gap_stop=1.0)
    t.fit(t.prepare(), "dream")
    assert metrics(tmp_path / "dream") == metrics(whole / "dream")


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
    shutil.copytree(whole / "dream", tmp_path / "dream")
    file = tmp_path / "dream" / "checkpoints" / "iter_0002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    found = newest_checkpoint(tmp_path / "dream" / "checkpoints")
    assert found is not None and found[1]["iteration"] == 1
    assert "model.safetensors" in caplog.text


def test_s2r_counts_its_real_transitions(whole, tmp_path):
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


def test_the_real_arm_asks_for_no_memory_that_only_dreams_need(tmp_path):
    """A control of a process of its own prepares everything; the dream beside it may know fewer worlds."""
    more = {"reasoning_model__train_worlds": 2, "training__num_iterations": 1}
    t = trainer(tmp_path, **more)
    t.fit(t.prepare(dream=False), "real")
    again = trainer(tmp_path, **more)
    again.fit(again.prepare(), "real")
    assert metrics(tmp_path / "real")[-1]["iteration"] == 1


def test_what_trl_trains_needs_one_process():
    several = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(ConfigError, match="fine-tuned in one process; start the run without torchrun"):
        check_alone(several, "reasoning_model.name: gpt2 is fine-tuned")
    check_alone(SimpleNamespace(accelerator=None), "rl.algorithm: dpo trains")


def test_a_finished_arm_leaves_the_memory(tmp_path, monkeypatch):
    """One trainer trains an arm after the other; accelerate would keep each policy with its optimiser."""
    accelerate, kept = pytest.importorskip("accelerate"), []

    def watched(*told):
        loop = start_arm_loop(*told)
        kept.append(weakref.ref(loop.policy))
        return loop

    monkeypatch.setattr(trainer_module, "start_arm_loop", watched)
    with accelerate_as_before():
        t = trainer(tmp_path, training__num_iterations=1)
        ready, t.accelerator = t.prepare(dream=False), accelerate.Accelerator(cpu=True)
        t.fit(ready, "real")
        gc.collect()
        assert kept[0]() is None


def test_real_environments_are_closed_after_each_collection(tmp_path):
    t, closed = trainer(tmp_path, training__num_iterations=1), []

    def make(slots):
        batch = t.env.make(slots)
        close = batch.close
        batch.close = lambda: (closed.append(slots), close())
        return batch

    ready = t.prepare(dream=False)
    loop = start_arm_loop(
        t.config, replace(ready, env=replace(t.env, make=make)), "real", "cpu", RunDir(tmp_path / "x")
    )
    arms.collect(loop, "real", ready.tasks[:2])
    assert closed[-1] == 2


def test_a_generation_server_that_stops_leaves_what_was_done(tmp_path, monkeypatch):
    played = []

    def stops(loop):
        played.append(loop.iteration)
        if len(played) == 2:
            raise ServerError("gone")
        return run_iteration(loop)

    monkeypatch.setattr(trainer_module, "run_iteration", stops)
    t = trainer(tmp_path, training__save_every=5, training__validation_episodes=0, training__num_iterations=3)
    with pytest.raises(ServerError):
        t.fit(t.prepare(dream=False), "real")
    found = newest_checkpoint(tmp_path / "real" / "checkpoints")
    assert found and found[1]["iteration"] == 1


@pytest.mark.parametrize("around", ["training.control=false", "training.parallel_control=true", "training.threads=2"])
def test_a_run_goes_on_with_another_control_or_more_threads(tmp_path, around):
    env = SimpleNamespace(name="alfworld", info={}, digest="")
    for more in ([], [around]):
        claim_folder(tmp_path / "run", load_config(None, "alfworld", "smoke", more), env)


def test_a_run_names_the_commit_that_began_it(tmp_path, monkeypatch):
    env, config = SimpleNamespace(name="alfworld", info={}, digest=""), load_config(None, "alfworld", "smoke")
    for commit in ("77b9c5b", "fa0eede"):
        monkeypatch.setattr(trainer_module, "commit_of", lambda root, commit=commit: commit)
        claim_folder(tmp_path, config, env)
        assert json.loads((tmp_path / "run.json").read_text())["commit"] == "77b9c5b"


def test_the_folder_of_a_run_on_other_data_is_refused(tmp_path):
    """Official games may appear in their usual place between two calls of the same command."""
    config = load_config(None, "alfworld", "smoke")
    there = [
        SimpleNamespace(name="alfworld", info=info, digest=info.get("digest", "")) for info in ({}, {"digest": "ab12"})
    ]
    claim_folder(tmp_path / "run", config, there[0])
    claim_folder(tmp_path / "run", config, there[0])
    with pytest.raises(CheckpointError, match="other data"):
        claim_folder(tmp_path / "run", config, there[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--env", "alfwold"], "did you mean 'alfworld'"),
        (["--env", "webarena", "--set", "environment.data_dir=nowhere"], "environment.data_dir"),
        (["--set", "buffer.capcity=3"], "did you mean 'buffer.capacity'"),
        (["--set", "rl.lr=fast"], "rl.lr: expected"),
        (["--set", "environment.data_dir=no/such/folder"], "no/such/folder"),
        (["--set", "environment.offline_data=no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--set", "reasoning_model.verify=true", "environment.mapper=false"], "has no rules for these states"),
        (["--config", "no/such/config.yaml"], "no/such/config.yaml"),
    ],
)
def test_bad_input_is_one_clear_error(flags, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--preset", "smoke", "--out-dir", str(out), "--checkpoints", "", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (out / "dream").exists() and not (out / "prepared" / "counts.json").exists()


def test_an_environment_without_training_tasks_is_not_trained_in(monkeypatch, tmp_path):
    real = trainer_module.make_environment
    monkeypatch.setattr(trainer_module, "make_environment", lambda *told: replace(real(*told), tasks=lambda split: []))
    with pytest.raises(ConfigError, match="no training tasks; it can only be evaluated: .*evaluate.* --env alfworld"):
        trainer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    assert row["rollout/source"] == "mixed" and describe("dream", row).startswith("dream iteration 1: mixed success")


def test_a_dream_arm_without_dreams_says_that_it_is_real(whole, tmp_path):
    row = run_iteration(loop_in(tmp_path, whole / "prepared", buffer__synthetic_ratio=0.0))
    assert row["rollout/source"] == "real" and row["rollout/real_transitions"] == row["rollout/transitions"] > 0
    assert metrics(whole / "dream")[-1]["rollout/source"] == "dream"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "gigpo"])
def test_group_methods_play_groups(algorithm, whole, tmp_path):
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    t = trainer(tmp_path, rl__algorithm=algorithm, rl__group_size=3, training__num_iterations=1)
    t.fit(t.prepare(), "dream")
    row = metrics(tmp_path / "dream")[-1]
    assert row["rollout/n"] == 6 and 0 <= row["policy/flat_groups"] <= 1 and "value/loss" not in row


@pytest.mark.parametrize(("real", "s2r"), [(100, None), (None, 100), (100, 4000)])
def test_the_real_budget_is_never_exceeded(real, s2r, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    budgets = {"training__real_budget": real, "training__s2r_budget": s2r}
    t = trainer(tmp_path / "run", training__s2r_iterations=9, **budgets)
    t.fit(t.prepare(), "s2r")
    rows = metrics(tmp_path / "run" / "s2r")
    assert 100 - 30 < rows[-1]["rollout/real_transitions"] <= 100 and "eval/success" in rows[-1]


@pytest.mark.parametrize(("best", "kept"), [(1, "keep"), (2, "keep"), (1, "reset"), (0, "keep")])
def test_s2r_starts_where_the_dream_was_best(best, kept, whole, tmp_path, monkeypatch):
    def judged(loop, row):
        row |= {"eval/success": float(loop.iteration == best), "eval/n": 1}
        if loop.iteration == best:
            loop.best = {"iteration": best, "success": 1.0}

    monkeypatch.setattr(arms, "validate", judged)
    shutil.copytree(whole / "prepared", tmp_path / "run" / "prepared")
    more = {"training__eval_every": 1, "training__s2r_optimizer": kept, "rl__invalid_action_penalty": 0.1}
    t = trainer(tmp_path / "run", **more)
    t.fit(t.prepare(), "dream")
    with RunDir(tmp_path / "run" / "s2r") as run:
        loop = start_arm_loop(t.config, t.prepare(), "s2r", "cpu", run)
        assert bool(loop.optimizer.state) == (kept == "keep" and best > 0) == bool(loop.policy.value.weight.any())
        assert (loop.iteration, loop.fresh_from) == (2, 0 if loop.optimizer.state else 2) and loop.where == "real"
        folder = tmp_path / "run" / ("dream/checkpoints" if best else "prepared")
        start = load_policy(folder / f"policy_iter_{best:04d}.json").state_dict()
        for policy in (loop.policy, arms.best_policy(loop)):
            assert all(torch.equal(p, start[f"model.{n}"]) for n, p in policy.model.state_dict().items())


@pytest.mark.parametrize("best", [0, 1])
def test_s2r_counts_all_that_the_dream_arm_took(best, whole, tmp_path, monkeypatch):
    """Real games of iterations after the best one count too, and the best one is on disk whenever that may be."""

    def judged(loop, row):
        row |= {"eval/success": 0.0, "eval/n": 1}
        if loop.iteration == best:
            loop.best = {"iteration": best, "success": 1.0}

    monkeypatch.setattr(arms, "validate", judged)
    shutil.copytree(whole / "prepared", tmp_path / "run" / "prepared")
    more = {"training__eval_every": 1, "training__save_every": 9, "buffer__synthetic_ratio": 0.5}
    t = trainer(tmp_path / "run", **more)
    t.fit(t.prepare(), "dream")
    spent = metrics(tmp_path / "run" / "dream")[-1]["rollout/real_transitions"]
    with RunDir(tmp_path / "run" / "s2r") as run:
        loop = start_arm_loop(t.config, t.prepare(), "s2r", "cpu", run)
    assert loop.real_transitions == spent > 0


def test_runs_at_the_same_time_share_what_one_of_them_prepares(whole, tmp_path):
    said = []

    def run(name, **more):
        settings = config(training__prepared_dir=str(tmp_path / "shared"), **more)
        t = DreamGymTrainer(settings, tmp_path / name, progress=said.append)
        return t, t.prepare()

    with ThreadPoolExecutor(2) as pool:
        (first, ready), (_, again) = pool.map(run, ("a", "b"))
    assert sum("cloned from" in line for line in said) == sum("training the" in line for line in said) == 1
    assert any("waiting for it" in line for line in said)
    assert ready.counts == again.counts and not (tmp_path / "a" / "prepared").exists()
    first.fit(first.prepare(), "dream")  # a database stays in the thread that opened it
    assert metrics(tmp_path / "a" / "dream") == metrics(whole / "dream")
    said.clear()
    run("c", rl__lr=0.1)
    assert not any("training the" in line for line in said)  # other RL, the same models
    run("d", buffer__top_k=0)  # the same data, another model
    assert not any("cloned from" in line for line in said) and any("training the" in line for line in said)
    run("e", training__seed=1)
    assert sum("cloned from" in line for line in said) == 1


def test_lora_trains_adapters_only_and_resumes(whole, tmp_path):
    pytest.importorskip("peft")
    shutil.copytree(whole / "prepared", tmp_path / "a" / "prepared")
    shutil.copytree(whole / "prepared", tmp_path / "b" / "prepared")
    t = trainer(tmp_path / "a", policy_model__lora_rank=2)
    t.fit(t.prepare(), "dream")
    t = trainer(tmp_path / "b", policy_model__lora_rank=2)
    with RunDir(tmp_path / "b" / "dream") as run:
        run_iteration(start_arm_loop(t.config, t.prepare(), "dream", "cpu", run))
    t.fit(t.prepare(), "dream")
    a, b = weights(tmp_path / "a" / "dream"), weights(tmp_path / "b" / "dream")
    assert metrics(tmp_path / "a" / "dream") == metrics(tmp_path / "b" / "dream")
    assert all(torch.equal(a[name], b[name]) for name in b)
    start = load_policy(whole / "prepared" / "policy_iter_0000.json").state_dict()
    assert a.keys() == start.keys() and any(not torch.equal(a[name], start[name]) for name in a)


@pytest.mark.parametrize("change", [{"context": "history"}, {"context": "conversation", "context_length": 2048}])
def test_other_contexts_end_to_end(change, tmp_path):
    more = {f"policy_model__{key}": value for key, value in change.items()}
    t = trainer(tmp_path, training__num_iterations=1, **more)
    t.fit(t.prepare(dream=False), "real")
    assert metrics(tmp_path / "real")[-1]["policy/mismatch_max"] < 1e-4
    found = newest_checkpoint(tmp_path / "real" / "checkpoints")
    assert found is not None and load_policy(found[0]).codec.context == change["context"]


def test_a_named_policy_that_is_told_what_to_do(whole, tmp_path, caplog):
    """Without cloning: prompts list possible actions in the dream and in reality, and after a checkpoint again."""
    tokenizer = load_policy(whole / "prepared" / "policy_iter_0000.json").tokenizer
    LanguageModel(build_model(tokenizer, "Llama", 16, 1), tokenizer).save(tmp_path / "named")
    asked = {"policy_model__name": str(tmp_path / "named"), "policy_model__bc_demonstrations": 0}
    t = trainer(tmp_path, training__num_iterations=1, **asked)
    ready = t.prepare()
    t.fit(ready, "dream")
    prompt = tokenizer.decode(ready.policy.codec.prompts([ready.tasks[0].initial_state])[0])
    assert prompt.count("go to") > 5 and metrics(tmp_path / "dream")[-1]["policy/mismatch_max"] < 1e-4
    manifest = newest_checkpoint(tmp_path / "dream" / "checkpoints")[0]
    assert load_policy(manifest, "cpu", t.env.mapper).codec.mapper is t.env.mapper
    with pytest.raises(DataError, match="shown possible actions; give the environment's mapper"):
        load_policy(manifest)
    caplog.clear()
    t.fit(ready, "s2r")
    assert "% of the policy's actions have no effect; the first response: '" in caplog.text
    options = ["--num-episodes", "2", "--temperature", "1"]
    assert evaluation(["--checkpoint", str(manifest), "--env", "alfworld", *options]) == 0
    with pytest.raises(ConfigError, match="a model from scratch knows no words"):
        trainer(tmp_path / "scratch", policy_model__prompted=True)


def test_thoughts_need_room(tmp_path):
    t = trainer(tmp_path, policy_model__response_format="think")
    with pytest.raises(ConfigError, match="policy_model.max_new_tokens is 16"):
        t.prepare(dream=False)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_offline_agents(algorithm, whole, tmp_path):
    pytest.importorskip("trl")
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    t = trainer(tmp_path, rl__algorithm=algorithm, policy_model__bc_epochs=1)
    ready = t.prepare(dream=False)
    agent = t.fit(ready, algorithm).state_dict()
    assert metrics(tmp_path / algorithm)[-1]["policy/loss"] > 0
    again = t.fit(ready, algorithm).state_dict()  # read back
    assert all(torch.equal(agent[name], again[name]) for name in agent)
    with pytest.raises(ConfigError, match=f"expected '{algorithm}'"):
        t.fit(ready, "dream")


@pytest.mark.parametrize(
    "asked",
    [{"reasoning_model__annotation": "llm"}, {"environment__offline_data": None}, {"reasoning_model__prompted": True}],
)
def test_what_only_a_language_model_can_do_is_refused(asked, tmp_path):
    with pytest.raises(ConfigError, match="needs a language model that follows instructions"):
        trainer(tmp_path / "run", **asked)
    with pytest.raises(ConfigError, match="provider 'openai': set reasoning_model.name to what that server calls it"):
        trainer(tmp_path / "run", **asked, reasoning_model__provider="openai")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [3, 0])
def test_a_named_experience_model_is_fine_tuned_and_read_back(steps, whole, tmp_path):
    pytest.importorskip("trl")
    shutil.copytree(whole / "prepared", tmp_path / "run" / "prepared")
    shutil.rmtree(tmp_path / "run" / "prepared" / "experience_model")
    tokenizer = load_policy(whole / "prepared" / "policy_iter_0000.json").tokenizer
    LanguageModel(build_model(tokenizer, "Llama", 16, 1), tokenizer).save(tmp_path / "named")
    t = trainer(tmp_path / "run", reasoning_model__name=str(tmp_path / "named"), reasoning_model__train_steps=steps)
    model = t.prepare().model
    trained = json.loads((tmp_path / "run" / "prepared" / "experience_model" / "trained.json").read_text())
    assert (trained["loss"] > 0) == (steps > 0)
    task = t.prepare(dream=False).tasks[0]
    again = t.prepare().model
    queries = [Query(task.initial_state, "look", task)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = model.predict(queries)
        torch.manual_seed(0)
        assert again.predict(queries) == first


def loop_in(folder, prepared, arm="dream", **more):
    """A loop that is about to begin, on data that there are."""
    shutil.copytree(prepared, folder / "prepared", dirs_exist_ok=True)
    t = trainer(folder, **more)
    return start_arm_loop(t.config, t.prepare(), arm, "cpu", RunDir(folder / arm))


def test_the_gap_is_that_of_the_policy_that_dreamt(whole, tmp_path, monkeypatch):
    loop = loop_in(tmp_path, whole / "prepared", training__eval_every=1)
    before, played = {k: v.clone() for k, v in loop.policy.state_dict().items()}, []
    evaluate = arms.evaluate_policy

    def watched(policy, env, tasks, *rest, **more):
        same = all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
        played.append((tasks[0].id in {task.id for task in loop.ready.tasks}, same))
        return evaluate(policy, env, tasks, *rest, **more)

    monkeypatch.setattr(arms, "evaluate_policy", watched)
    row = run_iteration(loop)
    assert played == [(True, True), (False, False)]  # training games before the update, validation games after it
    assert {"dream/gap", "eval/success"} <= {*row} and row["time/update"] < row["time/iteration"]


def test_games_that_were_given_up_leave_the_gap(whole, tmp_path, monkeypatch):
    loop = loop_in(tmp_path, whole / "prepared")
    dreams = arms.collect(loop, "dream", loop.ready.tasks[:4])
    games = [replace(t, success=i == 3, aborted="browser lost" if i < 2 else None) for i, t in enumerate(dreams)]
    monkeypatch.setattr(arms, "recorded_dreams", lambda loop, found: dreams)
    monkeypatch.setattr(arms, "evaluate_policy", lambda *_, **__: SimpleNamespace(trajectories=games))
    arms.measure_dream(loop, row := {}, dreams)
    assert row["dream/gap_n"] == 2 and row["dream/real_success"] == 0.5
    assert row["dream/gap_transitions"] == sum(len(game.turns) for game in games)  # those of aborted games too


def test_real_only_never_dreams_when_money_runs_short(whole, tmp_path):
    loop = loop_in(tmp_path, whole / "prepared", buffer__synthetic_ratio=0.0, training__real_budget=100)
    assert [len(part) for part in arms.sample_tasks(loop)] == [0, 100 // 30]
    loop.real_transitions = 80
    assert [len(part) for part in arms.sample_tasks(loop)] == [0, 0] and finished(loop)


def test_the_real_control_plays_worlds_that_the_dream_does_not_know(whole, tmp_path):
    more = {"reasoning_model__train_worlds": 2}
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    shutil.rmtree(tmp_path / "prepared" / "experience_model")
    t = trainer(tmp_path, **more)
    ready = t.prepare()
    dream, real = (start_arm_loop(t.config, ready, arm, "cpu", RunDir(tmp_path / arm)) for arm in ("dream", "real"))
    assert len(dream.ready.tasks) == 2 and [task.id for task in real.ready.tasks] == [
        task.id for task in t.prepare(dream=False).tasks
    ]


@pytest.mark.parametrize("wanted", [0, 3])
def test_without_validation_games_the_last_iteration_counts(whole, tmp_path, wanted):
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    t = trainer(tmp_path, training__validation_episodes=wanted, rl__invalid_action_penalty=0.1)
    if wanted:  # but the environment has none
        tasks = t.env.tasks
        t.env = replace(t.env, tasks=lambda split: [] if split == "valid" else tasks(split))
    policy = t.fit(t.prepare(), "dream")
    last = load_policy(tmp_path / "dream" / "checkpoints" / manifest_name(2)).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in policy.state_dict().items())
    assert not any(key.startswith("eval/") for row in metrics(tmp_path / "dream") for key in row)


def test_an_iteration_whose_validation_was_aborted_is_the_best_only_while_nothing_is_known(monkeypatch):
    found = iter([(0, 0.0), (0, 0.0), (3, 0.0), (0, 0.0), (3, 0.5), (3, 0.2)])

    def played(*_, **__):
        n, success = next(found)
        return SimpleNamespace(
            row=lambda: dict.fromkeys(("transitions", "invalid_actions"), 0) | {"n": n, "success": success}
        )

    monkeypatch.setattr(arms, "evaluate_policy", played)
    ready = SimpleNamespace(env=SimpleNamespace(tasks=lambda split: ["a", "b", "c"]))
    loop = SimpleNamespace(
        config=config(), ready=ready, player=None, accelerator=None, best={"iteration": 0, "success": -1.0}
    )
    best, rows = [], []
    for loop.iteration in range(6):
        rows.append({})
        arms.validate(loop, rows[-1])
        best.append(loop.best["iteration"])
    assert best == [0, 1, 2, 2, 4, 4]
    assert ["eval/success" in row for row in rows] == [row["eval/n"] > 0 for row in rows]
    assert all("eval/transitions" in row for row in rows), "what aborted games took is counted too"


@pytest.mark.parametrize("aborted", [None, "browser lost"])
def test_an_offline_agent_that_nothing_is_known_of_has_no_success(aborted, whole, tmp_path, monkeypatch):
    t = trainer(tmp_path, rl__algorithm="sft", training__validation_episodes=2 if aborted else 0)
    policy = load_policy(whole / "prepared" / "policy_iter_0000.json")
    monkeypatch.setattr(trainer_module, "offline_agent", lambda *_: (policy, {"policy/loss": 1.0}))

    turn = Turn([1], [2], [-0.1], 0.0, "s", "look", "look")

    def played(policy, env, tasks, *_, **__):
        return Evaluation(
            [Trajectory([turn], task, 0, "real", 0, False, False, aborted=aborted) for task in tasks], 1.0
        )

    monkeypatch.setattr(trainer_module, "evaluate_policy", played)
    trainer_module.fit_offline(t, None, "sft", RunDir(tmp_path / "sft"), lambda row: None)
    (row,) = metrics(tmp_path / "sft")
    assert row["policy/loss"] == 1 and "eval/success" not in row
    assert (row["eval/n"], row["eval/transitions"]) == (0, 2 if aborted else 0)


def test_a_group_of_one_is_left_out(whole, tmp_path):
    loop = loop_in(tmp_path, whole / "prepared", rl__algorithm="grpo", rl__group_size=3)
    dreams, _ = arms.play_iteration(loop)
    lost = [replace(t, aborted="server lost") if i in (1, 2) else t for i, t in enumerate(dreams)]
    assert arms.update_policy(loop, lost, 0)["policy/updates"] > 0  # of the second group
    lost = [replace(t, aborted="server lost") if i % 3 else t for i, t in enumerate(dreams)]
    assert arms.update_policy(loop, lost, 0) == {"policy/updates": 0}


def test_what_an_older_checkpoint_calls_the_best_stays(tmp_path):
    """A damaged newest checkpoint is passed over; the one before it must still find its best."""
    for number, best in ((5, 5), (9, 5), (10, 10)):
        (tmp_path / f"iter_{number:04d}").mkdir()
        (tmp_path / manifest_name(number)).write_text(json.dumps({"best": {"iteration": best}}))
    prune_checkpoints(tmp_path, 2, 10)
    assert {path.name for path in tmp_path.glob("*.json")} == {manifest_name(n) for n in (5, 9, 10)}
    (tmp_path / manifest_name(9)).write_text("{")
    prune_checkpoints(tmp_path, 2, 10)
    assert not (tmp_path / "iter_0005").exists() and (tmp_path / "iter_0009").exists()


def test_no_demonstrations_is_no_cloning(tmp_path):
    t = trainer(tmp_path, policy_model__bc_demonstrations=0)
    assert t.prepare(dream=False).clone_transitions == 0


def test_a_buffer_that_is_too_small_says_so(tmp_path, caplog):
    trainer(tmp_path, buffer__capacity=50).prepare(dream=False)
    assert "the buffer took 50 of" in caplog.text


def test_held_out_rows_of_a_users_file_are_left_out(tmp_path, caplog):
    row = to_row(Experience("s", "a", 0.0, "t", False, episode_id="e", policy="expert"))
    lines = [row, row | {"split": "unseen"}, row | {"split": "valid"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = offline_data(None, config(environment__offline_data=str(tmp_path / "mine.jsonl")), [])
    assert len(found) == 1 and "2 rows of other splits" in caplog.text


def users_file(folder, *lines):
    """A run's settings that read these rows."""
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"environment__offline_data": str(folder / "mine.jsonl")}


def theirs(whole, **changed):
    """Recorded rows of the training tasks, as a user might have them."""
    buffer = ExperienceReplayBuffer(path=whole / "prepared" / "experience.db", dedup=False)
    rows = [to_row(e) for _, e in read_rows(buffer.db, "policy = 'expert'")]
    buffer.close()
    return [row | changed for row in rows]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task_id": ""}, "no episode's first row .turn 0. has the task_id of a training task, such as 'small-train-"),
        ({"task_id": "mine"}, "the first has 'mine'; give those of"),
        ({"turn": 1}, "no row has turn 0"),
        ({"policy": ""}, "nothing to clone in .* rows of policy '' with success True, .*; expected policy 'expert'"),
        ({"policy": "human", "success": None}, "rows of policy 'human' with success None"),
        ({"split": "unseen"}, "no row of the split 'train'"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_told_before_training(changed, said, whole, tmp_path):
    t = trainer(tmp_path / "run", **users_file(tmp_path, *theirs(whole, **changed)))
    with pytest.raises(ConfigError, match=said) as caught:
        t.prepare()
    assert str(caught.value).startswith(f"environment.offline_data '{tmp_path}")
    assert not list((tmp_path / "run" / "prepared").glob("*"))


def test_a_users_file_is_read_cloned_and_said_to_be_one(whole, tmp_path):
    lines = []
    rows = theirs(whole, policy="human", success=True)
    DreamGymTrainer(config(**users_file(tmp_path, *rows)), tmp_path / "run", lines.append).prepare(dream=False)
    assert f"{len(rows):,} real transitions read from {tmp_path / 'mine.jsonl'}" in lines
    assert any(line.startswith("cloned from") for line in lines)
    one = [row for row in rows if row["task_id"] == rows[0]["task_id"]]
    lines.clear()
    DreamGymTrainer(config(**users_file(tmp_path, *one)), tmp_path / "one", lines.append).prepare(dream=False)
    assert "cloning epoch 1: no task is held out" in lines and "inf" not in " ".join(lines)
    assert (
        trainer_module.prep.cloning_line(0, float("nan")) == "cloning epoch 1: loss nan"
    )  # diverged, which is another thing
    offline = users_file(tmp_path, *[row | {"task_id": ""} for row in rows])
    trainer(tmp_path / "sft", **offline, rl__algorithm="sft").prepare(dream=False)  # plays none of the tasks
    auto = trainer(tmp_path / "auto")
    auto.say = lines.append
    auto.prepare(dream=False)
    assert any(line.endswith("of expert, noisy and random behaviour in 6 worlds") for line in lines)


def test_rows_that_the_buffer_refuses_are_told_with_the_reason(caplog):
    rows = [Experience("s", "a", 0.0, "t", False), Experience("s", "", 0.0, "t", False)]
    for capacity, said in (
        (9, "1 empty, unreadable or below buffer.quality_threshold"),
        (1, "1 beyond buffer.capacity"),
    ):
        found = [rows[0], rows[0]] if capacity == 1 else rows
        trainer_module.fill(ExperienceReplayBuffer(BufferConfig(capacity=capacity), dedup=False), found)
        assert caplog.messages.pop() == f"the buffer took 1 of 2 transitions: {said}"


def test_rows_of_an_earlier_refreshed_run_are_as_old_as_all_others(tmp_path):
    """An arm's own memory starts from the end of iteration 0."""
    row = to_row(Experience("s", "a", 0.0, "t", False, episode_id="e", policy="expert", iteration=3))
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    found = offline_data(None, config(environment__offline_data=str(tmp_path / "mine.jsonl")), [])
    buffer = ExperienceReplayBuffer(dedup=False)
    buffer.add_many(found)
    tokenizer = train_tokenizer(["s a t"])
    shared = SimpleNamespace(client=GeneratorClient(LanguageModel(build_model(tokenizer), tokenizer)), buffer=buffer)
    assert len(own_copy(shared, tmp_path / "copy.db").buffer) == len(buffer) == 1


def test_demonstrations_that_do_not_fit_are_counted(tmp_path, caplog):
    """Prompts of 5 and 9 tokens, responses of 2."""
    states = {"won": "a b", "lost": "a b a b a b"}
    rows = [Experience(states[n], "a", 0.0, "b", True, n, task_id=n, policy="expert", success=True) for n in states]
    short = config(policy_model__max_new_tokens=2)
    section, policy = short.policy_model, make_policy(short, ["a b"])
    lengths = [len(prompt) for prompt in policy.codec.prompts(list(states.values()))]
    for room, kept in ((max(lengths), 2), (min(lengths), 1)):
        found = cloning_examples(policy, rows, section.model_copy(update={"context_length": room + 2}))
        assert len(found[0]) == kept and ("do not fit" in caplog.text) == (kept == 1)
    assert f"1 of 2 demonstrated actions do not fit into policy_model.context_length={min(lengths) + 2}" in caplog.text
    tight = config(policy_model__max_new_tokens=2, policy_model__context_length=min(lengths) + 1)
    with pytest.raises(ConfigError, match=r"2 of 2 demonstrated actions do not fit into policy_model\.context_length"):
        clone_policy(policy, rows, tight)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"policy_model__heads": 3}, "policy_model.heads 3"),
        ({"reasoning_model__d_model": 6, "reasoning_model__heads": 2}, "reasoning_model.heads 2"),
        ({"policy_model__heads": 5, "policy_model__architecture": "Llama"}, "policy_model.heads 5"),
    ],
)
def test_heads_that_share_no_width_are_refused(changed, key, tmp_path):
    with pytest.raises(ConfigError, match=f"{key}: expected heads of one .*d_model="):
        trainer(tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_an_environment_without_a_mapper_is_refused(monkeypatch):
    made = Environment("toy", None, 6, lambda split: [], lambda slots: None)
    monkeypatch.setattr(trainer_module, "make_environment", lambda name, section: made)
    with pytest.raises(ConfigError, match="'toy' has no mapper.*TranscriptMapper"):
        trainer_module.open_environment(config())


def test_what_others_have_won_is_cloned_too():
    rows = [Experience("s", "a", 0.0, "t", False, episode_id=name, policy=name, success=True) for name in DEMONSTRATORS]
    others = [
        Experience("s", "a", 0.0, "t", False, episode_id=name, policy=name, success=True) for name in ("noise", "")
    ]
    assert demonstration_rows([*rows, *others], 99) == rows
    lost = [replace(row, success=False) for row in rows]
    assert demonstration_rows(lost, 99) == lost[:1]  # an expert's actions among noise are right, whatever came of it


def test_aborted_games_are_no_losses_but_their_turns_are_counted(whole, tmp_path, monkeypatch):
    loop = loop_in(tmp_path, whole / "prepared")
    dreams = arms.collect(loop, "dream", loop.ready.tasks[:4])
    games = [replace(t, success=True, aborted="browser lost" if i < 2 else None) for i, t in enumerate(dreams)]
    row = Evaluation(games, 1.0).row()
    assert row["n"] == 2 and row["aborted"] == 2 and row["success"] == 1
    assert sum(n for _, n in row["by_type"].values()) == 2 == sum(won for won, _ in row["by_type"].values())
    none = Evaluation(games[:2], 1.0).row()
    assert math.isnan(none["success"]) and (none["low"], none["high"], none["n"]) == (0, 1, 0)
    monkeypatch.setattr(preparation, "rollout", lambda *_, **__: games)
    rows, spent = preparation.cloned_rollouts(loop.policy, loop.ready.env, loop.ready.tasks[:4], loop.config)
    assert len(rows) == sum(len(t.turns) for t in games[2:]) < spent == sum(len(t.turns) for t in games)
