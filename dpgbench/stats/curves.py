"""A metric against log compute: the area under a seed's curve between two computes, and the compute needed to reach a level.

A curve is one seed of one method on one task: a snapshot's compute (FLOPs, say) and its value. Rules, the same everywhere:
- Between two snapshots, `between="linear"` draws a straight line over the logarithm of the compute (the trapezoid); "step" holds the
  earlier value until the later snapshot is paid for, which is what one can really have at that compute.
- Before the first and after the last snapshot a curve does not exist, unless the caller says what to hold there: `before=value` (what
  one has before the method's first snapshot, base's score say), `after="hold"` (who stops spending keeps the last value).
- A NaN or infinite value is never bridged by a line from its neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dpgbench.stats.over_seeds import Interval, mean_interval

COLUMNS = ("seed", "flops", "value")  # of TaskResults.snapshots, one method's rows

Between = Literal["linear", "step"]
Numbers = Sequence[float] | np.ndarray | pd.Series


@dataclass(frozen=True)
class CurveArea:
    """The area under one curve between two computes: `area` in metric units x decades, `height` = area / decades in metric units.

    `n` counts the snapshots inside the two computes, ends included; `held` is how many of the `decades` lie before the first or after
    the last snapshot. Where there is no area it is NaN and `why_undefined` says why.
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
    """The first compute at which a curve is at the level or better; NaN where it never is (`reached` False).

    `interpolated` says that it lies between two snapshots. `at_first` says that the first snapshot with a value is there already:
    the level was reached at this compute or before. `n` counts the snapshots with a value, `missing` the NaNs.
    """

    compute: float
    reached: bool
    interpolated: bool
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


def area_under_curve(
    computes: Numbers,
    values: Numbers,
    low: float,
    high: float,
    *,
    between: Between = "linear",
    before: float | None = None,
    after: Literal["hold"] | None = None,
) -> CurveArea:
    """The area under one seed's curve over log10 of the compute, from `low` to `high` (the rules: top of this file).

    `computes` and `values` (S,) in any order. Where the curve does not span [low, high] and nothing is held there, and where a
    snapshot that the area needs is NaN or infinite, the area is NaN and says why. ValueError unless 0 < low < high < inf, for a
    compute that is not positive and finite or is listed twice, and for an infinite or NaN `before`.
    """
    if not 0 < low < high < np.inf:
        raise ValueError(f"low is {low} and high is {high}, but an area over log compute needs 0 < low < high, both finite")
    if before is not None and not np.isfinite(before):
        raise ValueError(f"before is {before}, but the value held before the first snapshot is finite; None holds nothing there")
    if after not in (None, "hold"):
        raise ValueError(f"after is {after!r}, but the last value is either held ('hold') or not (None)")
    _check_between(between)
    x, y = _sorted_curve(computes, values)
    start, end = np.log10(low), np.log10(high)
    decades, inside = float(end - start), int(((x >= start) & (x <= end)).sum())
    if not len(x):
        return CurveArea(np.nan, np.nan, decades, 0, 0.0, "no snapshot")

    # One piece before the first snapshot, one between each two, one after the last; each cut to what of it lies in [low, high].
    y_left = np.concatenate([[np.nan if before is None else before], y])
    y_right = np.concatenate([y_left[:1], y[1:] if between == "linear" else y[:-1], y[-1:]])
    x_left, x_right = np.concatenate([[-np.inf], x]), np.concatenate([x, [np.inf]])
    cut_left, cut_right = np.maximum(x_left, start), np.minimum(x_right, end)
    used = cut_right > cut_left
    held = float((cut_right - cut_left)[[0, -1]] @ used[[0, -1]])
    undefined = ""
    if used[0] and before is None:
        undefined = f"the curve starts at {10 ** x[0]:.6g}, after {low:.6g}"
    elif used[-1] and after is None:
        undefined = f"the curve ends at {10 ** x[-1]:.6g}, before {high:.6g}"
    elif not (np.isfinite(y_left[used]).all() and np.isfinite(y_right[used]).all()):
        first = int(np.flatnonzero(used & ~(np.isfinite(y_left) & np.isfinite(y_right)))[0])
        at = first - 1 if not np.isfinite(y_left[first]) else first
        undefined = f"the value at {10 ** x[at]:.6g} is {y[at]}"
    if undefined:
        return CurveArea(np.nan, np.nan, decades, inside, held, undefined)

    # A straight line's area is its width times its height in the middle; how far along its piece that is (0 on the endless ones).
    middle = (cut_left[used] + cut_right[used]) / 2
    x_left, width = x_left[used], (x_right - x_left)[used]
    along = np.divide(middle - x_left, width, out=np.zeros(len(width)), where=np.isfinite(width))
    heights = y_left[used] + along * (y_right[used] - y_left[used])
    area = float((cut_right - cut_left)[used] @ heights)
    return CurveArea(area, area / decades, decades, inside, held)


