"""Effect sizes of paired differences: a difference in standard deviations, with the interval that few seeds leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special

from dpgbench.stats.over_seeds import SAME, check_level, pairs_by_seed


@dataclass(frozen=True)
class EffectSize:
    """The mean of a - b in standard deviations of a - b, over the `n` seeds both have (`unpaired`: seeds only one side has).

    `d` is Cohen's d_z, `g` the same without its small-sample bias; `low` and `high` bound the true effect. `g` needs 3 pairs, the rest 2.
    Where there is no effect size, `why_undefined` says why.
    """

    n: int
    d: float
    g: float
    low: float
    high: float
    unpaired: int = 0
    why_undefined: str = ""


def paired_effect_size(values_by_seed_a: pd.Series, values_by_seed_b: pd.Series, *, level: float = 0.95) -> EffectSize:
    """d_z = mean / standard deviation (ddof=1) of the differences by seed, Hedges' g_z = J(n - 1) d_z, and d_z's exact interval.

    J(m) = gamma(m/2) / (sqrt(m/2) gamma((m-1)/2)) (Hedges 1981) makes g unbiased for Gaussian differences; J(1) = 0, so two pairs have no
    g. The interval holds the effects under which the t statistic, noncentral t with n - 1 degrees of freedom, is not extreme. With few
    seeds it is wide: say so rather than call an effect large. Positive where a is larger, whichever direction is better. ValueError as
    in over_seeds.paired_difference.
    """
    pairs, unpaired = pairs_by_seed(values_by_seed_a, values_by_seed_b)
    return effect_size_of_pairs(pairs["a"].to_numpy(), pairs["b"].to_numpy(), unpaired=unpaired, level=level)


def effect_size_of_pairs(a: np.ndarray, b: np.ndarray, *, unpaired: int = 0, level: float = 0.95) -> EffectSize:
    """`paired_effect_size` of values (n,) that are paired already, none of them NaN."""
    check_level(level)
    n = len(a)
    why = "" if n > 1 else f"{n} pair{'s' if n != 1 else ''}: a standard deviation needs 2"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        why = "an infinite value"
    elif n > 1 and np.ptp(a - b) <= SAME * max(np.abs(a).max(), np.abs(b).max()):
        why = "all differences are equal: there is no standard deviation to measure them in"
    if why:
        return EffectSize(n, np.nan, np.nan, np.nan, np.nan, unpaired, why)
    d = float(np.mean(a - b) / np.std(a - b, ddof=1))
    g = d * _hedges_correction(n - 1) if n > 2 else np.nan
    low, high = _noncentral_t_interval(d * math.sqrt(n), n - 1, level)
    return EffectSize(n, d, g, low / math.sqrt(n), high / math.sqrt(n), unpaired)


def _hedges_correction(degrees: int) -> float:
    return float(np.exp(special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2)) / np.sqrt(degrees / 2))


def _noncentral_t_interval(t: float, degrees: int, level: float) -> tuple[float, float]:
    """The noncentralities under which a statistic as small as t, or as large, has probability (1 - level) / 2."""
    reach, tail = 1.0, (1 - level) / 2

    def excess(noncentrality: float, probability: float) -> float:
        cdf = float(special.nctdtr(degrees, noncentrality, t))
        if math.isnan(cdf):  # scipy 1.17 at some noncentralities of the other sign than t, far from it: all mass is on one side
            cdf = float(noncentrality < t)
        return cdf - probability

    while not (excess(t - reach, 1 - tail) >= 0 and excess(t + reach, tail) <= 0):  # the cdf falls as the noncentrality rises
        reach *= 2
        if reach > 1e6 * (1 + abs(t)):
            return np.nan, np.nan
    low = optimize.brentq(excess, t - reach, t + reach, args=(1 - tail,))
    return float(low), float(optimize.brentq(excess, t - reach, t + reach, args=(tail,)))
