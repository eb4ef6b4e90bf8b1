"""Methods times seeds: what is run, what is kept, what is said; and the notebook that shows it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from environments.test_alfworld import file_of
from environments.test_alfworld import names as game_ids

from dreamgym.core.config import REPORTING, config_hash, load_config
from dreamgym.core.errors import ConfigError, DataError
from dreamgym.training import benchmark as bm
from dreamgym.utils.statistics import wilson_interval
from dreamgym.utils.tracking import lock_folder, write_json

ROOT = Path(__file__).resolve().parents[1]
SETTING = bm.Setting(env="alfworld", preset="smoke")
TABLES = {
    ("ppo", "real"): ("behaviour cloning", "real RL"),
    ("ppo", "dream"): ("behaviour cloning", "dream RL", "real RL"),
    ("ppo", "s2r"): ("behaviour cloning", "dream RL", "s2r RL", "real RL"),
    ("rft", "real"): ("behaviour cloning", "real RL"),
    ("sft", "real"): ("behaviour cloning", "sft agent"),
    ("dpo", "real"): ("behaviour cloning", "dpo agent"),
}
TABLES |= {(a, mode): TABLES["ppo", mode] for a in ("grpo", "rloo", "gigpo") for mode in ("real", "dream", "s2r")}


@pytest.fixture(autouse=True)
def quick_bootstrap(monkeypatch):
    """A few resamples are enough to see that intervals arrive."""
    monkeypatch.setattr(bm, "stratified_bootstrap", partial(bm.stratified_bootstrap, resamples=20))


def table_row(name, temperature, won, n=40):
    found = wilson_interval(won, n)
    scores = {"success": found.value, "low": found.low, "high": found.high, "n": n, "by_type": {"pick": [won, n]}}
    return {"method": name, "temperature": temperature, "all real transitions": 100} | scores


class Runner:
    """Stands in for papermill: writes what run_experiment would."""

    def __init__(self, fail=()):
        self.fail, self.commands, self.lock = set(fail), [], threading.Lock()

    def __call__(self, command, log_file):
        value = dict(zip(command[4::3], command[5::3], strict=True))
        with self.lock:
            self.commands.append(command)
        if (value["algorithm"], value["seed"]) in self.fail:
            raise bm.RunFailed("exit status 1: MemoryError: no room")
        names = TABLES[value["algorithm"], value["mode"]]
        seed, folder = int(value["seed"]), Path(value["out_dir"])
        (folder / "dream").mkdir(parents=True, exist_ok=True)
        metrics = {"iteration": 2, "eval/success": 0.5, "dream/success": 0.75, "dream/hazard": 0.01}
        (folder / "dream" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n" + '{"iteration": 3}\n')
        rows = [table_row(m, t, 10 + 2 * i + seed) for i, m in enumerate(names) for t in (1.0, 0.0)]
        write_json(folder / "result.json", {"rows": rows})
        write_json(folder / "run.json", {"commit": "77b9c5b"})


def run(tmp_path, methods, seeds, runner, **more):
    return bm.run_all(methods, seeds, SETTING, tmp_path / "b.json", tmp_path / "runs", start=runner, **more)


def names_of(runner):
    return sorted(Path(command[2]).name.rpartition("-")[0] for command in runner.commands)


# ---- plan


def test_the_modes_are_ordered_by_cost_and_each_contains_the_ones_before():
    for name, method in bm.METHODS.items():
        if method.algorithm == "ppo":  # what a mode finds, every dearer mode finds too
            assert method.modes == bm.MODES[bm.MODES.index(method.modes[0]) :], name


@pytest.mark.parametrize(
    ("methods", "runs"),
    [
        (["bc"], [("ppo", "real")]),
        (["real"], [("ppo", "real")]),
        (["bc", "real", "dream"], [("ppo", "dream")]),
        (["bc", "real", "dream", "s2r"], [("ppo", "s2r")]),
        (["rft", "bc"], [("rft", "real")]),
        (["bc", "dream", "rft"], [("ppo", "dream"), ("rft", "real")]),
        ([], []),
    ],
)
def test_the_fewest_runs(methods, runs):
    plan = bm.plan_runs({7: methods})
    assert [(r.algorithm, r.mode) for r in plan] == runs and all(r.seed == 7 for r in plan)
    assert sorted(m for r in plan for m in r.methods) == sorted(methods)


def test_seeds_of_one_algorithm_follow_each_other():
    plan = bm.plan_runs({0: ["dream", "rft"], 1: ["dream", "rft"], 2: ["rft"]})
    assert [(r.algorithm, r.seed) for r in plan] == [("ppo", 0), ("ppo", 1), ("rft", 2), ("rft", 0), ("rft", 1)]


def test_a_run_has_a_row_for_all_that_it_is_made_for():
    for (algorithm, mode), names in TABLES.items():
        for method in bm.METHODS.values():
            if method.algorithm in ("", algorithm) and mode in method.modes:
                assert method.row in names


def test_the_command_is_that_of_the_notebook():
    papermill = pytest.importorskip("papermill")
    setting = bm.Setting("alfworld", "cpu", "configs/alfworld.yaml", "rl.lr=0.001")
    made = bm.plan_runs({3: ["s2r"]})[0]
    command = bm.command_of(made, setting, bm.project_root() / "runs" / "x")
    assert command[:3] == ["papermill", "nbs/run_experiment.ipynb", "runs/x.ipynb"]
    assert set(command[4::3]) <= set(papermill.inspect_notebook(str(ROOT / "nbs" / "run_experiment.ipynb")))
    value = dict(zip(command[4::3], command[5::3], strict=True))
    mine = (
        "training.threads=1 training.parallel_control=false training.prepared_dir=runs/prepared training.control=false"
    )
    assert value["overrides"] == f"rl.lr=0.001 {mine}" and value["seed"] == "3"
    elsewhere = bm.command_of(made, setting, bm.project_root() / "my runs" / "x")
    assert "prepared_dir" not in " ".join(elsewhere)  # a blank would end the override


@pytest.fixture
def official_games(monkeypatch, tmp_path):
    """One official game, found as a user's is: in $ALFWORLD_DATA."""
    path = tmp_path / "data" / "json_2.1.1" / game_ids()[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(file_of(0))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "data"))
    bm.digest_of.cache_clear()
    yield tmp_path / "data"
    bm.digest_of.cache_clear()


