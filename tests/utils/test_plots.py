"""Plots: what is drawn, from which files, and how large."""

import subprocess
import sys

import pytest

from dreamgym.core.errors import ConfigError, DataError
from dreamgym.training.benchmark import METHODS
from dreamgym.utils.plots import (
    COLOURS,
    OTHER_COLOURS,
    hazard_estimate,
    method_colour,
    plot_hazard,
    plot_learning_curves,
    plot_success_by_method,
    save_figure,
    series,
)
from dreamgym.utils.statistics import first_violation_hazard, wilson_interval
from dreamgym.utils.tracking import RunDir

ROWS = [
    {"iteration": i, "rollout/success": 0.9, "rollout/n": 256, "eval/success": 0.4, "eval/n": 400, "dream/hazard": 0.01}
    for i in range(5)
]
GAP = {"dream/success": 0.5, "dream/real_success": 0.25, "dream/gap_n": 64}


def test_curves_read_a_run_folder(tmp_path):
    with RunDir(tmp_path / "run") as run:
        for row in ROWS:
            run.log(row | (GAP if row["iteration"] in (2, 4) else {}))
    figure = plot_learning_curves(tmp_path / "run")
    names = ["dream, training tasks, n=64", "real, the same tasks, n=64", "real, validation games, n=400"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names
    dream, real, games = figure.axes[0].get_lines()  # dreams, and their tasks for real, are played before the update
    assert list(dream.get_xdata()) == list(real.get_xdata()) == [1, 3] and list(games.get_xdata()) == [0, 1, 2, 3, 4]
    assert [set(line.get_ydata()) for line in (dream, real, games)] == [{0.5}, {0.25}, {0.4}]
    assert len({line.get_color() for line in (dream, real, games)}) == 3
    assert "share" in figure.axes[0].get_ylabel() and tuple(figure.get_size_inches()) == (5, 3)
    assert 2_000 < save_figure(figure, tmp_path / "figures" / "curves.png").stat().st_size < 50_000


def test_a_run_without_dreams_has_no_line_of_a_dream():
    """Rollouts of a real arm, or of one whose dreams were never measured, are no dreams."""
    (line,) = plot_learning_curves(ROWS).axes[0].get_lines()
    assert line.get_label().startswith("real, validation games")
    with pytest.raises(DataError, match="eval/success"):
        plot_learning_curves([{"iteration": 1, "rollout/success": 0.5, "rollout/n": 8}])


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
    assert method_colour("mine") != method_colour("dream RL") == method_colour("dream PPO")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        save_figure(figure, tmp_path / "file" / "a.png")


def test_hazard_with_and_without_standard_error():
    assert len(plot_hazard(ROWS, limit=0.02).axes[0].get_lines()) == 2
    rows = [row | {"dream/hazard_se": 0.002, "dream/gap_n": 64} for row in ROWS]
    axes = plot_hazard(rows).axes[0]
    assert axes.get_ylabel() == "hazard (violations per step)"
    (line,) = axes.get_lines()  # the dreams of iteration 0 are those of its policy
    assert list(line.get_xdata()) == [-1, 0, 1, 2, 3] and line.get_label() == "first violations, n=64"
    assert hazard_estimate(rows[0]).high == pytest.approx(0.01 + 1.96 * 0.002, abs=1e-5)


@pytest.mark.parametrize("violated", [[False] * 10, [True] * 3 + [False] * 7])
def test_the_band_of_the_hazard_is_that_of_its_estimate(violated):
    """Ten dreams of thirty steps without a violation leave up to 3 / 300, not nothing."""
    found = first_violation_hazard(violated, [30] * 10)
    row = {"iteration": 1, "dream/hazard": found.value, "dream/hazard_se": found.se, "dream/hazard_steps": found.steps}
    assert hazard_estimate(row | {"dream/gap_n": 10}) == found.estimate
    band = plot_hazard([row]).axes[0].collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((found.estimate.low, found.estimate.high)) and band.ymax > 0


def test_every_method_has_a_colour_of_its_own():
    labels = [method.label for method in METHODS.values()]
    assert len({method_colour(label) for label in labels}) == len(labels) and {*labels} <= {*COLOURS}
    mine = {"behaviour cloning", "dream RL", "real RL", "s2r RL", "sft agent", "dpo agent"}  # of run_experiment
    assert len({method_colour(name) for name in mine}) == len(mine) and {m.row for m in METHODS.values()} == mine
    assert not {*OTHER_COLOURS} & {*COLOURS.values()} and method_colour("s2r RL") == method_colour("S2R")


def test_importing_plots_imports_no_matplotlib():
    code = "import sys, dreamgym.utils.plots, dreamgym.utils.widgets\n"
    code += "print([m for m in ('matplotlib', 'scipy', 'torch', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
