"""dpgbench.stats.curves: a method's answer at a budget, areas and the compute to reach a level, by hand, by enumeration, on fine grids."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.curves import (
    CurveTable,
    answer_at,
    area_over_seeds,
    area_under_curve,
    compute_to_reach,
    reach_over_seeds,
    shared_span,
)

nan, inf = np.nan, np.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_answer_at_a_budget_by_hand():
    """Nothing before the first snapshot, the last one within the budget after it, and the last of all for ever."""
    computes, values = [100, 1, 1e4], [4, 0, 2]  # in any order
    assert answer_at(computes, values, np.array([1, 10, 100, 1000, 1e4])) == pytest.approx([0, 0, 4, 4, 2])
    assert answer_at(computes, values, np.array([[0.5, 99.999], [2e4, inf]])) == pytest.approx(np.array([[nan, 0], [2, 2]]), nan_ok=True)
    assert answer_at([5.0], [7.0], 5.0) == 7.0 and np.isnan(answer_at([5.0], [7.0], 4.9)) and np.isnan(answer_at([], [], 1.0))
    hole = answer_at([1, 10, 100, 1000], [1, nan, inf, nan], np.array([1, 9, 10, 99, 100, 1e9]))
    assert hole == pytest.approx([1, 1, nan, nan, inf, nan], nan_ok=True), "an answer that has no value is not replaced by an older one"
    with pytest.raises(ValueError, match="a budget is nan"):
        answer_at([1], [1], nan)


def test_the_answer_at_a_budget_equals_an_enumeration():
    """Every way to lay up to three snapshots on five computes, at every budget on and between them: a loop over the snapshots."""
    grid = [1.0, 2.0, 3.0, 4.0, 5.0]
    budgets = [0.5 * half for half in range(1, 13)]
    for size in range(4):
        for computes in itertools.permutations(grid, size):
            values = [10 * compute + 1 for compute in computes]
            for budget, found in zip(budgets, answer_at(computes, values, np.array(budgets)), strict=True):
                within = [(compute, value) for compute, value in zip(computes, values, strict=True) if compute <= budget]
                assert found == max(within)[1] if within else np.isnan(found)


def test_area_by_hand():
    """Decades 1, 2, 4 with values 0, 1, 3: from 10 to 1e4 one decade of 0 and two of 1: 2 over 3 decades. From 10^1.5 to 10^3: half a
    decade of 0 and one of 1. Within one step it is that step's."""
    computes, values = [1e4, 10, 100], [3, 0, 1]  # in any order
    got = area_under_curve(computes, values, 10, 1e4)
    assert (got.area, got.height, got.decades) == pytest.approx((2, 2 / 3, 3)) and (got.n, got.held, got.why_undefined) == (3, 0, "")
    cut = area_under_curve(computes, values, 10**1.5, 1e3)
    assert (cut.area, cut.height, cut.n) == (pytest.approx(1), pytest.approx(2 / 3), 1)
    inside_one_piece = area_under_curve(computes, values, 10**2.5, 10**3.5)
    assert (inside_one_piece.area, inside_one_piece.n) == (pytest.approx(1), 0)