def area_over_seeds(
    snapshots: pd.DataFrame,
    low: float,
    high: float,
    *,
    between: Between = "linear",
    before: float | None = None,
    after: Literal["hold"] | None = None,
    level: float = 0.95,
) -> AreaOverSeeds:
    """`area_under_curve` of every seed and the t interval of the heights over seeds (`level` is its confidence level).

    `snapshots` has the columns seed, flops and value, a row per snapshot of one method on one task. ValueError as there, with the seed.
    """
    rules = {"between": between, "before": before, "after": after}
    areas = {seed: area_under_curve(flops, values, low, high, **rules) for seed, flops, values in curves_by_seed(snapshots)}
    return AreaOverSeeds(mean_interval([area.height for area in areas.values()], level), areas)


def compute_to_reach(
    computes: Numbers, values: Numbers, level: float, *, higher_is_better: bool = True, between: Between = "linear"
) -> Crossing:
    """The first compute at which one seed's curve is at `level` or better; a later fall below it does not count against it.

    "linear" interpolates over log compute between neighbouring snapshots that both have a finite value; after a NaN, and with "step",
    it is the compute of the first snapshot at the level. Nothing is extrapolated. ValueError for a NaN or infinite level and for a
    compute that is not positive and finite or is listed twice.
    """
    if not np.isfinite(level):
        raise ValueError(f"level is {level}, but only a finite level can be reached")
    _check_between(between)
    x, y = _sorted_curve(computes, values)
    present = ~np.isnan(y)
    n, missing = int(present.sum()), int((~present).sum())
    there = present & ((y >= level) if higher_is_better else (y <= level))
    if not there.any():
        return Crossing(np.nan, False, False, False, n, missing)
    index = int(np.argmax(there))
    compute, interpolated = 10.0 ** x[index], False
    if between == "linear" and index and np.isfinite(y[index - 1 : index + 1]).all() and y[index] != level:
        along = (level - y[index - 1]) / (y[index] - y[index - 1])
        compute, interpolated = 10.0 ** (x[index - 1] + along * (x[index] - x[index - 1])), True
    # With NaNs before it the first snapshot that has a value is not the first of the curve, but nothing is known earlier either.
    return Crossing(float(compute), True, interpolated, not present[:index].any(), n, missing)


