"""Plots: what is drawn, from which files, and how large."""

import subprocess
import sys

import pytest

from dreamgym.core.errors import ConfigError, DataError
from dreamgym.utils.plots import (
    method_colour,
    plot_hazard,
    plot_learning_curves,
    plot_success_by_method,
    save_figure,
    series,
)
from dreamgym.utils.statistics import wilson_interval
from dreamgym.utils.tracking import RunDir

ROWS = [
    {"iteration": i, "rollout/success": 0.5, "rollout/n": 256, "eval/success": 0.4, "eval/n": 400, "dream/hazard": 0.01}
    for i in range(5)
]


def test_curves_read_a_run_folder(tmp_path):
    with RunDir(tmp_path / "run") as run:
        for row in ROWS:
            run.log(row)
    figure = plot_learning_curves(tmp_path / "run")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["dream, n=256", "real, n=400"]
    dream, real = figure.axes[0].get_lines()  # an iteration's dreams are of the policy before its update
    assert list(dream.get_xdata()) == [-1, 0, 1, 2, 3] and list(real.get_xdata()) == [0, 1, 2, 3, 4]
    assert "share" in figure.axes[0].get_ylabel() and tuple(figure.get_size_inches()) == (5, 3)
    real_only = plot_learning_curves(ROWS, dream=None)
    assert len(real_only.axes[0].get_lines()) == 1
    assert 2_000 < save_figure(figure, tmp_path / "figures" / "curves.png").stat().st_size < 50_000


def test_missing_metric_names_those_there_are():
    with pytest.raises(DataError, match="eval/success"):
        series(ROWS, "eval/sucess")


def test_rates_without_counts_have_no_interval():
    values = series(ROWS, "eval/success")[1]
    assert all(v.low == v.value == v.high for v in values)
    assert series(ROWS, "eval/success", "eval/n")[1][0] == wilson_interval(160, 400)


def test_bars_carry_real_transitions_and_n(tmp_path):
    figure = plot_success_by_method({"dream RL": (wilson_interval(9, 20), 36_900), "mine": (wilson_interval(5, 20), 0)})
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["dream RL\n36,900", "mine\n0"]
    assert "n=20" in figure.axes[0].get_xlabel()
    assert method_colour("mine") == method_colour("mine") != method_colour("dream RL")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        save_figure(figure, tmp_path / "file" / "a.png")


def test_hazard_with_and_without_standard_error():
    assert len(plot_hazard(ROWS, limit=0.02).axes[0].get_lines()) == 2
    rows = [row | {"dream/hazard_se": 0.002} for row in ROWS]
    assert plot_hazard(rows).axes[0].get_ylabel() == "hazard (violations per step)"


def test_importing_plots_imports_no_matplotlib():
    code = "import sys, dreamgym.utils.plots, dreamgym.utils.widgets\n"
    code += "print([m for m in ('matplotlib', 'scipy', 'torch', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