def test_official_games_are_another_setting_wherever_they_lie(tmp_path, official_games, monkeypatch):
    named = bm.Setting(overrides=f"environment.data_dir={official_games} rl.lr=0.5")
    found, generated = bm.Setting(overrides="rl.lr=0.5"), bm.Setting(overrides="environment.data_dir=generated")
    assert named.name == found.name != generated.name and "data=" in found.name and "data=" not in generated.name
    assert str(tmp_path) not in named.name  # rows are published
    assert named.hash(0) == found.hash(0)
    assert len({setting.hash(0) for setting in (SETTING, bm.Setting(overrides="rl.lr=0.5"), generated)}) == 3
    assert bm.read_name(found.name) == ("smoke", ["rl.lr=0.5"])
    mine = SETTING.hash(0)
    monkeypatch.delenv("ALFWORLD_DATA")
    bm.digest_of.cache_clear()
    assert SETTING.hash(0) != mine and "data=" not in SETTING.name


def test_the_hash_is_that_of_the_run_but_for_the_method(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    bm.digest_of.cache_clear()
    chosen = [f"rl.algorithm={a}" for a in ("ppo", "rft")], [f"training.mode={m}" for m in ("real", "dream")]
    for algorithm, mode in zip(*chosen, strict=True):
        config = load_config(None, "alfworld", "smoke", [algorithm, "training.seed=4", mode])
        ignored = (
            "rl.algorithm rl.token_budget training.mode training.control training.parallel_control training.threads"
        )
        assert config_hash(config, (*ignored.split(), *REPORTING)) == SETTING.hash(4)
    others = [bm.Setting(preset="cpu"), bm.Setting(overrides="rl.gamma=0.5"), bm.Setting(env="webshop")]
    assert len({setting.hash(4) for setting in [SETTING, *others]}) == 4


# ---- run


def test_the_summary_is_of_all_seeds_of_the_setting(tmp_path):
    run(tmp_path, ["bc", "dream"], [0, 1], Runner())
    run(tmp_path, ["bc", "dream"], [2], Runner())
    assert json.loads((tmp_path / "b.json").read_text())["summary"]["dream_minus_bc"]["seeds"] == 3
    other = bm.Setting("alfworld", "smoke", "", "rl.lr=0.5")
    bm.run_all(["bc", "dream"], [0], other, tmp_path / "b.json", tmp_path / "runs", start=Runner())
    kept = json.loads((tmp_path / "b.json").read_text())["summary"]
    assert kept["dream_minus_bc"]["seeds"] == 1 and kept["setting"] == other.name
    nothing = Runner()
    run(tmp_path, ["bc"], [0], nothing)
    kept = json.loads((tmp_path / "b.json").read_text())["summary"]
    assert not nothing.commands and kept["dream_minus_bc"]["seeds"] == 3 and kept["setting"] == SETTING.name


def test_rows_hold_what_a_reader_needs(tmp_path):
    results = run(tmp_path, ["bc", "dream"], [0], Runner())
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["rows"] == results.rows and len(results.rows) == 6  # the real control is paid, so it is kept
    row = next(r for r in results.rows if (r["method"], r["temperature"]) == ("dream", 1.0))
    assert row["success"] == 12 / 40 and row["low"] < row["success"] < row["high"] and row["n"] == 40
    assert (row["dream_success"], row["hazard"], row["real_transitions"]) == (0.75, 0.01, 100)
    assert row["curve"] == [{"iteration": 2, "success": 0.5, "dream_success": 0.75, "hazard": 0.01}]
    assert not any("curve" in r for r in results.rows if r["temperature"] != 1.0 or r["method"] == "bc")
    assert row["split"] == SETTING.load(0).environment.eval_split and row["setting"] == "preset=smoke"
    assert row["config_hash"] == SETTING.hash(0) and row["command"].startswith("papermill nbs/run_experiment.ipynb ")
    assert isinstance(row["seconds"], float) and row["commit"] == "77b9c5b"
    bc = next(r for r in results.rows if r["method"] == "bc")
    assert bc["dream_success"] is None and bc["hazard"] is None


def test_what_is_done_is_not_run_again(tmp_path):
    first, second, third = Runner(), Runner(), Runner()
    run(tmp_path, ["bc", "dream"], [0, 1], first)
    assert names_of(first) == ["ppo-dream-seed0", "ppo-dream-seed1"]
    run(tmp_path, ["bc", "dream", "real"], [0, 1], second)
    assert second.commands == []  # not even the control, which was found beside
    run(tmp_path, ["bc", "dream", "rft"], [0, 1, 2], third)
    assert names_of(third) == ["ppo-dream-seed2", "rft-real-seed0", "rft-real-seed1", "rft-real-seed2"]


def test_a_finished_run_is_read_even_if_the_file_is_gone(tmp_path):
    run(tmp_path, ["bc", "dream"], [0], Runner())
    (tmp_path / "b.json").unlink()
    again = Runner()
    results = run(tmp_path, ["bc", "dream"], [0], again)
    assert again.commands == [] and len(results.rows) == 6
    assert {(row["seconds"], row["commit"]) for row in results.rows} == {(None, "77b9c5b")}


def test_a_finished_run_without_the_control_goes_on_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, ("ppo", "dream"), ("behaviour cloning", "dream RL"))
    run(tmp_path, ["bc", "dream"], [0], Runner())
    (tmp_path / "b.json").unlink()
    monkeypatch.undo()
    again = Runner()
    results = run(tmp_path, ["bc", "dream", "real"], [0], again)
    assert names_of(again) == ["ppo-dream-seed0"] and "training.control=false" not in str(again.commands)
    assert {row["method"] for row in results.rows} == {"bc", "dream", "real"} and not results.failures


