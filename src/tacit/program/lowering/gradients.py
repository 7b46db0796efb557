"""Gradients operator by operator, as PyTorch's autograd asks for them.

A traced step is rewritten as a whole (`tacit.program.step`); here each ATen operator comes alone, and what a backward
operator may know is what its forward operator left behind. ReLU and max-pooling leave the bits that they compared, as
shares of 0 and 1: the gradient is a product with them. The bits are held by the parties alone and live as long as
autograd's graph does; the provider remembers nothing between two operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import linear
from tacit.mpc.gradients import InputGradient, WeightGradient
from tacit.mpc.linear import Convolve, MatMul, Multiply
from tacit.mpc.pooling import Windows
from tacit.mpc.shares import Share
from tacit.mpc.sign import comparison_window, masked_opening
from tacit.mpc.steps import Protocol, Role, together
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.lowering.operands import Context, Operand, constant, is_private, product, scaled, share_of
from tacit.program.lowering.structure import identity
from tacit.ring.fixed_point import FRACTION_BITS

_PADDING = -4096
"""What padding holds in max-pooling, as in `tacit.mpc.pooling.max_pool`."""


@dataclass(frozen=True)
class Fine(Context):
    """Settings under which a truncation keeps 24 fractional bits: gradients of a mean over many items are small.

    A product of two such shares has 48, so that magnitudes below 16,384 stay below 2^62, as everywhere.
    """

    def truncate(self, x: Share, scale: int = PARAMETER_BITS) -> Protocol[Share]:
        """Drop fractional bits beyond ``scale``, if there are any."""
        return (yield from super().truncate(x, scale)) if x.scale > scale else x


def _compared(context: Context, z: Share, scale: int) -> Protocol[tuple[Share, Share]]:
    """max(z, 0) at ``scale``, and 1{z ≥ 0} at scale 0; the rounds of a ReLU, and one bit an element more."""
    window = comparison_window(z.scale, context.chunks)
    opening = yield from masked_opening(z, max(0, z.scale - scale), window, select=True)
    bit = yield from opening.nonnegative()
    value, number = yield from together(opening.times(bit), opening.as_number(bit))
    return value, number


def relu(context: Context, x: Operand) -> Protocol[tuple[Share, Share]]:
    """``relu`` at scale 16, and the bits of its gradient; three rounds.

    Returns:
        The value and a share of 1{x ≥ 0}, both of x's shape; see `tacit.mpc.sign.relu` for the error.
    """
    return (yield from _compared(context, share_of(x), FRACTION_BITS))


def max_pool(
    context: Context, x: Operand, kernel: Sequence[int], *geometry: Any
) -> Protocol[tuple[tuple[Share, Share], Share]]:
    """``max_pool2d`` with its indices, and the bits of its gradient, by a tournament.

    Args:
        context: the engine's settings.
        x: of shape ``(..., rows, columns)``, at any scale.
        kernel: and ``geometry``, stride, padding, dilation and ceil_mode, as ATen's operator takes them.

    Returns:
        The values, the private indices (scale 0, as PyTorch counts them; of equal elements any one), and one bit for
        each position of the window: shape ``(w, *values)``, a one at the winner.

    Guarantees: the value is within 2^-16 of the largest. Padding stands for -4,096: with padding, elements must be
        larger than that.
    Leakage: none; the bits and the indices stay shares.
    Cost: for a window of w elements, with L = ceil(log2 w): 4·L - 1 rounds, w - 1 comparisons and at most w·(L - 1)
        products.
    """
    own, windows = share_of(x), _windows(kernel, *geometry)
    alice = own.holder is Role.ALICE
    views = windows.elements(own.words, _PADDING << own.scale if alice else 0)
    sure = torch.full_like(views[0], int(alice))
    players = [(view, {position: sure}) for position, view in enumerate(views)]
    first = True
    while len(players) > 1:
        half = len(players) // 2
        sides = players[:half], players[half : 2 * half]
        left, right = (own.with_words(torch.stack([words for words, _ in side])) for side in sides)
        gain, won = yield from _compared(context, left - right, own.scale)
        lost = -won.plus_public(-1)
        pairs = [*zip(won.words, sides[0], strict=True), *zip(lost.words, sides[1], strict=True)]
        factors = won.with_words(torch.stack([bit for bit, (_, flags) in pairs for _ in flags]))
        if not first:
            held = won.with_words(torch.stack([flag for _, (_, flags) in pairs for flag in flags.values()]))
            factors = yield from linear.times(held, factors, Multiply())
        names = [[*flags] for _, (_, flags) in pairs]
        parts = iter(factors.words)
        after = [{position: next(parts) for position in positions} for positions in names]
        winners = (right + gain).words
        players = [(winners[i], after[i] | after[half + i]) for i in range(half)] + players[2 * half :]
        first = False
    values, flags = players[0]
    bits = own.with_words(torch.stack([flags[position] for position in range(len(views))]), 0)
    return (own.with_words(values), _indices(bits, windows, tuple(own.shape[-2:]))), bits


def _indices(bits: Share, windows: Windows, sizes: tuple[int, ...]) -> Share:
    """Where in the image each winner stands, counted row by row; local."""
    places = _places(windows, sizes).to(bits.words.device)
    column = places.view(len(places), *[1] * (bits.words.dim() - 3), *places.shape[1:])
    return bits.map(lambda words: (words * column).sum(0))


def _places(windows: Windows, sizes: tuple[int, ...]) -> Tensor:
    """Where in the image each position of each window lies, ``(w, *windows.outputs(sizes))``; padding beyond its
    end."""
    numbers = torch.arange(sizes[0] * sizes[1]).view(sizes)
    return torch.stack(windows.elements(numbers, numbers.numel()))


def threshold_backward(context: Context, gradient: Operand, bits: Share, threshold: float) -> Protocol[Share]:
    """The gradient where ReLU's input was not negative; one round, two where the gradient has to be truncated."""
    if threshold != 0:
        raise UnsupportedOperator(f"a threshold of {threshold} on what relu gave has no encrypted form: use where")
    return (yield from product(context, gradient, bits, Multiply()))


