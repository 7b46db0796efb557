"""Integer noise: the discrete Gaussian and the Skellam distribution, drawn from the cryptographic generator.

Both are drawn by inversion of a table of cumulative probabilities that is computed in integers of hundreds of bits; no
floating-point number takes part. A draw takes one word of 64 bits, a sign and 63 bits of a uniform fraction, and
64 bits more of the fraction in the rare case (about entries · 2^-63) that 63 do not decide. So every value is drawn
with its probability to within 2^-127, and what lies beyond the table has probability below 2^-130: the total-variation
distance between a draw and the distribution itself is below 2^-100, which d draws at most multiply by d.

The number of bytes that a vector of noise takes from the generator does not depend on the noise, as it would with a
sampler that rejects; which entries of the table are touched does, as with any table.

Sources: Canonne, Kamath and Steinke 2020, *The Discrete Gaussian for Differential Privacy*; Agarwal, Kairouz and Liu
2021, *The Skellam Mechanism for Differentially Private Federated Learning*; the recurrence for Bessel functions is
Miller's (Abramowitz and Stegun 1964, section 9.12).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tacit.errors import InputError
from tacit.ring.kernels import load
from tacit.ring.prg import Prg

LARGEST_VARIANCE = 2.0**32
"""With a standard deviation of 2^16 steps the grid's share of the noise is 2·10⁻¹¹; a finer one only costs bits."""

_SMALLEST_VARIANCE = 2.0**-10
_BLOCK = 1 << 15
_PRECISION = 384
_TAIL_BITS = 131
_FRACTION_BITS = 127
_LARGEST_GUIDE_BITS = 18


@dataclass(frozen=True)
class DiscreteGaussian:
    """The distribution on the integers with probabilities proportional to exp(−k² / 2σ²).

    Args:
        variance: σ², from 2^-10, and to 2^32 where it is drawn; the true variance is no more, and from σ² = 1 on the
            same to 10⁻⁶ of it.

    Raises:
        InputError: it is out of range.
    """

    variance: float

    def __post_init__(self) -> None:
        _check(self.variance)

    def weights(self) -> list[int]:
        """Numbers proportional to the probabilities of 0, 1, 2 and so on: exp(−k² / 2σ²) in units of 2^-384."""
        one = 1 << _PRECISION
        exact = Fraction(self.variance)
        with localcontext(Context(prec=140)):
            first = (-Decimal(exact.denominator) / Decimal(2 * exact.numerator)).exp()
            ratio = int(first * one)
            squared = int(first * first * one)
        result, at = [one], one
        while at >> (_PRECISION - _TAIL_BITS - 8):
            at = at * ratio >> _PRECISION
            ratio = ratio * squared >> _PRECISION
            result.append(at)
        return result

    def tail(self, bound: float) -> float:
        """A bound on the logarithm of P(X >= ``bound``), −bound² / 2σ², also for sums of that variance.

        The distribution is sub-Gaussian (Canonne, Kamath and Steinke 2020, section 3).
        """
        return -(bound**2) / (2 * self.variance)


