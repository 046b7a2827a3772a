"""dpgbench.stats.over_seeds against numbers worked out by hand, brute force and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpgbench.stats.over_seeds import MONTE_CARLO_DRAWS, _drawn_signed_sums, mean_interval, paired_difference, smallest_sign_flip_p


def test_t_interval_equals_the_hand_computed_one():
    """Values 1, 2, 3, 4, 5: mean 3; squared deviations 4+1+0+1+4 = 10, variance 10/4 = 2.5, standard error sqrt(2.5/5) = 0.7071;
    t table, 4 degrees of freedom, 97.5%: 2.776; half-width 2.776 * 0.7071 = 1.963."""
    got = mean_interval([1, 2, 3, 4, 5])
    assert (got.n, got.missing) == (5, 0)
    assert (got.mean, got.low, got.high) == pytest.approx((3, 3 - 1.963, 3 + 1.963), abs=1e-3)


def test_another_level_takes_another_quantile():
    """Values 0 and 2: mean 1, standard error sqrt(2/2) = 1; t table, 1 degree of freedom: 6.314 at 90%, 12.706 at 95%."""
    assert mean_interval([0, 2], level=0.90).high == pytest.approx(1 + 6.314, abs=1e-3)
    assert mean_interval([0, 2]).high == pytest.approx(1 + 12.706, abs=1e-3)


def test_nan_is_counted_and_not_averaged():
    got = mean_interval([1.0, np.nan, 3.0])
    assert (got.n, got.missing, got.mean) == (2, 1, 2.0)
    assert mean_interval(pd.Series([1.0, None, 3.0])) == got


def test_one_value_has_a_mean_and_no_interval():
    got = mean_interval([0.5])
    assert (got.n, got.mean) == (1, 0.5) and np.isnan(got.low) and np.isnan(got.high)


@pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
def test_no_value_gives_nan_and_no_warning(values):
    got = mean_interval(values)
    assert got.n == 0 and got.missing == len(values) and np.isnan([got.mean, got.low, got.high]).all()


@pytest.mark.filterwarnings("error")
def test_an_infinite_value_is_not_dropped():
    got = mean_interval([1.0, np.inf])
    assert (got.n, got.mean) == (2, np.inf) and np.isnan(got.low)
    assert np.isnan(mean_interval([np.inf, -np.inf]).mean)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_0_1_is_refused(level):
    with pytest.raises(ValueError, match=f"level is {level}"):
        mean_interval([1, 2], level=level)


def test_interval_covers_at_the_nominal_rate_with_five_seeds():
    """20,000 Gaussian experiments of 5 seeds: the share of 95% intervals that hold the true mean has standard error 0.0015."""
    draws = np.random.default_rng(20260501).normal(loc=3.0, scale=2.0, size=(20_000, 5))
    half_width = 2.7764451 * draws.std(axis=1, ddof=1) / np.sqrt(5)
    assert (abs(draws.mean(axis=1) - 3.0) <= half_width).mean() == pytest.approx(0.95, abs=4 * 0.0015)
    covered = [got.low <= 3.0 <= got.high for got in map(mean_interval, draws[:4000])]  # the function itself; standard error 0.0034
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * 0.0034)


def by_seed(values, seeds=None):
    return pd.Series(values, index=range(len(values)) if seeds is None else seeds, dtype=float)


def test_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, standard error 0.5774, t (2 degrees of freedom) 4.303, half-width 2.484.
    All the same sign: of 8 patterns only +++ and --- are as extreme, p = 2/8 = 0.25, which is also the least 3 pairs can reach."""
    got = paired_difference(by_seed([2, 4, 6]), by_seed([1, 2, 3]))
    assert (got.n, got.mean, got.p, got.smallest_p, got.unpaired, got.exact) == (3, 2.0, 0.25, 0.25, 0, True)
    assert (got.low, got.high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
def test_sign_flip_p_equals_brute_force(n):
    generator = np.random.default_rng(n)
    a, b = generator.normal(0.7, 1, n), generator.normal(0, 1, n)
    if n == 5:
        a, b = np.array([0.1, 0.3, -0.2, 0.3, 0.1]), np.zeros(5)  # ties between patterns, not representable in binary
    d = a - b
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
    expected = sum(s >= abs(sum(d)) - 1e-9 for s in sums) / 2**n
    got = paired_difference(by_seed(a), by_seed(b))
    assert got.p == expected and got.smallest_p == 2 / 2**n and got.p >= got.smallest_p


def test_six_pairs_are_the_first_that_can_reach_five_percent():
    assert next(n for n in range(1, 10) if smallest_sign_flip_p(n) < 0.05) == 6
    assert paired_difference(by_seed(range(1, 7)), by_seed([0] * 6)).p == 0.03125


def test_only_seeds_both_have_are_paired_whatever_their_order():
    a = by_seed([10, 20, np.nan, 40], seeds=[3, 1, 2, 9])
    b = by_seed([1, 2, 3], seeds=[1, 2, 3])
    got = paired_difference(a, b)  # seed 1: 20 - 1, seed 3: 10 - 3; seed 2 is NaN in a, seed 9 is not in b
    assert (got.n, got.mean, got.unpaired) == (2, 13.0, 2)


def test_no_common_seed_and_no_difference():
    nothing = paired_difference(by_seed([1], seeds=[0]), by_seed([1], seeds=[1]))
    assert nothing.n == 0 and nothing.unpaired == 2 and np.isnan([nothing.mean, nothing.p, nothing.smallest_p]).all()
    equal = paired_difference(by_seed([1, 2, 3]), by_seed([1, 2, 3]))
    assert (equal.mean, equal.low, equal.high, equal.p) == (0, 0, 0, 1)


def test_above_twelve_pairs_the_named_generator_decides():
    a, b = by_seed(np.linspace(-1.0, 2.0, 13)), by_seed(np.zeros(13))
    with pytest.raises(ValueError, match=r"13 pairs: above 12 .* needs `generator`"):
        paired_difference(a, b)
    first, second = (paired_difference(a, b, generator=np.random.default_rng(7)) for _ in range(2))
    assert first == second and not first.exact
    signs = 1 - 2 * ((np.arange(2**13)[:, None] >> np.arange(13)) & 1)
    enumerated = (abs(signs @ a.to_numpy()) >= abs(a.sum()) - 1e-9).mean()
    assert first.p == pytest.approx(enumerated, abs=4 * np.sqrt(enumerated * (1 - enumerated) / 20_000))
    assert first.smallest_p == 2 / 2**13


@pytest.mark.filterwarnings("error")
def test_the_paired_t_test_beside_it():
    """Differences 1, 2, 3: t = 2 / 0.5774 = 3.464, two degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 0.0742; else scipy's."""
    assert paired_difference(by_seed([2, 4, 6]), by_seed([1, 2, 3])).t_p == pytest.approx(0.07418, abs=1e-5)
    generator = np.random.default_rng(4)
    for n in (2, 6, 9, 12):
        a, b = generator.normal(0.8, 1, n), generator.normal(0, 1, n)
        assert paired_difference(by_seed(a), by_seed(b)).t_p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert paired_difference(by_seed([1, 2]), by_seed([1, 2])).t_p == 1, "no difference at all"
    for without in (([0.1 + 0.2, 0.3], [0.3 - 1, 0.3 - 1]), ([3.0], [1.0]), ([np.inf, 1.0], [0.0, 0.0]), ([], [])):
        assert np.isnan(paired_difference(by_seed(without[0]), by_seed(without[1])).t_p), without


def test_a_seed_given_twice_is_refused():
    with pytest.raises(ValueError, match="side b has more than one value for seed 4"):
        paired_difference(by_seed([1, 2]), by_seed([1, 2], seeds=[4, 4]))


@pytest.mark.filterwarnings("error")
def test_an_infinite_difference_has_no_p():
    got = paired_difference(by_seed([np.inf, 1]), by_seed([0, 0]))
    assert got.n == 2 and got.mean == np.inf and np.isnan(got.p)


def test_drawn_signs_are_fair_and_independent():
    """Values 1, 2, 4, ..., 2**18: a sum tells all 19 signs, two whole bytes and a part of one. Standard error of a mean sign, and of a
    product of two: 0.0071; of the 190 of them none should be beyond 5."""
    sums = _drawn_signed_sums(2.0 ** np.arange(19), np.random.default_rng(5))
    patterns = ((sums + 2**19 - 1) / 2).astype(int)  # bit i is set where value i counts as positive
    signs = 2 * ((patterns[:, None] >> np.arange(19)) & 1) - 1
    assert len(sums) == MONTE_CARLO_DRAWS and (signs @ 2.0 ** np.arange(19) == sums).all()
    assert np.abs(signs.mean(axis=0)).max() < 5 * 0.0071
    products = signs.T @ signs / len(signs) - np.eye(19)
    assert np.abs(products).max() < 5 * 0.0071