def test_another_setting_is_another_benchmark_in_the_same_file(tmp_path):
    run(tmp_path, ["bc"], [0], Runner())
    other, runner = bm.Setting(preset="smoke", overrides="rl.gamma=0.5"), Runner()
    results = bm.run_all(["bc"], [0], other, tmp_path / "b.json", tmp_path / "runs", start=runner)
    assert len(runner.commands) == 1 and {r["setting"] for r in results.rows} == {"preset=smoke rl.gamma=0.5"}
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 8


def test_a_failed_run_is_noted_and_hurts_no_other(tmp_path):
    said = []
    results = run(tmp_path, ["bc", "dream"], [0, 1, 2], Runner({("ppo", "1")}), say=said.append)
    assert {row["seed"] for row in results.rows} == {0, 2}
    (failure,) = results.content["failures"]
    assert failure["run"] == "ppo-dream-seed1" and failure["methods"] == ["bc", "dream"]
    assert "MemoryError: no room" in failure["error"] and any("FAILED" in line for line in said)
    again = run(tmp_path, ["bc", "dream"], [0, 1, 2], Runner({("ppo", "1")}))
    assert len(again.content["failures"]) == 1
    fixed = run(tmp_path, ["bc", "dream"], [0, 1, 2], Runner())
    assert fixed.content["failures"] == [] and fixed.content["summary"]["dream"]["seeds"] == 3


