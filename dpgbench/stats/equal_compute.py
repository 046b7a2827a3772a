"""Two methods at equal compute: for every seed that both have, the answers they have at one budget, and a paired test of those.

What a method's answer at a budget is, `curves.answer_at` decides: the last snapshot within it. A method that has stopped holds its last
answer, so the budget of a comparison is that of whichever spends more, and the other is not read in the middle of its run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dpgbench.stats.curves import answer_at, curves_by_seed
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
    snapshots_a: pd.DataFrame,
    snapshots_b: pd.DataFrame,
    *,
    budget: float | None = None,
    level: float = 0.95,
    generator: np.random.Generator | None = None,
) -> MatchedComparison:
    """Compare two methods on one task; both frames have the columns seed, flops and value, a row per snapshot.

    At `budget`, for all seeds alike; without one, at the largest compute that either of the two has with that seed. A seed with which one
    of them has no snapshot within the budget, or a NaN there, is left out and named. `generator` is needed above 12 common seeds, as in
    over_seeds.paired_difference. ValueError as in curves.answer_at, with the seed.
    """
    curves_a, curves_b = (
        {seed: (flops, values) for seed, flops, values in curves_by_seed(snapshots)} for snapshots in (snapshots_a, snapshots_b)
    )
    rows, left_out = {}, {}
    for seed in sorted(set(curves_a) | set(curves_b)):
        if seed not in curves_a or seed not in curves_b:
            left_out[seed] = "only one of the two has this seed"
            continue
        sides = curves_a[seed], curves_b[seed]
        at = budget if budget is not None else max(float(flops.max()) for flops, _ in sides)
        start = max(float(flops.min()) for flops, _ in sides)
        if start > at:
            left_out[seed] = f"no answer of one of the two at {at:.3g}: its first snapshot is at {start:.3g}"
            continue
        a, b = (float(answer_at(*side, at)) for side in sides)
        if np.isnan(a) or np.isnan(b):
            left_out[seed] = f"the answer at {at:.3g} is NaN"
            continue
        rows[seed] = {"compute": at, "a": a, "b": b}
    by_seed = pd.DataFrame.from_dict(rows, orient="index", columns=["compute", "a", "b"]).astype(float)
    difference = paired_difference(by_seed["a"], by_seed["b"], level=level, generator=generator)
    return MatchedComparison(difference, paired_effect_size(by_seed["a"], by_seed["b"], level=level), by_seed, left_out)
