"""Ablations times seeds: what each switch means, what is run, what is said; and the notebook that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_run_benchmark import Runner, quick_bootstrap  # noqa: F401, a fixture

from dreamgym.core.config import load_config
from dreamgym.core.errors import ConfigError
from dreamgym.training import ablations as ab
from dreamgym.training.benchmark import METHODS, Setting

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {  # the first seven are the design's
    "dream": ("buffer", "synthetic_ratio", 0),
    "curriculum": ("curriculum", "difficulty_increment", 0),
    "offline-data": ("environment", "offline_data", None),
    "reasoning": ("reasoning_model", "reasoning", False),
    "replay": ("buffer", "top_k", 0),
    "task-generation": ("curriculum", "synthetic_fraction_max", 0),
    "history": ("reasoning_model", "history", 0),
    "same-world": ("buffer", "same_world", False),
    "abstract-state": ("environment", "mapper", False),
    "changes": ("reasoning_model", "whole_states", True),
    "policy-data": ("environment", "live_episodes", 0),
}


def run(tmp_path, text, seeds, runner, setting=Setting(), **more):
    chosen = ab.parse_ablations(text)
    return ab.run_ablations(chosen, seeds, setting, tmp_path / "a.json", tmp_path / "runs", start=runner, **more)


def overrides_of(command):
    return dict(zip(command[4::3], command[5::3], strict=True))["overrides"]


# ---- switches


def test_every_switch_of_the_design_takes_its_part_away():
    assert set(SWITCHES) == set(ab.ABLATIONS) - {ab.FULL} and all(a.method in METHODS for a in ab.ABLATIONS.values())
    settings = ab.settings_of(ab.ABLATIONS, ab.full_method(Setting()))
    full = settings[ab.FULL].load(0)
    for name, (section, key, off) in SWITCHES.items():
        changed = settings[name].load(0)
        assert getattr(getattr(changed, section), key) == off != getattr(getattr(full, section), key), name
        assert changed.model_copy(update={section: getattr(full, section)}) == full  # and nothing else


@pytest.mark.parametrize("preset", ["smoke", "cpu", "gpu"])
def test_every_remedy_changes_what_it_names(preset):
    settings = ab.settings_of({ab.FULL: ab.ABLATIONS[ab.FULL], **ab.REMEDIES}, ab.full_method(Setting(preset=preset)))
    full = settings[ab.FULL].load(0)
    assert not set(ab.REMEDIES) & set(ab.ABLATIONS)
    for name, remedy in ab.REMEDIES.items():
        changed = settings[name].load(0)
        for key in (word.partition("=")[0] for word in remedy.overrides.split()):
            assert ab.value_of(changed, key) != ab.value_of(full, key), name


@pytest.mark.parametrize("preset", ["smoke", "cpu", "gpu"])
def test_every_part_of_the_full_method_is_on(preset):
    config = ab.full_method(Setting(preset=preset)).load(0)
    for section, key, off in SWITCHES.values():
        assert getattr(getattr(config, section), key) != off


def test_the_users_word_is_stronger_than_the_full_method():
    setting = Setting(overrides="reasoning_model.history=0 curriculum.synthetic_fraction_max=0.9")
    full = ab.full_method(setting)
    config = full.load(0)
    assert full.overrides.count("reasoning_model.history") == 1  # in the rows' setting, each part is named once
    assert config.reasoning_model.history == 0 and config.curriculum.synthetic_fraction_max == 0.9
    with pytest.raises(ConfigError, match="'history' changes nothing"):
        ab.settings_of(ab.parse_ablations("history"), ab.full_method(setting))


def test_an_environment_without_a_generator_generates_nothing(monkeypatch):
    monkeypatch.setattr(ab, "make_environment", lambda *_: SimpleNamespace(vary=None))
    full = ab.full_method(Setting())
    assert full.load(0).curriculum.synthetic_fraction_max == 0 < full.load(0).curriculum.difficulty_increment
    with pytest.raises(ConfigError, match="'task-generation' changes nothing"):
        ab.settings_of(ab.parse_ablations("task-generation"), full)
    able = ab.full_method(Setting(overrides="reasoning_model.name=some/model"))
    assert able.load(0).curriculum.synthetic_fraction_max > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reply", "did you mean 'replay'"),
        ("replay;history", "unknown ablation"),
        ("", "expected names"),
        ("full", "expected names"),
        ("1,2", "unknown ablation '1'"),
        ("sweep:top_kk=1", "did you mean 'top_k'"),
        ("sweep:lr=1", "reasoning_model.lr, rl.lr"),
        ("sweep:top_k", "such as 'sweep:top_k=0,1,2,4'"),
        ("sweep:top_k=1,histry", "did you mean 'history'"),
        ("verifier+refesh", "did you mean 'refresh'"),
        ("verifier+", "unknown ablation ''"),
        ("dream+refresh", "one value of reasoning_model.refresh_every, they want 0 and 3"),
        ("dream+replay", "a real one"),
    ],
)
def test_bad_names(text, said):
    with pytest.raises(ConfigError, match=said):
        ab.parse_ablations(text)


def test_several_together():
    chosen = ab.parse_ablations("kl, pessimism + votes+same-world,sweep:top_k=2")
    assert list(chosen) == ["full", "kl", "pessimism+votes+same-world", "buffer.top_k=2"]
    config = load_config(None, "alfworld", "smoke", chosen["pessimism+votes+same-world"].overrides)
    model = config.reasoning_model
    assert (model.votes, model.pessimism, config.buffer.same_world) == (3, "lower", False)
    assert config.rl.kl_coef == load_config(None, "alfworld", "smoke").rl.kl_coef  # that of kl alone


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("sweep:top_k=0,1,2,4", "buffer.top_k", [0, 1, 2, 4]),
        ("sweep:num_train_worlds=150,600", "environment.num_train_worlds", [150, 600]),
        ("sweep:train_steps=100", "reasoning_model.train_steps", [100]),
        ("sweep:curriculum.synthetic_fraction_max=0,.25,1e-1", "curriculum.synthetic_fraction_max", [0, 0.25, 0.1]),
    ],
)
def test_sweeps(text, key, values):
    chosen = ab.parse_ablations(text + ",replay")
    assert list(chosen)[-1] == "replay" and len(chosen) == len(values) + 2
    section, name = key.split(".")
    for ablation, value in zip(list(chosen.values())[1:], values, strict=False):
        config = load_config(None, "alfworld", "smoke", ablation.overrides)
        assert getattr(getattr(config, section), name) == value and ablation.method == "dream"


def test_a_value_that_cannot_be_is_told_before_anything_runs(tmp_path):
    runner = Runner()
    with pytest.raises(ConfigError, match="buffer.top_k: expected"):
        run(tmp_path, "sweep:top_k=-1", [0], runner)
    with pytest.raises(ConfigError, match="workers=0"):
        run(tmp_path, "replay", [0], runner, workers=0)
    assert not runner.commands and not (tmp_path / "a.json").exists()


# ---- runs


def test_one_run_for_each_setting_and_seed(tmp_path):
    runner = Runner()
    results = run(tmp_path, "replay,dream,sweep:top_k=0,1,2", [0, 1], runner, workers=1)
    words = [overrides_of(command) for command in runner.commands]
    assert len(words) == 8  # top_k 0 and 1 are there already
    modes = [command[command.index("mode") + 1] for command in runner.commands]
    assert all(("training.control=false" in w) == (m == "dream") for w, m in zip(words, modes, strict=True))
    assert modes.count("real") == 2 and all(("synthetic_ratio=0" in w) == (m == "real") for w, m in zip(words, modes))
    said = [[w for w in word.split() if not w.startswith("training.")] for word in words[::2]]  # of seed 0
    assert [w[-1] for w in said[1:]] == ["buffer.top_k=0", "reasoning_model.refresh_every=0", "buffer.top_k=2"]
    assert "top_k" not in words[0]
    (summary,) = results.content["summary"].values()
    assert summary["buffer.top_k=1"]["minus_full"]["mean"] == 0 and summary["buffer.top_k=1"]["seeds"] == 2
    assert summary["dream"]["success"] == pytest.approx((12 + 13) / 2 / 40)  # the row of real RL


def test_what_is_done_is_not_run_again(tmp_path):
    first, second, third = Runner(), Runner(), Runner()
    run(tmp_path, "replay", [0], first)
    run(tmp_path, "replay", [0], second)
    run(tmp_path, "replay,history", [0, 1], third)
    assert len(first.commands) == 2 and not second.commands and len(third.commands) == 4
    kept = json.loads((tmp_path / "a.json").read_text())
    ((setting, summary),) = kept["summary"].items()
    assert {row["seed"] for row in kept["rows"]} == {0, 1} and len(summary) == 3
    row = kept["rows"][0]
    assert row["command"].startswith("papermill nbs/run_experiment.ipynb ") and row["commit"] == "77b9c5b"
    assert isinstance(row["seconds"], float) and "curriculum.difficulty_increment=0.5" in setting


def test_the_file_keeps_a_summary_of_each_full_method(tmp_path):
    run(tmp_path, "replay,history", [0], Runner())
    other = Setting("alfworld", "smoke", "", "reasoning_model.train_steps=7")
    ab.run_ablations(ab.parse_ablations("replay"), [0], other, tmp_path / "a.json", tmp_path / "runs", 1, Runner())
    run(tmp_path, "history", [0], Runner())  # nothing to run
    first, second = json.loads((tmp_path / "a.json").read_text())["summary"].items()
    assert list(first[1]) == ["full", "replay", "history"] and list(second[1]) == ["full", "replay"]
    assert "train_steps=7" in second[0]


def test_the_summary_is_of_all_commands_so_far(tmp_path):
    run(tmp_path, "replay,verifier+refresh,sweep:top_k=2", [0], Runner())
    run(tmp_path, "replay", [1, 2], Runner())
    kept = json.loads((tmp_path / "a.json").read_text())
    (name,) = kept["summary"]
    kept["summary"][name]["a part of long ago"] = {}  # no switch of today
    (tmp_path / "a.json").write_text(json.dumps(kept))
    run(tmp_path, "history", [2], Runner())
    found = json.loads((tmp_path / "a.json").read_text())["summary"][name]
    seeds = {"full": 3, "replay": 3, "verifier+refresh": 1, "buffer.top_k=2": 1, "history": 1}
    assert {ablation: part["seeds"] for ablation, part in found.items()} == seeds
    assert found["replay"]["minus_full"]["seeds"] == 3


def test_a_failed_run_is_noted_under_its_ablation(tmp_path):
    said = []
    results = run(tmp_path, "replay", [0, 1], Runner({("ppo", "1")}), say=said.append)
    assert sorted(f["run"] for f in results.failures) == ["full ppo-dream-seed1", "replay ppo-dream-seed1"]
    assert next(iter(results.content["summary"].values()))["replay"]["minus_full"]["seeds"] == 1
    assert any(line.startswith("replay ppo-dream-seed1: FAILED") for line in said)
    assert run(tmp_path, "replay", [0, 1], Runner()).failures == []


def test_differences_are_paired_by_seed(tmp_path):
    chosen = ab.parse_ablations("replay,history")
    stamps = {name: {seed: f"{name}{seed}" for seed in range(3)} for name in chosen}
    won = {"full": (20, 24, 30), "replay": (16, 22, 27), "history": (25,)}

    def row(name, seed, wins):
        scores = {"success": wins / 40, "low": 0, "high": 1, "n": 40, "by_type": {}, "real_transitions": 9}
        dream = {"dream_success": None, "hazard": None}
        where = {"method": "dream", "temperature": 1.0, "config_hash": f"{name}{seed}", "seed": seed}
        return scores | where | dream

    rows = [row(name, seed, wins) for name, all_ in won.items() for seed, wins in enumerate(all_)]
    found = ab.summarise_ablations(rows, chosen, stamps)
    lost, half = found["replay"]["minus_full"], 4.302653 * (1 / 40) / 3**0.5  # differences of -4, -2, -3 games
    assert lost["mean"] == pytest.approx(-3 / 40) and lost["low"] == pytest.approx(-3 / 40 - half, abs=1e-6)
    one = found["history"]["minus_full"]
    assert one == {"mean": pytest.approx(5 / 40), "low": None, "high": None, "seeds": 1, "iqm": None}
    table = ab.table_of_ablations(found)
    assert table[1]["Δ mean"] == pytest.approx(-7.5) and table[1]["paper Δ, WebShop"] == pytest.approx(-4.7)
    assert "Δ mean" not in table[0] and "paper Δ, WebShop" not in table[2]
    assert found["replay"]["pooled_minus_full"]["seeds"] == 3  # an arm of one seed leaves the others theirs
    assert "pooled_minus_full" not in found["history"]
    assert ab.summarise_ablations([], chosen, stamps) == {}


def test_clones_of_its_own_are_told_from_what_the_dream_gave():
    chosen = ab.parse_ablations("replay,abstract-state")
    stamps = {name: {seed: f"{name}{seed}" for seed in range(3)} for name in chosen}
    won = {  # of 40 games: clone, dream
        "full": [(12, 16), (14, 20), (10, 16)],
        "replay": [(12, 15), (14, 18), (10, 15)],
        "abstract-state": [(16, 17), (15, 18), (17, 17)],
    }

    def row(name, seed, method, wins):
        scores = {"success": wins / 40, "low": 0, "high": 1, "n": 40, "by_type": {}, "real_transitions": 9}
        where = {"method": method, "temperature": 1.0, "config_hash": f"{name}{seed}", "seed": seed}
        return scores | where | {"dream_success": None, "hazard": None}

    rows = [
        row(name, seed, method, wins)
        for name, pairs in won.items()
        for seed, pair in enumerate(pairs)
        for method, wins in zip(("bc", "dream"), pair, strict=True)
    ]
    found = ab.summarise_ablations(rows, chosen, stamps)
    assert found["full"]["start"] == pytest.approx(12 / 40) and found["full"]["gain"]["mean"] == pytest.approx(16 / 120)
    gains = found["abstract-state"]["gain_minus_full"]  # gains of 1, 3, 0 games against 4, 6, 6
    assert gains["mean"] == pytest.approx(-4 / 40) and gains["seeds"] == 3
    assert gains["high"] - gains["mean"] == pytest.approx(4.302653 * 3**0.5 / 40 / 3**0.5)
    assert "gain_minus_full" not in found["replay"]
    assert "pooled_minus_full" in found["replay"] and "pooled_minus_full" not in found["abstract-state"]
    raw = ab.table_of_ablations(found)[2]
    assert raw["start"] == pytest.approx(16 / 40) and raw["Δ gain mean"] == pytest.approx(-10)


def test_an_arm_on_other_seeds_leaves_the_others_their_pooled_error():
    won = {"full": {s: 20 + s for s in range(6)}, "replay": {0: 16, 1: 22, 2: 20}, "history": {0: 21, 1: 20, 2: 27}}
    won["curriculum"] = {3: 20, 4: 21, 5: 30}
    by_seed = {name: {s: {"success": w / 40} for s, w in rows.items()} for name, rows in won.items()}
    found = ab.pooled_with(by_seed)
    assert list(found) == ["replay", "history"] and found["replay"]["seeds"] == 3
    assert found == ab.pooled_with({name: rows for name, rows in by_seed.items() if name != "curriculum"})


def test_the_pooled_error_counts_each_arm_once():
    won = {"full": (20, 24, 30), "replay": (16, 22, 27), "history": (21, 27, 30), "buffer.top_k=0": (16, 22, 27)}
    by_seed = {name: {s: {"success": w / 40, "of": (w, s)} for s, w in enumerate(all_)} for name, all_ in won.items()}
    found = ab.pooled_with(by_seed)
    x = np.array([won[name] for name in ("full", "replay", "history")]) / 40
    residuals = [x[a, s] - x[a].mean() - x[:, s].mean() + x.mean() for a in range(3) for s in range(3)]
    half = 2.776445 * (sum(r * r for r in residuals) / 4 * 2 / 3) ** 0.5  # 4 degrees of freedom
    assert list(found) == ["replay", "history"] and found["history"]["arms"] == 3 and found["history"]["seeds"] == 3
    assert found["replay"]["mean"] == pytest.approx(-3 / 40)
    assert found["replay"]["high"] == pytest.approx(-3 / 40 + half, abs=1e-6)
    assert ab.pooled_with({"full": by_seed["full"], "replay": {}}) == {}


def test_a_sweep_has_the_full_method_among_its_values_in_order():
    full = ab.full_method(Setting()).load(0)
    names = ["buffer.top_k=4", "buffer.top_k=0", "reasoning_model.train_worlds=300", "reasoning_model.train_worlds=75"]
    names += ["reasoning_model.verify=true", "curriculum.synthetic_fraction_max=.5", "replay"]
    found = ab.sweeps_of({name: {"name": name} for name in ["full", *names]}, full)
    assert {key: [(value, row["name"]) for value, row in rows.items()] for key, rows in found.items()} == {
        "buffer.top_k": [("0", names[1]), ("1", "full"), ("4", names[0])],
        "reasoning_model.train_worlds": [("75", names[3]), ("300", names[2]), ("null", "full")],
        "reasoning_model.verify": [("false", "full"), ("true", names[4])],
        "curriculum.synthetic_fraction_max": [("0.25", "full"), (".5", names[5])],
    }


# ---- notebook


def papermill(tmp_path, values):
    words = [word for key, value in values.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "run_ablations.ipynb"), str(tmp_path / "o.ipynb")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment
    )


def test_the_notebook_shows_what_is_there(tmp_path):
    """All runs are done already, so it only reads, tabulates and plots."""
    pytest.importorskip("papermill")
    run(tmp_path, "replay,sweep:top_k=2", [0, 1], Runner())
    names = {"ablations": "replay,sweep:top_k=2", "seeds": "0,1", "preset": "smoke"}
    done = papermill(tmp_path, names | {"out_dir": tmp_path / "runs", "results": tmp_path / "a.json"})
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.dumps(json.loads((tmp_path / "o.ipynb").read_text(encoding="utf-8")), ensure_ascii=False)
    assert "Nothing is missing." in shown and "No run failed." in shown and "without replay" in shown
    assert (tmp_path / "runs" / "figures" / "ablations.png").stat().st_size < 50_000


def test_the_notebook_refuses_what_does_not_exist(tmp_path):
    pytest.importorskip("papermill")
    done = papermill(tmp_path, {"ablations": "reply", "preset": "smoke"})
    assert done.returncode == 1 and "did you mean 'replay'" in done.stderr
