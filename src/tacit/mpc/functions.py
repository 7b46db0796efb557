"""Non-linear functions of private numbers, made of the masked opening (`tacit.mpc.sign`) and one-time tables
(`tacit.mpc.tables`).

*Bounded functions* (sigmoid, tanh, GELU, …) are curved on a short interval only: the argument is clamped to it, which
takes two ReLUs side by side, and looked up.

*Powers and the logarithm* are brought to [1, 4) first. Comparisons with 4^-4, 4^-3, …, 4^6, all in the same rounds,
tell as bits which power 4^i is the largest below S; 4^-i and f(4^i) are sums of these bits with public coefficients,
and f(S) = f(4^i)·f(S·4^-i). A numerator is multiplied by f(4^i) in the round in which S is multiplied by 4^-i, so a
quotient takes no more rounds than a reciprocal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tacit.mpc.linear import Multiply, times, times_number
from tacit.mpc.ordering import largest
from tacit.mpc.shares import Share
from tacit.mpc.sign import MAX_CHUNKS, nonnegative, relu, truncate
from tacit.mpc.steps import Protocol, together
from tacit.mpc.tables import EXP_LOW, SPLINES, exponential, interpolate
from tacit.ring.fixed_point import FRACTION_BITS

LEAST, GREATEST = -4, 6
"""Normalisation tells the powers of four with these exponents apart: magnitudes from 2^-8 to 2^14."""
_MARGIN = 2.0**-8
"""How far inside a table's interval arguments are clamped, for the units that truncation may add."""
_LOG_4 = 2 * math.log(2)


def shifted(x: Share, amount: float) -> Share:
    """x + amount for a public number, rounded to a multiple of 2^-scale; local."""
    return x.plus_public(round(amount * (1 << x.scale)))


def reduced(x: Share, scale: int = FRACTION_BITS) -> Protocol[Share]:
    """x with no more than ``scale`` fractional bits; one round if it has more, else none."""
    return (yield from truncate(x, scale)) if x.scale > scale else x


