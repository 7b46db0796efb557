"""Operators of a training step on shares: products of operands masked once, gradients that reuse the forward's bits.

The ``tacit.*`` operators here do not come from PyTorch: `tacit.program.step` writes them into a traced step in the
place of ATen's. Otherwise they are lowerings like those of `tacit.program.lowering`, whose table they join.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from tacit.mpc import coin, functions, gates, masked, sign, tables
from tacit.mpc.gates import Kept
from tacit.mpc.gradients import InputGradient, WeightGradient
from tacit.mpc.linear import Convolve, MatMul, Multiply, times_number, times_public
from tacit.mpc.masked import Masked, View
from tacit.mpc.pooling import Windows
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.lowering.operands import Context
from tacit.program.lowering.pooling import divided, window_counts
from tacit.ring.fixed_point import FRACTION_BITS

PARAMETER_BITS = 24
"""Fractional bits of parameters and of the optimizer's state: updates far below 2^-16 are not lost."""
_BEFORE_FACTOR = 32
"""A factor adds 16 bits to a word. From 32 fractional bits, magnitudes below 16,384 then stay below 2^62."""
_LARGEST_SCALE = 40
"""What a product of a parameter and an activation has; beyond it a share is truncated to `PARAMETER_BITS`."""
_FINEST_SCALE = 48
"""What a product of two parameters has; from beyond it, no operator goes on."""
_WEIGHT_BITS = 22
"""Fractional bits of the optimizer's public numbers."""

Views = Sequence[tuple[str, tuple[Any, ...]]]


def scaled(context: Context, x: Any, factor: float) -> Protocol[Any]:
    """x times a public number: powers of two are free and exact, others take up to two truncations.

    The factor's relative error is at most 2^-16. An x that is public itself stays so.
    """
    if isinstance(x, Tensor):
        return x * factor
    if math.frexp(factor)[0] in (0.5, -0.5):
        halved = times_number(x, factor)
        return halved if halved.scale <= _FINEST_SCALE else (yield from sign.truncate(halved, _BEFORE_FACTOR))
    if x.scale > _BEFORE_FACTOR:
        x = yield from sign.truncate(x, _BEFORE_FACTOR)
    x = times_number(x, factor)
    return (yield from sign.truncate(x, PARAMETER_BITS)) if x.scale > _LARGEST_SCALE else x


def weighed(context: Context, x: Share, number: Tensor) -> Protocol[Share]:
    """x times a public number in [0, 1] that changes from step to step, so that its scale must not depend on it.

    The number is rounded to 22 fractional bits. One or two rounds.
    """
    x = yield from truncated(context, x, PARAMETER_BITS)
    return (yield from sign.truncate(times_public(x, number, Multiply(), _WEIGHT_BITS), PARAMETER_BITS))


def inverse_root(context: Context, x: Share) -> Protocol[Share]:
    """``rsqrt`` for values from 2^-16 to 2^14; a smaller one counts as 2^-16. See `tacit.mpc.functions.power`."""
    return functions.power(x, "rsqrt", least=-8, chunks=context.chunks)


def truncated(context: Context, x: Share, scale: int) -> Protocol[Share]:
    """x at exactly ``scale`` fractional bits; one round where it has more."""
    return (yield from sign.truncate(x, scale)) if x.scale > scale else x.raised(scale)


def mask(context: Context, x: Share, name: str, scale: int = FRACTION_BITS) -> Protocol[Masked]:
    """x opened under a mask, truncated to ``scale`` first if a product with it would grow too far."""
    if x.scale > max(scale, PARAMETER_BITS):
        x = yield from sign.truncate(x, scale)
    return (yield from masked.mask(x, name))


def mean(context: Context, x: Share, dim: Sequence[int], keepdim: bool = False, **_: Any) -> Protocol[Share]:
    """``mean`` over dimensions to 24 fractional bits or more, of sums up to 2^30; see `tacit.mpc.functions.mean`."""
    dims = tuple(axis % len(x.shape) for axis in dim) if dim else tuple(range(len(x.shape)))
    x = yield from functions.reduced(x, 2 * FRACTION_BITS)
    result = yield from functions.mean(x, dims)
    return result if keepdim else result.map(lambda words: words.squeeze(dims))


def toss(context: Context) -> Protocol[Tensor]:
    """A public seed for this step's dropout; one round."""
    return coin.toss()


def kept(context: Context, seed: Tensor, name: str, shape: tuple[int, ...], chance: float) -> Tensor:
    """``bernoulli``: public zeros and ones that the parties draw from their common seed; local."""
    return coin.kept(seed, name, shape, chance)


def one_hot(context: Context, indices: Share, count: int) -> Protocol[Share]:
    """Private indices as vectors of zeros and a one; one round. See `tacit.mpc.tables.indicator`."""
    return tables.indicator(indices, count)


