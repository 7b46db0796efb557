"""Matrix product and convolution of words: compiled where that is faster, by torch otherwise.

torch's int64 ``matmul`` and ``conv2d`` are exact modulo 2^64 and slow; they are the definition here, and what runs
where numba is missing, on the ``meta`` device, and for shapes that the compiled loops do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tacit.ring.kernels import load

_FEW_ROWS = 4


def _loops(*operands: Tensor) -> ModuleType | None:
    if all(operand.is_cpu and operand.numel() for operand in operands):
        return load("tacit.ring.kernels.gemm")
    return None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``torch.matmul`` of int64 tensors modulo 2^64, with its broadcasting over leading dimensions."""
    loops = _loops(left, right)
    if loops is None or left.dim() < 2 or right.dim() < 2 or left.shape[-1] != right.shape[-2]:
        return torch.matmul(left, right)
    if right.dim() == 2:
        left, batch = left.reshape(1, -1, left.shape[-1]), left.shape[:-1]
        return _matrices(loops, left, right[None]).view(*batch, right.shape[-1])
    batch = torch.Size(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (left, right))
    out = _matrices(loops, left, right)
    return out.view(*batch, *out.shape[1:])


def _matrices(loops: ModuleType, left: Tensor, right: Tensor) -> Tensor:
    """(b, m, k) times (b, k, n)."""
    transposed = right.stride(1) == 1
    left, right = left.contiguous(), (right.mT if transposed else right).contiguous()
    batch, height, depth = left.shape
    width = right.shape[1 if transposed else 2]
    out = torch.from_numpy(np.empty((batch, height, width), np.int64))
    if height > _FEW_ROWS:
        sizes = (batch, height, depth, width)
        loops.matmul(left.view(-1).numpy(), right.view(-1).numpy(), out.view(-1).numpy(), sizes, transposed)
    else:
        for b in range(batch):
            loops.few_rows(left[b].numpy(), right[b].numpy(), out[b].numpy(), transposed)
    return out


def convolve(
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.conv1d`` to ``conv3d`` (by the rank) of int64 tensors modulo 2^64, without bias."""
    loops = _loops(images, weight)
    rank = len(stride)
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(images.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    ]
    fits = (
        images.dim() == weight.dim() == rank + 2
        and rank in (1, 2)
        and images.shape[1] == weight.shape[1] * groups
        # A depth-wise convolution has too few rows to fill a tile.
        and len(weight) % groups == 0
        and len(weight) // groups > _FEW_ROWS // 2
        and min(sizes) > 0
    )
    if loops is None or not fits:
        return torch.convolution(
            images, weight, None, list(stride), list(padding), list(dilation), False, [0] * rank, groups
        )
    if any(padding):
        images = functional.pad(images, [edge for p in reversed(padding) for edge in (p, p)])
    out = torch.from_numpy(np.empty((len(images), len(weight), *sizes), np.int64))
    # One dimension is two of which the first is 1.
    plane = (1,) * (2 - rank)
    loops.conv2d(
        images.reshape(-1).numpy(),
        weight.reshape(-1).numpy(),
        out.view(-1).numpy(),
        (*images.shape[:2], *plane, *images.shape[2:]),
        (len(weight), *plane, *sizes),
        groups,
        (*plane, *weight.shape[2:]),
        (*plane, *stride),
        (*plane, *dilation),
    )
    return out
