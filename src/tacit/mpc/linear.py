"""Products of private tensors: element-wise, matrix products and convolutions.

Every bilinear map ∘ is treated alike (Beaver 1991, for tensors as in SecureML, Mohassel and Zhang 2017). With a dealt
mask A of the left operand, F = W - B the opened difference of the right one, and a dealt C = A∘B,

    X∘W = (X - A)∘W + A∘(W - B) + A∘B      that is, per party      Z_p = E∘W_p + (A_p∘F + C_p).

For a model's weights F is opened once, when the model is loaded, so the bracket is computed before any query and a
query costs one opening E = X - A and one ∘. A truncation or a ReLU (`tacit.mpc.sign`) follows, since the product of two
fixed-point tensors has the sum of their scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.mpc.correlation import Correlation, Field, Part, Party, Provider
from tacit.mpc.shares import Share
from tacit.mpc.steps import Open, Protocol, Take
from tacit.ring.fixed_point import encode
from tacit.ring.kernels import products

MAX_FACTOR = 2.0**30
_MAX_SHIFT = 60


@dataclass(frozen=True)
class MatMul:
    """``torch.matmul``, broadcasting over leading dimensions."""

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of words, modulo 2^64."""
        return products.matmul(left, right)


@dataclass(frozen=True)
class Multiply:
    """The element-wise product, broadcasting."""

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of words, modulo 2^64."""
        return left * right


@dataclass(frozen=True)
class Convolve:
    """``torch.conv2d`` (or 1-d, 3-d by the rank of the operands) with public geometry, without bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Input ``left`` convolved with weight ``right``, modulo 2^64."""
        return products.convolve(left, right, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class Swapped:
    """A bilinear map with its operands exchanged, for products whose *left* operand is the loaded weight."""

    op: MatMul | Multiply | Convolve

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """``op(right, left)``."""
        return self.op(right, left)


Bilinear = MatMul | Multiply | Convolve | Swapped


def multiplications(op: Bilinear, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many words ``op`` multiplies on operands of these shapes, for estimates of computing time."""
    if isinstance(op, Swapped):
        return multiplications(op.op, right, left)
    outputs = math.prod(output_shape(op, left, right))
    if isinstance(op, MatMul):
        return outputs * left[-1]
    return outputs * (math.prod(right[1:]) if isinstance(op, Convolve) else 1)


