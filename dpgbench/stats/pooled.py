"""One question over all tasks: is a better than b? Paired by task and seed, tested by sign flips, Holm over all such questions of a study.

For task t and seed s let d_ts be the advantage of a over b (positive: a is better), n_t the task's pairs and w_t its weight (all equal
unless said otherwise, sum 1). The statistic is

    S = sum_t w_t (1 / n_t) sum_s d_ts / r_t,        r_t = sqrt((1 / n_t) sum_s d_ts^2).

Dividing by the root mean square r_t makes tasks with different units one sum, in which each counts for at most its weight: 1 where a is
ahead by the same amount with every seed, 0 where its advantages cancel. r_t depends on the sizes of the differences alone, so flipping
signs leaves it, and the test is exact. A standard deviation would not do: it changes with the signs.

**The test.** If a and b do not differ on any task, and pairs are independent, each d_ts is as likely to have the other sign. p is the share
of all 2^N sign patterns of the N pairs with |S| at least as large as observed. Up to 18 pairs they are enumerated. Above, they are all
counted as well, on a lattice: every |contribution| is rounded to a 65,536th of their sum, the distribution of the rounded sums is exact,
and the total rounding, which is known, brackets p. The upper end is reported, so the test stays valid. No random numbers are drawn.

What it rests on: pairs of one seed on different tasks are independent of each other. `flip="seeds"` does without: it flips a seed's
differences on all tasks together, at the price of 2^(number of seeds) patterns only.

**The effect.** S has no unit. Beside it stands the mean over tasks of the mean advantage in a unit that tasks share (the way from base to
oracle, say), with a t interval whose variance adds up over tasks (Welch-Satterthwaite).

Tasks are fixed: p and interval speak about these tasks with other seeds, not about other tasks. That is what leaving each task out is for.
Sources: Fisher 1935, The Design of Experiments, section 21 (sign flips); Pagano and Tritchler 1983, JASA 78 (counting patterns on a
lattice); Satterthwaite 1946, Biometrics Bulletin 2.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import special

from dpgbench.stats.multiple_testing import holm
from dpgbench.stats.over_seeds import SAME, Interval, check_level, pairs_by_seed, smallest_sign_flip_p

ENUMERATED = 18  # pairs: 262,144 patterns, a few milliseconds
LATTICE = 2**16  # ours: p's bracket is then narrower than 2% of it for p above 1e-5 and up to 72 pairs (tests/test_pooled.py)

Flip = Literal["pairs", "seeds"]
Key = TypeVar("Key", bound=Hashable)
Advantages = Mapping[str, pd.Series]
"""By task, one method's advantage over another by seed; positive: it is better."""


@dataclass(frozen=True)
class PooledTest:
    """S and its two-sided sign-flip p. `p_from` is the lower end of p's bracket; the two are equal where patterns were enumerated.

    `n` counts the pairs, `flipped` what had a sign of its own (the pairs, or the seeds), `smallest_p` is the least p that so many can
    reach. Where a difference is infinite, or there is none, S and p are NaN.
    """

    statistic: float
    p: float
    p_from: float
    smallest_p: float
    n: int
    flipped: int
    tasks: tuple[str, ...]


def advantages_by_seed(values_a: pd.Series, values_b: pd.Series, *, higher_is_better: bool = True) -> pd.Series:
    """The advantage of a over b for every seed that both have (a NaN is a seed not had); a difference below rounding is 0.

    Without that, two methods that score the same up to the last bits would differ by one whole root mean square. ValueError for a seed
    listed twice.
    """
    pairs, _ = pairs_by_seed(values_a, values_b)
    a, b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    with np.errstate(invalid="ignore"):
        differences = (a - b) * (1 if higher_is_better else -1)
        differences[np.abs(differences) <= SAME * np.maximum(np.abs(a), np.abs(b))] = 0.0
    return pd.Series(differences, index=pairs.index)


