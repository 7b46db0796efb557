"""Sums and products: linear layers, element-wise arithmetic, means and variances, powers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions
from tacit.mpc.gradients import InputGradient
from tacit.mpc.linear import Convolve, MatMul, Multiply, Weight, times_number
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.lowering.operands import Context, Operand, fit, is_private, plus, product, scaled, share_of
from tacit.ring.fixed_point import FRACTION_BITS

MAX_POWER = 64


def convolution(
    context: Context,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Protocol[Share]:
    """``conv1d`` to ``conv3d``, ``conv_transpose1d`` to ``conv_transpose3d``; one round, plus what `fit` needs."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if transposed:
        # A transposed convolution is what the gradient of a convolution with respect to its input is.
        kernel = _tensor(weight).shape[2:]
        sizes = zip(_tensor(x).shape[2:], kernel, *geometry[:3], output_padding, strict=True)
        outputs = tuple((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in sizes)
        op: Any = InputGradient(outputs, *geometry)
    else:
        op = Convolve(*geometry)
    result = yield from product(context, x, weight, op)
    if bias is None or _has_bias(weight):
        return result
    column = (-1, *[1] * len(stride))
    return plus(
        result, bias.reshape(column) if isinstance(bias, Tensor) else share_of(bias).map(lambda b: b.view(column))
    )


def _has_bias(weight: Any) -> bool:
    """Whether a weight's products come with their bias; see `tacit.program.run.load`."""
    return isinstance(weight, Weight) and weight.bias is not None


def _tensor(value: Any) -> Tensor:
    return share_of(value).words if is_private(value) else value


def addmm(
    context: Context, bias: Operand, x: Operand, weight: Operand, *, beta: float = 1, alpha: float = 1
) -> Protocol[Share]:
    """``beta * bias + alpha * x @ weight``; one round."""
    result = yield from product(context, x, weight, MatMul())
    if _has_bias(weight):
        return result
    if alpha != 1:
        result = yield from scaled(context, result, alpha)
    if beta != 1 and not isinstance(bias, Tensor):
        bias = yield from scaled(context, bias, beta)
    return plus(result, bias if not isinstance(bias, Tensor) else beta * bias)


def matmul(context: Context, x: Operand, y: Operand) -> Protocol[Share]:
    """``mm``, ``bmm``, ``mv`` and ``dot``; one round."""
    return (yield from product(context, x, y, MatMul()))


def multiply(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``mul``: by a public number locally, otherwise one round."""
    if isinstance(x, int | float):
        x, y = y, x
    if isinstance(y, int | float):
        return (yield from scaled(context, x, float(y)))
    return (yield from product(context, x, y, Multiply()))


def divide(context: Context, x: Any, divisor: Any, *, rounding_mode: str | None = None) -> Protocol[Share]:
    """``div``: by a public number or tensor locally, by a private tensor in six rounds (`functions.power`)."""
    if rounding_mode is not None:
        raise UnsupportedOperator(f"division with rounding_mode={rounding_mode!r} has no encrypted form")
    if is_private(divisor):
        numerator = share_of(x) if is_private(x) else None
        result = yield from _inverse(context, divisor, numerator)
        return result if numerator is not None else (yield from multiply(context, result, x))
    if isinstance(divisor, Tensor):
        return (yield from product(context, x, divisor.to(torch.float64).reciprocal(), Multiply()))
    return (yield from scaled(context, x, 1.0 / float(divisor)))


def reciprocal(context: Context, x: Operand) -> Protocol[Share]:
    """``reciprocal``; six rounds."""
    return (yield from _inverse(context, x, None))


def _inverse(context: Context, x: Operand, numerator: Share | None) -> Protocol[Share]:
    return (yield from functions.power(share_of(x), "reciprocal", numerator, signed=True, chunks=context.chunks))


def rsqrt(context: Context, x: Operand) -> Protocol[Share]:
    """``rsqrt``; six rounds."""
    return (yield from functions.power(share_of(x), "rsqrt", chunks=context.chunks))


def sqrt(context: Context, x: Operand) -> Protocol[Share]:
    """``sqrt``; six rounds, seven after a product."""
    return (yield from functions.sqrt(share_of(x), context.chunks))


def power(context: Context, x: Operand, exponent: float) -> Protocol[Share]:
    """``pow`` with a public exponent: ±1/2, or an integer up to 64 in magnitude, by repeated squaring."""
    if exponent in (0.5, -0.5):
        return (yield from (sqrt if exponent > 0 else rsqrt)(context, x))
    if exponent != int(exponent) or not 1 <= abs(exponent) <= MAX_POWER:
        raise UnsupportedOperator(
            f"pow to {exponent} has no encrypted form: ±0.5 and whole numbers from 1 to {MAX_POWER} do"
        )
    square, rest, result = share_of(x), abs(int(exponent)), None
    while rest:
        if rest & 1:
            result = square if result is None else (yield from product(context, result, square, Multiply()))
        rest >>= 1
        if rest:
            square = yield from product(context, square, square, Multiply())
    return result if exponent > 0 else (yield from reciprocal(context, result))  # type: ignore[arg-type,return-value]


def exponential_of(context: Context, base: float, x: Operand) -> Protocol[Share]:
    """``pow`` of a public positive base: e^(x·log base)."""
    if not base > 0:
        raise UnsupportedOperator(f"powers of {base} have no encrypted form: the base must be positive")
    return (yield from functions.exp((yield from scaled(context, x, math.log(base))), context.chunks))


def add(context: Context, x: Any, y: Any, *, alpha: float = 1) -> Protocol[Share]:
    """``x + alpha * y``; local."""
    if not is_private(x):
        if alpha != 1:
            y = yield from scaled(context, y, alpha)
        return plus(y, x)
    if is_private(y):
        return plus(x, (yield from scaled(context, y, alpha)) if alpha != 1 else y)
    return plus(x, alpha * y)


def subtract(context: Context, x: Any, y: Any, *, alpha: float = 1) -> Protocol[Share]:
    """``x - alpha * y``; local."""
    return (yield from add(context, x, y, alpha=-alpha))


def reverse_subtract(context: Context, x: Operand, y: Any, alpha: float = 1) -> Protocol[Share]:
    """``y - alpha * x``; local."""
    return (yield from add(context, y, x, alpha=-alpha))


def negate(context: Context, x: Operand) -> Share:
    """``neg``; local."""
    return -share_of(x)


def sum_(context: Context, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Share:
    """``sum`` over dimensions, or over all; local."""
    return share_of(x).map(lambda own: own.sum(tuple(dim), keepdim) if dim else own.sum())


def mean(
    context: Context, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Protocol[Share]:
    """``mean`` over dimensions, or over all; local."""
    x = yield from fit(context, share_of(x))
    total = sum_(context, x, dim, keepdim)
    return times_number(total, total.words.numel() / x.words.numel())


def var_mean(
    context: Context,
    x: Operand,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Protocol[tuple[Share, Share]]:
    """``var_mean``; two or three rounds."""
    own = share_of(x)
    dims = tuple(dim) if dim else tuple(range(own.words.dim()))
    centred = yield from functions.centred(own, dims)
    squares = yield from product(context, centred, centred, Multiply())
    average = yield from functions.mean(squares, dims)
    count = squares.words.numel() // max(1, average.words.numel())
    divisor = count - (1 if correction is None else correction)
    if divisor <= 0:
        raise UnsupportedOperator(f"the variance of {count} values with correction {correction} is not finite")
    average = average if keepdim else average.map(lambda words: words.squeeze(dims))
    if divisor != count:
        average = yield from functions.reduced(average, FRACTION_BITS + 8)
    return times_number(average, count / divisor), (yield from mean(context, own, dims, keepdim))


def var(context: Context, x: Operand, dim: Sequence[int] | None = None, **options: Any) -> Protocol[Share]:
    """``var``; two or three rounds."""
    return (yield from var_mean(context, x, dim, **options))[0]


def vector_norm(
    context: Context, x: Operand, ord: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Protocol[Share]:
    """``linalg_vector_norm`` of order 1 or 2."""
    if ord == 2:
        own = yield from fit(context, share_of(x))
        squares = yield from product(context, own, own, Multiply())
        return (yield from sqrt(context, sum_(context, squares, dim, keepdim)))
    if ord == 1:
        return sum_(context, (yield from functions.absolute(share_of(x), context.chunks)), dim, keepdim)
    raise UnsupportedOperator(f"a norm of order {ord} has no encrypted form: 1 and 2 do")


LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.convolution.default": convolution,
    "aten.addmm.default": addmm,
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.mv.default": matmul,
    "aten.dot.default": matmul,
    "aten.mul.Tensor": multiply,
    "aten.mul.Scalar": multiply,
    "aten.div.Tensor": divide,
    "aten.div.Scalar": divide,
    "aten.div.Tensor_mode": divide,
    "aten.reciprocal.default": reciprocal,
    "aten.rsqrt.default": rsqrt,
    "aten.sqrt.default": sqrt,
    "aten.pow.Tensor_Scalar": power,
    "aten.pow.Scalar": exponential_of,
    "aten.add.Tensor": add,
    "aten.add.Scalar": add,
    "aten.sub.Tensor": subtract,
    "aten.sub.Scalar": subtract,
    "aten.rsub.Scalar": reverse_subtract,
    "aten.rsub.Tensor": reverse_subtract,
    "aten.neg.default": negate,
    "aten.sum.default": sum_,
    "aten.sum.dim_IntList": sum_,
    "aten.mean.default": mean,
    "aten.mean.dim": mean,
    "aten.var.correction": var,
    "aten.var_mean.correction": var_mean,
    "aten.linalg_vector_norm.default": vector_norm,
}

BIAS_POSITIONS: dict[str, tuple[int, int]] = {"aten.convolution.default": (1, 2), "aten.addmm.default": (2, 0)}

FACTOR_POSITIONS: dict[str, tuple[int, ...]] = {
    "aten.convolution.default": (0, 1),
    "aten.addmm.default": (1, 2),
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.mv.default": (0, 1),
    "aten.dot.default": (0, 1),
    "aten.mul.Tensor": (0, 1),
}
"""Which arguments of an operator enter a product: state tensors there are loaded as weights."""
