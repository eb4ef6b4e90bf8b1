"""A run that was killed, stopped or told to stop ends as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import metrics, trainer, weights, whole  # noqa: F401, a fixture

from dreamgym.training import arms
from dreamgym.training.checkpoints import manifests, restore_rng, rng_tensors
from dreamgym.training.trainer import Terminated, sigterm_interrupts

ROOT = Path(__file__).resolve().parents[2]


def test_checklist_20_kill_9_at_3_random_points():
    script = ROOT / "tests" / "benchmarks" / "kill_resume.py"
    command = [sys.executable, str(script), "--points", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("; equal") == 3 and ", 0 different" in done.stdout
    assert done.stdout.count("killed never") < 3, done.stdout


def same(folder, other):
    a, b = weights(folder / "dream"), weights(other / "dream")
    return metrics(folder / "dream") == metrics(other / "dream") and all(torch.equal(a[name], b[name]) for name in b)


class Stop:
    """Interrupts the n-th call of a function of `arms`."""

    def __init__(self, monkeypatch, name, call, kind):
        self.inner, self.left, self.kind = getattr(arms, name), call, kind
        monkeypatch.setattr(arms, name, self)

    def __call__(self, *args, **more):
        self.left -= 1
        if self.left == 0:
            raise self.kind
        return self.inner(*args, **more)


@pytest.mark.parametrize("name", ["collect", "update_policy", "validate", "save_arm"])
def test_stopped_anywhere_and_continued(name, whole, tmp_path, monkeypatch):  # noqa: F811
    """In the second iteration, by the stop button; the same trainer goes on."""
    t = trainer(tmp_path)
    ready = t.prepare()
    calls = {"collect": 3, "update_policy": 2, "validate": 3, "save_arm": 2}  # two collects an iteration
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, name, calls[name], KeyboardInterrupt)
        t.fit(ready, "dream")
    t.fit(ready, "dream")
    assert same(tmp_path, whole)


def test_a_stop_between_updates_is_saved(tmp_path, monkeypatch):
    """With `save_every` 9 nothing is on disk yet; the first iteration is kept all the same."""
    t = trainer(tmp_path, training__save_every=9)
    ready = t.prepare()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, "collect", 3, KeyboardInterrupt)
        t.fit(ready, "dream")
    assert [m.name for m in manifests(tmp_path / "dream" / "checkpoints")] == ["policy_iter_0001.json"]
    t.fit(ready, "dream")
    assert [row["iteration"] for row in metrics(tmp_path / "dream")] == [0, 1, 2]


def test_a_death_before_the_first_checkpoint_leaves_no_episodes(whole, tmp_path, monkeypatch):  # noqa: F811
    """The first iteration is on file when nothing of it can be kept; it is written again, not twice."""

    def dead(loop):
        raise KeyboardInterrupt

    t = trainer(tmp_path)
    ready = t.prepare()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arms, "save_arm", dead)
        t.fit(ready, "dream")
    assert (tmp_path / "dream" / "episodes.jsonl").is_file()
    t.fit(ready, "dream")
    assert same(tmp_path, whole)
    assert (tmp_path / "dream" / "episodes.jsonl").read_bytes() == (whole / "dream" / "episodes.jsonl").read_bytes()


def test_sigterm_becomes_an_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) == before


def test_checklist_20_every_random_generator_continues():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()

    draw()
    kept = rng_tensors()
    first = [draw(), draw()]
    draw()
    restore_rng(kept)
    assert [draw(), draw()] == first