def pooled_test(
    advantages: Advantages,
    *,
    scales: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    flip: Flip = "pairs",
) -> PooledTest:
    """Whether the advantages, taken together, differ from 0. NaNs and tasks without a value are left out.

    `scales` divides by given numbers instead of root mean squares (the effect's units, say; they must not depend on the advantages' signs);
    `weights` of the tasks are 1 unless given, and are normalised. Cost: up to 5 ms a test. ValueError for a `flip` that is neither,
    a seed listed twice, and a scale or weight that is not positive.
    """
    if flip not in ("pairs", "seeds"):
        raise ValueError(f"flip is {flip!r}, but either each pair has a sign of its own ('pairs') or each seed ('seeds')")
    rows = _present(advantages)
    for name, given in (("scale", scales), ("weight", weights)):
        bad = [task for task in rows if given is not None and not given[task] > 0]
        if bad:
            raise ValueError(f"the {name} of task {bad[0]} is {given[bad[0]]}, but {name}s are positive")
    n, tasks = sum(len(row.values) for row in rows.values()), tuple(rows)
    if not n:
        return PooledTest(np.nan, np.nan, np.nan, np.nan, 0, 0, ())
    weight = _normalised(tasks, weights)
    parts = []
    for task, row in rows.items():
        scale = scales[task] if scales is not None else float(np.sqrt(np.mean(row.values**2)))
        with np.errstate(invalid="ignore"):  # an infinite advantage becomes NaN, and leaves no p
            parts.append(row.values * (weight[task] / (len(row.values) * scale)) if scale > 0 else row.values)
    contributions = np.concatenate(parts)
    if flip == "seeds":
        _, seed = np.unique(np.concatenate([row.seeds for row in rows.values()]), return_inverse=True)
        contributions = np.bincount(seed, weights=contributions)
    flipped = len(contributions)
    if not np.isfinite(contributions).all():
        return PooledTest(np.nan, np.nan, np.nan, smallest_sign_flip_p(flipped), n, flipped, tasks)
    p, p_from = sign_flip_p(contributions)
    return PooledTest(float(contributions.sum()), p, p_from, smallest_sign_flip_p(flipped), n, flipped, tasks)


def sign_flip_p(contributions: np.ndarray) -> tuple[float, float]:
    """(p, lower end of its bracket): the share of sign patterns with |sum| at least that of the contributions (N,), all 2^N counted."""
    sizes, observed = np.abs(contributions), abs(float(contributions.sum()))
    # Sums of the same numbers in another order differ in the last bits; without the slack a tie would count as "less extreme".
    slack = SAME * float(sizes.sum())
    if slack == 0.0:
        return 1.0, 1.0
    if len(sizes) <= ENUMERATED:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums + size, sums - size])
        p = float(np.mean(np.abs(sums) >= observed - slack))
        return p, p
    step = float(sizes.sum()) / LATTICE
    whole = np.sort(np.rint(sizes / step).astype(int))
    rounding = float(np.abs(np.sort(sizes) - whole * step).sum()) + slack
    # The sum of a pattern is total - 2 x what is flipped; `share` is the distribution of the latter, one coin after another.
    total, reached = int(whole.sum()), 0
    share = np.zeros(total + 1)
    share[0] = 1.0
    for size in whole:
        unflipped = share[: reached + 1] / 2
        share[: reached + 1] = unflipped
        share[size : reached + size + 1] += unflipped
        reached += int(size)
    distance = np.abs(total - 2 * np.arange(total + 1)) * step
    p, p_from = (float(share[distance >= bound].sum()) for bound in (observed - rounding, observed + rounding))
    return min(p, 1.0), max(p_from, smallest_sign_flip_p(len(sizes)))


