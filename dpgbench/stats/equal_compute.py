"""Two methods at equal compute: for every seed that both have, their values where both curves last exist, and a paired test of those.

The compute of a seed's comparison is the largest that both curves reach, so that each method is judged by what it makes of the budget of
whichever stopped first. The other curve is read there by interpolation over log compute (curves.py), never beyond its own snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dpgbench.stats.curves import curves_by_seed, value_at
from dpgbench.stats.effect_size import EffectSize, paired_effect_size
from dpgbench.stats.over_seeds import PairedDifference, paired_difference


@dataclass(frozen=True, eq=False)
class MatchedComparison:
    """a - b at equal compute. `by_seed`: index seed, columns compute, a, b. `left_out` says of each seed without a comparison why."""

    difference: PairedDifference
    effect: EffectSize
    by_seed: pd.DataFrame
    left_out: dict[int, str] = field(default_factory=dict)


def compare_at_equal_compute(
    snapshots_a: pd.DataFrame, snapshots_b: pd.DataFrame, *, level: float = 0.95, generator: np.random.Generator | None = None
) -> MatchedComparison:
    """Compare two methods on one task; both frames have the columns seed, flops and value, a row per snapshot.

    `generator` is needed above 12 common seeds, as in over_seeds.paired_difference. ValueError as in curves.value_at, with the seed.
    """
    curves_a, curves_b = (
        {seed: (flops, values) for seed, flops, values in curves_by_seed(snapshots)} for snapshots in (snapshots_a, snapshots_b)
    )
    rows, left_out = {}, {}
    for seed in sorted(set(curves_a) | set(curves_b)):
        if seed not in curves_a or seed not in curves_b:
            left_out[seed] = "only one of the two has this seed"
            continue
        spans = [flops[~np.isnan(values)] for flops, values in (curves_a[seed], curves_b[seed])]
        if not all(len(span) for span in spans):
            left_out[seed] = "no value"
            continue
        start, end = max(span.min() for span in spans), min(span.max() for span in spans)
        if start > end:
            left_out[seed] = f"no common compute: one ends at {end:.3g}, the other starts at {start:.3g}"
            continue
        a, b = value_at(*curves_a[seed], end), value_at(*curves_b[seed], end)
        if np.isnan(a) or np.isnan(b):
            left_out[seed] = f"a value next to {end:.3g} is not finite"
            continue
        rows[seed] = {"compute": end, "a": a, "b": b}
    by_seed = pd.DataFrame.from_dict(rows, orient="index", columns=["compute", "a", "b"]).astype(float)
    difference = paired_difference(by_seed["a"], by_seed["b"], level=level, generator=generator)
    return MatchedComparison(difference, paired_effect_size(by_seed["a"], by_seed["b"], level=level), by_seed, left_out)
