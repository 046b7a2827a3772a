"""Mean ranks over tasks with the critical difference of Friedman's and Nemenyi's tests (Demšar 2006, JMLR 7).

Two uncertainties, kept apart: the critical difference asks whether the order would hold on other tasks (tasks are its blocks, so related
ones, four languages say, count as more evidence than they are); the interval of each mean rank asks whether it would hold with other
seeds (a bootstrap that draws seeds anew within each task, the same seeds for every method, which pair by seed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import optimize, special

from dpgbench.stats.aggregates import BOOTSTRAP_DRAWS, check_bootstrap, check_scores, percentiles, resampled


@dataclass(frozen=True, eq=False)
class MeanRanks:
    """`ranks`: index method, best first; columns mean, low, high (NaN where no interval exists); 1 is the best rank.

    `seeds_by_task` holds the seeds used, those that every ranked method has. `left_out` says of each method or task that is not part of
    the ranking why. `groups` are the largest sets of methods, in order, whose mean ranks lie within `critical_difference` of each other:
    the ranking does not tell them apart. `friedman_p` is NaN for fewer than 3 methods.
    """

    ranks: pd.DataFrame
    seeds_by_task: dict[str, tuple[int, ...]]
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    friedman_p: float
    left_out: dict[str, str] = field(default_factory=dict)


def mean_ranks(
    scores: pd.DataFrame,
    higher_is_better: Mapping[str, bool],
    *,
    generator: np.random.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = 0.95,
) -> MeanRanks:
    """Rank methods on each task by their mean over the seeds that all of them have (ties share their ranks), then average over tasks.

    `scores` has the columns task_label, method_label, seed, value. A method without a score on some task is left out, since a mean rank
    over fewer tasks is no comparison; so is a task on which the others share no seed. ValueError as in aggregates.normalise.
    """
    check_scores(scores)
    check_bootstrap(generator, draws, level)
    scores = scores.dropna(subset=["value"])
    tasks = sorted(set(scores["task_label"]))
    tasks_of = scores.groupby("method_label")["task_label"].nunique()
    left_out = {method: f"no score on {len(tasks) - n} of {len(tasks)} tasks" for method, n in tasks_of.items() if n < len(tasks)}
    methods = [method for method in tasks_of.index if method not in left_out]
    seeds_by_task, ranks, drawn = {}, [], []
    for task in tasks:
        rows = scores[(scores["task_label"] == task) & scores["method_label"].isin(methods)]
        table = rows.pivot(index="seed", columns="method_label", values="value").reindex(columns=methods).dropna().sort_index()
        values = table.to_numpy(dtype=float) * (-1 if higher_is_better[task] else 1)  # rank 1 to the best
        if not len(table) or not np.isfinite(values).all():
            left_out[task] = "an infinite score" if len(table) else "no seed that every ranked method has"
            continue
        seeds_by_task[task] = tuple(int(seed) for seed in table.index)
        ranks.append(_ranked(values.mean(axis=0)))
        counts = resampled(len(values), draws, generator)
        drawn.append(_ranked(counts @ values / len(values)) if len(values) > 1 else np.full((draws, len(methods)), np.nan))
    if not ranks or len(methods) < 2:
        empty = pd.DataFrame({name: np.array([]) for name in ("mean", "low", "high")})
        return MeanRanks(empty, seeds_by_task, np.nan, (), np.nan, left_out)
    low, high = percentiles(np.mean(drawn, axis=0), level)
    found = pd.DataFrame({"mean": np.mean(ranks, axis=0), "low": low, "high": high}, index=methods)
    found = found.sort_values("mean", kind="stable")
    difference = critical_difference(len(methods), len(ranks), 1 - level)
    friedman = friedman_p(np.array(ranks)) if len(methods) > 2 and len(ranks) > 1 else np.nan
    return MeanRanks(found, seeds_by_task, difference, _groups(found["mean"], difference), friedman, left_out)


def critical_difference(methods: int, tasks: int, alpha: float = 0.05) -> float:
    """Nemenyi: mean ranks over `tasks` further apart than this differ at family-wise level `alpha`.

    q sqrt(k (k + 1) / (6 N)), q the quantile of the range of k standard normal variables over sqrt(2).
    """
    # scipy.stats.studentized_range has the quantile too, but to import scipy.stats takes longer than all of a small report's numbers.
    z = np.arange(-9, 9, 0.01)  # of the smallest variable; a trapezoid over so smooth a density is exact to rounding
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * 0.01

    def exceeds(width: float) -> float:
        return 1 - alpha - methods * float(density @ (special.ndtr(z + width) - special.ndtr(z)) ** (methods - 1))

    quantile = optimize.brentq(exceeds, 0, 18, xtol=1e-12) / np.sqrt(2)
    return float(quantile * np.sqrt(methods * (methods + 1) / (6 * tasks)))


def friedman_p(ranks: np.ndarray) -> float:
    """Friedman's test that no method is better, from the ranks (tasks, methods), with the correction for ties; NaN where all are tied.

    The statistic is compared with chi squared of methods - 1 degrees of freedom: rough with few tasks (Demšar 2006, section 3.2.2).
    """
    tasks, methods = ranks.shape
    counts = np.concatenate([np.unique(row, return_counts=True)[1] for row in ranks])
    untied = 1 - (counts * (counts**2 - 1)).sum() / (methods * (methods**2 - 1) * tasks)
    if not untied:
        return np.nan
    squares = (ranks.sum(axis=0) ** 2).sum()
    return float(special.chdtrc(methods - 1, (12 / (methods * tasks * (methods + 1)) * squares - 3 * tasks * (methods + 1)) / untied))


def _ranked(means: np.ndarray) -> np.ndarray:
    """Ranks along the last axis. Means of the same numbers drawn in another order differ in the last bits, which is no difference."""
    scale = np.abs(means).max(axis=-1, keepdims=True)
    means = np.round(means / np.where(scale > 0, scale, 1.0), 12)
    ranks = np.empty(means.shape)
    for method in range(means.shape[-1]):  # the better ones, and half of those that share the rank
        own = means[..., method, None]
        ranks[..., method] = (means < own).sum(axis=-1) + ((means == own).sum(axis=-1) + 1) / 2
    return ranks


def _groups(means: pd.Series, difference: float) -> tuple[tuple[str, ...], ...]:
    """`means` in ascending order."""
    groups: list[tuple[str, ...]] = []
    for start, first in enumerate(means):
        members = tuple(means.index[start:][(means.iloc[start:] - first <= difference).to_numpy()])
        if len(members) > 1 and not (groups and set(members) <= set(groups[-1])):
            groups.append(members)
    return tuple(groups)
