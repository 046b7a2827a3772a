"""Claims over several comparisons: against hand counts, a loop and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.multiple_testing import better_than_all, difference_over_tasks
from dpgbench.stats.over_seeds import paired_difference


def series(*values, first=0):
    return pd.Series(values, index=range(first, first + len(values)), dtype=float)


def against(*differences):
    return paired_difference(series(*differences), series(*[0.0] * len(differences)))


def test_over_tasks_by_hand():
    """Means over the two tasks by seed: 0.2, 0.3, 0.4; mean 0.3, sd 0.1, half-width 4.3027 / sqrt(3) x 0.1 = 0.248; p = 2/8."""
    found = difference_over_tasks({"qr": series(0.1, 0.5, 0.2), "uuid": series(0.3, 0.1, 0.6)})
    d = found.difference
    assert (d.n, d.mean, d.p) == (3, pytest.approx(0.3), 0.25) and (d.low, d.high) == pytest.approx((0.0516, 0.5484), abs=1e-4)
    assert found.tasks == ("qr", "uuid") and found.left_out == ()


def test_seeds_that_a_task_lacks_are_left_out_and_named():
    found = difference_over_tasks({"qr": series(0.1, np.nan, 0.2, 0.3), "uuid": series(0.3, 0.1, first=1)})
    assert found.left_out == (0, 1, 3) and found.difference.n == 1 and found.difference.mean == pytest.approx(0.15)
    assert difference_over_tasks({}).difference.n == 0
    endless = difference_over_tasks({"qr": series(np.inf, 1.0), "uuid": series(0.0, 1.0)}).difference
    assert endless.n == 2 and endless.mean == np.inf and np.isnan(endless.p), "a diverged seed is a value, not a hole"
    assert difference_over_tasks({"qr": series(0.1), "uuid": series(0.1, first=1)}).difference.n == 0
    with pytest.raises(ValueError, match="task qr has more than one value for a seed"):
        difference_over_tasks({"qr": pd.Series([1.0, 2.0], index=[0, 0])})


def test_better_than_all_by_hand():
    """p of 1, 2, 3 is 2/8; of 3, -1, 1 the sums are +-3, +-5, +-1, +-3 (|sum| >= 3: six of eight). The larger is the claim's."""
    clear, hard = against(1, 2, 3), against(3, -1, 1)  # t tests: 0.074; t = 1 / (2 / sqrt(3)) = 0.866, p = 1 - t / sqrt(t^2 + 2) = 0.478
    assert (clear.p, hard.p) == (0.25, 0.75)
    found = better_than_all({"base": clear, "naive": hard})
    assert (found.p, found.hardest, found.n, found.ahead) == (0.75, "naive", 3, True) and found.t_p == pytest.approx(0.4778, abs=1e-4)
    behind = better_than_all({"base": clear, "naive": against(-1, -2, -3)})
    assert (behind.p, behind.hardest, behind.ahead, behind.t_p) == (1.0, "naive", False, 1.0)
    assert better_than_all({"twin": against(0, 0, 0)}).p == 1.0, "the same is not better"
    unknown = better_than_all({"base": clear, "naive": against()})
    assert np.isnan([unknown.p, unknown.t_p]).all() and unknown.hardest == "naive" and unknown.n == 0 and not unknown.ahead
    with pytest.raises(ValueError, match="at least one rival"):
        better_than_all({})


@pytest.mark.parametrize("tied", [2, 3, 6])
def test_picking_the_best_and_testing_it_keeps_the_level(tied):
    """1,500 experiments, 8 seeds, `tied` equal methods and two worse ones: a false winner at most 5% of the time (4 standard errors).

    With two tied methods the level is the sign-flip test's own, 12/256 = 0.047; with more it is far below.
    """
    rng, wrong, experiments = np.random.default_rng(tied), 0, 1500
    signs = 1 - 2 * ((np.arange(2**8)[:, None] >> np.arange(8)) & 1)
    for number in range(experiments):
        scores = rng.normal(0, 1, (tied + 2, 8)) - np.repeat([0, 3], [tied, 2])[:, None]
        best = scores.mean(1).argmax()
        differences = np.delete(scores[best] - scores, best, axis=0)
        sums = np.abs(differences @ signs.T)
        p = (sums >= sums[:, :1] - 1e-12).mean(1).max()
        if number < 10:  # the function itself says the same
            assert better_than_all({str(i): against(*row) for i, row in enumerate(differences)}).p == pytest.approx(p)
        wrong += p <= 0.05
    margin = 4 * np.sqrt(0.05 * 0.95 / experiments)
    assert wrong / experiments <= 0.05 + margin
    assert (wrong / experiments > 0.02) == (tied == 2)


def test_tasks_that_share_a_seeds_luck_do_not_spoil_the_test():
    """What a seed does to all six tasks alike is not six observations: size 2/64 at 6 seeds, as for one task. Each task by itself and its
    seed as a unit of its own, 36 of them, would reject far too often."""
    rng, experiments, found, naive = np.random.default_rng(5), 1500, 0, 0
    signs = 1 - 2 * ((np.arange(2**6)[:, None] >> np.arange(6)) & 1)
    for number in range(experiments):
        scores = rng.normal(0, 1, 6) + rng.normal(0, 0.5, (6, 6))  # tasks x seeds
        sums = np.abs(signs @ scores.mean(0))
        p = (sums >= sums[0] - 1e-12).mean()
        if number < 10:
            got = difference_over_tasks({str(i): series(*row) for i, row in enumerate(scores)})
            assert got.difference.p == pytest.approx(p)
        found += p <= 0.05
        z = scores.sum() / np.sqrt((scores**2).sum())
        naive += abs(z) > 1.96
    assert found / experiments == pytest.approx(2 / 64, abs=4 * np.sqrt(0.03 * 0.97 / experiments))
    assert naive / experiments > 0.2
