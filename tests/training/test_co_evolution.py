"""An arm that refreshes its experience model: counted, within budget, resumed exactly, and nobody else's business."""

from __future__ import annotations

import hashlib

import pytest
import torch
from test_resume import Stop
from test_trainer import metrics, trainer, weights

from dreamgym.core.errors import ConfigError
from dreamgym.core.language_model import load_language_model
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, read_rows
from dreamgym.training.arms import DREAMER
from dreamgym.training.checkpoints import newest_checkpoint

ON = {
    "reasoning_model__refresh_every": 1,
    "reasoning_model__refresh_episodes": 3,
    "reasoning_model__refresh_steps": 4,
    "training__num_iterations": 3,
    "environment__max_episode_steps": 12,
}


def dreamer(folder):
    """Weights of the experience model in the newest checkpoint of the dream arm."""
    found = newest_checkpoint(folder / "dream" / "checkpoints")
    assert found is not None
    return load_language_model(found[0].parent / found[1]["folder"] / DREAMER).model.state_dict()


def memory(folder, t):
    """Rows of the arm's memory, each with its id."""
    return list(read_rows(ExperienceReplayBuffer(t.config.buffer, folder / "dream" / "experience.db").db, "1"))


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.safetensors")}


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted dream arm of three iterations with a refresh after the first and the second."""
    folder = tmp_path_factory.mktemp("whole")
    t = trainer(folder, **ON)
    t.fit(t.prepare(), "dream")
    return folder, t


def test_fresh_games_are_counted_remembered_and_learned_from(whole):
    folder, t = whole
    rows, (prepared, ready) = metrics(folder / "dream"), (folder / "prepared", t.prepare())
    fresh = [row.get("buffer/fresh", 0) for row in rows]
    assert fresh[0] == fresh[3] == 0 and min(fresh[1:3]) > 0, "none after the last dream, which nobody would follow"
    assert [row["rollout/real_transitions"] for row in rows[1:]] == [fresh[1], sum(fresh), sum(fresh)]
    assert all(0 < row["dream/loss"] < 20 and row["buffer/replayed"] >= row["buffer/fresh"] for row in rows[1:3])
    kept = [e for _, e in memory(folder, t)]
    mine = [e for e in kept if e.iteration]
    found = [sum(e.iteration == i for e in mine) for i in (1, 2)]
    assert all(n - 3 <= m <= n for n, m in zip(fresh[1:3], found)), "all but a response without any action"
    assert {e.policy for e in mine} == {"rl"} and all(e.source == "real" and e.reasoning for e in mine)
    assert len(ready.buffer) == len(kept) - len(mine), "what arms share is as it was"
    start = load_language_model(prepared / "experience_model").model.state_dict()
    assert not equal(dreamer(folder), start) and equal(ready.model.client.language_model.model.state_dict(), start)


@pytest.mark.parametrize("at", ["refresh_dreamer", "save_arm"])
def test_interrupted_is_uninterrupted(at, whole, tmp_path, monkeypatch):
    """Stopped in the second iteration: before its refresh, or when all but the checkpoint is done; then in another process."""
    t = trainer(tmp_path, **ON)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, at, 2, KeyboardInterrupt)
        t.fit(t.prepare(), "dream")
    before = digests(tmp_path / "prepared")
    again = trainer(tmp_path, **ON)
    again.fit(again.prepare(), "dream")
    assert metrics(tmp_path / "dream") == metrics(whole[0] / "dream")
    assert equal(weights(tmp_path / "dream"), weights(whole[0] / "dream")) and equal(
        dreamer(tmp_path), dreamer(whole[0])
    )
    assert memory(tmp_path, again) == memory(*whole)
    assert digests(tmp_path / "prepared") == before == digests(whole[0] / "prepared")


def test_the_same_trainer_goes_on_before_any_checkpoint(whole, tmp_path, monkeypatch):
    """What the first iteration has taught and remembered is forgotten with it."""
    t = trainer(tmp_path, **ON)
    ready = t.prepare()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, "save_arm", 1, KeyboardInterrupt)
        t.fit(ready, "dream")
    t.fit(ready, "dream")
    assert metrics(tmp_path / "dream") == metrics(whole[0] / "dream") and equal(dreamer(tmp_path), dreamer(whole[0]))


def test_the_budget_holds(tmp_path):
    """Two games of at most 12 turns fit into 30 transitions once, and then at most one more."""
    t = trainer(tmp_path, **ON, training__real_budget=30)
    t.fit(t.prepare(), "dream")
    rows = metrics(tmp_path / "dream")
    assert 0 < rows[1]["buffer/fresh"] <= 24 and rows[-1]["rollout/real_transitions"] <= 30


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reasoning_model__provider": "openai", "reasoning_model__name": "m"}, "trained in this process"),
        ({"reasoning_model__prompted": True, "reasoning_model__name": "m"}, "trained in this process"),
        ({"training__mode": "real"}, "nothing is dreamt"),
        ({"buffer__synthetic_ratio": 0.0}, "nothing is dreamt"),
    ],
)
def test_a_refresh_that_cannot_be_is_refused(changed, said, tmp_path):
    with pytest.raises(ConfigError, match=f"refresh_every 1: .*{said}"):
        trainer(tmp_path, **ON | changed)
