"""How good is a stochastic gradient: signal, noise, bias and direction, from inner products of independent batches' gradients.

With g_1 ... g_M independent and equally distributed, <g_a, g_b> for a != b has mean |E g|^2, and |g_a|^2 has mean E|g|^2. So the mean
product of *different* batches is an unbiased estimate of the squared length of the mean gradient, where the squared length of the mean of M
gradients is too large by tr Cov(g) / M. All that is needed is the M x M matrix of products; no gradient is kept here.

Errors are jackknife standard errors over the batches, which are the independent units: the statistic is computed again without each of
them, and error^2 = (M - 1)/M sum_a (s_a - mean s)^2 (Efron and Tibshirani 1993, chapter 11).

Shape suffixes: M batches, K (text, batch) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; NaN where the data do not determine it."""

    value: float
    error: float

    @property
    def resolved(self) -> bool:
        """Whether it is above 0 by two standard errors."""
        return self.value > 2 * self.error


UNKNOWN = Estimate(math.nan, math.nan)


def jackknife(statistic: Callable[[NDArray[np.intp]], float], count: int) -> Estimate:
    """`statistic` of all units 0 ... count - 1 and its standard error from leaving out each. ValueError for fewer than 3 units."""
    if count < 3:
        raise ValueError(f"{count} batches: an error bar needs 3 or more")
    units = np.arange(count)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = np.array([statistic(np.delete(units, unit)) for unit in units])
        error = math.sqrt((count - 1) / count * float(np.sum((without - without.mean()) ** 2)))
        return Estimate(float(statistic(units)), error)


def squared_mean(products_MM: Matrix) -> float:
    """Unbiased <E a, E b> from products_MM[i, j] = <a_i, b_j>: the mean over i != j. With a = b it may fall below 0 where noise is all."""
    count = len(products_MM)
    return float(products_MM.sum() - np.trace(products_MM)) / (count * (count - 1))


def signal_to_noise(products_MM: Matrix) -> Estimate:
    """|E g|^2 / tr Cov(g) of one batch's gradient, without bias in numerator and denominator; 0 is no signal, below 0 is chance.

    The mean of k batches' gradients has k times this, so 1 / SNR batches have as much signal as noise. Unknown where g never varies.
    """

    def ratio(batches: NDArray[np.intp]) -> float:
        kept = products_MM[np.ix_(batches, batches)]
        signal = squared_mean(kept)
        noise = float(np.trace(kept)) / len(kept) - signal
        return signal / noise if noise > 0 else math.nan

    return jackknife(ratio, len(products_MM))


def cosine(products_MM: Matrix, with_reference_MM: Matrix, reference_MM: Matrix) -> Estimate:
    """The cosine of E g and E r, from <g_i, g_j>, <g_i, r_j> and <r_i, r_j>. Noise may carry it past 1.

    Unknown where |E g|^2 or |E r|^2 is not above 0 by two standard errors: a direction that is not there has no angle.
    """
    lengths = [jackknife(_restricted(products), len(products)) for products in (products_MM, reference_MM)]
    if not all(length.resolved for length in lengths):
        return UNKNOWN

    def angle(batches: NDArray[np.intp]) -> float:
        own, cross, other = (squared_mean(part[np.ix_(batches, batches)]) for part in (products_MM, with_reference_MM, reference_MM))
        return cross / math.sqrt(own * other) if own > 0 and other > 0 else math.nan

    return jackknife(angle, len(products_MM))


def relative_bias(difference_MM: Matrix, reference_MM: Matrix) -> Estimate:
    """|E g - E r|^2 / |E r|^2 from the products of the differences g_i - r_i, and of r_i. Unknown as in `cosine`; noise may go below 0."""
    if not jackknife(_restricted(reference_MM), len(reference_MM)).resolved:
        return UNKNOWN

    def share(batches: NDArray[np.intp]) -> float:
        return squared_mean(difference_MM[np.ix_(batches, batches)]) / squared_mean(reference_MM[np.ix_(batches, batches)])

    return jackknife(share, len(difference_MM))


def _restricted(products_MM: Matrix) -> Callable[[NDArray[np.intp]], float]:
    return lambda batches: squared_mean(products_MM[np.ix_(batches, batches)])


# ---- texts


@dataclass(frozen=True)
class Pairs:
    """A reward and an exact effect for each of K texts, and the batch that each text is from."""

    reward_K: NDArray[np.float64]
    effect_K: NDArray[np.float64]
    batch_K: NDArray[np.intp]

    def _over_batches(self, statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], float]) -> Estimate:
        names = np.unique(self.batch_K)

        def of(kept: NDArray[np.intp]) -> float:
            rows = np.isin(self.batch_K, names[kept])
            return statistic(self.reward_K[rows], self.effect_K[rows])

        return jackknife(of, len(names))

    def pearson(self) -> Estimate:
        """Correlation of rewards and effects. Unknown where either is constant."""
        return self._over_batches(_pearson)

    def slope(self) -> Estimate:
        """Of the least-squares line effect = a + slope * reward: what a unit of reward is worth. 1 where both are the same quantity."""
        return self._over_batches(_slope)

    def bias_share(self) -> Estimate:
        """(E d)^2 / E d^2, d = reward - effect: the share of the squared error that all texts have in common.

        A common error is a baseline, which an advantage subtracts; the rest ranks texts wrongly. The numerator is unbiased (the mean's
        own variance is taken off), so it may fall a little below 0. For rewards in the effects' units only.
        """
        return self._over_batches(_bias_share)


def _pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float(np.corrcoef(left, right)[0, 1])


def _slope(reward: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    centred = reward - reward.mean()
    return float(np.sum(centred * (effect - effect.mean())) / np.sum(centred**2))


def _bias_share(reward: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    difference = reward - effect
    return float((difference.mean() ** 2 - difference.var(ddof=1) / len(difference)) / np.mean(difference**2))
