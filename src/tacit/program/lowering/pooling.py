"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import linear, pooling
from tacit.mpc.all_pairs import MAX_VALUES
from tacit.mpc.linear import Multiply
from tacit.mpc.lockstep import Meter, plan
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.program.lowering.operands import Context, Operand, fit, share_of
from tacit.program.network import SECONDS_PER_DEALT_BYTE, Network
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import RELU_MAX_POOL


def max_pool(
    context: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Protocol[tuple[Share, None]]:
    """``max_pool2d`` and ``max_pool3d``, without the indices that ATen returns beside it."""
    rank = len(kernel) if len(kernel) > 1 else 2
    windows = _windows(rank, kernel, stride, padding, dilation, ceil_mode)
    return (yield from _pooled(context, share_of(x), windows, rectify=False)), None


def max_pool_relu(
    context: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Protocol[Share]:
    """``relu(max_pool2d(x))``, which truncates on the way."""
    windows = _windows(2, kernel, stride, padding, dilation, ceil_mode)
    return (yield from _pooled(context, share_of(x), windows, rectify=True))


def _pooled(context: Context, x: Share, windows: pooling.Windows, rectify: bool) -> Protocol[Share]:
    """By a tournament or by all pairs, whichever takes less time on the network that is planned for."""
    x = context.zoomed((yield from context.comparable(x)))
    network = context.network
    if network is None or math.prod(windows.kernel) > MAX_VALUES:
        way = _tournament
    else:
        way = _fastest(tuple(x.shape), x.scale, windows, rectify, context.chunks, context.exact, network)
    return context.unzoomed((yield from way(replace(context, extra=0), x, windows, rectify)))


def _tournament(context: Context, x: Share, windows: pooling.Windows, rectify: bool) -> Protocol[Share]:
    best = yield from pooling.max_pool(x, windows, context.chunks)
    return (yield from context.relu(best)) if rectify else best


def _all_pairs(context: Context, x: Share, windows: pooling.Windows, rectify: bool) -> Protocol[Share]:
    return (yield from pooling.max_pool_at_once(x, windows, rectify, context.chunks))


@lru_cache(maxsize=1024)
def _fastest(
    shape: tuple[int, ...],
    scale: int,
    windows: pooling.Windows,
    rectify: bool,
    chunks: int,
    exact: bool,
    network: Network,
) -> Callable[..., Protocol[Share]]:
    """The choice, remembered: a run makes it anew, and planning takes far longer than pooling."""
    context = Context(chunks, network, exact)
    blank = Share(torch.empty(shape, dtype=torch.int64, device="meta"), scale, Role.ALICE)
    return min((_tournament, _all_pairs), key=lambda way: _seconds(way(context, blank, windows, rectify), network))


def _seconds(protocol: Protocol[Share], network: Network) -> float:
    meter = Meter()
    plan(protocol, meter)
    return network.seconds(meter.rounds, meter.bytes_online) + SECONDS_PER_DEALT_BYTE * meter.bytes_dealt


def adaptive_max_pool2d(context: Context, x: Operand, output_size: Sequence[int]) -> Protocol[tuple[Share, None]]:
    """``adaptive_max_pool2d`` where the output's size divides the input's."""
    sizes = share_of(x).shape[-2:]
    if any(size % cells for size, cells in zip(sizes, output_size, strict=True)):
        raise UnsupportedOperator(
            f"adaptive max pooling of {tuple(sizes)} to {tuple(output_size)}: it has to divide it"
        )
    kernel = [size // cells for size, cells in zip(sizes, output_size, strict=True)]
    return (yield from max_pool(context, x, kernel))


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
    own = yield from fit(context, share_of(x))
    windows = _windows(own.words.dim() - 2, kernel, stride, padding, (1,), ceil_mode)
    if divisor_override or (not ceil_mode and (count_include_pad or not any(padding))):
        return pooling.average_pool(own, windows, divisor_override)
    total = own.with_words(sum(windows.elements(own.words, 0)))  # type: ignore[arg-type]
    return divided(total, window_counts(windows, own.shape[2:], count_include_pad))


def window_counts(windows: pooling.Windows, sizes: Sequence[int], with_padding: bool) -> Tensor:
    """By how much ``avg_pool`` divides the sum of every window: what lies beyond the padding never counts.

    Args:
        windows: the geometry, undilated.
        sizes: of the pooled dimensions.
        with_padding: whether padding counts.

    Returns:
        float64 of the shape of the pooled dimensions' results.
    """
    counts = torch.ones((), dtype=torch.float64)
    geometry = zip(sizes, windows.outputs(tuple(sizes)), windows.kernel, windows.stride, windows.padding, strict=True)
    for size, count, k, s, p in geometry:
        starts = torch.arange(count) * s - p
        first, end = (-p, size + p) if with_padding else (0, size)
        counts = counts.unsqueeze(-1) * ((starts + k).clamp(max=end) - starts.clamp(min=first))
    return counts


def adaptive_avg_pool2d(context: Context, x: Operand, output_size: Sequence[int]) -> Protocol[Share]:
    """``adaptive_avg_pool2d``; local. Cell i of n over a size s averages rows floor(i·s/n) to ceil((i+1)·s/n)."""
    own = yield from fit(context, share_of(x))
    rows, columns = (
        [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        for size, cells in zip(own.shape[-2:], output_size, strict=True)
    )
    words = [torch.stack([own.words[..., a:b, c:d].sum((-2, -1)) for c, d in columns], -1) for a, b in rows]
    counts = torch.tensor([[(b - a) * (d - c) for c, d in columns] for a, b in rows], dtype=torch.float64)
    return divided(own.with_words(torch.stack(words, -2)), counts)


def divided(sums: Share, counts: Tensor) -> Share:
    """Sums divided by public counts, which are mostly all the same; local."""
    first = counts.flatten()[0].item()
    if bool((counts == first).all()):
        return linear.times_number(sums, 1.0 / first)
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


LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.max_pool2d_with_indices.default": max_pool,
    RELU_MAX_POOL: max_pool_relu,
    "aten.max_pool3d_with_indices.default": max_pool,
    "aten.adaptive_max_pool2d.default": adaptive_max_pool2d,
    "aten.avg_pool1d.default": avg_pool,
    "aten.avg_pool2d.default": avg_pool,
    "aten.avg_pool3d.default": avg_pool,
    "aten._adaptive_avg_pool2d.default": adaptive_avg_pool2d,
}
