"""Functions of a private number in one round: one-time tables that are looked up at a public index.

The parties open Y + R for a dealt uniform mask R. Cut into a node number and an offset, both to the nearest node,

    Y + R = j + a,    R = ι + ρ        so        Y = (j - ι) + (a - ρ),     |a|, |ρ| ≤ 1/2,

modulo the number of nodes. No carry has to be found: Y is within one step of the node j - ι, and a polynomial P around
that node gives f(Y) ≈ P(a - ρ). The provider knows ι and ρ and the parties know j and a, so the provider deals, for
every j that may come up, the coefficients of P(a - ρ) as a polynomial in a. The parties take the row of the j that does
come up and add public multiples of its entries. This is the one-time truth table of Ishai, Kushilevitz, Meldgaard,
Orlandi and Paskin-Cherniavsky (TCC 2013) with polynomials for entries.

Two functions need less than polynomials: `exponential`, because e^(a-ρ) = e^a·e^(-ρ), and `indicator`, whose argument
is an integer.

What the parties multiply by is public and has to be the same word at both, so it is computed in integers throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc.correlation import Correlation, Field, Part, Provider
from tacit.mpc.linear import times_number
from tacit.mpc.shares import Share
from tacit.mpc.steps import Open, Protocol, Take
from tacit.ring.integers import WORD_BITS, bits_at, shift_right

Reals = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
ENTRY_BITS = 16
OFFSET_BITS = 16
"""Fractional bits of a table's entries and of the powers of a public offset; a spline's result has the sum of both."""


@dataclass(frozen=True)
class Spline:
    """A function on an interval, as polynomials around equally spaced nodes that each reach to both neighbours.

    Args:
        function: on float64 arrays; analytic on the interval.
        low: where the interval begins, a multiple of 2^-16; the first node.
        high: where it ends; the last node is at or just beyond it.
        index_bits: there are 2^index_bits nodes.
        degree: of the polynomials.
    """

    function: Callable[[Reals], Reals]
    low: float
    high: float
    index_bits: int
    degree: int

    @property
    def density(self) -> float:
        """Nodes a unit: a number of 8 bits times a power of two, so that scaling by it is exact."""
        density = ((1 << self.index_bits) - 1) / (self.high - self.low)
        unit = 2.0 ** (math.floor(math.log2(density)) - 7)
        return math.floor(density / unit) * unit

    def _near(self, node: int, offset: Any) -> Any:
        return self.function(self.low + (node + offset) / self.density)

    def polynomials(self) -> Reals:
        """The coefficients around each node by ascending power of the offset in steps: float64 (nodes, degree + 1)."""
        nodes = 1 << self.index_bits
        rows = np.zeros((nodes, self.degree + 1))
        for j in range(nodes):
            reach = [-1.0 if j else 0.0, 1.0 if j < nodes - 1 else 0.0]
            fit = Chebyshev.interpolate(partial(self._near, j), self.degree, domain=reach)
            coefficients = fit.convert(kind=Polynomial, domain=[-1, 1]).coef
            rows[j, : len(coefficients)] = coefficients
        return rows


_SQRT_TAU = math.sqrt(2 * math.pi)
_erf: Callable[[Reals], Reals] = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Reals) -> Reals:
    return (1 + np.tanh(x / 2)) / 2


def _gelu(x: Reals) -> Reals:
    result: Reals = x * (1 + _erf(x / math.sqrt(2))) / 2
    return result


def _gelu_tanh(x: Reals) -> Reals:
    result: Reals = x * (1 + np.tanh(2 / _SQRT_TAU * (x + 0.044715 * x**3))) / 2
    return result


SPLINES: dict[str, Spline] = {
    "sigmoid": Spline(_sigmoid, -9.0, 9.0, index_bits=4, degree=5),
    "tanh": Spline(np.tanh, -4.5, 4.5, index_bits=4, degree=5),
    "erf": Spline(_erf, -3.0, 3.0, index_bits=4, degree=4),
    "gelu": Spline(_gelu, -4.25, 4.25, index_bits=4, degree=4),
    "gelu_tanh": Spline(_gelu_tanh, -4.25, 4.25, index_bits=4, degree=4),
    "silu": Spline(lambda x: x * _sigmoid(x), -11.0, 11.0, index_bits=4, degree=6),
    "reciprocal": Spline(lambda x: 1 / x, 0.96875, 4.0, index_bits=3, degree=5),
    "rsqrt": Spline(lambda x: x**-0.5, 0.96875, 4.0, index_bits=3, degree=4),
    "sqrt": Spline(np.sqrt, 0.96875, 4.0, index_bits=3, degree=4),
    "log": Spline(np.log, 0.96875, 4.0, index_bits=3, degree=5),
}
"""The functions that `interpolate` knows. Degrees and node counts are the smallest tables whose fit is within 2^-12."""


@cache
def _polynomials(name: str) -> Tensor:
    return torch.from_numpy(SPLINES[name].polynomials())


def _nearest_node(words: Tensor, bits: int, index_bits: int) -> tuple[Tensor, Tensor]:
    """Cut words at ``bits`` fractional bits into the nearest node's number, modulo 2^index_bits, and the offset."""
    half = 1 << (bits - 1)
    shifted = words + half
    return bits_at(shifted, bits, index_bits), bits_at(shifted, 0, bits) - half


