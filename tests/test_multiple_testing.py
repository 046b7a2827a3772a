"""Holm's adjustment against hand counts, closed testing enumerated and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.over_seeds import smallest_sign_flip_p

nan, inf = np.nan, np.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def test_holm_by_hand():
    """In order: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, and 0.04 x 1 = 0.04, which may not be below 0.06 before it."""
    got = holm([0.01, 0.04, 0.03, 0.005])
    assert got.p == pytest.approx([0.03, 0.06, 0.06, 0.02]) and (got.tests, got.missing) == (4, 0)


def test_holm_equals_closed_testing_enumerated():
    """Holm is the closure of Bonferroni: the adjusted p of i is the largest |I| min(p in I) over all families I that hold i."""
    for seed in range(20):
        p = rng(seed).uniform(0, 0.5, 6)
        p[3] = p[1]  # a tie
        families = [family for size in range(1, 7) for family in itertools.combinations(range(6), size)]
        expected = [max(min(1.0, len(family) * min(p[list(family)])) for family in families if i in family) for i in range(6)]
        assert holm(p).p == pytest.approx(expected)


def test_holm_keeps_nan_out_of_the_family_and_the_index_of_a_series():
    got = holm(pd.Series([0.02, None, 0.5], index=["dpg", "oracle", "best"]))
    assert got.p.to_dict() == pytest.approx({"dpg": 0.04, "oracle": nan, "best": 0.5}, nan_ok=True)
    assert (got.tests, got.missing) == (2, 1)
    nothing = holm([nan, nan])
    assert np.isnan(nothing.p).all() and (nothing.tests, nothing.missing) == (0, 2)
    assert holm([]).p.shape == (0,) and holm([0.03]).p == [0.03]
    assert holm([[0.01, 0.5], [nan, 0.3]]).p.shape == (2, 2)


def test_holm_of_the_smallest_reachable_ps_bounds_what_the_data_can_give():
    """Five comparisons of six seeds each: 2 / 2**6 x 5 = 0.156, so no result of theirs can be below 0.05."""
    smallest = np.full(5, smallest_sign_flip_p(6))
    bound = holm(smallest).p
    assert bound == pytest.approx([5 / 32] * 5)
    for seed in range(50):
        reachable = smallest * rng(seed).integers(1, 33, 5)
        assert (holm(reachable).p >= bound).all()


@pytest.mark.parametrize("bad", [-0.1, 1.5, inf])
def test_holm_refuses_what_is_no_p_value(bad):
    with pytest.raises(ValueError, match=rf"a p-value is {bad}, .* between 0 and 1; leave"):
        holm([0.5, bad])


def test_holm_holds_the_family_wise_error_under_the_null():
    """Five independent true nulls: some adjusted p is <= 0.05 with probability 1 - (1 - 0.05/5)^5 = 0.0490; equal ones: 0.05/5."""
    p = rng(1).uniform(size=(4000, 5))
    assert np.mean([holm(row).p.min() <= 0.05 for row in p]) == pytest.approx(0.0490, abs=4 * 0.0034)
    assert np.mean([holm(np.full(5, row[0])).p.min() <= 0.05 for row in p]) == pytest.approx(0.01, abs=4 * 0.0016)
