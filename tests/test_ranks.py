"""dpgbench.stats.ranks against a published table, hand counts and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from dpgbench.stats.ranks import critical_difference, friedman_p, mean_ranks


def scores_of(table):
    """{task: {method: [value of seed 0, 1, ...]}}, None for no score."""
    rows = [
        {"task_label": task, "method_label": method, "seed": seed, "value": value}
        for task, methods in table.items()
        for method, values in methods.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    return pd.DataFrame(rows)


def ranked(table, higher_is_better=None, seed=0, **more):
    scores = scores_of(table)
    directions = higher_is_better or dict.fromkeys(scores["task_label"], True)
    return mean_ranks(scores, directions, generator=np.random.default_rng(seed), **more)


# q values at 0.05 of Demšar 2006, table 5(a): 1.960, 2.343, 2.569, 2.728, 3.031 and 3.164 for 2, 3, 4, 5, 8 and 10 methods.
@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (8, 3.031), (10, 3.164)])
def test_critical_difference_has_the_published_quantiles(methods, q):
    assert critical_difference(methods, 7) == pytest.approx(q * np.sqrt(methods * (methods + 1) / 42), abs=1e-3)


def test_mean_ranks_by_hand():
    """t0: means a 2, b 1, c 1: ranks 1, 2.5, 2.5. t1, lower is better: a 1, b 2, c 3: ranks 1, 2, 3. Mean: a 1, b 2.25, c 2.75.
    CD of 3 methods on 2 tasks: 2.343 sqrt(12 / 12) = 2.343, more than 1.75, so nothing is told apart."""
    table = {"t0": {"a": [1, 3], "b": [0, 2], "c": [1, 1]}, "t1": {"a": [1, 1], "b": [2, 2], "c": [3, 3]}}
    got = ranked(table, {"t0": True, "t1": False})
    assert got.ranks["mean"].to_dict() == {"a": 1.0, "b": 2.25, "c": 2.75}
    assert got.critical_difference == pytest.approx(2.343, abs=1e-3) and got.groups == (("a", "b", "c"),)
    assert got.seeds_by_task == {"t0": (0, 1), "t1": (0, 1)} and got.left_out == {}


def test_groups_overlap_and_are_the_largest():
    """Ten tasks, all in the same order: ranks 1 to 4; CD of 4 methods on 10 tasks 2.569 sqrt(20 / 60) = 1.483: neighbours only."""
    got = ranked({f"t{t}": {"a": [4], "b": [3], "c": [2], "d": [1]} for t in range(10)})
    assert got.groups == (("a", "b"), ("b", "c"), ("c", "d"))
    assert got.friedman_p == pytest.approx(1.4e-6, rel=0.1)  # chi2 of 30 with 3 degrees of freedom
    assert np.isnan(got.ranks[["low", "high"]].to_numpy()).all(), "one seed leaves no interval"


def test_holes_take_a_method_out_and_a_seed_out_of_a_task():
    table = {"t0": {"a": [1, 5], "b": [2, None], "c": [3, 3]}, "t1": {"a": [1, 1], "b": [2, 2]}}
    got = ranked(table)
    assert got.left_out == {"c": "no score on 1 of 2 tasks"}
    assert got.seeds_by_task == {"t0": (0,), "t1": (0, 1)}  # seed 1 of t0 would favour a, which b did not run
    assert got.ranks["mean"].to_dict() == {"b": 1.0, "a": 2.0}
    nothing = ranked({"t0": {"a": [1, None], "b": [None, 1]}})
    assert nothing.ranks.empty and nothing.left_out == {"t0": "no seed that every ranked method has"}


def test_interval_equals_all_resamples_enumerated():
    """Seeds (a - b): +1, +1, -3. Of the 27 resamples of 3 seeds the sum of k seeds of the last kind is (3 - k) - 3k: a is ahead for
    k = 0 (8 of 27), behind for k >= 1 (19 of 27): the mean rank's 95% interval is [1, 2]; at level 0.3 it is [2, 2]."""
    table = {"t0": {"a": [1, 1, 0], "b": [0, 0, 3]}}
    assert ranked(table).ranks.loc["a", ["mean", "low", "high"]].tolist() == [2, 1, 2]
    assert ranked(table, level=0.3).ranks.loc["a", ["low", "high"]].tolist() == [2, 2]


def test_equal_values_share_ranks_in_every_draw():
    values = list(np.random.default_rng(0).normal(size=5))
    got = ranked({"t0": {"a": values, "b": values}, "t1": {"a": values, "b": values[::-1]}})
    assert got.ranks.loc["a", "mean"] == 1.5 and got.ranks.loc["a", "low"] >= 1.25


def test_friedman_nemenyi_size_under_the_null():
    """4 exchangeable methods on 12 tasks, 2000 times: some pair is beyond the critical difference at most 5% of the time."""
    ranks = np.argsort(np.argsort(np.random.default_rng(3).normal(size=(2000, 12, 4)), axis=-1), axis=-1).mean(axis=1)
    beyond = (np.ptp(ranks, axis=1) > critical_difference(4, 12)).mean()
    assert 0.02 < beyond < 0.05 + 3 * 0.0049


@pytest.mark.parametrize("methods", [2, 5, 40])
def test_critical_difference_is_that_of_scipy(methods):
    quantile = scipy_stats.studentized_range.ppf(0.99, methods, np.inf) / np.sqrt(2)
    assert critical_difference(methods, 6, 0.01) == pytest.approx(quantile * np.sqrt(methods * (methods + 1) / 36), rel=1e-9)


@pytest.mark.parametrize("methods", [3, 6])
def test_friedman_p_is_that_of_scipy_with_ties_too(methods):
    values = np.random.default_rng(methods).integers(0, 4, size=(7, methods))
    expected = scipy_stats.friedmanchisquare(*values.T).pvalue
    assert friedman_p(scipy_stats.rankdata(values, axis=1)) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(friedman_p(np.full((4, methods), (methods + 1) / 2)))


def test_ranks_of_one_task_are_those_of_scipy():
    values = np.random.default_rng(1).integers(0, 5, size=9).astype(float)
    got = ranked({"t0": {f"m{method}": [value] for method, value in enumerate(values)}}).ranks["mean"]
    expected = scipy_stats.rankdata(-values)
    assert {label: got[label] for label in got.index} == {f"m{method}": rank for method, rank in enumerate(expected)}
