"""What a method has to show at a budget, and what follows from it: the area under its curve, the compute needed to reach a level.

A curve is one seed of one method on one task: a snapshot's compute (FLOPs, say) and its value. One rule, `answer_at`, decides everywhere
what a method's answer at a budget is: that of its last snapshot whose compute is within the budget. So a curve is a staircase, since nobody
has an answer half way between two snapshots; who stops early holds the last answer at every larger budget; and before the first snapshot
there is no answer. A NaN or infinite value is an answer of that value: it is never bridged from its neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpgbench.stats.over_seeds import Interval, mean_interval

COLUMNS = ("seed", "flops", "value")  # of TaskResults.snapshots, one method's rows

Numbers = Sequence[float] | np.ndarray | pd.Series


def answer_at(computes: Numbers, values: Numbers, budget: float | np.ndarray) -> np.ndarray:
    """One seed's answers at the budgets (any shape, kept): the value of the last snapshot whose compute is at most the budget.

    `computes` and `values` (S,) in any order. After the last snapshot its value holds; before the first there is none, NaN. ValueError for
    a compute that is not positive and finite or is listed twice, and for a NaN budget.
    """
    computes, values = _sorted_curve(computes, values)
    budget = np.asarray(budget, dtype=float)
    if np.isnan(budget).any():
        raise ValueError("a budget is nan, but an answer is asked for at a number")
    last = np.searchsorted(computes, budget, side="right") - 1
    return np.where(last >= 0, np.append(values, np.nan)[last], np.nan)  # without a snapshot, last is -1 everywhere


@dataclass(frozen=True)
class CurveArea:
    """The area under one curve between two computes: `area` in metric units x decades, `height` = area / decades in metric units.

    `height` is the mean answer over budgets spread evenly over the logarithm. `n` counts the snapshots inside the two computes, ends
    included; `held` is how many of the `decades` lie before the first or after the last snapshot. Where there is no area it is NaN and
    `why_undefined` says why.
    """

    area: float
    height: float
    decades: float
    n: int
    held: float
    why_undefined: str = ""


@dataclass(frozen=True)
class AreaOverSeeds:
    """One method's areas: the mean `height` with its t interval (seeds without an area in `missing`), and every seed's own."""

    height: Interval
    by_seed: dict[int, CurveArea]


@dataclass(frozen=True)
class Crossing:
    """The compute of the first snapshot whose value is at the level or better; NaN where none is (`reached` False).

    `at_first` says that it is the first snapshot with a value: the level was reached at this compute or before. `n` counts the snapshots
    with a value, `missing` the NaNs.
    """

    compute: float
    reached: bool
    at_first: bool
    n: int
    missing: int = 0


@dataclass(frozen=True)
class ReachOverSeeds:
    """How many of `n` seeds reach a level, and the median compute they need.

    A seed that does not reach it counts as needing more than any other, so that leaving out the failures cannot make a method look
    fast; the median is NaN where it falls among them. Between two middle seeds it is their geometric mean. `by_seed` has every crossing.
    """

    n: int
    reached: int
    not_reached: int
    median: float
    by_seed: dict[int, Crossing]


def area_under_curve(computes: Numbers, values: Numbers, low: float, high: float, *, before: float | None = None) -> CurveArea:
    """The area under one seed's answers over log10 of the compute, from `low` to `high`; the last answer holds.

    `computes` and `values` (S,) in any order. `before` is what one has before the method's first snapshot, base's score say; without it a
    curve that starts after `low` has no area. Where an answer that the area needs is NaN or infinite, the area is NaN and says why.
    ValueError unless 0 < low < high < inf, for a compute that is not positive and finite or is listed twice, and for an infinite or NaN
    `before`.
    """
    if not 0 < low < high < np.inf:
        raise ValueError(f"low is {low} and high is {high}, but an area over log compute needs 0 < low < high, both finite")
    if before is not None and not np.isfinite(before):
        raise ValueError(f"before is {before}, but the value held before the first snapshot is finite; None holds nothing there")
    computes, values = _sorted_curve(computes, values)
    decades, inside = float(np.log10(high / low)), computes[(computes >= low) & (computes <= high)]
    if not len(computes):
        return CurveArea(np.nan, np.nan, decades, 0, 0.0, "no snapshot")
    first, last = np.clip(computes[[0, -1]], low, high)
    held = float(np.log10(first / low) + np.log10(high / last))
    edges = np.unique([low, *inside, high])
    heights = answer_at(computes, values, edges[:-1])
    undefined = ""
    if computes[0] > low:
        heights[0] = np.nan if before is None else before
        undefined = "" if before is not None else f"the curve starts at {computes[0]:.6g}, after {low:.6g}"
    if not undefined and not np.isfinite(heights).all():
        at = edges[:-1][~np.isfinite(heights)][0]
        snapshot = np.searchsorted(computes, at, side="right") - 1
        undefined = f"the value at {computes[snapshot]:.6g} is {values[snapshot]}"
    if undefined:
        return CurveArea(np.nan, np.nan, decades, len(inside), held, undefined)
    area = float(np.diff(np.log10(edges)) @ heights)
    return CurveArea(area, area / decades, decades, len(inside), held)


def area_over_seeds(snapshots: pd.DataFrame, low: float, high: float, *, before: float | None = None, level: float = 0.95) -> AreaOverSeeds:
    """`area_under_curve` of every seed and the t interval of the heights over seeds (`level` is its confidence level).

    `snapshots` has the columns seed, flops and value, a row per snapshot of one method on one task. ValueError as there, with the seed.
    """
    areas = {seed: area_under_curve(flops, values, low, high, before=before) for seed, flops, values in curves_by_seed(snapshots)}
    return AreaOverSeeds(mean_interval([area.height for area in areas.values()], level), areas)


def compute_to_reach(computes: Numbers, values: Numbers, level: float, *, higher_is_better: bool = True) -> Crossing:
    """The compute of one seed's first snapshot at `level` or better; a later fall below it does not count against it.

    ValueError for a NaN or infinite level and for a compute that is not positive and finite or is listed twice.
    """
    if not np.isfinite(level):
        raise ValueError(f"level is {level}, but only a finite level can be reached")
    computes, values = _sorted_curve(computes, values)
    present = ~np.isnan(values)
    n, missing = int(present.sum()), int((~present).sum())
    there = present & ((values >= level) if higher_is_better else (values <= level))
    if not there.any():
        return Crossing(np.nan, False, False, n, missing)
    index = int(np.argmax(there))
    # With NaNs before it the first snapshot that has a value is not the first of the curve, but nothing is known earlier either.
    return Crossing(float(computes[index]), True, not present[:index].any(), n, missing)


def reach_over_seeds(snapshots: pd.DataFrame, level: float, *, higher_is_better: bool = True) -> ReachOverSeeds:
    """`compute_to_reach` of every seed in `snapshots` (columns seed, flops, value) and their median. ValueError as there, with the seed.

    A seed without any value did not reach the level: where that is not a result but a hole, leave its rows out.
    """
    crossings = {
        seed: compute_to_reach(flops, values, level, higher_is_better=higher_is_better) for seed, flops, values in curves_by_seed(snapshots)
    }
    in_order = np.sort([crossing.compute if crossing.reached else np.inf for crossing in crossings.values()])
    n, reached = len(in_order), int(np.isfinite(in_order).sum())
    middle = np.log10(in_order[(n - 1) // 2 : n // 2 + 1])
    median = float(10 ** middle.mean()) if n and np.isfinite(middle).all() else np.nan
    return ReachOverSeeds(n, reached, n - reached, median, crossings)


def shared_span(snapshots: Iterable[pd.DataFrame]) -> tuple[float, float]:
    """(low, high): from where every seed of every given method has an answer to the largest compute of any; (NaN, NaN) where there is none.

    Each frame holds one method's snapshots (columns seed, flops, value). Snapshots with a NaN value do not count.
    """
    spans = []
    for frame in snapshots:
        for _, flops, values in curves_by_seed(frame):
            x = flops[~np.isnan(values)]
            spans.append((x.min(), x.max()) if len(x) else (np.nan, np.nan))
    starts, ends = np.array(spans).reshape(-1, 2).T
    if not len(spans) or np.isnan(starts).any() or starts.max() >= ends.max():
        return np.nan, np.nan
    return float(starts.max()), float(ends.max())


@dataclass(frozen=True, eq=False)
class CurveTable:
    """One method's curves, a row per seed, so that all seeds are read at once. `seeds` (n,) ascend.

    `computes` and `values` (n, S) ascend in the compute; behind a seed's last snapshot they are inf and NaN.
    """

    seeds: np.ndarray
    computes: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, snapshots: pd.DataFrame) -> CurveTable:
        """From the columns seed, flops and value. ValueError as in `curves_by_seed`."""
        curves = list(curves_by_seed(snapshots))
        longest = max((len(flops) for _, flops, _ in curves), default=1)
        computes, values = np.full((len(curves), longest), np.inf), np.full((len(curves), longest), np.nan)
        for row, (_, flops, its_values) in enumerate(curves):
            in_order = np.argsort(flops, kind="stable")
            computes[row, : len(flops)], values[row, : len(flops)] = flops[in_order], its_values[in_order]
        return cls(np.array([seed for seed, *_ in curves], dtype=int), computes, values)

    def rows(self, chosen: np.ndarray) -> CurveTable:
        return CurveTable(self.seeds[chosen], self.computes[chosen], self.values[chosen])

    @property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) each: the first and the last snapshot's compute."""
        return self.computes[:, 0], np.where(np.isfinite(self.computes), self.computes, -np.inf).max(axis=1)

    def at(self, budgets: np.ndarray) -> np.ndarray:
        """(n,): each seed's answer at its own one of the budgets (n,), as `answer_at` has it."""
        last = (self.computes <= budgets[:, None]).sum(axis=1) - 1
        return np.where(last >= 0, self.values[np.arange(len(last)), last], np.nan)


