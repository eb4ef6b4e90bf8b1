"""The curriculum inside a run: shares, switches, what is never played for real, and exact continuation."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_trainer import config, metrics, trainer, weights, whole  # noqa: F401, a fixture

from dreamgym.core.data_structures import Task
from dreamgym.environments.base_env import make_environment
from dreamgym.models import experience_sft
from dreamgym.models.experience_sft import encode_examples, example_loss
from dreamgym.models.replay_buffer import read_rows
from dreamgym.training import arms
from dreamgym.training.arms import dreams_of_success, play_iteration, run_iteration, start_arm_loop
from dreamgym.training.checkpoints import newest_checkpoint
from dreamgym.training.preparation import check_curriculum
from dreamgym.utils.tracking import RunDir

ON = {"curriculum__difficulty_increment": 0.5, "curriculum__synthetic_fraction_max": 0.5}


@pytest.fixture(scope="module")
def grown(whole, tmp_path_factory):  # noqa: F811
    """An uninterrupted dream arm with a curriculum, on the prepared data of `whole`."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(whole / "prepared", folder / "prepared")
    t = trainer(folder, **ON)
    t.fit(t.prepare(), "dream")
    return folder


def loop_of(folder, prepared, arm="dream", **more):
    """A loop that is about to begin, without its first validation."""
    shutil.copytree(prepared, folder / "prepared", dirs_exist_ok=True)
    t = trainer(folder, **more)
    return start_arm_loop(t.config, t.prepare(), arm, "cpu", RunDir(folder / arm))


def state_of(folder, iteration):
    return json.loads((folder / "checkpoints" / f"iter_{iteration:04d}" / "curriculum.json").read_text())


def test_the_metrics_tell_of_the_curriculum(grown):
    first, *rows = metrics(grown / "dream")
    assert not any(key.startswith("curriculum/") for key in first)
    for number, row in enumerate(rows, 1):
        assert row["curriculum/strength"] == 0.5 * number and row["curriculum/seed_tasks"] == 6
        assert 0 <= row["curriculum/reward_variance"] <= 0.25 and 0 <= row["curriculum/pull"] <= 1
        assert row["curriculum/accepted"] == row["curriculum/generated_tasks"] == 3 * number
        assert row["rollout/real_transitions"] == 0 and row["dream/gap_n"] == 3  # the three seed tasks


def test_generated_tasks_dream_in_the_world_of_their_seed_task(grown):
    state = state_of(grown / "dream", 2)
    seeds = {task["id"]: task for task in state["seeds"]}
    for task in state["generated"]:
        base = task["metadata"]["seed_task"]
        world = seeds[base] if base in seeds else next(t for t in state["generated"] if t["id"] == base)
        assert task["world_id"] == world["world_id"] and task["source"] == "generated" and task["task_type"]
        assert task["initial_state"].split("\n")[1:] == world["initial_state"].split("\n")[1:]
        assert task["instruction"] in task["initial_state"] and task["instruction"] != world["instruction"]
    played = [json.loads(line)["task_id"] for line in (grown / "dream" / "episodes.jsonl").read_text().splitlines()]
    assert {task["id"] for task in state["generated"]} & set(played)


def test_tasks_without_own_episodes_are_judged_by_recorded_ones(whole, tmp_path, monkeypatch):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared")
    tasks, model, scored = loop.ready.tasks, loop.ready.model, []
    few = {task.id for task in tasks[:2]}
    found = [(i, e) for i, e in read_rows(model.buffer.db, "1") if e.policy != "cloned" or e.task_id in few]
    monkeypatch.setattr(experience_sft, "read_rows", lambda *_: found)
    score = lambda rows, *_: scored.extend(rows) or {e.task_id: 0.0 for e in rows}  # noqa: E731
    monkeypatch.setattr(experience_sft, "losses_by_task", score)
    assert len(experience_sft.best_predicted(tasks, 1.0, model)) == len(tasks)
    assert {e.task_id for e in scored if e.policy == "cloned"} == few
    assert not few & {e.task_id for e in scored if e.policy != "cloned"}