def output_shape(op: Bilinear, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``op`` on operands of these shapes."""
    blank = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in (left, right))
    return tuple(op(*blank).shape)


@dataclass(frozen=True, eq=False, repr=False)
class Weight:
    """A loaded weight as one party holds it.

    Args:
        share: its share of W.
        number: which dealt mask B hides it.
        difference: F = W - B, which both parties know.
        bias: its share of what is added to every product with W, broadcasting; added before any query.
    """

    share: Share
    number: int
    difference: Tensor
    bias: Share | None = None

    def __repr__(self) -> str:
        return f"Weight({self.number}, {self.share})"


@dataclass(frozen=True)
class WeightMask(Correlation):
    """The mask B of weight ``number``: uniform, so nothing is sent; the provider keeps it while the weight is
    loaded."""

    number: int
    shape: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """B."""
        return {"b": Field(self.shape)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """Remember B, to derive A∘B with every query."""
        provider.weight_masks[self.number] = uniform.b
        return {}


@dataclass(frozen=True)
class WeightProduct(Correlation):
    """For one product with weight ``number``: a mask A of the input, and A∘B.

    Args:
        number: the weight's.
        op: the bilinear map.
        left: the input's shape.
        right: the weight's.
        lift: the bits by which the product's scale exceeds the bias's, where the weight has one.
    """

    number: int
    op: Bilinear
    left: tuple[int, ...]
    right: tuple[int, ...]
    lift: int = 0

    @property
    def fields(self) -> dict[str, Field]:
        """A, and q: C = A∘B as dealt, Q = A∘F + C + bias once prepared."""
        return {"a": Field(self.left), "q": Field(output_shape(self.op, self.left, self.right), dealt=True)}

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """C = A∘B."""
        return {"q": self.op(uniform.a, provider.weight_masks[self.number])}

    @property
    def multiplications(self) -> int:
        """One ∘."""
        return multiplications(self.op, self.left, self.right)

    def prepare(self, part: Part, party: Party) -> Part:
        """Q_p = A_p∘F + C_p + bias_p."""
        weight: Weight = party.weights[self.number]
        q = self.op(part.a, weight.difference).add_(part.q)
        return Part(a=part.a, q=q if weight.bias is None else q.add_(weight.bias.words << self.lift))


@dataclass(frozen=True)
class Product(Correlation):
    """For one product of two operands that are both new: masks A and B, and A∘B."""

    op: Bilinear
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """A, B and C = A∘B."""
        return {
            "a": Field(self.left),
            "b": Field(self.right),
            "c": Field(output_shape(self.op, self.left, self.right), dealt=True),
        }

    def derive(self, uniform: Part, provider: Provider) -> dict[str, Tensor]:
        """C = A∘B."""
        return {"c": self.op(uniform.a, uniform.b)}

    @property
    def multiplications(self) -> int:
        """Two ∘."""
        return 2 * multiplications(self.op, self.left, self.right)


def load_weight(weight: Share, number: int) -> Protocol[Weight]:
    """Open a weight under a mask that stays fixed while it is loaded.

    1. take [B]; 2. open F = W - B.

    Args:
        weight: a share of W, any shape and scale.
        number: unique among the weights that these parties ever load, so that no W is opened twice under one B and no
            two under the same.

    Guarantees: F is uniform and independent of W, since B is.
    Cost: one round, 8 bytes an element each way; nothing dealt.
    """
    mask = yield Take(WeightMask(number, tuple(weight.shape)))
    (difference,) = yield Open(weight.words - mask.b)
    return Weight(weight, number, difference)


def times_weight(x: Share, weight: Weight, op: Bilinear) -> Protocol[Share]:
    """[X]∘[W] for a loaded weight, plus its bias if it has one.

    1. take [A] and Q; 2. open E = X - A; 3. Z_p = E∘W_p + Q_p.

    Args:
        x: a share of X.
        weight: the loaded W.
        op: the bilinear map, with x as its left operand.

    Returns:
        A share of X∘W, exact in the ring, at the sum of the two scales; a bias has at most as many fractional bits.

    Leakage: none; E is uniform.
    Cost: one round, 8 bytes an element of X each way; 8 bytes an element of the product dealt, to bob.
    Source: Beaver, CRYPTO 1991; Mohassel and Zhang, SecureML, S&P 2017, section IV-A.
    """
    scale = x.scale + weight.share.scale
    lift = scale - weight.bias.scale if weight.bias else 0
    part = yield Take(WeightProduct(weight.number, op, tuple(x.shape), tuple(weight.share.shape), lift))
    (opened,) = yield Open(x.words - part.a)
    return x.with_words(op(opened, weight.share.words).add_(part.q), scale)


def times(x: Share, y: Share, op: Bilinear) -> Protocol[Share]:
    """[X]∘[Y] for two private operands.

    1. take [A], [B], [C]; 2. open E = X - A and F = Y - B; 3. Z_p = E∘Y_p + A_p∘F + C_p.

    Args:
        x: a share of X.
        y: a share of Y.
        op: the bilinear map.

    Returns:
        A share of X∘Y, exact in the ring, at the sum of the two scales.

    Leakage: none; E and F are uniform.
    Cost: one round, 8 bytes an element of X and of Y each way; 8 bytes an element of the product dealt, to bob.
    Source: Beaver, CRYPTO 1991.
    """
    part = yield Take(Product(op, tuple(x.shape), tuple(y.shape)))
    e, f = yield Open(x.words - part.a, y.words - part.b)
    return x.with_words(op(e, y.words).add_(op(part.a, f)).add_(part.c), x.scale + y.scale)


def times_public(x: Share, values: Tensor, op: Bilinear, bits: int) -> Share:
    """[X]∘V for a public real tensor V encoded at ``bits`` fractional bits; local."""
    return x.with_words(op(x.words, encode(values, bits, what="public operand")), x.scale + bits)


def times_number(x: Share, factor: float) -> Share:
    """[X] times a public number, locally.

    The factor is taken as a mantissa of at most 16 bits times a power of two, and the power goes into the scale.

    Args:
        x: a share.
        factor: of magnitude below 2^30.

    Returns:
        A share whose scale grows by what the mantissa has after its point: up to 15 bits for a factor of magnitude 1,
        one more for each halving.

    Guarantees: the factor's relative error is at most 2^-16, and powers of two (an average over 4 values, a halving)
        are exact and free. A factor below 2^-45 gives 0, which is right to within 2^-31.
    Raises:
        InputError: the factor is not finite or too large.
    """
    if not abs(factor) < MAX_FACTOR:
        raise InputError(f"a public factor of {factor} is out of range: magnitudes below 2^30 are taken")
    mantissa, shift = _mantissa(factor)
    if not mantissa or shift > _MAX_SHIFT:
        return x.with_words(torch.zeros_like(x.words))
    scaled = x.with_words(x.words * mantissa if mantissa != 1 else x.words, x.scale + shift)
    return scaled if scaled.scale >= 0 else scaled.raised(0)


def _mantissa(factor: float) -> tuple[int, int]:
    """(m, s) with factor ≈ m / 2^s, m odd or 0 and at most 16 bits."""
    numerator, denominator = float(factor).as_integer_ratio()
    shift = denominator.bit_length() - 1
    excess = max(0, abs(numerator).bit_length() - 16)
    numerator, shift = round(numerator / 2**excess), shift - excess
    while numerator and numerator % 2 == 0:
        numerator, shift = numerator // 2, shift - 1
    return numerator, shift
