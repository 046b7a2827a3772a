"""Effect sizes of paired differences against hand counts, the t test and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from dpgbench.stats.effect_size import paired_effect_size

nan, inf = np.nan, np.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def by_seed(values, seeds=None):
    return pd.Series(values, index=range(len(values)) if seeds is None else seeds, dtype=float)


def test_effect_size_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, d = 2. J(2) = gamma(1) / (sqrt(1) gamma(1/2)) = 1 / sqrt(pi) = 0.5642."""
    got = paired_effect_size(by_seed([2, 4, 6]), by_seed([1, 2, 3]))
    assert (got.n, got.d, got.unpaired, got.why_undefined) == (3, pytest.approx(2), 0, "")
    assert got.g == pytest.approx(2 * 0.56419, abs=1e-4)
    turned = paired_effect_size(by_seed([1, 2, 3]), by_seed([2, 4, 6]))
    assert (turned.d, turned.g, turned.low, turned.high) == pytest.approx((-got.d, -got.g, -got.high, -got.low), abs=1e-6)


def test_hedges_correction_is_near_its_usual_approximation():
    a = rng(2).normal(1, 1, 20)  # J(m) is about 1 - 3 / (4 m - 1)
    got = paired_effect_size(by_seed(a), by_seed(np.zeros(20)))
    assert got.g / got.d == pytest.approx(1 - 3 / (4 * 19 - 1), abs=1e-4)


def test_hedges_g_is_unbiased_where_d_is_not():
    """20,000 Gaussian experiments of 5 pairs with a true effect of 0.8."""
    draws = rng(3).normal(0.8, 1.0, (20_000, 5))
    d = draws.mean(axis=1) / draws.std(axis=1, ddof=1)
    one = paired_effect_size(by_seed(draws[0]), by_seed(np.zeros(5)))
    assert one.d == pytest.approx(d[0])
    standard_error = d.std() / np.sqrt(len(d))
    assert abs((d * one.g / one.d).mean() - 0.8) < 4 * standard_error and d.mean() - 0.8 > 20 * standard_error


def test_effect_size_interval_covers_at_the_nominal_rate():
    """The interval holds the true effect exactly when the t statistic lies in the middle 95% of its noncentral t distribution."""
    draws = rng(4).normal(0.8, 1.0, (4000, 5))
    t = draws.mean(axis=1) / draws.std(axis=1, ddof=1) * np.sqrt(5)
    holds = np.abs(scipy_stats.nct.cdf(t, 4, 0.8 * np.sqrt(5)) - 0.5) <= 0.475
    assert holds.mean() == pytest.approx(0.95, abs=4 * 0.0034)
    intervals = [paired_effect_size(by_seed(row), by_seed(np.zeros(5))) for row in draws[:100]]
    assert [got.low <= 0.8 <= got.high for got in intervals] == list(holds[:100])


def test_effect_size_interval_excludes_zero_exactly_when_the_t_test_does():
    for seed in range(20):
        a = rng(seed).normal(1.0, 1.0, 6)
        got = paired_effect_size(by_seed(a), by_seed(np.zeros(6)), level=0.9)
        assert (got.low > 0 or got.high < 0) == (scipy_stats.ttest_1samp(a, 0).pvalue < 0.1)


@pytest.mark.filterwarnings("error")
def test_effect_size_says_why_there_is_none():
    def of(a, b, **options):
        return paired_effect_size(by_seed(a), by_seed(b), **options)

    assert of([], []).why_undefined == "0 pairs: a standard deviation needs 2"
    one = of([1, nan], [0, 0])
    assert (one.n, one.unpaired, one.why_undefined) == (1, 1, "1 pair: a standard deviation needs 2") and np.isnan(one.d)
    two = of([1, 4], [0, 0])
    assert np.isfinite([two.d, two.low, two.high]).all() and np.isnan(two.g) and not two.why_undefined
    # 0.3 - 0.1 and 0.4 - 0.2 differ in the last bit, and their standard deviation of 1e-17 is no unit to measure in.
    for a, b in (([0.3, 0.4, 1.2], [0.1, 0.2, 1.0]), ([5, 5, 5], [5, 5, 5])):
        equal = of(a, b)
        assert "all differences are equal" in equal.why_undefined and np.isnan([equal.d, equal.g, equal.low, equal.high]).all()
    assert of([inf, 1], [0, 0]).why_undefined == "an infinite value" == of([inf, 1], [inf, 0]).why_undefined
    with pytest.raises(ValueError, match="level is 95"):
        of([1, 2], [0, 0], level=95)
    with pytest.raises(ValueError, match="side a has more than one value for seed 4"):
        paired_effect_size(by_seed([1, 2], seeds=[4, 4]), by_seed([1, 2]))


def test_a_very_large_effect_has_an_interval_around_it():
    got = paired_effect_size(by_seed([1000, 1001, 1002]), by_seed([0, 0, 0]))
    assert got.d == pytest.approx(1001) and got.low < 1001 < got.high


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_every_effect_has_an_interval_around_it(n):
    """scipy's noncentral t distribution is NaN at some noncentralities of the other sign than t, where its value is 0 or 1."""
    pattern = np.linspace(-1, 1, n) / np.std(np.linspace(-1, 1, n), ddof=1)
    for d in [*np.linspace(-40, 40, 81), 1e3, -1e3]:
        got = paired_effect_size(by_seed(pattern + d), by_seed(np.zeros(n)))
        assert got.d == pytest.approx(d, abs=1e-9) and got.low < d < got.high
