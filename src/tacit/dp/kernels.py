"""The compiled loop behind `tacit.dp.mechanisms`; see `tacit.ring.kernels`.

Words are taken in blocks, so that what is worked on stays in the first-level cache while every inner loop stays simple
enough to become vector instructions. Logarithm, sine and cosine are polynomials, because calls to a library are not.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tacit.ring.kernels import compiled

_BLOCK = 512
_MANTISSA, _ONE_BITS = np.int64((1 << 52) - 1), np.int64(1023 << 52)
_EXPONENT, _BIAS = np.int64(52), np.int64(1023 + 64)
_SWAP, _FIRST, _SECOND, _FLAGS = np.int64(1), np.int64(2), np.int64(4), np.int64(3)
_SQRT_2, _LN_2 = math.sqrt(2), math.log(2)
_EIGHTH_TURN = math.pi / 4 * 2.0**-63
# Adding this to a number below 2^51, and taking it away again, leaves the nearest integer.
_ROUND = 1.5 * 2.0**52


@compiled
def add_gaussian(values: NDArray[np.float32 | np.float64], words: NDArray[np.int64], steps: float, grid: float) -> None:
    """``values = grid * round(values / grid + steps * z)``, z standard normal; see `mechanisms.standard_normal`.

    ``words`` has an even number of entries: the first half are the radii, the second the angles. The first half of
    ``values`` gets the cosines and the second, which may be shorter by one, the sines.
    """
    pairs, odd = words.size // 2, values.size % 2
    per_grid = 1.0 / grid
    radius, across, up = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    fraction = np.empty(_BLOCK, np.int64)
    for start in range(0, pairs, _BLOCK):
        count = min(_BLOCK, pairs - start)
        chances = words[start : start + count].view(np.uint64)
        angles = words[pairs + start : pairs + start + count]
        for j in range(count):
            radius[j] = np.float64(chances[j]) + 0.5
        bits, mantissa = radius.view(np.int64), fraction.view(np.float64)
        for j in range(count):
            fraction[j] = (bits[j] & _MANTISSA) | _ONE_BITS
        for j in range(count):
            exponent = np.float64((bits[j] >> _EXPONENT) - _BIAS)
            m = mantissa[j]
            large = m > _SQRT_2
            m = m * 0.5 if large else m
            exponent = exponent + 1.0 if large else exponent
            s = (m - 1.0) / (m + 1.0)
            q = s * s
            series = 1 / 17 + q * (1 / 19)
            series = 1 / 13 + q * (1 / 15 + q * series)
            series = 1 / 9 + q * (1 / 11 + q * series)
            series = 1 / 5 + q * (1 / 7 + q * series)
            logarithm = exponent * _LN_2 + 2.0 * s * (1.0 + q * (1 / 3 + q * series))
            radius[j] = math.sqrt(max(-2.0 * logarithm, 0.0))
        for j in range(count):
            x = np.float64(angles[j] & ~np.int64(7)) * _EIGHTH_TURN
            q = x * x
            sine = 1 / 6227020800 - q * (1 / 1307674368000)
            sine = 1 / 362880 - q * (1 / 39916800 - q * sine)
            sine = x * (1.0 - q * (1 / 6 - q * (1 / 120 - q * (1 / 5040 - q * sine))))
            cosine = 1 / 479001600 - q * (1 / 87178291200)
            cosine = 1 / 40320 - q * (1 / 3628800 - q * cosine)
            cosine = 1.0 - q * (0.5 - q * (1 / 24 - q * (1 / 720 - q * cosine)))
            swap = (angles[j] & _SWAP) != 0
            first = sine if swap else cosine
            second = cosine if swap else sine
            across[j] = -first if (angles[j] & _FIRST) != 0 else first
            up[j] = -second if (angles[j] & _SECOND) != 0 else second
        upper = values[start : start + count]
        for j in range(count):
            upper[j] = grid * ((upper[j] * per_grid + steps * (radius[j] * across[j]) + _ROUND) - _ROUND)
        count = min(count, pairs - odd - start)
        lower = values[pairs + start : pairs + start + count]
        for j in range(count):
            lower[j] = grid * ((lower[j] * per_grid + steps * (radius[j] * up[j]) + _ROUND) - _ROUND)
