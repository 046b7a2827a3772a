"""dpgbench.aggregates and dpgbench.curves against numbers worked out by hand, brute force, enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from dpgbench.aggregates import (
    holm,
    interquartile_mean,
    normalise,
    paired_effect_size,
    performance_profile,
    probability_of_improvement,
    score_grid,
)
from dpgbench.curves import area_over_seeds, area_under_curve, compute_to_reach, reach_over_seeds, shared_span
from dpgbench.stats import smallest_sign_flip_p

nan, inf = np.nan, np.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def by_seed(values, seeds=None):
    return pd.Series(values, index=range(len(values)) if seeds is None else seeds, dtype=float)


def grid_of(*rows):
    """A grid of tasks t0, t1, ... from rows of any length; short ones end in NaN."""
    width = max(map(len, rows))
    filled = [[*row, *[nan] * (width - len(row))] for row in rows]
    return pd.DataFrame(filled, index=[f"t{task}" for task in range(len(rows))], dtype=float)


# Holm ------------------------------------------------------------------------------------------------------------------------


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


# Effect size -----------------------------------------------------------------------------------------------------------------


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


# Normalised scores -----------------------------------------------------------------------------------------------------------


def scores_of(table):
    """{(task, method): values by seed} as the frame `normalise` takes."""
    rows = [
        {"task_label": task, "method_label": method, "seed": seed, "value": value}
        for (task, method), values in table.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["task_label", "method_label", "seed", "value"])


def test_normalised_scores_by_hand_in_both_directions():
    """share: base mean 0.2, oracle 1.0, so 0.6 is 0.5. loss (lower is better): base 4, oracle 2, so 3 is 0.5 and 5 is -0.5."""
    scores = scores_of(
        {
            ("share", "base"): [0.1, 0.3], ("share", "oracle"): [1, 1], ("share", "dpg"): [0.6, 0.2],
            ("loss", "base"): [3, 5], ("loss", "oracle"): [2, 2], ("loss", "dpg"): [3, 5],
        }
    )  # fmt: skip
    got = normalise(scores, {"share": True, "loss": False})
    dpg = got.scores[got.scores["method_label"] == "dpg"].groupby("task_label")["normalised"].apply(list)
    assert dpg["share"] == pytest.approx([0.5, 0]) and dpg["loss"] == pytest.approx([0.5, -0.5])
    share = got.anchors["share"]
    assert (share.base, share.base_n, share.ceiling, share.ceiling_n, share.ceiling_label) == (pytest.approx(0.2), 2, 1, 2, "oracle")
    assert (got.undefined, got.missing) == ((), 0)
    means = got.scores.groupby(["task_label", "method_label"])["normalised"].mean().unstack()
    assert means["base"].to_numpy() == pytest.approx([0, 0], abs=1e-12) and means["oracle"].to_numpy() == pytest.approx([1, 1])


def test_normalised_scores_do_not_depend_on_the_unit():
    """x -> -3 x + 7 turns the direction round and changes nothing else."""
    scores = scores_of({("t", "base"): [1, 2], ("t", "dpg"): [3, 5], ("t", "n16"): [2, 4]})
    other = scores.assign(value=-3 * scores["value"] + 7)
    a, b = normalise(scores, {"t": True}), normalise(other, {"t": False})
    assert a.scores["normalised"].to_numpy() == pytest.approx(b.scores["normalised"].to_numpy())
    assert a.anchors["t"].ceiling_label == b.anchors["t"].ceiling_label == "dpg"


def test_without_an_oracle_the_best_full_method_is_the_ceiling():
    scores = scores_of({("t", "base"): [1, 1], ("t", "dpg"): [3, 5], ("t", "n16"): [2, 2], ("t", "lucky"): [9, nan]})
    got = normalise(scores, {"t": True})
    assert (got.anchors["t"].ceiling_label, got.anchors["t"].ceiling) == ("dpg", 4)
    assert got.missing == 1
    assert got.scores.query("method_label == 'lucky'")["normalised"].iloc[0] == pytest.approx(8 / 3)
    lower = normalise(scores.assign(value=-scores["value"]), {"t": False}).anchors["t"]
    assert (lower.ceiling_label, lower.ceiling, lower.higher_is_better) == ("dpg", -4, False)
    absent = scores_of({("t", "base"): [1], ("t", "oracle"): [nan], ("t", "dpg"): [3]})
    assert normalise(absent, {"t": True}).anchors["t"].ceiling_label == "dpg"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ({"dpg": [1, 2]}, "no value of base"),
        ({"base": [nan, nan], "dpg": [1, 2]}, "no value of base"),
        ({"base": [1, 2]}, "neither oracle nor a method with a finite mean"),
        ({"base": [1, 2], "dpg": [inf, 1]}, "neither oracle nor a method with a finite mean"),
        ({"base": [1, inf], "dpg": [1, 2]}, "the mean of base is not finite"),
        ({"base": [1, 2], "oracle": [inf, 1]}, "the mean of oracle is not finite"),
        ({"base": [1, 2], "oracle": [1, 1]}, "oracle (1) is not better than base (1.5), and higher is better"),
        ({"base": [0.1 + 0.2, 0.3], "dpg": [0.3, 0.3]}, "dpg (0.3) is not better than base (0.3), and higher is better"),
        ({"base": [0.3, 0.3], "dpg": [0.1 + 0.2, 0.3]}, "dpg (0.3) is not better than base (0.3), and higher is better"),
    ],
)
def test_anchors_that_span_no_scale_leave_nan_and_are_counted(methods, why):
    table = {("bad", method): values for method, values in methods.items()} | {("good", "base"): [0], ("good", "dpg"): [1]}
    got = normalise(scores_of(table), {"bad": True, "good": True})
    assert got.anchors["bad"].why_undefined == why and got.undefined == ("bad",)
    assert got.scores[got.scores["task_label"] == "bad"]["normalised"].isna().all()
    assert got.missing == sum(map(len, methods.values())) and not got.anchors["good"].why_undefined


def test_an_infinite_score_stays_infinite():
    got = normalise(scores_of({("t", "base"): [0], ("t", "oracle"): [1], ("t", "dpg"): [-inf]}), {"t": True})
    assert got.scores["normalised"].iloc[-1] == -inf and got.missing == 0


def test_bad_scores_are_refused_with_the_fix():
    scores = scores_of({("t", "base"): [1, 2], ("t", "dpg"): [3]})
    with pytest.raises(ValueError, match="higher_is_better says nothing about t; it needs the direction of every task"):
        normalise(scores, {})
    with pytest.raises(ValueError, match=r"the scores lack the column\(s\) seed; they need"):
        normalise(scores.drop(columns="seed"), {"t": True})
    with pytest.raises(ValueError, match="task t, method dpg, seed 0 has more than one value; keep the final"):
        normalise(pd.concat([scores, scores[-1:]], ignore_index=True), {"t": True})
    with pytest.raises(ValueError, match="rows with the same index; reset_index"):
        normalise(pd.concat([scores, scores.assign(seed=9)]), {"t": True})
    with pytest.raises(ValueError, match="no score of method 'dqg'; the frame has base, dpg"):
        score_grid(scores, "dqg", "value")
    with pytest.raises(ValueError, match=r"lack the column\(s\) normalised"):
        score_grid(scores, "dpg")
    assert normalise(scores[:0], {}).missing == 0


def test_a_grid_has_every_task_and_seed_of_the_frame():
    scores = scores_of({("a", "dpg"): [1, 2], ("b", "dpg"): [3], ("c", "base"): [4, 5, 6]})
    grid = score_grid(scores, "dpg", "value")
    expected = pd.DataFrame([[1, 2, nan], [3, nan, nan], [nan] * 3], index=list("abc"), columns=[0, 1, 2])
    pd.testing.assert_frame_equal(grid, expected, check_names=False)


# Aggregates over tasks x seeds -----------------------------------------------------------------------------------------------


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


# Curves ----------------------------------------------------------------------------------------------------------------------


def test_area_by_hand():
    """Decades 1, 2, 4 with values 0, 1, 3. From 10 to 1e4: (0+1)/2 x 1 + (1+3)/2 x 2 = 4.5 over 3 decades: height 1.5. As steps:
    0 x 1 + 1 x 2 = 2. From 10^1.5 to 10^3: half a decade from 0.5 to 1 and one from 1 to 2: 0.375 + 1.5."""
    computes, values = [1e4, 10, 100], [3, 0, 1]  # in any order
    got = area_under_curve(computes, values, 10, 1e4)
    assert (got.area, got.height, got.decades) == pytest.approx((4.5, 1.5, 3)) and (got.n, got.held, got.why_undefined) == (3, 0, "")
    assert area_under_curve(computes, values, 10, 1e4, between="step").area == pytest.approx(2)
    cut = area_under_curve(computes, values, 10**1.5, 1e3)
    assert (cut.area, cut.height, cut.n) == (pytest.approx(1.875), pytest.approx(1.25), 1)
    assert area_under_curve(computes, values, 10**1.5, 1e3, between="step").area == pytest.approx(0.5 * 0 + 1 * 1)
    inside_one_piece = area_under_curve(computes, values, 10**2.5, 10**3.5)
    assert (inside_one_piece.area, inside_one_piece.n) == (pytest.approx(2), 0)


def test_what_is_held_outside_the_snapshots_by_hand():
    """From 1 to 1e6: base's 0.5 for one decade, 4.5 as above, then the last value 3 for two decades."""
    computes, values = [10, 100, 1e4], [0, 1, 3]
    got = area_under_curve(computes, values, 1, 1e6, before=0.5, after="hold")
    assert (got.area, got.decades, got.held) == pytest.approx((0.5 + 4.5 + 6, 6, 3))
    assert area_under_curve(computes, values, 1, 1e6, before=0.5, after="hold", between="step").area == pytest.approx(0.5 + 2 + 6)
    early = area_under_curve(computes, values, 0.1, 1, before=0.5)  # wholly before the first, wholly after the last
    late = area_under_curve(computes, values, 1e5, 1e6, after="hold")
    assert (early.height, early.held, late.height, late.held) == pytest.approx((0.5, 1, 3, 1))
    single = area_under_curve([10], [2], 1, 100, before=0, after="hold")
    assert (single.area, single.n) == (pytest.approx(2), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("between", ["linear", "step"])
@pytest.mark.parametrize("held", [{}, {"before": -1.0, "after": "hold"}])
def test_area_equals_a_fine_sum_over_the_curve(between, held):
    for seed in range(5):
        generator = rng(seed)
        x, y = np.sort(generator.uniform(1, 4, 6)), generator.normal(size=6)
        start, end = (0.5, 4.5) if held else (x[0] + 0.1, x[-1] - 0.2)
        grid = start + (np.arange(200_000) + 0.5) / 200_000 * (end - start)
        last = np.searchsorted(x, grid, side="right") - 1
        height = np.interp(grid, x, y) if between == "linear" else y[last]
        height = np.where(last < 0, -1.0, height)
        got = area_under_curve(10**x, y, 10**start, 10**end, between=between, **held)
        assert got.height == pytest.approx(height.mean(), abs=1e-3)


def test_areas_of_neighbouring_spans_add_up_and_the_unit_of_compute_does_not_matter():
    computes, values = 10 ** np.array([1, 1.3, 2.2, 4]), np.array([0.3, -1, 2, 2.5])
    for between in ("linear", "step"):
        whole, left, right = (area_under_curve(computes, values, *span, between=between).area for span in ((10, 1e4), (10, 70), (70, 1e4)))
        assert whole == pytest.approx(left + right)
        assert area_under_curve(computes * 1e12, values, 1e13, 1e16, between=between).area == pytest.approx(whole)


@pytest.mark.filterwarnings("error")
def test_an_area_that_does_not_exist_says_why():
    computes, values = [10, 100, 1e3], [1, nan, 3]
    assert area_under_curve([], [], 1, 10, before=0, after="hold").why_undefined == "no snapshot"
    early = area_under_curve(computes, values, 1, 10)
    assert early.why_undefined == "the curve starts at 10, after 1" and np.isnan([early.area, early.height]).all() and early.held == 1
    assert area_under_curve(computes, values, 1e3, 1e4).why_undefined == "the curve ends at 1000, before 10000"
    assert area_under_curve([10], [1], 10, 20).why_undefined == "the curve ends at 10, before 20"
    for between in ("linear", "step"):
        assert area_under_curve(computes, values, 10, 1e3, between=between).why_undefined == "the value at 100 is nan"
    # A line to a NaN is no line; a step before it is not touched by it, and what lies outside the span does not matter.
    assert area_under_curve(computes, values, 10, 50).why_undefined == "the value at 100 is nan"
    assert area_under_curve(computes, values, 10, 100, between="step").height == pytest.approx(1)
    assert area_under_curve([*computes, 1e4], [*values, 4], 1e3, 1e4).height == pytest.approx(3.5)
    assert area_under_curve([10, 100], [1, inf], 10, 100).why_undefined == "the value at 100 is inf"
    assert area_under_curve([10, 100], [1, -inf], 10, 1000, after="hold", between="step").why_undefined == "the value at 100 is -inf"
    assert area_under_curve([10, 100], [nan, 1], 1, 100, before=0).why_undefined == "the value at 10 is nan"


def test_bad_curves_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="low is 5 and high is 5, but an area over log compute needs 0 < low < high"):
        area_under_curve([1, 10], [0, 1], 5, 5)
    for low, high in ((0, 1), (-1, 1), (nan, 1), (1, inf)):
        with pytest.raises(ValueError, match="needs 0 < low < high, both finite"):
            area_under_curve([1, 10], [0, 1], low, high)
    with pytest.raises(ValueError, match="before is nan"):
        area_under_curve([1, 10], [0, 1], 1, 10, before=nan)
    with pytest.raises(ValueError, match=r"after is 'extend', .* \('hold'\)"):
        area_under_curve([1, 10], [0, 1], 1, 10, after="extend")
    for function in (lambda c, v, **o: area_under_curve(c, v, 1, 10, **o), lambda c, v, **o: compute_to_reach(c, v, 1, **o)):
        with pytest.raises(ValueError, match="between is 'cubic'"):
            function([1, 10], [0, 1], between="cubic")
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
    """Value 0 at 10 and 1 at 1000: 0.25 a quarter of two decades up, at 10^1.5. As a step only the snapshot at 1000 has it."""
    computes, values = [10, 1e3, 1e4], [0, 1, 0.2]
    got = compute_to_reach(computes, values, 0.25)
    assert got.compute == pytest.approx(10**1.5) and (got.reached, got.interpolated, got.at_first, got.n) == (True, True, False, 3)
    step = compute_to_reach(computes, values, 0.25, between="step")
    assert (step.compute, step.interpolated) == (pytest.approx(1e3), False)
    exact = compute_to_reach(computes, values, 1.0)
    assert (exact.compute, exact.interpolated) == (pytest.approx(1e3), False)
    mirrored = compute_to_reach(computes, [-value for value in values], -0.25, higher_is_better=False)
    assert mirrored.compute == pytest.approx(got.compute)
    below = compute_to_reach(computes, values, -1)
    assert (below.compute, below.at_first, below.interpolated) == (pytest.approx(10), True, False)
    never = compute_to_reach(computes, values, 2)
    assert np.isnan(never.compute) and not never.reached and never.n == 3


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_compute_to_reach_equals_the_first_of_a_fine_grid(higher_is_better):
    for seed in range(10):
        generator = rng(seed)
        x, y = np.sort(generator.uniform(0, 3, 7)), generator.normal(size=7)
        grid = np.linspace(x[0], x[-1], 100_001)
        line = np.interp(grid, x, y)
        there = (line >= 0.5) if higher_is_better else (line <= 0.5)
        got = compute_to_reach(10**x, y, 0.5, higher_is_better=higher_is_better)
        assert got.reached == there.any()
        if got.reached:
            assert np.log10(got.compute) == pytest.approx(grid[np.argmax(there)], abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_crossing_is_never_drawn_through_a_hole():
    hole = compute_to_reach([10, 100, 1e3], [0, nan, 1], 0.5)
    assert (hole.compute, hole.interpolated, hole.n, hole.missing) == (pytest.approx(1e3), False, 2, 1)
    start = compute_to_reach([10, 100], [nan, 1], 0.5)
    assert (start.compute, start.at_first) == (pytest.approx(100), True)
    for values, reached_at in (([-inf, 1], 100), ([0, inf], 100), ([inf, 0], 10)):
        got = compute_to_reach([10, 100], values, 0.5)
        assert (got.compute, got.interpolated) == (pytest.approx(reached_at), False)
    nothing = compute_to_reach([], [], 0.5)
    assert np.isnan(nothing.compute) and (nothing.n, nothing.reached) == (0, False)
    assert compute_to_reach([10, 100], [nan, nan], 0).missing == 2
    flat = compute_to_reach([10, 100], [1, 1], 1)
    assert (flat.compute, flat.at_first) == (pytest.approx(10), True)


def snapshots_of(curves):
    """{seed: (computes, values)} as the rows of one method."""
    rows = [
        {"seed": seed, "flops": flops, "value": value}
        for seed, (computes, values) in curves.items()
        for flops, value in zip(computes, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["seed", "flops", "value"])


def test_areas_over_seeds_are_a_mean_with_its_holes_counted():
    """Heights 0.5 and 1.5 from 10 to 100, and a seed whose curve ends too early: mean 1, t interval 1 +- 12.706 x 0.7071 / 1.4142."""
    snapshots = snapshots_of({0: ([10, 100], [0, 1]), 1: ([1, 10, 100], [9, 1, 2]), 2: ([1, 50], [0, 1])})
    got = area_over_seeds(snapshots[::-1], 10, 100)
    assert (got.height.n, got.height.missing, got.height.mean) == (2, 1, pytest.approx(1))
    assert got.height.high == pytest.approx(1 + 12.706 / 2, abs=1e-3)
    assert got.by_seed[2].why_undefined == "the curve ends at 50, before 100"
    full = area_over_seeds(snapshots, 10, 100, after="hold", between="step", level=0.5)
    assert (full.height.n, full.by_seed[0].height, full.by_seed[1].height) == (3, 0, 1)
    assert area_over_seeds(snapshots[:0], 10, 100).height.n == 0


def test_reaching_over_seeds_counts_who_does_not():
    """Seeds cross 0.5 at 10^1.5, 10^2.5 and never: the median of three is the second; of the first two, 10^2; with two failures, none."""
    curves = {0: ([10, 100], [0, 1]), 1: ([100, 1e3], [0, 1]), 2: ([10, 1e6], [0, 0.1]), 3: ([10, 1e6], [0, nan])}

    def reach(*seeds):
        return reach_over_seeds(snapshots_of({seed: curves[seed] for seed in seeds}), 0.5)

    three = reach(0, 1, 2)
    assert (three.n, three.reached, three.not_reached, three.median) == (3, 2, 1, pytest.approx(10**2.5))
    assert np.isnan(three.by_seed[2].compute) and three.by_seed[0].compute == pytest.approx(10**1.5)
    assert reach(0, 1).median == pytest.approx(100) and reach(1).median == pytest.approx(10**2.5)
    assert np.isnan(reach(0, 1, 2, 3).median) and reach(0, 1, 2, 3).reached == 2
    nothing = reach()
    assert (nothing.n, nothing.not_reached) == (0, 0) and np.isnan(nothing.median)
    falling = reach_over_seeds(snapshots_of({0: ([10, 1e3], [1, 0])}), 0.5, higher_is_better=False, between="step")
    assert falling.median == pytest.approx(1e3)


def test_shared_span_is_where_every_curve_is():
    first = snapshots_of({0: ([1, 100], [0, 1]), 1: ([5, 80, 1e3], [0, 1, nan])})
    second = snapshots_of({0: ([2, 90], [0, 1])})
    assert shared_span([first, second]) == (5, 80)
    assert area_over_seeds(first, *shared_span([first, second])).height.n == 2
    for none in ([], [first, snapshots_of({0: ([100, 200], [0, 1])})], [first, snapshots_of({0: ([1, 50], [nan, nan])})]):
        assert np.isnan(shared_span(none)).all()


def test_bad_snapshots_name_the_seed_and_the_column():
    with pytest.raises(ValueError, match=r"the snapshots lack the column\(s\) flops; a curve needs seed, flops, value"):
        area_over_seeds(pd.DataFrame({"seed": [0], "value": [1]}), 1, 10)
    with pytest.raises(ValueError, match=r"seed 3: a compute is 0.0"):
        reach_over_seeds(snapshots_of({3: ([0, 1], [0, 1])}), 1)
    with pytest.raises(ValueError, match=r"seed 3: compute 10 is listed twice"):
        shared_span([snapshots_of({3: ([10, 10], [0, 1])})])