def clamp_below(x: Share, low: float, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """max(x, low) at scale 16, within a unit; a ReLU's cost. The window must hold x - low."""
    x = x.raised(max(x.scale, FRACTION_BITS))
    return shifted((yield from relu(shifted(x, -low), chunks=chunks)), low)


def clamp_above(x: Share, high: float, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """min(x, high) at scale 16, within a unit; a ReLU's cost. The window must hold x - high."""
    return -(yield from clamp_below(-x, -high, chunks))


def clamp(x: Share, low: float, high: float, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """min(max(x, low), high) at scale 16, within two units; two ReLUs' bytes in 3 rounds."""
    return (yield from _split(x, low, high, chunks))[0]


def _split(x: Share, low: float, high: float, chunks: int) -> Protocol[tuple[Share, Share]]:
    """The clamped x = low + relu(x - low) - relu(x - high), and relu(x - high), what was cut off above."""
    x = x.raised(max(x.scale, FRACTION_BITS))
    above, excess = yield from together(relu(shifted(x, -low), chunks=chunks), relu(shifted(x, -high), chunks=chunks))
    return shifted(above - excess, low), excess


def absolute(x: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """|x| = relu(x) + relu(-x) as 2·relu(x) - x, both truncated to scale 16; a ReLU's cost, within two units."""
    x = x.raised(max(x.scale, FRACTION_BITS))
    positive, same = yield from together(relu(x, chunks=chunks), reduced(x))
    return times_number(positive, 2.0) - same


def bounded(x: Share, name: str, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """sigmoid, tanh or erf: a function that is constant beyond its spline's interval.

    1. clamp to the interval; 2. `interpolate`.

    Args:
        x: a share with |x| below 16,000 (for 5 chunks), at any scale.
        name: "sigmoid", "tanh" or "erf".
        chunks: the comparison window's size.

    Returns:
        A share at scale 32.

    Guarantees: an absolute error below 2^-11.5, all over the domain.
    Leakage: none.
    Cost: 4 rounds; 26 bytes and 2 bits an element each way; dealt: two ReLUs and the table, 920 bytes at scale 32.
    """
    spline = SPLINES[name]
    inside = yield from clamp(x, spline.low + _MARGIN, spline.high - _MARGIN, chunks)
    return (yield from interpolate(inside, name))


def unit(x: Share, name: str, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """gelu, gelu_tanh or silu: a function that is 0 to the left of its spline's interval and x to the right.

    1. c = x clamped to the interval, and q = relu(x - high) what that cut off; 2. interpolate at c, plus q.

    Args:
        x: a share with |x| below 16,000 (for 5 chunks), at any scale.
        name: "gelu", "gelu_tanh" or "silu".
        chunks: the comparison window's size.

    Returns:
        A share at scale 32.

    Guarantees: an absolute error below 2^-11.5, all over the domain.
    Leakage: none.
    Cost: as `bounded`.
    """
    spline = SPLINES[name]
    inside, excess = yield from _split(x, spline.low + _MARGIN, spline.high - _MARGIN, chunks)
    return (yield from interpolate(inside, name)) + excess


def exp(x: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """e^x; arguments below -17 count as -17.

    Args:
        x: a share with values from -16,000 to 10, at any scale.
        chunks: the comparison window's size.

    Returns:
        A share at scale 46.

    Guarantees: a relative error below 2^-15 (of which 2^-16 comes from the truncation of x), plus 2^-20 absolute. Above
        10 the result is meaningless.
    Leakage: none.
    Cost: 4 rounds; 17 bytes and 1 bit an element each way; dealt: a ReLU's bytes and 64.
    """
    return (yield from exponential((yield from clamp_below(x, EXP_LOW + 1, chunks))))


@dataclass(frozen=True, eq=False, repr=False)
class Octaves:
    """Between which powers of four a private number lies, as bits.

    Args:
        above: shares of 1{S ≥ 4^i}, i from ``least`` up, along a new first dimension; scale 0.
        least: the lowest exponent.
    """

    above: Share
    least: int

    def weighed(self, base: float, scale: int) -> Share:
        """base^i for the largest i with S ≥ 4^i, 0 if there is none; local. All of the powers must be exact at
        ``scale``."""
        powers = [int(base ** (self.least + i) * 2.0**scale) for i in range(self.above.shape[0])]
        # Each bit adds the step from the power below: the sum over the bits that are set is the highest power.
        steps = [power - lower for power, lower in zip(powers, [0, *powers], strict=False)]
        column = torch.tensor(steps, device=self.above.words.device).view(-1, *[1] * (self.above.words.dim() - 1))
        return self.above.with_words((self.above.words * column).sum(0), scale)

    def exponent(self) -> Share:
        """max(i, least) for that i; local, scale 0."""
        return self.above.with_words(self.above.words[1:].sum(0)).plus_public(self.least)

    def none(self) -> Share:
        """1{S < 4^least}; local, scale 0."""
        return -self.above.with_words(self.above.words[0]).plus_public(-1)


def octaves(s: Share, least: int = LEAST, greatest: int = GREATEST, chunks: int = MAX_CHUNKS) -> Protocol[Octaves]:
    """Compare a share with the powers of four from 4^least to 4^greatest, all at once.

    Cost: 3 rounds, a comparison (`tacit.mpc.sign.nonnegative`) for each power.
    """
    s = s.raised(max(s.scale, FRACTION_BITS))
    thresholds = torch.tensor([round(4.0**i * (1 << s.scale)) for i in range(least, greatest + 1)])
    column = thresholds.to(s.words.device).view(-1, *[1] * s.words.dim())
    levels = s.map(lambda own: own.expand(len(thresholds), *own.shape)).plus_public(-column)
    return Octaves((yield from nonnegative(levels, chunks)), least)


_BASES = {"reciprocal": 0.25, "rsqrt": 0.5, "sqrt": 2.0}
"""f(4) of the functions with f(4^i·u) = f(4)^i·f(u)."""
_POWER_BITS = 2 * GREATEST
_FINEST = 40


def power(
    s: Share,
    name: str,
    numerator: Share | None = None,
    *,
    signed: bool = False,
    least: int = LEAST,
    greatest: int = GREATEST,
    chunks: int = MAX_CHUNKS,
) -> Protocol[Share]:
    """1/S, 1/√S or √S, times a numerator if there is one.

    1. `octaves`: bits for the largest 4^i ≤ S; 2. together: u = S·4^-i, v = X·f(4^i); 3. together: t = f(u) by
    `interpolate`, v truncated; 4. v·t.

    Args:
        s: a share, at any scale; below 4^(greatest + 1) = 2^14, or of magnitude below 12,000 if signed.
        name: "reciprocal", "rsqrt" or "sqrt".
        numerator: a share that broadcasts against s.
        signed: whether S may be negative, for "reciprocal"; then twice the comparisons are made.
        least: an S (a magnitude, if signed) below 4^least = 2^-8 counts as +4^least.
        greatest: see s.
        chunks: the comparison windows' size.

    Returns:
        A share at scale 44, or 48 with a numerator; the result must then stay below 2^14.

    Guarantees: a relative error below 2^-12.5 in f(S), for the S that the share holds; with a numerator, 2^-14 absolute
        on top.
    Leakage: none.
    Cost: 6 rounds (one more to truncate a numerator, beside the comparisons: none). With 11 powers of four, bytes an
        element of S: 139 each way, 1,100 dealt, about; of the numerator: 32 each way, 34 dealt.
    Source: normalisation by powers, Catrina and Saxena, Financial Cryptography 2010, section 3.4; here by parallel
        comparisons.
    """
    sides = s.map(lambda own: torch.stack([own, -own])) if signed else s
    # `together` types its results alike; they are Octaves, then shares.
    results: list[Any] = yield from together(
        octaves(sides, least, greatest, chunks),
        reduced(s, _FINEST if s.scale <= _FINEST else 2 * FRACTION_BITS),
        *([] if numerator is None else [reduced(numerator)]),
    )
    found, s, *x = results
    base, none = _BASES[name], found.none()
    down, factor = found.weighed(0.25, _POWER_BITS), found.weighed(base, _POWER_BITS)
    if signed:
        down, factor = (side.map(lambda own: own[0] - own[1]) for side in (down, factor))
        none = none.map(lambda own: own.sum(0)).plus_public(-1)
    factor = factor + times_number(none, base**least)
    u, *v = yield from together(times(s, down, Multiply()), *(times(one, factor, Multiply()) for one in x))
    t, outer = yield from together(interpolate(u + none, name), reduced(v[0] if v else factor))
    return (yield from times(outer, t, Multiply()))


def sqrt(s: Share, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """√S for S from 0 to 2^14.

    Returns:
        A share at scale 44.

    Guarantees: for the S that is left after truncation to 16 fractional bits, a relative error below 2^-12.5. So 0
        gives 0, and the smallest S, where the root is steepest, are off by up to 2^-8.
    Cost: as `power` with 16 powers of four; a round more if S has to be truncated.
    """
    s = yield from reduced(s)
    found = yield from octaves(s, -FRACTION_BITS // 2, GREATEST, chunks)
    u = yield from times(s, found.weighed(0.25, _POWER_BITS), Multiply())
    t = yield from interpolate(u + found.none(), "sqrt")
    return (yield from times(t, found.weighed(2.0, _POWER_BITS), Multiply()))


def log(
    s: Share, least: int = -FRACTION_BITS // 2, greatest: int = GREATEST, chunks: int = MAX_CHUNKS
) -> Protocol[Share]:
    """The natural logarithm: log S = log u + i·log 4 for S = 4^i·u.

    Args:
        s: a share with values from 4^least to 2^14.
        least: a smaller S, 0 and negative ones too, counts as 4^least, which is 2^-16 unless given.
        greatest: S is below 4^(greatest + 1).
        chunks: the comparison windows' size.

    Returns:
        A share at scale 32.

    Guarantees: an absolute error below 2^-12, for the S that is left after truncation to 16 fractional bits.
    Leakage: none.
    Cost: 5 rounds, 6 if S has to be truncated; bytes about as `power`'s.
    """
    s = yield from reduced(s)
    found = yield from octaves(s, least, greatest, chunks)
    u = yield from times(s, found.weighed(0.25, _POWER_BITS), Multiply())
    rest = yield from interpolate(u + found.none(), "log")
    exponent = found.exponent()
    return rest + exponent.with_words(exponent.words * round(_LOG_4 * (1 << rest.scale)), rest.scale)


def normalise(x: Share, dims: tuple[int, ...], epsilon: float, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """(x - mean) / √(variance + ε) over some dimensions: what layer, group and instance norms share.

    1. `centred`; 2. square: the variance is the mean of the squares; 3. `power`.

    Args:
        x: a share of magnitude below 2^11, at any scale.
        dims: the dimensions to normalise over.
        epsilon: what is added to the variance.
        chunks: the comparison windows' size.

    Returns:
        A share at scale 48.

    Guarantees: a relative error below 2^-12, 2^-15 absolute, and 2^-14 / √variance from rounding the centred x to
        multiples of 2^-16, for variances from 2^-12 to 2^10; a smaller one counts as 2^-12.
    Leakage: none.
    Cost: 8 rounds; 9 or 10 if the number of elements is not a power of two (see `mean`); one more if x is at more than
        32 fractional bits. Bytes an element: 64 each way, 62 dealt; and for each mean those of `power`.
    """
    middle = yield from centred(x, dims)
    squares = yield from times(middle, middle, Multiply())
    variance = shifted((yield from mean(squares, dims)), epsilon)
    # Taken for sixteen times as large, so that the comparisons, which see 16 fractional bits, tell smaller ones apart.
    sixteenfold = variance.with_words(variance.words, variance.scale - 4)
    return (yield from power(sixteenfold, "rsqrt", times_number(middle, 4.0), chunks=chunks))


def centred(x: Share, dims: tuple[int, ...]) -> Protocol[Share]:
    """x minus its mean over dimensions, both rounded to scale 16; one round, or two where `mean` takes one."""
    x = yield from reduced(x, 2 * FRACTION_BITS)
    rounded, middle = yield from together(reduced(x), _rounded_mean(x, dims))
    return rounded - middle


def _rounded_mean(x: Share, dims: tuple[int, ...]) -> Protocol[Share]:
    return (yield from reduced((yield from mean(x, dims))))


def mean(x: Share, dims: tuple[int, ...]) -> Protocol[Share]:
    """The mean over dimensions, which are kept at size 1.

    The sum over n elements is divided by 2^⌊log2 n⌋ exactly, which goes into the scale, and by the rest, between 1 and
    2, with a relative error of 2^-16. Before that, a sum of many fractional bits is truncated to make room.

    Args:
        x: a share at scale 32 or less.
        dims: the dimensions.

    Returns:
        A share at scale 48 or less. Sums must stay below 2^62 at x's scale, and means below 2^14.

    Leakage: none.
    Cost: local; one round if n is not a power of two and x's scale + log2 n is more than 32.
    """
    total = x.map(lambda own: own.sum(dims, keepdim=True))
    count = x.words.numel() // max(1, total.words.numel())
    halvings = count.bit_length() - 1
    mostly = total.with_words(total.words, total.scale + halvings)
    if count == 1 << halvings:
        return (yield from reduced(mostly, 3 * FRACTION_BITS))
    mostly = (yield from reduced(mostly, 24)) if mostly.scale > 2 * FRACTION_BITS else mostly
    return times_number(mostly, (1 << halvings) / count)


def softmax(x: Share, dim: int, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """e^x / Σ e^x along a dimension of n elements.

    1. m, the largest, by a tournament; 2. e^(x - m), `exp`; 3. `power` with these as numerators and their sum, which
    lies between 1 and n.

    Args:
        x: a share at any scale; any two elements less than 16,000 apart.
        dim: which dimension; at most 2^14 elements.
        chunks: the comparison windows' size.

    Returns:
        A share at scale 48.

    Guarantees: an absolute error below 2^-12.
    Leakage: none.
    Cost: 10 rounds, and 3·ceil(log2 n) for the largest.
    """
    _, exponentials = yield from _relative_exponentials(x, dim, chunks)
    total = exponentials.map(lambda own: own.sum(dim, keepdim=True))
    size = exponentials.shape[dim]
    return (yield from power(total, "reciprocal", exponentials, least=0, greatest=_fours(size), chunks=chunks))


def log_softmax(x: Share, dim: int, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """x - log Σ e^x along a dimension; see `softmax`.

    Returns:
        A share at scale 32.

    Guarantees: an absolute error below 2^-11.
    Leakage: none.
    Cost: 10 rounds, and 3·ceil(log2 n) for the largest.
    """
    relative, exponentials = yield from _relative_exponentials(x, dim, chunks)
    total = exponentials.map(lambda own: own.sum(dim, keepdim=True))
    return relative - (yield from log(total, 0, _fours(exponentials.shape[dim]), chunks))


def _relative_exponentials(x: Share, dim: int, chunks: int) -> Protocol[tuple[Share, Share]]:
    """x - max x, and e to that."""
    relative = x - (yield from largest(x, dim, chunks))
    return relative, (yield from exp(relative, chunks))


def _fours(size: int) -> int:
    """The largest i with 4^i ≤ size."""
    return (size.bit_length() - 1) // 2
