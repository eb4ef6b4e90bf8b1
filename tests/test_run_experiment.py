"""The closing table, the verdict and the episodes of `run_experiment`, cell by cell on made-up runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from dreamgym.utils.statistics import paired_difference
from dreamgym.utils.tracking import read_jsonl, read_metrics
from dreamgym.utils.widgets import episodes_html, outcome

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "run_experiment.ipynb"
GAMES = [SimpleNamespace(task=SimpleNamespace(id=str(i)), success=i % 2 == 0, aborted=None) for i in range(8)]


def cell(cell_id):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["id"] == cell_id)


def log_of(folder, arm, rows):
    (folder / arm).mkdir(parents=True)
    (folder / arm / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table_in(folder, methods):
    found = SimpleNamespace(
        trajectories=GAMES, row=lambda: {"success": 0.5, "low": 0.2, "high": 0.8, "n": 8, "temperature": 1}
    )
    names = {"folder": folder, "policies": dict.fromkeys(methods), "seed": 3, "read_metrics": read_metrics, "pd": pd}
    names |= {"cfg": SimpleNamespace(environment=SimpleNamespace(eval_split="unseen"))}
    names["cfg"].training = SimpleNamespace(eval_episodes=8, gap_limit=0.2, gap_stop=None)
    names |= {"world": SimpleNamespace(tasks=lambda split: [0] * 8), "evaluate_policy": lambda *given: found}
    names["ready"] = SimpleNamespace(real_transitions=1000, clone_transitions=200)
    exec(cell("13d4d3fa"), names)
    return names


@pytest.fixture
def folder(tmp_path):
    start, measured = {"iteration": 0, "eval/transitions": 50}, {"eval/transitions": 50, "dream/gap_transitions": 30}
    last = {"iteration": 1, "rollout/episodes": 16, "rollout/real_transitions": 7, "dream/replayed": 4} | measured
    log_of(tmp_path, "dream", [start, last])
    more = {"iteration": 2, "rollout/episodes": 4, "rollout/real_transitions": 107, "eval/transitions": 50}
    log_of(tmp_path, "s2r", [start | {"iteration": 1}, more])
    return tmp_path


def test_s2r_counts_what_the_dream_arm_measured_and_played(folder):
    rows = table_in(folder, ["behaviour cloning", "dream RL", "s2r RL"])["rows"]
    found = {row["method"]: [row[k] for k in ("episodes", "measuring", "real RL transitions")] for row in rows}
    assert found["behaviour cloning"] == [0, 0, 0] and found["dream RL"] == [16, 134, 7]
    assert found["s2r RL"] == [20, 134 + 100, 107]
    assert {row["method"]: row["all real transitions"] for row in rows}["s2r RL"] == 1107


def test_an_s2r_arm_that_could_afford_nothing_keeps_what_it_inherited(folder):
    (folder / "s2r" / "metrics.jsonl").write_text('{"iteration": 1, "eval/transitions": 50}\n', encoding="utf-8")
    row = table_in(folder, ["behaviour cloning", "s2r RL"])["rows"][-1]
    assert (row["real RL transitions"], row["episodes"], row["measuring"]) == (7, 16, 184)


def test_the_verdict_names_its_seed(folder):
    names = table_in(folder, ["behaviour cloning", "dream RL"])
    names |= {"mode": "dream", "paired_difference": paired_difference, "Markdown": str}
    exec(cell("bfd56162"), names)
    said = names["lines"][-1]
    assert "**With seed 3, dream RL made no difference that this many games can show** (the interval is" in said


def test_both_kinds_of_episodes_are_shown(tmp_path):
    for arm, source, turns in (("dream", "dream", 6), ("real", "real", 5)):
        (tmp_path / arm).mkdir()
        state = f"state of a {source}"
        made = {"source": source, "success": True, "task": source, "turns": [{"state": state}] * turns}
        (tmp_path / arm / "episodes.jsonl").write_text((json.dumps(made) + "\n") * 100, encoding="utf-8")
    shown = []
    names = {
        "folder": tmp_path,
        "arms": ["dream"],
        "mode": "dream",
        "policies": dict.fromkeys("ab"),
        "tests": [],
        "seed": 0,
    }
    names |= {"real_games_of": lambda *given: [], "read_jsonl": read_jsonl, "episodes_html": episodes_html}
    names |= {"outcome": outcome, "browse_episodes": list, "display": lambda *given: shown.extend(given)}
    exec(re.sub(r"write_json\(.*?\n\}\)\n", "", cell("43450cce"), flags=re.S), names)
    assert [e["source"] for e in shown[0]] == ["dream"] * 20 + ["real"] * 20
    assert all(f"state of a {source}" in shown[1] for source in ("dream", "real")) and len(shown[1]) < 45_000
