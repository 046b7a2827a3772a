"""dpgbench.stats.equal_compute: two methods compared at equal compute, by hand and by enumeration."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.equal_compute import compare_at_equal_compute

nan = np.nan


def snapshots_of(curves):
    """{seed: [(flops, value), ...]}"""
    rows = [{"seed": seed, "flops": flops, "value": value} for seed, points in curves.items() for flops, value in points]
    return pd.DataFrame(rows, columns=["seed", "flops", "value"])


def test_comparison_by_hand():
    """Seed 0: a has stopped at 100 with 4 and holds it; b ends at 1e4 with 2; difference 2. Seed 1: b has stopped at 10 with 5; a ends at
    100 with 8; difference 3. Mean 2.5, standard deviation 0.707, half-width 12.706 x 0.5 = 6.353; of four patterns two are as extreme:
    p = 0.5. Effect size 2.5 / 0.7071 = 3.536."""
    a = snapshots_of({0: [(1, 0), (100, 4)], 1: [(1, 0), (100, 8)]})
    b = snapshots_of({0: [(1, 0), (1e4, 2)], 1: [(1, 1), (10, 5)]})
    got = compare_at_equal_compute(a, b)
    assert got.by_seed.to_dict("index") == {0: {"compute": 1e4, "a": 4, "b": 2}, 1: {"compute": 100, "a": 8, "b": 5}}
    assert (got.difference.mean, got.difference.n, got.difference.p) == (2.5, 2, 0.5)
    assert got.difference.high == pytest.approx(2.5 + 6.353, abs=1e-3) and got.effect.d == pytest.approx(3.5355, abs=1e-4)
    turned = compare_at_equal_compute(b, a)
    assert turned.difference.mean == -2.5 and turned.difference.p == 0.5


def test_a_finished_rival_is_not_met_in_the_middle_of_a_run():
    """b stops at 10 with 5. At 10 a had only its first answer, 0; at what a spends, 100, it has 9: that is what the two have to show."""
    a, b = snapshots_of({0: [(1, 0), (100, 9)]}), snapshots_of({0: [(1, 1), (10, 5)]})
    assert compare_at_equal_compute(a, b).by_seed.loc[0].tolist() == [100, 9, 5]
    assert compare_at_equal_compute(a, b, budget=10).by_seed.loc[0].tolist() == [10, 0, 5]
    assert compare_at_equal_compute(a, b, budget=9.99).by_seed.loc[0].tolist() == [9.99, 0, 1]


def test_every_budget_equals_an_enumeration():
    """Two random methods, five seeds, fifty budgets: the last snapshot within each, by a loop over all of them."""
    rng = np.random.default_rng(3)
    curves = [{seed: [(flops, rng.normal()) for flops in rng.uniform(1, 20, 4)] for seed in range(5)} for _ in range(2)]
    for budget in rng.uniform(1, 22, 50):
        got = compare_at_equal_compute(*map(snapshots_of, curves), budget=budget)
        for seed in range(5):
            within = [[point for point in curve[seed] if point[0] <= budget] for curve in curves]
            if all(within):
                assert got.by_seed.loc[seed].tolist() == [budget, *(max(points)[1] for points in within)]
            else:
                assert seed not in got.by_seed.index and "first snapshot is at" in got.left_out[seed]


def test_seeds_that_cannot_be_compared_are_named():
    a = snapshots_of({0: [(1, 0), (10, 1)], 1: [(1, 0)], 2: [(1, nan)], 3: [(1, 1), (5, nan), (100, nan)]})
    b = snapshots_of({0: [(20, 0)], 2: [(1, 1)], 3: [(10, 2)], 4: [(1, 1)]})
    got = compare_at_equal_compute(a, b, budget=15)
    assert got.by_seed.empty and got.difference.n == 0 and np.isnan(got.difference.p)
    assert got.left_out == {
        0: "no answer of one of the two at 15: its first snapshot is at 20", 1: "only one of the two has this seed",
        2: "the answer at 15 is NaN", 3: "the answer at 15 is NaN", 4: "only one of the two has this seed",
    }  # fmt: skip
    assert compare_at_equal_compute(a, b).by_seed.loc[0].tolist() == [20, 1, 0]
