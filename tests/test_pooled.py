"""dpgbench.stats.pooled: p against brute force, size under the null, power beside the test of single tasks, the words of a verdict."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.pooled import LATTICE, advantages_by_seed, pooled_effect, pooled_family, pooled_test, sign_flip_p, task_unit

nan, inf = np.nan, np.inf


def by_task(values):
    """{task: advantages by seed} from an array (tasks, seeds)."""
    return {f"t{task}": pd.Series(row, index=range(len(row)), dtype=float) for task, row in enumerate(np.asarray(values, dtype=float))}


def brute_force_p(values, weights=None):
    """By the definition: every sign of every pair, root mean squares and S anew for each pattern."""
    values = np.asarray(values, dtype=float)
    weights = np.full(len(values), 1 / len(values)) if weights is None else np.asarray(weights) / np.sum(weights)

    def statistic(d):
        return float(weights @ (d.mean(1) / np.sqrt((d**2).mean(1))))

    patterns = [np.reshape(signs, values.shape) for signs in itertools.product((1, -1), repeat=values.size)]
    extreme = [abs(statistic(values * pattern)) >= abs(statistic(values)) - 1e-9 for pattern in patterns]
    return statistic(values), float(np.mean(extreme))


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 1), (1, 6), (2, 3), (3, 4), (4, 3), (2, 6)])
def test_p_equals_brute_force(tasks, seeds):
    values = np.random.default_rng(tasks * 10 + seeds).normal(0.7, 1, (tasks, seeds)) * 10.0 ** np.arange(tasks)[:, None]
    found = pooled_test(by_task(values))
    assert (found.statistic, found.p) == pytest.approx(brute_force_p(values), abs=1e-12)
    assert found.p == found.p_from >= found.smallest_p == 2 / 2 ** (tasks * seeds) and found.n == found.flipped == tasks * seeds


def test_p_equals_brute_force_with_ties_weights_and_unequal_seeds():
    ties = [[0.1, 0.3, -0.2], [0.3, 0.1, 0.3]]  # not representable in binary
    assert pooled_test(by_task(ties)).p == pytest.approx(brute_force_p(ties)[1])
    weighted = pooled_test(by_task(ties), weights={"t0": 3.0, "t1": 1.0})
    assert (weighted.statistic, weighted.p) == pytest.approx(brute_force_p(ties, (3, 1)))
    ragged = {"x": pd.Series([1.0, 2.0, nan]), "y": pd.Series([3.0, -1.0, 2.0]), "z": pd.Series([nan])}
    found = pooled_test(ragged)
    rows = [np.array([1.0, 2.0]), np.array([3.0, -1.0, 2.0])]
    parts = np.concatenate([row / np.sqrt((row**2).mean()) / len(row) / 2 for row in rows])
    sums = [abs(parts @ np.array(signs)) for signs in itertools.product((1, -1), repeat=5)]
    assert found.statistic == pytest.approx(parts.sum()) and found.p == np.mean(np.array(sums) >= abs(parts.sum()) - 1e-12)
    assert (found.tasks, found.n) == (("x", "y"), 5)


def test_whole_seeds_flipped_equals_brute_force():
    values = np.random.default_rng(5).normal(0.4, 1, (5, 6))
    scaled = values / np.sqrt((values**2).mean(1, keepdims=True))
    by_seed = scaled.sum(0)
    sums = [abs(by_seed @ np.array(signs)) for signs in itertools.product((1, -1), repeat=6)]
    found = pooled_test(by_task(values), flip="seeds")
    assert found.p == np.mean(np.array(sums) >= abs(by_seed.sum()) - 1e-9) and (found.n, found.flipped, found.smallest_p) == (30, 6, 2 / 64)


def test_the_lattice_brackets_the_exact_p():
    """19 and 20 pairs, all 2^N patterns: the exact p lies in the bracket. 54 and 72 pairs: the bracket is narrow, and p is that of drawn
    patterns within 4 standard errors."""
    rng = np.random.default_rng(1)
    for n in (19, 20):
        for effect in (0.0, 0.5, 1.5):
            parts = rng.normal(effect, 1, n) * rng.choice([1, 0.01], n)
            sums = np.zeros(1)
            for size in np.abs(parts):
                sums = np.concatenate([sums + size, sums - size])
            exact = np.mean(np.abs(sums) >= abs(parts.sum()) - 1e-12)
            p, p_from = sign_flip_p(parts)
            assert p_from <= exact <= p <= 1.02 * p_from + 1e-5
    for n in (54, 72):
        parts = rng.normal(0.3, 1, n)
        p, p_from = sign_flip_p(parts)
        drawn = np.mean(np.abs(rng.choice([-1.0, 1.0], (20_000, n)) @ parts) >= abs(parts.sum()))
        assert p == pytest.approx(drawn, abs=4 * np.sqrt(p / 20_000)) and p_from <= p <= 1.02 * p_from
    assert sign_flip_p(np.ones(40))[0] == pytest.approx(2 / 2**40, rel=1e-6), "as small as it is, and not 0"
    assert LATTICE == 2**16


def test_scales_units_and_order_of_tasks_do_not_matter_to_s():
    values = np.random.default_rng(2).normal(0.5, 1, (4, 5))
    found = pooled_test(by_task(values))
    assert pooled_test(by_task(values * np.array([[1e-9], [1], [1e5], [3]]))).p == found.p
    turned = pooled_test(by_task(-values[::-1]))
    assert (turned.statistic, turned.p) == (pytest.approx(-found.statistic), found.p)
    assert pooled_test(by_task([[2.0] * 5, [7.0] * 5])).statistic == pytest.approx(1.0), "ahead by the same with every seed, on every task"


@pytest.mark.filterwarnings("error")
def test_holes_rounding_and_bad_input():
    same = advantages_by_seed(pd.Series([0.1 + 0.2, 1.0, 5.0]), pd.Series([0.3, 1.0, 4.0]))
    assert same.tolist() == [0.0, 0.0, 1.0], "what differs in the last bits is the same"
    assert advantages_by_seed(
        pd.Series([1.0, nan], index=[1, 2]), pd.Series([3.0, 4.0], index=[1, 2]), higher_is_better=False
    ).to_dict() == {1: 2}
    equal = pooled_test(by_task([[0.0, 0.0], [0.0, 0.0]]))
    assert (equal.statistic, equal.p) == (0, 1)
    with_equal = pooled_test(by_task([[0.0] * 4, [1.0, 2.0, 1.0, 1.0]]))
    assert with_equal.statistic == pytest.approx(0.5 * 1.25 / np.sqrt(7 / 4)), "a task without any difference counts as none"
    assert np.isnan(pooled_test(by_task([[inf, 1.0]])).p) and np.isnan(pooled_test({}).p) and pooled_test({}).n == 0
    scaled = "scale of task t0 is 0.0, but scales are positive"
    for given, said in (
        ({"flip": "tasks"}, "flip is 'tasks'"),
        ({"scales": {"t0": 0.0}}, scaled),
        ({"weights": {"t0": -1.0}}, "weight of"),
    ):
        with pytest.raises(ValueError, match=said):
            pooled_test(by_task([[1.0, 2.0]]), **given)
    with pytest.raises(ValueError, match="task t has more than one value for a seed"):
        pooled_test({"t": pd.Series([1.0, 2.0], index=[0, 0])})


def test_the_effect_by_hand():
    """Task 0 in units of 10: 0.1, 0.3: mean 0.2, variance 0.02; task 1 in units of 1: 0.4, 0.4, 0.7: mean 0.5, variance 0.03. Mean 0.35;
    its variance (0.02 / 2 + 0.03 / 3) / 4 = 0.005; degrees 0.005^2 / (0.0025^2 / 1 + 0.0025^2 / 2) = 2.667."""
    advantages = {"a": pd.Series([1.0, 3.0]), "b": pd.Series([0.4, 0.4, 0.7]), "no unit": pd.Series([9.0, 9.0])}
    found = pooled_effect(advantages, {"a": 10.0, "b": 1.0, "no unit": nan})
    half_width = stats.t.ppf(0.975, 8 / 3) * np.sqrt(0.005)
    assert (found.n, found.mean, found.low, found.high) == (5, *map(pytest.approx, (0.35, 0.35 - half_width, 0.35 + half_width)))
    single = pooled_effect({"a": pd.Series([1.0]), "b": pd.Series([1.0, 2.0])}, {"a": 1.0, "b": 1.0})
    assert single.mean == 1.25 and np.isnan(single.low), "one pair has no spread"
    assert pooled_effect({}, {}).n == 0 and np.isnan(pooled_effect({"a": pd.Series([inf, 1.0])}, {"a": 1.0}).low)
    assert task_unit(pd.Series([1.0, 3.0]), pd.Series([0.0, 4.0]), nan) == pytest.approx(np.sqrt((2 + 8) / 2))
    assert task_unit(pd.Series([1.0, 3.0]), pd.Series([0.0, 4.0]), 7.0) == 7.0
    assert np.isnan(task_unit(pd.Series([1.0, 1.0]), pd.Series([2.0, 2.0]), 0.0))


def test_the_effects_interval_covers():
    """1,000 experiments, 8 tasks x 9 seeds, spreads from 0.1 to 10: 95% within 4 standard errors (0.007 each)."""
    rng, covered = np.random.default_rng(8), 0
    spread = np.geomspace(0.1, 10, 8)[:, None]
    units = {f"t{task}": 1.0 for task in range(8)}
    for _ in range(1000):
        found = pooled_effect(by_task(2 + rng.normal(0, spread, (8, 9))), units)
        covered += found.low <= 2 <= found.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.028)


NULLS = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "three values": lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape),
    "tasks of unequal scale": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, (shape[0], 1)),
    "seeds of unequal scale": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2, (1, shape[1])),
    "opposite effects": lambda rng, shape: rng.normal(size=shape) + np.where(np.arange(shape[0]) % 2, 1.0, -1.0)[:, None],
}


def rejections(draw, experiments, shape, seed, **options):
    rng = np.random.default_rng(seed)
    return np.mean([pooled_test(by_task(draw(rng, shape)), **options).p <= 0.05 for _ in range(experiments)])


@pytest.mark.parametrize("null", NULLS)
def test_size_under_the_null(null):
    """3 tasks (4 for opposite effects, which cancel) x 4 seeds, all patterns enumerated, 400 experiments: at most 5%, 4 standard errors."""
    shape = (4, 4) if null == "opposite effects" else (3, 4)
    assert rejections(NULLS[null], 400, shape, 11) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_size_under_the_null_at_full_length(null):
    """8 tasks x 9 seeds, 2,000 experiments: at most 5%, and not far below where the differences are symmetric without a lump at 0."""
    share = rejections(NULLS[null], 2000, (8, 9), 12)
    print(f"size, {null}: {share:.4f}")
    assert share <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)
    assert share >= 0.03 or null == "opposite effects", "an exact test uses its level"


def test_luck_that_a_seed_shares_between_tasks_is_what_flipping_whole_seeds_is_for():
    """Correlation 0.5 between tasks of one seed, 3 tasks x 6 seeds: flipping pairs rejects far more than 5%, whole seeds do not."""

    def shared(rng, shape):
        return rng.normal(size=(1, shape[1])) + rng.normal(size=shape)

    assert rejections(shared, 300, (3, 6), 3) > 0.10
    assert rejections(shared, 600, (3, 6), 3, flip="seeds") <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 600)


def power(effect, tasks, seeds, experiments, rng):
    """Shares of experiments in which Holm over 10 rivals, nine without an effect, shows the first: pooled; on a task at least, Holm over
    tasks x rivals: by sign flips; by paired t; and the mean share of tasks shown so by t."""
    found = np.zeros(4)
    for _ in range(experiments):
        values = rng.normal(size=(10, tasks, seeds))
        values[0] += effect
        pooled = holm([pooled_test(by_task(rival)).p for rival in values]).p[0]
        flips = [[sign_flip_p(row)[0] for row in rival] for rival in values]
        t = stats.ttest_1samp(values, 0, axis=2).pvalue
        by_flips, by_t = holm(np.array(flips)).p[0] < 0.05, holm(t).p[0] < 0.05
        found += pooled < 0.05, by_flips.any(), by_t.any(), by_t.mean()
    return found / experiments


def test_power_beside_the_tests_of_single_tasks():
    """9 seeds x 8 tasks, an effect of 0.7 standard deviations on each, 8 experiments: the pooled test finds it nearly always, while 2 / 2^9
    times 80 comparisons leaves sign flips on single tasks nothing to find."""
    pooled, by_flips, _, share = power(0.7, 8, 9, 8, np.random.default_rng(21))
    assert pooled >= 0.75 and by_flips == 0 and share < 0.5


@pytest.mark.slow
def test_power_table_of_the_protocol():
    """The table in docs/protocol.md: 200 experiments a row."""
    for seeds, effect in ((6, 0.3), (6, 0.5), (9, 0.3), (9, 0.5), (9, 0.7), (12, 0.3)):
        pooled, by_flips, by_t, share = power(effect, 8, seeds, 200, np.random.default_rng(seeds))
        print(f"power, {seeds} seeds, effect {effect}: pooled {pooled:.2f}, a task by flips {by_flips:.2f}, by t {by_t:.2f} ({share:.3f})")
        assert pooled > share + 0.1 and pooled > by_flips


def test_family_is_holm_over_all_questions_with_each_task_left_out_and_other_ways_of_asking():
    rng = np.random.default_rng(6)
    questions = {name: by_task(rng.normal(effect, 1, (3, 5))) for name, effect in (("clear", 2.0), ("none", 0.0), ("some", 0.6))}
    units = {name: {f"t{task}": 2.0 for task in range(3)} for name in questions}
    families = {"t0": "pictures", "t1": "pictures", "t2": "words"}
    other = {name: {task: -values for task, values in advantages.items()} for name, advantages in questions.items()}
    found = pooled_family(questions, units, meaningful=0.1, families=families, other_outcomes={"phi": other})
    tests = {name: pooled_test(advantages) for name, advantages in questions.items()}
    assert [found[name].holm_p for name in questions] == pytest.approx(list(holm([test.p for test in tests.values()]).p))
    for name, comparison in found.items():
        assert comparison.test == tests[name] and comparison.effect == pooled_effect(questions[name], units[name])
        assert comparison.effect.mean == pytest.approx(np.mean([values.mean() / 2 for values in questions[name].values()]))
        for task, left in comparison.without.items():
            kept = {key: {t: v for t, v in advantages.items() if t != task} for key, advantages in questions.items()}
            ps = holm([pooled_test(advantages).p for advantages in kept.values()]).p
            assert left.holm_p == pytest.approx(ps[list(questions).index(name)]) and left.statistic == pooled_test(kept[name]).statistic
        assert set(comparison.sensitivity) == {
            "whole seeds flipped", "in units of the effect", "each family of tasks one vote", "by phi"}  # fmt: skip
        assert comparison.sensitivity["by phi"] == (pytest.approx(-comparison.test.statistic), comparison.holm_p)
        voted = pooled_test(questions[name], weights={"t0": 0.5, "t1": 0.5, "t2": 1.0})
        assert comparison.sensitivity["each family of tasks one vote"][0] == pytest.approx(voted.statistic)
        assert comparison.sensitivity["in units of the effect"][0] == pytest.approx(comparison.effect.mean)
    assert found["clear"].verdict == "better, meaningful" and found["none"].verdict == "not shown"
    assert "each family of tasks one vote" not in pooled_family(questions, units, families={t: t for t in families})["none"].sensitivity
    assert pooled_family({"one": {"t0": pd.Series([1.0, 2.0])}}, {"one": {"t0": 1.0}})["one"].without == {}


def verdict(mean, spread, meaningful=0.1, signs=None, tasks=4, seeds=6):
    values = mean + spread * np.resize([1.0, -1.0], (tasks, seeds)) * (1 if signs is None else np.array(signs)[:, None])
    units = {f"t{task}": 1.0 for task in range(tasks)}
    return pooled_family({"q": by_task(values)}, {"q": units}, meaningful=meaningful)["q"]


def test_verdicts_in_words():
    assert verdict(0.5, 0.2).verdict == "better, meaningful" and verdict(-0.5, 0.2).verdict == "worse, meaningful"
    assert verdict(0.12, 0.1).verdict == "better, size open" and verdict(-0.12, 0.1).verdict == "worse, size open"
    assert verdict(0.05, 0.02).verdict == "better, below 0.1" and verdict(-0.05, 0.02).verdict == "worse, below 0.1"
    assert verdict(0.0, 1.0).verdict == "not shown" and verdict(0.0, 0.01).verdict == "not shown; any difference is below 0.1"
    assert verdict(0.5, 0.2, meaningful=None).verdict == "better"
    values = np.array([[1.0] * 6, [1.0] * 6, [1.0] * 6, [-9.0, -9.0, -9.0, -9.0, -9.0, -9.1]])
    odd = pooled_family({"q": by_task(values)}, {"q": {f"t{task}": 1.0 for task in range(4)}}, meaningful=0.1)["q"]
    assert odd.verdict == "better, but the scales disagree", "three small advantages and a large loss"


def test_a_conclusion_that_one_task_makes_is_said_to_break_without_it():
    values = np.concatenate([np.full((1, 10), 1.0), np.resize([1.0, -1.0], (1, 10)) * 3])
    found = pooled_family({"q": by_task(values)}, {"q": {"t0": 1.0, "t1": 1.0}})["q"]
    assert found.direction == 1 and found.breaks_without == ("t0",)
