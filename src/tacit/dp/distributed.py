"""What sums cost that carry integer noise, of which every member of a cohort added a share before anyone saw the sum.

Members hold integer vectors of which one changes the sum by at most ``l2`` in Euclidean norm and ``l1`` in the norm of
sums; `rounded_norm` bounds both for real vectors that are rounded at random. Rényi divergences of the noised sums are
bounded by

- Agarwal, Kairouz and Liu 2021, *The Skellam Mechanism for Differentially Private Federated Learning*, theorem 3.5 and
  corollary 3.6, for Skellam noise, whose shares add up to Skellam noise exactly;
- Kairouz, Liu and Steinke 2021, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
  Aggregation*, for discrete Gaussian noise, whose shares add up to nearly that;
- Mironov, Talwar and Zhang 2019, *Rényi Differential Privacy of the Sampled Gaussian Mechanism*, whose theorem 5 and
  expansion at integer orders hold for any symmetric noise, where the cohort was a Poisson sample.

Only shares count that whoever looks at the sum does not know: those of members who finished and do not collude.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from tacit.errors import InputError

FAILED_ROUNDINGS = math.exp(-0.5)
"""β of Kairouz, Liu and Steinke: at most that share of roundings exceed the bound and are drawn again."""


class SkellamSum(msgspec.Struct, frozen=True, tag="skellam-sum", forbid_unknown_fields=True):
    """Integer vectors were summed and every entry of the sum carried Skellam noise, some number of times.

    Neighbouring data sets differ in one member whose vector is replaced by zero; with Poisson sampling, in one who is
    there or not, and then neither the noise nor anything else that is shown may tell how many were taken.

    Args:
        variance: of the noise in the sum.
        l2: the greatest Euclidean norm of one member's vector.
        l1: the greatest sum of the magnitudes of its entries.
        sampling_rate: the probability with which each member was taken, independently and secretly; 1 is no sampling.
        times: how often.

    Raises:
        InputError: a field is out of range.
    """

    variance: float
    l2: float
    l1: float
    sampling_rate: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        _check(self.variance, "variance", self.l2, self.l1, self.sampling_rate, self.times)

    @property
    def private(self) -> bool:
        """Whether there was any noise."""
        return self.variance > 0

    def divergences(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bounds on the Rényi divergences of one release, order by order."""
        v, l2, l1 = self.variance, self.l2, self.l1

        def bound(order: NDArray[np.float64]) -> NDArray[np.float64]:
            extra = np.minimum(((2 * order - 1) * l2**2 + 6 * l1) / (4 * v**2), 3 * l1 / (2 * v))
            return np.asarray(order * l2**2 / (2 * v) + extra)

        return _sampled(bound, self.sampling_rate, orders)


