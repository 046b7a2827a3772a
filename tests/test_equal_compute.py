"""dpgbench.stats.equal_compute and curves.value_at: two methods compared at equal compute, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.curves import value_at
from dpgbench.stats.equal_compute import compare_at_equal_compute

nan, inf = np.nan, np.inf


def snapshots_of(curves):
    """{seed: [(flops, value), ...]}"""
    rows = [{"seed": seed, "flops": flops, "value": value} for seed, points in curves.items() for flops, value in points]
    return pd.DataFrame(rows, columns=["seed", "flops", "value"])


def test_value_at_by_hand():
    """(1, 0), (100, 4), (1e4, 2) over log10: at 10 half way up, 2; at 1000 half way down, 3."""
    computes, values = [100, 1, 1e4], [4, 0, 2]
    assert value_at(computes, values, np.array([1, 10, 100, 1000, 1e4])) == pytest.approx([0, 2, 4, 3, 2])
    assert np.isnan(value_at(computes, values, np.array([0.5, 2e4]))).all()
    assert value_at(computes, values, np.array([0.5, 2e4]), after="hold") == pytest.approx([nan, 2], nan_ok=True)
    assert value_at([5.0], [7.0], 5.0) == 7.0


def test_no_line_is_drawn_through_a_hole():
    computes, values = [1, 10, 100, 1000, 1e4], [1, nan, 3, inf, nan]
    assert value_at(computes, values, np.array([1, 3, 10, 30, 100, 300, 1000, 2000.0])) == pytest.approx(
        [1, nan, nan, nan, 3, nan, inf, nan], nan_ok=True
    )
    assert value_at(computes, values, 1e6, after="hold") == inf  # the last snapshot that has a value
    assert np.isnan(value_at([1.0], [nan], 1.0))


def test_comparison_by_hand():
    """Seed 0: a ends at 100 with 4, b at 1e4; b at 100 lies half way between (1, 0) and (1e4, 2): 1; difference 3.
    Seed 1: b ends at 10 with 5; a at 10 lies half way between (1, 0) and (100, 8): 4; difference -1.
    Mean 1, differences 3 and -1: standard deviation 2.828, half-width 12.706 x 2 = 25.41; both patterns +- and -+ give |sum| 4, the
    data |sum| 2, so all four patterns are as extreme: p = 1. Effect size 1 / 2.828 = 0.354."""
    a = snapshots_of({0: [(1, 0), (100, 4)], 1: [(1, 0), (100, 8)]})
    b = snapshots_of({0: [(1, 0), (1e4, 2)], 1: [(1, 1), (10, 5)]})
    got = compare_at_equal_compute(a, b)
    assert got.by_seed.to_dict("index") == {0: {"compute": 100, "a": 4, "b": 1}, 1: {"compute": 10, "a": 4, "b": 5}}
    assert (got.difference.mean, got.difference.n, got.difference.p) == (1, 2, 1)
    assert got.difference.high == pytest.approx(1 + 25.412, abs=1e-3) and got.effect.d == pytest.approx(0.3536, abs=1e-4)
    turned = compare_at_equal_compute(b, a)
    assert turned.difference.mean == -1 and turned.difference.p == 1


def test_a_single_point_is_compared_at_its_own_compute():
    got = compare_at_equal_compute(snapshots_of({0: [(1, 0), (100, 4)]}), snapshots_of({0: [(10, 5)]}))
    assert got.by_seed.loc[0].tolist() == [10, 2, 5]


def test_seeds_without_a_common_compute_are_named_and_not_compared():
    a = snapshots_of({0: [(1, 0), (10, 1)], 1: [(1, 0)], 2: [(1, nan)], 3: [(1, 1), (5, nan), (100, 3)]})
    b = snapshots_of({0: [(20, 0)], 2: [(1, 1)], 3: [(10, 2)], 4: [(1, 1)]})
    got = compare_at_equal_compute(a, b)
    assert got.by_seed.empty and got.difference.n == 0 and np.isnan(got.difference.p)
    assert got.left_out == {
        0: "no common compute: one ends at 10, the other starts at 20", 1: "only one of the two has this seed", 2: "no value",
        3: "a value next to 10 is not finite", 4: "only one of the two has this seed",
    }  # fmt: skip