def curves_by_seed(snapshots: pd.DataFrame) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """(seed, computes, values) of every seed in order. ValueError for a lacking column and, with the seed, for a bad curve."""
    lacking = [name for name in COLUMNS if name not in snapshots.columns]
    if lacking:
        raise ValueError(f"the snapshots lack the column(s) {', '.join(lacking)}; a curve needs {', '.join(COLUMNS)}")
    # By numpy: pandas takes half a millisecond for each group, and a report asks for the curves of all its cells a dozen times.
    seeds = snapshots["seed"].to_numpy()
    in_order = np.argsort(seeds, kind="stable")
    seeds, computes, all_values = (column[in_order] for column in (seeds, *(snapshots[name].to_numpy(dtype=float) for name in COLUMNS[1:])))
    starts = np.flatnonzero(np.r_[True, seeds[1:] != seeds[:-1]]) if len(seeds) else []
    for start, end in itertools.pairwise([*starts, len(seeds)]):
        seed, flops, values = seeds[start].item(), computes[start:end], all_values[start:end]
        try:
            _sorted_curve(flops, values)
        except ValueError as error:
            raise ValueError(f"seed {seed}: {error}") from None
        yield seed, flops, values


def _sorted_curve(computes: Numbers, values: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """(compute, value), both (S,), in the order of the compute."""
    computes, values = np.asarray(computes, dtype=float).ravel(), np.asarray(values, dtype=float).ravel()
    if len(computes) != len(values):
        raise ValueError(f"{len(computes)} computes and {len(values)} values, but every snapshot has one of each")
    bad = computes[~((computes > 0) & np.isfinite(computes))]
    if len(bad):
        raise ValueError(
            f"a compute is {bad[0]}, but a log axis needs positive finite ones; leave that snapshot out, or pass its value as `before`"
        )
    in_order = np.argsort(computes, kind="stable")
    computes, values = computes[in_order], values[in_order]
    twice = computes[1:][np.diff(computes) == 0]
    if len(twice):
        raise ValueError(f"compute {twice[0]:.6g} is listed twice, but a curve has one value per compute; keep the last snapshot there")
    return computes, values
