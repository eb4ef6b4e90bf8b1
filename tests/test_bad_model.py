"""The notebook that spoils an experience model on purpose, with a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def papermill(tmp_path, *words):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "experiments" / "bad_model.ipynb")]
    return subprocess.run(
        [*command, str(tmp_path / "o.ipynb"), "-p", "results", str(tmp_path / "bad.json"), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_spoiled_run_is_measured_and_kept(tmp_path):
    """One iteration in a model that pays for arriving: curve, gap, games of start, chosen and last iteration."""
    pytest.importorskip("papermill")
    words = ["-p", "spoil", "reward-on-arrival", "-p", "preset", "smoke", "-p", "out_dir", str(tmp_path / "run")]
    quick = "training.gap_limit=0 training.num_iterations=1 reasoning_model.train_steps=5 policy_model.bc_epochs=1"
    done = papermill(tmp_path, *words, "-p", "overrides", quick)
    assert done.returncode == 0, done.stderr[-2000:]
    (name, about), *others = json.loads((tmp_path / "bad.json").read_text(encoding="utf-8")).items()
    assert name == "bad-reward-on-arrival-smoke-seed0" and not others
    assert [point["iteration"] for point in about["curve"]] == [0, 1]
    above = [point["iteration"] for point in about["curve"] if point.get("gap", 0) > about["gap_limit"]]
    assert about["flagged"] == (above[0] if above else None) and about["gap_limit"] == 0
    assert {key: games["n"] for key, games in about["games"].items()} == {"start": 16, "chosen": 16, "last": 16}
    assert name in (tmp_path / "o.ipynb").read_text(encoding="utf-8")


def test_what_cannot_be_spoiled_is_refused(tmp_path):
    pytest.importorskip("papermill")
    done = papermill(tmp_path, "-p", "spoil", "reward-on-arival")
    assert done.returncode == 1 and "did you mean 'reward-on-arrival'" in done.stderr
    assert not (tmp_path / "bad.json").exists()