def test_a_run_without_its_row_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, ("ppo", "s2r"), TABLES["ppo", "dream"])
    results = run(tmp_path, ["s2r"], [0], Runner())
    assert "no row for s2r" in results.content["failures"][0]["error"] and results.rows == []


def test_a_run_whose_test_games_were_all_aborted_is_a_failure(tmp_path):
    def aborted(command, log_file):
        Runner()(command, log_file)
        file = Path(dict(zip(command[4::3], command[5::3], strict=True))["out_dir"]) / "result.json"
        rows = json.loads(file.read_text())["rows"]
        write_json(file, {"rows": [row | {"n": 0, "success": math.nan, "low": 0.0, "high": 1.0} for row in rows]})

    results = run(tmp_path, ["dream"], [0], aborted)
    (failure,) = results.content["failures"]
    assert "all test games of behaviour cloning were aborted" in failure["error"] and results.rows == []


def test_a_seed_counts_once_however_often_it_was_run(tmp_path):
    rows = run(tmp_path, ["bc", "dream"], [0, 1], Runner()).rows
    older = [row | {"config_hash": "older", "success": 0.9} for row in rows]  # before a default changed
    assert bm.table_of([*older, *rows]) == bm.table_of(rows) and bm.table_of(rows)[0]["seeds"] == 2


def test_workers_run_at_the_same_time(tmp_path):
    meet, runner = threading.Barrier(2, timeout=10), Runner()

    def together(command, log_file):
        meet.wait()
        runner(command, log_file)

    run(tmp_path, ["bc"], [0, 1], together, workers=2)
    assert len(runner.commands) == 2


def test_the_file_is_whole_after_each_run(tmp_path):
    seen, runner = [], Runner()

    def watched(command, log_file):
        file = tmp_path / "b.json"
        seen.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        runner(command, log_file)

    run(tmp_path, ["bc"], [0, 1, 2], watched, workers=1)
    assert seen == [0, 4, 8]


def test_an_interrupt_starts_no_other_run(tmp_path):
    begun = []

    def interrupted(command, log_file):
        begun.append(command)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["bc"], range(20), interrupted, workers=1)
    assert len(begun) < 20
    assert names_of(after := Runner()) == [] and len(run(tmp_path, ["bc"], [0], after).rows) == 4


