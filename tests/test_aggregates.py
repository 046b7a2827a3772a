"""IQM, profiles and probability of improvement against hand counts, scipy, loops, enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from dpgbench.stats.aggregates import interquartile_curve, interquartile_mean, performance_profile, probability_of_improvement

nan, inf = np.nan, np.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def grid_of(*rows):
    """A grid of tasks t0, t1, ... from rows of any length; short ones end in NaN."""
    width = max(map(len, rows))
    filled = [[*row, *[nan] * (width - len(row))] for row in rows]
    return pd.DataFrame(filled, index=[f"t{task}" for task in range(len(rows))], dtype=float)


def test_iqm_by_hand():
    """Values 0 to 6 and 100: two cut at each end leave 2, 3, 4, 5, mean 3.5. Values -inf, 0 to 5 and inf: 1, 2, 3, 4 are left."""
    got = interquartile_mean(grid_of([0, 5, 2, 100], [4, 1, 6, 3]), generator=rng())
    assert (got.value, got.n, got.missing, got.n_by_task, got.left_out) == (3.5, 8, 0, {"t0": 4, "t1": 4}, ())
    assert got.low <= 3.5 <= got.high and not got.why_no_interval
    assert interquartile_mean(grid_of([0, 5, 2, inf], [4, 1, 3, -inf]), generator=rng()).value == 2.5


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 2), (1, 3), (1, 7), (3, 3), (5, 2), (4, 8)])
def test_iqm_is_the_trimmed_mean_of_scipy(tasks, seeds):
    values = rng(tasks).normal(size=(tasks, seeds))
    expected = scipy_stats.trim_mean(values, 0.25, axis=None)
    assert interquartile_mean(grid_of(*values), generator=rng()).value == pytest.approx(expected)


def test_iqm_with_holes_repeats_values_until_tasks_weigh_the_same():
    """Task t0 has one value for three of t1: [9, 9, 9] and [0, 3, 6]; of these six, one is cut at each end: (3 + 6 + 9 + 9) / 4."""
    got = interquartile_mean(grid_of([9], [0, 3, 6]), generator=rng())
    assert (got.value, got.n, got.missing, got.n_by_task) == (6.75, 4, 2, {"t0": 1, "t1": 3})
    rows = [rng(5).normal(size=n) for n in (2, 3, 4)]
    repeated = np.concatenate([np.repeat(row, 12 // len(row)) for row in rows])
    assert interquartile_mean(grid_of(*rows), generator=rng()).value == pytest.approx(scipy_stats.trim_mean(repeated, 0.25))


def test_iqm_interval_equals_a_loop_over_the_same_draws():
    rows = [rng(6).normal(size=n) for n in (3, 4)]
    got = interquartile_mean(grid_of(*rows), generator=rng(7), draws=200, level=0.9)
    generator = rng(7)
    counts = [generator.multinomial(len(row), np.full(len(row), 1 / len(row)), size=200) for row in rows]
    looped = []
    for draw in range(200):
        drawn = [np.repeat(row, count[draw]) for row, count in zip(rows, counts, strict=True)]
        assert [len(row) for row in drawn] == [3, 4]  # as many as there were, within each task
        looped.append(scipy_stats.trim_mean(np.concatenate([np.repeat(row, 12 // len(row)) for row in drawn]), 0.25))
    looped.sort()  # 5% of 200 draws lie beyond each end: ten
    assert (got.low, got.high) == pytest.approx((looped[10], looped[-11]))


def test_iqm_bootstrap_agrees_with_all_resamples_enumerated():
    """Two tasks of three seeds have (3**3)**2 = 729 equally likely resamples; the drawn interval is their central 90%."""
    rows = [[0.0, 1.0, 5.0], [2.0, 3.0, 9.0]]
    resamples = [list(itertools.product(row, repeat=3)) for row in rows]
    every = np.sort([scipy_stats.trim_mean(a + b, 0.25) for a in resamples[0] for b in resamples[1]])
    got = interquartile_mean(grid_of(*rows), generator=rng(8), draws=20_000, level=0.9)
    assert np.mean(every < got.low - 1e-9) <= 0.05 + 4 * 0.0016 and np.mean(every <= got.low + 1e-9) >= 0.05 - 4 * 0.0016
    assert np.mean(every > got.high + 1e-9) <= 0.05 + 4 * 0.0016 and np.mean(every >= got.high - 1e-9) >= 0.05 - 4 * 0.0016


@pytest.mark.parametrize(("seeds", "expected"), [(2, 0.72), (3, 0.85), (5, 0.90), (10, 0.93)])
def test_iqm_interval_covers_as_the_module_says(seeds, expected):
    """4 tasks with means 0, 1/3, 2/3, 1 and standard deviation 0.3. By symmetry the mean IQM is 0.5.
    The share over 250 intervals has a standard error of at most 0.03."""
    draws = rng(seeds).normal(np.linspace(0, 1, 4)[:, None], 0.3, (250, 4, seeds))
    generator = rng(100 + seeds)
    intervals = [interquartile_mean(pd.DataFrame(draw), generator=generator, draws=200) for draw in draws]
    assert np.mean([got.low <= 0.5 <= got.high for got in intervals]) == pytest.approx(expected, abs=0.07)


def test_profile_by_hand():
    """t0 has 0, 1, 2, 3 and t1 has 1, 5. Above 1 (strictly): 2 of 4 and 1 of 2, mean 0.5. Above 2: 1/4 and 1/2. Above -1 all, above 5
    none; the interval has no width there."""
    got = performance_profile(grid_of([0, 1, 2, 3], [1, 5]), [-1, 1, 2, 5], generator=rng())
    assert got.value == pytest.approx([1, 0.5, 0.375, 0]) and (got.n, got.missing) == (6, 2)
    assert got.low[[0, 3]].tolist() == got.high[[0, 3]].tolist() == [1, 0]
    assert (got.low[1:3] < got.value[1:3]).all() and (got.value[1:3] < got.high[1:3]).all()


def test_profile_interval_is_the_binomial_one():
    """One task, k of n above: the resampled share is Binomial(n, k / n) / n."""
    got = performance_profile(grid_of(range(20)), [13.5, 9.5], generator=rng(9), draws=20_000)
    exact = [scipy_stats.binom.ppf([0.025, 0.975], 20, share) / 20 for share in (0.3, 0.5)]
    assert np.stack([got.low, got.high], axis=1) == pytest.approx(np.array(exact), abs=1e-9)


def test_profile_falls_and_its_area_is_the_mean():
    """For scores in [0, 1] the area under the profile is the mean of the task means."""
    values = rng(10).uniform(size=(3, 4))
    thresholds = (np.arange(1000) + 0.5) / 1000
    got = performance_profile(grid_of(*values), thresholds, generator=rng(), draws=100)
    assert (np.diff(got.value) <= 0).all() and got.value.mean() == pytest.approx(values.mean(), abs=1e-3)


def test_probability_of_improvement_by_hand():
    """t0: of the pairs (1,0) (1,2) (2,0) (2,2) a wins two and ties one: 2.5/4. t1: 3 beats 1 and 2, 0 neither: 2/4. Mean 0.5625."""
    a, b = grid_of([1, 2], [3, 0]), grid_of([0, 2], [1, 2])
    got = probability_of_improvement(a, b, generator=rng())
    assert (got.value, got.n, got.n_by_task) == (0.5625, 8, {"t0": (2, 2), "t1": (2, 2)}) and got.low <= got.value <= got.high
    turned = probability_of_improvement(a, b, generator=rng(), lower_is_better=["t1"])
    assert turned.value == pytest.approx((2.5 / 4 + 2 / 4) / 2)  # no ties in t1: 1 - 2/4
    assert probability_of_improvement(a, b, generator=rng(), lower_is_better=["t0"]).value == pytest.approx((1.5 / 4 + 2 / 4) / 2)
    assert probability_of_improvement(b, a, generator=rng()).value == pytest.approx(1 - 0.5625)
    assert probability_of_improvement(a, a, generator=rng()).value == 0.5


def test_probability_of_improvement_is_mann_whitney_u_and_its_interval_a_loop():
    rows_a, rows_b = ([rng(seed + n).normal(0.3, 1, n) for n in (3, 5)] for seed in (0, 10))
    rows_b[1] = rows_b[1][:4]
    got = probability_of_improvement(grid_of(*rows_a), grid_of(*rows_b), generator=rng(11), draws=100, level=0.9)
    u = [scipy_stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(rows_a, rows_b, strict=True)]
    assert got.value == pytest.approx(np.mean(u)) and got.n_by_task == {"t0": (3, 3), "t1": (5, 4)}
    generator, looped = rng(11), np.zeros(100)
    for pair in zip(rows_a, rows_b, strict=True):
        counts = [generator.multinomial(len(row), np.full(len(row), 1 / len(row)), size=100) for row in pair]
        for draw in range(100):
            a, b = (np.repeat(row, count[draw]) for row, count in zip(pair, counts, strict=True))
            looped[draw] += np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b]) / 2
    assert (got.low, got.high) == pytest.approx((np.sort(looped)[5], np.sort(looped)[-6]))


def test_probability_of_improvement_size_under_the_null_and_with_shared_seeds():
    """4 tasks, 5 seeds, no difference: 95% intervals leave out 0.5 in about 6% of experiments, fewer where seeds move both sides alike."""
    generator = rng(12)

    def rejected(shared):
        common = generator.normal(size=(300, 4, 5))
        sides = [shared * common + np.sqrt(1 - shared**2) * generator.normal(size=(300, 4, 5)) for _ in "ab"]
        frames = [[pd.DataFrame(values) for values in side] for side in sides]
        found = [probability_of_improvement(a, b, generator=generator, draws=200) for a, b in zip(*frames, strict=True)]
        return np.mean([not got.low <= 0.5 <= got.high for got in found])

    assert rejected(0.0) == pytest.approx(0.06, abs=0.04)
    assert rejected(0.8) <= 0.03


@pytest.mark.filterwarnings("error")
def test_a_side_that_wins_every_pair_has_no_width_and_infinities_compare():
    got = probability_of_improvement(grid_of([inf, 3]), grid_of([-inf, 1]), generator=rng())
    assert (got.value, got.low, got.high) == (1, 1, 1)
    assert probability_of_improvement(grid_of([inf, inf]), grid_of([inf, -inf]), generator=rng()).value == 0.75


@pytest.mark.filterwarnings("error")
def test_holes_in_grids_are_named():
    a, b = grid_of([1, 2, nan], [nan] * 3, [3, 4, 5]), grid_of([1, 2, 3], [4, 5, 6], [nan] * 3)
    iqm = interquartile_mean(a, generator=rng())
    assert (iqm.left_out, iqm.missing, iqm.n_by_task, iqm.n) == (("t1",), 4, {"t0": 2, "t2": 3}, 5)
    profile = performance_profile(a, [2.5], generator=rng())
    assert (profile.left_out, profile.missing, profile.value.tolist()) == (("t1",), 4, [0.5])
    both = probability_of_improvement(a, b, generator=rng())
    assert (both.left_out, both.missing, both.n_by_task) == (("t1", "t2"), 7, {"t0": (2, 3)})
    nothing = grid_of([nan, nan])
    for got in (
        interquartile_mean(nothing, generator=rng()),
        interquartile_mean(pd.DataFrame(), generator=rng()),
        performance_profile(nothing, [0], generator=rng()),
        probability_of_improvement(nothing, grid_of([1, 2]), generator=rng()),
    ):
        assert got.n == 0 and np.isnan([got.value, got.low, got.high]).all() and got.why_no_interval.startswith("no ")


@pytest.mark.filterwarnings("error")
def test_one_seed_leaves_no_interval_and_equal_values_one_without_width():
    one = grid_of([1], [2, 3])
    for got in (
        interquartile_mean(one, generator=rng()),
        performance_profile(one, [1.5], generator=rng()),
        probability_of_improvement(grid_of([1, 2], [2, 3]), one, generator=rng()),
    ):
        assert np.isfinite(got.value).all() and np.isnan([got.low, got.high]).all()
        assert got.why_no_interval == "one seed only on t0: no spread to draw from"
    equal = interquartile_mean(grid_of([2, 2], [2, 2]), generator=rng())
    assert (equal.value, equal.low, equal.high) == (2, 2, 2)


@pytest.mark.filterwarnings("error")
def test_infinite_values_reach_the_iqm_only_from_its_middle_half():
    some = interquartile_mean(grid_of([0, 1, 2, inf]), generator=rng())
    assert some.value == 1.5 and some.high == inf and np.isfinite(some.low)  # some draws have inf in their middle half
    assert interquartile_mean(grid_of([inf, inf, inf, 1]), generator=rng()).value == inf
    both = interquartile_mean(grid_of([-inf, -inf, inf, inf]), generator=rng())
    assert np.isnan([both.value, both.low, both.high]).all() and both.why_no_interval.startswith("inf and -inf meet")


def test_the_same_generator_gives_the_same_interval_and_another_another():
    grid = grid_of(*rng(13).normal(size=(3, 5)))
    first, second, other = (interquartile_mean(grid, generator=rng(seed)) for seed in (1, 1, 2))
    assert (first.low, first.high) == (second.low, second.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": 0}, r"generator is 0, .* np.random.default_rng\(seed\)"),
        ({"generator": rng(), "level": 1.0}, "level is 1.0"),
        ({"generator": rng(), "draws": 39}, "draws is 39, but a 95% interval needs at least 40"),
        ({"generator": rng(), "draws": 19, "level": 0.9}, "draws is 19, but a 90% interval needs at least 20"),
    ],
)
def test_bad_options_of_a_bootstrap_are_refused(options, message):
    grid = grid_of([1, 2], [3, 4])
    for aggregate in (
        lambda: interquartile_mean(grid, **options),
        lambda: performance_profile(grid, [0], **options),
        lambda: probability_of_improvement(grid, grid, **options),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate()
    interquartile_mean(grid, generator=rng(), draws=40)


def test_bad_grids_and_thresholds_are_refused():
    grid = grid_of([1, 2], [3, 4])
    with pytest.raises(ValueError, match="task t0 is in the grid twice; a grid has one row per task"):
        interquartile_mean(grid.loc[["t0", "t0"]], generator=rng())
    with pytest.raises(ValueError, match="seed 1 is in the grid twice"):
        interquartile_mean(grid[[1, 1]], generator=rng())
    with pytest.raises(ValueError, match=r"only one grid has the task\(s\) t1; give both every task, NaN where"):
        probability_of_improvement(grid, grid[:1], generator=rng())
    with pytest.raises(ValueError, match="lower_is_better names loss, but the grids have t0, t1"):
        probability_of_improvement(grid, grid, generator=rng(), lower_is_better=["loss"])
    for thresholds in ([], [0, nan]):
        with pytest.raises(ValueError, match="a profile needs at least one and no NaN among them"):
            performance_profile(grid, thresholds, generator=rng())


def test_a_curve_has_at_each_place_what_the_mean_has_with_the_same_draws():
    """Tasks of 3 and of 5 seeds; one curve is infinite somewhere. A place with a NaN is left out, and the others are as without it."""
    by_task = {"t0": rng(1).normal(size=(3, 4)), "t1": rng(2).normal(size=(5, 4))}
    by_task["t0"][1, 2], by_task["t1"][0, 3] = inf, nan
    got = interquartile_curve(by_task, generator=rng(7), draws=200)
    for place in range(3):
        one = interquartile_mean(grid_of(*(curves[:, place] for curves in by_task.values())), generator=rng(7), draws=200)
        assert (got.value[place], got.low[place], got.high[place]) == (one.value, one.low, one.high)
    assert np.isnan([got.value[3], got.low[3], got.high[3]]).all() and got.missing == 1
    assert (got.n, got.n_by_task) == (8, {"t0": 3, "t1": 5})
    single = interquartile_curve({"t0": np.ones((1, 2))}, generator=rng())
    assert single.value.tolist() == [1, 1] and np.isnan(single.low).all() and "one seed only on t0" in single.why_no_interval
    with pytest.raises(ValueError, match="every task needs one"):
        interquartile_curve({"t0": np.ones((0, 2))}, generator=rng())


def test_many_draws_are_taken_a_block_at_a_time_and_say_the_same():
    """2,000 values: 5,000 draws do not fit one block of a million. A loop that sorts each draw's values is the oracle."""
    values = rng(3).normal(size=2000)
    got = interquartile_mean(grid_of(values), generator=rng(4), draws=1500)
    counts = rng(4).multinomial(2000, np.full(2000, 1 / 2000), size=1500)
    means = np.sort([np.sort(np.repeat(values, row))[500:1500].mean() for row in counts])
    assert (got.low, got.high) == pytest.approx((means[37], means[-38]), rel=1e-9)
