"""Shamir's secret sharing: any t of the shares give the secret, any t - 1 say nothing about it.

The secret is the value at 0 of a polynomial of degree t - 1 whose other coefficients are uniform in the field of
`PRIME_256` elements; a share is its value at the holder's point (Shamir 1979, *How to Share a Secret*).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tacit.errors import InputError
from tacit.ring.field import PRIME_256, inverses
from tacit.ring.prg import Prg

ELEMENT_BYTES = 32
MAX_POINT = 1 << 32


def split(secret: int, threshold: int, points: Sequence[int], prg: Prg) -> list[int]:
    """Share a field element.

    Args:
        secret: in [0, `PRIME_256`).
        threshold: t, how many shares it takes to have it back.
        points: of the holders, distinct, in [1, `MAX_POINT`]; at least t.
        prg: where the polynomial comes from.

    Returns:
        One share for each point, in their order. Costs t products in the field for each.

    Raises:
        InputError: the secret is not in the field, or the threshold or the points are not as described.
    """
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise InputError(f"a threshold of {threshold} among {len(points)} holders: choose from 1 to that number")
    if not 0 <= secret < PRIME_256:
        raise InputError("the secret is not an element of the field: it must lie in [0, 2^256 - 189)")
    coefficients = [prg.below(PRIME_256) for _ in range(threshold - 1)]
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * point % PRIME_256
        shares.append((value + secret) % PRIME_256)
    return shares


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange's coefficients: the value at 0 is the sum of the values at ``points`` times these.

    They depend on the points alone: secrets whose shares come from the same holders take them once.

    Raises:
        InputError: the points are not distinct or out of range.
    """
    _check_points(points)
    denominators = [x * math.prod(other - x for other in points if other != x) % PRIME_256 for x in points]
    product = math.prod(points) % PRIME_256
    return [product * inverse % PRIME_256 for inverse in inverses(denominators, PRIME_256)]


def reconstruct(shares: Mapping[int, int]) -> int:
    """The secret from exactly t shares, by the holders' points.

    Fewer, or one that is wrong, give an unrelated element: whoever can should compare with what is known of the secret.

    Raises:
        InputError: the points are out of range.
    """
    return combine(weights_at_zero(tuple(shares)), shares.values())


def combine(weights: Iterable[int], shares: Iterable[int]) -> int:
    """The secret from shares and the coefficients of their points, in one order and as many."""
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) % PRIME_256


def _check_points(points: Sequence[int]) -> None:
    if not points or len(set(points)) != len(points) or min(points) < 1 or max(points) > MAX_POINT:
        raise InputError(f"the holders' points must be distinct and lie in [1, {MAX_POINT}]")
