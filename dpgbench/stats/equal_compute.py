"""Two methods at equal compute: for every seed that both have, their values where both curves last exist, and a paired test of those.

The compute of a seed's comparison is the largest that both curves reach, so that each method is judged by what it makes of the budget of
whichever stopped first. The other curve is read there by interpolation over log compute (curves.py), never beyond its own snapshots.
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
    a: pd.DataFrame | CurveTable, b: pd.DataFrame | CurveTable, *, level: float = 0.95, generator: np.random.Generator | None = None
) -> MatchedComparison:
    """Compare two methods on one task, from frames with the columns seed, flops and value, a row per snapshot, or from their tables.

    `generator` is needed above 12 common seeds, as in over_seeds.paired_difference. ValueError as in curves.value_at, with the seed.
    """
    a, b = (side if isinstance(side, CurveTable) else CurveTable.of(side) for side in (a, b))
    left_out = dict.fromkeys(np.setxor1d(a.seeds, b.seeds).tolist(), "only one of the two has this seed")
    seeds, rows_a, rows_b = np.intersect1d(a.seeds, b.seeds, assume_unique=True, return_indices=True)
    a, b = a.rows(rows_a), b.rows(rows_b)
    starts, ends = (most(*sides) for most, sides in zip((np.maximum, np.minimum), zip(a.spans, b.spans, strict=True), strict=True))
    compared = np.flatnonzero(starts <= ends)
    for seed, start, end in zip(*(column[starts > ends].tolist() for column in (seeds, starts, ends)), strict=True):
        none = np.isinf(start) or np.isinf(end)
        left_out[seed] = "no value" if none else f"no common compute: one ends at {end:.3g}, the other starts at {start:.3g}"
    values_a, values_b = (side.rows(compared).at(ends[compared]) for side in (a, b))
    by_seed = pd.DataFrame({"compute": ends[compared], "a": values_a, "b": values_b}, index=seeds[compared])
    holes = np.isnan(values_a) | np.isnan(values_b)
    if holes.any():
        left_out |= {seed: f"a value next to {end:.3g} is not finite" for seed, end in by_seed.loc[holes, "compute"].items()}
        by_seed = by_seed[~holes]
    pairs = values_a[~holes], values_b[~holes]
    difference = difference_of_pairs(*pairs, level=level, generator=generator)
    return MatchedComparison(difference, effect_size_of_pairs(*pairs, level=level), by_seed, dict(sorted(left_out.items())))