def max_pool_backward(
    context: Context,
    gradient: Operand,
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    bits: Share,
) -> Protocol[Share]:
    """Each window's gradient at the element that won; one round, two where the gradient has to be truncated."""
    windows = _windows(kernel, stride, padding, dilation, ceil_mode)
    # The gradient is opened once, whatever the number of positions: it broadcasts against their bits.
    parts = yield from product(context, share_of(gradient).map(lambda words: words.unsqueeze(0)), bits, Multiply())
    rows, columns = x.shape[-2:]
    places = _places(windows, (rows, columns)).to(parts.words.device)

    def scatter(words: Tensor) -> Tensor:
        lead = words.shape[1:-2]
        image = words.new_zeros((*lead, rows * columns + 1))
        image.index_add_(-1, places.flatten(), words.movedim(0, -3).flatten(-3))
        return image[..., :-1].reshape(*lead, rows, columns)

    return parts.map(scatter)


def _windows(
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Windows:
    both = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (kernel, stride or kernel, padding, dilation)]
    return Windows(both[0], both[1], both[2], both[3], ceil_mode)


def adaptive_max_pool(
    context: Context, x: Operand, cells: Sequence[int]
) -> Protocol[tuple[tuple[Share, Share], Share]]:
    """``adaptive_max_pool2d`` where the output's size divides the input's, as `max_pool`."""
    return (yield from max_pool(context, x, _cell(share_of(x).shape, cells)))


def adaptive_max_pool_backward(context: Context, gradient: Operand, x: Any, bits: Share) -> Protocol[Share]:
    """As `max_pool_backward`."""
    cell = _cell(x.shape, share_of(gradient).shape[-2:])
    return (yield from max_pool_backward(context, gradient, x, cell, (), (0,), (1,), False, bits))


