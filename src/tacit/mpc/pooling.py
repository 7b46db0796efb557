"""Max-pooling and average pooling of private images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from tacit.errors import InputError
from tacit.mpc.all_pairs import largest
from tacit.mpc.linear import times_number
from tacit.mpc.shares import Share
from tacit.mpc.sign import MAX_CHUNKS, relu
from tacit.mpc.steps import Protocol, Role
from tacit.ring.fixed_point import FRACTION_BITS, MAGNITUDE_BITS

_PADDING_BITS = MAGNITUDE_BITS - 2


@dataclass(frozen=True)
class Windows:
    """The public geometry of pooling over the last dimensions of a tensor, as torch's pooling functions take it.

    Args:
        kernel: window size a dimension.
        stride: step a dimension.
        padding: rows added on both sides a dimension.
        dilation: distance of a window's elements a dimension.
        ceil_mode: whether a window may hang over the far edge.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    def outputs(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows each dimension of an input of ``sizes`` has."""
        counts = []
        for size, k, s, p, d in zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            span = size + 2 * p - d * (k - 1) - 1
            count = (-(-span // s) if self.ceil_mode else span // s) + 1
            # A window that would start in the padding beyond the far edge is not one.
            counts.append(count - 1 if self.ceil_mode and (count - 1) * s >= size + p else count)
        if min(counts) < 1:
            raise InputError(f"a pooling window of {self.kernel} does not fit an input of {sizes}")
        return tuple(counts)

    def elements(self, tensor: Tensor, filler: int) -> list[Tensor]:
        """One tensor for each position in the window, holding that element of every window; views where possible."""
        every = self._every(tensor, filler)
        return [every[offsets] for offsets in product(*map(range, self.kernel))]

    def stacked(self, tensor: Tensor, filler: int) -> Tensor:
        """The same in one contiguous tensor, ``(positions, ..., *outputs)``."""
        every = self._every(tensor, filler)
        return every.reshape(math.prod(self.kernel), *every.shape[len(self.kernel) :])

    def _every(self, tensor: Tensor, filler: int) -> Tensor:
        """All windows, ``(*kernel, ..., *outputs)``; a view where there is no padding."""
        rank = len(self.kernel)
        sizes = tuple(tensor.shape[-rank:])
        counts = self.outputs(sizes)
        edges: list[int] = []
        for size, count, k, s, p, d in zip(
            sizes, counts, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            far = max(0, (count - 1) * s + d * (k - 1) + 1 - size - p)
            edges = [p, far, *edges]
        if any(edges):
            tensor = functional.pad(tensor, edges, value=filler)
        before, last = tensor.stride()[:-rank], tensor.stride()[-rank:]
        within = [step * d for step, d in zip(last, self.dilation, strict=True)]
        between = [step * s for step, s in zip(last, self.stride, strict=True)]
        return tensor.as_strided((*self.kernel, *tensor.shape[:-rank], *counts), (*within, *before, *between))


def max_pool(x: Share, windows: Windows, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The largest element of every window, by a tournament.

    1. split the window's elements in two halves; 2. keep the larger of each pair; 3. repeat until one is left.

    Args:
        x: a share of shape ``(..., *sizes)`` at any scale.
        windows: the geometry.
        chunks: the comparison window's size; it must hold the difference of any two elements of a window.

    Returns:
        A share of shape ``(..., *windows.outputs(sizes))`` at x's scale.

    Guarantees: the element returned is within 2^-16 of the largest. Padding stands for -4,096: with padding, elements
        must be larger than that.
    Leakage: none.
    Cost: 3·ceil(log2 w) rounds and w - 1 comparisons (see `tacit.mpc.sign.relu`) a window of w elements.
    """
    candidates = windows.elements(x.words, filler(x))
    while len(candidates) > 1:
        half = len(candidates) // 2
        left, right, rest = candidates[:half], candidates[half : 2 * half], candidates[2 * half :]
        differences = x.words.new_empty((half, *left[0].shape))
        for one, other, difference in zip(left, right, differences.unbind(), strict=True):
            torch.sub(one, other, out=difference)
        # max(x, y) = y + max(x - y, 0)
        gains = yield from relu(x.with_words(differences), x.scale, chunks)
        candidates = [gain.add_(other) for gain, other in zip(gains.words.unbind(), right, strict=True)] + rest
    return x.with_words(candidates[0])


def max_pool_at_once(x: Share, windows: Windows, rectify: bool, chunks: int = MAX_CHUNKS) -> Protocol[Share]:
    """The largest element of every window of at most 4, by comparing all pairs; see `tacit.mpc.all_pairs.largest`.

    Args:
        x: a share of shape ``(..., *sizes)`` at any scale.
        windows: the geometry; padding as in `max_pool`.
        rectify: whether to take max(0, ·) of it, truncated to 16 fractional bits on the way.
        chunks: the comparison window's size.

    Returns:
        A share of shape ``(..., *windows.outputs(sizes))``.

    Cost: 4 rounds.
    """
    values = x.with_words(windows.stacked(x.words, filler(x)))
    return (yield from largest(values, rectify, FRACTION_BITS if rectify else None, chunks))


def filler(x: Share) -> int:
    """What padding holds: a public constant is alice's alone, bob's padding is zeros."""
    return -(1 << (_PADDING_BITS - FRACTION_BITS + x.scale)) if x.holder is Role.ALICE else 0


def average_pool(x: Share, windows: Windows, divisor: int | None = None) -> Share:
    """The mean of every window: a local sum, and a public factor that goes into the scale.

    Args:
        x: a share of shape ``(..., *sizes)``.
        windows: the geometry; padding counts as zeros.
        divisor: divide by this instead of the window's size.

    Returns:
        A share of a larger scale, to be truncated by whatever follows. The factor's relative error is at most 2^-16,
        and zero where the divisor is a power of two.
    """
    first, *others = windows.elements(x.words, 0)
    total = sum(others, start=first)
    return times_number(x.with_words(total), 1.0 / (divisor or math.prod(windows.kernel)))