@dataclass(frozen=True)
class Interpolation(Correlation):
    """What is dealt for one evaluation of a spline: R, and for every public index j a row of ``degree + 1`` words.

    Args:
        shape: of the argument.
        bits: fractional bits of the argument, counted in steps between nodes.
        name: which of `SPLINES`.
    """

    shape: tuple[int, ...]
    bits: int
    name: str

    @property
    def fields(self) -> dict[str, Field]:
        """r, and the table of shape ``(*shape, nodes, degree + 1)``."""
        spline = SPLINES[self.name]
        table = (*self.shape, 1 << spline.index_bits, spline.degree + 1)
        return {"r": Field(self.shape), "table": Field(table, dealt=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The row of j holds the coefficients of a^m in P(a - ρ), P the polynomial around node j - ι."""
        spline = SPLINES[self.name]
        nodes, degree = 1 << spline.index_bits, spline.degree
        index, offset = _nearest_node(uniform.r, self.bits, spline.index_bits)
        away = -offset.to(torch.float64) * 2.0**-self.bits
        # Horner's scheme for the shift of a polynomial's argument by -ρ, for all nodes at once.
        shifted = [column.expand(*self.shape, nodes) for column in _polynomials(self.name).unbind(1)]
        for lowest in range(degree):
            for power in reversed(range(lowest, degree)):
                shifted[power] = shifted[power] + away.unsqueeze(-1) * shifted[power + 1]
        rows = (torch.stack(shifted, -1) * 2.0**ENTRY_BITS).round().to(torch.int64)
        node = (torch.arange(nodes) - index.unsqueeze(-1)) % nodes
        return {"table": rows.take_along_dim(node.unsqueeze(-1), -2)}


def interpolate(x: Share, name: str) -> Protocol[Share]:
    """One of `SPLINES` at a private argument.

    1. open Y + R, Y = (X - low)·density; 2. j + a = Y + R; 3. [f(X)] = Σ_m a^m·[table_j,m].

    Args:
        x: a share whose value lies between the spline's ``low`` and ``high``, at any scale up to 44.
        name: which function.

    Returns:
        A share at scale 32.

    Guarantees: within 2^-12 of the function inside the interval (`docs/operators.md` has each spline's measured error).
        Outside the interval the result is meaningless: clamp first.
    Leakage: none; Y + R is uniform.
    Cost: one round, 8 bytes an element each way; 8·2^index_bits·(degree + 1) bytes an element dealt, to bob.
    Source: Ishai et al., TCC 2013, section 3 (one-time truth tables).
    """
    spline = SPLINES[name]
    x = x.raised(max(x.scale, 16))
    y = times_number(x.plus_public(-int(spline.low * (1 << x.scale))), spline.density)
    y = y.raised(max(y.scale, OFFSET_BITS))
    if y.scale + spline.index_bits > WORD_BITS:
        raise InputError(f"an argument at {x.scale} fractional bits is too fine for a table: truncate it")
    part = yield Take(Interpolation(tuple(y.shape), y.scale, name))
    (opened,) = yield Open(y.words + part.r)
    index, offset = _nearest_node(opened, y.scale, spline.index_bits)
    offset = offset >> (y.scale - OFFSET_BITS)
    row = _row(part.table, index)
    power = torch.full_like(offset, 1 << OFFSET_BITS)
    total = row[..., 0] << OFFSET_BITS
    for m in range(1, spline.degree + 1):
        power = (power * offset) >> OFFSET_BITS
        total = total + row[..., m] * power
    return y.with_words(total, ENTRY_BITS + OFFSET_BITS)


def _row(table: Tensor, index: Tensor) -> Tensor:
    """Of a table ``(*shape, nodes, width)``, the row ``(*shape, width)`` at each element's index."""
    return table.take_along_dim(index.unsqueeze(-1).unsqueeze(-1), -2).squeeze(-2)


EXP_LOW, EXP_HIGH = -18.0, 10.0
_EXP_STEP_BITS, _EXP_INDEX_BITS = 2, 3
_EXP_ENTRY_BITS, _EXP_FACTOR_BITS, _EXP_DIGIT_BITS = 22, 24, 10


@dataclass(frozen=True)
class Exponential(Correlation):
    """What is dealt for one exponential: R, and e^(low + 4·(j - ι) - 4ρ) for each of the 8 public indices j.

    Args:
        shape: of the argument.
        bits: fractional bits of the argument, counted in steps of 4.
    """

    shape: tuple[int, ...]
    bits: int

    @property
    def fields(self) -> dict[str, Field]:
        """r, and the table of shape ``(*shape, 8, 1)``."""
        return {"r": Field(self.shape), "table": Field((*self.shape, 1 << _EXP_INDEX_BITS, 1), dealt=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The entries, as above."""
        nodes = 1 << _EXP_INDEX_BITS
        index, offset = _nearest_node(uniform.r, self.bits, _EXP_INDEX_BITS)
        node = (torch.arange(nodes) - index.unsqueeze(-1)) % nodes
        exponent = (node - offset.unsqueeze(-1) * 2.0**-self.bits) * 2.0**_EXP_STEP_BITS + EXP_LOW
        return {"table": (exponent.exp() * 2.0**_EXP_ENTRY_BITS).round().to(torch.int64).unsqueeze(-1)}


@cache
def _exponential_digits() -> tuple[Tensor, Tensor]:
    """e^(4a) for a in [-1/2, 1/2) as a product over two digits of 10 bits; decimal's exp is correctly rounded."""
    size, one = 1 << _EXP_DIGIT_BITS, 1 << _EXP_FACTOR_BITS
    step = Decimal(1 << _EXP_STEP_BITS)
    high = [round((step * (Decimal(i) / size - Decimal("0.5"))).exp() * one) for i in range(size)]
    low = [round((step * Decimal(i) / size / size).exp() * one) for i in range(size)]
    return torch.tensor(high), torch.tensor(low)


def exponential(x: Share) -> Protocol[Share]:
    """e^X.

    1. open Y + R, Y = (X + 18)/4; 2. j + a = Y + R; 3. [e^X] = e^(4a)·[table_j].

    Args:
        x: a share with values in [-18, 10], at any scale up to 58.

    Returns:
        A share at scale 46.

    Guarantees: a relative error below 2^-16, plus 2^-20 absolute. Outside [-18, 10] the result is meaningless.
    Leakage: none; Y + R is uniform.
    Cost: one round, 8 bytes an element each way; 64 bytes an element dealt, to bob.
    """
    digit_bits = 2 * _EXP_DIGIT_BITS
    x = x.raised(max(x.scale, digit_bits - _EXP_STEP_BITS))
    y = x.plus_public(-int(EXP_LOW) << x.scale)
    bits = x.scale + _EXP_STEP_BITS
    part = yield Take(Exponential(tuple(y.shape), bits))
    (opened,) = yield Open(y.words + part.r)
    index, offset = _nearest_node(opened, bits, _EXP_INDEX_BITS)
    digits = (offset >> (bits - digit_bits)) + (1 << (digit_bits - 1))
    high, low = _exponential_digits()
    first, second = (
        torch.empty_like(digits) if digits.is_meta else table[bits_at(digits, lowest, _EXP_DIGIT_BITS)]
        for table, lowest in ((high, _EXP_DIGIT_BITS), (low, 0))
    )
    factor = (first * second) >> _EXP_FACTOR_BITS
    return y.with_words(_row(part.table, index).squeeze(-1) * factor, _EXP_ENTRY_BITS + _EXP_FACTOR_BITS)


@dataclass(frozen=True)
class OneHot(Correlation):
    """What is dealt to turn an integer below 2^bits into a one-hot vector: R, and the one-hot vector of its top bits.

    Args:
        shape: of the integers.
        bits: there are 2^bits values.
    """

    shape: tuple[int, ...]
    bits: int

    @property
    def fields(self) -> dict[str, Field]:
        """r, and the vector of shape ``(*shape, 2^bits)``."""
        return {"r": Field(self.shape), "vector": Field((*self.shape, 1 << self.bits), dealt=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """The one-hot vectors, as above."""
        top = shift_right(uniform.r, WORD_BITS - self.bits)
        return {"vector": (torch.arange(1 << self.bits) == top.unsqueeze(-1)).to(torch.int64)}


def indicator(x: Share, count: int) -> Protocol[Share]:
    """The vector (1{X = 0}, …, 1{X = count - 1}) of a private integer.

    1. open X·2^(64-k) + R, 2^k ≥ count: j, its top k bits, are X + ι modulo 2^k; 2. the entry for i is the dealt
    vector's at j - i.

    Args:
        x: a share of integers in [0, 2^k); its fractional bits are zero.
        count: how many values to distinguish; an X of ``count`` or more, below 2^k, gives zeros.

    Returns:
        A share of shape ``(*shape, count)``, scale 0, exact.

    Leakage: none; what is opened is uniform.
    Cost: one round, 8 bytes an element each way; 8·2^k bytes an element dealt, to bob.
    """
    bits = max(1, (count - 1).bit_length())
    part = yield Take(OneHot(tuple(x.shape), bits))
    (opened,) = yield Open((x.words << (WORD_BITS - bits - x.scale)) + part.r)
    top = shift_right(opened, WORD_BITS - bits)
    place = (top.unsqueeze(-1) - torch.arange(count, device=top.device)) & ((1 << bits) - 1)
    return x.with_words(part.vector.take_along_dim(place, -1), scale=0)
