"""What operators of a training step are defined by, where PyTorch's own definitions do not suit fixed point.

A step is traced down to products, sums and a few functions. For norms PyTorch defines gradients through third powers of
1/√variance and differences of large numbers, which fixed point holds badly. Here a norm and its gradient are written
with the normalised x̂, which is of magnitude 1:

    x̂ = (x - mean)·r,   y = x̂·γ + β,   dγ = Σ g·x̂,   dβ = Σ g,   dx = r·(d - mean(d) - x̂·mean(d·x̂))   with d = g·γ.

The gradient computes x - mean and x̂ anew from the operands that autograd kept; in a step they are found to be the same
values (`tacit.program.step`) and are computed once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel

_aten = torch.ops.aten


@contextmanager
def plain_operators() -> Iterator[None]:
    """Inside, PyTorch takes no kernels that fuse what it could also compute operator by operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setting the flags back warns of hardware that is not there
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            yield


def _statistics(x: Tensor, dims: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and 1/√(variance + ε) over dimensions, which are kept."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    return mean, variance, (variance + epsilon).rsqrt()


def _input_gradient(d: Tensor, normalised: Tensor, root: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = d - d.mean(dims, keepdim=True)
    return (centred - normalised * (d * normalised).mean(dims, keepdim=True)) * root


def _affine(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_layer_norm``."""
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    mean, _, root = _statistics(x, dims, epsilon)
    return _affine((x - mean) * root, weight, bias), mean, root


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    root: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``native_layer_norm_backward``."""
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    items = tuple(range(x.dim() - len(shape)))
    normalised = (x - mean) * root
    d = gradient if weight is None else gradient * weight
    return (
        _input_gradient(d, normalised, root, dims) if wanted[0] else None,
        _total(gradient * normalised, items, shape) if wanted[1] and weight is not None else None,
        _total(gradient, items, shape) if wanted[2] and bias is not None else None,
    )


def _total(values: Tensor, dims: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    return values.sum(dims) if dims else values.reshape(tuple(shape))


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, positions: int, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_group_norm``."""
    grouped = x.reshape(n, groups, -1)
    mean, _, root = _statistics(grouped, (2,), epsilon)
    column = (c, *[1] * (x.dim() - 2))
    normalised = ((grouped - mean) * root).view(x.shape)
    scaled = _affine(normalised, *(None if one is None else one.view(column) for one in (weight, bias)))
    return scaled, mean.squeeze(2), root.squeeze(2)


def group_norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    root: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    positions: int,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``native_group_norm_backward``."""
    root = root.unsqueeze(2)
    normalised = (x.reshape(n, groups, -1) - mean.unsqueeze(2)) * root
    d = gradient if weight is None else gradient * weight.view(c, *[1] * (x.dim() - 2))
    others = (0, *range(2, x.dim()))
    return (
        _input_gradient(d.reshape(n, groups, -1), normalised, root, (2,)).view(x.shape) if wanted[0] else None,
        (gradient * normalised.view(x.shape)).sum(others) if wanted[1] else None,
        gradient.sum(others) if wanted[2] else None,
    )


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Any,
    running_variance: Any,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_batch_norm``, which changes the running statistics in training."""
    dims, column = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    if training:
        mean, variance, root = _statistics(x, dims, epsilon)
        count = math.prod(x.shape[axis] for axis in dims)
        fresh = (mean.view(-1), variance.view(-1) * (count / max(1, count - 1)))
        for running, new in zip((running_mean, running_variance), fresh, strict=True):
            if running is not None:
                running.copy_(running + momentum * (new - running))
    else:
        mean, root = running_mean.view(column), (running_variance.view(column) + epsilon).rsqrt()
    normalised = (x - mean) * root
    scaled = _affine(normalised, *(None if one is None else one.view(column) for one in (weight, bias)))
    kept = (mean.view(-1), root.view(-1)) if training else (x.new_zeros(0), x.new_zeros(0))
    return scaled, *kept


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Any,
    running_variance: Any,
    mean: Tensor,
    root: Tensor,
    training: bool,
    epsilon: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``native_batch_norm_backward``."""
    dims, column = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    if not training:
        mean, root = running_mean, (running_variance.view(column) + epsilon).rsqrt()
    root = root.view(column)
    normalised = (x - mean.view(column)) * root
    d = gradient if weight is None else gradient * weight.view(column)
    return (
        (_input_gradient(d, normalised, root, dims) if training else root * d) if wanted[0] else None,
        (gradient * normalised).sum(dims) if wanted[1] else None,
        gradient.sum(dims) if wanted[2] else None,
    )


def softmax_without_empty_rows(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``_safe_softmax``: nothing private is infinite, so no row is empty."""
    return torch.softmax(x, dim)


DEFINITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            *(_aten.mse_loss, _aten.mse_loss_backward, _aten.addcmul, _aten.addcdiv, _aten.native_dropout_backward),
            *(_aten.tanh_backward, _aten.sigmoid_backward, _aten.gelu_backward, _aten.silu, _aten.silu_backward),
            *(_aten.elu_backward, _aten.leaky_relu_backward, _aten.hardtanh_backward, _aten.hardsigmoid),
            *(_aten.hardsigmoid_backward, _aten.hardswish, _aten.hardswish_backward, _aten.softplus),
            *(_aten.softplus_backward, _aten.log_sigmoid_forward, _aten.log_sigmoid_backward, _aten.mish),
            *(_aten.mish_backward, _aten._softmax_backward_data, _aten.smooth_l1_loss, _aten.smooth_l1_loss_backward),
            *(_aten.huber_loss, _aten.huber_loss_backward, _aten.binary_cross_entropy),
            *(_aten.binary_cross_entropy_backward, _aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu),
        ]
    ),
    _aten.native_layer_norm.default: layer_norm,
    _aten.native_layer_norm_backward.default: layer_norm_backward,
    _aten.native_group_norm.default: group_norm,
    _aten.native_group_norm_backward.default: group_norm_backward,
    _aten.native_batch_norm.default: batch_norm,
    _aten.native_batch_norm_backward.default: batch_norm_backward,
    _aten._safe_softmax.default: softmax_without_empty_rows,
}
"""Definitions by operator, for `tacit.trace.trace_function`."""
