"""Batch, layer, group and instance norms.

In a traced model, a batch norm is folded into the layer before it (`tacit.program.rewrite`) and never comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tacit.errors import UnsupportedOperator
from tacit.mpc import functions
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol
from tacit.program.lowering.arithmetic import add, multiply, subtract
from tacit.program.lowering.operands import Context, Operand, is_private, share_of


def layer_norm(
    context: Context, x: Operand, normalized_shape: Sequence[int], weight: Any, bias: Any, epsilon: float
) -> Protocol[tuple[Share, None, None]]:
    """``native_layer_norm``, without the mean and deviation that ATen returns beside it."""
    dims = tuple(range(-len(normalized_shape), 0))
    result = yield from functions.normalise(share_of(x), dims, epsilon, context.chunks)
    return (yield from _affine(context, result, weight, bias, None)), None, None


def group_norm(
    context: Context,
    x: Operand,
    weight: Any,
    bias: Any,
    batch: int,
    channels: int,
    positions: int,
    groups: int,
    epsilon: float,
) -> Protocol[tuple[Share, None, None]]:
    """``native_group_norm``, without the mean and deviation that ATen returns beside it."""
    own = share_of(x)
    grouped = own.map(lambda words: words.reshape(batch, groups, -1))
    result = yield from functions.normalise(grouped, (-1,), epsilon, context.chunks)
    result = result.map(lambda words: words.view(own.shape))
    return (yield from _affine(context, result, weight, bias, own.words.dim() - 2)), None, None


def batch_norm(
    context: Context,
    x: Operand,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    momentum: float,
    epsilon: float,
) -> Protocol[tuple[Share, None, None]]:
    """A batch norm by its running statistics, public or private."""
    own = share_of(x)
    after = own.words.dim() - 2
    if is_private(variance):
        spread = yield from functions.power(
            functions.shifted(share_of(variance), epsilon), "rsqrt", chunks=context.chunks
        )
        factor: Any = spread
    else:
        factor = (variance.to(torch.float64) + epsilon).rsqrt()
    moved = yield from subtract(context, own, _column(mean, after))
    result = yield from multiply(context, moved, _column(factor, after))
    return (yield from _affine(context, result, weight, bias, after)), None, None


def batch_norm_by_batch(
    context: Context, x: Operand, weight: Any, bias: Any, training: bool, momentum: float, epsilon: float
) -> Protocol[tuple[Share, None, None]]:
    """A batch or instance norm by the statistics of what it is given."""
    own = share_of(x)
    dims = (0, *range(2, own.words.dim()))
    result = yield from functions.normalise(own, dims, epsilon, context.chunks)
    return (yield from _affine(context, result, weight, bias, own.words.dim() - 2)), None, None


def native_batch_norm(
    context: Context,
    x: Operand,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    epsilon: float,
) -> Protocol[tuple[Share, None, None]]:
    """``native_batch_norm``, in evaluation, or in training without running statistics."""
    if not training:
        return (yield from batch_norm(context, x, weight, bias, mean, variance, momentum, epsilon))
    if mean is not None or variance is not None:
        raise UnsupportedOperator("running statistics are not updated in secret: use track_running_stats=False")
    return (yield from batch_norm_by_batch(context, x, weight, bias, training, momentum, epsilon))


def _affine(context: Context, x: Share, weight: Any, bias: Any, after: int | None) -> Protocol[Share]:
    """x·weight + bias, both per channel if ``after`` dimensions come after the channels, else by broadcasting."""
    if weight is not None:
        x = yield from multiply(context, x, weight if after is None else _column(weight, after))
    if bias is not None:
        x = yield from add(context, x, bias if after is None else _column(bias, after))
    return x


def _column(value: Any, after: int) -> Any:
    shape = (-1, *[1] * after)
    return value.reshape(shape) if isinstance(value, Tensor) else share_of(value).map(lambda words: words.view(shape))


LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.native_layer_norm.default": layer_norm,
    "aten.native_group_norm.default": group_norm,
    "aten.native_batch_norm.default": native_batch_norm,
    "aten._native_batch_norm_legit_no_training.default": batch_norm,
    "aten._native_batch_norm_legit.no_stats": batch_norm_by_batch,
}

FACTOR_POSITIONS: dict[str, tuple[int, ...]] = {"aten.native_layer_norm.default": (2,)}