def test_what_is_held_outside_the_snapshots_by_hand():
    """From 1 to 1e6: base's 0.5 for one decade, 2 as above, then the last value 3 for two decades."""
    computes, values = [10, 100, 1e4], [0, 1, 3]
    got = area_under_curve(computes, values, 1, 1e6, before=0.5)
    assert (got.area, got.decades, got.held) == pytest.approx((0.5 + 2 + 6, 6, 3))
    early = area_under_curve(computes, values, 0.1, 1, before=0.5)  # wholly before the first, wholly after the last
    late = area_under_curve(computes, values, 1e5, 1e6)
    assert (early.height, early.held, late.height, late.held) == pytest.approx((0.5, 1, 3, 1))
    single = area_under_curve([10], [2], 1, 100, before=0)
    assert (single.area, single.n) == (pytest.approx(2), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("before", [None, -1.0])
def test_area_equals_a_fine_sum_over_the_answers(before):
    for seed in range(5):
        generator = rng(seed)
        x, y = np.sort(generator.uniform(1, 4, 6)), generator.normal(size=6)
        start, end = (0.5, 4.5) if before is not None else (x[0] + 0.1, x[-1] + 0.2)
        grid = start + (np.arange(200_000) + 0.5) / 200_000 * (end - start)
        height = np.nan_to_num(answer_at(10**x, y, 10**grid), nan=-1.0)
        got = area_under_curve(10**x, y, 10**start, 10**end, before=before)
        assert got.height == pytest.approx(height.mean(), abs=1e-3)


def test_areas_of_neighbouring_spans_add_up_and_the_unit_of_compute_does_not_matter():
    computes, values = 10 ** np.array([1, 1.3, 2.2, 4]), np.array([0.3, -1, 2, 2.5])
    whole, left, right = (area_under_curve(computes, values, *span).area for span in ((10, 1e4), (10, 70), (70, 1e4)))
    assert whole == pytest.approx(left + right)
    assert area_under_curve(computes * 1e12, values, 1e13, 1e16).area == pytest.approx(whole)


@pytest.mark.filterwarnings("error")
def test_an_area_that_does_not_exist_says_why():
    computes, values = [10, 100, 1e3], [1, nan, 3]
    assert area_under_curve([], [], 1, 10, before=0).why_undefined == "no snapshot"
    early = area_under_curve(computes, values, 1, 10)
    assert early.why_undefined == "the curve starts at 10, after 1" and np.isnan([early.area, early.height]).all() and early.held == 1
    assert area_under_curve(computes, values, 10, 1e3).why_undefined == "the value at 100 is nan"
    assert area_under_curve(computes, values, 200, 300).why_undefined == "the value at 100 is nan", "held, so it matters"
    # What lies outside the span does not matter.
    assert area_under_curve(computes, values, 10, 100).height == pytest.approx(1)
    assert area_under_curve([*computes, 1e4], [*values, 4], 1e3, 1e4).height == pytest.approx(3)
    assert area_under_curve([10, 100], [1, -inf], 10, 1000).why_undefined == "the value at 100 is -inf"
    assert area_under_curve([10, 100], [nan, 1], 1, 100, before=0).why_undefined == "the value at 10 is nan"


def test_bad_curves_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="low is 5 and high is 5, but an area over log compute needs 0 < low < high"):
        area_under_curve([1, 10], [0, 1], 5, 5)
    for low, high in ((0, 1), (-1, 1), (nan, 1), (1, inf)):
        with pytest.raises(ValueError, match="needs 0 < low < high, both finite"):
            area_under_curve([1, 10], [0, 1], low, high)
    with pytest.raises(ValueError, match="before is nan"):
        area_under_curve([1, 10], [0, 1], 1, 10, before=nan)
    for function in (lambda c, v: area_under_curve(c, v, 1, 10), lambda c, v: compute_to_reach(c, v, 1), lambda c, v: answer_at(c, v, 1)):
        with pytest.raises(ValueError, match="2 computes and 1 values"):
            function([1, 10], [0])
        with pytest.raises(ValueError, match=r"compute 10 is listed twice, .* keep the last snapshot"):
            function([10, 1, 10], [0, 1, 2])
        for bad in (0, -1, nan, inf):
            with pytest.raises(ValueError, match=rf"a compute is {float(bad)}, but a log axis needs positive finite ones; leave that"):
                function([10, bad], [0, 1])
    for level in (nan, inf):
        with pytest.raises(ValueError, match=f"level is {level}, but only a finite level"):
            compute_to_reach([1], [1], level)


def test_compute_to_reach_by_hand():
    """Value 0 at 10 and 1 at 1000: nobody has 0.25 before the snapshot at 1000."""
    computes, values = [10, 1e3, 1e4], [0, 1, 0.2]
    got = compute_to_reach(computes, values, 0.25)
    assert (got.compute, got.reached, got.at_first, got.n) == (1e3, True, False, 3)
    assert compute_to_reach(computes, values, 1.0).compute == 1e3
    mirrored = compute_to_reach(computes, [-value for value in values], -0.25, higher_is_better=False)
    assert mirrored.compute == got.compute
    below = compute_to_reach(computes, values, -1)
    assert (below.compute, below.at_first) == (10, True)
    never = compute_to_reach(computes, values, 2)
    assert np.isnan(never.compute) and not never.reached and never.n == 3


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_compute_to_reach_equals_the_first_budget_of_a_fine_grid(higher_is_better):
    for seed in range(10):
        generator = rng(seed)
        x, y = np.sort(generator.uniform(0, 3, 7)), generator.normal(size=7)
        grid = np.linspace(x[0] + 1e-9, x[-1] + 0.1, 100_001)
        answers = answer_at(10**x, y, 10**grid)
        there = (answers >= 0.5) if higher_is_better else (answers <= 0.5)
        got = compute_to_reach(10**x, y, 0.5, higher_is_better=higher_is_better)
        assert got.reached == there.any()
        if got.reached:
            assert np.log10(got.compute) == pytest.approx(grid[np.argmax(there)], abs=1e-4)


def test_a_hole_reaches_nothing():
    hole = compute_to_reach([10, 100, 1e3], [0, nan, 1], 0.5)
    assert (hole.compute, hole.n, hole.missing) == (1e3, 2, 1)
    start = compute_to_reach([10, 100], [nan, 1], 0.5)
    assert (start.compute, start.at_first) == (100, True)
    for values, reached_at in (([-inf, 1], 100), ([0, inf], 100), ([inf, 0], 10)):
        assert compute_to_reach([10, 100], values, 0.5).compute == reached_at
    nothing = compute_to_reach([], [], 0.5)
    assert np.isnan(nothing.compute) and (nothing.n, nothing.reached) == (0, False)
    assert compute_to_reach([10, 100], [nan, nan], 0).missing == 2