def without_row(context: Context, x: Share, row: int) -> Share:
    """x with zeros in one row; local."""

    def cleared(words: Tensor) -> Tensor:
        words = words.clone()
        words[row] = 0
        return words

    return x.map(cleared)


def _product(op: Any) -> Callable[..., Protocol[Share]]:
    """A bilinear map on two masked operands, each with the views it is taken through; no round."""

    def lowering(
        context: Context, x: Masked, x_views: Views, y: Masked, y_views: Views, *geometry: Any
    ) -> Protocol[Share]:
        left, right = (m.seen(*(View(*view) for view in views)) for m, views in ((x, x_views), (y, y_views)))
        return masked.times(left, right, op(*geometry))

    return lowering


def relu(context: Context, x: Share, name: str) -> Protocol[tuple[Share, Kept]]:
    """``relu``, and the bits for its gradient; three rounds."""
    return gates.relu(x, name, chunks=context.chunks)


def threshold_backward(context: Context, gradient: Share, kept: Kept) -> Protocol[Share]:
    """The gradient where ReLU's input was positive, else zero, truncated on the way; one round."""
    (passed,) = yield from gates.select(gradient, kept)
    return passed


def max_pool(context: Context, x: Share, name: str, *geometry: Any) -> Protocol[tuple[Share, Kept]]:
    """``max_pool2d``, and the bits for its gradient; see `tacit.mpc.pooling.max_pool`."""
    return gates.max_pool(x, Windows(*geometry), name, context.chunks)


def max_pool_backward(
    context: Context, gradient: Share, kept: Kept, sizes: tuple[int, ...], *geometry: Any
) -> Protocol[Share]:
    """Each window's gradient at the element that won; one round."""
    parts = yield from gates.select(gradient, kept)
    return parts[0].with_words(_scatter(Windows(*geometry), [part.words for part in parts], sizes))


def avg_pool2d_backward(
    context: Context,
    gradient: Share,
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Protocol[Share]:
    """Each window's gradient in equal parts at its elements; local, or `scaled`'s rounds."""
    both = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (kernel, stride or kernel, padding)]
    windows, sizes = Windows(both[0], both[1], both[2], (1, 1), ceil_mode), tuple(x.shape[-2:])
    number = math.prod(windows.kernel)
    if divisor or (not ceil_mode and (count_include_pad or not any(padding))):
        spread = gradient.with_words(_scatter(windows, [gradient.words] * number, sizes))
        averaged: Share = yield from scaled(context, spread, 1.0 / (divisor or number))
        return averaged
    own = yield from functions.reduced(gradient, PARAMETER_BITS)
    part: Share = divided(own, window_counts(windows, sizes, count_include_pad))
    return part.with_words(_scatter(windows, [part.words] * number, sizes))


def _scatter(windows: Windows, parts: Sequence[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """The transpose of `Windows.elements`: each position's tensor added to where it was taken from."""
    counts = windows.outputs(sizes)
    geometry = zip(sizes, counts, windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True)
    far = [max(0, (count - 1) * s + d * (k - 1) + 1 - size - p) for size, count, k, s, p, d in geometry]
    padded = [size + p + f for size, p, f in zip(sizes, windows.padding, far, strict=True)]
    total = parts[0].new_zeros((*parts[0].shape[: -len(sizes)], *padded))
    inside = replace(windows, padding=(0,) * len(sizes), ceil_mode=False)
    for view, part in zip(inside.elements(total, 0), parts, strict=True):
        view += part
    edges = [edge for p, f in zip(reversed(windows.padding), reversed(far), strict=True) for edge in (-p, -f)]
    return functional.pad(total, edges) if any(edges) else total


def part(context: Context, values: Sequence[Any], index: int) -> Any:
    """One result of an operator that has several; local."""
    return values[index]


LOWERINGS: dict[str, Callable[..., Any]] = {
    "tacit.scale": scaled,
    "tacit.weigh": weighed,
    "tacit.inverse_root": inverse_root,
    "tacit.truncate": truncated,
    "tacit.mask": mask,
    "tacit.matmul": _product(MatMul),
    "tacit.multiply": _product(Multiply),
    "tacit.convolve": _product(Convolve),
    "tacit.convolve_input_gradient": _product(InputGradient),
    "tacit.convolve_weight_gradient": _product(WeightGradient),
    "tacit.relu": relu,
    "tacit.relu_gradient": threshold_backward,
    "tacit.max_pool": max_pool,
    "tacit.max_pool_gradient": max_pool_backward,
    "tacit.part": part,
    "tacit.mean": mean,
    "tacit.toss": toss,
    "tacit.kept": kept,
    "tacit.one_hot": one_hot,
    "tacit.without_row": without_row,
    "aten.avg_pool2d_backward.default": avg_pool2d_backward,
}
