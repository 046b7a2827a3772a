"""Over tasks: normalised scores, and aggregates of tasks x seeds.

Scores are grids: a DataFrame with a row per task and a column per seed, NaN where there is none, higher is better unless said otherwise;
whatever could not be put together is named. Aggregates and their stratified bootstrap follow Agarwal et al. 2021, arXiv 2108.13264
(rliable): seeds are drawn anew within each task. Its 95% intervals are too narrow with few seeds: simulated for the IQM of 4 tasks with
Gaussian scores they cover about 72% with 2 seeds a task, 85% with 3, 90% with 5, 93% with 10 (tests/test_aggregates.py), little better
with 8 tasks. Show that beside them; they are no test.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dpgbench.stats.over_seeds import SAME, check_level, mean_interval

BOOTSTRAP_DRAWS = 5_000  # ours: the share of draws beyond a 2.5% point then has standard error 0.0022


@dataclass(frozen=True)
class Anchors:
    """The 0 and the 1 of one task's normalised scores: means over seeds, whose they are, and over how many seeds.

    `ceiling_label` is the oracle, or the best method where the oracle has no value. `why_undefined` is not empty where they span no scale.
    """

    base: float
    base_n: int
    ceiling: float
    ceiling_n: int
    ceiling_label: str
    higher_is_better: bool
    why_undefined: str = ""


@dataclass(frozen=True, eq=False)
class NormalisedScores:
    """`scores` with a column `normalised`, the anchors by task, and the tasks whose anchors are undefined (NaN throughout).

    `missing` counts the NaNs in `normalised`, from undefined anchors or from a NaN score.
    """

    scores: pd.DataFrame
    anchors: dict[str, Anchors]
    undefined: tuple[str, ...]
    missing: int


def normalise(
    scores: pd.DataFrame, higher_is_better: Mapping[str, bool], *, base: str = "base", oracle: str = "oracle"
) -> NormalisedScores:
    """(value - base mean) / (ceiling mean - base mean) per task: 0 is the untouched generator, 1 the oracle, higher always better.

    `scores` has the columns task_label, method_label, seed, value, one row per score; `higher_is_better` has every task. Without an
    oracle the ceiling is the best mean among the methods with the most seeds (one lucky seed sets no scale): that method's normalised
    mean is then 1 by construction, which is no finding. A ceiling that is not better than base, or not finite, leaves the task NaN. The
    anchors are taken as known: intervals of normalised scores do not hold their uncertainty. ValueError for a lacking column or
    direction, and for a second value of a task, method and seed.
    """
    check_scores(scores)
    lacking = sorted(set(scores["task_label"]) - set(higher_is_better))
    if lacking:
        raise ValueError(f"higher_is_better says nothing about {', '.join(lacking)}; it needs the direction of every task")
    normalised = pd.Series(np.nan, index=scores.index, dtype=float)
    anchors = {}
    for task, rows in scores.groupby("task_label", sort=True):
        anchors[task] = _anchors(rows, bool(higher_is_better[task]), base, oracle)
        if not anchors[task].why_undefined:
            normalised[rows.index] = (rows["value"].astype(float) - anchors[task].base) / (anchors[task].ceiling - anchors[task].base)
    undefined = tuple(task for task, found in anchors.items() if found.why_undefined)
    return NormalisedScores(scores.assign(normalised=normalised), anchors, undefined, int(normalised.isna().sum()))


def _anchors(rows: pd.DataFrame, higher_is_better: bool, base: str, oracle: str) -> Anchors:
    means = {label: mean_interval(values) for label, values in rows.groupby("method_label", sort=True)["value"]}
    means = {label: mean for label, mean in means.items() if mean.n}
    ceiling = oracle
    if oracle not in means:
        competing = {label: mean for label, mean in means.items() if label != base and np.isfinite(mean.mean)}
        most = max((mean.n for mean in competing.values()), default=0)
        full = [label for label, mean in competing.items() if mean.n == most]
        sign = 1 if higher_is_better else -1
        ceiling = max(full, key=lambda label: sign * means[label].mean, default="")
    nothing = mean_interval([])
    low, high = means.get(base, nothing), means.get(ceiling, nothing)
    direction = "higher" if higher_is_better else "lower"
    gain = (high.mean - low.mean) * (1 if higher_is_better else -1) if np.isfinite([low.mean, high.mean]).all() else np.nan
    why = ""
    if not low.n:
        why = f"no value of {base}"
    elif not high.n:
        why = f"neither {oracle} nor a method with a finite mean"
    elif np.isnan(gain):
        why = f"the mean of {base if not np.isfinite(low.mean) else ceiling} is not finite"
    elif gain <= SAME * max(abs(low.mean), abs(high.mean)):
        why = f"{ceiling} ({high.mean:.6g}) is not better than {base} ({low.mean:.6g}), and {direction} is better"
    return Anchors(low.mean, low.n, high.mean, high.n, ceiling, higher_is_better, why)


def score_grid(scores: pd.DataFrame, method_label: str, column: str = "normalised") -> pd.DataFrame:
    """One method's scores as a grid: all of the frame's tasks x all of its seeds, NaN where the method has none.

    ValueError for a lacking column, an unknown method, and a second value of a task, method and seed.
    """
    check_scores(scores, column)
    rows = scores[scores["method_label"] == method_label]
    if rows.empty:
        known = ", ".join(sorted(set(scores["method_label"]))) or "none"
        raise ValueError(f"no score of method {method_label!r}; the frame has {known}")
    grid = rows.set_index(["task_label", "seed"])[column].astype(float).unstack("seed")
    return grid.reindex(index=sorted(set(scores["task_label"])), columns=sorted(set(scores["seed"])))


def check_scores(scores: pd.DataFrame, column: str = "value") -> None:
    """ValueError unless the scores have their columns, a row per index and at most one value of a task, method and seed."""
    needed = ("task_label", "method_label", "seed", column)
    lacking = [name for name in needed if name not in scores.columns]
    if lacking:
        raise ValueError(f"the scores lack the column(s) {', '.join(lacking)}; they need {', '.join(needed)}")
    if not scores.index.is_unique:
        raise ValueError("the scores have rows with the same index; reset_index(drop=True) makes every row its own")
    keys = scores[["task_label", "method_label", "seed"]]
    if keys.duplicated().any():
        task, method, seed = keys[keys.duplicated()].iloc[0]
        raise ValueError(f"task {task}, method {method}, seed {seed} has more than one value; keep the final snapshot of one cell")


@dataclass(frozen=True, eq=False)
class OverTasks:
    """A number over tasks x seeds (an array of them in a profile) with its bootstrap interval, and what it rests on.

    `n_by_task` has the seeds of every task used (of both sides, where two are compared), `n` their sum, `missing` counts the NaNs left
    out, and `left_out` names the tasks without a value. `low` and `high` are NaN where no interval exists; `why_no_interval` says why.
    """

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray
    n: int = 0
    missing: int = 0
    n_by_task: dict[str, int | tuple[int, int]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    why_no_interval: str = ""


def interquartile_mean(
    grid: pd.DataFrame, *, generator: np.random.Generator, draws: int = BOOTSTRAP_DRAWS, level: float = 0.95
) -> OverTasks:
    """IQM: the mean of the middle half of all tasks x seeds values, a quarter (rounded down) cut at each end; percentile interval.

    On a grid without holes this is scipy's trim_mean(values, 0.25), as in rliable. With holes every task still weighs the same: the
    values of each are repeated until all tasks have equally many. An infinite value in a cut quarter does no harm. A task with one seed
    leaves no interval, since drawing from one value anew shows no spread. Memory: draws x values x 4 bytes. ValueError for a bad grid,
    generator, number of draws or level.
    """
    check_bootstrap(generator, draws, level)
    rows, left_out, missing = _rows(grid)
    n_by_task = {task: len(values) for task, values in rows.items()}
    if not rows:
        return OverTasks(np.nan, np.nan, np.nan, 0, missing, {}, left_out, "no value")
    values = np.concatenate(list(rows.values()))
    value = float(_middle_half_means(values, list(n_by_task.values()), np.ones((len(values), 1), dtype=int))[0])
    why = _why_no_interval(n_by_task)
    low = high = np.nan
    if not why:
        counts = _resampled_runs(n_by_task.values(), draws, generator)
        low, high = map(float, percentiles(_middle_half_means(values, list(n_by_task.values()), counts), level))
        why = "inf and -inf meet in the middle half of some draws" if np.isnan(low) else ""
    return OverTasks(value, low, high, len(values), missing, n_by_task, left_out, why)


def interquartile_curve(
    by_task: Mapping[str, np.ndarray], *, generator: np.random.Generator, draws: int = BOOTSTRAP_DRAWS, level: float = 0.95
) -> OverTasks:
    """`interquartile_mean` at P places of curves; arrays (P,). `by_task` has the curves (seeds, P) of each task's seeds.

    The draws are the same seeds at every place: the intervals of one place are those of interquartile_mean, and their ends move along the
    curves smoothly. A place where a curve is NaN gives NaN: a mean over fewer curves would not compare with the one beside it. Memory as
    there, whatever P. ValueError as there, and for a task without a curve.
    """
    check_bootstrap(generator, draws, level)
    n_by_task = {task: len(curves) for task, curves in by_task.items()}
    if not n_by_task or not all(n_by_task.values()):
        raise ValueError(f"curves are given of {n_by_task}, but every task needs one")
    numbers, curves = list(n_by_task.values()), np.concatenate(list(by_task.values()))
    why = _why_no_interval(n_by_task)
    counts = None if why else _resampled_runs(numbers, draws, generator)
    value, low, high = (np.full(curves.shape[1], np.nan) for _ in range(3))
    for place in np.flatnonzero(~np.isnan(curves).any(axis=0)):
        value[place] = _middle_half_means(curves[:, place], numbers, np.ones((len(curves), 1), dtype=int))[0]
        if counts is not None:
            low[place], high[place] = percentiles(_middle_half_means(curves[:, place], numbers, counts), level)
    return OverTasks(value, low, high, len(curves), int(np.isnan(curves).sum()), n_by_task, (), why)


def _resampled_runs(numbers: Iterable[int], draws: int, generator: np.random.Generator) -> np.ndarray:
    """(N, draws): how often each draw has each of the N runs, of tasks with these numbers of them, drawn within the tasks."""
    return np.concatenate([resampled(n, draws, generator).T.astype(np.int32) for n in numbers])


def _middle_half_means(values: np.ndarray, numbers: Sequence[int], counts: np.ndarray) -> np.ndarray:
    """(draws,): the mean of the middle half of the values (N,), of which a draw has `counts` (N, draws): no draw is sorted again.

    The values are those of tasks with these numbers of them, repeated until every task has equally many.
    """
    common = math.lcm(*numbers)
    copies = np.concatenate([np.full(n, common // n, dtype=float) for n in numbers])
    total, cut = float(common * len(numbers)), float(common * len(numbers) // 4)
    in_order = np.argsort(values, kind="stable")
    values, copies, found = values[in_order], copies[in_order], []
    at_once = max(1, 1_000_000 // len(values))  # draws: a table of this size stays in the processor's cache better than all
    for start in range(0, counts.shape[1], at_once):
        kept = np.cumsum(counts[in_order, start : start + at_once] * copies[:, None], axis=0)
        np.clip(kept, cut, total - cut, out=kept)
        kept[1:] -= kept[:-1].copy()
        kept[0] -= cut
        if np.isfinite(values).all():
            found.append(values @ kept)
            continue
        with np.errstate(invalid="ignore"):  # not a plain product: 0 copies of an infinite value are 0, not NaN
            found.append(np.multiply(kept, values[:, None], out=np.zeros(kept.shape), where=kept > 0).sum(axis=0))
    return np.concatenate(found) / (total - 2 * cut)


def performance_profile(
    grid: pd.DataFrame,
    thresholds: Sequence[float] | np.ndarray,
    *,
    generator: np.random.Generator,
    draws: int = BOOTSTRAP_DRAWS,
    level: float = 0.95,
) -> OverTasks:
    """The share of runs that score strictly above each of the thresholds (T,), every task weighing the same; arrays (T,).

    With holes a task's share is over the seeds it has. The interval holds for one threshold at a time, not for the whole curve; at a
    share of 0 or 1 it has no width, since no spread was seen. A task with one seed leaves none. Memory: draws x thresholds.
    ValueError as in interquartile_mean, and for a NaN threshold or none.
    """
    check_bootstrap(generator, draws, level)
    thresholds = np.asarray(thresholds, dtype=float).ravel()
    if not len(thresholds) or np.isnan(thresholds).any():
        raise ValueError(f"thresholds are {thresholds.tolist()}, but a profile needs at least one and no NaN among them")
    rows, left_out, missing = _rows(grid)
    n_by_task = {task: len(values) for task, values in rows.items()}
    low = high = nothing = np.full(thresholds.shape, np.nan)
    if not rows:
        return OverTasks(nothing, nothing, nothing, 0, missing, {}, left_out, "no value")
    above = {task: (values[:, None] > thresholds).astype(float) for task, values in rows.items()}
    share = np.mean([task_above.mean(axis=0) for task_above in above.values()], axis=0)
    why = _why_no_interval(n_by_task)
    if not why:
        drawn = np.zeros((draws, len(thresholds)))
        for task_above in above.values():
            drawn += resampled(len(task_above), draws, generator) @ task_above / (len(task_above) * len(rows))
        low, high = percentiles(drawn, level)
    return OverTasks(share, low, high, sum(n_by_task.values()), missing, n_by_task, left_out, why)


def probability_of_improvement(
    grid_a: pd.DataFrame,
    grid_b: pd.DataFrame,
    *,
    generator: np.random.Generator,
    lower_is_better: Collection[str] = (),
    draws: int = BOOTSTRAP_DRAWS,
    level: float = 0.95,
) -> OverTasks:
    """P(a run of a is better than a run of b): per task the share of all seed pairs that a wins, ties half (Mann-Whitney U / n m).

    Needs no common unit, so raw scores do, with the tasks of `lower_is_better` turned round. Seeds are drawn for a and b independently, as
    in the paper: where a seed helps or hurts both sides alike, the interval is wider for it. A side that wins every pair gets [1, 1] or
    [0, 0]: no spread was seen, which few seeds easily do. A task with one seed on a side leaves no interval. ValueError as in
    interquartile_mean, and where the grids' tasks differ or a task is unknown.
    """
    check_bootstrap(generator, draws, level)
    if set(grid_a.index) != set(grid_b.index):
        only = sorted(set(grid_a.index) ^ set(grid_b.index))
        raise ValueError(f"only one grid has the task(s) {', '.join(map(str, only))}; give both every task, NaN where there is no value")
    unknown = sorted(set(lower_is_better) - set(grid_a.index))
    if unknown:
        raise ValueError(f"lower_is_better names {', '.join(unknown)}, but the grids have {', '.join(map(str, grid_a.index))}")
    (rows_a, _, missing_a), (rows_b, _, missing_b) = _rows(grid_a), _rows(grid_b)
    tasks = [task for task in rows_a if task in rows_b]
    left_out = tuple(task for task in grid_a.index if task not in tasks)
    wins = {}
    for task in tasks:
        sign = -1 if task in lower_is_better else 1
        ahead, behind = sign * rows_a[task][:, None], sign * rows_b[task]
        wins[task] = (ahead > behind) + 0.5 * (ahead == behind)
    if not tasks:
        return OverTasks(np.nan, np.nan, np.nan, 0, missing_a + missing_b, {}, left_out, "no task where both have a value")
    n_by_task = {task: won.shape for task, won in wins.items()}
    why = _why_no_interval({task: min(shape) for task, shape in n_by_task.items()})
    low = high = np.nan
    if not why:
        drawn = np.zeros(draws)
        for won in wins.values():
            counts_a, counts_b = (resampled(n, draws, generator) for n in won.shape)
            drawn += ((counts_a @ won) * counts_b).sum(axis=1) / (won.size * len(tasks))
        low, high = map(float, percentiles(drawn, level))
    value, n = float(np.mean([won.mean() for won in wins.values()])), sum(map(sum, n_by_task.values()))
    return OverTasks(value, low, high, n, missing_a + missing_b, n_by_task, left_out, why)


def _rows(grid: pd.DataFrame) -> tuple[dict[str, np.ndarray], tuple[str, ...], int]:
    """(the values of every task that has any, the tasks that have none, how many NaNs)."""
    for name, labels in (("task", grid.index), ("seed", grid.columns)):
        if not labels.is_unique:
            twice = sorted(set(labels[labels.duplicated()]))
            raise ValueError(f"{name} {', '.join(map(str, twice))} is in the grid twice; a grid has one row per task, one column per seed")
    values = grid.to_numpy(dtype=float)
    rows = {task: row[~np.isnan(row)] for task, row in zip(grid.index, values, strict=True)}
    left_out = tuple(task for task, row in rows.items() if not len(row))
    return {task: row for task, row in rows.items() if len(row)}, left_out, int(np.isnan(values).sum())


def _why_no_interval(n_by_task: Mapping[str, int]) -> str:
    single = [task for task, n in n_by_task.items() if n == 1]
    return f"one seed only on {', '.join(map(str, single))}: no spread to draw from" if single else ""


def resampled(n: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """(draws, n): how often each of n values comes up when n are drawn with replacement."""
    return generator.multinomial(n, np.full(n, 1 / n), size=draws)


def percentiles(drawn: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The central `level` of the draws along axis 0: two of the draws themselves, never a number between them (inf - inf is NaN)."""
    beyond = int((1 - level) / 2 * len(drawn) + 1e-9)
    low, high, last = beyond, len(drawn) - 1 - beyond, len(drawn) - 1
    in_place = np.partition(drawn, (low, high, last), axis=0)  # these three as a sort would leave them, in half its time
    holes = np.isnan(in_place[last])  # NaNs sort last
    return np.where(holes, np.nan, in_place[low]), np.where(holes, np.nan, in_place[high])


def check_bootstrap(generator: np.random.Generator, draws: int, level: float) -> None:
    """ValueError for anything but a numpy generator, for a level outside (0, 1) and for too few draws for its ends."""
    check_level(level)
    if not isinstance(generator, np.random.Generator):
        raise ValueError(f"generator is {generator!r}, but a bootstrap draws from a named generator: np.random.default_rng(seed)")
    if draws * (1 - level) / 2 < 1 - 1e-9:
        needed = math.ceil(2 / (1 - level) - 1e-9)
        raise ValueError(f"draws is {draws}, but a {level:.0%} interval needs at least {needed}: one draw beyond each end")
