"""Over all tasks: normalised scores and their aggregates, ranks, who is ahead at equal FLOPs; computed once, for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dpgbench.core.protocol import NOTHING_FIXED, Protocol
from dpgbench.report.final_scores import COLUMNS, final_scores, on_one_scale
from dpgbench.report.format import and_more, plural
from dpgbench.report.pooled import Family, pooled_comparisons
from dpgbench.report.results import BASE, ORACLE, SuiteResults
from dpgbench.report.task_tables import MethodRow, generator_for, matched_pairs, method_rows
from dpgbench.stats.aggregates import (
    Anchors,
    OverTasks,
    interquartile_curve,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    score_grid,
)
from dpgbench.stats.curves import answer_at, curves_by_seed
from dpgbench.stats.equal_compute import MatchedComparison
from dpgbench.stats.ranks import MeanRanks, mean_ranks

GRID_POINTS = 48  # of the budget curves: about 12 a decade over four decades
CURVE_DRAWS = 1000  # for bands that are only looked at; a number in a table has BOOTSTRAP_DRAWS
THRESHOLDS = np.linspace(-0.25, 1.25, 61)

Pairs = dict[tuple[str, str], MatchedComparison]


@dataclass(frozen=True, eq=False)
class BudgetCurve:
    """One method's IQM of the normalised score against FLOPs. Beyond `all_until` some of its runs had ended and hold their last answer."""

    flops: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    all_until: float


@dataclass(frozen=True, eq=False)
class Across:
    """Everything computed once, mostly over tasks; `rows` and `pairs` by task.

    `complete` are the labels with a normalised score on every task that has a scale; only those are drawn.
    """

    anchors: dict[str, Anchors]
    complete: tuple[str, ...]
    iqm: dict[str, OverTasks]
    improvement: dict[str, OverTasks]
    profile: dict[str, OverTasks]
    budget: dict[str, BudgetCurve]
    ranks: MeanRanks
    rows: dict[str, list[MethodRow]]
    pairs: dict[str, Pairs]
    pooled: Family
    notes: tuple[str, ...]

    @property
    def scaled_tasks(self) -> list[str]:
        return [task for task, found in self.anchors.items() if not found.why_undefined]


def compute_across(results: SuiteResults, protocol: Protocol = NOTHING_FIXED) -> Across:
    """`protocol` says which methods the primary tests are about.

    Cost: seconds, most of them for the bands of the budget curves and the effect sizes of all pairs.
    """
    scores, directions = final_scores(results), {task.label: task.higher_is_better for task in results.tasks}
    normalised = on_one_scale(scores, results)
    table = normalised.scores.assign(method_label=scores["method_label"])
    scaled = [task for task in normalised.anchors if task not in normalised.undefined]
    table = table[table["task_label"].isin(scaled)]
    present = [label for label in results.styles if (table["method_label"] == label).any()]
    grids = {label: score_grid(table, label) for label in present}
    complete = tuple(label for label, grid in grids.items() if grid.notna().any(axis=1).all())
    raw = scores[scores["task_label"].isin(scaled)]
    improvement = {}
    base = next(iter(results.labels(BASE)), None)
    if base is not None and scaled:
        lower = {task for task in scaled if not directions[task]}
        sides = {label: score_grid(raw, label, "value") for label in present}
        for label in present:
            if label != base and base in sides:
                generator = generator_for("improvement", label)
                improvement[label] = probability_of_improvement(sides[label], sides[base], lower_is_better=lower, generator=generator)
    ranked = scores[scores["method"] != ORACLE]
    ranks = mean_ranks(ranked[list(COLUMNS[:4])], directions, generator=generator_for("ranks"))
    return Across(
        anchors=normalised.anchors,
        complete=complete,
        iqm={label: interquartile_mean(grid, generator=generator_for("iqm", label)) for label, grid in grids.items()},
        improvement=improvement,
        profile={label: performance_profile(grids[label], THRESHOLDS, generator=generator_for("profile", label)) for label in complete},
        budget=_budget_curves(results, normalised.anchors, complete),
        ranks=ranks,
        rows={task.label: method_rows(task) for task in results.tasks},
        pairs={task.label: matched_pairs(task) for task in results.tasks},
        pooled=pooled_comparisons(results, normalised.anchors, protocol),
        notes=_notes(normalised.anchors),
    )


def _notes(anchors: Mapping[str, Anchors]) -> tuple[str, ...]:
    notes = []
    unscaled = [f"{task} ({found.why_undefined})" for task, found in anchors.items() if found.why_undefined]
    if unscaled:
        notes.append(f"No normalised score, and so no part in the numbers over tasks: {and_more(unscaled, limit=4)}.")
    without = {task: found.ceiling_label for task, found in anchors.items() if not found.why_undefined and found.ceiling_label != ORACLE}
    if without:
        tasks_of = {label: and_more((task for task in without if without[task] == label), 20) for label in sorted(set(without.values()))}
        whose = and_more(f"{label} on {tasks}" for label, tasks in tasks_of.items())
        counted = plural(len(without), "task")
        notes.append(f"No oracle on {counted}: there 1 is the best final mean, reached by construction and no finding ({whose}).")
    return tuple(notes)


def _budget_curves(results: SuiteResults, anchors: Mapping[str, Anchors], complete: tuple[str, ...]) -> dict[str, BudgetCurve]:
    """Only methods that compete and have a curve on every scaled task."""
    tasks = [task for task in results.tasks if task.label in anchors and not anchors[task.label].why_undefined]
    curves = {}
    for label in (name for name in results.labels("method") if name in complete):
        by_run = {(task.label, seed): run for task in tasks for seed, *run in curves_by_seed(task.curves(label))}
        if len({task for task, _ in by_run}) == len(tasks):
            curves[label] = by_run
    if not curves:
        return {}
    end = max(flops.max() for runs in curves.values() for flops, _ in runs.values())
    return {label: _budget_curve(label, runs, anchors, end) for label, runs in curves.items()}


def _budget_curve(label: str, runs: dict, anchors: Mapping[str, Anchors], end: float) -> BudgetCurve:
    starts, ends = (np.array([side(flops) for flops, _ in runs.values()]) for side in (np.min, np.max))
    start, all_until = starts.max(), min(max(ends.min(), starts.max()), end)
    flops = np.unique(np.concatenate([np.geomspace(start, end, GRID_POINTS), [start, all_until, end]]))
    by_task: dict[str, list[np.ndarray]] = {}
    for (task, _), (paid, values) in runs.items():
        scaled = (answer_at(paid, values, flops) - anchors[task].base) / (anchors[task].ceiling - anchors[task].base)
        by_task.setdefault(task, []).append(scaled)
    levels = {task: np.array(curves) for task, curves in by_task.items()}
    found = interquartile_curve(levels, generator=generator_for("budget", label), draws=CURVE_DRAWS)
    return BudgetCurve(flops, found.value, found.low, found.high, float(all_until))


def ahead_of_all(label: str, pairs: Pairs) -> bool | None:
    """Whether a method's mean is better than that of every other it can be compared with at equal FLOPs; None where there is none."""
    advantages = advantages_of(label, pairs)
    return all(advantage > 0 for advantage in advantages.values()) if advantages else None


def advantages_of(label: str, pairs: Pairs) -> dict[str, float]:
    """{other: mean advantage of `label` at equal FLOPs}, the pairs that could be compared."""
    found = {}
    for (a, b), comparison in pairs.items():
        if label in (a, b) and comparison.difference.n:
            found[b if label == a else a] = comparison.difference.mean * (1 if label == a else -1)
    return found
