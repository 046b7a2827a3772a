"""Two methods at equal compute: for every seed that both have, the answers they have at one budget, and a paired test of those.

What a method's answer at a budget is, `curves.answer_at` decides: the last snapshot within it. A method that has stopped holds its last
answer, so the budget of a comparison is that of whichever spends more, and the other is not read in the middle of its run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from dpgbench.stats.curves import CurveTable
from dpgbench.stats.effect_size import EffectSize, effect_size_of_pairs
from dpgbench.stats.over_seeds import PairedDifference, difference_of_pairs


@dataclass(frozen=True, eq=False)
class MatchedComparison:
    """a - b at equal compute. `by_seed`: index seed, columns compute, a, b. `left_out` says of each seed without a comparison why."""

    difference: PairedDifference
    effect: EffectSize
    by_seed: pd.DataFrame
    left_out: dict[int, str] = field(default_factory=dict)

    @cached_property
    def median_compute(self) -> float:
        """NaN without a seed."""
        return float(np.median(self.by_seed["compute"].to_numpy())) if len(self.by_seed) else np.nan


def compare_at_equal_compute(
    a: pd.DataFrame | CurveTable,
    b: pd.DataFrame | CurveTable,
    *,
    budget: float | None = None,
    level: float = 0.95,
    generator: np.random.Generator | None = None,
) -> MatchedComparison:
    """Compare two methods on one task, from frames with the columns seed, flops and value, a row per snapshot, or from their tables.

    At `budget`, for all seeds alike; without one, at the largest compute that either of the two has with that seed. A seed with which one
    of them has no snapshot within the budget, or a NaN there, is left out and named. `generator` is needed above 12 common seeds, as in
    over_seeds.paired_difference. ValueError as in curves.answer_at, with the seed.
    """
    a, b = (side if isinstance(side, CurveTable) else CurveTable.of(side) for side in (a, b))
    left_out = dict.fromkeys(np.setxor1d(a.seeds, b.seeds).tolist(), "only one of the two has this seed")
    seeds, rows_a, rows_b = np.intersect1d(a.seeds, b.seeds, assume_unique=True, return_indices=True)
    a, b = a.rows(rows_a), b.rows(rows_b)
    starts, ends = (np.maximum(*sides) for sides in zip(a.spans, b.spans, strict=True))
    at = ends if budget is None else np.full(len(seeds), float(budget))
    compared = np.flatnonzero(starts <= at)
    for seed, start, there in zip(*(column[starts > at].tolist() for column in (seeds, starts, at)), strict=True):
        left_out[seed] = f"no answer of one of the two at {there:.3g}: its first snapshot is at {start:.3g}"
    values_a, values_b = (side.rows(compared).at(at[compared]) for side in (a, b))
    by_seed = pd.DataFrame({"compute": at[compared], "a": values_a, "b": values_b}, index=seeds[compared])
    holes = np.isnan(values_a) | np.isnan(values_b)
    if holes.any():
        left_out |= {seed: f"the answer at {there:.3g} is NaN" for seed, there in by_seed.loc[holes, "compute"].items()}
        by_seed = by_seed[~holes]
    pairs = values_a[~holes], values_b[~holes]
    difference = difference_of_pairs(*pairs, level=level, generator=generator)
    return MatchedComparison(difference, effect_size_of_pairs(*pairs, level=level), by_seed, dict(sorted(left_out.items())))