def test_two_benchmarks_cannot_share_a_folder(tmp_path):
    (tmp_path / "runs").mkdir()
    lock = lock_folder(tmp_path / "runs")
    with pytest.raises(ConfigError, match="in use"):
        run(tmp_path, ["bc"], [0], Runner())
    lock.close()


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    for text in ("{torn", "[]", '{"rows": 3}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(DataError, match="expected the JSON of a benchmark"):
            run(tmp_path, ["bc"], [0], Runner())
        assert (tmp_path / "b.json").read_text() == text


@pytest.mark.parametrize(
    ("call", "text"), [(bm.parse_methods, "bc,drem"), (bm.parse_methods, " ,"), (bm.parse_seeds, "1.5")]
)
def test_bad_lists(call, text):
    with pytest.raises(ConfigError, match="expected|Valid"):
        call(text)
    assert bm.parse_seeds(3) == [3]  # papermill makes a number of '-p seeds 3'


def test_a_failing_process_tells_its_error(tmp_path):
    code = tmp_path / "dies_of_a_test.py"
    code.write_text("print('starting')\nraise RuntimeError('out of luck')\n")
    paths = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{paths}")
        with pytest.raises(bm.RunFailed, match="exit status 1: RuntimeError: out of luck"):
            bm.execute(["dies_of_a_test"], tmp_path / "log" / "run.log")
    assert "starting" in (tmp_path / "log" / "run.log").read_text()


# ---- summary


def test_differences_are_taken_seed_by_seed(tmp_path):
    results = run(tmp_path, ["bc", "dream"], [0, 1, 2], Runner())
    summary = results.content["summary"]
    assert summary["temperature"] == 1.0 and summary["setting"] == "preset=smoke"
    assert summary["bc"]["mean"] == pytest.approx(11 / 40) and summary["bc"]["n"] == 120
    half = 4.302653 * (1 / 40) / 3**0.5
    assert summary["bc"]["high"] == pytest.approx(11 / 40 + half, abs=1e-6)
    found = summary["dream_minus_bc"]  # the same in every seed, so without spread
    iqm = dict.fromkeys(("value", "low", "high"), pytest.approx(0.05))
    expected = {"mean": pytest.approx(0.05), "low": pytest.approx(0.05), "high": pytest.approx(0.05), "seeds": 3}
    assert found == expected | {"iqm": iqm}
    assert "bc_minus_bc" not in summary and "real_minus_bc" in summary


def test_one_seed_has_the_interval_of_its_games_and_no_difference_interval(tmp_path):
    summary = run(tmp_path, ["bc", "dream"], [0], Runner()).content["summary"]
    expected = wilson_interval(10, 40)
    assert (summary["bc"]["low"], summary["bc"]["high"]) == (expected.low, expected.high)
    assert summary["bc"]["iqm"] is None and summary["dream_minus_bc"]["low"] is None


def test_only_shared_seeds_are_compared(tmp_path):
    run(tmp_path, ["bc", "dream"], [0], Runner())
    results = run(tmp_path, ["bc"], [0, 1], Runner())  # seed 1 has no dream
    assert results.content["summary"]["dream_minus_bc"]["seeds"] == 1
    assert results.content["summary"]["bc"]["seeds"] == 2


def test_interquartile_mean_over_types_and_seeds():
    def row(seed, pick, heat):
        return {"by_type": {"pick": [pick, 10], "heat": [heat, 10]}, "seed": seed}

    two = [row(0, 2, 8), row(1, 4, 6)]
    found = bm.over_types(two)
    assert found["value"] == pytest.approx(0.5)  # of .2 .4 .6 .8 the middle two
    ends = pytest.approx(0.4), pytest.approx(0.6)  # .2 .2 or .4 .4, beside .6 .6 or .8 .8
    assert (found["low"], found["high"]) == ends
    assert bm.over_types([row(0, 2, 8)]) is None


def test_interquartile_mean_of_differences_is_taken_type_by_type():
    def row(seed, pick, heat):
        return {"by_type": {"heat": [heat, 20], "pick": [pick, 10]}, "seed": seed, "success": (pick + heat) / 30}

    mine, base = [row(0, 5, 10), row(1, 9, 0)], [row(0, 2, 8), row(1, 4, 12)]
    assert bm.over_types(mine, base)["value"] == pytest.approx((0.3 + 0.1) / 2)  # of -.6, .1, .3, .5
    found = bm.compare(mine, base)
    assert found["iqm"] == bm.over_types(mine, base)
    assert found["mean"] == pytest.approx((5 / 30 - 7 / 30) / 2) and found["seeds"] == 2
    with pytest.raises(ValueError):
        bm.over_types(mine, base[:1])
    other = [r | {"by_type": {"heat": r["by_type"]["heat"], "cool": [1, 2]}} for r in base]  # another set of types
    assert bm.over_types(mine, other)["value"] == pytest.approx((0.1 - 0.6) / 2)


def test_the_table_has_a_line_for_each_method(tmp_path):
    results = run(tmp_path, ["bc", "dream", "rft"], [0, 1], Runner())
    table = bm.table_of(results.rows)
    assert [line["method"] for line in table] == ["behaviour cloning", "real PPO", "dream PPO", "expert iteration"]
    assert table[2]["hazard"] == pytest.approx(0.01) and table[0]["hazard"] is None and table[0]["seeds"] == 2


# ---- notebook


def test_the_notebook_tabulates_what_is_there(tmp_path):
    """All runs are done already, so it only reads, tabulates and plots."""
    pytest.importorskip("papermill")
    out, file = tmp_path / "runs", tmp_path / "b.json"
    bm.run_all(["bc", "dream"], [0, 1], SETTING, file, out, start=Runner())
    before = file.read_text()
    values = {"methods": "bc,dream", "seeds": "0,1", "preset": "smoke", "out_dir": out, "results": file}
    words = [word for key, value in values.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "run_benchmark.ipynb"), str(tmp_path / "o.ipynb")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.dumps(json.loads((tmp_path / "o.ipynb").read_text(encoding="utf-8")), ensure_ascii=False)
    assert "Nothing is missing." in shown and "No run failed." in shown
    assert "dream PPO − behaviour cloning: +5.0 points [+5.0, +5.0], 2 seeds" in shown
    assert (out / "figures" / "success.png").stat().st_size < 50_000
    assert file.read_text() == before
