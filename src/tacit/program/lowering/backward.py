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

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions, gates, masked, sign
from tacit.mpc.gates import Kept
from tacit.mpc.gradients import InputGradient, WeightGradient
from tacit.mpc.linear import Convolve, MatMul, Multiply, times_number, times_public
from tacit.mpc.masked import Masked, View
from tacit.mpc.pooling import Windows
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.lowering.operands import Context
from tacit.ring.fixed_point import FRACTION_BITS

PARAMETER_BITS = 24
"""Fractional bits of parameters and of the optimizer's state: updates far below 2^-16 are not lost."""
_BEFORE_FACTOR = 32
"""A factor adds 16 bits to a word. From 32 fractional bits, magnitudes below 16,384 then stay below 2^62."""
_LARGEST_SCALE = 40
"""What a product of a parameter and an activation has; beyond it a share is truncated to `PARAMETER_BITS`."""
_WEIGHT_BITS = 22
"""Fractional bits of the optimizer's public numbers."""

Views = Sequence[tuple[str, tuple[Any, ...]]]


def scaled(context: Context, x: Share, factor: float) -> Protocol[Share]:
    """x times a public number: powers of two are free and exact, others take up to two truncations.

    The factor's relative error is at most 2^-16.
    """
    if math.frexp(factor)[0] in (0.5, -0.5):
        return times_number(x, factor)
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
    x: Share,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Protocol[Share]:
    """Each window's gradient in equal parts at its elements; local, or `scaled`'s rounds."""
    if ceil_mode or (any(padding) and not count_include_pad):
        raise UnsupportedOperator("average pooling with ceil_mode or without its padding has no encrypted form yet")
    both = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (kernel, stride or kernel, padding)]
    windows = Windows(both[0], both[1], both[2], (1, 1))
    count = math.prod(windows.kernel)
    spread = gradient.with_words(_scatter(windows, [gradient.words] * count, tuple(x.shape[-2:])))
    return (yield from scaled(context, spread, 1.0 / (divisor or count)))


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
    "aten.avg_pool2d_backward.default": avg_pool2d_backward,
}
