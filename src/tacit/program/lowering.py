"""ATen operators on shares: one table, which is all that tacit can run.

A lowering takes what the ATen operator takes, with `Share`s (and loaded `Weight`s) in the place of tensors, and a
`Context`. It returns a share, or a protocol where the parties have to exchange something. Products leave their result
at the sum of their operands' scales; whatever comes next truncates on its own opening where it can (`relu`) or on
purpose (`_fit`).

Plain tensors among the arguments are public constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import linear, pooling, sign
from tacit.mpc.linear import Bilinear, Convolve, MatMul, Multiply, Swapped, Weight
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.ring.fixed_point import FRACTION_BITS, encode

Operand = Share | Weight
Result = Share | Protocol[Share]
MAX_FACTOR_SCALE = FRACTION_BITS + 8
MAX_SCALE = 2 * FRACTION_BITS + 8


@dataclass(frozen=True)
class Context:
    """The engine's settings for one program.

    Args:
        chunks: the size of every comparison window, in groups of 6 bits; 5 compare magnitudes up to 16,384.
    """

    chunks: int = sign.MAX_CHUNKS


def _share(value: Operand) -> Share:
    return value.share if isinstance(value, Weight) else value


def _fit(x: Share) -> Protocol[Share]:
    """Truncate a share that would overflow in a product; most shares pass unchanged and for nothing."""
    if x.scale <= MAX_FACTOR_SCALE:
        return x
    return (yield from sign.truncate(x))


def _product(x: Operand | Tensor, y: Operand | Tensor, op: Bilinear) -> Protocol[Share]:
    """The bilinear map on any mix of shares, loaded weights and public tensors."""
    if isinstance(x, Weight | Tensor):
        x, y, op = y, x, Swapped(op) if not isinstance(op, Multiply | Swapped) else op
    if isinstance(x, Tensor | Weight):
        raise UnsupportedOperator("a product of two constants belongs to the model's owner, not to the parties")
    x = yield from _fit(x)
    if isinstance(y, Tensor):
        return linear.times_public(x, y, op, FRACTION_BITS)
    if isinstance(y, Weight):
        return (yield from linear.times_weight(x, y, op))
    y = yield from _fit(y)
    return (yield from linear.times(x, y, op))


def _scaled(x: Operand, factor: float) -> Protocol[Share]:
    """x times a public number, truncating first where the scale would grow too far."""
    result = linear.times_number(_share(x), factor)
    if result.scale <= MAX_SCALE:
        return result
    x = yield from sign.truncate(_share(x))
    return linear.times_number(x, factor)


def _plus(x: Operand, other: Operand | Tensor | float) -> Share:
    x = _share(x)
    if isinstance(other, Share | Weight):
        return x + _share(other)
    words = encode(torch.as_tensor(other, dtype=torch.float64).to(x.words.device), what="public operand")
    x = x.raised(max(x.scale, FRACTION_BITS))
    words = words << (x.scale - FRACTION_BITS)
    return x.map(lambda own: own + torch.zeros_like(words)).plus_public(words)


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
    """``conv1d`` to ``conv3d``; one round, plus what `_fit` needs."""
    if transposed:
        raise UnsupportedOperator("transposed convolutions have no encrypted form yet")
    op = Convolve(tuple(stride), tuple(padding), tuple(dilation), groups)
    result = yield from _product(x, weight, op)
    if bias is None:
        return result
    column = (-1, *[1] * len(stride))
    return _plus(
        result,
        bias.reshape(column) if isinstance(bias, Tensor) else _share(bias).map(lambda b: b.view(column)),
    )


def addmm(
    context: Context, bias: Operand, x: Operand, weight: Operand, *, beta: float = 1, alpha: float = 1
) -> Protocol[Share]:
    """``beta * bias + alpha * x @ weight``; one round."""
    product = yield from _product(x, weight, MatMul())
    if alpha != 1:
        product = yield from _scaled(product, alpha)
    if beta != 1 and not isinstance(bias, Tensor):
        bias = yield from _scaled(bias, beta)
    return _plus(product, bias if not isinstance(bias, Tensor) else beta * bias)


def matmul(context: Context, x: Operand, y: Operand) -> Protocol[Share]:
    """``mm``, ``bmm``, ``mv`` and ``dot``; one round."""
    return (yield from _product(x, y, MatMul()))


def multiply(context: Context, x: Any, y: Any) -> Protocol[Share]:
    """``mul``: by a public number locally, otherwise one round."""
    if isinstance(x, int | float):
        x, y = y, x
    if isinstance(y, int | float):
        return (yield from _scaled(x, float(y)))
    return (yield from _product(x, y, Multiply()))


def divide(context: Context, x: Operand, divisor: Any) -> Protocol[Share]:
    """``div`` by a public number or tensor."""
    if isinstance(divisor, Share | Weight):
        raise UnsupportedOperator("division by a private tensor has no encrypted form yet")
    if isinstance(divisor, Tensor):
        return (yield from _product(x, divisor.to(torch.float64).reciprocal(), Multiply()))
    return (yield from _scaled(x, 1.0 / float(divisor)))


def add(context: Context, x: Any, y: Any, *, alpha: float = 1) -> Protocol[Share]:
    """``x + alpha * y``; local."""
    if not isinstance(x, Share | Weight):
        if alpha != 1:
            y = yield from _scaled(y, alpha)
        return _plus(y, x)
    if isinstance(y, Share | Weight):
        return _plus(x, (yield from _scaled(y, alpha)) if alpha != 1 else y)
    return _plus(x, alpha * y)


def subtract(context: Context, x: Any, y: Any, *, alpha: float = 1) -> Protocol[Share]:
    """``x - alpha * y``; local."""
    return (yield from add(context, x, y, alpha=-alpha))


def reverse_subtract(context: Context, x: Operand, y: Any, alpha: float = 1) -> Protocol[Share]:
    """``y - alpha * x``; local."""
    return (yield from add(context, y, x, alpha=-alpha))


def relu(context: Context, x: Operand) -> Protocol[Share]:
    """``relu``, which truncates on the way; three rounds."""
    return (yield from sign.relu(_share(x), chunks=context.chunks))


def _compare(context: Context, larger: Any, smaller: Any) -> Protocol[Share]:
    """1{larger >= smaller} as a share at scale 0."""
    difference = yield from subtract(context, larger, smaller)
    return (yield from sign.nonnegative(difference, context.chunks))


def greater_equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x >= y``; three rounds."""
    return (yield from _compare(context, x, y))


