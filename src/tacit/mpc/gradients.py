"""The gradients of a convolution, as bilinear maps.

For Y = X ⋆ W both are linear in dY: dX is a transposed convolution of dY with W, and dW a convolution of
X with dY. Both are exact in the ring, so products on shares use them like any ∘.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.ring.kernels import products


@dataclass(frozen=True)
class InputGradient:
    """dX from dY and W, for a convolution of 1 to 3 dimensions with public geometry.

    Args:
        sizes: X's spatial dimensions.
        stride: of the convolution, like ``padding``, ``dilation`` and ``groups``.
    """

    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """dX of shape ``(batch, channels, *sizes)``, modulo 2^64."""
        geometry = zip(
            self.sizes, gradient.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        # Rows at the far edge that no window reached are part of X; they have no gradient.
        unreached = [size - ((count - 1) * s - 2 * p + d * (k - 1) + 1) for size, count, k, s, p, d in geometry]
        transposed = True
        return torch.convolution(
            gradient, weight, None, self.stride, self.padding, self.dilation, transposed, unreached, self.groups
        )


@dataclass(frozen=True)
class WeightGradient:
    """dW from dY and X, for a convolution of 1 to 3 dimensions with public geometry.

    Args:
        kernel: W's spatial dimensions.
        stride: of the convolution, like ``padding``, ``dilation`` and ``groups``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """dW of shape ``(out channels, channels / groups, *kernel)``, modulo 2^64."""
        # X convolved with dY, images in the place of channels: dY's elements lie a stride apart, its steps a dilation.
        images, filters = (tensor.transpose(0, 1).chunk(self.groups) for tensor in (inputs, gradient))
        parts = [
            products.convolve(x.contiguous(), dy.contiguous(), self.dilation, self.padding, self.stride, 1)
            for x, dy in zip(images, filters, strict=True)
        ]
        whole = torch.cat([part.transpose(0, 1) for part in parts])
        # Rows at the far edge that no window reached would give taps beyond the kernel's.
        for axis, size in enumerate(self.kernel, 2):
            whole = whole.narrow(axis, 0, size)
        return whole