def snapshots_of(curves):
    """{seed: (computes, values)} as the rows of one method."""
    rows = [
        {"seed": seed, "flops": flops, "value": value}
        for seed, (computes, values) in curves.items()
        for flops, value in zip(computes, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["seed", "flops", "value"])


def test_areas_over_seeds_are_a_mean_with_its_holes_counted():
    """Heights 0 and 1 from 10 to 100, and a seed whose curve starts too late: mean 0.5, t interval 0.5 +- 12.706 x 0.7071 / 1.4142."""
    snapshots = snapshots_of({0: ([10, 100], [0, 1]), 1: ([1, 10, 100], [9, 1, 2]), 2: ([50, 100], [0, 1])})
    got = area_over_seeds(snapshots[::-1], 10, 100)
    assert (got.height.n, got.height.missing, got.height.mean) == (2, 1, pytest.approx(0.5))
    assert got.height.high == pytest.approx(0.5 + 12.706 / 2, abs=1e-3)
    assert got.by_seed[2].why_undefined == "the curve starts at 50, after 10"
    full = area_over_seeds(snapshots, 10, 1000, before=-1.0, level=0.5)
    assert (full.height.n, full.by_seed[0].height, full.by_seed[1].height) == (3, 0.5, 1.5)
    assert area_over_seeds(snapshots[:0], 10, 100).height.n == 0


def test_reaching_over_seeds_counts_who_does_not():
    """Seeds reach 0.5 at 100, 1,000 and never: the median of three is the second; of the first two, 10^2.5; with two failures, none."""
    curves = {0: ([10, 100], [0, 1]), 1: ([100, 1e3], [0, 1]), 2: ([10, 1e6], [0, 0.1]), 3: ([10, 1e6], [0, nan])}

    def reach(*seeds):
        return reach_over_seeds(snapshots_of({seed: curves[seed] for seed in seeds}), 0.5)

    three = reach(0, 1, 2)
    assert (three.n, three.reached, three.not_reached, three.median) == (3, 2, 1, pytest.approx(1e3))
    assert np.isnan(three.by_seed[2].compute) and three.by_seed[0].compute == 100
    assert reach(0, 1).median == pytest.approx(10**2.5) and reach(1).median == pytest.approx(1e3)
    assert np.isnan(reach(0, 1, 2, 3).median) and reach(0, 1, 2, 3).reached == 2
    nothing = reach()
    assert (nothing.n, nothing.not_reached) == (0, 0) and np.isnan(nothing.median)
    falling = reach_over_seeds(snapshots_of({0: ([10, 1e3], [1, 0])}), 0.5, higher_is_better=False)
    assert falling.median == pytest.approx(1e3)


def test_shared_span_is_from_where_all_have_an_answer_to_where_the_last_ends():
    first = snapshots_of({0: ([1, 100], [0, 1]), 1: ([5, 80, 1e3], [0, 1, nan])})
    second = snapshots_of({0: ([2, 90], [0, 1])})
    assert shared_span([first, second]) == (5, 100)
    assert area_over_seeds(first, *shared_span([first, second])).height.n == 2
    assert shared_span([first, snapshots_of({0: ([50, 60], [0, 1])})]) == (50, 100)
    for none in ([], [first, snapshots_of({0: ([100, 100.0001], [nan, nan])})], [snapshots_of({0: ([100], [0])})]):
        assert np.isnan(shared_span(none)).all()


def test_bad_snapshots_name_the_seed_and_the_column():
    with pytest.raises(ValueError, match=r"the snapshots lack the column\(s\) flops; a curve needs seed, flops, value"):
        area_over_seeds(pd.DataFrame({"seed": [0], "value": [1]}), 1, 10)
    with pytest.raises(ValueError, match=r"seed 3: a compute is 0.0"):
        reach_over_seeds(snapshots_of({3: ([0, 1], [0, 1])}), 1)
    with pytest.raises(ValueError, match=r"seed 3: compute 10 is listed twice"):
        shared_span([snapshots_of({3: ([10, 10], [0, 1])})])


def test_a_table_of_curves_reads_what_single_curves_say():
    """40 seeds of 1 to 6 snapshots in any order, some values NaN or infinite; read at a snapshot, between two, and outside."""
    draws, rows = rng(8), []
    for seed in range(40):
        for flops in draws.choice(np.geomspace(1, 1e5, 12), size=draws.integers(1, 7), replace=False):
            rows.append((seed, flops, draws.choice([draws.normal(), nan, inf], p=[0.8, 0.15, 0.05])))
    frame = pd.DataFrame(rows, columns=["seed", "flops", "value"]).sample(frac=1, random_state=0)
    table = CurveTable.of(frame)
    assert table.seeds.tolist() == list(range(40))
    for at in (0.5, 1.0, 37.0, np.geomspace(1, 1e5, 12)[5], 1e5, 2e5):
        single = [float(answer_at(of_seed["flops"], of_seed["value"], at)) for _, of_seed in frame.groupby("seed")]
        np.testing.assert_array_equal(table.at(np.full(40, at)), np.array(single))
    spans = frame.groupby("seed")["flops"].agg(["min", "max"])
    np.testing.assert_array_equal(np.column_stack(table.spans), spans.to_numpy())