def pooled_effect(
    advantages: Advantages, units: Mapping[str, float], *, weights: Mapping[str, float] | None = None, level: float = 0.95
) -> Interval:
    """The mean over tasks of the mean advantage in `units`, with a t interval; `n` counts the pairs.

    Its variance is sum_t w_t^2 s_t^2 / n_t (s_t the task's standard deviation, ddof=1), with Satterthwaite's degrees of freedom: tasks
    may differ in spread. Tasks without a positive unit are left out. A task with one pair, or an infinite value, leaves no interval. The
    units are taken as known. ValueError unless 0 < level < 1.
    """
    check_level(level)
    rows = {task: row.values / units[task] for task, row in _present(advantages).items() if units.get(task, np.nan) > 0}
    n = sum(map(len, rows.values()))
    if not rows:
        return Interval(0, np.nan, np.nan, np.nan)
    weight = _normalised(tuple(rows), weights)
    with np.errstate(invalid="ignore"):
        mean = float(sum(weight[task] * values.mean() for task, values in rows.items()))
    if not np.isfinite(mean) or any(len(values) < 2 for values in rows.values()):
        return Interval(n, mean, np.nan, np.nan)
    variances = np.array([weight[task] ** 2 * values.var(ddof=1) / len(values) for task, values in rows.items()])
    if not variances.sum() > 0:
        return Interval(n, mean, mean, mean)
    degrees = variances.sum() ** 2 / np.sum(variances**2 / [len(values) - 1 for values in rows.values()])
    half_width = float(special.stdtrit(degrees, 0.5 + level / 2) * np.sqrt(variances.sum()))
    return Interval(n, mean, mean - half_width, mean + half_width)


def task_unit(values_a: pd.Series, values_b: pd.Series, gap: float) -> float:
    """What a task's advantages are measured in: the way from base to oracle where there is one, else the spread between seeds.

    `gap` is |oracle - base|, NaN where there is no oracle. The spread is the root of the mean variance (ddof=1) of the two methods' values;
    NaN where there is none.
    """
    if gap > 0 and np.isfinite(gap):
        return float(gap)
    spread = np.sqrt(np.mean([values_a.dropna().var(ddof=1), values_b.dropna().var(ddof=1)]))
    return float(spread) if spread > 0 and np.isfinite(spread) else np.nan


@dataclass(frozen=True)
class LeftOut:
    """The question without one task: its effect, S and Holm's p, over the family of the same questions without that task."""

    effect: float
    statistic: float
    holm_p: float


@dataclass(frozen=True)
class PooledComparison:
    """The answer to one question of a family. `holm_p` adjusts for all questions of the family; so do those of `without` and `sensitivity`.

    `without` has each task left out, by task. `sensitivity` has the same question asked in another way, by what is different:
    (S, Holm's p). `seeds` counts those that any of its tasks has a pair of.
    """

    test: PooledTest
    effect: Interval
    holm_p: float
    meaningful: float | None
    alpha: float
    without: dict[str, LeftOut] = field(default_factory=dict)
    sensitivity: dict[str, tuple[float, float]] = field(default_factory=dict)
    seeds: int = 0

    @property
    def direction(self) -> int:
        """1 or -1 where a difference is shown (better, worse), 0 where none is."""
        return _direction(self.test.statistic, self.holm_p, self.alpha)

    @property
    def breaks_without(self) -> tuple[str, ...]:
        """The tasks without which another conclusion would be drawn."""
        found = {task: _direction(left.statistic, left.holm_p, self.alpha) for task, left in self.without.items()}
        return tuple(task for task, direction in found.items() if direction != self.direction)

    @property
    def verdict(self) -> str:
        """The answer in words.

        "better" and "worse" need Holm's p below alpha. What follows is about the effect's interval: wholly beyond `meaningful`, wholly
        within it on both sides, or neither ("size open"). "the scales disagree": S and the effect have different signs. Without a shown
        difference the interval may still say that any is too small to matter.
        """
        low, high = self.effect.low, self.effect.high
        known = self.meaningful is not None and np.isfinite([low, high]).all()
        small = known and -self.meaningful < low and high < self.meaningful
        if not self.direction:
            return f"not shown; any difference is below {self.meaningful:g}" if small else "not shown"
        word = "better" if self.direction > 0 else "worse"
        if self.effect.mean * self.direction < 0:
            return f"{word}, but the scales disagree"
        if not known:
            return word
        nearest = low if self.direction > 0 else -high
        return (
            f"{word}, meaningful" if nearest > self.meaningful else f"{word}, below {self.meaningful:g}" if small else f"{word}, size open"
        )