def less_equal(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x <= y``; three rounds."""
    return (yield from _compare(context, y, x))


def greater(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x > y``, the negation of ``x <= y``."""
    return -(yield from less_equal(context, x, y)).plus_public(-1)


def less(context: Context, x: Operand, y: Any) -> Protocol[Share]:
    """``x < y``, the negation of ``x >= y``."""
    return -(yield from greater_equal(context, x, y)).plus_public(-1)


def max_pool2d(
    context: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Protocol[tuple[Share, None]]:
    """``max_pool2d``, without the indices that ATen returns beside it."""
    windows = _windows(2, kernel, stride, padding, dilation, ceil_mode)
    return (yield from pooling.max_pool(_share(x), windows, context.chunks)), None


def avg_pool(
    context: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Protocol[Share]:
    """``avg_pool1d`` to ``avg_pool3d``; local."""
    if (any(padding) and not count_include_pad) or ceil_mode:
        raise UnsupportedOperator("average pooling with ceil_mode or without its padding has no encrypted form yet")
    windows = _windows(_share(x).words.dim() - 2, kernel, stride, padding, (1,), ceil_mode)
    x = yield from _fit(_share(x))
    return pooling.average_pool(x, windows, divisor_override)


def adaptive_avg_pool2d(context: Context, x: Operand, output_size: Sequence[int]) -> Protocol[Share]:
    """``adaptive_avg_pool2d``; local. Cell i of n over a size s averages rows floor(i·s/n) to ceil((i+1)·s/n)."""
    x = yield from _fit(_share(x))
    rows, columns = (
        [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        for size, cells in zip(x.shape[-2:], output_size, strict=True)
    )
    words = [torch.stack([x.words[..., a:b, c:d].sum((-2, -1)) for c, d in columns], -1) for a, b in rows]
    sums = x.with_words(torch.stack(words, -2))
    counts = torch.tensor([[(b - a) * (d - c) for c, d in columns] for a, b in rows], dtype=torch.float64)
    if bool((counts == counts[0, 0]).all()):
        return linear.times_number(sums, 1.0 / counts[0, 0].item())
    return linear.times_public(sums, counts.reciprocal().to(sums.words.device), Multiply(), FRACTION_BITS)


def _windows(
    rank: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> pooling.Windows:
    def every_axis(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sizes) * rank if len(sizes) == 1 else tuple(sizes)

    steps = stride if len(stride) else kernel
    return pooling.Windows(every_axis(kernel), every_axis(steps), every_axis(padding), every_axis(dilation), ceil_mode)


def sum_(context: Context, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Share:
    """``sum`` over dimensions, or over all; local."""
    return _share(x).map(lambda own: own.sum(tuple(dim), keepdim) if dim else own.sum())


def mean(
    context: Context, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Protocol[Share]:
    """``mean`` over dimensions, or over all; local."""
    x = yield from _fit(_share(x))
    total = sum_(context, x, dim, keepdim)
    return linear.times_number(total, total.words.numel() / x.words.numel())


def negate(context: Context, x: Operand) -> Share:
    """``neg``; local."""
    return -_share(x)


def cat(context: Context, shares: Sequence[Operand], dim: int = 0) -> Share:
    """``cat``; local."""
    parts = [_share(part) for part in shares]
    scale = max(part.scale for part in parts)
    return parts[0].with_words(torch.cat([part.raised(scale).words for part in parts], dim), scale)


def stack(context: Context, shares: Sequence[Operand], dim: int = 0) -> Share:
    """``stack``; local."""
    return cat(context, [_share(part).map(lambda own: own.unsqueeze(dim)) for part in shares], dim)


def getitem(context: Context, values: Sequence[Any], index: int) -> Any:
    """One result of an operator that has several."""
    if values[index] is None:
        raise UnsupportedOperator("the indices of max pooling have no encrypted form")
    return values[index]


def identity(context: Context, x: Operand, **_: Any) -> Share:
    """``clone``, ``detach``, ``alias``: nothing to do."""
    return _share(x)


def _structural(operator: Callable[..., Tensor]) -> Callable[..., Share]:
    """An operator that only moves elements, done by each party on its own share."""

    def lowering(context: Context, x: Operand, *args: Any, **kwargs: Any) -> Share:
        return _share(x).map(lambda own: operator(own, *args, **kwargs))

    return lowering


def pad(context: Context, x: Operand, edges: Sequence[int], value: float = 0.0) -> Share:
    """``constant_pad_nd``; local."""
    x = _share(x).raised(max(_share(x).scale, FRACTION_BITS))
    filler = int(encode(torch.tensor(float(value)), what="padding")) << (x.scale - FRACTION_BITS)
    public = torch.nn.functional.pad(torch.zeros_like(x.words), tuple(edges), value=filler)
    return x.map(lambda own: torch.nn.functional.pad(own, tuple(edges))).plus_public(public)


_aten = torch.ops.aten
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
    "aten.add.Tensor": add,
    "aten.add.Scalar": add,
    "aten.sub.Tensor": subtract,
    "aten.sub.Scalar": subtract,
    "aten.rsub.Scalar": reverse_subtract,
    "aten.rsub.Tensor": reverse_subtract,
    "aten.neg.default": negate,
    "aten.relu.default": relu,
    "aten.ge.Scalar": greater_equal,
    "aten.ge.Tensor": greater_equal,
    "aten.gt.Scalar": greater,
    "aten.gt.Tensor": greater,
    "aten.le.Scalar": less_equal,
    "aten.le.Tensor": less_equal,
    "aten.lt.Scalar": less,
    "aten.lt.Tensor": less,
    "aten.max_pool2d_with_indices.default": max_pool2d,
    "aten.avg_pool1d.default": avg_pool,
    "aten.avg_pool2d.default": avg_pool,
    "aten.avg_pool3d.default": avg_pool,
    "aten._adaptive_avg_pool2d.default": adaptive_avg_pool2d,
    "aten.sum.default": sum_,
    "aten.sum.dim_IntList": sum_,
    "aten.mean.default": mean,
    "aten.mean.dim": mean,
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    "aten.constant_pad_nd.default": pad,
    "getitem": getitem,
    "aten.alias.default": identity,
    "aten.clone.default": identity,
    "aten.detach.default": identity,
    "aten.view.default": _structural(lambda x, shape: x.reshape(shape)),
    "aten._unsafe_view.default": _structural(lambda x, shape: x.reshape(shape)),
    "aten.expand.default": _structural(_aten.expand.default),
    "aten.permute.default": _structural(_aten.permute.default),
    "aten.t.default": _structural(_aten.t.default),
    "aten.transpose.int": _structural(_aten.transpose.int),
    "aten.squeeze.dim": _structural(_aten.squeeze.dim),
    "aten.squeeze.dims": _structural(_aten.squeeze.dims),
    "aten.unsqueeze.default": _structural(_aten.unsqueeze.default),
    "aten.select.int": _structural(_aten.select.int),
    "aten.slice.Tensor": _structural(_aten.slice.Tensor),
    "aten.flip.default": _structural(_aten.flip.default),
}

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