def value_at(computes: Numbers, values: Numbers, at: float | np.ndarray, *, after: Literal["hold"] | None = None) -> np.ndarray:
    """One seed's values at the computes `at` (any shape, kept), on the straight lines over log compute between its snapshots.

    NaN before the first snapshot with a value, after the last one with `after=None` ("hold" keeps its value), and between two of which
    one is NaN or infinite. ValueError for a compute that is not positive and finite or is listed twice.
    """
    x, y = _sorted_curve(computes, values)
    present = np.flatnonzero(~np.isnan(y))
    found = np.full(np.shape(at), np.nan)
    if not len(present):
        return found
    x, y = x[present[0] : present[-1] + 1], y[present[0] : present[-1] + 1]
    target = np.log10(np.asarray(at, dtype=float))
    right = np.clip(np.searchsorted(x, target), 0, len(x) - 1)
    left = np.maximum(right - 1, 0)
    inside = (x[left] < target) & (target < x[right]) & np.isfinite(y[left]) & np.isfinite(y[right])
    with np.errstate(invalid="ignore", divide="ignore"):
        line = y[left] + (target - x[left]) / (x[right] - x[left]) * (y[right] - y[left])
    found = np.where(inside, line, found)
    found = np.where(target == x[right], y[right], found)
    return np.where(target > x[-1], y[-1], found) if after == "hold" else found


def reach_over_seeds(
    snapshots: pd.DataFrame, level: float, *, higher_is_better: bool = True, between: Between = "linear"
) -> ReachOverSeeds:
    """`compute_to_reach` of every seed in `snapshots` (columns seed, flops, value) and their median. ValueError as there, with the seed.

    A seed without any value did not reach the level: where that is not a result but a hole, leave its rows out.
    """
    rules = {"higher_is_better": higher_is_better, "between": between}
    crossings = {seed: compute_to_reach(flops, values, level, **rules) for seed, flops, values in curves_by_seed(snapshots)}
    in_order = np.sort([crossing.compute if crossing.reached else np.inf for crossing in crossings.values()])
    n, reached = len(in_order), int(np.isfinite(in_order).sum())
    middle = np.log10(in_order[(n - 1) // 2 : n // 2 + 1])
    median = float(10 ** middle.mean()) if n and np.isfinite(middle).all() else np.nan
    return ReachOverSeeds(n, reached, n - reached, median, crossings)


def shared_span(snapshots: Iterable[pd.DataFrame]) -> tuple[float, float]:
    """(low, high): the computes between which every seed of every given method has its curve; (NaN, NaN) where there is no overlap.

    Each frame holds one method's snapshots (columns seed, flops, value). Snapshots with a NaN value do not count.
    """
    spans = []
    for frame in snapshots:
        for _, flops, values in curves_by_seed(frame):
            x = flops[~np.isnan(values)]
            spans.append((x.min(), x.max()) if len(x) else (np.nan, np.nan))
    starts, ends = np.array(spans).reshape(-1, 2).T
    if not len(spans) or np.isnan(starts).any() or starts.max() >= ends.min():
        return np.nan, np.nan
    return float(starts.max()), float(ends.min())


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
        """(n,) each: the first and the last compute with a value; inf and -inf where a seed has none."""
        there = ~np.isnan(self.values)
        return np.where(there, self.computes, np.inf).min(axis=1), np.where(there, self.computes, -np.inf).max(axis=1)

    def at(self, computes: np.ndarray) -> np.ndarray:
        """(n,): each seed's value at its own one of the computes (n,), by the rules of `value_at` with nothing held."""
        x, target = np.log10(self.computes), np.log10(computes)
        right = np.minimum((x < target[:, None]).sum(axis=1), x.shape[1] - 1)
        left, each = np.maximum(right - 1, 0), np.arange(len(x))
        (x_left, x_right), (y_left, y_right) = ((table[each, left], table[each, right]) for table in (x, self.values))
        inside = (x_left < target) & (target < x_right) & np.isfinite(y_left) & np.isfinite(y_right)
        with np.errstate(invalid="ignore", divide="ignore"):
            line = y_left + (target - x_left) / (x_right - x_left) * (y_right - y_left)
        return np.where(target == x_right, y_right, np.where(inside, line, np.nan))


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
    """(log10 compute, value), both (S,), in the order of the compute."""
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
    return np.log10(computes), values


def _check_between(between: str) -> None:
    if between not in ("linear", "step"):
        raise ValueError(f"between is {between!r}, but snapshots are joined by a line over log compute ('linear') or by 'step'")
