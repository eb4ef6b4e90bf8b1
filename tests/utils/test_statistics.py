"""Statistics against scipy, against numbers worked by hand, and by coverage in simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from dreamgym.utils.statistics import (
    first_violation_hazard,
    interquartile_mean,
    paired_difference,
    stratified_bootstrap,
    wilson_interval,
)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (3, 7), (184, 400), (400, 400)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(successes, n, confidence):
    ours, theirs = wilson_interval(successes, n, confidence), binomtest(successes, n)
    low, high = theirs.proportion_ci(confidence, method="wilson")
    assert math.isclose(ours.low, low, abs_tol=1e-12) and math.isclose(ours.high, high, abs_tol=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 and ours.n == n


def test_wilson_covers():
    rng = np.random.default_rng(0)
    hits = [wilson_interval(int(k), 100) for k in rng.binomial(100, 0.45, 2000)]
    assert 0.93 < np.mean([e.low <= 0.45 <= e.high for e in hits]) < 0.97


def test_interquartile_mean_ignores_the_tails():
    assert interquartile_mean([-1e9, 1, 2, 3, 4, 5, 6, 1e9]) == 3.5
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean([])


def test_bootstrap_is_repeatable_and_stratified():
    data = np.random.default_rng(1).normal(size=(4, 50))
    assert (
        stratified_bootstrap(data, seed=3) == stratified_bootstrap(data, seed=3) != stratified_bootstrap(data, seed=4)
    )
    apart = stratified_bootstrap([[0.0] * 9, [1.0] * 9], np.mean)
    assert apart.low == apart.high == 0.5
    covered = [
        stratified_bootstrap(np.random.default_rng(i).normal(size=(2, 30)), np.mean, 400, seed=i) for i in range(200)
    ]
    assert 0.88 < np.mean([e.low <= 0 <= e.high for e in covered]) < 0.99
    with pytest.raises(ValueError, match="empty"):
        stratified_bootstrap([[1.0], []])


def test_paired_difference_equals_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    ours, theirs = paired_difference(a, b), ttest_rel(a, b).confidence_interval(0.95)
    assert math.isclose(ours.low, theirs.low) and math.isclose(ours.high, theirs.high) and ours.n == 40
    with pytest.raises(ValueError, match="same games"):
        paired_difference([1.0], [0.0])


def test_hazard_by_hand_and_by_simulation():
    hazard = first_violation_hazard([True, False, True, False], [2, 5, 1, 2])
    assert hazard.value == 0.2 and math.isclose(hazard.se, math.sqrt(4 / 3 * 2.16) / 10)
    rng = np.random.default_rng(3)
    until = rng.geometric(0.05, (1000, 128))
    sets = [first_violation_hazard(u <= 30, np.minimum(u, 30)).estimate for u in until]
    assert 0.92 < np.mean([e.low <= 0.05 <= e.high for e in sets]) < 0.97
    clean = first_violation_hazard([False] * 128, [30] * 128)
    assert clean.value == clean.se == 0 and 0 < clean.estimate.high < 0.001
    for bad in (([True], [1]), ([True, False], [1, 0]), ([2, 0], [1, 1]), ([True, False], [1])):
        with pytest.raises(ValueError, match="hazard|lengths"):
            first_violation_hazard(*bad)