@dataclass(frozen=True)
class Skellam:
    """The difference of two independent Poisson variables of mean ``variance`` / 2 each.

    A sum of independent ones is one again, and their variances add up.

    Args:
        variance: from 2^-10, and to 2^32 where it is drawn.

    Raises:
        InputError: it is out of range.
    """

    variance: float

    def __post_init__(self) -> None:
        _check(self.variance)

    def weights(self) -> list[int]:
        """Numbers proportional to the probabilities e^-v I_k(v) of k = 0, 1, 2 and so on, by a recurrence.

        I_{k-1}(v) = I_{k+1}(v) + (2k / v) I_k(v), downwards from (0, 1) at a k where all that is left is negligible:
        what is wrong there dies out faster than the probabilities grow.
        """
        exact = Fraction(self.variance)
        last = 1
        while self.tail(last) > -_TAIL_BITS * math.log(2):
            last = last + 1 + last // 64
        start = last + last // 2 + 64
        result = [0, 1 << _PRECISION]
        for k in range(start, 0, -1):
            result.append(result[-2] + 2 * k * exact.denominator * result[-1] // exact.numerator)
        result.reverse()
        return result[: last + 1]

    def tail(self, bound: float) -> float:
        """A bound on the logarithm of P(X >= ``bound``).

        Chernoff's: v cosh t − v − t · bound at its least, where sinh t = bound / v.
        """
        v = self.variance
        # √(v² + b²) − v without cancellation.
        return bound**2 / (math.hypot(v, bound) + v) - bound * math.asinh(bound / v)


IntegerNoise = DiscreteGaussian | Skellam


def draw(noise: IntegerNoise, count: int, prg: Prg) -> NDArray[np.int64]:
    """``count`` independent draws; see `add_noise_`."""
    result = np.zeros(count, np.int64)
    add_noise_(result, noise, prg)
    return result


def add_noise_(values: NDArray[np.int64], noise: IntegerNoise, prg: Prg) -> None:
    """Add an independent draw to every entry in place.

    Args:
        values: int64, flat, contiguous.
        noise: its distribution. The first use computes a table that is kept: 1–2 µs and 16 bytes an entry, of which
            there are some 14 a standard deviation.
        prg: fresh for every release, or derived for it alone: noise that is drawn twice can be subtracted.

    Cost: 8 bytes of the generator an entry.

    Raises:
        InputError: the values are not such an array, or the variance is above `LARGEST_VARIANCE`.
    """
    if values.dtype != np.int64 or values.ndim != 1 or not values.flags.c_contiguous:
        raise InputError(
            f"integer noise is added to a flat contiguous array of int64, not to {values.dtype} of shape "
            f"{values.shape}: convert it"
        )
    table = _table(noise)
    loops = load("tacit.dp.discrete_kernels")
    drawn = np.empty(min(len(values), _BLOCK), np.int64)
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        words = prg.array(8 * len(part)).view(np.uint64)
        if loops is None or loops.invert(words, table.high, table.guide, table.shift, drawn):
            part += invert(words, table, prg)
        else:
            part += drawn[: len(part)]


def magnitude(noise: IntegerNoise, draws: int, failure: float = 2.0**-60) -> int:
    """A number that none of ``draws`` draws reaches in absolute value, but with probability ``failure`` at most.

    Raises:
        InputError: there are no draws, or the probability is not between 0 and 1.
    """
    if draws < 1 or not 0 < failure < 1:
        raise InputError(f"draws={draws}, failure={failure}: give 1 draw or more, and a probability between 0 and 1")
    wanted = math.log(failure) - math.log(2 * draws)
    most = 1
    while noise.tail(most) > wanted:
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if noise.tail(middle) > wanted else (least, middle)
    return most


@dataclass(frozen=True, eq=False)
class Table:
    """Cumulative probabilities of the magnitude: P(|X| <= k) · 2^127, rounded down, for k = 0, 1, 2 and so on.

    Args:
        high: their upper 64 bits; the last one is 2^63.
        low: their lower 64 bits.
        guide: for every value of a fraction's leading bits, the first k that it can decide on.
        shift: how many bits of the 63 follow those.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.uint32]
    shift: int


def invert(words: NDArray[np.uint64], table: Table, prg: Prg) -> NDArray[np.int64]:
    """Draws from uniform words: the lowest bit is a sign, the others the first 63 bits of a fraction.

    A draw's magnitude is the least k of which the cumulative probability exceeds the fraction; its other 64 bits come
    from ``prg`` if they matter.
    """
    fraction = words >> np.uint64(1)
    result = np.searchsorted(table.high, fraction, side="right")
    least = np.searchsorted(table.high, fraction, side="left")
    for i in np.flatnonzero(least < result):
        rest = int.from_bytes(prg.bytes(8), "little")
        while least[i] < result[i] and int(table.low[least[i]]) <= rest:
            least[i] += 1
        result[i] = least[i]
    return np.where(words & np.uint64(1), -result, result)


@lru_cache(maxsize=4)
def _table(noise: IntegerNoise) -> Table:
    if noise.variance > LARGEST_VARIANCE:
        raise InputError(
            f"variance={noise.variance:g}: noise is drawn up to a variance of {LARGEST_VARIANCE:g}, of which the grid "
            "is no longer a part that matters: use a coarser scale, such as fewer bits an entry"
        )
    weights = noise.weights()
    sums = list(accumulate([weights[0], *(2 * weight for weight in weights[1:])]))
    scaled = [(total << _FRACTION_BITS) // sums[-1] for total in sums]
    high = np.array([total >> 64 for total in scaled], np.uint64)
    low = np.array([total & (1 << 64) - 1 for total in scaled], np.uint64)
    bits = min(len(scaled).bit_length() + 1, _LARGEST_GUIDE_BITS)
    shift = _FRACTION_BITS - 64 - bits
    starts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(shift)
    return Table(high, low, np.searchsorted(high, starts, side="right").astype(np.uint32), shift)


def _check(variance: float) -> None:
    if not (variance >= _SMALLEST_VARIANCE and math.isfinite(variance)):
        raise InputError(
            f"variance={variance}: integer noise has a finite variance of {_SMALLEST_VARIANCE:g} or more, in squared "
            "steps of the grid: use a finer scale, or no noise at all"
        )