class DiscreteGaussianSum(msgspec.Struct, frozen=True, tag="discrete-gaussian-sum", forbid_unknown_fields=True):
    """Integer vectors were summed with shares of discrete Gaussian noise in every entry, some number of times.

    Neighbouring data sets are as for `SkellamSum`.

    Args:
        share_variance: σ² of one share, at least ¼.
        shares: how many shares the sum carried.
        size: D, entries of the vector.
        l2: the greatest Euclidean norm of one member's vector.
        sampling_rate: as for `SkellamSum`.
        times: how often.

    Raises:
        InputError: a field is out of range.
    """

    share_variance: float
    shares: int
    size: int
    l2: float
    sampling_rate: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        _check(self.share_variance, "share_variance", self.l2, self.l2, self.sampling_rate, self.times)
        if self.shares < 0 or self.size < 1:
            raise InputError(f"shares={self.shares}, size={self.size}: give 0 shares or more, and 1 entry or more")
        if 0 < self.share_variance < 0.25:
            raise InputError(
                f"share_variance={self.share_variance}: sums of discrete Gaussians are understood from 0.25 on: use a "
                "finer scale, or Skellam noise"
            )

    @property
    def private(self) -> bool:
        """Whether there was any noise."""
        return self.share_variance * self.shares > 0

    @property
    def distortion(self) -> float:
        """τ: by how much the logarithm of a probability of the sum of the shares differs from one discrete Gaussian."""
        k = np.arange(1, self.shares, dtype=np.float64)
        return float(10 * np.exp(-2 * math.pi**2 * self.share_variance * k / (k + 1)).sum())

    def divergences(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bounds on the Rényi divergences of one release, order by order."""
        ratio = self.l2 / math.sqrt(self.share_variance * self.shares)
        tau, size = self.distortion, self.size

        def bound(order: NDArray[np.float64]) -> NDArray[np.float64]:
            # Both distributions of an entry are within e^±τ of discrete Gaussians.
            apart = order / 2 * ratio**2 + (2 * order - 1) / (order - 1) * tau * size
            return np.minimum(apart, order / 2 * (ratio + tau * math.sqrt(size)) ** 2)

        return _sampled(bound, self.sampling_rate, orders)


def rounded_norm(norm: float, size: int) -> float:
    """A bound that a vector of Euclidean norm ``norm``, its entries rounded up or down at random, meets often enough.

    With expectation kept, the norm of a rounded vector is at most that with probability 1 − `FAILED_ROUNDINGS` or more:
    B² = min((Δ + √D)², Δ² + D/4 + √(2 ln 1/β) (Δ + √D/2)) (Kairouz, Liu and Steinke 2021, theorem 1). A rounding
    that exceeds it is drawn again, so that the bound always holds.

    Args:
        norm: Δ, in steps of the grid.
        size: D, entries of the vector.

    Raises:
        InputError: the norm is not a number above 0, or there are no entries.
    """
    if not (norm > 0 and math.isfinite(norm)) or size < 1:
        raise InputError(f"norm={norm}, size={size}: give a norm above 0 in steps of the grid, and 1 entry or more")
    root = math.sqrt(size)
    likely = norm**2 + size / 4 + math.sqrt(-2 * math.log(FAILED_ROUNDINGS)) * (norm + root / 2)
    return min(norm + root, math.sqrt(likely))


def summed_norm(norm: float, size: int) -> float:
    """The greatest sum of magnitudes of an integer vector with ``size`` entries and Euclidean norm up to ``norm``."""
    # |x| <= x² for every integer.
    return norm * min(math.sqrt(size), norm)


def _sampled(
    bound: Callable[[NDArray[np.float64]], NDArray[np.float64]], rate: float, orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Divergences of a mechanism on a Poisson sample, from those without sampling at integer orders.

    (α − 1) times the divergence is convex in α and 0 at 1 (van Erven and Harremoës 2014, corollary 2), so between two
    integers it is at most what a straight line gives.
    """
    below = np.floor(orders)
    whole = np.unique(np.concatenate([below, below + 1, [2.0]]))
    whole = whole[whole >= 2]
    values = bound(whole)
    if rate < 1:
        values = np.minimum(values, [_amplified(bound, rate, int(order)) for order in whole])
    line = np.interp(orders, np.append(1.0, whole), np.append(0.0, (whole - 1) * values))
    return np.asarray(line / (orders - 1))


def _amplified(bound: Callable[[NDArray[np.float64]], NDArray[np.float64]], rate: float, order: int) -> float:
    """The divergence on a sample of rate q at an integer order α, from the divergences ε(k) at 2 … α without sampling.

    (α − 1) ε'(α) = ln Σ_k C(α, k) (1 − q)^(α−k) q^k e^((k−1) ε(k)), which is the binomial expansion of one direction.
    The other one is no larger, because x → Δ − x swaps the distributions with and without the member.
    """
    powers = np.arange(2, order + 1, dtype=np.float64)
    choose = np.array([math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1) for k in powers])
    kept, taken = math.log1p(-rate), math.log(rate)
    terms = choose + (order - powers) * kept + powers * taken + (powers - 1) * bound(powers)
    # k = 0 and k = 1 together.
    first = (order - 1) * kept + math.log1p((order - 1) * rate)
    return float(np.logaddexp.reduce(terms, initial=first)) / (order - 1)


def _check(variance: float, name: str, l2: float, l1: float, rate: float, times: int) -> None:
    if not (variance >= 0 and math.isfinite(variance)):
        raise InputError(f"{name}={variance}: the variance of noise is a number of 0 (no privacy) or more")
    if not (l2 > 0 and math.isfinite(l2) and l1 >= l2 and math.isfinite(l1)):
        raise InputError(
            f"l2={l2}, l1={l1}: norms of integer vectors are above 0 and finite, and l1 is no less than l2"
        )
    if not 0 < rate <= 1:
        raise InputError(f"sampling_rate={rate}: a probability above 0 and at most 1")
    if times < 1:
        raise InputError(f"times={times}: an event happened at least once")