def test_only_the_tasks_that_are_predicted_best_are_dreamt(whole, tmp_path):  # noqa: F811
    """Those of the lowest loss, each step asked by itself; a real arm still plays all of them."""
    loop = loop_of(tmp_path, whole / "prepared", curriculum__best_predicted=0.5)
    ready, model = loop.ready, loop.ready.model
    own = [e for _, e in read_rows(ready.buffer.db, "policy = 'cloned'")]
    losses = {}
    for task in ready.tasks:
        examples = encode_examples(
            [e for e in own if e.task_id == task.id], model, model.client.language_model.tokenizer
        )
        nats = [example_loss(model.client.language_model.model, [one]).item() * len(one[1]) for one in examples]
        losses[task.id] = sum(nats) / sum(len(target) for _, target in examples)
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert set(loop.curriculum.known.seeds) == set(best) and len(ready.tasks) == 6
    assert {t.task.id for t in play_iteration(loop)[0]} == set(best)
    real = start_arm_loop(loop.config, ready, "real", "cpu", RunDir(tmp_path / "real"))
    assert len(real.curriculum.known.seeds) == 6


@pytest.mark.parametrize("stop", ["killed", "stopped"])
def test_continued_with_a_curriculum_is_the_same_run(stop, grown, whole, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(whole / "prepared", tmp_path / "prepared")
    every = 9 if stop == "stopped" else 1  # nothing is on disk yet when it is stopped
    t = trainer(tmp_path, **ON, training__save_every=every)
    if stop == "killed":
        with RunDir(tmp_path / "dream") as run:
            loop = start_arm_loop(t.config, t.prepare(), "dream", "cpu", run)
            run_iteration(loop)
            play_iteration(loop)  # the next iteration has begun, and is lost
    else:
        inner, calls = arms.collect, iter(range(9))

        def collect(*args, **more):
            if next(calls) == 2:  # the second iteration's dreams: its tasks are drawn already
                raise KeyboardInterrupt
            return inner(*args, **more)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(arms, "collect", collect)
            t.fit(t.prepare(), "dream")
    again = trainer(tmp_path, **ON, training__save_every=every)
    again.fit(again.prepare(), "dream")
    assert metrics(tmp_path / "dream") == metrics(grown / "dream")
    assert state_of(tmp_path / "dream", 2) == state_of(grown / "dream", 2)
    a, b = weights(tmp_path / "dream"), weights(grown / "dream")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_s2r_goes_on_with_the_curriculum_and_plays_seed_tasks_only(grown, tmp_path, monkeypatch):
    shutil.copytree(grown, tmp_path / "run")
    folder = tmp_path / "run" / "dream" / "checkpoints"
    last = newest_checkpoint(folder)[1] | {"best": {"iteration": 2, "success": 1.0}}
    monkeypatch.setattr(arms, "finished_dream", lambda *_: (folder, last))
    t = trainer(tmp_path / "run", **ON)
    with RunDir(tmp_path / "run" / "s2r") as run:
        loop = start_arm_loop(t.config, t.prepare(), "s2r", "cpu", run)
        assert loop.curriculum.state_dict() == state_of(grown / "dream", 2)
        row = run_iteration(loop)
    assert row["curriculum/strength"] == 1.5 and row["curriculum/generated_tasks"] == 6 == row["curriculum/accepted"]
    assert row["rollout/source"] == "real" and row["rollout/real_transitions"] == row["rollout/transitions"] > 0
    episodes = [json.loads(line) for line in (tmp_path / "run" / "s2r" / "episodes.jsonl").read_text().splitlines()]
    assert episodes and all("generated" not in episode["task_id"] for episode in episodes)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_real_episodes_are_of_seed_tasks_whatever_the_share(share, whole, tmp_path):  # noqa: F811
    more = ON | {"curriculum__synthetic_fraction_max": 1.0, "buffer__synthetic_ratio": share}
    loop = loop_of(tmp_path, whole / "prepared", **more)
    for _ in range(3):
        dreamt, real = arms.sample_tasks(loop)
        assert len(dreamt) == round(6 * share) and len(dreamt) + len(real) == 6
        assert all(task.source == "real" for task in real) and all(task.source == "generated" for task in dreamt)


def test_dreams_are_watched_where_all_tasks_are_generated(whole, tmp_path):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared", **ON | {"curriculum__synthetic_fraction_max": 1.0})
    row = run_iteration(loop)
    assert loop.curriculum.known.generated and row["dream/gap_n"] == 3 and "dream/gap" in row
    dreams, _ = play_iteration(loop)
    assert all(t.task.source == "generated" for t in dreams)
    measured = arms.recorded_dreams(loop, dreams)
    assert len({t.task.id for t in measured}) == 3 and all(t.task.source == "real" for t in measured)
    assert len(arms.recorded_dreams(loop, dreams[:2])) == 2  # never more than were dreamt


def test_to_watch_changes_nothing_that_is_trained(whole, tmp_path, monkeypatch):  # noqa: F811
    policies = []
    for name in ("watched", "alone"):
        if name == "alone":
            monkeypatch.setattr(arms, "recorded_dreams", lambda loop, trajectories: [])
        loop = loop_of(tmp_path / name, whole / "prepared", **ON | {"curriculum__synthetic_fraction_max": 1.0})
        rows = [run_iteration(loop) for _ in range(2)]
        assert all(("dream/gap" in row) == (name == "watched") for row in rows)
        policies.append([value.clone() for value in loop.policy.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*policies, strict=True))


def test_a_real_arm_generates_nothing(whole, tmp_path):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared", "real", **ON)
    dreamt, real = arms.sample_tasks(loop)
    assert not dreamt and len(real) == 6 and not loop.curriculum.known.generated


@pytest.mark.parametrize("off", ["difficulty_increment", "synthetic_fraction_max"])
def test_switches(off, whole, tmp_path):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared", **ON | {f"curriculum__{off}": 0.0})
    for _ in range(4):
        dreamt, _ = arms.sample_tasks(loop)
        assert all(task.source == "real" for task in dreamt) and not loop.curriculum.known.generated
        assert len({task.id for task in dreamt}) == 6  # all there are


def test_the_first_seed_tasks_only(whole, tmp_path):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared", curriculum__seed_tasks=2)
    dreamt, _ = arms.sample_tasks(loop)
    assert {task.id for task in dreamt} == {task.id for task in loop.ready.tasks[:2]} and len(dreamt) == 6


def test_groups_share_a_task_and_have_variances_of_their_own(whole, tmp_path):  # noqa: F811
    loop = loop_of(tmp_path, whole / "prepared", rl__algorithm="grpo", rl__group_size=3, **ON)
    dreamt, _ = arms.sample_tasks(loop)
    assert [task.source for task in dreamt] == ["generated"] * 3 + ["real"] * 3
    assert dreamt[0] == dreamt[2] and dreamt[3] == dreamt[5] and not loop.curriculum.known.by_cluster


def test_without_a_checker_a_task_must_succeed_in_a_dream(monkeypatch):
    asked = []

    def collect(loop, where, tasks, part):
        asked.extend(tasks)
        return [SimpleNamespace(task=task, success=task.id == "b" and i % 3 == 2) for i, task in enumerate(tasks)]

    monkeypatch.setattr(arms, "collect", collect)
    loop = SimpleNamespace(config=config(curriculum__trials=3))
    tasks = [Task(name, "x", initial_state=None if name == "n" else "a room") for name in "abnc"]
    assert dreams_of_success(loop, tasks) == [False, True, False, False]  # without a first state nothing can be dreamt
    assert [task.id for task in asked] == list("aaabbbccc") and dreams_of_success(loop, []) == []


def test_where_nobody_writes_tasks_the_run_says_so(caplog):
    asked = config(**ON)
    able = make_environment("alfworld", asked.environment)
    unable = SimpleNamespace(name="toy", vary=None)
    check_curriculum(asked, able)
    check_curriculum(config(**ON | {"curriculum__synthetic_fraction_max": 0.0}), unable)
    check_curriculum(config(**ON, reasoning_model__name="some/model"), unable)
    assert not caplog.records
    check_curriculum(asked, unable)
    assert "'toy' has no generator of tasks" in caplog.text


def test_the_trainers_notebook_explains_every_metric(grown, root):
    cells = json.loads((root / "nbs" / "training" / "37_trainer.ipynb").read_text(encoding="utf-8"))["cells"]
    told = next(t for t in ("".join(cell["source"]) for cell in cells) if t.startswith("## What each metric means"))
    missing = {key for row in metrics(grown / "dream") for key in row if f"`{key}`" not in told} - {"iteration"}
    assert not missing, sorted(missing)
