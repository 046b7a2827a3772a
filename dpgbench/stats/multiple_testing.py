"""P-values for claims from several comparisons, the seed as the unit: one of many, better over several tasks, better than every rival.

One of many: Holm's adjustment over a family of comparisons.

Over tasks: each seed's advantages on all tasks become one number, their mean, and those are tested. What a seed does to all tasks alike
(the prompts it draws, say) stays inside it, so tasks need not be independent of one another.

Against every rival: "better than all of them" is false as soon as it is false of one, so its p is the largest of the pairwise ones, with
no correction for their number (the intersection-union test; Berger 1982, Technometrics 24).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpgbench.stats.over_seeds import PairedDifference, difference_of_pairs


@dataclass(frozen=True, eq=False)
class AdjustedP:
    """Holm-adjusted p-values in the order and shape given; `tests` is the size of the family, `missing` the NaNs left out of it."""

    p: np.ndarray | pd.Series
    tests: int
    missing: int


def holm(p_values: Sequence[float] | np.ndarray | pd.Series) -> AdjustedP:
    """Holm's step-down adjustment over one family of comparisons (Holm 1979): valid however the tests depend on each other.

    The k-th smallest of m becomes min(1, max over j <= k of (m - j + 1) p_j). A NaN stays NaN and is not counted in m. A Series keeps its
    index. No adjusted p falls when a p rises, so `holm` of the smallest p's that the tests can reach gives the smallest adjusted ones.
    ValueError for a p outside [0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    outside = p[(p < 0) | (p > 1)]
    if len(outside):
        raise ValueError(f"a p-value is {outside[0]}, but p-values lie between 0 and 1; leave a test without a p as NaN")
    flat, adjusted = p.ravel(), np.full(p.size, np.nan)
    order = np.flatnonzero(~np.isnan(flat))
    order = order[np.argsort(flat[order], kind="stable")]
    tests = len(order)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(flat[order] * np.arange(tests, 0, -1)))
    adjusted = adjusted.reshape(p.shape)
    kept = pd.Series(adjusted, index=p_values.index) if isinstance(p_values, pd.Series) else adjusted
    return AdjustedP(kept, tests, p.size - tests)


@dataclass(frozen=True, eq=False)
class OverTasksDifference:
    """The mean over `tasks` of an advantage, tested over the seeds that all of them have; `left_out` has the other seeds."""

    difference: PairedDifference
    tasks: tuple[str, ...]
    left_out: tuple[int, ...]


def difference_over_tasks(
    advantages: Mapping[str, pd.Series], *, level: float = 0.95, generator: np.random.Generator | None = None
) -> OverTasksDifference:
    """Each Series holds one task's advantage by seed, in a unit that tasks share (a normalised score); every task weighs the same.

    A seed that a task lacks, or whose value is NaN, is left out: means over different tasks would not compare. No task gives n = 0.
    `generator` is needed above 12 common seeds, as in over_seeds.paired_difference. ValueError for a seed listed twice.
    """
    for task, series in advantages.items():
        if not series.index.is_unique:
            raise ValueError(f"task {task} has more than one value for a seed; a pair needs exactly one")
    seeds = functools.reduce(np.union1d, (series.index for series in advantages.values()), np.array([], dtype=int))
    grid = np.full((len(advantages), len(seeds)), np.nan)
    for row, series in zip(grid, advantages.values(), strict=True):
        row[np.searchsorted(seeds, series.index)] = series
    whole = ~np.isnan(grid).any(axis=0) if len(grid) else np.zeros(0, dtype=bool)
    means = grid[:, whole].sum(axis=0) / max(1, len(grid))
    difference = difference_of_pairs(means, np.zeros(len(means)), level=level, generator=generator)
    return OverTasksDifference(difference, tuple(advantages), tuple(int(seed) for seed in seeds[~whole]))


@dataclass(frozen=True)
class BetterThanAll:
    """Whether one method is better than every rival: `p` is the largest of its pairwise p-values, `hardest` the rival it is against.

    `t_p` is the same of the paired t tests. `ahead` says whether all mean differences are positive; where they are not, both are 1. `n` is
    the smallest number of pairs: the least p that the claim can reach by sign flips is that of a single test with n pairs, 2 / 2**n.
    """

    p: float
    hardest: str
    n: int
    ahead: bool
    t_p: float


def better_than_all(differences: Mapping[str, PairedDifference]) -> BetterThanAll:
    """From the method's advantage over each rival (positive: it is better). A rival without a pair, or without a p, leaves p NaN.

    Picking the best method first and testing it then costs nothing: with two methods the test is two-sided, and with more, one method
    has to beat them all (tests/test_verdicts.py simulates both). ValueError without a rival.
    """
    if not differences:
        raise ValueError("better_than_all needs at least one rival")
    n = min(found.n for found in differences.values())
    behind = {rival: found.mean for rival, found in differences.items() if found.n and not found.mean > 0}
    if behind:
        return BetterThanAll(1.0, min(behind, key=behind.__getitem__), n, False, 1.0)
    p = {rival: found.p if found.n else np.nan for rival, found in differences.items()}
    holes = [rival for rival, value in p.items() if np.isnan(value)]
    hardest = holes[0] if holes else max(p, key=p.__getitem__)
    t_ps = [found.t_p for found in differences.values()]
    return BetterThanAll(p[hardest], hardest, n, not holes, float(np.max(t_ps)))  # NaN where one is