def adaptive_avg_pool_backward(context: Context, gradient: Operand, x: Any) -> Protocol[Share]:
    """Each cell's gradient in equal parts at its elements, where the cells are alike; local, or `scaled`'s rounds."""
    rows, columns = _cell(x.shape, share_of(gradient).shape[-2:])
    spread = share_of(gradient).map(lambda own: own.repeat_interleave(rows, -2).repeat_interleave(columns, -1))
    return (yield from scaled(context, spread, 1.0 / (rows * columns)))


def _cell(sizes: Sequence[int], cells: Sequence[int]) -> list[int]:
    if any(size % count for size, count in zip(sizes[-2:], cells, strict=True)):
        raise UnsupportedOperator(f"adaptive pooling of {tuple(sizes[-2:])} to {tuple(cells)}: it has to divide it")
    return [size // count for size, count in zip(sizes[-2:], cells, strict=True)]


def convolution_backward(
    context: Context,
    gradient: Operand,
    x: Any,
    weight: Any,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Protocol[tuple[Share | None, Share | None, Share | None]]:
    """A convolution's gradients for input, weight and bias, where ``wanted``; one round, and those of truncations."""
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    own = yield from context.truncate(share_of(gradient))
    for_input: Any = Convolve(*geometry) if transposed else InputGradient(tuple(x.shape[2:]), *geometry)
    for_weight: Any = WeightGradient(tuple(weight.shape[2:]), *geometry)
    products: list[Protocol[Share]] = []
    if wanted[0]:
        products.append(product(context, own, weight, for_input))
    if wanted[1]:
        left, right = (x, own) if transposed else (own, x)
        products.append(product(context, left, right, for_weight))
    found = iter((yield from together(*products)))
    return (
        next(found) if wanted[0] else None,
        next(found) if wanted[1] else None,
        own.map(lambda words: words.transpose(0, 1).flatten(1).sum(1)) if wanted[2] else None,
    )


def upsample_nearest_backward(operator: Callable[..., Tensor]) -> Callable[..., Share]:
    """The gradient of nearest-neighbour upsampling: added up where elements were taken from; local."""

    def lowering(
        context: Context, gradient: Operand, output: Sequence[int], sizes: Sequence[int], *scales: float | None
    ) -> Share:
        own, spatial = share_of(gradient), tuple(sizes[2:])
        count = math.prod(spatial)
        # Positions are found by upsampling the numbers of the elements, exact in float64.
        numbers = torch.arange(count, dtype=torch.float64).view(1, 1, *spatial)
        places = operator(numbers, output, *scales).to(torch.int64).flatten().to(own.words.device)

        def add(words: Tensor) -> Tensor:
            total = words.new_zeros((*words.shape[:2], count))
            return total.index_add_(2, places, words.flatten(2)).view(*words.shape[:2], *spatial)

        return own.map(add)

    return lowering


def upsample_linear_backward(operator: Callable[..., Tensor]) -> Callable[..., Protocol[Share]]:
    """The gradient of linear upsampling: a product with the same public weights, transposed."""

    def lowering(
        context: Context, gradient: Operand, output: Sequence[int], sizes: Sequence[int], *options: Any
    ) -> Protocol[Share]:
        own, spatial = share_of(gradient), tuple(sizes[2:])
        count = math.prod(spatial)
        unit = torch.eye(count, dtype=torch.float64).view(count, 1, *spatial)
        weights = operator(unit, output, *options).flatten(1).T
        result = yield from product(context, own.map(lambda words: words.flatten(2)), weights, MatMul())
        return result.map(lambda words: words.view(*words.shape[:2], *spatial))

    return lowering


def _placed(view: Callable[..., Tensor]) -> Callable[..., Share]:
    """The gradient of a view that picks elements: the gradient at these elements, zeros elsewhere; local."""

    def lowering(context: Context, gradient: Operand, sizes: Sequence[int], *where: int) -> Share:
        def place(words: Tensor) -> Tensor:
            whole = words.new_zeros(tuple(sizes))
            view(whole, *where).copy_(words)
            return whole

        return share_of(gradient).map(place)

    return lowering


def index_put(context: Context, x: Any, indices: Sequence[Any], values: Operand, accumulate: bool = False) -> Share:
    """``index_put`` at public positions, the gradient of indexing by them; local."""
    whole, new = _aligned(x, values)
    where = tuple(None if one is None else _public(one, whole) for one in indices)
    return whole.with_words(torch.ops.aten.index_put.default(whole.words, where, new.words, accumulate))


def scatter_add(context: Context, x: Any, dim: int, positions: Any, source: Operand) -> Share:
    """``scatter_add`` at public positions, the gradient of gathering at them; local."""
    whole, new = _aligned(x, source)
    return whole.with_words(whole.words.scatter_add(dim, _public(positions, whole), new.words))


def scatter_number(context: Context, x: Operand, dim: int, positions: Any, number: float) -> Share:
    """``scatter`` of one public number at public positions, as the gradient by class numbers needs it; local."""
    where = _public(positions, share_of(x))
    whole, new = _aligned(x, torch.full(tuple(where.shape), float(number)))
    return whole.with_words(whole.words.scatter(dim, where, new.words))


def _public(positions: Any, like: Share) -> Tensor:
    if is_private(positions):
        raise UnsupportedOperator("the gradient at private positions has no encrypted form: use one-hot vectors")
    where: Tensor = positions.to(like.words.device)
    return where


def _aligned(x: Any, y: Any) -> tuple[Share, Share]:
    """Two operands of which one is private, as shares at one scale."""
    like = share_of(x if is_private(x) else y)
    left, right = (share_of(value) if is_private(value) else constant(like, value) for value in (x, y))
    scale = max(left.scale, right.scale)
    return left.raised(scale), right.raised(scale)


LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.convolution_backward.default": convolution_backward,
    "aten._adaptive_avg_pool2d_backward.default": adaptive_avg_pool_backward,
    "aten.conj_physical.default": identity,
    "aten.select_backward.default": _placed(Tensor.select),
    "aten.slice_backward.default": _placed(torch.ops.aten.slice.Tensor),
    **{
        f"aten.upsample_nearest{n}d_backward.default": upsample_nearest_backward(
            getattr(torch.ops.aten, f"upsample_nearest{n}d").default
        )
        for n in (1, 2, 3)
    },
    **{
        f"aten.upsample_{name}_backward.default": upsample_linear_backward(
            getattr(torch.ops.aten, f"upsample_{name}").default
        )
        for name in ("linear1d", "bilinear2d")
    },
    "aten.index_put.default": index_put,
    "aten.scatter_add.default": scatter_add,
    "aten.scatter.value": scatter_number,
}

WITH_BITS: dict[str, Callable[..., Any]] = {
    "aten.relu.default": relu,
    "aten.max_pool2d_with_indices.default": max_pool,
    "aten.adaptive_max_pool2d.default": adaptive_max_pool,
}
"""Operators as they run where their gradient will be asked for: they give their results, and bits for the gradient."""

BY_BITS: dict[str, tuple[int, Callable[..., Any]]] = {
    "aten.threshold_backward.default": (1, threshold_backward),
    "aten.max_pool2d_with_indices_backward.default": (7, max_pool_backward),
    "aten.adaptive_max_pool2d_backward.default": (2, adaptive_max_pool_backward),
}
"""Gradients that take these bits: in the place of which argument, the last result of the forward operator."""

STEP_BY_STEP = tuple(f"aten.native_{kind}_norm.default" for kind in ("layer", "group", "batch"))
"""Operators that run as what they are defined by where their gradient will be asked for: it takes what lies between."""