def pooled_family(
    questions: Mapping[Key, Advantages],
    units: Mapping[Key, Mapping[str, float]],
    *,
    meaningful: float | None = None,
    families: Mapping[str, str] | None = None,
    other_outcomes: Mapping[str, Mapping[Key, Advantages]] | None = None,
    alpha: float = 0.05,
    level: float = 0.95,
) -> dict[Key, PooledComparison]:
    """Every question (method against rival, say) pooled over its tasks, Holm's correction over all of them.

    `units` are the effect's, by question and task; `meaningful` is the difference in that unit that matters, fixed before the results.
    `families` names what each task belongs to: where some share one, sensitivity has each family weigh the same. `other_outcomes` are the
    same questions about another measure, by its name. Cost: about 5 ms x questions x (tasks + 4). ValueError as in pooled_test.
    """
    tests = {key: pooled_test(advantages) for key, advantages in questions.items()}
    adjusted = _adjusted({key: test.p for key, test in tests.items()})
    tasks = sorted({task for advantages in questions.values() for task in advantages})
    without = {task: _without(task, questions, units) for task in tasks} if len(tasks) > 1 else {}
    ways: dict[str, dict[Key, PooledTest]] = {
        "whole seeds flipped": {key: pooled_test(advantages, flip="seeds") for key, advantages in questions.items()},
        "in units of the effect": {key: _in_units(advantages, units[key]) for key, advantages in questions.items()},
    }
    if families is not None and len(set(families[task] for task in tasks)) < len(tasks):
        ways["each family of tasks one vote"] = {
            key: pooled_test(advantages, weights=_family_weights(_present(advantages), families)) for key, advantages in questions.items()
        }
    for name, others in (other_outcomes or {}).items():
        ways[f"by {name}"] = {key: pooled_test(advantages) for key, advantages in others.items()}
    adjusted_ways = {name: _adjusted({key: test.p for key, test in found.items()}) for name, found in ways.items()}
    return {
        key: PooledComparison(
            test, pooled_effect(questions[key], units[key], level=level), adjusted[key], meaningful, alpha,
            {task: left[key] for task, left in without.items() if task in test.tasks and len(test.tasks) > 1},
            {name: (found[key].statistic, adjusted_ways[name][key]) for name, found in ways.items() if key in found},
            ways["whole seeds flipped"][key].flipped,
        )
        for key, test in tests.items()
    }  # fmt: skip


def _without(task: str, questions: Mapping[Key, Advantages], units: Mapping[Key, Mapping[str, float]]) -> dict[Key, LeftOut]:
    kept = {key: {name: values for name, values in advantages.items() if name != task} for key, advantages in questions.items()}
    tests = {key: pooled_test(advantages) for key, advantages in kept.items()}
    adjusted = _adjusted({key: test.p for key, test in tests.items()})
    return {key: LeftOut(pooled_effect(kept[key], units[key]).mean, test.statistic, adjusted[key]) for key, test in tests.items()}


def _in_units(advantages: Advantages, units: Mapping[str, float]) -> PooledTest:
    known = {task: values for task, values in advantages.items() if units.get(task, np.nan) > 0}
    return pooled_test(known, scales=units)


def _family_weights(tasks: Collection[str], families: Mapping[str, str]) -> dict[str, float]:
    size = {family: sum(families[task] == family for task in tasks) for family in families.values()}
    return {task: 1 / size[families[task]] for task in tasks}


def _adjusted(ps: Mapping[Key, float]) -> dict[Key, float]:
    return dict(zip(ps, map(float, holm(list(ps.values())).p), strict=True))


def _direction(statistic: float, holm_p: float, alpha: float) -> int:
    return int(np.sign(statistic)) if holm_p < alpha else 0


class _Row(NamedTuple):
    """One task's advantages (n,) and the seeds they belong to; arrays, since pandas takes most of a test's time."""

    seeds: np.ndarray
    values: np.ndarray


def _present(advantages: Advantages) -> dict[str, _Row]:
    """The tasks that have a value, without their NaNs."""
    rows = {}
    for task, series in advantages.items():
        if not series.index.is_unique:
            raise ValueError(f"task {task} has more than one value for a seed; a pair needs exactly one")
        values = series.to_numpy(dtype=float)
        present = ~np.isnan(values)
        if present.any():
            rows[task] = _Row(series.index.to_numpy()[present], values[present])
    return rows


def _normalised(tasks: tuple[str, ...], weights: Mapping[str, float] | None) -> dict[str, float]:
    given = {task: 1.0 if weights is None else float(weights[task]) for task in tasks}
    return {task: value / sum(given.values()) for task, value in given.items()}
